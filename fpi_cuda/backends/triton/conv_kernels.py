# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"
"""The kernels of steps of convolutions; `conv` launches them.

Memory is channels-last. A layer is an implicit GEMM: for each tap of its kernel, pixels × input
channels times input channels × outputs, summed in float32 (float64 for float64), by `tl.dot`.

`chain_kernel` computes all layers, two or three of at most 64 channels. A program owns a tile of
one sample's image and computes each hidden layer on the tile and the halo that the layers after it
need. Triton cannot shift a register tile (`tl.gather` takes hundreds of shuffles a tap), so hidden
layers go through a few ten KiB of global memory a program, written and read by the same program and
so from its caches; a barrier of the block stands between. `conv_kernel` computes one layer of any
width.

Both walk a compact list of the active samples. There are as many programs as the device holds at a
time; each takes the tiles of the listed samples whose number is its own, plus a multiple of the
number of programs. How many samples are listed is read on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...record import ACTIVE
from .language import INTERPRETED, bound

_ACTIVE = tl.constexpr(ACTIVE)


class Layer(NamedTuple):
    """A layer as the kernels take it; per-sample tensors are [B, H, W, ...]."""

    weight: Tensor  # [ROWS, PADDED]; see _convolve
    bias: Tensor | None
    u: Tensor | None
    slope: Tensor | None  # int32: bits
    K: tl.constexpr  # its kernel's size
    CHANNELS: tl.constexpr  # that its input has in memory
    OUTPUTS: tl.constexpr
    ROWS: tl.constexpr
    PADDED: tl.constexpr  # outputs
    BLOCK_K: tl.constexpr


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
    step, src, scale, layer, pixels, o, BOUNDED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """What a step of `_convolve` multiplies: pixels × BLOCK_K and BLOCK_K × outputs."""
    y, x, inside, height, width = pixels
    K: tl.constexpr = layer.K
    CHANNELS: tl.constexpr = layer.CHANNELS
    BLOCK_K: tl.constexpr = layer.BLOCK_K
    PACKED: tl.constexpr = layer.ROWS < K * K * BLOCK_K
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
        BLOCKS: tl.constexpr = layer.ROWS // (BLOCK_K * K * K)
        tap = step // BLOCKS
        # As a tensor, because a constant of the interpreter's can't be what an int is divided by.
        c = tl.full([], step, tl.int32) % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
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
    return a, tl.load(layer.weight + row[:, None] * layer.PADDED + o[None, :])


@triton.jit
def _multiply(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # which would multiply bfloat16's bits as integers
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _convolve(
    src, scale, layer, pixels, o, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
    BOUNDED: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The convolution at a block of pixels, [BLOCK_P, BLOCK_O].

    src is [height, width, CHANNELS]. pixels: y and x of each pixel's first tap in it, whether the
    pixel counts, height, width. Rows of the weight are (tap, channel): channels padded to BLOCK_K's
    multiple, or, where that would be mostly padding, all taps' channels one after another and
    padded once.

    AHEAD: each step's operands are loaded into registers while the step before is multiplied, so
    that what nine taps read nine times comes from L1. The compiler's own pipeline would copy it to
    shared memory past L1.
    """
    STEPS: tl.constexpr = layer.ROWS // layer.BLOCK_K
    acc = tl.zeros((BLOCK_P, BLOCK_O), dtype=ACC)
    if AHEAD:
        a, b = _operands(0, src, scale, layer, pixels, o, BOUNDED, ACC)
        for step in range(1, STEPS):
            next_a, next_b = _operands(step, src, scale, layer, pixels, o, BOUNDED, ACC)
            acc = _multiply(a, b, acc, PRECISION)
            a = next_a
            b = next_b
        acc = _multiply(a, b, acc, PRECISION)
    else:
        for step in range(0, STEPS):
            a, b = _operands(step, src, scale, layer, pixels, o, BOUNDED, ACC)
            acc = _multiply(a, b, acc, PRECISION)
    return acc


