"""Does x ↦ g(x) contract? What measures it, what certifies it, and what keeps it so.

*Measured at a point.* Two numbers, both by vector-Jacobian products alone, for any g. The norm
‖∂g/∂x‖₂ below 1 makes g a contraction near x: every step comes nearer (paper theorem 1). The
spectral radius, which is never above the norm, is the rate at which Picard's iteration and the
adjoint's end up: below 1 at x̂ is what a trained layer needs to converge near x̂, and a bound on the
norm can cost it much more. `jacobian_penalty` is a loss term that keeps either small.

*Certified everywhere.* Where a step's layers are known, `lipschitz` bounds ‖g(x) − g(y)‖ / ‖x − y‖
over all x, y and inputs: below 1 there is one fixed point, and Picard finds it. And
`spectral_normalize` scales the weights down so that it stays below 1 while they are trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .forms.activations import SLOPES, steepest
from .modules import Binding, bindable
from .steps import ConvStep, DenseEnergy, DenseStep, GradientStep, NeuralStep

__all__ = [
    "Certified",
    "convolution_bound",
    "convolution_norm",
    "jacobian_norm",
    "jacobian_penalty",
    "jacobian_radius",
    "lipschitz",
    "spectral_normalize",
]

Step = Callable[..., Tensor]
Module = TypeVar("Module", bound=nn.Module)

# Of modules without weights, rounded up.
CONSTANTS: dict[type[nn.Module], float] = {
    nn.Flatten: 1.0,
    nn.GELU: 1.13,
    nn.Hardtanh: 1.0,
    nn.Identity: 1.0,
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Sigmoid: 0.25,
    nn.SiLU: 1.1,
    nn.Softplus: 1.0,
    nn.Tanh: 1.0,
    nn.Unflatten: 1.0,
}
# Relative rounding of a float64 eigenvalue or singular value, many times over.
ROUNDING = 1e-9
# Power iterations before training, and in a training call.
WARM_UP, ITERATIONS = 100, 10
# Their polynomial's degree at most, and the part of the estimate that it does not tell from 0.
DEGREE, CUT = 10, 0.95
_TAKES = (
    "step must be a DenseStep, a ConvStep, a GradientStep of a DenseEnergy, an nn.Sequential of "
    "nn.Linear, nn.Conv2d and activations, or a NeuralStep of one of these, without hooks"
)


def jacobian_norm(
    g: Step, x: Tensor, *inputs: Tensor, v: Tensor | None = None, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """‖∂g/∂x‖₂ of every sample at x, by power iteration on (∂g/∂x)(∂g/∂x)ᵀ.

    The estimate is ‖(∂g/∂x)ᵀ v‖₂ at a v of length 1: never above the norm, and nearer to it with
    every iteration. Its derivative, with v held fixed, is the norm's own once v has converged.

    Args:
        g: a callable or module g(x, *inputs) that returns x's shape and treats samples apart.
        x: where to linearise, [B, ...], floating; often a solution's x. It gets no gradient.
        inputs: what g depends on besides x.
        v: where to start, shaped like x, of any length; a sample whose v is zero starts at random.
            None: all at random.
        iterations: power iterations, two vector-Jacobian products each.

    Returns:
        The estimates, [B], differentiable in `inputs` and in g's parameters; and the next v, shaped
        like x, of length 1: where the next call at the same or a nearby x goes on.

    Raises:
        TypeError: x is not a floating tensor, or g returns no tensor.
        ValueError: g's value or v is not shaped like x, or iterations < 1.

    Example:
        >>> x, z = torch.zeros(2, 3), torch.ones(2, 3)
        >>> norm, v = jacobian_norm(lambda x, z: 0.5 * torch.tanh(x) + z, x, z)
        >>> [round(n, 3) for n in norm.tolist()]
        [0.5, 0.5]
    """
    v, transposed = _linearise(g, x, inputs, v, iterations)
    with torch.enable_grad():
        for _ in range(iterations):
            v = _unit(v).requires_grad_()
            u = transposed(v, True)
            size = _length(u)
            v = _vjp(u, v, u.detach())  # u is (∂g/∂x)ᵀ v, linear in v: this is (∂g/∂x) u
    return size if torch.is_grad_enabled() else size.detach(), _unit(v)


def jacobian_radius(
    g: Step, x: Tensor, *inputs: Tensor, v: Tensor | None = None, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """The spectral radius of ∂g/∂x for every sample at x, by power iteration on (∂g/∂x)ᵀ.

    The estimate is the growth of v in an iteration, ‖(∂g/∂x)ᵀ v‖₂ / ‖v‖₂, as the geometric mean
    over the last half of the iterations: a complex pair of eigenvalues makes single ones swing
    around it. Far from the converged v it may lie on either side; it is never above the norm.

    Args:
        g: as in `jacobian_norm`.
        x: where to linearise.
        inputs: what g depends on besides x.
        v: where to start, or None.
        iterations: power iterations, one vector-Jacobian product each.

    Returns:
        The estimates, [B], differentiable with v held fixed; and the next v, as in `jacobian_norm`.

    Raises:
        TypeError, ValueError: as in `jacobian_norm`.

    Example:
        >>> a = torch.tensor([[0.5, 100.0], [0.0, 0.4]])  # its norm is 100
        >>> radius, v = jacobian_radius(lambda x: x @ a.T, torch.zeros(1, 2), iterations=100)
        >>> round(radius.item(), 2)
        0.5
    """
    v, transposed = _linearise(g, x, inputs, v, iterations)
    growth = []
    for i in range(iterations):
        last = i >= iterations // 2  # only these are differentiated
        v = transposed(_unit(v), last and torch.is_grad_enabled())
        if last:
            growth.append(_length(v))
    tiny = torch.finfo(v.dtype).tiny
    radius = torch.stack(growth).clamp_min(tiny).log().mean(0).exp()
    return radius, _unit(v)


def jacobian_penalty(
    g: Step,
    x: Tensor,
    *inputs: Tensor,
    bound: float = 0.9,
    v: Tensor | None = None,
    measure: Callable[..., tuple[Tensor, Tensor]] = jacobian_radius,
) -> tuple[Tensor, Tensor]:
    """A loss term that keeps ∂g/∂x small at x: the mean over samples of max(0, measure − bound)².

    It is a soft constraint, seen only where it is evaluated: evaluate it at x̂, add a multiple of it
    to the loss, and hand v on from one training step to the next, so that one power iteration a
    step is enough. A few samples of a batch may be enough, too.

    Args:
        g: as in `jacobian_norm`.
        x: where to linearise.
        inputs: what g depends on besides x.
        bound: what may be had for nothing; below 1.
        v: the one that the last call returned; None: random.
        measure: `jacobian_radius`, or `jacobian_norm` where g must contract in every step.

    Returns:
        The penalty, a scalar, differentiable in `inputs` and in g's parameters; and the next v.

    Raises:
        TypeError, ValueError: as in `jacobian_norm`, or bound is negative.

    Example:
        >>> net, v = torch.nn.Linear(3, 3), None
        >>> for z in torch.randn(5, 4, 3):
        ...     x = torch.zeros_like(z)
        ...     penalty, v = jacobian_penalty(lambda x, z: net(x) + z, x, z, bound=0.9, v=v)
        >>> penalty.shape, v.shape
        (torch.Size([]), torch.Size([4, 3]))
    """
    if not bound >= 0:
        raise ValueError(f"jacobian_penalty: bound must be >= 0 (got {bound!r})")
    size, v = measure(g, x, *inputs, v=v)
    return (size - bound).relu().square().mean(), v


def convolution_norm(
    weight: Tensor, size: tuple[int, int], *, iterations: int = 10, v: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The spectral norm of x ↦ w ⋆ x on images of one size, by an accelerated power iteration.

    The convolution has stride 1 and zero padding k // 2. Its norm grows with the size, up to what
    `convolution_bound` bounds; the norm of the flattened [O, I·k·k] matrix is another number, up to
    k times smaller. The estimate is ‖w ⋆ v‖₂ at the v of length 1 that is returned: never above the
    norm. Its derivative, with v held fixed, is the norm's own once v has converged. Near
    there Chebyshev polynomials of degree 10 make it two to three times as fast as plain iteration.

    Args:
        weight: w, [O, I, k, k], floating, k odd; or two odd numbers in place of k.
        size: H and W.
        iterations: power iterations, each a convolution and a transposed one; 0: measure at v.
        v: where to start, [I, H, W], of any length; None or zero: at random.

    Returns:
        The estimate, a scalar, differentiable in weight, in its dtype but at least float32; and v,
        [I, H, W], where the next call with the same or a nearby weight goes on.

    Raises:
        TypeError: weight is not a floating tensor of four dimensions.
        ValueError: its kernel is even, or size, iterations or v is not as said above.

    Example:
        >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
        >>> norm, v = convolution_norm(blur, (1, 1), iterations=10)
        >>> round(norm.item(), 3)
        0.111
        >>> norm, v = convolution_norm(blur, (32, 32), iterations=100)
        >>> round(norm.item(), 2)
        0.99
    """
    owner = "convolution_norm"
    _check_kernel(owner, weight)
    if not all(k % 2 for k in weight.shape[2:]):
        raise ValueError(
            f"{owner}: the kernel must be odd in both directions, so that padding by k // 2 keeps "
            f"the size (got shape {tuple(weight.shape)})"
        )
    shape = (weight.shape[1], *_check_size(owner, size))
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"{owner}: iterations must be a whole number >= 0 (got {iterations!r})")
    if v is not None and v.shape != shape:
        raise ValueError(
            f"{owner}: v must have the shape [I, H, W], {shape} (got {tuple(v.shape)}); where size "
            "changes from call to call, start with v=None"
        )
    v = torch.randn(shape, dtype=_wide(weight), device=weight.device) if v is None else v
    return _power(weight, _unit(v[None])[0], iterations)


