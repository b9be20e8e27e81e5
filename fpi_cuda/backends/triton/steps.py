# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""One step of the solvers as Triton kernels: the formulas of csrc/math, row by row.

The length of a row and its dtype, never the batch, choose how it is laid over programs, and with
that the order of every sum: a sample's bits are the same in any batch.

    row                                  programs a row   launches   Picard   Anderson
    to 2048 values (float64: 1024)       1                1          3        2m+3
    longer                               2 to 1024        3          4        2m+5

The last columns count the vectors of N values that a row moves at β = 1, window full. A damped
Picard step of a long row reads x once more, a damped mixture the m residuals. Where the kernel that
computed g(x) left the sums behind the norms, a Picard step reads g(x) and writes x only: 2 vectors,
damped 3. In three launches each part leaves its sums, one program a row adds them up in their
order, decides and solves for the weights, and the parts move. A row that ends writes `out` too; one
that has ended costs the start of its programs.

Nothing here waits for the device or depends on what a step finds, so a step can be captured in a
graph, and nothing is compiled anew for another number of rows or samples. Each step sets 16 bytes
to zero: the count by which the last of the programs that decide is known. It updates the tally.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import record as progress
from ...record import Progress, Status
from . import MAX_HISTORY
from .language import bound

__all__ = ["Plan", "anderson_step", "damped_update", "picard_step", "plan_of"]

_COUNTERS = tl.constexpr(5)  # columns of the record; the names of `progress`
_SCALARS = tl.constexpr(2 + progress.RING)
_STATUS = tl.constexpr(progress.STATUS)
_ITERATIONS = tl.constexpr(progress.ITERATIONS)
_REFERENCE_ITERATION = tl.constexpr(progress.REFERENCE_ITERATION)
_WINDOW = tl.constexpr(progress.WINDOW)
_HEAD = tl.constexpr(progress.HEAD)
_RESIDUAL = tl.constexpr(progress.RESIDUAL)
_REFERENCE = tl.constexpr(progress.REFERENCE)
_RING_START = tl.constexpr(progress.RING_START)
_RING = tl.constexpr(progress.RING)
_ACTIVE_ROWS = tl.constexpr(progress.ACTIVE_ROWS)
_FAILED = tl.constexpr(progress.FAILED)
_ITERATION = tl.constexpr(progress.ITERATION)
_GROWTH = tl.constexpr(progress.GROWTH)
_GROWTH_ITERATIONS = tl.constexpr(progress.GROWTH_ITERATIONS)
_FALL = tl.constexpr(progress.FALL)
_ACTIVE = tl.constexpr(progress.ACTIVE)
_CONVERGED = tl.constexpr(1 + Status.CONVERGED)
_MAX_ITERATIONS = tl.constexpr(1 + Status.MAX_ITERATIONS)
_STALLED = tl.constexpr(1 + Status.STALLED)
_DIVERGED = tl.constexpr(1 + Status.DIVERGED)
_NONFINITE = tl.constexpr(1 + Status.NONFINITE)
_FROZEN = tl.constexpr(-1)  # ended in an earlier step, and is left alone

# What changes from call to call: no value of it is compiled in. The small tensors are read a number
# at a time, so nothing is gained from where they begin.
_CHANGING = ["rows", "indexed", "parts", "patience", "max_iterations"]
_SMALL = ["counters", "scalars", "floor", "index", "tally", "counts", "sums", "moves", "gamma"]
_kernel = triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_SMALL)

_UNROLLED = tl.constexpr(8)  # the longest history whose loops are unrolled, so that loads overlap


class Plan(NamedTuple):
    """How a row lies over programs."""

    block: int  # values that a program takes at a time,
    chunks: int  # so many times
    parts: int  # programs
    warps: int  # of a program

    @property
    def options(self) -> dict[str, int]:
        """What every launch is given of it."""
        return {"BLOCK": self.block, "num_warps": self.warps}


