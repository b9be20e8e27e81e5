"""`FixedPointLayer`: the fixed point as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import attribute, stripped, transforming
from .adjoint import ImplicitAdjoint
from .fixed_point import fixed_point
from .modules import Binding
from .operators import differentiable
from .options import Options, Solver, Tolerance
from .solution import Solution, State, each
from .solvers import Anderson

__all__ = ["FixedPointLayer"]

Shape = tuple[int, ...]
_OPTIONS = Options._fields


class FixedPointLayer(nn.Module):
    """x̂ = g(x̂, z; θ) as a layer: `layer(z)` returns the fixed point of x ↦ g(x, z).

    Adds no parameter and no buffer to g's. The record of the last call is in `last`.

    Args:
        g: a module or callable g(x, *inputs).
        state_shape: the shape of one sample's state; a tuple of shapes, plain or named, for a
            tuple state; a function of the first input that returns either (images of any size).
            None: g's own `state_shape` where it has one, else the first input's.
        solver, adjoint, tolerance, max_iterations, backend, on_failure, per_sample, driver: as
            in `fixed_point`.

    Raises:
        TypeError, ValueError: an option is not as `fixed_point` says.

    Example:
        >>> layer = FixedPointLayer(lambda x, z: 0.5 * torch.tanh(x) + z)
        >>> z = torch.randn(4, 3)
        >>> x = layer(z)
        >>> bool(torch.allclose(x, 0.5 * torch.tanh(x) + z, atol=1e-3))
        True
    """

    solver: Any
    adjoint: Any
    tolerance: Tolerance
    max_iterations: int
    backend: str
    on_failure: str
    per_sample: bool | str
    driver: str
    last: Solution | None
    _fits: Any = None  # state_shape and a batch size that are no mistake

    def __init__(
        self,
        g: Callable[..., Any],
        *,
        state_shape: Shape | tuple[Shape, ...] | Callable[[Tensor], Any] | None = None,
        solver: Solver = Anderson(),  # noqa: B008 - frozen
        adjoint: ImplicitAdjoint = ImplicitAdjoint(),  # noqa: B008
        tolerance: Tolerance = Tolerance(),  # noqa: B008
        max_iterations: int = 200,
        backend: str = "auto",
        on_failure: str = "warn",
        per_sample: bool | str = "auto",
        driver: str = "auto",
    ) -> None:
        super().__init__()
        options = Options(
            solver, adjoint, tolerance, max_iterations, backend, on_failure, per_sample, driver
        )
        options.check()
        self.g = g
        self.state_shape = state_shape
        for name in _OPTIONS:
            setattr(self, name, getattr(options, name))
        self.last = None

    def forward(self, *inputs: Tensor, x0: State | None = None) -> Any:
        """The fixed point for these inputs.

        Args:
            inputs: tensors [B, ...]; the first is z.
            x0: where to start; None: zeros. Pass `layer.last.x` to start warm.

        Returns:
            x̂, shaped like the state; attached to autograd.

        Raises:
            TypeError: no input and no x0 was given.
        """
        if x0 is None:
            x0 = self._zeros(inputs)
        options = {name: getattr(self, name) for name in _OPTIONS}
        solution = fixed_point(self.g, x0, *inputs, **options)
        self.last = solution.detach()
        if not torch.compiler.is_compiling() and transforming():
            self.last.x = each(_unwrapped, self.last.x)  # its wrappers end with the transform
        # What is kept, for a warm start and for the backward, is the solver's own: the caller may
        # change the output in place.
        x = solution.x
        return x.clone() if isinstance(x, Tensor) else each(torch.clone, x)

    def _zeros(self, inputs: tuple[Tensor, ...]) -> State:
        if not inputs:
            raise TypeError("FixedPointLayer: needs an input or x0 to know the batch size")
        z = inputs[0]
        shape: Any = self.state_shape
        if shape is None:
            shape = attribute(self.g, "state_shape")
        if callable(shape):
            shape = shape(z)
        if shape is None:
            shape = tuple(z.shape[1:])
        if not isinstance(shape, (tuple, list)):
            raise TypeError(
                "FixedPointLayer: state_shape must be the shape of one sample's state, a tuple "
                f"(got {shape!r}); write state_shape=(n,)"
            )
        dtype = torch.real(z).dtype if differentiable(z) else torch.get_default_dtype()
        if not z.is_meta and torch.is_autocast_enabled(z.device.type):
            dtype = torch.promote_types(dtype, torch.float32)  # the state stays wide

        several = len(shape) > 0 and isinstance(shape[0], (tuple, list))

        def zeros(*batch: int, skip: int = 0) -> State:
            if not several:
                return torch.zeros(*batch, *shape[skip:], dtype=dtype, device=z.device)
            make, d = getattr(type(shape), "_make", tuple), z.device
            return make([torch.zeros(*batch, *s[skip:], dtype=dtype, device=d) for s in shape])

        b = z.shape[0]
        if shape is self.state_shape and b > 1 and not torch.compiler.is_compiling():
            doubtful = all(s and s[0] == b for s in (shape if several else [shape]))
            if doubtful and self._fits != (shape, b):
                self._check_shape(shape, zeros, inputs)
                self._fits = shape, b
        return zeros(b)

    def _check_shape(
        self, shape: Any, zeros: Callable[..., State], inputs: tuple[Tensor, ...]
    ) -> None:
        """Raise where state_shape holds the batch too, which a g that broadcasts would hide.

        Such a g takes it as the shape of the whole batch, and takes no batch of another size.
        """
        g = self.g
        binding = Binding.of(g)
        if binding is not None:  # on copies of the buffers
            g = binding.bind(binding.own(), watch=False)

        def takes(x0: State, *inputs: Tensor) -> bool:
            try:
                gx = g(x0, *inputs)
                return [t.shape for t in _parts(gx)] == [t.shape for t in _parts(x0)]
            except Exception:
                return False

        b = inputs[0].shape[0]
        with torch.no_grad():
            more = [torch.cat([t, t[:1]]) for t in inputs]
            whole = takes(zeros(), *inputs) and not takes(zeros(b + 1), *more)
            if whole and takes(zeros(b + 1, skip=1), *more):
                raise ValueError(
                    "FixedPointLayer: state_shape must be the shape of one sample's state, without "
                    f"the batch (got {tuple(shape)} for a batch of {b}, and g returns that shape "
                    "for the whole batch); leave its first number out"
                )

    def extra_repr(self) -> str:
        """The solver and its limits."""
        return f"solver={self.solver}, max_iterations={self.max_iterations}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the record of the last call."""
        return {**self.__dict__, "last": None}


def _parts(x: Any) -> Any:
    return (x,) if isinstance(x, Tensor) else x


def _unwrapped(t: Tensor) -> Tensor:
    """Without torch.func's wrappers; mapped dimensions first, as in the record."""
    return stripped(t, lambda t, dim: t.movedim(dim, 0))
