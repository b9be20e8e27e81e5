"""The iteration as a loop in the program, `torch.while_loop`: values in, values out, no host.

All samples go through every iteration, and those that have ended are kept as they are by masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from ..backends import formulas
from ..backends.formulas import Rows, Rule, code
from ..options import Options
from ..record import ACTIVE, GAIN, HEAD, NEVER, STATUS, TRAIL, Limits, Progress, Record
from ..solve.maps import check_output
from ..solve.problem import Context
from ..solvers.picard import Mixing
from ..status import Status
from .trace import traced

__all__ = ["iterate"]

NESTED = (
    "fixed_point: a solve inside of the g of another can't be exported, since torch.export takes "
    "no loop within a loop; solve both as one, for a state (x, y) of their two, or make the inner "
    "g a DenseStep, which needs no loop"
)
_within: ContextVar[bool] = ContextVar("within", default=False)  # whether a g is being traced


def iterate(
    g: Callable[..., Tensor],
    x0: Tensor,
    inputs: Sequence[Tensor],
    options: Options,
    limits: Limits,
    context: Context,
) -> tuple[Tensor, Record]:
    """The fixed point of x ↦ g(x, *inputs), [B, ...], and its record.

    Args:
        g: called once, on tensors without values, under the context's autocast.
        x0: where to start.
        inputs: all that g gets beside x.
        options: those of the solve.
        limits: when samples stop.
        context: where the solve was called.
    """
    one = options.per_sample is False  # system
    progress, solver = Progress(_rows(x0), limits), options.solver
    mixing = solver.mixing(progress.precision)  # type: ignore[attr-defined]
    start = x0.clone(memory_format=torch.contiguous_format)
    k = progress.counters.new_zeros(())
    records = [progress.counters, progress.scalars]
    if one:
        records += [torch.zeros_like(t[:1]) for t in records]
    r = len(records)
    carry = (k, start, *records, *_window(_state(start, one), mixing.history))
    own = [] if limits.own is None else [limits.own]

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        (k, x, *moving), given = values[: len(carry)], values[len(carry) :]
        records, window = moving[:r], tuple(moving[r:])
        with context.autocast():
            gx = check_output(g(x, *given[len(own) :]), x)
        rule = _rule(limits, *given[: len(own)])
        accounts = [Rows.of(*records[i : i + 2]) for i in range(0, r, 2)]
        advance = _system if one else _samples
        rows = _rows(x), _rows(gx).contiguous()
        k = k + 1
        accounts, moved, window = advance(accounts, k, rule, *rows, mixing, window)
        heads = [t[:, HEAD] for t in records[::2]]
        packed = [t for a, head in zip(accounts, heads, strict=True) for t in a.packed(head)]
        return (k, moved.reshape(x.shape), *packed, *window)

    if _within.get():
        raise RuntimeError(NESTED)
    token = _within.set(True)
    try:
        body = traced(step, carry, [*own, *inputs])
    finally:
        _within.reset(token)
    k, x, *moved = torch.while_loop(_going, body, carry)
    records, window = moved[:r], tuple(moved[r:])
    if mixing.history == 1:
        records[-1] = _measured(records[-2], records[-1], _state(x, one), window, mixing.beta)
    if one:
        records[1] = _everyones(records[1], records[3])
    progress.counters, progress.scalars = records[:2]
    progress.result()
    path = f"exported, {'one system' if one else 'masked'}"
    record = Record(progress, x0.shape[:1], solver.contraction, path, failed=-1, evaluations=k)
    record.mixes = mixing.history > 1
    if one:
        record.system = x0.shape[0]
    return x, record


def _going(k: Tensor, x: Tensor, counters: Tensor, *_: Tensor) -> Tensor:
    return (counters[:, STATUS] == ACTIVE).any()


def _state(x: Tensor, one: bool) -> Tensor:
    """The rows that the solver moves, [R, N]."""
    return _rows(x).reshape(1, -1) if one else _rows(x)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(1) if x.dim() > 1 else x[:, None]


def _window(x: Tensor, history: int) -> list[Tensor]:
    """What is kept of iterates: of Picard the last and its trail, else g's values and residuals."""
    if history == 1:
        return [torch.zeros_like(x) for _ in range(1 + TRAIL)]
    return [x.new_zeros(x.shape[0], history, x.shape[1]) for _ in range(2)]


