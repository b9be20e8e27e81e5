"""Steps of convolutions in Triton: the layers fused, or one at a time; finished samples left out.

Memory is channels-last. A layer is an implicit GEMM: for each tap of its kernel, pixels × input
channels times input channels × outputs, summed in float32 (float64 for float64), by `tl.dot`.

`_chain_kernel` computes all layers, two or three of at most 64 channels. A program owns a tile of
one sample's image and computes each hidden layer on the tile and the halo that the layers after it
need. Triton cannot shift a register tile (`tl.gather` takes hundreds of shuffles a tap), so hidden
layers go through a few ten KiB of global memory a program, written and read by the same program and
so from its caches; a barrier of the block stands between. `_conv_kernel` computes one layer of any
width.

Both walk a compact list of the active samples. There are as many programs as the device holds at a
time; each takes the tiles of the listed samples whose number is its own, plus a multiple of the
number of programs. How many samples are listed is read on the device.

Given u, a sample's bits depend on the config, which the layers, precision and device choose, and
not on the batch or on who else is active.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...forms.activations import ACTIVATIONS
from ...forms.conv import ConvForm
from ...record import ACTIVE, accumulate_dtype
from .. import triton as STEPS  # whose Picard step reads the sums that the kernels leave
from . import configs
from .language import INTERPRETED, bound

__all__ = ["STEPS", "Chain", "active_samples", "pack_bits", "refusal"]

MOST_KERNEL = 7
_LIST_BLOCK = 1024  # samples that active_samples looks at in a pass
_PACK_BLOCK = 128  # pixels that a program of pack_bits packs

_ACTIVE = tl.constexpr(ACTIVE)


@triton.jit
def _tanh(x):
    # (1 - e)/(1 + e) cancels near 0; there Lambert's fraction, exact to float64 below 1/2. One
    # division of both, which costs more than either fraction's terms.
    z = x * x
    e = tl.exp(-2 * tl.abs(x))
    near = tl.abs(x) < 0.5
    above = tl.where(
        near, x * (135135 + z * (17325 + z * (378 + z))), tl.where(x < 0, e - 1, 1 - e)
    )
    return above / tl.where(near, 135135 + z * (62370 + z * (3150 + z * 28)), 1 + e)


@triton.jit
def _softplus(x, TERMS: tl.constexpr):
    # max(x, 0) + log1p(e^-|x|); log1p(e) = 2 artanh(s), s = e/(2 + e) <= 1/3, by its series.
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    z = s * s
    total = tl.zeros_like(x)
    for n in tl.static_range(TERMS):
        total = total * z + 1.0 / (2 * (TERMS - n) - 1)
    return tl.where(x < 0, 0, x) + 2 * s * total


@triton.jit
def _activate(x, NAME: tl.constexpr):
    if NAME == "relu":
        x = tl.where(x < 0, 0, x)  # unlike a maximum, leaves NaN
    elif NAME == "tanh":
        x = _tanh(x)
    elif NAME == "sigmoid":
        x = 1 / (1 + tl.exp(-x))
    elif NAME == "softplus":
        x = _softplus(x, 18 if x.dtype == tl.float64 else 8)
    elif NAME == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _operands(
    step,
    src,
    scale,
    weight,
    y,
    x,
    inside,
    height,
    width,
    o,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BOUNDED: tl.constexpr,
    ACC: tl.constexpr,
):
    """What a step of `_convolve` multiplies: pixels × BLOCK_K and BLOCK_K × outputs."""
    PACKED: tl.constexpr = ROWS < K * K * BLOCK_K
    row = step * BLOCK_K + tl.arange(0, BLOCK_K)
    pixel = y * width + x
    if PACKED:
        tap = row // CHANNELS
        c = row % CHANNELS
        dy = tap // K
        dx = tap % K
        mask = inside[:, None] & (row < K * K * CHANNELS)[None, :]
        if BOUNDED:
            at_y = y[:, None] + dy[None, :]
            at_x = x[:, None] + dx[None, :]
            mask &= (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        at = pixel[:, None] * CHANNELS + ((dy * width + dx) * CHANNELS + c)[None, :]
    else:
        BLOCKS: tl.constexpr = ROWS // (BLOCK_K * K * K)
        tap = step // BLOCKS
        c = step % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
        dy = tap // K
        dx = tap % K
        reached = inside
        if BOUNDED:
            reached &= (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        mask = reached[:, None]
        if CHANNELS < BLOCKS * BLOCK_K:
            mask = mask & (c < CHANNELS)[None, :]
        at = (pixel + dy * width + dx)[:, None] * CHANNELS + c[None, :]
    a = tl.load(src + at, mask=mask, other=0)
    if scale is not None:
        s = tl.load(scale + at, mask=mask, other=0)
        a = (a.to(ACC) * s.to(ACC)).to(src.dtype.element_ty)
    return a, tl.load(weight + row[:, None] * PADDED + o[None, :])


@triton.jit
def _multiply(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # which would multiply bfloat16's bits as integers
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _convolve(
    src,
    scale,
    weight,
    y,
    x,
    inside,
    height,
    width,
    o,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BOUNDED: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """The convolution at a block of pixels, [BLOCK_P, BLOCK_O].

    src is [height, width, CHANNELS]; y and x are where each pixel's first tap lies in it. Rows of
    the weight are (tap, channel): channels padded to BLOCK_K's multiple, or, where that would be
    mostly padding, all taps' channels one after another and padded once.

    AHEAD: each step's operands are loaded into registers while the step before is multiplied, so
    that what nine taps read nine times comes from L1. The compiler's own pipeline would copy it to
    shared memory past L1.
    """
    acc = tl.zeros((BLOCK_P, BLOCK_O), dtype=ACC)
    if AHEAD:
        a, b = _operands(
            0, src, scale, weight, y, x, inside, height, width, o,
            K, CHANNELS, ROWS, PADDED, BLOCK_K, BOUNDED, ACC,
        )  # fmt: skip
        for step in range(1, ROWS // BLOCK_K):
            next_a, next_b = _operands(
                step, src, scale, weight, y, x, inside, height, width, o,
                K, CHANNELS, ROWS, PADDED, BLOCK_K, BOUNDED, ACC,
            )  # fmt: skip
            acc = _multiply(a, b, acc, PRECISION)
            a = next_a
            b = next_b
        acc = _multiply(a, b, acc, PRECISION)
    else:
        for step in range(0, ROWS // BLOCK_K):
            a, b = _operands(
                step, src, scale, weight, y, x, inside, height, width, o,
                K, CHANNELS, ROWS, PADDED, BLOCK_K, BOUNDED, ACC,
            )  # fmt: skip
            acc = _multiply(a, b, acc, PRECISION)
    return acc


@triton.jit
def _add(acc, bias, u, sample, pixel, inside, o, OUTPUTS: tl.constexpr):
    if bias is not None:
        acc += tl.load(bias + o, mask=o < OUTPUTS, other=0).to(acc.dtype)[None, :]
    if u is not None:
        at = pixel[:, None] * OUTPUTS + o[None, :]
        mask = inside[:, None] & (o < OUTPUTS)[None, :]
        acc += tl.load(u + sample * OUTPUTS + at, mask=mask, other=0).to(acc.dtype)
    return acc


@triton.jit
def _slope_or_activation(
    acc,
    slope,
    sample,
    pixel,
    inside,
    o,
    first_word,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    if slope is None:
        acc = _activate(acc, ACTIVATION)
    elif BITS:
        WORDS: tl.constexpr = (OUTPUTS + 31) // 32
        bit = tl.zeros_like(acc).to(tl.int32)
        for word in tl.static_range((BLOCK_O + 31) // 32):
            j = first_word + word
            bits = tl.load(
                slope + sample * WORDS + pixel * WORDS + j, mask=inside & (j < WORDS), other=0
            )
            bit = tl.where((o // 32 == j)[None, :], bits[:, None] >> (o % 32)[None, :], bit)
        acc *= (bit & 1).to(acc.dtype)
    else:
        at = pixel[:, None] * OUTPUTS + o[None, :]
        mask = inside[:, None] & (o < OUTPUTS)[None, :]
        acc *= tl.load(slope + sample * OUTPUTS + at, mask=mask, other=0).to(acc.dtype)
    return acc


@triton.jit
def _hidden(
    src,
    scale,
    weight,
    bias,
    u,
    slope,
    dst,
    sample,
    y0,
    x0,
    height,
    width,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FROM_IMAGE: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """A hidden layer on a tile whose first pixel is (y0, x0), into dst, [TILE_H, TILE_W, BLOCK_O].

    src is the sample's image, or the layer before on this tile and K // 2 pixels around it.
    """
    o = tl.arange(0, BLOCK_O)
    for start in range(0, TILE_H * TILE_W, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row = p // TILE_W
        column = p % TILE_W
        y = y0 + row
        x = x0 + column
        kept = p < TILE_H * TILE_W
        inside = kept & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        if FROM_IMAGE:
            acc = _convolve(
                src, scale, weight, y - K // 2, x - K // 2, inside, height, width, o,
                K, CHANNELS, ROWS, BLOCK_O, BLOCK_P, BLOCK_K, BLOCK_O, True, AHEAD, PRECISION, ACC,
            )  # fmt: skip
        else:
            acc = _convolve(
                src, None, weight, row, column, kept, TILE_H + K - 1, TILE_W + K - 1, o,
                K, CHANNELS, ROWS, BLOCK_O, BLOCK_P, BLOCK_K, BLOCK_O, False, AHEAD, PRECISION, ACC,
            )  # fmt: skip
        pixel = y * width + x
        acc = _add(acc, bias, u, sample, pixel, inside, o, OUTPUTS)
        acc = _slope_or_activation(
            acc, slope, sample, pixel, inside, o, 0, OUTPUTS, BLOCK_O, BITS, ACTIVATION
        )
        # What lies outside the image is the next layer's padding.
        acc = tl.where(inside[:, None], acc, 0)
        at = p[:, None] * BLOCK_O + o[None, :]
        tl.store(dst + at, acc.to(dst.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _store(
    acc,
    dst,
    state,
    scale,
    alpha,
    sample,
    pixel,
    inside,
    o,
    OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMS: tl.constexpr,
):
    """φ(acc + α·scale ∘ state) into dst, and by pixel the squares of what changed and what is.

    α or the activation may be none; the squares are of the values as stored.
    """
    at = sample * OUTPUTS + (pixel[:, None] * OUTPUTS + o[None, :])
    mask = inside[:, None] & (o < OUTPUTS)[None, :]
    before = acc
    if NORMS or alpha is not None:
        before = tl.load(state + at, mask=mask, other=0).to(acc.dtype)
    if alpha is not None:
        t = before
        if scale is not None:
            t *= tl.load(scale + at, mask=mask, other=0).to(acc.dtype)
        acc += tl.load(alpha).to(acc.dtype) * t
    acc = _activate(acc, ACTIVATION)
    stored = acc.to(dst.dtype.element_ty)
    tl.store(dst + at, stored, mask=mask)
    value = tl.where(mask, stored.to(acc.dtype), 0)
    residual = value - before
    return tl.sum(residual * residual, 1), tl.sum(value * value, 1)


@triton.jit(do_not_specialize=["height", "width", "across", "tiles"])
def _conv_kernel(
    src,
    src_scale,
    dst,
    weight,
    bias,
    u,
    slope,
    state,
    state_scale,
    alpha,
    norms,
    index,
    count,
    height,
    width,
    across,
    tiles,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PADDED_O: tl.constexpr,
    BLOCK_O: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One layer of the listed samples; a tile is TILE_H × TILE_W pixels × BLOCK_O outputs."""
    BLOCK_P: tl.constexpr = TILE_H * TILE_W
    PARTS: tl.constexpr = PADDED_O // BLOCK_O
    p = tl.arange(0, BLOCK_P)
    items, programs = tl.load(count) * tiles, tl.num_programs(0)
    for item in range(bound(tl.program_id(0)), bound(items), bound(programs)):
        b = tl.load(index + item // tiles)
        tile = item % tiles
        part = tile % PARTS
        place = tile // PARTS
        y = place // across * TILE_H + p // TILE_W
        x = place % across * TILE_W + p % TILE_W
        inside = (y < height) & (x < width)
        pixel = y * width + x
        sample = b.to(tl.int64) * (height * width)
        o = part * BLOCK_O + tl.arange(0, BLOCK_O)
        at_source = sample * CHANNELS
        scale = None
        if src_scale is not None:
            scale = src_scale + at_source
        acc = _convolve(
            src + at_source, scale, weight, y - K // 2, x - K // 2, inside, height, width, o,
            K, CHANNELS, ROWS, PADDED_O, BLOCK_P, BLOCK_K, BLOCK_O, True, AHEAD, PRECISION, ACC,
        )  # fmt: skip
        acc = _add(acc, bias, u, sample, pixel, inside, o, OUTPUTS)
        if slope is not None:
            acc = _slope_or_activation(
                acc,
                slope,
                sample,
                pixel,
                inside,
                o,
                part * BLOCK_O // 32,
                OUTPUTS,
                BLOCK_O,
                BITS,
                "",
            )
        changed, value = _store(
            acc, dst, state, state_scale, alpha, sample, pixel, inside, o, OUTPUTS, ACTIVATION,
            norms is not None,
        )  # fmt: skip
        if norms is not None:
            pair = norms + (b * tiles + tile) * 2
            tl.store(pair, tl.sum(changed, 0).to(norms.dtype.element_ty))
            tl.store(pair + 1, tl.sum(value, 0).to(norms.dtype.element_ty))


@triton.jit(do_not_specialize=["height", "width", "across", "tiles"])
def _chain_kernel(
    x,
    out,
    scale,
    alpha,
    norms,
    index,
    count,
    scratch,
    weight_1,
    bias_1,
    u_1,
    slope_1,
    weight_2,
    bias_2,
    u_2,
    slope_2,
    weight_3,
    bias_3,
    u_3,
    height,
    width,
    across,
    tiles,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    K_1: tl.constexpr,
    ROWS_1: tl.constexpr,
    BLOCK_K_1: tl.constexpr,
    O_1: tl.constexpr,
    BLOCK_O_1: tl.constexpr,
    K_2: tl.constexpr,
    ROWS_2: tl.constexpr,
    BLOCK_K_2: tl.constexpr,
    O_2: tl.constexpr,
    BLOCK_O_2: tl.constexpr,
    K_3: tl.constexpr,
    ROWS_3: tl.constexpr,
    BLOCK_K_3: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BITS: tl.constexpr,
    HIDDEN_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """All layers of the listed samples; weight_2 None: there are two, called 1 and 3.

    scratch, [programs, ...]: a program's hidden layers on a tile and its halo, one after the other.
    """
    MIDDLE: tl.constexpr = weight_2 is not None
    # Tiles of the layer before the last, and of the first.
    TILE_H_2: tl.constexpr = TILE_H + K_3 - 1
    TILE_W_2: tl.constexpr = TILE_W + K_3 - 1
    TILE_H_1: tl.constexpr = TILE_H_2 + K_2 - 1
    TILE_W_1: tl.constexpr = TILE_W_2 + K_2 - 1
    SIZE_1: tl.constexpr = TILE_H_1 * TILE_W_1 * BLOCK_O_1
    SIZE_2: tl.constexpr = TILE_H_2 * TILE_W_2 * BLOCK_O_2 if MIDDLE else 0
    program = tl.program_id(0)
    first = scratch + program.to(tl.int64) * (SIZE_1 + SIZE_2)
    last = first
    if MIDDLE:
        last = first + SIZE_1
    o = tl.arange(0, BLOCK_C)
    items, programs = tl.load(count) * tiles, tl.num_programs(0)
    for item in range(bound(program), bound(items), bound(programs)):
        b = tl.load(index + item // tiles)
        tile = item % tiles
        y0 = tile // across * TILE_H
        x0 = tile % across * TILE_W
        sample = b.to(tl.int64) * (height * width)
        own_scale = None
        if scale is not None:
            own_scale = scale + sample * C
        _hidden(
            x + sample * C, own_scale, weight_1, bias_1, u_1, slope_1, first, sample,
            y0 - K_3 // 2 - K_2 // 2, x0 - K_3 // 2 - K_2 // 2, height, width,
            K_1, C, ROWS_1, BLOCK_K_1, O_1, BLOCK_O_1, TILE_H_1, TILE_W_1, BLOCK_P,
            True, BITS, HIDDEN_ACTIVATION, AHEAD, PRECISION, ACC,
        )  # fmt: skip
        tl.debug_barrier()
        if MIDDLE:
            _hidden(
                first, None, weight_2, bias_2, u_2, slope_2, last, sample,
                y0 - K_3 // 2, x0 - K_3 // 2, height, width,
                K_2, BLOCK_O_1, ROWS_2, BLOCK_K_2, O_2, BLOCK_O_2, TILE_H_2, TILE_W_2, BLOCK_P,
                False, BITS, HIDDEN_ACTIVATION, AHEAD, PRECISION, ACC,
            )  # fmt: skip
            tl.debug_barrier()
        changed = tl.zeros((BLOCK_P,), dtype=ACC)
        value = tl.zeros((BLOCK_P,), dtype=ACC)
        for start in range(0, TILE_H * TILE_W, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            row = p // TILE_W
            column = p % TILE_W
            kept = p < TILE_H * TILE_W
            inside = kept & (y0 + row < height) & (x0 + column < width)
            pixel = (y0 + row) * width + x0 + column
            acc = _convolve(
                last, None, weight_3, row, column, kept, TILE_H_2, TILE_W_2, o,
                K_3, BLOCK_O_2 if MIDDLE else BLOCK_O_1, ROWS_3, BLOCK_C, BLOCK_P, BLOCK_K_3,
                BLOCK_C, False, AHEAD, PRECISION, ACC,
            )  # fmt: skip
            acc = _add(acc, bias_3, u_3, sample, pixel, inside, o, C)
            squares = _store(
                acc, out, x, scale, alpha, sample, pixel, inside, o, C, ACTIVATION,
                norms is not None,
            )  # fmt: skip
            changed += squares[0]
            value += squares[1]
        if norms is not None:
            pair = norms + (b * tiles + tile) * 2
            tl.store(pair, tl.sum(changed, 0).to(norms.dtype.element_ty))
            tl.store(pair + 1, tl.sum(value, 0).to(norms.dtype.element_ty))
        # With three layers a barrier above stands between a layer's readers and its next writer.
        if not MIDDLE:
            tl.debug_barrier()


@triton.jit(do_not_specialize=["stride", "b"])
def _active_kernel(status, index, count, stride, b, BLOCK: tl.constexpr):
    """One program: the fixed order needs a running count."""
    found = 0
    for start in range(0, bound(b), BLOCK):
        sample = start + tl.arange(0, BLOCK)
        at = sample.to(tl.int64) * stride
        active = (tl.load(status + at, mask=sample < b, other=_ACTIVE + 1) == _ACTIVE).to(tl.int32)
        tl.store(index + found + tl.cumsum(active, 0) - 1, sample, mask=active != 0)
        found += tl.sum(active, 0)
    tl.store(count, found)


@triton.jit(do_not_specialize=["pixels"])
def _pack_kernel(src, out, pixels, OUTPUTS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 32)
    for word in tl.static_range(WORDS):
        o = word * 32 + bit
        mask = (p < pixels)[:, None] & (o < OUTPUTS)[None, :]
        value = tl.load(src + p[:, None] * OUTPUTS + o[None, :], mask=mask, other=0)
        value = (value != 0).to(tl.int32) << bit[None, :]
        tl.store(out + p * WORDS + word, tl.sum(value, 1), mask=p < pixels)


def active_samples(
    status: Tensor, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The samples that still iterate, ascending, as the kernels here take them.

    Args:
        status: int32 [B] of any stride, `Progress.counters[:, STATUS]`: ACTIVE where one iterates.
        into: the two tensors to write; None: new ones.

    Returns:
        index, int32 [B], of which the first count entries are written, and count, int32 [1]. The
        host does not wait for them.
    """
    b, device = len(status), status.device
    if into is None:
        into = (
            torch.empty(b, dtype=torch.int32, device=device),
            torch.empty(1, dtype=torch.int32, device=device),
        )
    index, count = into
    with _on(device):
        _active_kernel[(1,)](status, index, count, status.stride(0), b, BLOCK=_LIST_BLOCK)
    return into


def pack_bits(slopes: Tensor) -> Tensor:
    """Slopes that are 0 or 1 as bits.

    Args:
        slopes: bool, [B, O, H, W], channels-last.

    Returns:
        int32, [B, H, W, ceil(O / 32)]; bit o % 32 of word o // 32 is channel o's.
    """
    values = _rows(slopes, "slopes").view(torch.uint8)
    *pixels, channels = values.shape
    words = triton.cdiv(channels, 32)
    packed = torch.empty(*pixels, words, dtype=torch.int32, device=slopes.device)
    count = math.prod(pixels)
    if count:
        with _on(slopes.device):
            _pack_kernel[(triton.cdiv(count, _PACK_BLOCK),)](
                values, packed, count, OUTPUTS=channels, WORDS=words, BLOCK=_PACK_BLOCK
            )
    return packed


def refusal(form: ConvForm, x: Tensor) -> str | None:
    """Why `Chain` does not take this form, of right shapes, for states like x, or None."""
    if x.device.type == "cpu":
        if not INTERPRETED:
            return "Triton has no kernels for the CPU; TRITON_INTERPRET=1 runs them there, slowly"
    elif x.device.type != "cuda":
        return f"its Triton kernels are for CUDA devices, and x is on {x.device}"
    elif (machine(x.device)[0] or 0) < 80:
        return "a CUDA device older than compute capability 8.0"
    if x.dtype not in _PRECISION_NAMES:
        return f"no kernels for {x.dtype}"
    for t in form.tensors:
        if t.device != x.device or t.dtype not in (x.dtype, torch.bool):
            return f"x is {x.dtype} on {x.device}, another tensor {t.dtype} on {t.device}"
    for w in form.weights:
        k = w.shape[-1]
        if w.shape[-2] != k or k % 2 == 0 or k > MOST_KERNEL:
            return (
                f"kernels must be square, odd and at most {MOST_KERNEL}, got {tuple(w.shape[-2:])}"
            )
    for name in (form.activation, form.hidden_activation):
        if name not in ACTIVATIONS:
            return f"no kernels for activation {name!r}"
    b, _, height, width = x.shape
    widest = max(w.shape[0] for w in form.weights)
    if height * width * configs.padded(max(widest, x.shape[1])) >= 2**31 or b * height * width >= (
        2**31
    ):
        return "a sample's layer, or the batch's pixels, beyond 2³¹ values"
    return None


# Of products, by dtype; float32's are tf32 or exact.
_PRECISION_NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}


@dataclass(frozen=True)
class _Layer:
    """A layer as the kernels take it; per-sample tensors are [B, H, W, ...]."""

    weight: Tensor  # [rows, padded outputs]; see _convolve
    bias: Tensor | None
    u: Tensor | None
    slope: Tensor | None  # int32: bits
    kernel: int
    inputs: int  # channels its input has in memory
    outputs: int
    block_k: int

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def padded_outputs(self) -> int:
        return self.weight.shape[1]


class Chain:
    """The step of a `ConvForm` by these kernels.

    Weights are packed and the workspace is allocated once, by operations on the device alone, so
    that a CUDA graph can capture it.

    Args:
        form: the step.
        like: a state, [B, C, H, W], channels-last; only its shape, dtype and device are used.
        tf32: whether float32's products may round their operands to tf32.
        config: how to run; None: as `configs` has it for these layers and this device.

    Attributes:
        tiles: partial norms a sample.

    Raises:
        ValueError: for a form that these kernels don't take; says why.
    """

    def __init__(
        self, form: ConvForm, like: Tensor, *, tf32: bool, config: configs.Config | None = None
    ) -> None:
        reason = refusal(form, like)
        if reason is not None:
            raise ValueError(f"the Triton convolutions do not take this step: {reason}")
        b, c, height, width = self._state = like.shape
        self._dtype = like.dtype
        self._shape = configs.Shape(
            (c, *(w.shape[0] for w in form.weights)), tuple(w.shape[-1] for w in form.weights)
        )
        name = _PRECISION_NAMES[like.dtype]
        if tf32 and name == "float32":
            name = "tf32"
        capability, multiprocessors = machine(like.device)
        config = self.config = config or configs.choose(self._shape, name, capability)
        acc = accumulate_dtype(like.dtype)
        self._layers = [self._layer(form, layer) for layer in range(len(form.weights))]
        self._hidden_activation, self._activation = form.hidden_activation, form.activation
        self._scale = None if form.scale is None else _rows(form.scale, "scale")
        self._alpha: Tensor | None = None
        if form.residual != 0:
            self._alpha = torch.full((1,), form.residual, dtype=acc, device=like.device)
        self._options: dict[str, Any] = {
            "AHEAD": config.stages == 1,
            "PRECISION": "tf32" if name == "tf32" else "ieee",
            "ACC": tl.float64 if acc == torch.float64 else tl.float32,
            "TILE_H": config.tile[0],
            "TILE_W": config.tile[1],
            "num_warps": config.warps,
            "num_stages": config.stages,
            "maxnreg": config.registers,
        }
        self._across = triton.cdiv(width, config.tile[1])
        places = triton.cdiv(height, config.tile[0]) * self._across
        self._programs = multiprocessors * config.blocks
        if config.fused:
            self._parts = [1]
            values = configs.scratch_values(self._shape, config.tile)
            programs = min(self._programs, b * places)
            self._workspace = [torch.empty(programs, values, dtype=like.dtype, device=like.device)]
        else:
            self._parts = [triton.cdiv(y.outputs, self._block_o(y)) for y in self._layers]
            # Hidden layers take turns: each reads the one before.
            self._workspace = [
                torch.empty(
                    b * height * width * max(y.outputs for y in taking),
                    dtype=like.dtype,
                    device=like.device,
                )
                for taking in (self._layers[:-1][::2], self._layers[:-1][1::2])
                if taking
            ]
        self._places = places
        self.tiles = places * self._parts[-1]

    def _block_o(self, layer: _Layer) -> int:
        return min(self.config.outputs, configs.padded(layer.outputs))

    def _layer(self, form: ConvForm, at: int) -> _Layer:
        weight = form.weights[at].detach()
        outputs, inputs, kernel, _ = weight.shape
        block_k = min(configs.padded(inputs), self.config.inputs)
        rows = weight.to(self._dtype).permute(2, 3, 1, 0).reshape(kernel**2, inputs, outputs)
        in_memory = inputs
        if self.config.fused and at > 0:
            in_memory = configs.padded(inputs)
        if in_memory <= configs.MOST_PACKED:
            block_k = min(configs.padded(kernel**2 * inputs), self.config.inputs)
            rows = rows.reshape(1, kernel**2 * inputs, outputs)
        padding = -rows.shape[1] % block_k
        block_o = configs.padded(outputs)
        if not self.config.fused:
            block_o = min(block_o, self.config.outputs)
        rows = F.pad(rows, (0, -outputs % block_o, 0, padding))
        slope = None
        if form.slopes is not None and at < len(form.slopes):
            slope = form.slopes[at]
            slope = pack_bits(slope) if slope.dtype == torch.bool else _rows(slope, "slopes")
        bias, u = form.biases[at], form.u[at]
        return _Layer(
            weight=rows.reshape(-1, rows.shape[2]).contiguous(),
            bias=None if bias is None else bias.detach().contiguous(),
            u=None if u is None else _rows(u, "u"),
            slope=slope,
            kernel=kernel,
            inputs=in_memory,
            outputs=outputs,
            block_k=block_k,
        )

    def __call__(
        self, x: Tensor, out: Tensor, index: Tensor, count: Tensor, norms: Tensor | None = None
    ) -> None:
        """out[b] = g(x)[b] for the samples b in index[:count]; other samples keep every bit.

        Args:
            x: [B, C, H, W], channels-last, as `like`.
            out: likewise; other memory than x, whose neighbouring pixels are read.
            index: int32 [B], and
            count: int32 [1]; of `active_samples`.
            norms: [B, tiles, 2], float32 (float64 for float64): for each listed sample the parts,
                in a fixed order, of ‖g(x) − x‖² and ‖g(x)‖² over the values as stored in out.
        """
        if x.shape != self._state or x.dtype != self._dtype:
            raise ValueError(
                f"x must be as the state that the chain was made for, {tuple(self._state)} "
                f"of {self._dtype}; got {tuple(x.shape)} of {x.dtype}"
            )
        if x.numel() == 0:
            return
        x, out = _rows(x, "x", view=True), _rows(out, "out", view=True)
        if x.data_ptr() == out.data_ptr():
            raise ValueError("out must be other memory than x: its neighbours' pixels are read")
        with _on(x.device):
            (self._fused if self.config.fused else self._by_layer)(x, out, index, count, norms)

    def _fused(
        self, x: Tensor, out: Tensor, index: Tensor, count: Tensor, norms: Tensor | None
    ) -> None:
        b, height, width, c = x.shape
        first, last = self._layers[0], self._layers[-1]
        middle = self._layers[1] if len(self._layers) == 3 else None
        slopes = [y.slope for y in self._layers]
        _chain_kernel[(min(self._programs, b * self._places),)](
            x,
            out,
            self._scale,
            self._alpha,
            norms,
            index,
            count,
            self._workspace[0],
            first.weight,
            first.bias,
            first.u,
            first.slope,
            *((middle.weight, middle.bias, middle.u, middle.slope) if middle else (None,) * 4),
            last.weight,
            last.bias,
            last.u,
            height,
            width,
            self._across,
            self._places,
            C=c,
            BLOCK_C=last.padded_outputs,
            K_1=first.kernel,
            ROWS_1=first.rows,
            BLOCK_K_1=first.block_k,
            O_1=first.outputs,
            BLOCK_O_1=first.padded_outputs,
            # Without a middle layer the first one's channels are what the last reads.
            K_2=middle.kernel if middle else 1,
            ROWS_2=middle.rows if middle else 0,
            BLOCK_K_2=middle.block_k if middle else 16,
            O_2=middle.outputs if middle else 0,
            BLOCK_O_2=(middle or first).padded_outputs,
            K_3=last.kernel,
            ROWS_3=last.rows,
            BLOCK_K_3=last.block_k,
            BLOCK_P=self.config.pixels,
            BITS=slopes[0] is not None and slopes[0].dtype == torch.int32,
            HIDDEN_ACTIVATION=self._hidden_activation,
            ACTIVATION=self._activation,
            **self._options,
        )

    def _by_layer(
        self, x: Tensor, out: Tensor, index: Tensor, count: Tensor, norms: Tensor | None
    ) -> None:
        b, height, width, _ = x.shape
        src = x
        for at, layer in enumerate(self._layers):
            final = at + 1 == len(self._layers)
            dst = out if final else self._workspace[at % 2]
            tiles = self._places * self._parts[at]
            _conv_kernel[(min(self._programs, b * tiles),)](
                src,
                self._scale if at == 0 else None,
                dst,
                layer.weight,
                layer.bias,
                layer.u,
                layer.slope,
                x if final else None,
                self._scale if final else None,
                self._alpha if final else None,
                norms if final else None,
                index,
                count,
                height,
                width,
                self._across,
                tiles,
                K=layer.kernel,
                CHANNELS=layer.inputs,
                ROWS=layer.rows,
                BLOCK_K=layer.block_k,
                OUTPUTS=layer.outputs,
                PADDED_O=layer.padded_outputs,
                BLOCK_O=self._block_o(layer),
                BITS=layer.slope is not None and layer.slope.dtype == torch.int32,
                ACTIVATION=(
                    self._activation
                    if final
                    else "identity"
                    if layer.slope is not None
                    else self._hidden_activation
                ),
                **self._options,
            )
            src = dst


def _rows(t: Tensor, name: str, view: bool = False) -> Tensor:
    """[B, C, H, W] as [B, H, W, C], contiguous; view: or an error where that takes a copy."""
    rows = t.detach().permute(0, 2, 3, 1)
    if view and not rows.is_contiguous():
        raise ValueError(
            f"{name} must be channels-last and dense, got shape {tuple(t.shape)} with strides "
            f"{t.stride()}; use {name}.contiguous(memory_format=torch.channels_last)"
        )
    return rows.contiguous()


@cache
def machine(device: torch.device) -> tuple[int | None, int]:
    """A device's capability, as 90 for 9.0, and multiprocessors; the interpreter has two."""
    if device.type != "cuda":
        return None, 2
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Where kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