def convolution_bound(weight: Tensor, *, samples: int = 12) -> Tensor:
    """A bound on the norm of x ↦ w ⋆ x with zero padding, whatever the image's size.

    On a finite image the convolution is the one on the infinite plane between an extension by
    zeros and a restriction, so its norm is at most sup σ₁(ŵ(ω)), the largest singular value of the
    symbol ŵ(ω) = Σ w[:, :, a, b] exp(−i(aω₁ + bω₂)), [O, I], over all frequencies ω.

    The supremum M is at most the maximum over a grid of n × n frequencies, divided by cos²(πd/n),
    d = (k − 1)/2. Proof: at its place M is f(ω) = Re(exp(i(dω₁ + dω₂ + θ)) u*ŵ(ω)v) for some θ and
    unit vectors u and v, and |f| ≤ σ₁(ŵ) everywhere. In each frequency f is a real trigonometric
    polynomial of degree d (in ω/2 of degree k − 1, where k is even), which within |t| ≤ π/d of a
    maximum falls no faster than cos(d t) (M. Riesz, 1914), and the grid has a point within π/n: so
    moving ω₁ there, then ω₂ from the new polynomial's own maximum, costs two factors cos(πd/n).

    Args:
        weight: w, [O, I, k, k] or [O, I, k, k′], floating; k may be even.
        samples: n / (k − 1), at least 2. It costs n²/2 eigenvalue problems of size min(O, I), in
            float64, with the device waited for. The bound is above M by no more than
            1 / cos²(π / (2 samples)): 1.04 for 8, 1.017 for 12, 1.01 for 16.

    Returns:
        The bound, a scalar, in weight's dtype but at least float32, computed in float64. Its
        derivative is that of the largest of the grid's singular values.

    Raises:
        TypeError: weight is not a floating tensor of four dimensions.
        ValueError: samples < 2.

    Example:
        >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
        >>> round(convolution_bound(blur).item(), 2)
        1.02
    """
    _check_kernel("convolution_bound", weight)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ValueError(
            f"convolution_bound: samples must be a whole number >= 2 (got {samples!r})"
        )
    w = weight.double()
    kernel = w.shape[2:]
    n = [max(1, samples * (k - 1)) for k in kernel]
    half = n[1] // 2 + 1  # w is real: the other frequencies have the same singular values
    with torch.no_grad():
        symbols = torch.fft.rfft2(w, s=n).permute(2, 3, 0, 1).flatten(0, 1)
        if w.shape[1] > w.shape[0]:
            symbols = symbols.mH
        largest = torch.linalg.eigvalsh(symbols.mH @ symbols)[:, -1].argmax()
        turns = largest // half / n[0], largest % half / n[1]
        a, b = (
            torch.arange(k, dtype=w.dtype, device=w.device) * t
            for k, t in zip(kernel, turns, strict=True)
        )
        angle = -2 * math.pi * (a[:, None] + b)
        phase = torch.complex(angle.cos(), angle.sin())
    norm: Tensor = torch.linalg.matrix_norm((w * phase).sum((2, 3)), 2)
    fall = math.prod(math.cos(math.pi * (k - 1) / (2 * m)) for k, m in zip(kernel, n, strict=True))
    dtype = _wide(weight)
    return (norm * ((1 + max(ROUNDING, torch.finfo(dtype).eps)) / fall)).to(dtype)


