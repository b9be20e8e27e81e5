"""Rows that g captures: of a tensor with one a sample, which g reads but is not given.

Where a sample failed because its row there holds Inf, say, a good sample's has to stand in for that
row too, and nobody hands it over: it is met while g runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch import of_vmap, tree_leaves, tree_map
from .maps import Bound, LinearMap, Map
from .problem import Problem

__all__ = ["standing", "stood", "with_row"]


def with_row(keep: Tensor, t: Tensor) -> Tensor:
    """T, [B, ...], with a kept sample's row for those that are not, as a constant."""
    if not len(keep):
        return t
    row = keep.to(torch.uint8).argmax().view(1)
    rows = keep.view(len(keep), *(1,) * (t.dim() - 1))
    return torch.where(rows, t, t.detach().index_select(0, row))


def standing(
    problem: Problem, x: Tensor, keep: Tensor | None, tensors: Sequence[Tensor]
) -> tuple[Map, Tensor, list[Tensor]]:
    """A problem's map, x and tensors with kept samples in the places of others; None: all are."""
    if keep is None:
        return problem.map, x, list(tensors)
    n = problem.map.n_inputs
    x, *inputs = (with_row(keep, t) for t in (x, *tensors[:n]))
    tensors = [*inputs, *tensors[n:]]
    return stood(problem, keep, x, tensors).map, x, tensors


def stood(problem: Problem, keep: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> Problem:
    """The problem whose g reads a kept sample's row of what it captures for those not kept.

    Args:
        problem: what is linearised.
        keep: bool [B].
        x: where; stand-ins are in their places already.
        tensors: likewise.

    Returns:
        The same problem where g captures no tensor of B rows, or where those are no samples': then
        other rows there change g's values for samples that are kept. Each is tried by itself.
    """
    if of_vmap(keep) or problem.batch_dims != 1 or not bool(keep.any()):
        return problem

    def values(map: Map) -> Tensor:
        with torch.no_grad(), problem.context.autocast():
            return map(x, *tensors)[keep]

    met: dict[int, Tensor] = {}

    def note(t: Tensor) -> bool:
        met[id(t)] = t
        return False

    try:
        right = values(_standing(problem.map, keep, note))
        theirs = [
            t
            for t in met.values()
            if torch.equal(values(_standing(problem.map, keep, partial(is_, t))), right)
        ]
        map = _standing(problem.map, keep, lambda t: any(t is s for s in theirs))
        if theirs and torch.equal(values(map), right):
            return problem._replace(map=map)
    except Exception:  # tensors that g was never meant to see
        pass
    return problem


def _standing(map: Map, keep: Tensor, whether: Callable[[Tensor], bool]) -> Map:
    if isinstance(map, LinearMap):
        return LinearMap(_standing(map.inner, keep, whether), map.transpose)
    return _Standing(map, keep, whether)


class _Standing(Map):
    """A map whose captured rows are those of kept samples; see `_Replaced`."""

    def __init__(self, inner: Map, keep: Tensor, whether: Callable[[Tensor], bool]) -> None:
        self.inner, self.keep, self.whether = inner, keep, whether
        self.n_inputs = inner.n_inputs

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """The map at these params."""
        g = self.inner.bind(params)

        def bound(x: Tensor, *inputs: Tensor) -> Tensor:
            with _Replaced((x, *inputs, *params), self.keep, self.whether):
                return g(x, *inputs)

        return bound


class _Replaced(TorchFunctionMode):
    """Replaces rows of tensors that have B of them and come from outside.

    Args:
        known: what comes from inside, and so does all that is made of it.
        keep: bool [B].
        whether: asked of each such tensor.
    """

    def __init__(
        self, known: Sequence[Tensor], keep: Tensor, whether: Callable[[Tensor], bool]
    ) -> None:
        super().__init__()
        self._keep, self._whether = keep, whether
        self._known = {id(t): t for t in known}  # held, so that no id is given twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._replaced, (args, kwargs or {}))
        out = func(*args, **kwargs)
        self._known.update((id(t), t) for t in tree_leaves(out) if isinstance(t, Tensor))
        return out

    def _replaced(self, t: Any) -> Any:
        if not isinstance(t, Tensor) or id(t) in self._known or t.dim() == 0:
            return t
        if len(t) != len(self._keep) or not self._whether(t):
            return t
        return with_row(self._keep, t)
