"""Whether a solve that took the samples for independent was right: looked at seldom, after it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..drivers.support import Solved
from ..forms import structured
from ..norms import row_norms
from ..record import Record
from ..status import Status
from .direction import Direction
from .independence import agree
from .problem import Report

__all__ = ["RANDOM", "random", "wrong"]

PROBES = 2  # of a kind
RANDOM = (
    "g gives other values for the same arguments (dropout, noise?), so it has no fixed point. Call "
    "g.eval(), or draw once a solve and pass what was drawn as an input."
)


def wrong(direction: Direction, solved: Solved, report: Report) -> bool:
    """Whether this solve has to be done again, if it is one of those that are looked at.

    What is looked at is g on the batch of all results. Where a CONVERGED sample's residual is not
    within the tolerance there, and twice a kind in any case, g's values for some samples are
    compared with those beside other neighbours: what the solve started from, or zeros (of a linear
    one always). A linear one is looked at where its forward solve was.
    """
    samples, record = direction.problem.samples, solved.record
    due = report.of_looked if direction.linear else samples.due()
    if record is None or not (due or record.failed or samples.suspect):
        return False
    if not (due or samples.suspect):
        counted = record.progress.limits.counted
        if counted if isinstance(counted, bool) else not bool(record.wanting.any()):
            return False
    claimed = (record.status == Status.CONVERGED).reshape(-1)
    if not (samples.suspect or bool(claimed.any())):
        return False
    report.looked, before = True, direction.seen.calls
    again = _look(direction, solved.x, record, claimed)
    if not direction.linear:  # whose calls of g are its linearisations
        record.evaluations += direction.seen.calls - before
    return again


def random(direction: Direction, x: Tensor, record: Record) -> bool:
    """Whether g gives other values for the same arguments, where that is not known yet.

    Looked at where a sample did not converge: no iteration could make it.
    """
    seen = direction.seen
    if seen.random is None and not direction.linear and not structured(direction.map.g):
        evaluate, before = direction.evaluation(), seen.calls
        try:
            first, second = (evaluate(x).clone() for _ in range(2))
            seen.random = not bool(agree(second, first, x.dtype, 4).all())
        except Exception:  # a state that g was never meant to see
            seen.random = False
        record.evaluations += seen.calls - before
    return bool(seen.random)


def _look(direction: Direction, x: Tensor, record: Record, claimed: Tensor) -> bool:
    problem, evaluate = direction.problem, direction.evaluation()
    samples, dims = problem.samples, problem.batch_dims
    b, autocast = x.shape[dims - 1], problem.context.autocast_dtype

    def rows(t: Tensor) -> Tensor:
        return t.reshape(len(claimed), -1)

    y = rows(evaluate(x)).clone()  # g may return the same memory each time
    met = bool((_met(rows(x), y, record, direction.floor) | ~claimed).all())
    others = torch.zeros_like(x)
    if not direction.linear:  # zeros, too, where a sample started too near to its end to tell
        start = direction.start
        near = row_norms(rows(x - start)) < row_norms(rows(x)) / 8
        others = torch.where(near.view(*x.shape[:dims], *(1,) * (x.dim() - dims)), others, start)
    digits = (b - 1).bit_length()
    bits: Sequence[int] = range(digits)
    if met and not samples.suspect:
        told = samples.probes < PROBES and not torch.equal(x, others)
        bits = (samples.probes,) if told else ()
        samples.probes += told
    changed = False
    for bit, which in itertools.product(bits, (0, 1)):
        kept = _parted(b, digits, bit, x.device) == which
        try:
            mixed = torch.where(kept.view(b, *(1,) * (x.dim() - dims)), x, others)
            same = agree(rows(evaluate(mixed)), y, x.dtype, 2)
        except Exception:  # a state that g was never meant to see
            continue
        changed = bool((~same & kept.expand(x.shape[:dims]).reshape(-1)).any())
        if changed:
            break
    steady = True
    if bits:  # unless g is random; and what g notes of its last call is of the results
        again = rows(evaluate(x))
        if changed or samples.suspect:
            steady = bool(agree(again, y, x.dtype, 4).all())
            direction.seen.random = not steady

    def some(at: Tensor) -> Tensor:
        return evaluate.part(at)(x.index_select(0, at))

    # If neighbours do not matter, it may be that samples were left out.
    left_out = samples.compactable and dims == 1
    if steady and not (met or changed) and left_out and not samples.learn(some, y, autocast):
        samples.tell()
        return True
    if not steady:  # that explains what was suspected
        samples.suspect = False
    samples.tell(changed and steady, direction.linear)
    return changed and steady


def _parted(b: int, digits: int, bit: int, device: torch.device) -> Tensor:
    """Zeros and ones for b samples, in no order that those may have; any two differ in some bit."""
    odd = int(0.618 * 2**digits) | 1  # times an odd number: another order of 0 to 2^digits − 1
    number: Tensor = torch.arange(b, device=device) * odd % 2**digits
    return (number >> (digits - 1 - bit % digits)) & 1


def _met(x: Tensor, y: Tensor, record: Record, floor: Tensor | None) -> Tensor:
    """Bool [B]: whether the residual of x, [B, N], is within the tolerance; y = g(x)."""
    limits = record.progress.limits
    residual, value = row_norms(y - x), row_norms(y)
    measure = value if floor is None else torch.maximum(value, floor)
    # The record's is of the iterate before; rounding: in other rows of a product.
    rtol, offset = limits.thresholds
    within: Tensor = 2 * (offset + rtol * measure) + limits.roundings * value
    return residual <= within