def lipschitz(step: nn.Module) -> float:
    """A certified constant L with ‖g(x, z) − g(y, z)‖₂ ≤ L ‖x − y‖₂ for all x, y and z.

    A stack of layers has L = s_out (|α| + Π s_l ‖W_l‖₂), s the largest |φ′|; one layer has
    L = s ‖αI + W‖₂. Descent on a `DenseEnergy` has L = max |1 − γ(λ + e)| over the eigenvalues e
    that W₁ᵀ diag(a ψ″) W₁ can have, between those at the least and at the greatest ψ″: below 1 for
    a convex energy with λ > 0 and γ < 2 / smoothness. Norms of matrices are exact, in float64, and
    `convolution_bound` stands for those of convolutions; a margin covers rounding. Parametrised
    weights are taken as a solve at this moment would take them, and no buffer moves.

    Args:
        step: a `DenseStep`, a `ConvStep`, a `GradientStep` of a `DenseEnergy`, a `NeuralStep` of
            one of these or of an `nn.Sequential` of `nn.Linear`, `nn.Conv2d` and activations, that
            itself, or a module that has a method `certified_lipschitz()`. A `gain` of a `DenseStep`
            multiplies L.

    Returns:
        L, for the exact g: it does not know of the rounding in g itself. Infinite where a weight
        is not finite.

    Raises:
        TypeError: the step is none of these, or has hooks, which could do anything.

    Example:
        >>> lipschitz(ConvStep(4, 1, hidden=(8,))) < 1
        True
    """
    if not bindable(step):
        raise TypeError(f"lipschitz: {_TAKES} (got {step!r})")
    with torch.no_grad():
        binding = Binding(step)
        return _lipschitz(cast(nn.Module, binding.bind(binding.params)))


