"""The one route of a solve, whatever its direction: who runs it, and what is said of it after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch import unhooked
from ..drivers.support import Solved
from ..record import Record
from ..solution import FixedPointError, FixedPointWarning, Solution, warn
from ..status import DERIVATIVE, INCOMING, TANGENT, Status
from .coupling import RANDOM, random, wrong
from .direction import Direction
from .failed import finite
from .problem import Report

# x, [*batch, *sample]; bool [*batch], the samples whose gradient is kept (None: all); and the
# direction's outputs: for an adjoint c, then the gradients.
Outcome = tuple[Tensor, Tensor | None, Sequence[Tensor | None]]


def solve(direction: Direction, report: Report) -> Outcome:
    """The direction's problem; once more as one system where its samples depend on each other."""
    problem = direction.problem
    # set_grad_enabled costs half of what no_grad does, here and wherever a solve changes the mode.
    with torch.set_grad_enabled(False), problem.context.full_precision(), unhooked():
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
        if direction.skip is not None and (direction.higher or report.of_closure):
            keep = direction.sound(keep)
        report.masked, report.keep = keep is not None, keep
        report.checkpoints = solved.checkpoints
        outputs = _outputs(direction, solved, keep)
    return direction.spoiled(solved.x), keep, outputs


def _run(direction: Direction) -> Solved:
    """By the first driver that takes it."""
    because = ""
    for driver in direction.problem.drivers:
        support = driver.support(direction, because)
        if support.run is not None:
            return support.run(direction, because)
        because = support.reason or because
    raise AssertionError(f"no driver took the solve: {because}")


def _outputs(direction: Direction, solved: Solved, keep: Tensor | None) -> Sequence[Tensor | None]:
    """What follows the loop; no gradient but its own is any the worse for a sample that failed."""
    outputs = solved.outputs
    if outputs is None:
        outputs = direction.outputs(solved.x, keep)
    all_are = keep is None or bool(keep.all())
    if not direction.need or (all_are and direction.skip is None):
        return outputs
    # Zero times infinity may be in these, of samples that failed, or of which v = 0 and whose
    # derivative nobody has seen.
    if direction.problem.options.adjoint.failed == "use" or finite(outputs):
        return outputs
    if solved.record is not None:
        solved.record.evaluations += 1
    return direction.spared(solved.x, keep)


def _account(direction: Direction, solved: Solved, report: Report) -> Tensor | None:
    """Report, and say which samples' gradients are kept; None: all."""
    record, problem = solved.record, direction.problem
    if record is None:
        return None
    record.lipschitz = problem.lipschitz
    if problem.context.autocast_dtype is not None:
        record.computed = problem.context.precision(solved.x.dtype)
    record.mixes = direction.solver.history > 1 and not direction.linear
    if direction.coupled:
        record.system = solved.x.shape[problem.batch_dims - 1]
    report(record)
    if not record.failed:
        if direction.seen.random:
            warn(f"{problem.name}: {RANDOM}", UserWarning)
        return None
    keep = direction.kept(record.status)
    _complain(direction, solved.x, record, keep)
    return keep


def _complain(direction: Direction, x: Tensor, record: Record, keep: Tensor | None) -> None:
    problem, on_failure = direction.problem, direction.problem.options.on_failure
    if on_failure == "return":
        return
    wanting = record.wanting
    if direction.transpose and problem.context.autocast_dtype == torch.float16:
        # A loss scaler tries scales until one overflows: it sees the NaN or Inf, and says nothing.
        seen = record.status == Status.NONFINITE
        wanting = wanting & ~(seen if keep is None else seen & keep)
    failing = record.status[wanting]
    if not len(failing):
        return
    stuck = (failing == Status.MAX_ITERATIONS) | (failing == Status.STALLED)
    if bool(stuck.any()) and random(direction, x, record):
        message = f"{problem.name}: {RANDOM} {record.failures(advice=False)}"
    else:
        message = f"{problem.name}: {record.failures(nonfinite=_nonfinite(direction, record))}"
    if on_failure == "raise":
        raise FixedPointError(message, Solution(problem.state(x), record))
    warn(message, FixedPointWarning)


def _nonfinite(direction: Direction, record: Record) -> str:
    """What NONFINITE means here, if not what it means forward: g was finite."""
    if not direction.linear:
        return ""
    samples = (record.status == Status.NONFINITE).reshape(-1)
    came = torch.zeros_like(samples) if direction.floor is None else ~direction.floor.isfinite()
    incoming = INCOMING if direction.transpose else TANGENT
    why = [DERIVATIVE] * bool((samples & ~came).any()) + [incoming] * bool((samples & came).any())
    return " Or: ".join(why)
