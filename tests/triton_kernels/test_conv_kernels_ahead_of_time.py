"""The convolution kernels compiled for sm_80 and sm_90 without a device, as a chain launches them.

The file is also the list of jobs that the compiling processes do; see ahead_of_time.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
import torch
from ahead_of_time import MOST_SHARED, compiled_launches, in_own_processes

from fpi_cuda import Anderson, ConvStep, FixedPointLayer, Picard, backends
from fpi_cuda.backends.triton import configs
from fpi_cuda.backends.triton.configs import PRECISIONS, Config, Shape
from fpi_cuda.drivers import capture, eager
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
FORWARD, ADJOINT = ("forward", "relu"), ("adjoint", "bits")
STEPS = ("chain_kernel", "conv_kernel")
COUNTED = "for any batch"
CAPTURED = "in a capture"
VERSION = metadata.version("triton")
# Bytes of a thread: scalars that find no place in the registers that the planned programs leave.
SPILLED = 48


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


def launch(shape, precision, kind, config=None, b=1, active=1, size=(5, 9)):
    """A step of b samples, or an adjoint's with slopes as bits or numbers."""
    from fpi_cuda.backends.triton import conv

    what, how = kind
    dtype, layers = DTYPES[precision], range(len(shape.kernels))
    adjoint = what == "adjoint"
    given = {"u everywhere": layers, "adjoint": layers[-1:]}.get(what, layers[:1])
    slopes = torch.bool if how == "bits" else dtype
    form = ConvForm(
        tuple(
            torch.ones(o, i, k, k, dtype=dtype)
            for i, o, k in zip(shape.channels, shape.channels[1:], shape.kernels, strict=False)
        ),
        tuple(None if adjoint else torch.ones(o, dtype=dtype) for o in shape.channels[1:]),
        tuple(
            dense(b, shape.channels[at + 1], *size, dtype=dtype) if at in given else None
            for at in layers
        ),
        activation="identity" if adjoint or how == "relu" else how,
        hidden_activation="identity" if adjoint else how,
        residual=0.5,
        scale=dense(b, shape.channels[0], *size, dtype=dtype) if adjoint else None,
        slopes=tuple(dense(b, o, *size, dtype=slopes) for o in shape.channels[1:-1])
        if adjoint
        else None,
    )
    x = dense(b, shape.channels[0], *size, dtype=dtype)
    chain = conv.Chain(form, x, tf32=precision == "tf32", config=config)
    status = (torch.arange(b) >= active).int()
    norms = torch.empty(b, chain.tiles, 2, dtype=torch.promote_types(dtype, torch.float32))
    chain(
        x,
        torch.empty_like(x),
        *conv.active_samples(status),
        None if what.endswith("without norms") else norms,
    )


def once(launches):
    return list({id(facts): facts for facts in launches}.values())


@dataclass(frozen=True)
class Case:
    """Steps of some kinds on a device, each compiled by itself."""

    shape: Shape
    precision: str
    arch: int
    kinds: tuple[tuple[str, str], ...] = (FORWARD, ADJOINT)
    config: Config | None = None  # None: the rule's

    def job(self):
        config = self.config or configs.rule(self.shape, self.precision)
        with launches_on(self.arch) as launches:
            for kind in self.kinds:
                launch(self.shape, self.precision, kind, config)
        return [
            replace(facts, planned=config.blocks if facts.kernel in STEPS else 1)
            for facts in once(launches)
        ]


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
                launch(shape, "bfloat16", ADJOINT, None, b, active, size)
    return once(launches)