def spectral_normalize(
    step: Module,
    bound: float = 0.9,
    *,
    size: tuple[int, int] | None = None,
    certified: bool = False,
) -> Module:
    """Hold the Lipschitz constant of a step at most at `bound` while its weights are trained.

    Each weight that acts on the state is given its share, the same for all, so that
    s_out (|α| + Π s_l share) = bound (see `lipschitz`), and is scaled down to it where its norm is
    greater: a weight below its share stays as it is. Biases and what acts on z stay free.

    It is a parametrisation (`torch.nn.utils.parametrize`): the raw weights are the parameters,
    named `parametrizations.<name>.original`, and the step sees the scaled ones, which a solve
    computes once. `parametrize.remove_parametrizations` makes them plain again. As with any
    parametrisation of torch's, copy.deepcopy works, and pickling goes by state_dict.

    Norms are estimated by ten power iterations (see `convolution_norm`) a training call, from a
    vector kept as a buffer. The estimate comes from below, and lags while weights move fast: the
    constant may exceed `bound` by some percent, and more after a large step. `lipschitz` tells what
    it is. For convolutions that is done at `size`; without it they take `convolution_bound`, which
    has neither flaw, but waits for a device, as exact norms do: in a CUDA graph it needs `size`.
    Derivatives take the vector as a constant. An energy's vector moves in solves,
    not where its gradient is taken by itself.

    Args:
        step: as in `lipschitz`, except that an energy must be convex and its step size a number,
            and with nothing for which `certified_lipschitz` alone speaks.
        bound: the constant; below 1 for a contraction.
        size: H and W of the images, for power iteration. Smaller images are covered too.
        certified: no estimates: exact norms of matrices, by a singular value decomposition at each
            use, and `convolution_bound`; then `lipschitz(step)` ≤ bound to 1e-6, always,
            and no buffer is kept.

    Returns:
        The step itself.

    Raises:
        TypeError: the step is not one of those.
        ValueError: bound leaves nothing for the weights, because |α|, or |1 − γλ| of an energy, is
            as great; size is not two whole numbers or comes with certified; or the step is
            normalised already.

    Example:
        >>> step = spectral_normalize(DenseStep(16, 8), 0.5, certified=True)
        >>> lipschitz(step) <= 0.5
        True
    """
    owner = "spectral_normalize"
    if not isinstance(bound, (int, float)) or not 0 < bound < math.inf:
        raise ValueError(f"{owner}: bound must be a finite number > 0 (got {bound!r})")
    if size is not None:
        _check_size(owner, size)
        if certified:
            raise ValueError(
                f"{owner}: certified=True holds at every size; leave size out (got {size!r})"
            )
    weights, share = _shares(step, bound)
    for module, name in weights:
        if parametrize.is_parametrized(module, name):
            raise ValueError(
                f"{owner}: {name} is parametrised already; remove that first, by "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
            )
        if size is not None and isinstance(module, nn.Conv2d) and not _keeps_size(module):
            raise ValueError(
                f"{owner}: with size, a convolution must have an odd kernel, stride 1, no dilation "
                f"and padding k // 2 (got {module}); leave size out"
            )
    for module, name in weights:
        weight = getattr(module, name)
        held: nn.Module
        if certified or (weight.dim() == 4 and size is None):
            held = _Held(share)
        else:
            held = _Estimated(share, weight.detach(), size if weight.dim() == 4 else None)
        parametrize.register_parametrization(module, name, held)
    return step


