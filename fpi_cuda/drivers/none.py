"""No iteration at all: the start is the result, as of an adjoint whose c is v."""

from __future__ import annotations

from typing import Any

import torch

from ..layout import Layout
from ..record import ACTIVE, RESIDUAL, STATUS, Progress, Record
from ..status import Status
from .support import Solved, Support

__all__ = ["support"]


def support(direction: Any, because: str) -> Support:
    """Takes every linear solve."""
    return _ALL


def _solve(direction: Any, because: str) -> Solved:
    direction.measure()  # where v = 0, no derivative that is not finite may spoil a gradient
    start, dims = direction.start, direction.problem.batch_dims
    rows = Layout(start, dims).rows(start)
    progress = Progress(rows, direction.limits, direction.floor, direction.skip)
    del progress.out
    status = progress.counters[:, STATUS]
    status.masked_fill_(status == ACTIVE, Status.MAX_ITERATIONS + 1)
    progress.scalars[:, RESIDUAL] = torch.nan  # nobody has looked
    if direction.need:
        direction.evaluation()  # g at x̂, of which the gradients are
    record = Record(
        progress=progress,
        batch=start.shape[:dims],
        rate=direction.solver.contraction,
        path="no iteration",
        failed=0,  # this is what was asked for
        evaluations=direction.seen.calls,
    )
    return Solved(start, record)


_ALL = Support(_solve)
