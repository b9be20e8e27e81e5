"""The one route of a solve, whatever its direction: who runs it, and what is said of it after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..drivers.support import Solved
from ..record import Record, Status
from ..solution import FixedPointError, FixedPointWarning, Solution, warn
from .coupling import RANDOM, random, wrong
from .direction import Direction
from .problem import Report

# x, [*batch, *sample]; bool [*batch], the samples whose gradient is kept (None: all); and the
# direction's outputs: for an adjoint c, then the gradients.
Outcome = tuple[Tensor, Tensor | None, Sequence[Tensor | None]]


def solve(direction: Direction, report: Report) -> Outcome:
    """The direction's problem; once more as one system where its samples depend on each other."""
    problem = direction.problem
    # set_grad_enabled costs half of what no_grad does, here and wherever a solve changes the mode.
    with torch.set_grad_enabled(False), problem.context.full_precision():
        solved = _run(direction)
        known = problem.samples.certain or direction.coupled
        if not known and wrong(direction, solved, report):
            assert solved.record is not None
            before = solved.record.evaluations
            direction = direction.again()
            solved = _run(direction)
            assert solved.record is not None
            solved.record.evaluations += before
        # Under vmap nothing is attached to closure tensors.
        report.closure = direction.seen.closure and problem.batch_dims == 1
        keep = _account(direction, solved, report)
        outputs = direction.outputs(solved.x, keep) if solved.outputs is None else solved.outputs
    return solved.x, keep, outputs


def _run(direction: Direction) -> Solved:
    """By the first driver that takes it."""
    because = ""
    for driver in direction.problem.drivers:
        support = driver.support(direction, because)
        if support.run is not None:
            return support.run(direction, because)
        because = support.reason or because
    raise AssertionError(f"no driver took the solve: {because}")


def _account(direction: Direction, solved: Solved, report: Report) -> Tensor | None:
    """Report, and say which samples' gradients are kept; None: all."""
    record, problem = solved.record, direction.problem
    if record is None:
        return None
    record.lipschitz = problem.lipschitz
    record.mixes = direction.solver.history > 1 and not direction.adjoint
    if direction.coupled:
        record.system = solved.x.shape[problem.batch_dims - 1]
    report(record)
    if not record.failed:
        if direction.seen.random:
            warn(f"{problem.name}: {RANDOM}", UserWarning)
        return None
    _complain(direction, solved.x, record)
    return direction.kept(record.status)


def _complain(direction: Direction, x: Tensor, record: Record) -> None:
    problem, on_failure = direction.problem, direction.problem.options.on_failure
    if on_failure == "return":
        return
    failing = record.status[record.wanting]
    if not len(failing):
        return
    stuck = (failing == Status.MAX_ITERATIONS) | (failing == Status.STALLED)
    if bool(stuck.any()) and random(direction, x, record):
        message = f"{problem.name}: {RANDOM} {record.failures(advice=False)}"
    else:
        message = f"{problem.name}: {record.failures()}"
    if on_failure == "raise":
        raise FixedPointError(message, Solution(problem.unpack(x), record))
    warn(message, FixedPointWarning)