class Certified(NeuralStep):
    """A step with a certificate: the same map, whose solutions have an `error_bound`.

    `fixed_point` asks for `lipschitz` of the step once a solve, at the cost of the singular values
    of its weights. A `DenseStep` may not be given a gain above 1 here.

    Args:
        net: a step that `lipschitz` takes.

    Raises:
        TypeError: it is none.

    Example:
        >>> step = Certified(spectral_normalize(DenseStep(16, 8), 0.5))
        >>> fixed_point(step, torch.zeros(4, 16), torch.randn(4, 8)).error_bound.shape
        torch.Size([4])
    """

    def __init__(self, net: nn.Module) -> None:
        lipschitz(net)
        super().__init__(net)

    def certified_lipschitz(self) -> float:
        """The step's constant with its weights as they are."""
        return lipschitz(self.net)


@dataclass(frozen=True)
class _Chain:
    """φ(α x + a chain of linear layers and activations): what of a step its constant depends on."""

    weights: tuple[tuple[nn.Module, str], ...]
    inner: float  # product of the constants between the weights
    slope: float = 1.0  # of φ
    residual: float = 0.0


class _Held(nn.Module):
    """A weight scaled down to a norm of at most share."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def norm(self, weight: Tensor) -> Tensor:
        """The norm, certified."""
        return _norm(weight)

    def forward(self, weight: Tensor) -> Tensor:
        # The scaled weight's own rounding must not lift it above its share.
        share = self.share * (1 - 4 * torch.finfo(weight.dtype).eps)
        excess = (self.norm(weight) / share).clamp_min(1)
        return weight * excess.reciprocal().to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to the weight becomes the raw one."""
        return weight

    def extra_repr(self) -> str:
        """The share."""
        return f"share={self.share:.3g}"


