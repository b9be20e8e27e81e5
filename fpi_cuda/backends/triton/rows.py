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
damped 3. Where the end is near, a Picard step copies x to the trail besides. An Anderson step
without a mixture moves m+5, in three launches m+6.

In three launches each part leaves its sums, one program a row adds them up in their order, decides
and solves for the weights, and the parts move. An Anderson program of a whole row holds no vector
between its sums and its mixture either: it reads g(x) and the value before once more, from the
cache, which leaves registers for twice as many programs. A row that ends writes `out` too; one that
has ended costs the start of its programs.

Nothing here waits for the device or depends on what a step finds, so a step can be captured in a
graph, and nothing is compiled anew for another number of rows or samples. Each step sets 16 bytes
to zero: the count by which the last of the programs that decide is known. It updates the tally.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import record as progress
from ...record import Progress
from ...status import Status
from .language import bound
from .norms import is_finite

__all__ = ["Plan", "plan_of"]

COUNTERS = tl.constexpr(progress.COUNTERS)  # columns of the record; the names of `progress`
SCALARS = tl.constexpr(progress.SCALARS)
STATUS = tl.constexpr(progress.STATUS)
ITERATIONS = tl.constexpr(progress.ITERATIONS)
REFERENCE_ITERATION = tl.constexpr(progress.REFERENCE_ITERATION)
WINDOW = tl.constexpr(progress.WINDOW)
HEAD = tl.constexpr(progress.HEAD)
RETREATS = tl.constexpr(progress.RETREATS)
PLAIN = tl.constexpr(progress.PLAIN)
HALVINGS = tl.constexpr(progress.HALVINGS)
RESIDUAL = tl.constexpr(progress.RESIDUAL)
REFERENCE = tl.constexpr(progress.REFERENCE)
_VALUE = tl.constexpr(progress.VALUE)
GAIN = tl.constexpr(progress.GAIN)
RING_START = tl.constexpr(progress.RING_START)
RING = tl.constexpr(progress.RING)
_FLOOR = tl.constexpr(progress.FLOOR)
_OWN_RTOL = tl.constexpr(progress.OWN_RTOL)
_OWN_OFFSET = tl.constexpr(progress.OWN_OFFSET)
_OWN_PATIENCE = tl.constexpr(progress.OWN_PATIENCE)
_OWN_MAX_ITERATIONS = tl.constexpr(progress.OWN_MAX_ITERATIONS)
_OWN_ROUNDING = tl.constexpr(progress.OWN_ROUNDING)
_BOUNDS = tl.constexpr(1 + progress.OWN_ROUNDING)
_ACTIVE_ROWS = tl.constexpr(progress.ACTIVE_ROWS)
_FAILED = tl.constexpr(progress.FAILED)
_ITERATION = tl.constexpr(progress.ITERATION)
_GROWTH = tl.constexpr(progress.GROWTH)
_GROWTH_ITERATIONS = tl.constexpr(progress.GROWTH_ITERATIONS)
_FALL = tl.constexpr(progress.FALL)
ACTIVE = tl.constexpr(progress.ACTIVE)
_CONVERGED = tl.constexpr(1 + Status.CONVERGED)
MAX_ITERATIONS = tl.constexpr(1 + Status.MAX_ITERATIONS)
_STALLED = tl.constexpr(1 + Status.STALLED)
_DIVERGED = tl.constexpr(1 + Status.DIVERGED)
NONFINITE = tl.constexpr(1 + Status.NONFINITE)
FROZEN = tl.constexpr(-1)  # ended in an earlier step, and is left alone

# What changes from call to call: no value of it is compiled in. The small tensors are read a number
# at a time, so nothing is gained from where they begin.
_CHANGING = ["rows", "indexed", "parts", "patience", "max_iterations", "every"]
_SMALL = ["sums", "moves", "gamma"]
kernel = triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_SMALL)


