# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
"""Norms of rows and what follows from them, at any scale: csrc/math/norm.h and gain.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ... import record as progress
from .language import bound

__all__ = ["is_finite", "is_trusted", "larger_gain", "norms_of", "residual_and_value", "scale_for"]


_LEAST_GAIN = tl.constexpr(progress.LEAST_GAIN)


@triton.jit
def is_finite(a):
    """Whether it is neither infinite nor NaN."""
    return a - a == 0


@triton.jit
def is_trusted(squares):
    """Whether sums of squares neither under- nor overflowed, nor lost what their last bit shows."""
    if squares.dtype == tl.float64:
        trusted = (squares > 2.0**-900) & (squares < 2.0**1000)
    else:
        trusted = (squares > 2.0**-80) & (squares < 2.0**100)
    return trusted


@triton.jit
def scale_for(largest):
    """The power of two by which a largest |entry| comes near 1, and its inverse: both are normal.

    1 where nothing is to be scaled: where it is 0 or not finite.
    """
    if largest.dtype == tl.float64:
        exponent = (largest.to(tl.int64, bitcast=True) >> 52) & 2047
        field = tl.minimum(tl.maximum(2046 - exponent, 1), 2045)
        scale = (field << 52).to(tl.float64, bitcast=True)
        inverse = ((2046 - field) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
        field = tl.minimum(tl.maximum(254 - exponent, 1), 253)
        scale = (field << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - field) << 23).to(tl.float32, bitcast=True)
    useful = (largest > 0) & is_finite(largest)
    return tl.where(useful, scale, 1.0), tl.where(useful, inverse, 1.0)


@triton.jit
def norms_of(r_squares, g_squares, x, gx, n, WIDTH: tl.constexpr):
    """‖g(x) − x‖ and ‖g(x)‖ of a row, to which x and gx point, from their squares.

    One whose squares may have under- or overflowed is measured again, scaled.
    """
    acc: tl.constexpr = r_squares.dtype
    r_norm = tl.sqrt(r_squares)
    g_norm = tl.sqrt(g_squares)
    if (is_trusted(r_squares) & is_trusted(g_squares)) == 0:
        r_scale = tl.full([], 1, acc)
        g_scale = tl.full([], 1, acc)
        r_inverse = tl.full([], 1, acc)
        g_inverse = tl.full([], 1, acc)
        r_total = r_squares
        g_total = g_squares
        for attempt in range(0, 2):  # the largest entries first, then the sums
            r_largest = tl.zeros([WIDTH], acc)
            g_largest = tl.zeros([WIDTH], acc)
            r_scaled = tl.zeros([WIDTH], acc)
            g_scaled = tl.zeros([WIDTH], acc)
            for start in range(0, bound(n), WIDTH):
                r, g = residual_and_value(x, gx, start + tl.arange(0, WIDTH), n, acc)
                r *= r_scale
                g *= g_scale
                r_largest = tl.where(tl.abs(r) > r_largest, tl.abs(r), r_largest)
                g_largest = tl.where(tl.abs(g) > g_largest, tl.abs(g), g_largest)
                r_scaled += r * r
                g_scaled += g * g
            r_total = tl.sum(r_scaled)
            g_total = tl.sum(g_scaled)
            if attempt == 0:
                r_scale, r_inverse = scale_for(tl.max(r_largest))
                g_scale, g_inverse = scale_for(tl.max(g_largest))
        r_norm = tl.where(is_trusted(r_squares), r_norm, tl.sqrt(r_total) * r_inverse)
        g_norm = tl.where(is_trusted(g_squares), g_norm, tl.sqrt(g_total) * g_inverse)
    return r_norm, g_norm


@triton.jit
def residual_and_value(x, gx, i, n, ACC: tl.constexpr):
    """g(x) − x and g(x) at i, 0 beyond n."""
    g = tl.load(gx + i, mask=i < n, other=0).to(ACC)
    return g - tl.load(x + i, mask=i < n, other=0).to(ACC), g


@triton.jit
def larger_gain(gain, value_squares, residual_squares, noise):
    """The square of the larger gain: the one known, or that of a pair of iterates.

    Its sums are of squares of scaled differences, and noise is scaled likewise.
    """
    ratio = value_squares / residual_squares
    found = tl.where(ratio > _LEAST_GAIN, ratio, _LEAST_GAIN)
    return tl.where((residual_squares > noise * noise) & (found > gain), found, gain)
