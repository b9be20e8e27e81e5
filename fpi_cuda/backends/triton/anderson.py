# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""Anderson's step as Triton kernels; see `rows`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import record as progress
from ...record import Progress
from .language import bound
from .rows import (
    COUNTERS,
    FROZEN,
    HALVINGS,
    HEAD,
    NONFINITE,
    aligned,
    check,
    check_like,
    count_row,
    damped,
    entry,
    kernel,
    launched,
    move_or_end,
    number,
    part_of_program,
    plan_of,
    row_of_program,
    sample_of,
    total_of,
)
from .weights import Window, anderson_stop, older, ring_of, slot_of, vector, window_of

__all__ = ["anderson_step"]

MAX_HISTORY = 32

_UNROLLED = tl.constexpr(8)  # the longest history whose loops are unrolled, so that loads overlap


@triton.jit
def _push(x, gx, ring, i, n, seen, count, ACC: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr):
    """Stores g(x) and its residual; x and gx point to a row.

    Returns the sums, as `anderson_stop` takes them. Those of iterates
    that are not there hold anything.
    """
    values, residuals, head = ring
    mask = i < n
    xs = tl.load(x + i, mask=mask, other=0)
    gs = tl.load(gx + i, mask=mask, other=0)
    there = mask & (seen > 0)
    before = tl.load(vector(values, head, 1 % M, n, M) + i, mask=there, other=0)
    younger = tl.load(vector(residuals, head, 1 % M, n, M) + i, mask=there, other=0).to(ACC)
    g = gs.to(ACC)
    r = g - xs.to(ACC)
    rs = r.to(gs.dtype)
    newest = rs.to(ACC)
    first = newest - younger
    dg = g - before.to(ACC)
    dr = r - younger
    dx = dg - dr
    # Now, and not behind the loop: the registers are needed.
    norms = (tl.sum(r * r), tl.sum(g * g), tl.sum(dg * dg), tl.sum(dx * dx), tl.sum(dr * dr))
    j = tl.arange(0, SIZE)
    dots = tl.where(j == 0, tl.sum(first * first), 0)
    rights = tl.where(j == 0, tl.sum(newest * first), 0)
    if M <= _UNROLLED:
        for age in tl.static_range(2, M):
            next_one = older(residuals, head, age, i, n, count, ACC, M)
            dots = tl.where(j == age - 1, tl.sum(first * (younger - next_one)), dots)
            rights = tl.where(j == age - 1, tl.sum(newest * (younger - next_one)), rights)
            younger = next_one
    else:
        for age in range(2, M):
            next_one = older(residuals, head, age, i, n, count, ACC, M)
            dots = tl.where(j == age - 1, tl.sum(first * (younger - next_one)), dots)
            rights = tl.where(j == age - 1, tl.sum(newest * (younger - next_one)), rights)
            younger = next_one
    if M == 1:
        tl.debug_barrier()  # the slot before is this one
    tl.store(vector(values, head, 0, n, M) + i, gs, mask=mask)
    tl.store(vector(residuals, head, 0, n, M) + i, rs, mask=mask)
    return norms[0], norms[1], norms[2], norms[3], norms[4], dots, rights


@triton.jit
def _combine(window, head, newest, before, i, n, gamma, used, M: tl.constexpr, SIZE: tl.constexpr):
    """v_0 − Σ γ_j (v_j − v_{j+1}) over used ≥ 1 differences, given v_0 and v_1."""
    younger = before
    mixed = newest - entry(gamma, 0, SIZE) * (newest - before)
    if M <= _UNROLLED:
        for age in tl.static_range(2, M):
            next_one = older(window, head, age, i, n, used, newest.dtype, M)
            mixed -= entry(gamma, age - 1, SIZE) * (younger - next_one)
            younger = next_one
    else:
        for age in range(2, M):
            next_one = older(window, head, age, i, n, used, newest.dtype, M)
            mixed -= entry(gamma, age - 1, SIZE) * (younger - next_one)
            younger = next_one
    return mixed


@triton.jit
def _halved(beta, times, ACC: tl.constexpr):
    part = number(beta, ACC)
    for _ in range(0, bound(times)):
        part *= 0.5
    return part


