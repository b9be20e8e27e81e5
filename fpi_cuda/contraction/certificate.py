"""What a step's layers say of it for all states: certificates, and weights held below a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._torch import FORWARD_HOOKS, hooked
from .._torch_graphs import valueless
from ..forms.activations import SLOPES, steepest
from ..modules import Binding
from ..steps import ConvStep, DenseEnergy, DenseStep, GradientStep, NeuralStep
from .convolution import ROUNDING, check_size
from .held import _Estimated, _Held, certified_norm

Module = TypeVar("Module", bound=nn.Module)

# Lipschitz constants of modules without weights, rounded up.
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
LAYERS = (nn.Linear, nn.Conv2d, nn.Sequential, GradientStep, NeuralStep)  # that have some
_TAKES = (
    "step must be a DenseStep, a ConvStep, a GradientStep of a DenseEnergy, an nn.Sequential of "
    "nn.Linear, nn.Conv2d (padding_mode 'zeros', groups 1) and activations, or a NeuralStep of one "
    "of these, without hooks"
)


def lipschitz(step: nn.Module) -> float:
    """A certified constant L with ‖g(x, z) − g(y, z)‖₂ ≤ L ‖x − y‖₂ for all x, y and z.

    A stack of layers has L = s_out (|α| + Π s_l ‖W_l‖₂), s the largest |φ′|; one layer has
    L = s ‖αI + W‖₂. Descent on a `DenseEnergy` has L = max |1 − γ(λ + e)| over the eigenvalues e
    that W₁ᵀ diag(a ψ″) W₁ can have, between those at the least and at the greatest ψ″: below 1 for
    a convex energy with λ > 0 and γ < 2 / smoothness. Norms of matrices are exact, in float64, and
    `convolution_bound` stands for those of convolutions; a margin covers rounding. Parametrised
    weights are taken as a solve at this moment would take them, and no buffer moves. Under autocast
    L is the greater of that by the weights as they are and by the weights rounded as products take
    them.

    Args:
        step: a `DenseStep`, a `ConvStep`, a `GradientStep` of a `DenseEnergy`, a `NeuralStep` of
            one of these or of an `nn.Sequential` of `nn.Linear`, `nn.Conv2d` and activations, that
            itself, or a module that has a method `certified_lipschitz()`. A `gain` of a `DenseStep`
            multiplies L.

    Returns:
        L, for the exact g: it does not know of the rounding of values in g. Infinite where a
        weight is not finite; NaN where weights have no values (meta device, fake tensors).

    Raises:
        TypeError: the step is none of these, or has hooks, which could do anything.

    Example:
        >>> lipschitz(ConvStep(4, 1, hidden=(8,))) < 1
        True
    """
    binding = Binding.of(step)
    if binding is None or not isinstance(step, nn.Module):
        raise TypeError(f"lipschitz: {_TAKES} (got {step!r})")
    with torch.no_grad():
        return _lipschitz(cast(nn.Module, binding.bind(binding.own())))


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
    Derivatives take the vector as a constant.

    Weights in float16 and bfloat16 are scaled in float32 and rounded once; with certified they are
    half a unit of rounding smaller for it, and more where that does not do. The gradient jumps
    where a norm crosses its share: there, rounding of the raw weights, by .bfloat16() say, may
    change it altogether. Autocast rounds the scaled weights once more, of which they are not told:
    within it `lipschitz` may be above `bound`, by some 2^-8 a weight in bfloat16.

    Args:
        step: as in `lipschitz`, except that an energy must be convex and its step size a number,
            and that a module known by its `certified_lipschitz()` alone won't do.
        bound: the constant; below 1 for a contraction.
        size: H and W of the images, for power iteration. Smaller images are covered too.
        certified: no estimates: exact norms of matrices, by a singular value decomposition at each
            use (two of weights in 16 bits), and `convolution_bound`; then `lipschitz(step)` ≤ bound
            to 1e-6, always, but for autocast's rounding, and no buffer is kept.

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
        check_size(owner, size)
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
    """φ(α x + a chain of linear layers and activations), as far as its constant depends on it."""

    weights: tuple[tuple[nn.Module, str], ...]
    inner: float  # product of the constants between the weights
    slope: float = 1.0  # of φ
    residual: float = 0.0


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
        raise TypeError(f"spectral_normalize: {_TAKES} (got {_unknown(step)})")
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
        return _descent_lipschitz(energy, size)
    chain = _chain(step)
    if chain is None:
        certified = getattr(step, "certified_lipschitz", None)
        if certified is None:
            raise TypeError(
                f"lipschitz: {_TAKES}; or a module that has certified_lipschitz() (got "
                f"{_unknown(step)})"
            )
        return float(certified())
    weights = [getattr(module, name) for module, name in chain.weights]
    if any(map(valueless, weights)):
        return math.nan
    if not all(bool(w.isfinite().all()) for w in weights):
        return math.inf
    if len(weights) == 1 and chain.residual != 0:
        whole = [_plus_identity(w, chain.residual) for w in _as_multiplied(weights[0])]
        return chain.slope * max(float(certified_norm(w)) for w in whole)
    inner = chain.inner * math.prod(
        max(float(certified_norm(w)) for w in _as_multiplied(weight)) for weight in weights
    )
    return chain.slope * (abs(chain.residual) + inner)


def _descent_lipschitz(energy: DenseEnergy, size: float | Tensor) -> float:
    """The spectrum of ∂²f/∂x² = λI + W₁ᵀ diag(a ψ″) W₁ rises with every entry of a ψ″."""
    weight = energy.state_weight
    if valueless(weight):
        return math.nan
    step_size = float(size.detach() if isinstance(size, Tensor) else size)
    a = torch.ones_like(weight[:, 0]) if energy.term_weight is None else energy.term_weight
    if not bool(weight.isfinite().all() and a.isfinite().all()):
        return math.inf
    a = a.double()
    ends = torch.stack([slope * a for slope in SLOPES[energy.activation]])
    most = 0.0
    for w in (taken := _as_multiplied(weight)):
        low, high = (
            torch.linalg.eigvalsh(w.mT @ (d[:, None] * w)) for d in (ends.amin(0), ends.amax(0))
        )
        ranges = [step_size * (energy.curvature + float(e)) for e in (low[0], high[-1])]
        rounding = ROUNDING * (1 + max(abs(r) for r in ranges))
        most = max(most, *(abs(1 - r) + rounding for r in ranges))
    if len(taken) > 1:  # autocast rounds −γ a W₁ too, to another matrix than −γ a times that one
        outer = step_size * a[:, None] * taken[0]
        away = outer.to(torch.get_autocast_dtype(weight.device.type)).double()
        off = torch.stack([away - outer, away - step_size * a[:, None] * taken[1]])
        norm, apart = (max(float(certified_norm(w)) for w in of) for of in (taken, off))
        most += steepest(energy.activation) * apart * norm
    return most


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
        # A stride drops outputs and a dilation scales ω, so the bound holds; not for groups.
        known = module.groups == 1 and module.padding_mode == "zeros"
        return _Chain(((module, "weight"),), 1.0) if known else None
    for kind, constant in CONSTANTS.items():
        if _is(module, kind):
            return _Chain((), constant)
    return _chain(module) if _is(module, nn.Sequential) else None


def _unknown(step: Any) -> str:
    """What of a step has no known constant."""
    if not isinstance(step, nn.Module):
        return repr(step)
    step = _unwrapped(step)
    if _is(step, nn.Sequential):
        at = next(i for i, part in enumerate(step) if _part(part) is None)
        return f"as item {at} of nn.Sequential {_unknown(step[at])}"
    if _is(step, GradientStep):
        return f"a GradientStep of {_unknown(step.energy)}"
    name, kind = type(step).__name__, parametrize.type_before_parametrizations(step)
    if _part(step) is not None:
        return f"{name} by itself; write nn.Sequential(step)"
    for known in (DenseStep, ConvStep, DenseEnergy, *LAYERS, *CONSTANTS):
        if kind is not known and isinstance(step, known):
            return f"{name}, a subclass of {known.__name__}, which may do anything"
    if hooked(step, FORWARD_HOOKS):
        return f"{name} with a hook, which may do anything"
    if isinstance(step, nn.Conv2d):
        return f"{name} with padding_mode={step.padding_mode!r} and groups={step.groups}"
    return name


def _is(module: object, kind: type[Module]) -> TypeGuard[Module]:
    """Of just that type, parametrised or not: a subclass or a hook may do anything."""
    if not isinstance(module, kind) or hooked(module, FORWARD_HOOKS):
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


def _as_multiplied(weight: Tensor) -> list[Tensor]:
    """The weight as products may take it, in float64: as it is; under autocast rounded, too."""
    taken, kind = [weight.double()], weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        taken.append(weight.to(torch.get_autocast_dtype(kind)).double())
    return taken