class _Estimated(_Held):
    """The same by power iteration, from a vector that moves once a training call."""

    v: Tensor

    def __init__(self, share: float, weight: Tensor, size: tuple[int, int] | None) -> None:
        super().__init__(share)
        shape = (weight.shape[1], *(size or ()))
        v = torch.randn(shape, dtype=weight.dtype, device=weight.device)
        self.register_buffer("v", _power(weight, v, WARM_UP)[1].to(weight.dtype))

    def norm(self, weight: Tensor) -> Tensor:
        """The estimate, never above the norm."""
        norm, v = _power(weight, self.v, ITERATIONS if self.training else 0)
        if self.training:
            self.v.copy_(v)
        return norm


def _shares(step: nn.Module, bound: float) -> tuple[tuple[tuple[nn.Module, str], ...], float]:
    """The weights that act on the state, and the norm that each may have."""
    step = _unwrapped(step)
    if (descent := _descent(step)) is not None:
        energy, size = descent
        if energy.term_weight is not None or isinstance(size, Tensor):
            raise TypeError(
                "spectral_normalize: an energy must be convex and its step size a number, because "
                "no bound on state_weight alone outlives a training step of term_weight or "
                f"step_size (got {step})"
            )
        rest = abs(1 - size * energy.curvature)
        if rest >= bound:
            raise ValueError(
                f"spectral_normalize: |1 - step_size * curvature| must be below bound, {bound:g} "
                f"(got {rest:g}); take a step_size nearer to 1 / curvature"
            )
        room = ((1 + bound) / size - energy.curvature) / steepest(energy.activation)
        return ((energy, "state_weight"),), math.sqrt(room)
    chain = _chain(step)
    if chain is None:
        raise TypeError(f"spectral_normalize: {_TAKES} (got {step})")
    room = (bound / chain.slope - abs(chain.residual)) / chain.inner
    if room <= 0:
        raise ValueError(
            f"spectral_normalize: |residual| must be below bound / max |φ′| of the output, "
            f"{bound / chain.slope:g} (got residual {chain.residual:g}); nothing is left for the "
            "weights"
        )
    weights = tuple(dict.fromkeys(chain.weights))
    if not weights:
        raise ValueError(f"spectral_normalize: the step has no weight that acts on x (got {step})")
    return weights, room ** (1 / len(chain.weights))


def _lipschitz(step: nn.Module) -> float:
    """Of a step whose parametrisations are evaluated."""
    step = _unwrapped(step)
    if (descent := _descent(step)) is not None:
        energy, size = descent
        return _descent_lipschitz(energy, float(torch.as_tensor(size).detach()))
    chain = _chain(step)
    if chain is None:
        certified = getattr(step, "certified_lipschitz", None)
        if certified is None:
            raise TypeError(
                f"lipschitz: {_TAKES}; or a module that has certified_lipschitz() (got {step})"
            )
        return float(certified())
    weights = [getattr(module, name) for module, name in chain.weights]
    if not all(bool(w.isfinite().all()) for w in weights):
        return math.inf
    if len(weights) == 1 and chain.residual != 0:
        return chain.slope * float(_norm(_plus_identity(weights[0].double(), chain.residual)))
    inner = chain.inner * math.prod(float(_norm(w)) for w in weights)
    return chain.slope * (abs(chain.residual) + inner)


def _descent_lipschitz(energy: DenseEnergy, step_size: float) -> float:
    """The spectrum of ∂²f/∂x² = λI + W₁ᵀ diag(a ψ″) W₁ rises with every entry of a ψ″."""
    w = energy.state_weight.double()
    a = torch.ones_like(w[:, 0]) if energy.term_weight is None else energy.term_weight.double()
    if not bool(w.isfinite().all() and a.isfinite().all()):
        return math.inf
    ends = torch.stack([slope * a for slope in SLOPES[energy.activation]])
    least, most = (
        torch.linalg.eigvalsh(w.mT @ (d[:, None] * w)) for d in (ends.amin(0), ends.amax(0))
    )
    ranges = [step_size * (energy.curvature + float(e)) for e in (least[0], most[-1])]
    rounding = ROUNDING * (1 + max(abs(r) for r in ranges))
    return max(abs(1 - r) for r in ranges) + rounding


