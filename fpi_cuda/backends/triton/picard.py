# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""Picard's step as Triton kernels; see `rows`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import record as progress
from ...record import Progress
from .language import bound
from .norms import larger_gain, norms_of, residual_and_value, scale_for
from .rows import (
    ACTIVE,
    COUNTERS,
    FROZEN,
    GAIN,
    HEAD,
    ITERATIONS,
    NONFINITE,
    REFERENCE,
    RESIDUAL,
    RING,
    RING_START,
    SCALARS,
    WINDOW,
    aligned,
    check,
    check_like,
    count_row,
    damped,
    entry,
    kernel,
    launched,
    limits_of,
    move_chunk,
    move_or_end,
    number,
    part_of_program,
    plan_of,
    row_of_program,
    sample_of,
    stop,
    total_of,
)

__all__ = ["picard_step"]


_TRAIL = tl.constexpr(progress.TRAIL)
_NEAR_END = tl.constexpr(progress.NEAR_END)


@triton.jit
def _state_of(trail, sample, slot, n):
    """Where the iterate in that slot of the sample's trail begins."""
    return trail + (sample * _TRAIL + slot) * n


@triton.jit
def _measure(
    x, gx, trail, n, residual, noise, beta, sample, head, length, record,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Gain, and rate where it is damped, of a sample that ends, from its last iterates.

    x and gx point to a row. As it is once a sample: few registers and small code.
    """
    acc: tl.constexpr = record.scalars.dtype.element_ty
    newest = _state_of(trail, sample, head, n)
    older = _state_of(trail, sample, tl.where(length > 1, 1 - head, head), n)
    scale, _inverse = scale_for(residual)
    undamp = 1 / number(beta, acc)
    new_value = tl.zeros([WIDTH], acc)
    new_residual = tl.zeros([WIDTH], acc)
    new_state = tl.zeros([WIDTH], acc)
    far_value = tl.zeros([WIDTH], acc)
    far_residual = tl.zeros([WIDTH], acc)
    old_value = tl.zeros([WIDTH], acc)
    old_state = tl.zeros([WIDTH], acc)
    for start in range(0, bound(n), WIDTH):
        i = start + tl.arange(0, WIDTH)
        mask = i < n
        x0 = tl.load(x + i, mask=mask, other=0).to(acc)
        x1 = tl.load(newest + i, mask=mask, other=0).to(acc)
        x2 = tl.load(older + i, mask=mask, other=0).to(acc)
        r = scale * (tl.load(gx + i, mask=mask, other=0).to(acc) - x0)
        dx = scale * (x0 - x1)
        dx1 = scale * (x1 - x2)
        # r_1 = Δx / β, and Δg = Δx + Δr
        dr = r - dx * undamp
        dr1 = (dx - dx1) * undamp
        dg = dx + dr
        dg1 = dx1 + dr1
        new_value += dg * dg
        new_residual += dr * dr
        new_state += dx * dx
        far_value += (dg + dg1) * (dg + dg1)
        far_residual += (dr + dr1) * (dr + dr1)
        old_value += dg1 * dg1
        old_state += dx1 * dx1
    # A damped x was rounded, and what is told from it by Δx / β is so much the less exact.
    noise *= scale * tl.where(undamp > 1, undamp, 1)
    none = tl.zeros([], acc)
    gain = larger_gain(none, tl.sum(new_value), tl.sum(new_residual), noise)
    far = larger_gain(gain, tl.sum(far_value), tl.sum(far_residual), noise)
    scalars = record.scalars + sample * SCALARS
    tl.store(scalars + GAIN, tl.where(length > 1, far, gain))
    is_damped = beta != 1  # whose residuals do not tell g's rate
    rate = larger_gain(none, tl.sum(new_value), tl.sum(new_state), noise)
    tl.store(scalars + RING_START, rate, mask=is_damped)
    rate = larger_gain(none, tl.sum(old_value), tl.sum(old_state), noise)
    tl.store(scalars + RING_START + 1, rate, mask=is_damped & (length > 1))
    tl.debug_barrier()  # every warp has read x


@triton.jit
def _picard_stop(
    squares, x, gx, trail, n, beta, sample, record, limits,
    NOISE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The record after this step. squares: ‖r‖², ‖g(x)‖²; x, gx point to a row.

    Returns the status and the slot of the trail to which x is to go, −1 where the end is far:
    csrc/math/picard.h.
    """
    counters = record.counters + sample * COUNTERS
    scalars = record.scalars + sample * SCALARS
    k = tl.load(counters + ITERATIONS) + 1
    length = tl.load(counters + WINDOW)
    head = tl.load(counters + HEAD)
    before = tl.load(scalars + RESIDUAL)
    reference = tl.load(scalars + REFERENCE)
    own = limits_of(sample, record, limits)
    residual, value = norms_of(squares[0], squares[1], x, gx, n, WIDTH)
    status, since, threshold = stop(residual, value, k, reference, sample, record, own)
    fall = residual / before
    if k > 1:
        # Undamped, Δg = r and Δx is the residual before.
        tl.store(scalars + RING_START + (k - 2) % RING, fall * fall, mask=beta == 1)
    slot = tl.full([], -1, tl.int32)
    if status == ACTIVE:
        ends = (since != k) | (k + _TRAIL >= own[4]) | (threshold < 0)
        ends = ends | (residual * fall * fall <= threshold * _NEAR_END)
        if (k <= _TRAIL) | ends:
            slot = 1 - head
            tl.store(counters + HEAD, slot)
            tl.store(counters + WINDOW, tl.minimum(length + 1, _TRAIL))
        else:
            tl.store(counters + WINDOW, 0)
    elif trail is not None:
        if (status != NONFINITE) & (length > 0) & (residual > 0):
            _measure(
                x, gx, trail, n, residual, NOISE * value, beta, sample, head, length, record,
                WIDTH,
            )  # fmt: skip
    return status, slot


@kernel
def _picard_row(
    x, gx, out, trail, record, indexed, rows, n,
    rtol: tl.float64, offset: tl.float64, rounding: tl.float64, patience, max_iterations,
    beta: tl.float64, NOISE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    DAMPED: tl.constexpr,
):  # fmt: skip
    row, sample, active = row_of_program(record, indexed, rows)
    status = tl.full([], FROZEN, tl.int32)
    if active:
        acc: tl.constexpr = record.scalars.dtype.element_ty
        x += row * n
        gx += row * n
        i = tl.arange(0, BLOCK)
        xs = tl.load(x + i, mask=i < n, other=0)
        gs = tl.load(gx + i, mask=i < n, other=0)
        g = gs.to(acc)
        r = g - xs.to(acc)
        squares = (tl.sum(r * r), tl.sum(g * g))
        limits = (rtol, offset, rounding, patience, max_iterations)
        status, slot = _picard_stop(
            squares, x, gx, trail, n, beta, sample, record, limits, NOISE, WIDTH
        )
        if trail is not None:
            kept = _state_of(trail, sample, slot, n)
            tl.store(kept + i, xs, mask=(i < n) & (slot >= 0))
        moved = damped(xs, gs, beta, acc, DAMPED)
        move_or_end(x, out + sample * n, i, i < n, xs, gs, moved, status)
    count_row(status, row, record, rows)


@kernel
def _picard_parts(
    x, gx, record, sums, indexed, rows, n, parts, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    acc: tl.constexpr = sums.dtype.element_ty
    row, part, _sample, active = part_of_program(record, indexed, rows, parts)
    if active:
        residual_squares = tl.zeros([BLOCK], acc)
        value_squares = tl.zeros([BLOCK], acc)
        for chunk in range(CHUNKS):
            i = (part * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
            r, g = residual_and_value(x + row * n, gx + row * n, i, n, acc)
            residual_squares += r * r
            value_squares += g * g
        sums += (row * parts + part) * 2
        tl.store(sums, tl.sum(residual_squares))
        tl.store(sums + 1, tl.sum(value_squares))


@kernel
def _picard_decide(
    x, gx, trail, record, sums, moves, indexed, rows, n, parts,
    rtol: tl.float64, offset: tl.float64, rounding: tl.float64, patience, max_iterations,
    beta: tl.float64, NOISE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, sample, active = row_of_program(record, indexed, rows)
    status = tl.full([], FROZEN, tl.int32)
    if active:
        totals = total_of(sums + row * parts * 2, parts, 2, 2).to(record.scalars.dtype.element_ty)
        squares = (entry(totals, 0, 2), entry(totals, 1, 2))
        limits = (rtol, offset, rounding, patience, max_iterations)
        x += row * n
        gx += row * n
        status, slot = _picard_stop(
            squares, x, gx, trail, n, beta, sample, record, limits, NOISE, WIDTH
        )
        tl.store(moves + row * 2 + 1, slot)
    tl.store(moves + row * 2, status, mask=row < rows)
    count_row(status, row, record, rows)


@kernel
def _picard_move(
    x, gx, out, trail, record, moves, indexed, rows, n, parts, beta: tl.float64,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, DAMPED: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = record.scalars.dtype.element_ty
    # Rows that the launches before had last come first: they may still be in the cache.
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    row, part = (place // parts).to(tl.int64), place % parts
    status = tl.load(moves + row * 2)
    if status != FROZEN:
        sample = sample_of(row, record, indexed, rows)
        out += sample * n
        slot = tl.load(moves + row * 2 + 1)
        for chunk in range(CHUNKS):
            i = (part * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
            if trail is not None:
                kept = _state_of(trail, sample, slot, n)
                if slot >= 0:
                    xs = tl.load(x + row * n + i, mask=i < n)
                    tl.store(kept + i, xs, mask=i < n)
                    tl.debug_barrier()  # every warp has read x
            move_chunk(x + row * n, gx + row * n, out, i, n, beta, status, acc, DAMPED)


def picard_step(
    p: Progress, x: Tensor, gx: Tensor, beta: float, trail: Tensor | None = None
) -> None:
    """One damped Picard step of every active row; see `reference.picard_step`.

    Args:
        p: the per-sample record; updated. Its norms, [R, tiles, 2], where it has them, are of each
            row the sums of squares of g(x) − x and of g(x), by tiles, as the kernel that computed
            g(x) left them. They are added in their order; where the sum may have over- or
            underflowed, it is taken again from x and g(x).
        x: iterates, [R, N], contiguous; moved.
        gx: g(x), [R, N], contiguous; only read.
        beta: weight of the new value.
        trail: the iterates before x, [B, TRAIL, N], where they were kept; None: none are.

    Raises:
        ValueError: shapes, dtypes or strides are not those above.
    """
    check("picard_step", x, gx, p)
    rows, n = x.shape
    norms = p.norms
    fits = norms is None or (norms.dim() == 3 and norms.shape[::2] == (rows, 2))
    if norms is not None and not (fits and norms.is_contiguous()):
        raise ValueError(
            f"picard_step: norms must have shape [{rows}, tiles, 2] and be contiguous "
            f"(got shape {list(norms.shape)}, strides {list(norms.stride())})"
        )
    if trail is not None:
        b = len(p.counters)
        check_like("picard_step", "trail", trail, x, (b, progress.TRAIL, n), x.dtype)
    gx, beta, plan = aligned(gx), float(beta), plan_of(n, x.dtype)
    noise = progress.NOISE * torch.finfo(x.dtype).eps / 2
    each_row, each_part = (max(rows, 1),), (rows * plan.parts,)
    damping = {"DAMPED": beta != 1, **plan.options}
    with torch.cuda.device_of(x):
        record, place, limits = launched(p, x)
        if plan.parts == 1 and norms is None:
            _picard_row[each_row](
                x, gx, p.out, trail, record, *place, *limits, beta, noise,
                WIDTH=min(plan.block, 128),  # beside a row, so fewer yet
                **damping,
            )  # fmt: skip
            return
        cut = (*place, plan.parts)
        if norms is None:
            norms = torch.empty(rows, plan.parts, 2, dtype=p.dtype, device=x.device)
            _picard_parts[each_part](x, gx, record, norms, *cut, CHUNKS=plan.chunks, **plan.options)
        moves = torch.empty(rows, 2, dtype=torch.int32, device=x.device)
        tiles = norms.shape[1]
        limits = (*limits, beta, noise)
        _picard_decide[each_row](
            x, gx, trail, record, norms, moves, *place, tiles, *limits, **plan.decision
        )
        _picard_move[each_part](
            x, gx, p.out, trail, record, moves, *cut, beta, CHUNKS=plan.chunks, **damping
        )
