"""The paper's two forms of g (section 3.5)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_graphs import valueless
from ..arguments import Arguments
from ..forms import Form, form_of
from ..operators import partial
from ..tree import build, flatten

__all__ = ["GradientStep", "NeuralStep"]


class _Around(nn.Module):
    """A step made of a net or an energy, of which the solver may know something."""

    _form_of_part: tuple[str, str]  # whose form it takes: the attribute, and the method

    @property
    def _part(self) -> Any:
        return getattr(self, self._form_of_part[0])

    @property
    def state_shape(self) -> Any:
        """The net's or the energy's, where it has one."""
        return getattr(self._part, "state_shape", None)

    @property
    def form_dim(self) -> int:
        """The net's or the energy's, where it can say what it computes; else 0."""
        return getattr(self._part, "form_dim", 0)


class NeuralStep(_Around):
    """FPI_NN: g is a network, x⁺ = net(x, z).

    Args:
        net: a module net(x, *inputs, **keywords) that returns x's shape.
    """

    _form_of_part = ("net", "form")

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def form(self, x: Tensor, *inputs: Tensor) -> Form | None:
        """The step's form where the net is a `DenseStep` or `ConvStep`."""
        return form_of(self.net, "form", x, *inputs)

    def forward(self, x: Any, *inputs: Any, **keywords: Any) -> Any:
        """net(x, *inputs, **keywords), shaped like x."""
        return self.net(x, *inputs, **keywords)


class GradientStep(_Around):
    """FPI_GD: g is a step of gradient descent on an energy, x⁺ = x − γ ∂f/∂x(x, z).

    The fixed point is a stationary point of the energy, its minimiser where f is convex in x. The
    gradient is taken by P, so z and the energy's parameters may depend on x outside.

    Args:
        energy: f(x, *inputs, **keywords) returning [B], the energy of each sample; x is a tensor,
            or a tree of them like the state (a tuple of one: that tensor). A module's
            parameters are found; a plain function must capture no tensor that needs gradients.
        step_size: γ > 0, a number or an nn.Parameter. For an energy whose gradient is L-Lipschitz
            and m-strongly monotone, γ < 2/L makes g a contraction.

    Raises:
        ValueError: step_size is not positive.
    """

    _form_of_part = ("energy", "gradient_form")

    def __init__(self, energy: Callable[..., Tensor], step_size: float | nn.Parameter) -> None:
        super().__init__()
        plain = step_size.detach() if isinstance(step_size, Tensor) else step_size
        known = not (isinstance(plain, Tensor) and valueless(plain))
        if known and not float(plain) > 0:
            raise ValueError(f"GradientStep: step_size must be > 0 (got {float(plain)!r})")
        self.energy = energy
        self.step_size = step_size

    def form(self, x: Tensor, *inputs: Tensor) -> Form | None:
        """The step as dense layers where the energy is a `DenseEnergy`."""
        return form_of(self.energy, "gradient_form", self.step_size, x, *inputs)

    def forward(self, x: Any, *inputs: Any, **keywords: Any) -> Any:
        """x − γ ∂f/∂x, shaped like x; of a complex x with torch's gradient, 2 ∂f/∂x̄."""
        parts, tree = flatten(x)
        n = len(parts)
        bare = tree is None or (n == 1 and type(x) is tuple)  # the energy gets the tensor itself
        arguments, tensors = None, inputs
        if keywords or not all(isinstance(t, Tensor) for t in inputs):
            arguments = Arguments(inputs, keywords)
            tensors = (*arguments.inputs, *arguments.shared)
            arguments.release()
        state = itemgetter(0) if bare else functools.partial(build, tree)
        total = _Total(self.energy, n, state, arguments)
        gradients = partial(total, *parts, *tensors, which=tuple(range(n)))
        moved = (t - self.step_size * d for t, d in zip(parts, gradients, strict=True))
        return build(tree, moved)


class _Total(nn.Module):
    """The batch's total energy: its gradient is every sample's own."""

    def __init__(
        self,
        energy: Callable[..., Tensor],
        n: int,
        state: Callable[[Any], Any],
        arguments: Arguments | None,
    ) -> None:
        super().__init__()
        self.energy, self.n, self.state, self.arguments = energy, n, state, arguments

    def forward(self, *s: Tensor) -> Tensor:
        x, rest = s[: self.n], s[self.n :]
        energy: Callable[..., Any] = self.energy
        if self.arguments is not None:
            at = self.arguments.n_inputs
            energy, rest = self.arguments.put(energy, rest[at:]), rest[:at]
        values = energy(self.state(x), *rest)
        if not isinstance(values, Tensor) or values.shape != x[0].shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"GradientStep: energy must return one value a sample, shape [{x[0].shape[0]}] "
                f"(got {got}); sum over the other dimensions"
            )
        return torch.sum(values)
