"""accelerate=True: the old layer's call, solved by `fixed_point`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..adjoint import ImplicitAdjoint
from ..fixed_point import fixed_point
from ..options import Solver
from ..solution import Solution, State
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
    forward, backward = read("forward_cond", forward_cond), read("backward_cond", backward_cond)
    check_start(x0)
    b = x0[0].shape[:1]
    for i, t in enumerate(x0):
        if t.dim() == 0 or t.shape[:1] != b:
            sizes = ", ".join(str(tuple(t.shape)) for t in x0)
            raise ValueError(
                "compat: with accelerate=True every tensor of x0 must have the batch as its first "
                f"dimension, of one size (got shapes {sizes}; see x0[{i}]); bring it there, or "
                "leave accelerate out"
            )
    # Each sample has a row of these; that a tensor has as many by accident is found out.
    own = [i for i, t in enumerate(y) if t.shape[:1] == b and not isinstance(t, nn.Parameter)]
    shared = [i for i in range(len(y)) if i not in own]
    values = max(1, sum(t.numel() for t in x0))
    return fixed_point(
        _step(g, own, shared, param),
        x0 if len(x0) > 1 else x0[0],
        *(y[i] for i in own),
        params=(*(y[i] for i in shared), *param),
        solver=solver,
        tolerance=forward.tolerance(values),
        max_iterations=forward.max_iterations,
        adjoint=ImplicitAdjoint(
            tolerance=backward.tolerance(values), max_iterations=backward.max_iterations
        ),
    )


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
