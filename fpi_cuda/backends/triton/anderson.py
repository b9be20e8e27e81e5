# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""Anderson's step as Triton kernels; see `rows`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import record as progress
from ...record import Progress
from .language import bound
from .rows import (
    ACTIVE,
    COUNTERS,
    FROZEN,
    HEAD,
    ITERATIONS,
    REFERENCE,
    RING,
    RING_START,
    SCALARS,
    WINDOW,
    aligned,
    check,
    check_like,
    count_row,
    damp_or_end,
    entry,
    is_finite,
    kernel,
    launched,
    move_chunk,
    norms_of,
    number,
    part_of_program,
    plan_of,
    row_of_program,
    sample_of,
    stop,
    total_of,
)

__all__ = ["anderson_step"]

MAX_HISTORY = 32

_UNROLLED = tl.constexpr(8)  # the longest history whose loops are unrolled, so that loads overlap


class Window(NamedTuple):
    """Of each sample; see `anderson_step`."""

    evaluated: Tensor  # its values; `values` is a name of Triton's tuples
    residuals: Tensor
    gram: Tensor


@triton.jit
def _window_of(sample, record, M: tl.constexpr):
    """The iteration's number, iterates before this one, this one's slot, differences with it."""
    counters = record.counters + sample * COUNTERS
    seen = tl.load(counters + WINDOW)
    head = (tl.load(counters + HEAD) + 1) % M
    return tl.load(counters + ITERATIONS) + 1, seen, head, tl.minimum(seen, M - 1)


@triton.jit
def _slot(head, age, M: tl.constexpr):
    slot = head - age
    return tl.where(slot < 0, slot + M, slot)


@triton.jit
def _vector(window, head, age, n, M: tl.constexpr):
    """Where the iterate of that age begins."""
    return window + _slot(head, age, M).to(tl.int64) * n


@triton.jit
def _push(x, gx, ring, i, n, seen, count, ACC: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr):
    """Stores g(x) and its residual; x and gx point to a row.

    Returns x, g(x), the value before and the sums ‖r‖², ‖g‖², ‖g − g₁‖², ‖x − x₁‖² (1: the iterate
    before), d_0 · d_j and r_0 · d_j, [SIZE]. Those of iterates that are not there hold anything.
    """
    values, residuals, head = ring
    mask = i < n
    xs = tl.load(x + i, mask=mask, other=0)
    gs = tl.load(gx + i, mask=mask, other=0)
    there = mask & (seen > 0)
    before = tl.load(_vector(values, head, 1 % M, n, M) + i, mask=there, other=0)
    younger = tl.load(_vector(residuals, head, 1 % M, n, M) + i, mask=there, other=0).to(ACC)
    g = gs.to(ACC)
    r = g - xs.to(ACC)
    rs = r.to(gs.dtype)
    newest = rs.to(ACC)
    first = newest - younger
    dg = g - before.to(ACC)
    dx = dg - (r - younger)
    j = tl.arange(0, SIZE)
    dots = tl.where(j == 0, tl.sum(first * first), 0)
    rights = tl.where(j == 0, tl.sum(newest * first), 0)
    if M <= _UNROLLED:
        for age in tl.static_range(2, M):
            older = _older(residuals, head, age, i, n, count, ACC, M)
            dots = tl.where(j == age - 1, tl.sum(first * (younger - older)), dots)
            rights = tl.where(j == age - 1, tl.sum(newest * (younger - older)), rights)
            younger = older
    else:
        for age in range(2, M):
            older = _older(residuals, head, age, i, n, count, ACC, M)
            dots = tl.where(j == age - 1, tl.sum(first * (younger - older)), dots)
            rights = tl.where(j == age - 1, tl.sum(newest * (younger - older)), rights)
            younger = older
    if M == 1:
        tl.debug_barrier()  # the slot before is this one
    tl.store(_vector(values, head, 0, n, M) + i, gs, mask=mask)
    tl.store(_vector(residuals, head, 0, n, M) + i, rs, mask=mask)
    sums = (tl.sum(r * r), tl.sum(g * g), tl.sum(dg * dg), tl.sum(dx * dx), dots, rights)
    return xs, gs, before, sums


