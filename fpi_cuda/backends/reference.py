"""The oracle: every step operator in plain torch, on any device and any float dtype.

Nothing here is tuned: rows of the record and of the windows are gathered, moved by the formulas,
and scattered back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..record import ACTIVE, ACTIVE_ROWS, FAILED, HEAD, ITERATION, Progress
from ..status import Status
from . import formulas, krylov
from .formulas import Rows, Rule, code

NAME = "reference"


def picard_step(
    p: Progress, x: Tensor, gx: Tensor, beta: float, trail: Tensor | None = None
) -> None:
    """One damped Picard step of every active row; freezes those that finish.

    Args:
        p: the per-sample record; updated.
        x: iterates, [R, N], contiguous; active rows become x + β (g(x) − x), finished rows their
            result, rows that had finished before stay untouched.
        gx: g(x), [R, N], contiguous; only read.
        beta: weight of the new value.
        trail: the iterates before x, [B, TRAIL, N], as far as they were kept, a ring by sample with
            its newest at HEAD: x joins them where the end is near. None: the gain is not measured.
    """
    k, s = _next(p), p.samples
    before, head = _rows(p)
    rows, moved, keeps = formulas.picard(before, k, _rule(p), x, gx, beta)
    head = torch.where(keeps, 1 - head, head)
    if trail is not None:
        trail[s[keeps], head[keeps]] = x[keeps]
        last = (before.status == ACTIVE) & formulas.measurable(rows)
        t, newest = s[last], head[last]
        ends = Rows(*(column[last] for column in rows))
        states = trail[t, newest], trail[t, 1 - newest]
        gain, ring = formulas.measured(ends, gx[last], x[last], states, beta)
        rows.gain[last], rows.ring[last] = gain, ring
    _write(p, before, rows, head, x, moved)


def anderson_step(
    p: Progress,
    x: Tensor,
    gx: Tensor,
    beta: float,
    ridge: float,
    restart: float,
    values: Tensor,
    residuals: Tensor,
    gram: Tensor,
    every: int = 1,
    starts_plain: bool = False,
) -> None:
    """One Anderson (type II) step of every active row; freezes those that finish.

    With d_i = r_i − r_{i−1} over the window, minimises ‖r_k − Σ γ_i d_i‖² + λ tr(DᵀD)‖γ‖² and sets
    x ← g_k − Σ γ_i (g_i − g_{i−1}) − (1 − β)(r_k − Σ γ_i d_i), `every` iterations after the last
    mixture, and at once where the residual is not below GOES_ON times the last; before that it sets
    x ← x + β r. A sample whose factorisation fails, or whose residual exceeds `restart` times its
    reference, takes a Picard step and restarts its window, alone. One whose g or residual is not
    finite at a mixture goes back to the last iterate where they were, x', and takes x' + β r'
    instead; if g fails there too, half of the step, and so on, MAX_RETREATS times in a solve. After
    that it takes Picard steps alone. Where the residual has grown for long, β is halved (WORSE).

    Args:
        p: the per-sample record; updated, as in `picard_step`.
        x: iterates, [R, N]; moved.
        gx: g(x), [R, N].
        beta: weight of the new value.
        ridge: λ, relative to the trace of the differences' Gram matrix.
        restart: growth of the residual that restarts the window.
        values: g(x) of the window, [B, m, N], a ring by sample with its newest at HEAD.
        residuals: g(x) − x likewise.
        gram: unused here (the oracle forms it anew); the native kernels keep it.
        every: how many iterations there are to a mixture.
        starts_plain: whether there is none before plain steps have shown themselves to be slow.
    """
    del gram
    m, k, s = values.shape[1], _next(p), p.samples
    before, head = _rows(p)
    slots = (head[:, None] - torch.arange(m, device=x.device)) % m  # newest first
    window = values[s[:, None], slots], residuals[s[:, None], slots]
    given = before, k, _rule(p), x, gx, beta, ridge, restart, *window, every, starts_plain
    rows, moved, pushed, r = formulas.anderson(*given)
    head = torch.where(pushed, (head + 1) % m, head)
    values[s[pushed], head[pushed]] = gx[pushed]
    residuals[s[pushed], head[pushed]] = r[pushed]
    _write(p, before, rows, head, x, moved)


def bicgstab_step(
    p: Progress, x: Tensor, gx: Tensor, base: Tensor, vectors: Tensor, numbers: Tensor
) -> None:
    """What BiCGSTAB (van der Vorst 1992) makes of one product, for every active row.

    Of u = M u + v, where A = 1 − M: an iterate is judged by the stop rule, and where it does not
    end its residual r = g(x) − x is r̂ and p. Then in turns, with the product M y of a direction y,
    y = p:  α = ⟨r̂, r⟩ / ⟨r̂, A p⟩, s = r − α A p; y = s:  ω = ⟨s, A s⟩ / ‖A s‖², u ← u + α p + ω s,
    r ← s − ω A s, p ← r + β (p − ω A p), with ω lengthened where s and A s are nearly orthogonal
    (Sleijpen and van der Vorst 1995). Once ‖r‖ meets the threshold, by the recursion, or a divisor
    is at the rounding level, u is judged. Where u is no better than the last judged iterate x′, a
    plain step from there is, g(x′). The last of `max_iterations` products is always of an iterate.

    No wait for a device. Row by row, so the record's `window` says what x is: 0 an iterate, 1 p,
    2 s; its iterations count products.

    Args:
        p: the per-sample record; updated, as in `picard_step`.
        x: iterates or directions, [R, N]; moved.
        gx: g(x), [R, N].
        base: [B, 2, N] in x's dtype: x′ and g(x′).
        vectors: [B, 4, N] in the accumulate dtype.
        numbers: [B, 6] in the accumulate dtype; what all three hold, `krylov` says.
    """
    k, s = _next(p), p.samples
    before, head = _rows(p)
    given = before, k, _rule(p), x, gx, base[s], vectors[s], numbers[s]
    rows, moved, *memory = krylov.bicgstab(*given)
    for kept, new in zip((base, vectors, numbers), memory, strict=True):
        kept[s] = new
    _write(p, before, rows, head, x, moved)


def _next(p: Progress) -> Tensor:
    p.tally[ITERATION] += 1
    return p.tally[ITERATION].clone()


def _rows(p: Progress) -> tuple[Rows, Tensor]:
    """The record of the rows held, and their HEAD."""
    counters = p.counters[p.samples]
    return Rows.of(counters, p.scalars[p.samples]), counters[:, HEAD].long()


def _rule(p: Progress) -> Rule:
    """When the rows held stop."""
    rtol, offset, rounding, patience, most = p.limits.values
    if p.bounds is None:
        return Rule(rtol, offset, rounding, patience, most)
    bounds = p.bounds[p.samples]
    if bounds.dim() == 1:
        return Rule(rtol, offset, rounding, patience, most, bounds)
    floor, own_rtol, own_offset, own_patience, own_most, own_rounding = bounds.unbind(1)
    return Rule(own_rtol, own_offset, own_rounding, own_patience, own_most, floor)


def _write(p: Progress, before: Rows, rows: Rows, head: Tensor, x: Tensor, moved: Tensor) -> None:
    """The record of the rows held, x, and in `out` the results of those that end."""
    s, ended = p.samples, (before.status == ACTIVE) & (rows.status != ACTIVE)
    p.counters[s], p.scalars[s] = rows.packed(head)
    p.tally[ACTIVE_ROWS] = (rows.status == ACTIVE).sum()
    p.tally[FAILED] += (ended & (rows.status != code(Status.CONVERGED))).sum()
    p.out[s] = torch.where(ended[:, None], moved, p.out[s])
    x.copy_(moved)