def plan_of(n: int, dtype: torch.dtype) -> Plan:
    """The plan of rows of n values."""
    warp = 32 * (8 if dtype == torch.float64 else 16)  # values that it holds of each vector
    if n <= 4 * warp:
        block = max(triton.next_power_of_2(n), 32)
        return Plan(block, 1, 1, max(block // warp, 1))
    block, most_parts = 4 * warp, 1024
    chunks = triton.cdiv(n, block * most_parts)
    return Plan(block, chunks, triton.cdiv(n, block * chunks), 4)


# --- the record ---------------------------------------------------------------------------------


@triton.jit
def _number(a, ACC: tl.constexpr):
    """An argument, which came as float64."""
    return tl.full([], a, ACC)


@triton.jit
def _is_finite(a):
    return a - a == 0


@triton.jit
def _sample_of(row, rows, index, indexed):
    return tl.load(index + row, mask=(row < rows) & (indexed != 0), other=row)


@triton.jit
def _is_active(row, rows, sample, counters):
    status = tl.load(counters + sample * _COUNTERS + _STATUS, mask=row < rows, other=_FROZEN)
    return status == _ACTIVE


@triton.jit
def _is_trusted(squares):
    if squares.dtype == tl.float64:
        trusted = (squares > 1e-290) & (squares < 1e290)
    else:
        trusted = (squares > 1e-30) & (squares < 1e30)
    return trusted


@triton.jit
def _norms(r_squares, g_squares, x, gx, n, BLOCK: tl.constexpr):
    """‖g(x) − x‖ and ‖g(x)‖ of a row, to which x and gx point, from their squares.

    Where one of these may have under- or overflowed, both are measured again, scaled.
    """
    acc: tl.constexpr = r_squares.dtype
    # Rare, so few registers rather than speed; float64 spills with fewer at a time.
    WIDTH: tl.constexpr = 512 if acc == tl.float32 and BLOCK > 512 else BLOCK
    r_norm = tl.sqrt(r_squares)
    g_norm = tl.sqrt(g_squares)
    if (_is_trusted(r_squares) & _is_trusted(g_squares)) == 0:
        r_largest = tl.zeros([WIDTH], acc)
        g_largest = tl.zeros([WIDTH], acc)
        for start in range(0, bound(n), WIDTH):
            r, g = _residual_and_value(x, gx, start + tl.arange(0, WIDTH), n, acc)
            r_largest = tl.where(tl.abs(r) > r_largest, tl.abs(r), r_largest)
            g_largest = tl.where(tl.abs(g) > g_largest, tl.abs(g), g_largest)
        r_scale = _scale(tl.max(r_largest))
        g_scale = _scale(tl.max(g_largest))
        r_scaled = tl.zeros([WIDTH], acc)
        g_scaled = tl.zeros([WIDTH], acc)
        for start in range(0, bound(n), WIDTH):
            r, g = _residual_and_value(x, gx, start + tl.arange(0, WIDTH), n, acc)
            r_scaled += (r / r_scale) * (r / r_scale)
            g_scaled += (g / g_scale) * (g / g_scale)
        r_norm = r_scale * tl.sqrt(tl.sum(r_scaled))
        g_norm = g_scale * tl.sqrt(tl.sum(g_scaled))
    return r_norm, g_norm


@triton.jit
def _scale(largest):
    return tl.where((largest > 0) & _is_finite(largest), largest, 1.0)


@triton.jit
def _residual_and_value(x, gx, i, n, ACC: tl.constexpr):
    g = tl.load(gx + i, mask=i < n, other=0).to(ACC)
    return g - tl.load(x + i, mask=i < n, other=0).to(ACC), g


@triton.jit
def _stop(residual, value, k, reference, sample, record, limits):
    """The sample's status after iteration k, and its counters and reference brought up to date.

    record: counters, scalars, floor; limits: as `_launched` has them.
    """
    counters, scalars, floor = record
    acc: tl.constexpr = scalars.dtype.element_ty
    rtol, offset, rounding = (
        _number(limits[0], acc),
        _number(limits[1], acc),
        _number(limits[2], acc),
    )
    patience, max_iterations = limits[3], limits[4]
    counters += sample * _COUNTERS
    scalars += sample * _SCALARS
    since = tl.load(counters + _REFERENCE_ITERATION)
    fell = (k == 1) | (residual <= reference * _FALL)
    reference = tl.where(fell, residual, reference)
    since = tl.where(fell, k, since)
    least = value
    if floor is not None:
        given = tl.load(floor + sample)
        least = tl.where(value > given, value, given)

    status = tl.where(k >= max_iterations, _MAX_ITERATIONS, _ACTIVE)
    stalled = (k - since >= patience) & (residual <= rounding * value)
    status = tl.where(stalled, _STALLED, status)
    diverged = (k - since >= _GROWTH_ITERATIONS) & (residual > reference * _GROWTH)
    status = tl.where(diverged, _DIVERGED, status)
    status = tl.where(residual <= offset + rtol * least, _CONVERGED, status)
    status = tl.where(_is_finite(residual) & _is_finite(value), status, _NONFINITE)

    tl.debug_barrier()  # every warp has read the record
    tl.store(counters + _STATUS, status)
    tl.store(counters + _ITERATIONS, k)
    tl.store(counters + _REFERENCE_ITERATION, since)
    tl.store(scalars + _RESIDUAL, residual)
    tl.store(scalars + _REFERENCE, reference)
    return status


@triton.jit
def _count(status, row, rows, tally, counts):
    """Counts the row; the last one updates the tally. Also the only program of a step of no rows.

    counts, int64: rows done, and the active ones among them times 2³²; rows that have failed.
    """
    failed = (status > _CONVERGED).to(tl.int64)
    tl.atomic_add(counts + 1, failed, mask=failed > 0)
    mine = (row < rows).to(tl.int64) + ((status == _ACTIVE).to(tl.int64) << 32)
    all_of_them = tl.atomic_add(counts, mine) + mine
    if (all_of_them & 0xFFFFFFFF) == rows:
        failed_now = tl.atomic_add(counts + 1, failed * 0)  # an atomic read
        tl.store(tally + _ACTIVE_ROWS, (all_of_them >> 32).to(tl.int32))
        tl.store(tally + _FAILED, tl.load(tally + _FAILED) + failed_now.to(tl.int32))
        tl.store(tally + _ITERATION, tl.load(tally + _ITERATION) + 1)


# --- moving a row -------------------------------------------------------------------------------


@triton.jit
def _damped(xs, gs, beta, ACC: tl.constexpr, DAMPED: tl.constexpr):
    if DAMPED:
        x = xs.to(ACC)
        return (x + _number(beta, ACC) * (gs.to(ACC) - x)).to(gs.dtype)
    return gs


@triton.jit
def _damp_or_end(x, out, i, mask, xs, gs, beta, status, ACC: tl.constexpr, DAMPED: tl.constexpr):
    """An active row's damped step, or the result of one that ends. x and out point to rows."""
    if status == _ACTIVE:
        tl.store(x + i, _damped(xs, gs, beta, ACC, DAMPED), mask=mask)
    else:
        result = tl.where(status == _NONFINITE, xs, gs)
        tl.store(x + i, result, mask=mask)
        tl.store(out + i, result, mask=mask)


@triton.jit
def _total(sums, count, stride, WIDTH: tl.constexpr):
    """[WIDTH]: the sum of count vectors, stride apart, in their order."""
    DEPTH: tl.constexpr = 1024 // WIDTH
    column = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([DEPTH, WIDTH], sums.dtype.element_ty)
    for start in range(0, bound(count), DEPTH):
        place = start + tl.arange(0, DEPTH)[:, None]
        total += tl.load(sums + place * stride + column, mask=place < count, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def _entry(vector, i, SIZE: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SIZE) == i, vector, 0))


@_kernel
def _damp(
    x,
    gx,
    n,
    parts,
    beta: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    DAMPED: tl.constexpr,
):
    place = tl.program_id(0)
    offset = (place // parts).to(tl.int64) * n
    i = place % parts * BLOCK + tl.arange(0, BLOCK)
    gs = tl.load(gx + offset + i, mask=i < n)
    xs = gs
    if DAMPED:
        xs = tl.load(x + offset + i, mask=i < n)
    tl.store(x + offset + i, _damped(xs, gs, beta, ACC, DAMPED), mask=i < n)


# --- Picard -------------------------------------------------------------------------------------


@triton.jit
def _picard_stop(squares, x, gx, n, sample, record, limits, BLOCK: tl.constexpr):
    """The status after this step, and the record. squares: ‖r‖², ‖g(x)‖²; x, gx point to a row."""
    counters, scalars, _ = record
    k = tl.load(counters + sample * _COUNTERS + _ITERATIONS) + 1
    reference = tl.load(scalars + sample * _SCALARS + _REFERENCE)
    residual, value = _norms(squares[0], squares[1], x, gx, n, BLOCK)
    status = _stop(residual, value, k, reference, sample, record, limits)
    tl.store(scalars + sample * _SCALARS + _RING_START + (k - 1) % _RING, residual)
    return status


@_kernel
def _picard_row(
    x,
    gx,
    out,
    counters,
    scalars,
    floor,
    index,
    indexed,
    tally,
    counts,
    rows,
    n,
    rtol: tl.float64,
    offset: tl.float64,
    rounding: tl.float64,
    patience,
    max_iterations,
    beta: tl.float64,
    BLOCK: tl.constexpr,
    DAMPED: tl.constexpr,
):
    acc: tl.constexpr = scalars.dtype.element_ty
    limits = (rtol, offset, rounding, patience, max_iterations)
    row = tl.program_id(0).to(tl.int64)
    sample = _sample_of(row, rows, index, indexed)
    status = tl.full([], _FROZEN, tl.int32)
    if _is_active(row, rows, sample, counters):
        x += row * n
        gx += row * n
        i = tl.arange(0, BLOCK)
        xs = tl.load(x + i, mask=i < n, other=0)
        gs = tl.load(gx + i, mask=i < n, other=0)
        g = gs.to(acc)
        r = g - xs.to(acc)
        squares = (tl.sum(r * r), tl.sum(g * g))
        record = (counters, scalars, floor)
        status = _picard_stop(squares, x, gx, n, sample, record, limits, BLOCK)
        _damp_or_end(x, out + sample * n, i, i < n, xs, gs, beta, status, acc, DAMPED)
    _count(status, row, rows, tally, counts)


@_kernel
def _picard_parts(
    x,
    gx,
    counters,
    index,
    indexed,
    sums,
    rows,
    n,
    parts,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    acc: tl.constexpr = sums.dtype.element_ty
    place = tl.program_id(0)
    row, part = (place // parts).to(tl.int64), place % parts
    sample = _sample_of(row, rows, index, indexed)
    if _is_active(row, rows, sample, counters):
        residual_squares = tl.zeros([BLOCK], acc)
        value_squares = tl.zeros([BLOCK], acc)
        for chunk in range(CHUNKS):
            i = (part * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
            r, g = _residual_and_value(x + row * n, gx + row * n, i, n, acc)
            residual_squares += r * r
            value_squares += g * g
        sums += (row * parts + part) * 2
        tl.store(sums, tl.sum(residual_squares))
        tl.store(sums + 1, tl.sum(value_squares))


@_kernel
def _picard_decide(
    x,
    gx,
    counters,
    scalars,
    floor,
    index,
    indexed,
    tally,
    counts,
    sums,
    moves,
    rows,
    n,
    parts,
    rtol: tl.float64,
    offset: tl.float64,
    rounding: tl.float64,
    patience,
    max_iterations,
    BLOCK: tl.constexpr,
):
    limits = (rtol, offset, rounding, patience, max_iterations)
    row = tl.program_id(0).to(tl.int64)
    sample = _sample_of(row, rows, index, indexed)
    status = tl.full([], _FROZEN, tl.int32)
    if _is_active(row, rows, sample, counters):
        totals = _total(sums + row * parts * 2, parts, 2, 2).to(scalars.dtype.element_ty)
        squares = (_entry(totals, 0, 2), _entry(totals, 1, 2))
        record = (counters, scalars, floor)
        status = _picard_stop(squares, x + row * n, gx + row * n, n, sample, record, limits, BLOCK)
    tl.store(moves + row * 2, status, mask=row < rows)
    _count(status, row, rows, tally, counts)


@_kernel
def _picard_move(
    x,
    gx,
    out,
    index,
    indexed,
    moves,
    rows,
    n,
    parts,
    beta: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    DAMPED: tl.constexpr,
):
    # Rows that the launches before had last come first: they may still be in the cache.
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    row, part = (place // parts).to(tl.int64), place % parts
    status = tl.load(moves + row * 2)
    if status != _FROZEN:
        out += _sample_of(row, rows, index, indexed) * n
        for chunk in range(CHUNKS):
            i = (part * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
            _move_chunk(x + row * n, gx + row * n, out, i, n, beta, status, ACC, DAMPED)


@triton.jit
def _move_chunk(x, gx, out, i, n, beta, status, ACC: tl.constexpr, DAMPED: tl.constexpr):
    mask = i < n
    gs = tl.load(gx + i, mask=mask, other=0)
    if DAMPED:
        xs = tl.load(x + i, mask=mask, other=0)
    else:
        xs = tl.load(x + i, mask=mask & (status == _NONFINITE), other=0)
    _damp_or_end(x, out, i, mask, xs, gs, beta, status, ACC, DAMPED)


# --- Anderson -----------------------------------------------------------------------------------
#
# ring: values and residuals of a sample's window, and the slot of the newest.


@triton.jit
def _window_of(sample, counters, M: tl.constexpr):
    """The iteration's number, iterates before this one, this one's slot, differences with it."""
    counters += sample * _COUNTERS
    seen = tl.load(counters + _WINDOW)
    head = (tl.load(counters + _HEAD) + 1) % M
    return tl.load(counters + _ITERATIONS) + 1, seen, head, tl.minimum(seen, M - 1)


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
    mixed = newest - _entry(gamma, 0, SIZE) * (newest - before)
    if M <= _UNROLLED:
        for age in tl.static_range(2, M):
            older = _older(window, head, age, i, n, used, newest.dtype, M)
            mixed -= _entry(gamma, age - 1, SIZE) * (younger - older)
            younger = older
    else:
        for age in range(2, M):
            older = _older(window, head, age, i, n, used, newest.dtype, M)
            mixed -= _entry(gamma, age - 1, SIZE) * (younger - older)
            younger = older
    return mixed


@triton.jit
def _mix(
    x,
    gs,
    before,
    ring,
    i,
    n,
    gamma,
    used,
    beta,
    ACC: tl.constexpr,
    M: tl.constexpr,
    SIZE: tl.constexpr,
    DAMPED: tl.constexpr,
):
    """x ← g_0 − Σ γ_j (g_j − g_{j+1}) − (1 − β)(r_0 − Σ γ_j d_j). gamma is 0 from `used` on."""
    values, residuals, head = ring
    mixed = _combine(values, head, gs.to(ACC), before.to(ACC), i, n, gamma, used, M, SIZE)
    if DAMPED:
        r = _older(residuals, head, 0, i, n, used, ACC, M)
        r_before = _older(residuals, head, 1 % M, i, n, used, ACC, M)
        least = _combine(residuals, head, r, r_before, i, n, gamma, used, M, SIZE)
        mixed -= (1 - _number(beta, ACC)) * least
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
        solved = solved & (pivot > 0) & _is_finite(pivot)
        row = tl.sum(tl.where((i == k) & (j > k), a, 0), axis=0)
        factors = tl.sum(tl.where((j == k) & (i > k), a, 0), axis=1) / pivot
        a -= factors[:, None] * row[None, :]
        a = tl.where((j == k) & (i > k), factors[:, None], a)  # L, below the diagonal
        b -= factors * _entry(b, k, SIZE)
    b /= tl.sum(tl.where(i == j, a, 0), axis=1)
    for back in range(0, bound(used)):
        k = used - 1 - back
        b -= tl.sum(tl.where((i == k) & (j < k), a, 0), axis=0) * _entry(b, k, SIZE)
    solved = solved & (tl.sum(tl.where(_is_finite(b), 0, 1)) == 0)
    return tl.where(at < used, b, 0), solved


@triton.jit
def _anderson_stop(
    sums,
    x,
    gx,
    n,
    sample,
    k,
    seen,
    head,
    count,
    record,
    limits,
    gram,
    ridge,
    restart,
    NOISE: tl.constexpr,
    M: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The record after this step, and the new row of the Gram matrix. sums: as `_push` has them.

    Returns the status, how many differences the mixture takes (0: a damped step), and their γ.
    """
    counters, scalars, _ = record
    acc: tl.constexpr = scalars.dtype.element_ty
    dots, rights = sums[4], sums[5]
    reference = tl.load(scalars + sample * _SCALARS + _REFERENCE)
    residual, value = _norms(sums[0], sums[1], x, gx, n, BLOCK)
    status = _stop(residual, value, k, reference, sample, record, limits)
    ring = scalars + sample * _SCALARS + _RING_START
    tl.store(ring + (k + _RING - 2) % _RING, tl.sqrt(sums[2]) / tl.sqrt(sums[3]), mask=seen > 0)

    grown = (k > 1) & (residual > _number(restart, acc) * reference)
    used = tl.where(grown, 0, count)
    gram += sample * (M * M)
    noise = NOISE * value
    gamma, solved = _solve(
        gram, head, used, dots, rights, _number(ridge, acc), noise * noise, M, SIZE
    )
    if status == _ACTIVE:
        j = tl.arange(0, SIZE)
        slot = _slot(head, j, M)  # kept by slot, so that nothing else moves
        tl.store(gram + head * M + slot, dots, mask=j < used)
        tl.store(gram + slot * M + head, dots, mask=j < used)
        tl.store(counters + sample * _COUNTERS + _HEAD, head)
        # Where it can't be solved: a damped step, and the window starts anew from this iterate.
        tl.store(counters + sample * _COUNTERS + _WINDOW, tl.where(solved, used + 1, 1))
    return status, tl.where(solved & (status == _ACTIVE), used, 0), gamma


@_kernel
def _anderson_row(
    x,
    gx,
    out,
    counters,
    scalars,
    floor,
    index,
    indexed,
    tally,
    counts,
    values,
    residuals,
    gram,
    rows,
    n,
    rtol: tl.float64,
    offset: tl.float64,
    rounding: tl.float64,
    patience,
    max_iterations,
    beta: tl.float64,
    ridge: tl.float64,
    restart: tl.float64,
    NOISE: tl.constexpr,
    M: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DAMPED: tl.constexpr,
):
    acc: tl.constexpr = scalars.dtype.element_ty
    limits = (rtol, offset, rounding, patience, max_iterations)
    row = tl.program_id(0).to(tl.int64)
    sample = _sample_of(row, rows, index, indexed)
    status = tl.full([], _FROZEN, tl.int32)
    if _is_active(row, rows, sample, counters):
        x += row * n
        gx += row * n
        k, seen, head, count = _window_of(sample, counters, M)
        ring = (values + sample * M * n, residuals + sample * M * n, head)
        i = tl.arange(0, BLOCK)
        xs, gs, before, sums = _push(x, gx, ring, i, n, seen, count, acc, M, SIZE)
        status, used, weights = _anderson_stop(
            sums,
            x,
            gx,
            n,
            sample,
            k,
            seen,
            head,
            count,
            (counters, scalars, floor),
            limits,
            gram,
            ridge,
            restart,
            NOISE,
            M,
            SIZE,
            BLOCK,
        )
        if used > 0:
            _mix(x, gs, before, ring, i, n, weights, used, beta, acc, M, SIZE, DAMPED)
        else:
            _damp_or_end(x, out + sample * n, i, i < n, xs, gs, beta, status, acc, DAMPED)
    _count(status, row, rows, tally, counts)


@_kernel
def _anderson_parts(
    x,
    gx,
    counters,
    index,
    indexed,
    values,
    residuals,
    sums,
    rows,
    n,
    parts,
    M: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    acc: tl.constexpr = sums.dtype.element_ty
    place = tl.program_id(0)
    row, part = (place // parts).to(tl.int64), place % parts
    sample = _sample_of(row, rows, index, indexed)
    if _is_active(row, rows, sample, counters):
        x += row * n
        gx += row * n
        _k, seen, head, count = _window_of(sample, counters, M)
        ring = (values + sample * M * n, residuals + sample * M * n, head)
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


@_kernel
def _anderson_decide(
    x,
    gx,
    counters,
    scalars,
    floor,
    index,
    indexed,
    tally,
    counts,
    gram,
    sums,
    moves,
    gamma,
    rows,
    n,
    parts,
    rtol: tl.float64,
    offset: tl.float64,
    rounding: tl.float64,
    patience,
    max_iterations,
    ridge: tl.float64,
    restart: tl.float64,
    NOISE: tl.constexpr,
    M: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    limits = (rtol, offset, rounding, patience, max_iterations)
    row = tl.program_id(0).to(tl.int64)
    sample = _sample_of(row, rows, index, indexed)
    status = tl.full([], _FROZEN, tl.int32)
    if _is_active(row, rows, sample, counters):
        k, seen, head, count = _window_of(sample, counters, M)
        width: tl.constexpr = 4 + 2 * SIZE
        sums += row * parts * width
        norms = _total(sums, parts, width, 4)
        totals = (
            _entry(norms, 0, 4),
            _entry(norms, 1, 4),
            _entry(norms, 2, 4),
            _entry(norms, 3, 4),
            _total(sums + 4, parts, width, SIZE),
            _total(sums + 4 + SIZE, parts, width, SIZE),
        )
        status, used, weights = _anderson_stop(
            totals,
            x + row * n,
            gx + row * n,
            n,
            sample,
            k,
            seen,
            head,
            count,
            (counters, scalars, floor),
            limits,
            gram,
            ridge,
            restart,
            NOISE,
            M,
            SIZE,
            BLOCK,
        )
        tl.store(gamma + row * SIZE + tl.arange(0, SIZE), weights)
        tl.store(moves + row * 2 + 1, used)
    tl.store(moves + row * 2, status, mask=row < rows)
    _count(status, row, rows, tally, counts)


@_kernel
def _anderson_move(
    x,
    gx,
    out,
    counters,
    index,
    indexed,
    values,
    residuals,
    moves,
    gamma,
    rows,
    n,
    parts,
    beta: tl.float64,
    ACC: tl.constexpr,
    M: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    DAMPED: tl.constexpr,
):
    place = tl.num_programs(0) - 1 - tl.program_id(0)  # as in _picard_move
    row, part = (place // parts).to(tl.int64), place % parts
    status = tl.load(moves + row * 2)
    if status != _FROZEN:
        sample = _sample_of(row, rows, index, indexed)
        x += row * n
        gx += row * n
        used = tl.load(moves + row * 2 + 1)
        head = tl.load(counters + sample * _COUNTERS + _HEAD)
        ring = (values + sample * M * n, residuals + sample * M * n, head)
        weights = tl.load(gamma + row * SIZE + tl.arange(0, SIZE))
        for chunk in range(CHUNKS):
            i = (part * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
            if used > 0:
                gs = tl.load(gx + i, mask=i < n, other=0)
                before = _older(ring[0], head, 1 % M, i, n, used, ACC, M)
                _mix(x, gs, before, ring, i, n, weights, used, beta, ACC, M, SIZE, DAMPED)
            else:
                _move_chunk(x, gx, out + sample * n, i, n, beta, status, ACC, DAMPED)


# --- launches -----------------------------------------------------------------------------------


def damped_update(x: Tensor, gx: Tensor, beta: float) -> None:
    """x ← x + β (g(x) − x), in place. x, gx: [R, N], contiguous.

    Raises:
        ValueError: gx is not like x, or one of them not contiguous.
    """
    _check("damped_update", x, gx)
    if x.numel() == 0:
        return
    rows, n = x.shape
    plan = plan_of(n, x.dtype)
    parts = plan.parts * plan.chunks
    with torch.cuda.device_of(x):
        _damp[(rows * parts,)](
            x, _aligned(gx), n, parts, float(beta), ACC=_acc(x), DAMPED=beta != 1, **plan.options
        )


def picard_step(p: Progress, x: Tensor, gx: Tensor, beta: float) -> None:
    """One damped Picard step of every active row; see `reference.picard_step`.

    Args:
        p: the per-sample record; updated. Its norms, [R, tiles, 2], where it has them, are of each
            row the sums of squares of g(x) − x and of g(x), by tiles, as the kernel that computed
            g(x) left them. They are added in their order; where the sum may have over- or
            underflowed, it is taken again from x and g(x).
        x: iterates, [R, N], contiguous; moved.
        gx: g(x), [R, N], contiguous; only read.
        beta: weight of the new value.

    Raises:
        ValueError: shapes, dtypes or strides are not those above.
    """
    _check("picard_step", x, gx, p)
    rows, n = x.shape
    norms = p.norms
    fits = norms is None or (norms.dim() == 3 and norms.shape[::2] == (rows, 2))
    if norms is not None and not (fits and norms.is_contiguous()):
        raise ValueError(
            f"picard_step: norms must have shape [{rows}, tiles, 2] and be contiguous "
            f"(got shape {list(norms.shape)}, strides {list(norms.stride())})"
        )
    gx, beta, plan = _aligned(gx), float(beta), plan_of(n, x.dtype)
    each_row, each_part = (max(rows, 1),), (rows * plan.parts,)
    with torch.cuda.device_of(x):
        counters, index, record, limits = _launched(p, x)
        if plan.parts == 1 and norms is None:
            _picard_row[each_row](
                x, gx, p.out, *record, rows, n, *limits, beta, DAMPED=beta != 1, **plan.options
            )
            return
        place = (rows, n, plan.parts)
        if norms is None:
            norms = torch.empty(rows, plan.parts, 2, dtype=p.dtype, device=x.device)
            _picard_parts[each_part](
                x, gx, counters, *index, norms, *place, CHUNKS=plan.chunks, **plan.options
            )
        moves = torch.empty(rows, 2, dtype=torch.int32, device=x.device)
        tiles = norms.shape[1]
        _picard_decide[each_row](
            x, gx, *record, norms, moves, rows, n, tiles, *limits, **plan.options
        )
        moving = {"ACC": _acc(x), "CHUNKS": plan.chunks, "DAMPED": beta != 1, **plan.options}
        _picard_move[each_part](x, gx, p.out, *index, moves, *place, beta, **moving)


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

    Args:
        p: the per-sample record; updated.
        x: iterates, [R, N], contiguous; moved.
        gx: g(x), [R, N], contiguous; only read.
        beta: weight of the new value.
        ridge: λ, relative to the trace of the differences' Gram matrix.
        restart: growth of the residual that restarts the window.
        values: g(x) of the window, [B, m, N], contiguous, 1 ≤ m ≤ MAX_HISTORY: a ring by sample.
        residuals: g(x) − x likewise.
        gram: d_i · d_j by slot, [B, m, m] in the accumulate dtype; one row of it is refreshed.

    Raises:
        ValueError: shapes, dtypes or strides are not those above.
    """
    _check("anderson_step", x, gx, p)
    _check_window(p, values, residuals, gram)
    rows, n = x.shape
    m = values.shape[1]
    gx, beta, plan = _aligned(gx), float(beta), plan_of(n, x.dtype)
    each_row, each_part = (max(rows, 1),), (rows * plan.parts,)
    solving = (float(ridge), float(restart))
    sizes = {"M": m, "SIZE": triton.next_power_of_2(max(m - 1, 1)), **plan.options}
    noise = progress.NOISE * torch.finfo(x.dtype).eps / 2
    with torch.cuda.device_of(x):
        counters, index, record, limits = _launched(p, x)
        if plan.parts == 1:
            _anderson_row[each_row](
                x,
                gx,
                p.out,
                *record,
                *(values, residuals, gram),
                *(rows, n, *limits, beta, *solving),
                NOISE=noise,
                DAMPED=beta != 1,
                **sizes,
            )
            return
        place = (rows, n, plan.parts)
        columns = 4 + 2 * sizes["SIZE"]
        sums = torch.empty(rows, plan.parts, columns, dtype=p.dtype, device=x.device)
        moves = torch.empty(rows, 2, dtype=torch.int32, device=x.device)
        gamma = torch.empty(rows, sizes["SIZE"], dtype=p.dtype, device=x.device)
        window = (counters, *index, values, residuals)
        _anderson_parts[each_part](x, gx, *window, sums, *place, CHUNKS=plan.chunks, **sizes)
        left = (sums, moves, gamma)
        _anderson_decide[each_row](
            x, gx, *record, gram, *left, *place, *limits, *solving, NOISE=noise, **sizes
        )
        moving = {"ACC": _acc(x), "CHUNKS": plan.chunks, "DAMPED": beta != 1, **sizes}
        _anderson_move[each_part](x, gx, p.out, *window, moves, gamma, *place, beta, **moving)


def _launched(p: Progress, x: Tensor) -> tuple[Tensor, tuple[Any, ...], tuple[Any, ...], Any]:
    """What kernels take of the record: counters; the index; all of it; its limits.

    Sets the count of the rows to zero.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    # Without an index some int64 tensor stands in for it: one compilation serves both.
    index = (counts, 0) if p.index is None else (p.index, 1)
    record = (p.counters, p.scalars, p.floor, *index, p.tally, counts)
    lim = p.limits
    limits = (float(lim.rtol), float(lim.offset), float(lim.rounding))
    return p.counters, index, record, (*limits, lim.patience, lim.max_iterations)


def _acc(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _aligned(gx: Tensor) -> Tensor:
    """As it is, or a copy that begins at a multiple of 16 bytes.

    A kernel for the others would read, and so add, in another order.
    """
    return gx if gx.data_ptr() % 16 == 0 else gx.clone()


def _check(op: str, x: Tensor, gx: Tensor, p: Progress | None = None) -> None:
    if torch.is_grad_enabled() and (x.requires_grad or gx.requires_grad):
        raise RuntimeError(
            f"{op}: internal operator, not differentiable; call fpi_cuda.fixed_point"
        )
    if x.dim() != 2 or not x.is_contiguous() or x.shape[1] >= 2**31:
        raise ValueError(
            f"{op}: x must be [R, N] with N below 2^31, and contiguous "
            f"(got shape {list(x.shape)}, strides {list(x.stride())})"
        )
    _check_like(op, "gx", gx, x, x.shape, x.dtype)
    if p is not None:
        if p.index is None and len(x) != len(p.counters):
            raise ValueError(
                f"{op}: index must be given where rows are not samples (got {len(x)} rows of "
                f"{len(p.counters)} samples)"
            )
        if p.index is not None and len(p.index) != len(x):
            raise ValueError(f"{op}: index must have {len(x)} entries (got {len(p.index)})")
        _check_like(op, "out", p.out, x, (len(p.counters), x.shape[1]), x.dtype)


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
        _check_like(op, name, t, p.out, (b, m, n), p.out.dtype)
    _check_like(op, "gram", gram, p.out, (b, m, m), p.dtype)


def _check_like(
    op: str, name: str, t: Tensor, x: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> None:
    if t.shape != torch.Size(shape) or not t.is_contiguous():
        raise ValueError(
            f"{op}: {name} must have shape {list(shape)} and be contiguous "
            f"(got shape {list(t.shape)}, strides {list(t.stride())})"
        )
    if t.dtype != dtype or t.device != x.device:
        raise ValueError(
            f"{op}: {name} must be {dtype} on {x.device} (got {t.dtype} on {t.device})"
        )