@triton.jit
def _older(window, head, age, i, n, count, ACC: tl.constexpr, M: tl.constexpr):
    """Of the iterate of that age, 0 where the window does not reach it."""
    at = _vector(window, head, age, n, M) + i
    return tl.load(at, mask=(i < n) & (age <= count), other=0).to(ACC)


@triton.jit
def _combine(window, head, newest, before, i, n, gamma, used, M: tl.constexpr, SIZE: tl.constexpr):
    """v_0 − Σ γ_j (v_j − v_{j+1}) over used ≥ 1 differences, given v_0 and v_1."""
    younger = before
    mixed = newest - entry(gamma, 0, SIZE) * (newest - before)
    if M <= _UNROLLED:
        for age in tl.static_range(2, M):
            older = _older(window, head, age, i, n, used, newest.dtype, M)
            mixed -= entry(gamma, age - 1, SIZE) * (younger - older)
            younger = older
    else:
        for age in range(2, M):
            older = _older(window, head, age, i, n, used, newest.dtype, M)
            mixed -= entry(gamma, age - 1, SIZE) * (younger - older)
            younger = older
    return mixed


@triton.jit
def _mix(
    x, gs, before, ring, i, n, gamma, used, beta,
    ACC: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr, DAMPED: tl.constexpr,
):  # fmt: skip
    """x ← g_0 − Σ γ_j (g_j − g_{j+1}) − (1 − β)(r_0 − Σ γ_j d_j). gamma is 0 from `used` on."""
    values, residuals, head = ring
    mixed = _combine(values, head, gs.to(ACC), before.to(ACC), i, n, gamma, used, M, SIZE)
    if DAMPED:
        r = _older(residuals, head, 0, i, n, used, ACC, M)
        r_before = _older(residuals, head, 1 % M, i, n, used, ACC, M)
        least = _combine(residuals, head, r, r_before, i, n, gamma, used, M, SIZE)
        mixed -= (1 - number(beta, ACC)) * least
    tl.store(x + i, mixed.to(gs.dtype), mask=i < n)


@triton.jit
def _solve(gram, head, used, dots, rights, ridge, noise, M: tl.constexpr, SIZE: tl.constexpr):
    """γ of (K + ridge·tr K·I) γ = Dᵀr_0, K = DᵀD, [SIZE], and whether it could be solved.

    By L D Lᵀ: tr K must be above `noise`, every pivot positive, γ finite. dots is the first row of
    K, rights is Dᵀr_0; the other rows are in the sample's gram, by slot.
    """
    at = tl.arange(0, SIZE)
    i, j = at[:, None], at[None, :]
    inside = (i < used) & (j < used)
    places = _slot(head, i, M) * M + _slot(head, j, M)
    a = tl.load(gram + places, mask=inside & (i > 0) & (j > 0), other=0)
    a = tl.where(inside & (i == 0), dots[None, :], a)
    a = tl.where(inside & (j == 0), dots[:, None], a)
    b = tl.where(at < used, rights, 0)
    trace = tl.sum(tl.sum(tl.where(i == j, a, 0), axis=1))
    a += tl.where(i == j, tl.where(inside, ridge * trace, 1), 0)
    solved = (used > 0) & (trace > noise)
    for k in range(0, bound(used)):
        pivot = tl.sum(tl.sum(tl.where((i == k) & (j == k), a, 0), axis=1))
        solved = solved & (pivot > 0) & is_finite(pivot)
        row = tl.sum(tl.where((i == k) & (j > k), a, 0), axis=0)
        factors = tl.sum(tl.where((j == k) & (i > k), a, 0), axis=1) / pivot
        a -= factors[:, None] * row[None, :]
        a = tl.where((j == k) & (i > k), factors[:, None], a)  # L, below the diagonal
        b -= factors * entry(b, k, SIZE)
    b /= tl.sum(tl.where(i == j, a, 0), axis=1)
    for back in range(0, bound(used)):
        k = used - 1 - back
        b -= tl.sum(tl.where((i == k) & (j < k), a, 0), axis=0) * entry(b, k, SIZE)
    solved = solved & (tl.sum(tl.where(is_finite(b), 0, 1)) == 0)
    return tl.where(at < used, b, 0), solved


@triton.jit
def _ring_of(window, sample, n, head, M: tl.constexpr):
    """Values and residuals of the sample's window, and the slot of the newest."""
    return window.evaluated + sample * M * n, window.residuals + sample * M * n, head


