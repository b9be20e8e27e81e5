# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""What an Anderson step decides of a sample, and the weights of its mixture: csrc/math/anderson.h.

Where sums of squares can't be trusted, those of differences are taken anew from the window, scaled
by a power of two; the weights are free of it. That is rare: few registers and small code there.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ... import record as progress
from .language import bound
from .norms import is_finite, is_trusted, larger_gain, norms_of, scale_for
from .rows import (
    ACTIVE,
    COUNTERS,
    GAIN,
    HALVINGS,
    HEAD,
    ITERATIONS,
    MAX_ITERATIONS,
    PLAIN,
    REFERENCE,
    REFERENCE_ITERATION,
    RESIDUAL,
    RETREATS,
    RING,
    RING_START,
    SCALARS,
    STATUS,
    WINDOW,
    entry,
    limits_of,
    number,
    stop,
)

__all__ = ["Window", "anderson_stop", "older", "ring_of", "slot_of", "vector", "window_of"]

_MAX_RETREATS = tl.constexpr(progress.MAX_RETREATS)
_GOES_ON = tl.constexpr(progress.GOES_ON)
_WORSE = tl.constexpr(progress.WORSE)
_SLOW_ITERATIONS = tl.constexpr(progress.SLOW_ITERATIONS)
_MAX_HALVINGS = tl.constexpr(progress.MAX_HALVINGS)


class Window(NamedTuple):
    """Of each sample; see `anderson_step`."""

    evaluated: Tensor  # its values; `values` is a name of Triton's tuples
    residuals: Tensor
    gram: Tensor


@triton.jit
def window_of(sample, record, M: tl.constexpr):
    """The iteration's number, iterates before this one, this one's slot, differences with it."""
    counters = record.counters + sample * COUNTERS
    seen = tl.load(counters + WINDOW)
    head = (tl.load(counters + HEAD) + 1) % M
    return tl.load(counters + ITERATIONS) + 1, seen, head, tl.minimum(seen, M - 1)


@triton.jit
def ring_of(window, sample, n, head, M: tl.constexpr):
    """Values and residuals of the sample's window, and the slot of the newest."""
    return window.evaluated + sample * M * n, window.residuals + sample * M * n, head


@triton.jit
def slot_of(head, age, M: tl.constexpr):
    """Where the ring has the iterate that came `age` before the newest."""
    slot = head - age
    return tl.where(slot < 0, slot + M, slot)


@triton.jit
def vector(window, head, age, n, M: tl.constexpr):
    """Where the iterate of that age begins."""
    return window + slot_of(head, age, M).to(tl.int64) * n


@triton.jit
def older(window, head, age, i, n, count, ACC: tl.constexpr, M: tl.constexpr):
    """Of the iterate of that age, 0 where the window does not reach it."""
    at = vector(window, head, age, n, M) + i
    return tl.load(at, mask=(i < n) & (age <= count), other=0).to(ACC)


# --- sums that can't be trusted -------------------------------------------------------------------


@triton.jit
def _difference(ring, head, age, i, n, scale, ACC: tl.constexpr, M: tl.constexpr):
    """v_{age−1} − v_age of a ring, scaled; −v_0 for age 0."""
    younger = vector(ring, head, age - 1, n, M) + i
    younger = tl.load(younger, mask=(i < n) & (age > 0), other=0).to(ACC)
    return scale * younger - scale * older(ring, head, age, i, n, age, ACC, M)