@triton.jit
def _add(acc, layer, sample, pixel, inside, o):
    OUTPUTS: tl.constexpr = layer.OUTPUTS
    if layer.bias is not None:
        acc += tl.load(layer.bias + o, mask=o < OUTPUTS, other=0).to(acc.dtype)[None, :]
    if layer.u is not None:
        at = pixel[:, None] * OUTPUTS + o[None, :]
        mask = inside[:, None] & (o < OUTPUTS)[None, :]
        acc += tl.load(layer.u + sample * OUTPUTS + at, mask=mask, other=0).to(acc.dtype)
    return acc


@triton.jit
def _slope_or_activation(
    acc, layer, sample, pixel, inside, o, first_word,
    BLOCK_O: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    OUTPUTS: tl.constexpr = layer.OUTPUTS
    if layer.slope is None:
        acc = _activate(acc, ACTIVATION)
    elif layer.slope.dtype.element_ty == tl.int32:
        WORDS: tl.constexpr = (OUTPUTS + 31) // 32
        bit = tl.zeros_like(acc).to(tl.int32)
        words = layer.slope + sample * WORDS + pixel * WORDS
        for word in tl.static_range((BLOCK_O + 31) // 32):
            j = first_word + word
            bits = tl.load(words + j, mask=inside & (j < WORDS), other=0)
            bit = tl.where((o // 32 == j)[None, :], bits[:, None] >> (o % 32)[None, :], bit)
        acc *= (bit & 1).to(acc.dtype)
    else:
        at = pixel[:, None] * OUTPUTS + o[None, :]
        mask = inside[:, None] & (o < OUTPUTS)[None, :]
        acc *= tl.load(layer.slope + sample * OUTPUTS + at, mask=mask, other=0).to(acc.dtype)
    return acc


@triton.jit
def _hidden(
    src, scale, layer, dst, sample, y0, x0, height, width,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_P: tl.constexpr, FROM_IMAGE: tl.constexpr,
    ACTIVATION: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A hidden layer on a tile whose first pixel is (y0, x0), into dst, [TILE_H, TILE_W, PADDED].

    src is the sample's image, or the layer before on this tile and K // 2 pixels around it.
    """
    K: tl.constexpr = layer.K
    BLOCK_O: tl.constexpr = layer.PADDED
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
            pixels = (y - K // 2, x - K // 2, inside, height, width)
        else:
            pixels = (row, column, kept, TILE_H + K - 1, TILE_W + K - 1)
        acc = _convolve(
            src, scale, layer, pixels, o, BLOCK_P, BLOCK_O, FROM_IMAGE, AHEAD, PRECISION, ACC
        )
        pixel = y * width + x
        acc = _add(acc, layer, sample, pixel, inside, o)
        acc = _slope_or_activation(acc, layer, sample, pixel, inside, o, 0, BLOCK_O, ACTIVATION)
        # What lies outside the image is the next layer's padding.
        acc = tl.where(inside[:, None], acc, 0)
        at = p[:, None] * BLOCK_O + o[None, :]
        tl.store(dst + at, acc.to(dst.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _store(
    acc, dst, state, scale, alpha, sample, pixel, inside, o,
    OUTPUTS: tl.constexpr, ACTIVATION: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
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
def conv_kernel(
    src, src_scale, dst, layer, state, state_scale, alpha, norms, index, count,
    height, width, across, tiles,
    BLOCK_O: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, ACTIVATION: tl.constexpr,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One layer of the listed samples; a tile is TILE_H × TILE_W pixels × BLOCK_O outputs."""
    BLOCK_P: tl.constexpr = TILE_H * TILE_W
    PARTS: tl.constexpr = layer.PADDED // BLOCK_O
    K: tl.constexpr = layer.K
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
        at_source = sample * layer.CHANNELS
        scale = None
        if src_scale is not None:
            scale = src_scale + at_source
        acc = _convolve(
            src + at_source, scale, layer, (y - K // 2, x - K // 2, inside, height, width), o,
            BLOCK_P, BLOCK_O, True, AHEAD, PRECISION, ACC,
        )  # fmt: skip
        acc = _add(acc, layer, sample, pixel, inside, o)
        if layer.slope is not None:
            word = part * BLOCK_O // 32
            acc = _slope_or_activation(acc, layer, sample, pixel, inside, o, word, BLOCK_O, "")
        changed, value = _store(
            acc, dst, state, state_scale, alpha, sample, pixel, inside, o,
            layer.OUTPUTS, ACTIVATION, norms is not None,
        )  # fmt: skip
        if norms is not None:
            pair = norms + (b * tiles + tile) * 2
            tl.store(pair, tl.sum(changed, 0).to(norms.dtype.element_ty))
            tl.store(pair + 1, tl.sum(value, 0).to(norms.dtype.element_ty))


@triton.jit(do_not_specialize=["height", "width", "across", "tiles"])
def chain_kernel(
    x, out, scale, alpha, norms, index, count, scratch, first, middle, last,
    height, width, across, tiles,
    MIDDLE: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_P: tl.constexpr,
    HIDDEN_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All layers of the listed samples: two, or three where MIDDLE.

    scratch, [programs, ...]: a program's hidden layers on a tile and its halo, one after the other.
    """
    K_2: tl.constexpr = middle.K if MIDDLE else 1
    K_3: tl.constexpr = last.K
    C: tl.constexpr = last.OUTPUTS
    BLOCK_C: tl.constexpr = last.PADDED
    # Tiles of the layer before the last, and of the first.
    TILE_H_2: tl.constexpr = TILE_H + K_3 - 1
    TILE_W_2: tl.constexpr = TILE_W + K_3 - 1
    TILE_H_1: tl.constexpr = TILE_H_2 + K_2 - 1
    TILE_W_1: tl.constexpr = TILE_W_2 + K_2 - 1
    SIZE_1: tl.constexpr = TILE_H_1 * TILE_W_1 * first.PADDED
    SIZE_2: tl.constexpr = TILE_H_2 * TILE_W_2 * middle.PADDED if MIDDLE else 0
    program = tl.program_id(0)
    hidden = scratch + program.to(tl.int64) * (SIZE_1 + SIZE_2)
    before = hidden  # the last
    if MIDDLE:
        before = hidden + SIZE_1
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
            x + sample * C, own_scale, first, hidden, sample,
            y0 - K_3 // 2 - K_2 // 2, x0 - K_3 // 2 - K_2 // 2, height, width,
            TILE_H_1, TILE_W_1, BLOCK_P, True, HIDDEN_ACTIVATION, AHEAD, PRECISION, ACC,
        )  # fmt: skip
        tl.debug_barrier()
        if MIDDLE:
            _hidden(
                hidden, None, middle, before, sample,
                y0 - K_3 // 2, x0 - K_3 // 2, height, width,
                TILE_H_2, TILE_W_2, BLOCK_P, False, HIDDEN_ACTIVATION, AHEAD, PRECISION, ACC,
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
            pixels = (row, column, kept, TILE_H_2, TILE_W_2)
            acc = _convolve(
                before, None, last, pixels, o, BLOCK_P, BLOCK_C, False, AHEAD, PRECISION, ACC
            )
            acc = _add(acc, last, sample, pixel, inside, o)
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
def active_kernel(status, index, count, stride, b, BLOCK: tl.constexpr):
    """The active samples, in order. One program: it needs a running count."""
    found = 0
    for start in range(0, bound(b), BLOCK):
        sample = start + tl.arange(0, BLOCK)
        at = sample.to(tl.int64) * stride
        active = (tl.load(status + at, mask=sample < b, other=_ACTIVE + 1) == _ACTIVE).to(tl.int32)
        tl.store(index + found + tl.cumsum(active, 0) - 1, sample, mask=active != 0)
        found += tl.sum(active, 0)
    tl.store(count, found)


@triton.jit(do_not_specialize=["pixels"])
def pack_kernel(src, out, pixels, OUTPUTS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Bit o % 32 of a pixel's word o // 32 is whether its value o is not 0."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 32)
    for word in tl.static_range(WORDS):
        o = word * 32 + bit
        mask = (p < pixels)[:, None] & (o < OUTPUTS)[None, :]
        value = tl.load(src + p[:, None] * OUTPUTS + o[None, :], mask=mask, other=0)
        value = (value != 0).to(tl.int32) << bit[None, :]
        tl.store(out + p * WORDS + word, tl.sum(value, 1), mask=p < pixels)
