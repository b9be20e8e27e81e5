"""What a solve is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..drivers.support import Driver
from ..options import Options
from ..record import Record
from ..tree import Tree, build, flatten
from .independence import Samples
from .maps import Map

__all__ = ["Context", "Problem"]

_NOTHING = contextlib.nullcontext()


class Context(NamedTuple):
    """Where a solve was called: g runs under the same whenever it runs."""

    grad_enabled: bool
    autocast_dtype: torch.dtype | None
    device_type: str

    @staticmethod
    def here(device_type: str) -> Context:
        """The one that holds now."""
        dtype = torch.get_autocast_dtype(device_type) if _autocasts(device_type) else None
        return Context(torch.is_grad_enabled(), dtype, device_type)

    def grad(self) -> contextlib.AbstractContextManager[Any]:
        """Its grad mode, within a solve, where none is needed otherwise."""
        return torch.set_grad_enabled(True) if self.grad_enabled else _NOTHING

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """What g computes in for a state of this dtype: that, or autocast's where it is coarser.

        Autocast leaves float64 alone.
        """
        cast = self.autocast_dtype
        if cast is None or dtype == torch.float64:
            return dtype
        return cast if torch.finfo(cast).eps > torch.finfo(dtype).eps else dtype

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Its autocast state."""
        if self.autocast_dtype is None:
            return _NOTHING
        return torch.autocast(self.device_type, dtype=self.autocast_dtype, cache_enabled=False)

    def full_precision(self) -> contextlib.AbstractContextManager[Any]:
        """No autocast, for the loop's own arithmetic, whoever calls."""
        if not _autocasts(self.device_type):
            return _NOTHING
        return torch.autocast(self.device_type, enabled=False)


def _autocasts(device_type: str) -> bool:
    """Whether autocast is on there; torch raises when asked of the meta device, which has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


class Problem(NamedTuple):
    """One solve: the map, and all that says how to iterate it; no tensors."""

    map: Map
    options: Options
    drivers: Sequence[Driver]  # in the order in which they are asked
    context: Context
    unpack: Callable[[Tensor], Any]  # the solver's one tensor as the user's state
    samples: Samples  # whether they depend on each other, as far as is known
    batch_dims: int = 1
    name: str = "fixed_point"
    advice: str = "pass it in `inputs` (per sample) or `params` (shared)"  # a closure tensor
    lipschitz: float | None = None
    structure: Hashable = ()  # of a state that is packed: what tells it from others
    cut: bool = False  # whether it may end before it converges, and none has failed by that

    def mapped(self, dims: Sequence[int | None]) -> Problem:
        """The problem over one more batch dimension, where torch.vmap maps it."""
        return self._replace(map=self.map.mapped(dims), batch_dims=self.batch_dims + 1)

    def state(self, x: Tensor) -> Any:
        """The user's state of x, [*batch, *sample]; what torch.vmap maps comes first in it too."""
        if self.batch_dims == 1:
            return self.unpack(x)
        trees: list[Tree] = []

        def leaves(x: Tensor) -> list[Tensor]:  # torch.vmap may not know the state's classes
            parts, tree = flatten(self.unpack(x))
            trees[:] = [tree]
            return parts

        of: Callable[[Tensor], list[Tensor]] = leaves
        for _ in range(self.batch_dims - 1):
            of = torch.vmap(of)
        parts = of(x)
        return build(trees[0], parts)


class Report:
    """What a solve leaves beside its state; a derivative's record goes into its forward's."""

    record: Record | None = None
    closure = False  # whether g has closure tensors that need gradients
    masked = False  # whether samples may have no gradient
    looked = False  # whether it was looked at whether samples depend on each other
    keep: Tensor | None = None  # bool [*batch]: samples whose gradient is kept; None: all
    checkpoints: Sequence[Tensor] = ()  # iterates that were asked for, [*batch, *sample]

    def __init__(self, parent: Report | None = None, tangent: bool = False) -> None:
        self.parent, self.tangent = parent, tangent

    @property
    def of_looked(self) -> bool:
        """Whether the solve that this one differentiates was looked at."""
        return self.parent is not None and self.parent.looked

    @property
    def of_closure(self) -> bool:
        """Whether the solve that this one differentiates has closure tensors."""
        return self.parent is not None and self.parent.closure

    def __call__(self, record: Record) -> None:
        self.record = record
        if self.parent is not None and self.parent.record is not None:
            setattr(self.parent.record, "tangent" if self.tangent else "adjoint", record)