def _unwrapped(step: nn.Module) -> nn.Module:
    while _is(step, NeuralStep) or _is(step, Certified):
        step = step.net
    return step


def _descent(step: nn.Module) -> tuple[DenseEnergy, float | nn.Parameter] | None:
    """Energy and step size of gradient descent on a `DenseEnergy`."""
    if _is(step, GradientStep) and _is(step.energy, DenseEnergy):
        return step.energy, step.step_size
    return None


def _chain(module: nn.Module) -> _Chain | None:
    """None where the module is no chain."""
    if _is(module, DenseStep):
        slope = steepest(module.activation)
        first = (module, "state_weight")
        if module.hidden is None:
            return _Chain((first,), 1.0, slope, module.residual)
        outer = steepest(module.output_activation)
        return _Chain((first, (module, "output_weight")), slope, outer, module.residual)
    if _is(module, ConvStep):
        weights = tuple((layer, "weight") for layer in module.layers)
        inner = steepest(module.activation) ** (len(weights) - 1)
        return _Chain(weights, inner, steepest(module.output_activation), module.residual)
    if _is(module, nn.Sequential):
        parts = [_part(part) for part in module]
        known = [part for part in parts if part is not None]
        inner = math.prod(part.inner for part in known)
        weights = tuple(w for part in known for w in part.weights)
        return _Chain(weights, inner) if len(known) == len(parts) else None
    return None


def _part(module: nn.Module) -> _Chain | None:
    """What a sequence may be made of: no residual, and the slopes are in `inner`."""
    if _is(module, nn.Linear):
        return _Chain(((module, "weight"),), 1.0)
    if _is(module, nn.Conv2d):
        # Strides leave outputs out and dilations scale ω: the bound holds. Groups it can't read.
        known = module.groups == 1 and module.padding_mode == "zeros"
        return _Chain(((module, "weight"),), 1.0) if known else None
    for kind, constant in CONSTANTS.items():
        if _is(module, kind):
            return _Chain((), constant)
    return _chain(module) if _is(module, nn.Sequential) else None


def _is(module: object, kind: type[Module]) -> TypeGuard[Module]:
    """Of just that type, parametrised or not: a subclass or a hook may do anything."""
    if not isinstance(module, kind) or module._forward_hooks or module._forward_pre_hooks:
        return False
    return parametrize.type_before_parametrizations(module) is kind


