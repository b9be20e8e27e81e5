"""Whether a solve that took the samples for independent was right: looked at seldom, after it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..drivers.support import Solved
from ..record import Record, Status
from .direction import Direction
from .independence import agree, norm_of

__all__ = ["depend"]


def depend(direction: Direction, solved: Solved) -> bool:
    """Whether samples depend on each other, where this solve is one of those that are looked at.

    What is looked at is g on the batch of all results. Where a CONVERGED sample's residual is not
    within the tolerance there, and once a kind in any case, g's values for some samples are
    compared with those beside other neighbours: what the solve started from (an adjoint: zeros).
    """
    samples, record = direction.problem.samples, solved.record
    if record is None:
        return False
    limits = record.progress.limits
    fixed_count = limits.rtol == limits.offset == 0
    if not samples.due(direction.adjoint, bool(record.failed) and not fixed_count):
        return False
    claimed = (record.status == Status.CONVERGED).reshape(-1)
    if not (samples.suspect or bool(claimed.any())):
        return False
    before = direction.seen.calls
    found = _depend(direction, solved.x, record, claimed)
    if not direction.adjoint:  # whose calls of g are its linearisations
        record.evaluations += direction.seen.calls - before
    return found


def _depend(direction: Direction, x: Tensor, record: Record, claimed: Tensor) -> bool:
    problem, evaluate = direction.problem, direction.evaluation()
    samples, dims, dtype = problem.samples, problem.batch_dims, problem.context.autocast_dtype
    b = x.shape[dims - 1]

    def rows(t: Tensor) -> Tensor:
        return t.reshape(len(claimed), -1)

    y = rows(evaluate(x)).clone()  # g may return the same memory each time
    met = _met(rows(x), y, record, direction.floor)
    bits = (b - 1).bit_length()
    if not samples.suspect and bool((met | ~claimed).all()):
        bits = 0 if samples.probed else 1
    samples.probed = True
    others = torch.zeros_like(x) if direction.adjoint else direction.start
    number = torch.arange(b, device=x.device)
    changed = False
    # Any two samples' numbers differ in a bit, so that some mixture holds one's result alone.
    for bit, which in itertools.product(range(bits), (0, 1)):
        kept = ((number >> bit) & 1) == which
        mixed = torch.where(kept.view(b, *(1,) * (x.dim() - dims)), x, others)
        try:
            same = agree(rows(evaluate(mixed)), y, dtype)
        except Exception:  # a state that g was never meant to see
            continue
        changed = bool((~same & kept.expand(x.shape[:dims]).reshape(-1)).any())
        if changed:
            break
    random = (changed or samples.suspect) and not bool(agree(rows(evaluate(x)), y, dtype).all())
    samples.tell(changed and not random, random)
    return changed and not random


def _met(x: Tensor, y: Tensor, record: Record, floor: Tensor | None) -> Tensor:
    """Bool [B]: whether the residual of x, [B, N], is within the tolerance; y = g(x)."""
    limits = record.progress.limits
    residual, value = norm_of(y - x), norm_of(y)
    measure = value if floor is None else torch.maximum(value, floor)
    # The record's is of the iterate before; rounding: in other rows of a product.
    within: Tensor = 2 * (limits.offset + limits.rtol * measure) + limits.rounding * value
    return residual <= within
