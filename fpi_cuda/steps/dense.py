"""Steps and energies of dense layers: modules like any other, which the solver takes whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .._check import check_activation, check_residual, check_sizes
from .._torch import transforming
from ..backends import native
from ..forms import ACTIVATIONS, DenseForm
from ..forms.activations import steepest

__all__ = ["DenseEnergy", "DenseStep"]

# ‖W‖₂ of a fresh step: a contraction for activations of slope at most 1.
NORM = 0.8


def _normal(rows: int, columns: int, norm: float) -> nn.Parameter:
    """Gaussian, with a spectral norm that is about `norm` in large matrices."""
    return nn.Parameter(
        torch.randn(rows, columns) * (norm / (math.sqrt(rows) + math.sqrt(columns)))
    )


def _check_last(owner: str, name: str, t: Tensor, size: int) -> None:
    if t.dim() == 0 or t.shape[-1] != size:
        raise ValueError(
            f"{owner}: the last dimension of {name} must be {size} (got shape {tuple(t.shape)})"
        )


class _Inputs(nn.Module):
    """u = z Uᵀ + b: what a step takes of z, which does not depend on x."""

    form_dim = 2  # dimensions of a batch of states for which there is a form
    input_weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, input_features: int | None, features: int, bias: bool, exact: bool) -> None:
        super().__init__()
        self.exact = exact
        self.input_weight = None
        if input_features is not None:
            weight = torch.randn(features, input_features) / math.sqrt(input_features)
            self.input_weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None
        self._expects = features if input_features is None else input_features

    def _u(self, z: Tensor) -> Tensor:
        _check_last(type(self).__name__, "z", z, self._expects)
        if self.input_weight is None:
            return z if self.bias is None else z + self.bias
        plain = z.dim() == 2 and z.dtype == self.input_weight.dtype and not transforming()
        if (
            self.exact
            and plain
            and z.is_floating_point()
            and z.device.type in native.dense_devices()
        ):
            return _ExactLinear.apply(z, self.input_weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]
        return F.linear(z, self.input_weight, self.bias)


class _ExactLinear(Function):
    """z Uᵀ + b with sums in one order: the bits of a row do not depend on the batch around it."""

    @staticmethod
    def forward(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return native.dense_map(z, weight, bias)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])  # type: ignore[attr-defined]
        ctx.save_for_forward(*inputs[:2])  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: object, c: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        z, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        has_bias = ctx.needs_input_grad[2]  # type: ignore[attr-defined]
        return c @ weight, c.mT @ z, c.sum(0) if has_bias else None

    @staticmethod
    def jvp(ctx: object, dz: Tensor, d_weight: Tensor, d_bias: Tensor | None) -> Tensor:
        z, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        moved: Tensor = dz @ weight.mT + z @ d_weight.mT
        return moved if d_bias is None else moved + d_bias


class DenseStep(_Inputs):
    """One or two dense layers as a step g(x, z), solved whole by one kernel where that exists.

    hidden None:  x⁺ = φ(α x + x Wᵀ + u),                 u = z Uᵀ + b
    else:         x⁺ = φ₂(α x + φ(x W₁ᵀ + u) W₂ᵀ + b₂),   u = z Uᵀ + b

    In `fixed_point` and `FixedPointLayer` u is computed once a solve, and the iteration, its
    stop test and Anderson's mixing run in one call (`Solution.path` says "whole"); so does the
    adjoint. Anywhere else it is a module like any other. Fresh weights make a contraction with
    every activation whose slope is at most 1 (all but gelu, 1.13) where |α| < 0.2.

    Under torch.autocast a whole solve takes W, W₁ and W₂ rounded to autocast's dtype, and u as
    autocast computes it; iterates are not rounded, and sums and the state stay in x's dtype. (On
    CUDA a product of a float32 state may round them to tf32, where rtol is 2e-3 or looser.) The
    parameters' gradients are products in autocast's dtype.

    Args:
        state_features: N; x is [..., N].
        input_features: values of z; z is [..., input_features]. None: z itself stands for z Uᵀ.
        hidden: H, the width between two layers; None: one layer.
        activation: φ: "tanh", "relu", "sigmoid", "softplus", "gelu" or "identity".
        output_activation: φ₂ of two layers; None: "identity".
        residual: α.
        bias: whether there are b and b₂.
        exact: u too is computed with sums in an order that does not depend on the batch, so that,
            where the solve is whole, the bits of a sample's solution depend neither on the samples
            beside it nor on the number of threads. Those of gradients may: they pass torch's
            products. Under autocast this u is not rounded; a z of another dtype than U's gets
            torch's product.

    Attributes:
        state_weight: W [N, N], or W₁ [H, N].
        input_weight: U [N or H, input_features], or None.
        bias: b [N or H], or None.
        output_weight: W₂ [N, H], or None; output_bias: b₂ [N], or None.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> layer = FixedPointLayer(DenseStep(16, 8))
        >>> layer(torch.randn(4, 8)).shape
        torch.Size([4, 16])
    """

    output_weight: nn.Parameter | None
    output_bias: nn.Parameter | None

    def __init__(
        self,
        state_features: int,
        input_features: int | None,
        hidden: int | None = None,
        activation: str = "tanh",
        output_activation: str | None = None,
        residual: float = 0.0,
        bias: bool = True,
        exact: bool = False,
    ) -> None:
        owner = "DenseStep"
        check_sizes(owner, state_features=state_features)
        if input_features is not None:
            check_sizes(owner, input_features=input_features)
        if hidden is not None:
            check_sizes(owner, hidden=hidden)
        check_activation(owner, "activation", activation, tuple(ACTIVATIONS))
        if output_activation is not None:
            if hidden is None:
                raise ValueError(
                    f"{owner}: output_activation belongs to two layers (got "
                    f"{output_activation!r} with hidden=None); name φ by activation"
                )
            check_activation(owner, "output_activation", output_activation, tuple(ACTIVATIONS))
        check_residual(owner, residual)
        super().__init__(input_features, hidden or state_features, bias, exact)
        self.state_features, self.input_features = state_features, input_features
        self.hidden, self.activation = hidden, activation
        self.output_activation = output_activation or "identity"
        self.residual = float(residual)
        if hidden is None:
            self.state_weight = _normal(state_features, state_features, NORM)
            self.output_weight = self.output_bias = None
        else:
            self.state_weight = _normal(hidden, state_features, math.sqrt(NORM))
            self.output_weight = _normal(state_features, hidden, math.sqrt(NORM))
            self.output_bias = nn.Parameter(torch.zeros(state_features)) if bias else None

    @property
    def state_shape(self) -> tuple[int]:
        """One sample's state, (N,)."""
        return (self.state_features,)

    def form(self, x: Tensor, z: Tensor, gain: Tensor | None = None) -> DenseForm:
        """The step at z as the solver takes it; of x only the shape is looked at."""
        _check_last("DenseStep", "x", x, self.state_features)
        if gain is not None:
            _check_last("DenseStep", "gain", gain, 1)
        u = self._u(z)
        if self.output_weight is None:
            return DenseForm(self.state_weight, u, self.activation, self.residual, gain=gain)
        return DenseForm(
            self.output_weight,
            self.output_bias,
            self.output_activation,
            self.residual,
            hidden_weight=self.state_weight,
            hidden_u=u,
            hidden_activation=self.activation,
            gain=gain,
        )

    def forward(self, x: Tensor, z: Tensor, gain: Tensor | None = None) -> Tensor:
        """x⁺, shaped like x.

        Args:
            x: [..., N].
            z: [..., input_features].
            gain: [..., 1], a number for each sample that its x is multiplied by before all else.
        """
        return self.form(x, z, gain)(x)

    def extra_repr(self) -> str:
        """What the constructor was given."""
        text = f"{self.state_features}, {self.input_features}, activation={self.activation!r}"
        if self.hidden is not None:
            text += f", hidden={self.hidden}, output_activation={self.output_activation!r}"
        return text + f", residual={self.residual:g}, bias={self.bias is not None}"