@triton.jit
def _anderson_stop(
    sums, x, gx, n, sample, at, record, window, limits, solving,
    NOISE: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The record after this step, and the new row of the Gram matrix.

    sums: as `_push` has them; at: as `_window_of`; solving: ridge, restart. Returns the status, how
    many differences the mixture takes (0: a damped step), and their γ.
    """
    k, seen, head, count = at
    counters = record.counters + sample * COUNTERS
    scalars = record.scalars + sample * SCALARS
    acc: tl.constexpr = record.scalars.dtype.element_ty
    dots, rights = sums[4], sums[5]
    reference = tl.load(scalars + REFERENCE)
    residual, value = norms_of(sums[0], sums[1], x, gx, n, BLOCK)
    status = stop(residual, value, k, reference, sample, record, limits)
    ring = scalars + RING_START
    tl.store(ring + (k + RING - 2) % RING, tl.sqrt(sums[2]) / tl.sqrt(sums[3]), mask=seen > 0)

    grown = (k > 1) & (residual > number(solving[1], acc) * reference)
    used = tl.where(grown, 0, count)
    gram = window.gram + sample * (M * M)
    noise = NOISE * value
    ridge = number(solving[0], acc)
    gamma, solved = _solve(gram, head, used, dots, rights, ridge, noise * noise, M, SIZE)
    if status == ACTIVE:
        j = tl.arange(0, SIZE)
        slot = _slot(head, j, M)  # kept by slot, so that nothing else moves
        tl.store(gram + head * M + slot, dots, mask=j < used)
        tl.store(gram + slot * M + head, dots, mask=j < used)
        tl.store(counters + HEAD, head)
        # Where it can't be solved: a damped step, and the window starts anew from this iterate.
        tl.store(counters + WINDOW, tl.where(solved, used + 1, 1))
    return status, tl.where(solved & (status == ACTIVE), used, 0), gamma


@kernel
def _anderson_row(
    x, gx, out, record, window, indexed, rows, n,
    rtol: tl.float64, offset: tl.float64, rounding: tl.float64, patience, max_iterations,
    beta: tl.float64, ridge: tl.float64, restart: tl.float64, NOISE: tl.constexpr,
    M: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, DAMPED: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = record.scalars.dtype.element_ty
    row, sample, active = row_of_program(record, indexed, rows)
    status = tl.full([], FROZEN, tl.int32)
    if active:
        x += row * n
        gx += row * n
        at = _window_of(sample, record, M)
        ring = _ring_of(window, sample, n, at[2], M)
        i = tl.arange(0, BLOCK)
        xs, gs, before, sums = _push(x, gx, ring, i, n, at[1], at[3], acc, M, SIZE)
        limits = (rtol, offset, rounding, patience, max_iterations)
        status, used, weights = _anderson_stop(
            sums, x, gx, n, sample, at, record, window, limits, (ridge, restart),
            NOISE, M, SIZE, BLOCK,
        )  # fmt: skip
        if used > 0:
            _mix(x, gs, before, ring, i, n, weights, used, beta, acc, M, SIZE, DAMPED)
        else:
            damp_or_end(x, out + sample * n, i, i < n, xs, gs, beta, status, acc, DAMPED)
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
        _k, seen, head, count = _window_of(sample, record, M)
        ring = _ring_of(window, sample, n, head, M)
        rr = tl.zeros([], acc)
        gg = tl.zeros([], acc)
        dgdg = tl.zeros([], acc)
        dxdx = tl.zeros([], acc)
        dots = tl.zeros([SIZE], acc)
        rights = tl.zeros([SIZE], acc)
        for chunk in range(CHUNKS):
            i = (part * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
            _xs, _gs, _before, of_chunk = _push(x, gx, ring, i, n, seen, count, acc, M, SIZE)
            rr += of_chunk[0]
            gg += of_chunk[1]
            dgdg += of_chunk[2]
            dxdx += of_chunk[3]
            dots += of_chunk[4]
            rights += of_chunk[5]
        sums += (row * parts + part) * (4 + 2 * SIZE)
        j = tl.arange(0, SIZE)
        tl.store(sums, rr)
        tl.store(sums + 1, gg)
        tl.store(sums + 2, dgdg)
        tl.store(sums + 3, dxdx)
        tl.store(sums + 4 + j, dots)
        tl.store(sums + 4 + SIZE + j, rights)


@kernel
def _anderson_decide(
    x, gx, record, window, sums, moves, gamma, indexed, rows, n, parts,
    rtol: tl.float64, offset: tl.float64, rounding: tl.float64, patience, max_iterations,
    ridge: tl.float64, restart: tl.float64, NOISE: tl.constexpr,
    M: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, sample, active = row_of_program(record, indexed, rows)
    status = tl.full([], FROZEN, tl.int32)
    if active:
        at = _window_of(sample, record, M)
        width: tl.constexpr = 4 + 2 * SIZE
        sums += row * parts * width
        norms = total_of(sums, parts, width, 4)
        totals = (
            entry(norms, 0, 4),
            entry(norms, 1, 4),
            entry(norms, 2, 4),
            entry(norms, 3, 4),
            total_of(sums + 4, parts, width, SIZE),
            total_of(sums + 4 + SIZE, parts, width, SIZE),
        )
        limits = (rtol, offset, rounding, patience, max_iterations)
        status, used, weights = _anderson_stop(
            totals, x + row * n, gx + row * n, n, sample, at, record, window, limits,
            (ridge, restart), NOISE, M, SIZE, BLOCK,
        )  # fmt: skip
        tl.store(gamma + row * SIZE + tl.arange(0, SIZE), weights)
        tl.store(moves + row * 2 + 1, used)
    tl.store(moves + row * 2, status, mask=row < rows)
    count_row(status, row, record, rows)


@kernel
def _anderson_move(
    x, gx, out, record, window, moves, gamma, indexed, rows, n, parts, beta: tl.float64,
    M: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    DAMPED: tl.constexpr,
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
        head = tl.load(record.counters + sample * COUNTERS + HEAD)
        ring = _ring_of(window, sample, n, head, M)
        weights = tl.load(gamma + row * SIZE + tl.arange(0, SIZE))
        for chunk in range(CHUNKS):
            i = (part * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
            if used > 0:
                gs = tl.load(gx + i, mask=i < n, other=0)
                before = _older(ring[0], head, 1 % M, i, n, used, acc, M)
                _mix(x, gs, before, ring, i, n, weights, used, beta, acc, M, SIZE, DAMPED)
            else:
                move_chunk(x, gx, out + sample * n, i, n, beta, status, acc, DAMPED)


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
) -> None:
    """One Anderson (type II) step of every active row; see `reference.anderson_step`.

    Here 1 ≤ m ≤ MAX_HISTORY, every tensor is contiguous, and gram holds d_i · d_j by slot,
    [B, m, m] in the accumulate dtype, of which one row is refreshed.

    Raises:
        ValueError: shapes, dtypes or strides are not those.
    """
    check("anderson_step", x, gx, p)
    _check_window(p, values, residuals, gram)
    rows, n = x.shape
    m = values.shape[1]
    gx, beta, plan = aligned(gx), float(beta), plan_of(n, x.dtype)
    each_row, each_part = (max(rows, 1),), (rows * plan.parts,)
    sizes = {"M": m, "SIZE": triton.next_power_of_2(max(m - 1, 1)), **plan.options}
    solving = (float(ridge), float(restart), progress.NOISE * torch.finfo(x.dtype).eps / 2)
    damping = {"DAMPED": beta != 1, **sizes}
    window = Window(values, residuals, gram)
    with torch.cuda.device_of(x):
        record, place, limits = launched(p, x)
        if plan.parts == 1:
            _anderson_row[each_row](
                x, gx, p.out, record, window, *place, *limits, beta, *solving, **damping
            )
            return
        cut = (*place, plan.parts)
        columns = 4 + 2 * sizes["SIZE"]
        sums = torch.empty(rows, plan.parts, columns, dtype=p.dtype, device=x.device)
        moves = torch.empty(rows, 2, dtype=torch.int32, device=x.device)
        gamma = torch.empty(rows, sizes["SIZE"], dtype=p.dtype, device=x.device)
        _anderson_parts[each_part](x, gx, record, window, sums, *cut, CHUNKS=plan.chunks, **sizes)
        left = (sums, moves, gamma)
        _anderson_decide[each_row](x, gx, record, window, *left, *cut, *limits, *solving, **sizes)
        _anderson_move[each_part](
            x, gx, p.out, record, window, moves, gamma, *cut, beta, CHUNKS=plan.chunks, **damping
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