def _keeps_size(module: nn.Conv2d) -> bool:
    odd = all(k % 2 for k in module.kernel_size)
    plain = all(s == d == 1 for s, d in zip(module.stride, module.dilation, strict=True))
    return odd and plain and module.padding in (tuple(k // 2 for k in module.kernel_size), "same")


def _plus_identity(weight: Tensor, residual: float) -> Tensor:
    """The weight of x ↦ αx + Wx, of a matrix or a convolution."""
    eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    if weight.dim() == 4:
        eye = F.pad(eye[..., None, None], (weight.shape[-1] // 2,) * 4)
    return weight + residual * eye


def _norm(weight: Tensor) -> Tensor:
    """‖W‖₂ of a matrix [O, I], or the bound of a convolution [O, I, k, k]; in float64."""
    weight = weight.double()
    if weight.dim() == 4:
        return convolution_bound(weight)
    norm: Tensor = torch.linalg.matrix_norm(weight, 2) * (1 + ROUNDING)
    return norm


def _power(weight: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """‖W v‖₂ at the v of length 1 that some iterations lead to, and that v, which is constant.

    A plain iteration a call follows a weight in training too slowly: where another singular vector
    overtakes, v has hardly any of it yet. In small nets under Adam at 1e-3 the estimate was up to
    31 % too low; ten accelerated ones left 1 %, and 5 % at 1e-2.
    Nothing is drawn at random, so that a captured graph may hold it: a v that W maps to zero stays.
    """
    w = weight.to(_wide(weight))
    length = torch.linalg.vector_norm
    padding = [k // 2 for k in w.shape[2:]]

    def apply(v: Tensor) -> Tensor:
        return w @ v if w.dim() == 2 else F.conv2d(v, w, padding=padding)

    def transposed(u: Tensor) -> Tensor:
        return w.mT @ u if w.dim() == 2 else F.conv_transpose2d(u, w, padding=padding)

    def filtered(v: Tensor, degree: int) -> Tensor:
        """T(WᵀW/h − 1) v, T Chebyshev's polynomial: it grows fast beyond WᵀW = 2h."""
        u = apply(v)
        h = (CUT * length(u)) ** 2 / 2
        before, now = v, transposed(u) / h - v
        for _ in range(degree - 1):
            before, now = now, 2 * (transposed(apply(now)) / h - now) - before
            size = length(now)
            before, now = before / size, now / size
        size = length(now)
        return torch.where(size.isfinite(), now / size, v)

    with torch.autocast(w.device.type, enabled=False):
        with torch.no_grad():
            v = v.to(w.dtype)
            v = v / length(v)
            for start in range(0, iterations, DEGREE):
                v = filtered(v, min(DEGREE, iterations - start))
        return length(apply(v)), v


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _check_kernel(owner: str, weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 4:
        known = isinstance(weight, Tensor)
        got = f"{weight.dtype}, shape {tuple(weight.shape)}" if known else type(weight).__name__
        raise TypeError(f"{owner}: weight must be a floating tensor [O, I, k, k] (got {got})")


def _check_size(owner: str, size: tuple[int, int]) -> tuple[int, int]:
    whole = isinstance(size, (tuple, list)) and all(
        isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in size
    )
    if not whole or len(size) != 2:
        raise ValueError(f"{owner}: size must be (H, W), whole numbers >= 1 (got {size!r})")
    return size[0], size[1]


def _linearise(
    g: Step, x: Tensor, inputs: tuple[Tensor, ...], v: Tensor | None, iterations: int
) -> tuple[Tensor, Callable[[Tensor, bool], Tensor]]:
    """V to start from, and v ↦ (∂g/∂x)ᵀ v, with its graph where that is asked for."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
        got = f"{x.dtype}, shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"∂g/∂x: x must be a floating tensor [B, ...] (got {got})")
    if v is not None and v.shape != x.shape:
        raise ValueError(
            f"∂g/∂x: v must have the shape of x, {tuple(x.shape)} (got {tuple(v.shape)}); "
            "where the shape changes from call to call, start with v=None"
        )
    if iterations < 1:
        raise ValueError(f"∂g/∂x: iterations must be >= 1 (got {iterations!r})")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        gx = g(x, *inputs)
    if not isinstance(gx, Tensor):
        raise TypeError(f"∂g/∂x: g must return a tensor (got {type(gx).__name__})")
    if gx.shape != x.shape:
        raise ValueError(
            f"∂g/∂x: g must return the shape of x, {tuple(x.shape)} (got {tuple(gx.shape)})"
        )
    v = torch.randn_like(x) if v is None else v
    return v, lambda v, create_graph: _vjp(gx, x, v, create_graph)


def _length(v: Tensor) -> Tensor:
    """[B]."""
    return torch.linalg.vector_norm(v.flatten(1), dim=1)  # type: ignore[no-any-return]


def _unit(v: Tensor) -> Tensor:
    """Each sample at length 1; a zero one, which no power iteration leaves, drawn anew."""
    v, shape = v.detach(), (-1, *(1,) * (v.dim() - 1))
    v = torch.where(_length(v).view(shape) > 0, v, torch.randn_like(v))
    return v / _length(v).view(shape)


def _vjp(y: Tensor, x: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    (out,) = torch.autograd.grad(
        y, x, v, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(x) if out is None else out
