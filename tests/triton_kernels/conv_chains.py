"""Steps of convolutions to try, and Triton's chains of them checked against float64 conv2d."""

from __future__ import annotations

import math

import pytest
import torch

from fpi_cuda.backends.triton import conv
from fpi_cuda.backends.triton.configs import Config
from fpi_cuda.forms.conv import ConvForm
from fpi_cuda.record import ACTIVE, STATUS

# Of the largest value; the interpreter rounds to bfloat16 by cutting bits off.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
TF32 = 5e-3
# Small tiles and blocks: several of each in a small image, none of them filled.
SMALL = {
    "fused": Config(True, (4, 8), pixels=32, blocks=1),
    "by layer": Config(False, (4, 8), outputs=32, blocks=1),
}
# One pixel; smaller than a tile; a tile; one more each way.
SIZES = [(1, 1), (3, 5), (4, 8), (5, 9)]
NETS = {
    "16-32-16": ((16, 32, 16), (3, 3)),
    "1-32-32-1": ((1, 32, 32, 1), (3, 3, 3)),
    "3-20-7-3": ((3, 20, 7, 3), (5, 1, 3)),
    "1-1-1": ((1, 1, 1), (3, 5)),
    "6-40-6": ((6, 40, 6), (1, 5)),
}
ALL_CONFIGS = pytest.mark.parametrize("config", [*SMALL.values(), None], ids=[*SMALL, "rule"])
BOTH = pytest.mark.parametrize("config", list(SMALL.values()), ids=list(SMALL))


def name_of(value):
    return str(value).removeprefix("torch.")


def dense(t):
    return t.contiguous(memory_format=torch.channels_last)


def state(*shape, dtype=torch.float64):
    return dense(torch.randn(shape, dtype=torch.float64).to(dtype))


def make(net, size, dtype=torch.float64, b=2, slopes=None, scale=False, u=(0,), **options):
    """A form with random tensors of the dtype, and a state. u: layers that have one."""
    channels, kernels = net
    layers = range(len(kernels))
    kinds = {"bits": torch.bool, "tensor": dtype}
    return (
        ConvForm(
            tuple(
                (torch.randn(o, i, k, k, dtype=torch.float64) / (i * k * k) ** 0.5).to(dtype)
                for i, o, k in zip(channels, channels[1:], kernels, strict=False)
            ),
            tuple(torch.randn(o, dtype=torch.float64).to(dtype) for o in channels[1:]),
            tuple(
                state(b, channels[at + 1], *size, dtype=dtype) if at in u else None for at in layers
            ),
            scale=state(b, channels[0], *size, dtype=dtype) if scale else None,
            slopes=tuple(dense((state(b, o, *size) > 0).to(kinds[slopes])) for o in channels[1:-1])
            if slopes
            else None,
            **options,
        ),
        state(b, channels[0], *size, dtype=dtype),
    )


def double(form):
    """The same in float64."""

    def cast(t):
        return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    def each(ts):
        return None if ts is None else tuple(map(cast, ts))

    return ConvForm(
        each(form.weights),
        each(form.biases),
        each(form.u),
        form.activation,
        form.hidden_activation,
        form.residual,
        cast(form.scale),
        each(form.slopes),
    )


def run(form, x, config=None, active=None, tf32=False):
    """What the kernels make of x, and the chain's partial norms; NaN where nothing is written."""
    status = torch.full((len(x), 5), ACTIVE + 1, dtype=torch.int32)
    status[list(range(len(x))) if active is None else active, STATUS] = ACTIVE
    chain = conv.Chain(form, x, tf32=tf32, config=config)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.full_like(x, math.nan)
    norms = torch.full((len(x), chain.tiles, 2), math.nan, dtype=acc)
    chain(x, out, *conv.active_samples(status[:, STATUS]), norms)
    return out, norms


def check(form, x, config=None, active=None, tf32=False):
    out, norms = run(form, x, config, active, tf32)
    listed = list(range(len(x))) if active is None else active
    others = [b for b in range(len(x)) if b not in listed]
    assert out[others].isnan().all(), "samples that are not listed keep every bit"
    assert norms[others].isnan().all()
    expected = double(form)(x.double())[listed]
    tolerance = TF32 if tf32 else TOLERANCE[x.dtype]
    largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    error = (out[listed].double() - expected).abs()
    assert (error <= tolerance * largest).all(), f"{float(error.max())} of {largest}"
    # The norms are of what was stored, so they are right to their own rounding.
    exact = 1e-12 if x.dtype == torch.float64 else 1e-5
    for part, value in ((0, out.double() - x.double()), (1, out.double())):
        square = value[listed].flatten(1).square().sum(1)
        torch.testing.assert_close(
            norms[listed, :, part].double().sum(1), square, rtol=exact, atol=exact
        )
    return out