@triton.jit
def _mix(
    x, gs, before, ring, i, n, gamma, used, beta,
    ACC: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """x ← g_0 − Σ γ_j (g_j − g_{j+1}) − (1 − β)(r_0 − Σ γ_j d_j). gamma is 0 from `used` on."""
    values, residuals, head = ring
    mixed = _combine(values, head, gs.to(ACC), before.to(ACC), i, n, gamma, used, M, SIZE)
    if beta != 1:
        r = older(residuals, head, 0, i, n, used, ACC, M)
        r_before = older(residuals, head, 1 % M, i, n, used, ACC, M)
        least = _combine(residuals, head, r, r_before, i, n, gamma, used, M, SIZE)
        mixed -= (1 - beta) * least
    tl.store(x + i, mixed.to(gs.dtype), mask=i < n)


@triton.jit
def _move(
    x, gx, out, ring, i, n, weights, used, beta, status,
    ACC: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The mixture; without one a damped step, or the end of the row, from g(x), to which gx points.

    beta: the sample's own, in ACC.
    used < 0: gx points to the last good g', and its r' is in the ring's newest slot. There the step
    is x ← g' − (1 − part) r', with β halved −1 − used times for part.
    """
    mask = i < n
    gs = tl.load(gx + i, mask=mask, other=0)
    if used > 0:
        before = older(ring[0], ring[2], 1 % M, i, n, used, ACC, M)
        _mix(x, gs, before, ring, i, n, weights, used, beta, ACC, M, SIZE)
    else:
        xs = tl.load(x + i, mask=mask & ((status == NONFINITE) | (beta != 1)), other=0)
        moved = tl.where(beta == 1, gs, damped(xs, gs, beta, ACC, True))
        if used < 0:
            part = _halved(beta, -1 - used, ACC)
            r = older(ring[1], ring[2], 0, i, n, 0, ACC, M)
            rest = tl.where(part == 1, 0, (1 - part) * r)  # r' may have overflowed a half type
            moved = (gs.to(ACC) - rest).to(gs.dtype)
        move_or_end(x, out, i, mask, xs, gs, moved, status)


@kernel
def _anderson_row(
    x, gx, out, record, window, indexed, rows, n,
    rtol: tl.float64, offset: tl.float64, rounding: tl.float64, patience, max_iterations,
    beta: tl.float64, ridge: tl.float64, restart: tl.float64, every, NOISE: tl.constexpr,
    M: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = record.scalars.dtype.element_ty
    row, sample, active = row_of_program(record, indexed, rows)
    status = tl.full([], FROZEN, tl.int32)
    if active:
        x += row * n
        gx += row * n
        at = window_of(sample, record, M)
        ring = ring_of(window, sample, n, at[2], M)
        i = tl.arange(0, BLOCK)
        sums = _push(x, gx, ring, i, n, at[1], at[3], acc, M, SIZE)
        limits = (rtol, offset, rounding, patience, max_iterations)
        status, used, weights, halvings = anderson_stop(
            sums, x, gx, n, sample, at, record, window, limits, (ridge, restart, every),
            NOISE, M, SIZE, WIDTH,
        )  # fmt: skip
        # g(x) and all else is read again, from the cache: the registers are needed in between.
        head = at[2]
        if used < 0:
            head = slot_of(head, 1 % M, M)
            gx = vector(ring[0], head, 0, n, M)
        ring = ring_of(window, sample, n, head, M)
        own = _halved(beta, halvings, acc)
        _move(x, gx, out + sample * n, ring, i, n, weights, used, own, status, acc, M, SIZE)
    count_row(status, row, record, rows)


@kernel
def _anderson_parts(
    x, gx, record, window, sums, indexed, rows, n, parts,
    M: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = sums.dtype.element_ty
    row, part, sample, active = part_of_program(record, indexed, rows, parts)
    if active:
        x += row * n
        gx += row * n
        _k, seen, head, count = window_of(sample, record, M)
        ring = ring_of(window, sample, n, head, M)
        rr = tl.zeros([], acc)
        gg = tl.zeros([], acc)
        dgdg = tl.zeros([], acc)
        dxdx = tl.zeros([], acc)
        drdr = tl.zeros([], acc)
        dots = tl.zeros([SIZE], acc)
        rights = tl.zeros([SIZE], acc)
        for chunk in range(CHUNKS):
            i = (part * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
            of_chunk = _push(x, gx, ring, i, n, seen, count, acc, M, SIZE)
            rr += of_chunk[0]
            gg += of_chunk[1]
            dgdg += of_chunk[2]
            dxdx += of_chunk[3]
            drdr += of_chunk[4]
            dots += of_chunk[5]
            rights += of_chunk[6]
        sums += (row * parts + part) * (5 + 2 * SIZE)
        j = tl.arange(0, SIZE)
        tl.store(sums, rr)
        tl.store(sums + 1, gg)
        tl.store(sums + 2, dgdg)
        tl.store(sums + 3, dxdx)
        tl.store(sums + 4, drdr)
        tl.store(sums + 5 + j, dots)
        tl.store(sums + 5 + SIZE + j, rights)


@kernel
def _anderson_decide(
    x, gx, record, window, sums, moves, gamma, indexed, rows, n, parts,
    rtol: tl.float64, offset: tl.float64, rounding: tl.float64, patience, max_iterations,
    ridge: tl.float64, restart: tl.float64, every, NOISE: tl.constexpr,
    M: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, sample, active = row_of_program(record, indexed, rows)
    status = tl.full([], FROZEN, tl.int32)
    if active:
        at = window_of(sample, record, M)
        width: tl.constexpr = 5 + 2 * SIZE
        sums += row * parts * width
        norms = total_of(sums, parts, width, 8)  # and others behind them
        totals = (
            entry(norms, 0, 8),
            entry(norms, 1, 8),
            entry(norms, 2, 8),
            entry(norms, 3, 8),
            entry(norms, 4, 8),
            total_of(sums + 5, parts, width, SIZE),
            total_of(sums + 5 + SIZE, parts, width, SIZE),
        )
        limits = (rtol, offset, rounding, patience, max_iterations)
        status, used, weights, _halvings = anderson_stop(
            totals, x + row * n, gx + row * n, n, sample, at, record, window, limits,
            (ridge, restart, every), NOISE, M, SIZE, WIDTH,
        )  # fmt: skip
        tl.store(gamma + row * SIZE + tl.arange(0, SIZE), weights)
        tl.store(moves + row * 2 + 1, used)
    tl.store(moves + row * 2, status, mask=row < rows)
    count_row(status, row, record, rows)


@kernel
def _anderson_move(
    x, gx, out, record, window, moves, gamma, indexed, rows, n, parts, beta: tl.float64,
    M: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = record.scalars.dtype.element_ty
    place = tl.num_programs(0) - 1 - tl.program_id(0)  # as in _picard_move
    row, part = (place // parts).to(tl.int64), place % parts
    status = tl.load(moves + row * 2)
    if status != FROZEN:
        sample = sample_of(row, record, indexed, rows)
        x += row * n
        gx += row * n
        used = tl.load(moves + row * 2 + 1)
        counters = record.counters + sample * COUNTERS
        head = tl.load(counters + HEAD)
        own = _halved(beta, tl.load(counters + HALVINGS), acc)
        ring = ring_of(window, sample, n, head, M)
        weights = tl.load(gamma + row * SIZE + tl.arange(0, SIZE))
        if used < 0:
            gx = vector(ring[0], head, 0, n, M)
        out += sample * n
        for chunk in range(CHUNKS):
            i = (part * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
            _move(x, gx, out, ring, i, n, weights, used, own, status, acc, M, SIZE)


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
) -> None:
    """One Anderson (type II) step of every active row; see `reference.anderson_step`.

    Here 1 ≤ m ≤ MAX_HISTORY, every tensor is contiguous, and gram holds d_i · d_j by slot,
    [B, m, m] in the accumulate dtype, of which one row is refreshed, mixture or not.

    Raises:
        ValueError: shapes, dtypes or strides are not those.
    """
    check("anderson_step", x, gx, p)
    _check_window(p, values, residuals, gram)
    rows, n = x.shape
    m = values.shape[1]
    gx, beta, plan = aligned(gx), float(beta), plan_of(n, x.dtype)
    each_row, each_part = (max(rows, 1),), (rows * plan.parts,)
    system = {"M": m, "SIZE": triton.next_power_of_2(max(m - 1, 1))}
    sizes, deciding = {**system, **plan.options}, {**system, **plan.decision}
    noise = progress.NOISE * torch.finfo(x.dtype).eps / 2
    solving = (float(ridge), float(restart), every, noise)
    window = Window(values, residuals, gram)
    with torch.cuda.device_of(x):
        record, place, limits = launched(p, x)
        if plan.parts == 1:
            _anderson_row[each_row](
                x,
                gx,
                p.out,
                record,
                window,
                *place,
                *limits,
                beta,
                *solving,
                **sizes | plan.decision,
            )
            return
        cut = (*place, plan.parts)
        columns = 5 + 2 * sizes["SIZE"]
        sums = torch.empty(rows, plan.parts, columns, dtype=p.dtype, device=x.device)
        moves = torch.empty(rows, 2, dtype=torch.int32, device=x.device)
        gamma = torch.empty(rows, sizes["SIZE"], dtype=p.dtype, device=x.device)
        _anderson_parts[each_part](x, gx, record, window, sums, *cut, CHUNKS=plan.chunks, **sizes)
        left = (sums, moves, gamma)
        _anderson_decide[each_row](
            x, gx, record, window, *left, *cut, *limits, *solving, **deciding
        )
        _anderson_move[each_part](
            x, gx, p.out, record, window, moves, gamma, *cut, beta, CHUNKS=plan.chunks, **sizes
        )


def _check_window(p: Progress, values: Tensor, residuals: Tensor, gram: Tensor) -> None:
    op = "anderson_step"
    b, n = p.out.shape
    m = values.shape[1] if values.dim() == 3 else 0
    if not 1 <= m <= MAX_HISTORY:
        raise ValueError(
            f"{op}: values must be [B, m, N] with a history of 1 to {MAX_HISTORY} "
            f"(got shape {list(values.shape)}); lower Anderson's history"
        )
    for name, t in (("values", values), ("residuals", residuals)):
        check_like(op, name, t, p.out, (b, m, n), p.out.dtype)
    check_like(op, "gram", gram, p.out, (b, m, m), p.dtype)