_Moved = tuple[list[Rows], Tensor, tuple[Tensor, ...]]


def _samples(
    accounts: Sequence[Rows],
    k: Tensor,
    rule: Rule,
    x: Tensor,
    gx: Tensor,
    mixing: Mixing,
    window: tuple[Tensor, ...],
) -> _Moved:
    """One step of samples that are independent: their records, iterates and windows."""
    (rows,) = accounts
    if mixing.history == 1:
        at, first, second = window
        new, moved, keeps = formulas.picard(rows, k, rule, x, gx, mixing.beta)
        running, kept = (rows.status == ACTIVE)[:, None], keeps[:, None]
        trail = torch.where(kept, x, first), torch.where(kept, first, second)
        return [new], moved, (torch.where(running, x, at), *trail)
    values, residuals = window
    of = mixing.beta, mixing.ridge, mixing.restart, values, residuals, mixing.every
    new, moved, pushed, r = formulas.anderson(rows, k, rule, x, gx, *of)
    shifted = (formulas.shifted(values, pushed, gx), formulas.shifted(residuals, pushed, r))
    return [new], moved, shifted


def _system(
    accounts: Sequence[Rows],
    k: Tensor,
    rule: Rule,
    x: Tensor,
    gx: Tensor,
    mixing: Mixing,
    window: tuple[Tensor, ...],
) -> _Moved:
    """One step of a batch that is one system, as `solvers.coupled` says it."""
    rows, joint = accounts
    judged, _, _ = formulas.picard(rows, k, rule, x, gx, 1.0)
    over = (judged.status != ACTIVE).all()
    most = rule.most.amax() if isinstance(rule.most, Tensor) else rule.most
    offset = torch.where(over, math.inf, NEVER.offset)
    never = Rule(0.0, offset, NEVER.rounding, NEVER.patience, most)
    whole = x.reshape(1, -1), gx.reshape(1, -1)
    (new,), moved, window = _samples([joint], k, never, *whole, mixing, window)
    converged = new.status == code(Status.CONVERGED)
    ended = torch.where(converged, judged.status.amax(0, keepdim=True), new.status)

    def of_all(t: Tensor) -> Tensor:
        return t.expand_as(rows.status)

    back = of_all(new.retreats != joint.retreats)
    samples = judged._replace(
        status=of_all(ended),
        since=of_all(new.since),
        retreats=of_all(new.retreats),
        # Where it went back, the norms are those of the iterate to which it did.
        residual=torch.where(back, rows.residual, judged.residual),
        value=torch.where(back, rows.value, judged.value),
        # What counts as growth or as progress, the system says.
        reference=torch.full_like(rows.reference, math.nan),
    )
    return [samples, new._replace(status=ended)], moved.reshape(x.shape), window


def _measured(
    counters: Tensor, scalars: Tensor, g: Tensor, window: Sequence[Tensor], beta: float
) -> Tensor:
    """The scalars with what Picard's end tells of g."""
    rows, (x, *trail) = Rows.of(counters, scalars), window
    told = formulas.measurable(rows)
    gain, ring = formulas.measured(rows, g, x, (trail[0], trail[1]), beta)
    gain = torch.where(told, gain, rows.gain)
    ring = torch.where(told[:, None], ring, rows.ring)
    return torch.cat((scalars[:, :GAIN], gain[:, None], ring), 1)


def _everyones(scalars: Tensor, joint: Tensor) -> Tensor:
    """The scalars with what the system's say of g."""
    measured = joint[:, GAIN:].expand(scalars.shape[0], -1)
    return torch.cat((scalars[:, :GAIN], measured), 1)


def _rule(limits: Limits, own: Tensor | None = None) -> Rule:
    if own is None:
        rtol, offset, rounding, patience, most = limits.values
        return Rule(rtol, offset, rounding, patience, most)
    own_rtol, own_offset, own_patience, own_most, own_rounding = own.unbind(1)
    return Rule(own_rtol, own_offset, own_rounding, own_patience, own_most)
