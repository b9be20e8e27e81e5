"""The convolution kernels compiled for sm_80 and sm_90 without a device, as a chain launches them.

The file is also the list of jobs that the compiling processes do; see ahead_of_time.py.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from functools import partial
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
import torch
from ahead_of_time import MOST_SHARED, compiled_launches, in_own_processes

from fpi_cuda.backends.triton import configs
from fpi_cuda.backends.triton.configs import PRECISIONS, Config, Shape
from fpi_cuda.forms.conv import ConvForm

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
}
SHAPES = [
    Shape((16, 32, 16), (3, 3)),
    Shape((1, 32, 32, 1), (3, 3, 3)),
    Shape((32, 64, 32), (3, 3)),
]
WIDE = Shape((5, 128, 5), (3, 5))
COUNTED = "for any batch"
# triton 3.6 has up to four scalars of three kernels spill (tf32 on sm_80, float64); 3.7 none.
SPILLED = 16 if metadata.version("triton").startswith("3.6.") else 0


def dense(*shape, dtype):
    return torch.ones(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def launches_on(arch):
    """What chains launch, were the CPU such a device."""
    from fpi_cuda.backends.triton import conv

    with (
        mock.patch.object(conv, "machine", lambda device: (arch, 100)),
        mock.patch.object(conv, "refusal", lambda form, x: None),
        compiled_launches(arch) as launches,
    ):
        yield launches


def launch(shape, precision, adjoint, config=None, b=1, active=1, size=(5, 9)):
    """A step, or an adjoint's with slopes as bits, of b samples."""
    from fpi_cuda.backends.triton import conv

    dtype, layers = DTYPES[precision], range(len(shape.kernels))
    given = len(layers) - 1 if adjoint else 0  # the layer that has u
    form = ConvForm(
        tuple(
            torch.ones(o, i, k, k, dtype=dtype)
            for i, o, k in zip(shape.channels, shape.channels[1:], shape.kernels, strict=False)
        ),
        tuple(None if adjoint else torch.ones(o, dtype=dtype) for o in shape.channels[1:]),
        tuple(
            dense(b, shape.channels[at + 1], *size, dtype=dtype) if at == given else None
            for at in layers
        ),
        hidden_activation="relu",
        residual=0.5,
        scale=dense(b, shape.channels[0], *size, dtype=dtype) if adjoint else None,
        slopes=tuple(dense(b, o, *size, dtype=torch.bool) for o in shape.channels[1:-1])
        if adjoint
        else None,
    )
    x = dense(b, shape.channels[0], *size, dtype=dtype)
    chain = conv.Chain(form, x, tf32=precision == "tf32", config=config)
    status = (torch.arange(b) >= active).int()
    chain(
        x,
        torch.empty_like(x),
        *conv.active_samples(status),
        torch.empty(b, chain.tiles, 2, dtype=torch.promote_types(dtype, torch.float32)),
    )


def once(launches):
    return list({id(facts): facts for facts in launches}.values())


def a_step(shape, precision, config, arch):
    with launches_on(arch) as launches:
        for adjoint in (False, True):
            launch(shape, precision, adjoint, config)
    return once(launches)


def any_batch():
    """Batches of 1 to 300 samples, all or few of them active, and images of several sizes."""
    batches = [
        (1, 1, (5, 9)),
        (2, 0, (5, 9)),
        (16, 16, (16, 64)),
        (33, 1, (32, 32)),
        (300, 7, (1, 1)),
    ]
    with launches_on(90) as launches:
        for shape in (SHAPES[0], WIDE):
            for b, active, size in batches:
                launch(shape, "bfloat16", True, None, b, active, size)
    return once(launches)


def jobs():
    for arch in MOST_SHARED:
        for precision in PRECISIONS:
            for shape in (*SHAPES, WIDE) if precision != "float16" else SHAPES:  # as bfloat16
                yield f"{shape} {precision}", partial(a_step, shape, precision, None, arch)
    for (shape, precision, capability), config in configs.read(configs.TABLE).items():
        if capability in MOST_SHARED:
            yield f"{shape} {precision}", partial(a_step, shape, precision, config, capability)
    # Operands through the compiler's pipeline, where the rule has them go through registers.
    piped = Config(True, (8, 32), pixels=64, stages=3)
    yield "piped", partial(a_step, SHAPES[0], "bfloat16", piped, 90)
    yield COUNTED, any_batch


@pytest.fixture(scope="module")
def compiled():
    return in_own_processes(Path(__file__))


def test_every_config_compiles_for_each_device(compiled):
    expected = {(arch, f"{s} {p}") for arch in MOST_SHARED for p in PRECISIONS for s in SHAPES}
    kernels = {(f.arch, f.job) for f in compiled if f.kernel in ("_chain_kernel", "_conv_kernel")}
    assert expected <= kernels
    assert {f.kernel for f in compiled} == {
        *("_chain_kernel", "_conv_kernel", "_active_kernel", "_pack_kernel")
    }


def test_no_kernel_spills_or_asks_for_more_than_a_block_has(compiled):
    for facts in sorted(compiled, key=lambda f: (f.kernel, f.arch, f.job)):
        print(facts)
        assert facts.stack <= SPILLED, facts
        assert facts.shared <= MOST_SHARED[facts.arch], facts
        assert facts.registers * 32 * facts.warps <= 65536, facts


def test_batch_active_samples_and_image_size_compile_nothing_new(compiled):
    counts = Counter(f.kernel for f in compiled if f.job == COUNTED)
    # Two layers of a wide step, of two widths of slopes.
    assert counts == {"_chain_kernel": 1, "_conv_kernel": 2, "_active_kernel": 1, "_pack_kernel": 2}