class Record(NamedTuple):
    """The per-sample record, as kernels take it: tensors that begin where torch allocates one.

    No numbers. In a tuple Triton takes a float for float32 and compiles in what it finds of an
    integer (that it is 1, that 16 divides it), asked not to or not; so numbers are arguments of
    their own.
    """

    counters: Tensor
    scalars: Tensor
    floor: Tensor | None  # [B]
    own: Tensor | None  # [B, 6] in its place: a sample's floor, and its own limits
    samples: Tensor  # that the rows hold, where `indexed`
    tally: Tensor
    counts: Tensor  # int64: rows done, and the active ones among them times 2³²; rows that failed


class Plan(NamedTuple):
    """How a row lies over programs."""

    block: int  # values that a program takes at a time,
    chunks: int  # so many times
    parts: int  # programs
    warps: int  # of a program

    @property
    def options(self) -> dict[str, int]:
        """What a launch over parts is given of it."""
        return {"BLOCK": self.block, "num_warps": self.warps}

    @property
    def decision(self) -> dict[str, int]:
        """What a launch is given that goes through a row once more where it has to.

        That is rare: few registers and small code.
        """
        return {"WIDTH": min(self.block, 512), "num_warps": self.warps}


def plan_of(n: int, dtype: torch.dtype) -> Plan:
    """The plan of rows of n values."""
    warp = 32 * (8 if dtype == torch.float64 else 16)  # values that it holds of each vector
    if n <= 4 * warp:
        block = max(triton.next_power_of_2(n), 32)
        return Plan(block, 1, 1, max(block // warp, 1))
    block, most_parts = 4 * warp, 1024
    chunks = triton.cdiv(n, block * most_parts)
    return Plan(block, chunks, triton.cdiv(n, block * chunks), 4)


# --- the record -----------------------------------------------------------------------------------


@triton.jit
def number(a, ACC: tl.constexpr):
    """An argument, which came as float64."""
    return tl.full([], a, ACC)


@triton.jit
def sample_of(row, record, indexed, rows):
    """The sample whose row it is."""
    return tl.load(record.samples + row, mask=(row < rows) & (indexed != 0), other=row)


@triton.jit
def _active_sample(row, record, indexed, rows):
    sample = sample_of(row, record, indexed, rows)
    status = record.counters + sample * COUNTERS + STATUS
    return sample, tl.load(status, mask=row < rows, other=FROZEN) == ACTIVE


@triton.jit
def row_of_program(record, indexed, rows):
    """A program's row, the sample that it holds, and whether it is there and to be moved."""
    row = tl.program_id(0).to(tl.int64)
    sample, active = _active_sample(row, record, indexed, rows)
    return row, sample, active


@triton.jit
def part_of_program(record, indexed, rows, parts):
    """Likewise of a row cut into parts: row, part, sample, active."""
    place = tl.program_id(0)
    row, part = (place // parts).to(tl.int64), place % parts
    sample, active = _active_sample(row, record, indexed, rows)
    return row, part, sample, active


@triton.jit
def limits_of(sample, record, limits):
    """The limits that hold for a sample: `limits`, as `launched` has them, or its own.

    Returns rtol, offset, rounding, patience, max_iterations and the least norm that rtol takes.
    """
    acc: tl.constexpr = record.scalars.dtype.element_ty
    rtol = number(limits[0], acc)
    offset = number(limits[1], acc)
    rounding = number(limits[2], acc)
    patience, max_iterations = limits[3], limits[4]
    floor = tl.full([], 0, acc)
    if record.floor is not None:
        floor = tl.load(record.floor + sample)
    if record.own is not None:
        own = record.own + sample * _BOUNDS
        floor = tl.load(own + _FLOOR)
        rtol = tl.load(own + _OWN_RTOL)
        offset = tl.load(own + _OWN_OFFSET)
        rounding = tl.load(own + _OWN_ROUNDING)
        patience = tl.load(own + _OWN_PATIENCE).to(tl.int32)
        max_iterations = tl.load(own + _OWN_MAX_ITERATIONS).to(tl.int32)
    return rtol, offset, rounding, patience, max_iterations, floor


@triton.jit
def stop(residual, value, k, reference, sample, record, own):
    """The sample's status after iteration k; its counters, norms and reference brought up to date.

    own: as `limits_of` has them. Also returns the iteration of the reference, and the threshold.
    """
    rtol, offset, rounding, patience, max_iterations, floor = own
    counters = record.counters + sample * COUNTERS
    scalars = record.scalars + sample * SCALARS
    since = tl.load(counters + REFERENCE_ITERATION)
    fell = (k == 1) | (residual <= reference * _FALL)
    reference = tl.where(fell, residual, reference)
    since = tl.where(fell, k, since)
    threshold = offset + rtol * tl.where(value > floor, value, floor)

    status = tl.where(k >= max_iterations, MAX_ITERATIONS, ACTIVE)
    stalled = (k - since >= patience) & (residual <= rounding * value)
    status = tl.where(stalled, _STALLED, status)
    diverged = (k - since >= _GROWTH_ITERATIONS) & (residual > reference * _GROWTH)
    status = tl.where(diverged, _DIVERGED, status)
    status = tl.where(residual <= threshold, _CONVERGED, status)
    status = tl.where(is_finite(residual) & is_finite(value), status, NONFINITE)

    tl.debug_barrier()  # every warp has read the record
    tl.store(counters + STATUS, status)
    tl.store(counters + ITERATIONS, k)
    tl.store(counters + REFERENCE_ITERATION, since)
    tl.store(scalars + RESIDUAL, residual)
    tl.store(scalars + REFERENCE, reference)
    tl.store(scalars + _VALUE, value)
    return status, since, threshold


@triton.jit
def count_row(status, row, record, rows):
    """Counts the row; the last one updates the tally, as does the only program of no rows."""
    tally, counts = record.tally, record.counts
    failed = (status > _CONVERGED).to(tl.int64)
    tl.atomic_add(counts + 1, failed, mask=failed > 0)
    mine = (row < rows).to(tl.int64) + ((status == ACTIVE).to(tl.int64) << 32)
    all_of_them = tl.atomic_add(counts, mine) + mine
    if (all_of_them & 0xFFFFFFFF) == rows:
        failed_now = tl.atomic_add(counts + 1, failed * 0)  # an atomic read
        tl.store(tally + _ACTIVE_ROWS, (all_of_them >> 32).to(tl.int32))
        tl.store(tally + _FAILED, tl.load(tally + _FAILED) + failed_now.to(tl.int32))
        tl.store(tally + _ITERATION, tl.load(tally + _ITERATION) + 1)


# --- moving a row ---------------------------------------------------------------------------------


@triton.jit
def damped(xs, gs, beta, ACC: tl.constexpr, DAMPED: tl.constexpr):
    """g(x), or x + β (g(x) − x) where that does not overflow the state's type."""
    if DAMPED:
        x = xs.to(ACC)
        moved = (x + number(beta, ACC) * (gs.to(ACC) - x)).to(gs.dtype)
        return tl.where(is_finite(moved.to(ACC)), moved, gs)
    return gs


@triton.jit
def move_or_end(x, out, i, mask, xs, gs, moved, status):
    """An active row's step to `moved`, or the result of one that ends. x and out point to rows."""
    if status == ACTIVE:
        tl.store(x + i, moved, mask=mask)
    else:
        result = tl.where(status == NONFINITE, xs, gs)
        tl.store(x + i, result, mask=mask)
        tl.store(out + i, result, mask=mask)


@triton.jit
def move_chunk(x, gx, out, i, n, beta, status, ACC: tl.constexpr, DAMPED: tl.constexpr):
    """A damped step, or the end of the row, at i, which may lie beyond n."""
    mask = i < n
    gs = tl.load(gx + i, mask=mask, other=0)
    if DAMPED:
        xs = tl.load(x + i, mask=mask, other=0)
    else:
        xs = tl.load(x + i, mask=mask & (status == NONFINITE), other=0)
    move_or_end(x, out, i, mask, xs, gs, damped(xs, gs, beta, ACC, DAMPED), status)


@triton.jit
def total_of(sums, count, stride, WIDTH: tl.constexpr):
    """[WIDTH]: the sum of count vectors, stride apart, in their order."""
    DEPTH: tl.constexpr = 1024 // WIDTH
    column = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([DEPTH, WIDTH], sums.dtype.element_ty)
    for start in range(0, bound(count), DEPTH):
        place = start + tl.arange(0, DEPTH)[:, None]
        there = (place < count) & (column < stride)
        total += tl.load(sums + place * stride + column, mask=there, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def entry(vector, i, SIZE: tl.constexpr):
    """Entry i of a vector in registers."""
    return tl.sum(tl.where(tl.arange(0, SIZE) == i, vector, 0))


# --- launches -------------------------------------------------------------------------------------


def launched(p: Progress, x: Tensor) -> tuple[Record, tuple[int, int, int], tuple[float, ...]]:
    """What kernels take of the record: its tensors; indexed, rows, n; its limits.

    Sets the count of the rows to zero.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    # Without an index some int64 tensor stands in for it: one compilation serves both.
    samples = counts if p.index is None else p.index
    lim = p.limits
    limits = (float(lim.rtol), float(lim.offset), float(lim.rounding))
    floor, own = (p.floor, None) if p.own is None else (None, p.bounds)
    return (
        Record(p.counters, p.scalars, floor, own, samples, p.tally, counts),
        (int(p.index is not None), *x.shape),
        (*limits, lim.patience, lim.max_iterations),
    )


def aligned(gx: Tensor) -> Tensor:
    """As it is, or a copy that begins at a multiple of 16 bytes.

    A kernel for the others would read, and so add, in another order.
    """
    return gx if gx.data_ptr() % 16 == 0 else gx.clone()


def check(op: str, x: Tensor, gx: Tensor, p: Progress | None = None) -> None:
    """Raises where the tensors of a step are not what its kernels take."""
    if torch.is_grad_enabled() and (x.requires_grad or gx.requires_grad):
        raise RuntimeError(
            f"{op}: internal operator, not differentiable; call fpi_cuda.fixed_point"
        )
    if x.dim() != 2 or not x.is_contiguous() or x.shape[1] >= 2**31:
        raise ValueError(
            f"{op}: x must be [R, N] with N below 2^31, and contiguous "
            f"(got shape {list(x.shape)}, strides {list(x.stride())})"
        )
    check_like(op, "gx", gx, x, x.shape, x.dtype)
    if p is not None:
        if p.index is None and len(x) != len(p.counters):
            raise ValueError(
                f"{op}: index must be given where rows are not samples (got {len(x)} rows of "
                f"{len(p.counters)} samples)"
            )
        if p.index is not None and len(p.index) != len(x):
            raise ValueError(f"{op}: index must have {len(x)} entries (got {len(p.index)})")
        check_like(op, "out", p.out, x, (len(p.counters), x.shape[1]), x.dtype)


def check_like(
    op: str, name: str, t: Tensor, x: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> None:
    """Raises where t is not of that shape and dtype, contiguous and on x's device."""
    if t.shape != torch.Size(shape) or not t.is_contiguous():
        raise ValueError(
            f"{op}: {name} must have shape {list(shape)} and be contiguous "
            f"(got shape {list(t.shape)}, strides {list(t.stride())})"
        )
    if t.dtype != dtype or t.device != x.device:
        raise ValueError(
            f"{op}: {name} must be {dtype} on {x.device} (got {t.dtype} on {t.device})"
        )
