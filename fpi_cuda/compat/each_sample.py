"""accelerate=True: the old layer's call, solved by `fixed_point`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import transforming
from ..adjoint import ImplicitAdjoint
from ..fixed_point import fixed_point
from ..norms import row_norms
from ..options import Solver, Tolerance
from ..solution import Solution, State
from ..state import refuse_recorders
from .conditions import Condition, Tensors, read
from .tuples import Step, Substitute, check_start, check_value

__all__ = ["solve"]


def solve(
    y: Tensors,
    x0: Tensors,
    g: Step,
    forward_cond: Condition,
    backward_cond: Condition,
    solver: Solver,
    param: Tensors,
) -> Solution:
    """The fixed point, each sample stopped by itself; x is a tensor where x0 holds one."""
    refuse_recorders("compat.fixed_point_iteration")
    forward, backward = read("forward_cond", forward_cond), read("backward_cond", backward_cond)
    check_start(x0)
    b = x0[0].shape[:1]
    for i, t in enumerate(x0):
        if t.dim() == 0 or t.shape[:1] != b:
            shapes = ", ".join(str(tuple(t.shape)) for t in x0)
            raise ValueError(
                "compat: with accelerate=True every tensor of x0 must have the batch as its first "
                f"dimension, of one size (got shapes {shapes}; see x0[{i}]); bring it there, or "
                "leave accelerate out"
            )
    # Each sample has a row of these; that a tensor has as many by accident is found out.
    own = [i for i, t in enumerate(y) if t.shape[:1] == b and not isinstance(t, nn.Parameter)]
    shared = [i for i in range(len(y)) if i not in own]
    values = max(1, sum(t.numel() for t in x0))
    step = _step(g, own, shared, param)
    adjoint = ImplicitAdjoint(
        tolerance=backward.tolerance(values), max_iterations=backward.max_iterations
    )

    def solved(start: State, tolerance: Tolerance) -> Solution:
        return fixed_point(
            step,
            start,
            *(y[i] for i in own),
            params=(*(y[i] for i in shared), *param),
            solver=solver,
            tolerance=tolerance,
            max_iterations=forward.max_iterations,
            adjoint=adjoint,
        )

    if len(x0) == 1:
        return solved(x0[0], forward.tolerance(values))
    solution = solved(x0, forward.tolerance(values))
    if transforming() or not forward.normalized or not solution.record.valued:
        return solution
    # The condition is about the first tensor alone, the solve's norm is of all of them.
    x = [t.detach() for t in solution.x]
    sizes = torch.stack([row_norms(t.flatten(1)) for t in x])
    share = sizes[0] / row_norms(sizes.T)
    limit = math.sqrt(forward.threshold)
    short = solution.residual_norm > limit * sizes[0]
    if not bool((short & solution.converged).any()):
        return solution
    rtol = torch.where(short, limit * share.nan_to_num(1.0), limit)
    rtol = rtol.clamp(min=torch.finfo(rtol.dtype).tiny)  # 0 might be a fixed count
    return solved(tuple(x), Tolerance(rtol, forward.tolerance(values).atol))


def _step(g: Step, own: list[int], shared: list[int], param: Tensors) -> Callable[..., Any]:
    """G of the state, the tensors of y that are the samples' own, those that are not, and param.

    What is known of its samples holds where the same ones are their own: it captures both lists.
    """

    def step(x: State, *given: Tensor) -> Any:
        order = *own, *shared
        y = [given[0]] * len(order) if order else []
        for i, t in zip(order, given, strict=False):
            y[i] = t
        parts = (x,) if isinstance(x, Tensor) else x
        if not param:
            value = g(parts, tuple(y))
        else:
            with Substitute(param, given[len(order) :]):
                value = g(parts, tuple(y))
        check_value(value, [x.shape for x in parts])
        return value[0] if isinstance(x, Tensor) else tuple(value)

    return step