@triton.jit
def _scaled_sums(
    ring, n, count, ACC: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """Sums over count ≥ 1 differences, scaled by the largest entry of these and r_0.

    Returns the scale and its inverse, ‖Δg‖² and ‖Δx‖² of the newest pair, the products of the
    differences, [SIZE, SIZE], and those with r_0, [SIZE].
    """
    values, residuals, head = ring
    at = tl.arange(0, SIZE)
    row, column = at[:, None], at[None, :]
    scale = tl.full([], 1, ACC)
    inverse = tl.full([], 1, ACC)
    dgdg = tl.zeros([], ACC)
    dxdx = tl.zeros([], ACC)
    system = tl.zeros([SIZE, SIZE], ACC)
    rights = tl.zeros([SIZE], ACC)
    for attempt in range(0, 2):  # the largest entry first, then the sums
        largest = tl.zeros([WIDTH], ACC)
        for one in range(1, bound(count) + 1):
            for other in range(-1, one + 1):  # −1: Δg; 0: −r_0
                ours = residuals
                age = other
                if other < 0:
                    ours = values
                    age = 1
                products = tl.zeros([WIDTH], ACC)
                squares = tl.zeros([WIDTH], ACC)
                differences = tl.zeros([WIDTH], ACC)
                for start in range(0, bound(n), WIDTH):
                    i = start + tl.arange(0, WIDTH)
                    a = _difference(residuals, head, one, i, n, scale, ACC, M)
                    b = _difference(ours, head, age, i, n, scale, ACC, M)
                    products += a * b
                    squares += b * b
                    differences += (b - a) * (b - a)
                    size = tl.where(other < 0, tl.abs(a), tl.abs(b))
                    largest = tl.where(size > largest, size, largest)
                total = tl.sum(products)
                if (one == 1) & (other < 0):
                    dgdg = tl.sum(squares)
                    dxdx = tl.sum(differences)
                i, j = one - 1, other - 1
                here = ((row == i) & (column == j)) | ((row == j) & (column == i))
                system = tl.where(here, total, system)
                rights = tl.where((at == i) & (other == 0), -total, rights)
        if attempt == 0:
            scale, inverse = scale_for(tl.max(largest))
    return scale, inverse, dgdg, dxdx, system, rights


# --- the system -----------------------------------------------------------------------------------


@triton.jit
def _system_of(gram, head, count, dots, M: tl.constexpr, SIZE: tl.constexpr):
    """K = DᵀD of count differences, [SIZE, SIZE], 0 beyond: its first row is dots.

    The others are in the sample's gram, by slot.
    """
    at = tl.arange(0, SIZE)
    i, j = at[:, None], at[None, :]
    inside = (i < count) & (j < count)
    places = slot_of(head, i, M) * M + slot_of(head, j, M)
    a = tl.load(gram + places, mask=inside & (i > 0) & (j > 0), other=0)
    a = tl.where(inside & (i == 0), dots[None, :], a)
    return tl.where(inside & (j == 0), dots[:, None], a)


@triton.jit
def _solve(a, rights, used, ridge, noise, SIZE: tl.constexpr):
    """γ of (K + ridge·tr K·I) γ = Dᵀr_0, [SIZE], and whether it could be solved.

    By L D Lᵀ: tr K must be above `noise`, every pivot positive, γ finite. a is K, rights Dᵀr_0.
    """
    at = tl.arange(0, SIZE)
    i, j = at[:, None], at[None, :]
    inside = (i < used) & (j < used)
    a = tl.where(inside, a, 0)
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
def anderson_stop(
    sums, x, gx, n, sample, at, record, window, limits, solving,
    NOISE: tl.constexpr, M: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The record after this step, and the new row of the Gram matrix.

    sums: ‖r‖², ‖g‖², ‖Δg‖², ‖Δx‖², ‖Δr‖², d_0 · d_j, r_0 · d_j; at: as `window_of` has them;
    solving: ridge, restart, every. Returns the status, how many differences the mixture takes (0: a
    damped step; below: it is taken back, and the step halved −1 − so often), their γ, and how often
    β is halved.
    """
    k, seen, head, count = at
    counters = record.counters + sample * COUNTERS
    scalars = record.scalars + sample * SCALARS
    acc: tl.constexpr = record.scalars.dtype.element_ty
    retreats = tl.load(counters + RETREATS)
    plain = tl.load(counters + PLAIN)
    halvings = tl.load(counters + HALVINGS)
    last = tl.load(scalars + RESIDUAL)
    reference = tl.load(scalars + REFERENCE)
    gain = tl.load(scalars + GAIN)
    own = limits_of(sample, record, limits)
    residual, value = norms_of(sums[0], sums[1], x, gx, n, WIDTH)
    finite = is_finite(residual) & is_finite(value)

    used = tl.full([], 0, tl.int32)
    gamma = tl.zeros([SIZE], acc)
    may_go_back = (seen > 1) | ((seen == 1) & (retreats > 0))
    if (finite == 0) & may_go_back & (retreats < _MAX_RETREATS):
        status = tl.where(k >= own[4], MAX_ITERATIONS, ACTIVE)
        is_mixture = (seen > 1) & (plain == 0)
        used = -1 - tl.where(is_mixture, 0, tl.maximum(retreats, 1))
        tl.debug_barrier()  # every warp has read the record
        tl.store(counters + STATUS, status)
        tl.store(counters + ITERATIONS, k)
        tl.store(counters + WINDOW, 1)
        tl.store(counters + RETREATS, retreats + 1)
        tl.store(counters + PLAIN, 0)
    else:
        status, since, _threshold = stop(residual, value, k, reference, sample, record, own)
        worse = (k - since >= _SLOW_ITERATIONS) & (residual > reference * _WORSE)
        if (status == ACTIVE) & worse & (halvings < _MAX_HALVINGS):
            halvings += 1
            tl.store(counters + HALVINGS, halvings)
            tl.store(counters + REFERENCE_ITERATION, k)
        if finite:
            ring = ring_of(window, sample, n, head, M)
            gram = window.gram + sample * (M * M)
            j = tl.arange(0, SIZE)
            scale = tl.full([], 1.0, acc)
            inverse = tl.full([], 1.0, acc)
            dgdg, dxdx, drdr = sums[2], sums[3], sums[4]
            system = _system_of(gram, head, count, sums[5], M, SIZE)
            rights = sums[6]
            if M > 1:
                diagonal = tl.sum(tl.where(j[:, None] == j[None, :], system, 0), axis=1)
                trusted = is_trusted(sums[0]) & is_trusted(dgdg) & is_trusted(dxdx)
                trusted = trusted & is_trusted(drdr) & is_trusted(tl.sum(diagonal))
                if (trusted == 0) & (seen > 0):
                    # `stop` has waited until every warp had stored the newest iterate.
                    scale, inverse, dgdg, dxdx, system, rights = _scaled_sums(
                        ring, n, count, acc, M, SIZE, WIDTH
                    )
                    drdr = entry(tl.sum(tl.where(j[:, None] == 0, system, 0), axis=0), 0, SIZE)
            noise = NOISE * (scale * value)
            if seen > 0:
                ring_slot = scalars + RING_START + (k + RING - 2) % RING
                tl.store(ring_slot, dgdg / dxdx)
                tl.store(scalars + GAIN, larger_gain(gain, dgdg, drdr, noise))
            if status == ACTIVE:
                grown = (k > 1) & (residual > number(solving[1], acc) * reference)
                restarts = grown | (retreats == _MAX_RETREATS)
                mixes = restarts | (plain >= solving[2] - 1)
                mixes = mixes | ((k > 1) & ((residual < last * _GOES_ON) == 0))
                used = tl.where(restarts, 0, count)
                dots = tl.sum(tl.where(j[:, None] == 0, system, 0), axis=0) * inverse * inverse
                slot = slot_of(head, j, M)  # kept by slot, so that nothing else moves
                tl.store(gram + head * M + slot, dots, mask=j < used)
                tl.store(gram + slot * M + head, dots, mask=j < used)
                tl.store(counters + HEAD, head)
                if mixes:
                    ridge = number(solving[0], acc)
                    gamma, solved = _solve(system, rights, used, ridge, noise * noise, SIZE)
                    # Where it can't be solved: a damped step, and the window starts anew from here.
                    used = tl.where(solved, used, 0)
                tl.store(counters + WINDOW, used + 1)
                tl.store(counters + PLAIN, tl.where(mixes, 0, plain + 1))
                used = tl.where(mixes, used, 0)
    return status, used, gamma, halvings