def _log_cosh(p: Tensor) -> Tensor:
    size = torch.where(p < 0, -p, p)  # not p.abs(), by which the curvature at 0 would be 0, not 1
    return size + F.softplus(-2 * size) - math.log(2)


def _gelu_integral(p: Tensor) -> Tensor:
    density = torch.exp(-p * p / 2) / math.sqrt(2 * math.pi)
    integral: Tensor = ((p * p - 1) * torch.special.ndtr(p) + p * density) / 2
    return integral


# ψ with ψ′ = φ, by φ's name; convex where φ does not fall.
_PSI: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": _log_cosh,
    "relu": lambda p: torch.relu(p) ** 2 / 2,
    "sigmoid": F.softplus,
    "identity": lambda p: p * p / 2,
    "gelu": _gelu_integral,
}
_CONVEX = ("tanh", "relu", "sigmoid", "identity")


class DenseEnergy(_Inputs):
    """f(x, z) = ½ λ ‖x‖² + Σ a ψ(x W₁ᵀ + u), u = z Uᵀ + b: an energy for `GradientStep`.

    ψ is the integral of φ, so a step of gradient descent is two dense layers with W₂ = −γ W₁ᵀ
    and α = 1 − γ λ, and is solved whole like a `DenseStep`; W₁ is one parameter.

    Args:
        state_features: N.
        input_features: values of z; None: z itself stands for z Uᵀ.
        hidden: H, the number of terms.
        activation: φ = ψ′: "tanh" (ψ = log cosh), "relu", "sigmoid", "identity", or "gelu", which
            is not convex.
        curvature: λ ≥ 0.
        convex: a = 1, and a ψ that is convex: so is f, strongly where λ > 0. False: a is a
            parameter, `term_weight` [H], of either sign.
        bias, exact: as in `DenseStep`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> energy = DenseEnergy(16, 8, hidden=32)
        >>> step = GradientStep(energy, step_size=1 / energy.smoothness())
        >>> FixedPointLayer(step)(torch.randn(4, 8)).shape
        torch.Size([4, 16])
    """

    term_weight: nn.Parameter | None

    def __init__(
        self,
        state_features: int,
        input_features: int | None,
        hidden: int,
        activation: str = "tanh",
        curvature: float = 1.0,
        convex: bool = True,
        bias: bool = True,
        exact: bool = False,
    ) -> None:
        owner = "DenseEnergy"
        check_sizes(owner, state_features=state_features, hidden=hidden)
        if input_features is not None:
            check_sizes(owner, input_features=input_features)
        check_activation(owner, "activation", activation, _CONVEX if convex else tuple(_PSI))
        if not 0 <= curvature < math.inf:
            raise ValueError(f"{owner}: curvature must be a finite number >= 0 (got {curvature!r})")
        super().__init__(input_features, hidden, bias, exact)
        self.state_features, self.input_features = state_features, input_features
        self.hidden, self.activation, self.curvature = hidden, activation, float(curvature)
        self.state_weight = _normal(hidden, state_features, 1.0)
        signs = torch.ones(hidden)
        signs[1::2] = -1
        self.term_weight = None if convex else nn.Parameter(signs)

    @property
    def state_shape(self) -> tuple[int]:
        """One sample's state, (N,)."""
        return (self.state_features,)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The energy of each sample, [...]."""
        terms = _PSI[self.activation](F.linear(x, self.state_weight) + self._u(z))
        if self.term_weight is not None:
            terms = terms * self.term_weight
        energy: Tensor = self.curvature / 2 * (x * x).sum(-1) + terms.sum(-1)
        return energy

    def gradient_form(self, step_size: float | Tensor, x: Tensor, z: Tensor) -> DenseForm:
        """x − γ ∂f/∂x as dense layers."""
        _check_last("DenseEnergy", "x", x, self.state_features)
        weight: Tensor = self.state_weight
        if self.term_weight is not None:
            weight = self.term_weight[:, None] * weight
        return DenseForm(
            (-step_size * weight).mT,
            None,
            residual=1 - step_size * self.curvature,
            hidden_weight=self.state_weight,
            hidden_u=self._u(z),
            hidden_activation=self.activation,
        )

    @torch.no_grad()
    def smoothness(self) -> float:
        """A bound L on the curvature of f in x: any γ < 2/L makes a convex f's step contract."""
        norm = float(torch.linalg.matrix_norm(self.state_weight.double(), 2))
        most = 1.0 if self.term_weight is None else float(self.term_weight.abs().amax())
        return self.curvature + most * steepest(self.activation) * norm**2

    def extra_repr(self) -> str:
        """What the constructor was given."""
        return (
            f"{self.state_features}, {self.input_features}, hidden={self.hidden}, "
            f"activation={self.activation!r}, curvature={self.curvature:g}, "
            f"convex={self.term_weight is None}, bias={self.bias is not None}"
        )
