"""The formulas of a step: new values from old, where no shape and no branch depends on a value.

The oracle (`reference`) gathers and scatters rows around them, and the body of an exported loop is
made of them. They are written for reading, and in csrc/math for the native kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..record import (
    ACTIVE,
    FALL,
    GAIN,
    GOES_ON,
    GROWTH,
    GROWTH_ITERATIONS,
    HALVINGS,
    ITERATIONS,
    LEAST_GAIN,
    MAX_HALVINGS,
    MAX_RETREATS,
    NEAR_END,
    NOISE,
    PLAIN,
    REFERENCE,
    REFERENCE_ITERATION,
    RESIDUAL,
    RETREATS,
    RING,
    RING_START,
    SLOW_ITERATIONS,
    STATUS,
    TRAIL,
    VALUE,
    WINDOW,
    WORSE,
)
from ..status import Status

__all__ = ["Rows", "Rule", "anderson", "code", "measurable", "measured", "picard", "shifted"]


class Rule(NamedTuple):
    """When rows stop, see `Limits`: numbers, or tensors for all of them, [], or for each, [R]."""

    rtol: float | Tensor
    offset: float | Tensor
    rounding: float | Tensor
    patience: float | Tensor
    most: float | Tensor
    floor: Tensor | None = None

    def threshold(self, value: Tensor) -> Tensor:
        """The residual at which a row has converged, for ‖g(x)‖, [R]."""
        least = value if self.floor is None else torch.maximum(value, self.floor)
        return self.offset + self.rtol * least


class Rows(NamedTuple):
    """The record of rows by columns, [R] each, the ring [R, RING]; HEAD is who keeps the window's.

    Columns have the names of `record`; `since` is REFERENCE_ITERATION.
    """

    status: Tensor
    iterations: Tensor
    since: Tensor
    window: Tensor
    retreats: Tensor
    plain: Tensor
    halvings: Tensor
    residual: Tensor
    reference: Tensor
    value: Tensor
    gain: Tensor
    ring: Tensor

    @staticmethod
    def of(counters: Tensor, scalars: Tensor) -> Rows:
        """Those of a record's rows, [R, 8] and [R, 9]."""
        counted = STATUS, ITERATIONS, REFERENCE_ITERATION, WINDOW, RETREATS, PLAIN, HALVINGS
        columns = [counters[:, i] for i in counted]
        columns += [scalars[:, i] for i in (RESIDUAL, REFERENCE, VALUE, GAIN)]
        return Rows._make([*columns, scalars[:, RING_START:]])

    def packed(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """The record's rows of them, [R, 8] and [R, 9]; head: [R]."""
        counters = self.status, self.iterations, self.since, self.window, head, *self[4:7]
        scalars = self.residual, self.reference, self.value, self.gain
        scalar_columns = torch.stack(scalars, 1)
        return (
            torch.stack([c.to(torch.int32) for c in counters], 1),
            torch.cat((scalar_columns, self.ring), 1),
        )

    def where(self, rows: Tensor, others: Rows) -> Rows:
        """These in the rows, bool [R], and those in all else."""
        pairs = zip(self[:-1], others[:-1], strict=True)
        columns = [torch.where(rows, mine, other) for mine, other in pairs]
        return Rows._make([*columns, torch.where(rows[:, None], self.ring, others.ring)])


def picard(
    rows: Rows, k: Tensor, rule: Rule, x: Tensor, gx: Tensor, beta: float
) -> tuple[Rows, Tensor, Tensor]:
    """One damped Picard step.

    Args:
        rows: the record.
        k: which iteration this is, from 1; without dimensions.
        rule: when rows stop.
        x: iterates, [R, N].
        gx: g(x), [R, N].
        beta: weight of the new value.

    Returns:
        The record; the next iterates, where a row ended its result, of ended ones x; and of which
        rows x joins the trail, bool [R], since the end is near: `window` counts what is there.
    """
    xa, ga = _wide(rows, x), _wide(rows, gx)
    residual, value = _norm(ga - xa), _norm(ga)
    running = rows.status == ACTIVE
    ratio = (residual / rows.residual) ** 2
    # Undamped, Δg = r and Δx is the residual before.
    ring = _put(rows.ring, k, running & (k > 1), ratio) if beta == 1 else rows.ring
    status, new = _stop(rows, k, rule, residual, value, running)
    active = running & (status == ACTIVE)
    threshold = rule.threshold(value)
    near = (residual * ratio <= NEAR_END * threshold) | (threshold < 0)
    near = near | (new.since != k) | (k + TRAIL >= rule.most) | (k <= TRAIL)
    keeps = active & near
    length = torch.where(keeps, (rows.window + 1).clamp(max=TRAIL), 0)
    new = new._replace(ring=ring, window=torch.where(active, length, rows.window))
    return new, _freeze(x, gx, _damped(xa, ga, beta, gx), status, running), keeps


def measurable(rows: Rows) -> Tensor:
    """Bool [R]: of which rows that have ended the trail tells gain and rate."""
    nothing = (rows.status == ACTIVE) | (rows.status == code(Status.NONFINITE))
    return ~nothing & (rows.window > 0) & (rows.residual > 0)


def measured(
    rows: Rows, g: Tensor, x: Tensor, trail: tuple[Tensor, Tensor], beta: float
) -> tuple[Tensor, Tensor]:
    """Gain, [R], and ring, with a damped solve's rate, of rows that end.

    Args:
        rows: the record.
        g: g(x), [R, N].
        x: where that was.
        trail: the iterates before, newest first; of a row that has one, the second means nothing.
        beta: weight of the new value.
    """
    # A damped x was rounded, and residuals told from it, by Δx/β, are so much the less exact.
    noise = _noise(rows.value, x.dtype) / min(beta, 1)
    long = rows.window > 1
    x1 = trail[0]
    x2 = torch.where(long[:, None], trail[1], x1)
    g, x, x1, x2 = (_wide(rows, t) for t in (g, x, x1, x2))
    dx, dx1 = x - x1, x1 - x2
    r, r1, r2 = g - x, dx / beta, dx1 / beta
    dr, dr1 = r - r1, r1 - r2
    dg, dg1 = dx + dr, dx1 + dr1
    nothing = torch.zeros_like(noise)
    gain = _larger_gain(nothing, dg, dr, noise)
    far = _larger_gain(gain, dg + dg1, dr + dr1, noise)
    gain = torch.where(long, far, gain)
    if beta == 1:
        return gain, rows.ring
    rates = [_larger_gain(nothing, a, b, noise) for a, b in ((dg, dx), (dg1, dx1))]
    second = torch.where(long, rates[1], rows.ring[:, 1])
    return gain, torch.cat((torch.stack((rates[0], second), 1), rows.ring[:, 2:]), 1)


def anderson(
    rows: Rows,
    k: Tensor,
    rule: Rule,
    x: Tensor,
    gx: Tensor,
    beta: float,
    ridge: float,
    restart: float,
    values: Tensor,
    residuals: Tensor,
    every: int = 1,
) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """One Anderson (type II) step; see `reference.anderson_step` for what it does.

    Args:
        rows: as in `picard`.
        k: likewise.
        rule: likewise.
        x: likewise.
        gx: likewise.
        beta: likewise.
        ridge: relative to the trace of the differences' Gram matrix.
        restart: growth of the residual that restarts the window.
        values: g(x) of the window before, [R, m, N], newest first; `window` of them are there.
        residuals: g(x) − x likewise.
        every: how many iterations there are to a mixture.

    Returns:
        The record; the next iterates, as `picard`; which rows take g(x) into the window, bool [R];
        and the residuals that go there beside it, [R, N].
    """
    m, dtype = values.shape[1], x.dtype
    xa, ga = _wide(rows, x), _wide(rows, gx)
    r = ga - xa
    residual, value = _norm(r), _norm(ga)
    finite = residual.isfinite() & value.isfinite()
    running = rows.status == ACTIVE
    again = (rows.window > 1) | ((rows.window == 1) & (rows.retreats > 0))
    back = running & ~finite & (rows.retreats < MAX_RETREATS) & again
    running = running & ~back

    noise = _noise(value, dtype)
    seen = running & finite & (rows.window > 0)
    dg, dr = ga - _wide(rows, values[:, 0]), r - _wide(rows, residuals[:, 0])
    ring = _put(rows.ring, k, seen, (_norm(dg) / _norm(dg - dr)) ** 2)
    gain = torch.where(seen, _larger_gain(rows.gain, dg, dr, noise), rows.gain)
    status, new = _stop(rows, k, rule, residual, value, running)

    slow = running & (status == ACTIVE) & (k - new.since >= SLOW_ITERATIONS)
    slow = slow & (residual > WORSE * new.reference) & (rows.halvings < MAX_HALVINGS)
    halvings = rows.halvings + slow.to(rows.halvings.dtype)
    new = new._replace(since=torch.where(slow, k, new.since).to(new.since.dtype))
    own = (beta * 0.5 ** halvings.to(xa.dtype))[:, None]  # β

    restarts = (k > 1) & (residual > restart * rows.reference)
    restarts = restarts | (rows.retreats == MAX_RETREATS)
    mixes = restarts | (rows.plain + 1 >= every)
    mixes = mixes | ((k > 1) & ~(residual < GOES_ON * rows.residual))
    window = (torch.where(restarts, 0, rows.window) + 1).clamp(max=m)
    rounded = r.to(dtype)
    # Differences of what the window holds, this iterate first.
    d, dg = (
        -_wide(rows, torch.cat((new_one[:, None], old[:, :-1]), 1)).diff(dim=1)
        for new_one, old in ((rounded, residuals), (gx, values))
    )  # [R, m-1, N]
    valid = torch.arange(m - 1, device=x.device) < window[:, None] - 1
    d, dg = (torch.where(valid[..., None], t, 0) for t in (d, dg))
    # Scaled by a power of two, so that no square under- or overflows; the weights are the same.
    newest = _wide(rows, rounded)[:, None]
    scale = _scale(torch.cat((newest, d), 1).flatten(1))[:, :, None]
    scaled = d * scale
    # No library's product: its bits may depend on the rows beside.
    products = [(scaled * scaled[:, i : i + 1]).sum(2) for i in range(m - 1)]
    system = torch.stack(products, 1) if products else scaled.new_zeros(x.shape[0], 0, 0)
    trace = system.diagonal(dim1=1, dim2=2).sum(1)
    system = system + torch.diag_embed(torch.where(valid, ridge * trace[:, None], 1.0))
    gamma, sound = _solved(system, (scaled * (newest * scale)).sum(2))
    too_small = trace <= (noise * scale[:, 0, 0]) ** 2
    bad = mixes & (~sound | ((window > 1) & too_small))
    gamma = torch.where((bad | ~mixes)[:, None], 0, gamma)[..., None]  # [R, m-1, 1]
    mixed = ga - (gamma * dg).sum(1) - (1 - own) * (r - (gamma * d).sum(1))
    moved = _freeze(x, gx, mixed.to(dtype), status, running)
    pushed = running & (status == ACTIVE)
    length = torch.where(pushed, torch.where(bad, 1, window), rows.window)
    since_mixed = torch.where(mixes, 0, rows.plain + 1)
    new = new._replace(
        ring=ring,
        gain=gain,
        window=length,
        plain=torch.where(pushed, since_mixed, rows.plain),
        halvings=halvings,
    )

    # Back to the last good iterate, where the step is not wholly taken; the last iteration ends.
    good, its = _wide(rows, values[:, 0]), _wide(rows, residuals[:, 0])
    mixture = (rows.window > 1) & (rows.plain == 0)
    shorter = torch.where(mixture, 0, rows.retreats.clamp(min=1)) + rows.halvings
    part = (beta * 0.5 ** shorter.to(xa.dtype))[:, None]
    short = torch.where(part == 1, good, good - (1 - part) * its)  # its may have overflowed a half
    ends = k >= rule.most
    ended = torch.where(ends, code(Status.MAX_ITERATIONS), ACTIVE)
    retreated = rows._replace(
        status=ended.to(rows.status.dtype).expand_as(rows.status),
        iterations=k.to(rows.iterations.dtype).expand_as(rows.iterations),
        window=torch.ones_like(rows.window),
        retreats=rows.retreats + 1,
        plain=torch.zeros_like(rows.plain),
    )
    to = torch.where(ends.expand_as(back)[:, None], good, short).to(dtype)
    return retreated.where(back, new), torch.where(back[:, None], to, moved), pushed, rounded


def shifted(window: Tensor, pushed: Tensor, newest: Tensor) -> Tensor:
    """A window, [R, m, N], newest first, with newest, [R, N], in the rows pushed, bool [R]."""
    moved = torch.cat((newest[:, None], window[:, :-1]), 1)
    return torch.where(pushed[:, None, None], moved, window)


def code(status: Status) -> int:
    """A status as the record has it, where 0 is a sample that iterates."""
    return status + 1


def _stop(
    rows: Rows, k: Tensor, rule: Rule, residual: Tensor, value: Tensor, running: Tensor
) -> tuple[Tensor, Rows]:
    """The status of each row after iteration k, [R], and the record of the running ones with it."""
    fell = (residual <= FALL * rows.reference) | (k == 1)
    reference = torch.where(fell, residual, rows.reference)
    since = torch.where(fell, k, rows.since)
    stalled = (k - since >= rule.patience) & (residual <= rule.rounding * value)
    diverged = (k - since >= GROWTH_ITERATIONS) & (residual > GROWTH * reference)
    status = torch.where(running & (k >= rule.most), code(Status.MAX_ITERATIONS), ACTIVE)
    for those, what in (  # the last that holds
        (stalled, Status.STALLED),
        (diverged, Status.DIVERGED),
        (residual <= rule.threshold(value), Status.CONVERGED),
        (~(residual.isfinite() & value.isfinite()), Status.NONFINITE),
    ):
        status = torch.where(those, code(what), status)
    status = status.to(rows.status.dtype)
    new = rows._replace(
        status=status,
        iterations=k.to(rows.iterations.dtype).expand_as(rows.iterations),
        since=since,
        residual=residual,
        reference=reference,
        value=value,
    )
    return status, new.where(running, rows)


def _freeze(x: Tensor, gx: Tensor, moved: Tensor, status: Tensor, running: Tensor) -> Tensor:
    """Active rows moved, those that end at their result, all others where they are."""
    to = torch.where((status == ACTIVE)[:, None], moved, gx)
    stays = ~running | (status == code(Status.NONFINITE))
    return torch.where(stays[:, None], x, to)


def _damped(xa: Tensor, ga: Tensor, beta: float, gx: Tensor) -> Tensor:
    if beta == 1:
        return gx
    moved = (xa + beta * (ga - xa)).to(gx.dtype)
    return torch.where(moved.isfinite(), moved, gx)  # where it overflows, g(x)


def _put(ring: Tensor, k: Tensor, rows: Tensor, ratio: Tensor) -> Tensor:
    """The ring with the ratio of iteration k in these rows."""
    slot = torch.arange(RING, device=ring.device) == (k - 2) % RING
    return torch.where(rows[:, None] & slot, ratio[:, None], ring)


def _solved(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A⁻¹ b by Cholesky, [R, n], and whether that is sound, bool [R].

    Written out: torch's own has no kernel in programs that are compiled ahead of time.
    """
    n = b.shape[1]
    sound = torch.ones(b.shape[0], dtype=torch.bool, device=b.device)
    columns, y = [], []
    for j in range(n):
        pivot = a[:, j, j]
        sound = sound & (pivot > 0)
        column = a[:, :, j] / torch.where(pivot > 0, pivot, 1).sqrt()[:, None]
        y.append(b[:, j] / column[:, j])
        a = a - column[:, :, None] * column[:, None, :]
        b = b - column * y[j][:, None]
        columns.append(column)
    for j in reversed(range(n)):
        for i in range(j + 1, n):
            y[j] = y[j] - columns[j][:, i] * y[i]
        y[j] = y[j] / columns[j][:, j]
    solution = torch.stack(y, 1) if y else b  # a window of one has no differences
    return solution, sound & solution.isfinite().all(1)


def _larger_gain(gain: Tensor, dg: Tensor, dr: Tensor, noise: Tensor) -> Tensor:
    residual = _norm(dr)
    ratio = (_norm(dg) / residual) ** 2
    found = torch.where(residual > noise, ratio.clamp(min=LEAST_GAIN), 0)
    return torch.maximum(gain, found)


def _noise(value: Tensor, dtype: torch.dtype) -> Tensor:
    """[R]: differences of residuals below this say nothing of g."""
    return NOISE * torch.finfo(dtype).eps / 2 * value


def _wide(rows: Rows, t: Tensor) -> Tensor:
    return t.to(rows.residual.dtype)


def _norm(r: Tensor) -> Tensor:
    scale = _scale(r)  # so that no square under- or overflows; NaN and Inf stay what they are
    norm: Tensor = torch.linalg.vector_norm(r * scale, dim=1) / scale.squeeze(1)
    return norm


def _scale(r: Tensor) -> Tensor:
    """[R, 1]: the power of two by which each row's largest entry comes near 1."""
    largest = r.abs().amax(1, keepdim=True) if r.shape[1] else r.new_zeros(len(r), 1)
    most = 1022 if r.dtype == torch.float64 else 126
    usable = (largest > 0) & largest.isfinite()
    # Which of two powers near it does not matter, so a logarithm serves, which all runtimes have.
    exponent = torch.where(usable, largest, 1.0).log2().floor().clamp(-most, most)
    return torch.where(usable, 2.0**-exponent, 1.0)
