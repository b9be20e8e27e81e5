"""The tangent of a fixed point, t = (∂g/∂x) t + (∂g/∂z) dz, of samples that did not fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._torch import of_vmap
from ..operators import along
from .failed import every, masked, pairing, stand_in, unmapped
from .problem import Problem

__all__ = ["Solve", "push", "tangent_of_kept"]

# Of a problem, x, r and tensors: t, the fixed point of t ↦ (∂g/∂x) t + r.
Solve = Callable[[Problem, Tensor, Tensor, Sequence[Tensor]], Tensor]


def push(
    problem: Problem,
    x: Tensor,
    tensors: Sequence[Tensor],
    moved: Sequence[int],
    d: Sequence[Tensor],
) -> Tensor:
    """(∂g/∂tensors) d at x, differentiable again; d are tangents of the tensors at these positions.

    By reverse mode twice, as everything here, so g needs no formulas for forward mode.
    """
    given = x, torch.zeros_like(x), *tensors
    return along(pairing(problem), [2 + i for i in moved], d, [1], given)[0]


def tangent_of_kept(
    problem: Problem,
    keep: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor],
    moved: Sequence[int],
    d: Sequence[Tensor],
    solve: Solve,
) -> Tensor:
    """The tangent of x; zero for samples that are not kept: bool [*batch].

    As for gradients, a kept sample stands in for them where g is linearised: of a derivative that
    is not finite nothing is left, in this or in a higher order.
    """
    if of_vmap(keep):  # no host can look: if none is kept, nothing is to be differentiated
        alive = keep.any()
        x, *tensors = (torch.where(alive, t, t.detach()) for t in (x, *tensors))
    elif every(keep):
        return solve(problem, x, push(problem, x, tensors, moved, d), tensors)
    elif every(~keep):
        return torch.where(keep.new_zeros(()), x, 0)  # attached all the same
    if problem.batch_dims > 1:  # samples of one slice stand in for its own alone
        return _by_slices(problem, keep, x, tensors, moved, d, solve)
    n = problem.map.n_inputs
    x, *inputs = stand_in(keep, (x, *tensors[:n]))
    tensors = [*inputs, *tensors[n:]]
    r = masked(push(problem, x, tensors, moved, d), keep)
    return solve(problem, x, r, tensors)  # zero where r is


def _by_slices(
    problem: Problem,
    keep: Tensor,
    x: Tensor,
    tensors: Sequence[Tensor],
    moved: Sequence[int],
    d: Sequence[Tensor],
    solve: Solve,
) -> Tensor:
    """`tangent_of_kept` of the problem that torch.vmap mapped, mapped."""
    map, dims = unmapped(problem.map)
    one = problem._replace(map=map, batch_dims=problem.batch_dims - 1)

    def of_slice(keep: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        tensors, d = rest[: len(dims)], rest[len(dims) :]
        return tangent_of_kept(one, keep, x, tensors, moved, d, solve)

    of_moved = [dims[i] for i in moved]
    return torch.vmap(of_slice, in_dims=(0, 0, *dims, *of_moved))(keep, x, *tensors, *d)
