# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""Picard's step as Triton kernels; see `rows`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...record import Progress
from .rows import (
    COUNTERS,
    FROZEN,
    ITERATIONS,
    REFERENCE,
    RING,
    RING_START,
    SCALARS,
    aligned,
    check,
    count_row,
    damp_or_end,
    entry,
    kernel,
    launched,
    move_chunk,
    norms_of,
    part_of_program,
    plan_of,
    residual_and_value,
    row_of_program,
    sample_of,
    stop,
    total_of,
)

__all__ = ["picard_step"]


@triton.jit
def _picard_stop(squares, x, gx, n, sample, record, limits, BLOCK: tl.constexpr):
    """The status after this step, and the record. squares: ‖r‖², ‖g(x)‖²; x, gx point to a row."""
    k = tl.load(record.counters + sample * COUNTERS + ITERATIONS) + 1
    scalars = record.scalars + sample * SCALARS
    reference = tl.load(scalars + REFERENCE)
    residual, value = norms_of(squares[0], squares[1], x, gx, n, BLOCK)
    status = stop(residual, value, k, reference, sample, record, limits)
    tl.store(scalars + RING_START + (k - 1) % RING, residual)
    return status


@kernel
def _picard_row(
    x, gx, out, record, indexed, rows, n,
    rtol: tl.float64, offset: tl.float64, rounding: tl.float64, patience, max_iterations,
    beta: tl.float64, BLOCK: tl.constexpr, DAMPED: tl.constexpr,
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
        status = _picard_stop(squares, x, gx, n, sample, record, limits, BLOCK)
        damp_or_end(x, out + sample * n, i, i < n, xs, gs, beta, status, acc, DAMPED)
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
    x, gx, record, sums, moves, indexed, rows, n, parts,
    rtol: tl.float64, offset: tl.float64, rounding: tl.float64, patience, max_iterations,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, sample, active = row_of_program(record, indexed, rows)
    status = tl.full([], FROZEN, tl.int32)
    if active:
        totals = total_of(sums + row * parts * 2, parts, 2, 2).to(record.scalars.dtype.element_ty)
        squares = (entry(totals, 0, 2), entry(totals, 1, 2))
        limits = (rtol, offset, rounding, patience, max_iterations)
        status = _picard_stop(squares, x + row * n, gx + row * n, n, sample, record, limits, BLOCK)
    tl.store(moves + row * 2, status, mask=row < rows)
    count_row(status, row, record, rows)


@kernel
def _picard_move(
    x, gx, out, record, moves, indexed, rows, n, parts, beta: tl.float64,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, DAMPED: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = record.scalars.dtype.element_ty
    # Rows that the launches before had last come first: they may still be in the cache.
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    row, part = (place // parts).to(tl.int64), place % parts
    status = tl.load(moves + row * 2)
    if status != FROZEN:
        out += sample_of(row, record, indexed, rows) * n
        for chunk in range(CHUNKS):
            i = (part * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
            move_chunk(x + row * n, gx + row * n, out, i, n, beta, status, acc, DAMPED)


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
    check("picard_step", x, gx, p)
    rows, n = x.shape
    norms = p.norms
    fits = norms is None or (norms.dim() == 3 and norms.shape[::2] == (rows, 2))
    if norms is not None and not (fits and norms.is_contiguous()):
        raise ValueError(
            f"picard_step: norms must have shape [{rows}, tiles, 2] and be contiguous "
            f"(got shape {list(norms.shape)}, strides {list(norms.stride())})"
        )
    gx, beta, plan = aligned(gx), float(beta), plan_of(n, x.dtype)
    each_row, each_part = (max(rows, 1),), (rows * plan.parts,)
    damping = {"DAMPED": beta != 1, **plan.options}
    with torch.cuda.device_of(x):
        record, place, limits = launched(p, x)
        if plan.parts == 1 and norms is None:
            _picard_row[each_row](x, gx, p.out, record, *place, *limits, beta, **damping)
            return
        cut = (*place, plan.parts)
        if norms is None:
            norms = torch.empty(rows, plan.parts, 2, dtype=p.dtype, device=x.device)
            _picard_parts[each_part](x, gx, record, norms, *cut, CHUNKS=plan.chunks, **plan.options)
        moves = torch.empty(rows, 2, dtype=torch.int32, device=x.device)
        tiles = norms.shape[1]
        _picard_decide[each_row](
            x, gx, record, norms, moves, *place, tiles, *limits, **plan.options
        )
        _picard_move[each_part](
            x, gx, p.out, record, moves, *cut, beta, CHUNKS=plan.chunks, **damping
        )
