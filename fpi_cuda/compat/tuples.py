"""The tuples of the old layer's call, and tensors that a plain function captures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import tree_map
from ..layout import joined
from ..solve.maps import UserMap
from ..state import check_tuple
from .conditions import Tensors

__all__ = ["Scalar", "Step", "Substitute", "TupleMap", "check_start", "check_value", "tensors"]

Step = Callable[[Tensors, Tensors], Sequence[Tensor]]


def tensors(name: str, value: Any) -> Tensors:
    """The value, which must be a tuple of tensors."""
    if not isinstance(value, (tuple, list)) or not all(isinstance(t, Tensor) for t in value):
        raise TypeError(
            f"compat: {name} must be a tuple of tensors (got {type(value).__name__}); write "
            f"({name},) for a single one"
        )
    return tuple(value)


def check_start(x0: Tensors) -> None:
    """Raise unless a solve can start at x0."""
    if not x0:
        raise ValueError("compat: x0 must hold at least one tensor (got an empty tuple)")
    for i, t in enumerate(x0):
        if t.is_complex():
            raise TypeError(
                f"compat: x0[{i}] must be real floating numbers (got {t.dtype}); give g "
                f"torch.view_as_real(x0[{i}]), and torch.view_as_complex inside it"
            )
        if not t.is_floating_point():
            raise TypeError(
                f"compat: x0[{i}] must be floating (got {t.dtype}); write x0[{i}].float()"
            )
        if t.dtype != x0[0].dtype or t.device != x0[0].device:
            raise TypeError(
                f"compat: x0[{i}] must be floating, of x0[0]'s dtype and device, "
                f"{x0[0].dtype} on {x0[0].device} (got {t.dtype} on {t.device})"
            )


def check_value(x: Any, shapes: Sequence[torch.Size]) -> None:
    """Raise unless g's value is a tuple of these shapes."""
    check_tuple("compat", x, len(shapes))
    for i, (t, shape) in enumerate(zip(x, shapes, strict=True)):
        if not isinstance(t, Tensor) or t.shape != shape:
            got = str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(
                f"compat: g must return a tensor of x0's shape {tuple(shape)} at {i} (got {got})"
            )


class Substitute(TorchFunctionMode):
    """Puts explicit tensors in the place of closure tensors, in every torch call."""

    def __init__(self, closure: Tensors, given: Sequence[Tensor]) -> None:
        super().__init__()
        self._given = {id(c): t for c, t in zip(closure, given, strict=True)}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(
            lambda t: self._given.get(id(t), t) if isinstance(t, Tensor) else t,
            (args, kwargs or {}),
        )
        return func(*args, **kwargs)


class TupleMap(UserMap):
    """g(x, y) on one row that holds the whole state; y and param count as shared."""

    def __init__(self, g: Step, y: Tensors, x0: Tensors, param: Tensors) -> None:
        check_start(x0)
        shapes = [t.shape for t in x0]
        sizes = [shape.numel() for shape in shapes]

        def pack(x: Any) -> Tensor:
            check_value(x, shapes)
            rows = [t.reshape(1, -1) for t in x]
            return rows[0] if len(rows) == 1 else joined(rows, 1)

        def unpack(x: Tensor) -> Tensors:
            lead = x.shape[:-2]  # dimensions that torch.vmap added
            parts = x.split(sizes, -1) if len(sizes) > 1 else (x,)
            return tuple(t.reshape((*lead, *s)) for t, s in zip(parts, shapes, strict=True))

        super().__init__(g, 0, len(y) + len(param), pack, unpack)
        self.form_dim = 0  # the state is one row of all samples, whatever g is
        self.n_y, self.param = len(y), param

    def bind(self, params: Sequence[Tensor]) -> Callable[..., Tensor]:
        """The map at these y, param and parameters."""
        y = tuple(params[: self.n_y])
        given = params[self.n_y : self.n_params]
        g = self.binding.bind(params[self.n_params :]) if self.binding else self.g

        def bound(x: Tensor) -> Tensor:
            if not self.param:
                return self.pack(g(self.unpack(x), y))
            with Substitute(self.param, given):
                return self.pack(g(self.unpack(x), y))

        return bound


class Scalar(nn.Module):
    """A function of the tuples x, y as a scalar function of all their tensors and param."""

    def __init__(self, fun: Any, n_x: int, n_y: int, param: Tensors) -> None:
        super().__init__()
        self.fun, self.n_x, self.n_y, self.param = fun, n_x, n_y, param

    def forward(self, *s: Tensor) -> Tensor:
        """fun(x, y)."""
        x, y = s[: self.n_x], s[self.n_x : self.n_x + self.n_y]
        if self.param:
            with Substitute(self.param, s[self.n_x + self.n_y :]):
                value = self.fun(x, y)
        else:
            value = self.fun(x, y)
        if isinstance(value, (tuple, list)) and len(value) == 1:
            value = value[0]
        return cast(Tensor, value)