def captured():
    """What the graph driver's captures compile, after its warm-ups: a capture would break."""
    found = []
    with launches_on(90) as launches:

        class Recorder:
            """Records nothing; counts the launches of each part."""

            unroll, note = 1, ""

            def __init__(self, device):
                self.parts = 0

            random_state = staticmethod(torch.get_rng_state)

            def warm_up(self, run):
                run()

            def record(self, run):
                known, start = set(map(id, launches)), len(launches)
                run()
                found.extend(facts for facts in launches[start:] if id(facts) not in known)
                self.parts += len(launches) > start

            def loop(self, tally, max_iterations):
                assert self.parts > 0
                return lambda: None

        with (
            mock.patch.object(backends.triton, "missing", lambda device: None),
            mock.patch.dict(capture.RECORDERS, {"cpu": Recorder}),
            mock.patch.object(eager, "refuse_capture", lambda: None),
        ):
            for solver, beta in itertools.product((Picard, partial(Anderson, 3)), (1.0, 0.7)):
                step = ConvStep(16, 1, hidden=(20,), activation="relu")
                layer = FixedPointLayer(
                    step,
                    solver=solver(beta=beta),
                    backend="triton",
                    driver="graph",
                    on_failure="return",
                )
                layer(torch.zeros(2, 1, 40, 40)).sum().backward()
                assert "graph, masked" in layer.last.path, layer.last.path
                assert "graph, masked" in layer.last.adjoint.path
    return found


# Operands through the compiler's pipeline, where the rule has them go through registers.
PIPED = Config(True, (8, 32), pixels=64, stages=3)
CASES = [
    *(
        Case(shape, precision, arch)
        for arch in MOST_SHARED
        for precision in PRECISIONS
        for shape in (*SHAPES, WIDE)
        if precision != "float16" or shape == SHAPES[0]  # as bfloat16
    ),
    *(
        Case(shape, precision, arch, config=config)
        for (shape, precision, arch), config in configs.read(configs.TABLE).items()
        if arch in MOST_SHARED
    ),
    Case(SHAPES[0], "bfloat16", 90, config=PIPED),
]


def jobs():
    for case in CASES:
        yield str(case), case.job
    yield COUNTED, any_batch
    yield CAPTURED, captured


@pytest.fixture(scope="module")
def compiled():
    return in_own_processes(Path(__file__))


def test_every_config_compiles_for_each_device(compiled):
    jobs_done = {f.job for f in compiled if f.kernel in STEPS}
    assert jobs_done == {*map(str, CASES), COUNTED}
    assert {f.kernel for f in compiled} == {*STEPS, "active_kernel", "pack_kernel"}


def test_no_kernel_spills_and_as_many_blocks_fit_as_are_planned(compiled):
    check(compiled)


def check(compiled, spilled=SPILLED):
    for facts in sorted(compiled, key=lambda f: (f.kernel, f.arch, f.job)):
        print(facts)
        assert facts.stack <= spilled, facts
        assert facts.shared <= MOST_SHARED[facts.arch], facts
        assert facts.blocks >= facts.planned, facts


def rows_of(compiled):
    """Of docs/floors.md: what this version of triton gives the fused kernel, a row a precision."""
    rows = []
    for precision in PRECISIONS:
        ours = {str(c): c for c in CASES if (c.precision, c.config) == (precision, None)}
        on = [
            [f for f in compiled if f.job in ours and f.kernel == "chain_kernel" and f.arch == arch]
            for arch in MOST_SHARED
        ]
        columns = [f"{on[0][0].planned} × {on[0][0].warps}"]
        for facts in on:
            for name in ("registers", "stack"):
                values = [getattr(f, name) for f in facts]
                low, high = min(values), max(values)
                columns.append(f"{low}-{high}" if low < high else f"{low}")
        columns.append(f"{max(f.shared for facts in on for f in facts) / 1024:.0f}")
        rows.append(f"| {VERSION} | {precision} | {' | '.join(columns)} |")
    return rows


def test_registers_are_those_of_the_page(compiled):
    page = (Path(__file__).parents[2] / "docs" / "floors.md").read_text()
    if f"\n| {VERSION} |" not in page:
        pytest.skip(f"the page has no rows of triton {VERSION}")
    for row in rows_of(compiled):
        assert row in page.splitlines(), f"docs/floors.md: the row is now\n{row}"


def test_batch_active_samples_and_image_size_compile_nothing_new(compiled):
    counts = Counter(f.kernel for f in compiled if f.job == COUNTED)
    # Two layers of a wide step, of two widths of slopes.
    assert counts == {"chain_kernel": 1, "conv_kernel": 2, "active_kernel": 1, "pack_kernel": 2}


def test_the_graph_drivers_warm_ups_compile_all_that_its_captures_launch(compiled):
    assert [f for f in compiled if f.job == CAPTURED] == []


if __name__ == "__main__":
    print(*rows_of(in_own_processes(Path(__file__))), sep="\n")
