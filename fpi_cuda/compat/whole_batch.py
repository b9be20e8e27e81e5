"""The old layer's loop: one condition on the whole batch, asked after every evaluation of g."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import backends
from .._torch import valueless
from ..adjoint import ImplicitAdjoint
from ..drivers.support import Solved, Support
from ..options import Options, Solver, Tolerance
from ..record import ACTIVE_ROWS, NEVER, STATUS, Progress, Status
from ..solution import FixedPointWarning, warn
from ..solve.independence import INDEPENDENT
from ..solve.problem import Context, Problem, Report
from ..solvers import Picard
from ..state import refuse_recorders
from .conditions import Condition, Tensors, default_term_cond
from .tuples import Step, TupleMap, check_start, check_value

__all__ = ["solve"]


def solve(
    y: Tensors,
    x0: Tensors,
    g: Step,
    forward_cond: Condition,
    backward_cond: Condition,
    solver: Solver,
    param: Tensors,
) -> Tensors:
    """The last state, attached."""
    refuse_recorders("compat.fixed_point_iteration")
    if any([valueless(t) for t in x0]):  # one call for the shapes, as `fixed_point` does it
        check_start(x0)
        shaped = tuple(g(tuple(t.detach() for t in x0), y))
        check_value(shaped, [t.shape for t in x0])
        return shaped
    map = TupleMap(g, y, x0, param)
    adjoint = _Swapping(failed="use", forward=forward_cond, backward=backward_cond)
    problem = Problem(
        map=map,
        options=Options(solver, adjoint, Tolerance(), 1, "auto", "warn", True, "eager"),
        drivers=(_Conditioned(forward_cond),),
        context=Context.here(x0[0].device.type),
        unpack=map.unpack,
        samples=INDEPENDENT,
        name="compat.fixed_point_iteration",
        advice="pass it in y or param",
    )
    x = adjoint.attach(problem, map.pack(x0).detach(), (*y, *param, *map.own), Report())
    out: Tensors = map.unpack(x)
    map.settle(x, (y,), (), captured=False)
    return out


@dataclass(frozen=True)
class _Swapping(ImplicitAdjoint):
    """The adjoint's loop asks the other condition."""

    forward: Condition = default_term_cond
    backward: Condition = default_term_cond

    def transposed(self, problem: Problem) -> Problem:
        """The adjoint problem, conditions swapped."""
        swapped = dataclasses.replace(self, forward=self.backward, backward=self.forward)
        return (
            super()
            .transposed(problem)
            ._replace(
                options=problem.options._replace(adjoint=swapped),
                drivers=(_Conditioned(self.backward),),
                unpack=problem.unpack,
                name=f"{problem.name} (backward)",
            )
        )


class _Conditioned:
    """A driver whose loop goes on while a condition on the whole state holds."""

    def __init__(self, cond: Condition) -> None:
        self.cond = cond

    def support(self, direction: Any, because: str) -> Support:
        """Takes every solve."""
        return Support(self._solve)

    def _solve(self, direction: Any, because: str) -> Solved:
        evaluate, problem = direction.evaluation(), direction.problem
        x, count = direction.start.clone(), 0  # of evaluations of g before this one
        advance = self._accelerated(problem.options, x)
        while True:
            gx, previous = evaluate(x), x
            # A sum is NaN or Inf where a value is; where it only overflowed, the values are asked.
            if not math.isfinite(float(gx.detach().sum())) and not bool(gx.isfinite().all()):
                warn(
                    f"{problem.name}: NaN or Inf after {count + 1} evaluations of g; the state is "
                    "returned as it is. Look at x0 and y, or make g a contraction.",
                    FixedPointWarning,
                )
                x = gx
                break
            if advance is None:
                x = gx
            else:
                x, active = advance(x, gx)
                if not active:
                    warn(
                        f"{problem.name}: the residual kept growing; given up after {count + 1} "
                        "evaluations of g. Make g a contraction, or use m_anderson=0 to look at "
                        "the iterates.",
                        FixedPointWarning,
                    )
                    break
            if count and not self.cond(count, problem.unpack(x), problem.unpack(previous)):
                break
            count += 1
        return Solved(x, None)

    @staticmethod
    def _accelerated(options: Options, x: Tensor) -> Callable[..., tuple[Tensor, bool]] | None:
        if isinstance(options.solver, Picard):
            return None
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        progress = Progress(rows, NEVER)  # the condition alone decides
        update = options.solver.start(backends.choose(options.backend, x), progress, rows)

        def advance(x: Tensor, gx: Tensor) -> tuple[Tensor, bool]:
            moved = x.reshape(rows.shape).clone()
            update(moved, gx.reshape(rows.shape).contiguous())
            active = int(progress.tally[ACTIVE_ROWS]) > 0
            if not active and int(progress.counters[0, STATUS]) == Status.NONFINITE + 1:
                # g(x) is finite, so a norm overflowed: a plain step, and a fresh window.
                progress.counters.zero_()
                return gx, True
            return moved.view(x.shape), active

        return advance
