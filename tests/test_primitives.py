"""Every step operator of every backend against the float64 reference, memory poisoned first."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import replace

import pytest
import torch

from fpi_cuda import _C, record
from fpi_cuda.backends import native, reference
from fpi_cuda.backends.scratch import Scratch
from fpi_cuda.forms import ACTIVATIONS
from fpi_cuda.record import (
    ACTIVE,
    FLOOR,
    GAIN,
    ITERATIONS,
    REFERENCE,
    RESIDUAL,
    RING_START,
    STATUS,
    VALUE,
    WINDOW,
    Limits,
    Progress,
    accumulate_dtype,
)
from fpi_cuda.solution import Status

# Rows around a vector's and a grain's width; 1, primes, one more than a power of two.
SHAPES = [(1, 1), (3, 1), (2, 7), (5, 8), (4, 15), (3, 17), (2, 33), (7, 64), (3, 1025), (67, 129)]
# On CUDA also around the borders of csrc/cuda/plan.h: a warp a row, a block, several blocks.
CUDA_SHAPES = [
    *SHAPES,
    *((1, 31), (5, 33), (2, 256), (3, 257), (2, 1028), (2, 2049), (3, 4096), (1, 4097)),
    *((2, 8193), (2, 40001), (2, 40004), (0, 7), (0, 40000)),
]
DEVICES = ["cpu"]
if torch.cuda.is_available() and "cuda" in native.devices():
    DEVICES.append("cuda")
    with torch.device("cuda"):  # torch lists its constructors now, before any is patched
        torch.empty(0)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Rounding of the stored result, times a little for the sums behind it.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
FOREVER = Limits(rtol=0.0, offset=0.0, rounding=0.0, patience=10**6, max_iterations=10**6)


# The reference in other dtypes is the oracle's own code: one shape shows its casts.
CASES = [
    *(("cpu", native, shape) for shape in SHAPES),
    *(("cuda", native, shape) for shape in CUDA_SHAPES if "cuda" in DEVICES),
    ("cpu", reference, (3, 17)),
]
EVERY_DEVICE = pytest.mark.usefixtures("device")


def every_backend(test):
    """Native on every device, and the reference."""
    devices = [*((device, native) for device in DEVICES), ("cpu", reference)]
    cases = pytest.mark.parametrize(
        ("device", "backend"), devices, indirect=["device"], ids=case_id
    )
    return EVERY_DEVICE(cases(test))


@pytest.fixture(params=DEVICES)
def device(request):
    """The device that the test's tensors are made on."""
    here = request.param
    with contextlib.nullcontext() if here == "cpu" else torch.device(here):
        yield here


def case_id(value: object) -> str:
    return getattr(value, "NAME", None) or str(value)


def oracle_of(p: Progress) -> Progress:
    """A float64 copy of the record: the oracle starts each step where the kernel did."""
    q = Progress(torch.empty(p.out.shape, dtype=torch.float64, device=p.out.device), p.limits)
    q.counters, q.scalars = p.counters.clone(), p.scalars.double().clone()
    q.bounds = None if p.bounds is None else p.bounds.double()
    q.index = None if p.index is None else p.index.clone()
    q.out, q.tally = p.out.double().clone(), p.tally.clone()
    return q


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    tolerance = TOLERANCE[dtype] * scale
    torch.testing.assert_close(
        a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def same_record(p: Progress, q: Progress, dtype: torch.dtype) -> None:
    assert torch.equal(p.counters, q.counters)
    assert torch.equal(p.tally, q.tally)
    acc = accumulate_dtype(dtype)
    close(p.scalars[:, RESIDUAL], q.scalars[:, RESIDUAL], acc)
    close(p.scalars[:, REFERENCE], q.scalars[:, REFERENCE], acc)
    close(p.scalars[:, VALUE], q.scalars[:, VALUE], acc)
    if dtype.itemsize >= 4:  # the oracle's own dtype has another level of noise
        close(p.scalars[:, GAIN], q.scalars[:, GAIN], acc, 10)
    close(p.scalars[:, RING_START:], q.scalars[:, RING_START:], acc, 10)


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4), (3, 0), (3, 33_343)], ids=str)
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_a_picard_step_rounds_once(shape, dtype, beta):
    x, gx = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    exact = x.double() + beta * (gx.double() - x.double())
    native.picard_step(Progress(x, FOREVER), x, gx, beta)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x.double(), exact, rtol=eps, atol=4 * torch.finfo(torch.float32).eps)
    if beta == 1.0:
        assert torch.equal(x, gx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_DEVICE
@pytest.mark.parametrize(("device", "backend", "shape"), CASES, ids=case_id, indirect=["device"])
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_picard_step_matches_the_oracle(backend, shape, dtype, beta):
    torch.manual_seed(0)
    b, n = shape
    p = Progress(torch.empty(b, n, dtype=dtype), FOREVER)
    p.out.fill_(math.nan)
    x = torch.randn(b, n).to(dtype)
    for k in range(1, 8):
        gx = (torch.randn(b, n) / k).to(dtype)
        q, y = oracle_of(p), x.double().clone()
        backend.picard_step(p, x, gx, beta)
        reference.picard_step(q, y, gx.double(), beta)
        close(x, y, dtype)
        same_record(p, q, dtype)
    assert p.out.isnan().all(), "no sample finished, so nothing may be written to out"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_DEVICE
@pytest.mark.parametrize(("device", "backend", "shape"), CASES, ids=case_id, indirect=["device"])
@pytest.mark.parametrize("history", [2, 5, 6, 11])
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_anderson_step_matches_the_oracle(backend, shape, dtype, history, beta, every=1):
    torch.manual_seed(0)
    b, n = shape
    p = Progress(torch.empty(b, n, dtype=dtype), FOREVER)
    p.out.fill_(math.nan)
    values, residuals = (poisoned(b, history, n, dtype=dtype) for _ in range(2))
    gram = poisoned(b, history, history, dtype=p.dtype)
    x = torch.randn(b, n).to(dtype)
    ridge = 0.05  # well posed also where N < m, so that rounding is all that may differ
    for _ in range(2 * history + 2):
        gx = torch.randn(b, n).to(dtype)
        q, y, gamma = oracle_of(p), x.double().clone(), gram.double().clone()
        oracle_values, oracle_residuals = (t.double().clone() for t in (values, residuals))
        given = beta, ridge, 1e9
        backend.anderson_step(p, x, gx, *given, values, residuals, gram, every=every)
        oracles = oracle_values, oracle_residuals, gamma
        reference.anderson_step(q, y, gx.double(), *given, *oracles, every=every)
        close(x, y, dtype, 30)
        same_record(p, q, dtype)
        close(values, oracle_values, dtype)
        close(residuals, oracle_residuals, dtype)
    assert (p.counters[:, WINDOW] == history).all()


@every_backend
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_finish_freeze_and_follow_their_index(backend, solver, dtype):
    """Row r holds sample index[r]; a finished row stays to the bit, whatever gx brings later."""
    torch.manual_seed(1)
    b, n = 6, 19
    limits = Limits(rtol=1e-2, offset=0.0, rounding=0.0, patience=10**6, max_iterations=3)
    p = Progress(torch.empty(b, n, dtype=dtype), limits)
    p.out.fill_(math.nan)
    p.narrow(torch.tensor([4, 1, 5]))
    x = torch.randn(3, n).to(dtype)
    if solver == "anderson":
        window = [poisoned(b, 3, n, dtype=dtype) for _ in range(2)]
        window.append(poisoned(b, 3, 3, dtype=p.dtype))

        def step(gx: torch.Tensor) -> None:
            backend.anderson_step(p, x, gx, 1.0, 1e-3, 1e9, *window)
    else:

        def step(gx: torch.Tensor) -> None:
            backend.picard_step(p, x, gx, 1.0)

    first = x.clone()
    gx = torch.randn(3, n).to(dtype)
    gx[0] = x[0]  # converged at once
    gx[2, 3] = math.inf  # not finite
    step(gx)
    status = p.counters[:, STATUS]
    assert status.tolist() == [0, 0, 0, 0, 1 + Status.CONVERGED, 1 + Status.NONFINITE]
    assert p.tally.tolist() == [1, 1, 1]
    assert torch.equal(p.out[4], gx[0])
    assert torch.equal(p.out[5], first[2]), "the last finite iterate is returned"
    frozen = x[[0, 2]].clone()
    for _ in range(2):
        gx = torch.randn(3, n).to(dtype)
        step(gx)
        assert torch.equal(x[[0, 2]], frozen)
    assert p.counters[1, STATUS] == 1 + Status.MAX_ITERATIONS
    assert torch.equal(p.out[1], gx[1])
    assert p.tally.tolist() == [0, 2, 3]
    assert p.counters[:, ITERATIONS].tolist() == [0, 3, 0, 0, 1, 1]
    assert p.out[[0, 2, 3]].isnan().all(), "samples without a row are left alone"


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exponent", [-36, -20, 18, 37])
def test_norms_neither_underflow_nor_overflow(backend, dtype, exponent):
    scale = 10.0**exponent
    x = torch.zeros(1, 3, dtype=dtype)
    gx = scale * torch.tensor([[3.0, 0.0, 4.0]], dtype=dtype)
    p = Progress(x, FOREVER)
    backend.picard_step(p, x, gx, 1.0)
    assert p.counters[0, STATUS] == ACTIVE
    assert float(p.scalars[0, RESIDUAL]) == pytest.approx(5 * scale, rel=1e-5)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_singular_window_takes_a_picard_step_alone(backend, dtype):
    """Without ridge, repeated residuals make the Gram matrix singular: that sample restarts."""
    torch.manual_seed(2)
    n, m = 9, 4
    x = torch.zeros(2, n, dtype=dtype)
    p = Progress(x, FOREVER)
    window = [poisoned(2, m, n, dtype=dtype) for _ in range(2)]
    gram = poisoned(2, m, m, dtype=p.dtype)
    r = torch.randn(n, dtype=dtype)
    for _ in range(1, 4):
        gx = x + torch.stack([r, torch.randn(n, dtype=dtype)])
        backend.anderson_step(p, x, gx, 1.0, 0.0, 1e9, *window, gram)
        assert torch.equal(x[0], gx[0]), "the singular sample took g(x)"
    assert p.counters[:, WINDOW].tolist() == [1, 3]


@every_backend
def test_a_grown_residual_restarts_its_window_alone(backend):
    torch.manual_seed(3)
    n, m = 12, 4
    x = torch.zeros(2, n, dtype=torch.float64)
    p = Progress(x, FOREVER)
    window = [poisoned(2, m, n, dtype=torch.float64) for _ in range(2)]
    gram = poisoned(2, m, m, dtype=torch.float64)
    for k in range(1, 5):
        step = torch.randn(2, n, dtype=torch.float64)
        if k == 4:
            step[1] *= 100
        gx = x + step
        backend.anderson_step(p, x, gx, 1.0, 1e-12, 10.0, *window, gram)
    assert p.counters[:, WINDOW].tolist() == [4, 1]
    assert torch.equal(x[1], gx[1])


class Solve:
    """Anderson steps on random values; `shifted` puts every vector off its 16-byte boundary."""

    def __init__(self, b, n, m, dtype, shifted=False):
        def empty(*shape):
            count = math.prod(shape) + shifted
            return poisoned(count, dtype=dtype)[int(shifted) :].view(shape)

        self.p = Progress(torch.zeros(b, n, dtype=dtype), FOREVER)
        self.p.out = empty(b, n)
        self.x, self.gx = empty(b, n), empty(b, n)
        self.window = [empty(b, m, n), empty(b, m, n), poisoned(b, m, m, dtype=self.p.dtype)]

    def run(self, x, values, beta):
        self.x.copy_(x)
        for gx in values:
            self.gx.copy_(gx)
            native.anderson_step(self.p, self.x, self.gx, beta, 1e-3, 1e9, *self.window)
        return self.x, self.p.counters, self.p.scalars, *self.window


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [36, 1028, 4104, 40008])
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_unaligned_views_give_the_bits_of_aligned_ones(n, dtype, beta):
    torch.manual_seed(4)
    x, values = torch.randn(2, n).to(dtype), torch.randn(5, 2, n).to(dtype)
    aligned = Solve(2, n, 3, dtype).run(x, values, beta)
    shifted = Solve(2, n, 3, dtype, shifted=True).run(x, values, beta)
    for a, b in zip(aligned, shifted, strict=True):
        same_bits(a, b)


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 33, 1025, 4097, 40001])
def test_a_sample_has_the_same_bits_in_any_batch(n, dtype):
    torch.manual_seed(5)
    b, m = 6, 4
    x, values = torch.randn(b, n).to(dtype), torch.randn(5, b, n).to(dtype)
    together = Solve(b, n, m, dtype).run(x, values, 1.0)
    for i in (0, b - 1):
        alone = Solve(1, n, m, dtype).run(x[i : i + 1], values[:, i : i + 1], 1.0)
        for t, a in zip(together, alone, strict=True):
            same_bits(t[i : i + 1], a)


@every_backend
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("n", [0, 9, 9000])
def test_a_step_without_values_is_counted(backend, solver, n):
    b = 0 if n else 3
    x = torch.zeros(b, n)
    p = Progress(x, FOREVER)
    window = (torch.zeros(b, 2, n), torch.zeros(b, 2, n), torch.zeros(b, 2, 2))
    for k in (1, 2):
        if solver == "picard":
            backend.picard_step(p, x, x.clone(), 1.0)
        else:
            backend.anderson_step(p, x, x.clone(), 1.0, 1e-6, 10.0, *window)
        assert p.tally.tolist() == [0, 0, k]
    assert (p.counters[:, STATUS] == 1 + Status.CONVERGED).all()


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_matches_the_oracle(capability):
    """The kernels are compiled once an instruction set; each that this machine has is run."""
    import os
    import subprocess
    import sys

    import fpi_cuda

    if capability not in fpi_cuda.build_info()["cpu_capabilities_available"]:
        pytest.skip(f"this machine has no {capability}")
    if capability == fpi_cuda.build_info()["cpu_capability"]:
        pytest.skip("runs in this process already")
    tests = f"{__file__}::test_anderson_step_matches_the_oracle"

    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            tests,
            "-k",
            "native and float32",
        ],
        env={**os.environ, "FPI_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]


@EVERY_DEVICE
@every_backend
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("n", [7, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_end_at_bounds_of_their_own(backend, solver, n, dtype):
    """Tolerances, patience and iterations, by sample and not by row; beside the floor."""
    own = [  # rtol, offset, patience, max_iterations, rounding
        (0.0, 0.0, 9, 3, 0.0),
        (1e-2, 0.0, 9, 9, 0.0),
        (0.0, 1e3, 9, 9, 0.0),
        (0.0, 0.0, 2, 9, 1e3),
        (0.0, 0.0, 9, 2, 0.0),
        (0.0, 0.0, 2, 9, 1e-3),  # above its rounding level
    ]
    own = torch.tensor(own, dtype=accumulate_dtype(dtype))
    shared = Limits(rtol=1.0, offset=0.0, rounding=1e3, patience=0, max_iterations=1, own=own)
    p = Progress(torch.empty(6, n, dtype=dtype), shared)
    p.bounds[1, FLOOR] = 1e6
    p.narrow(torch.tensor([3, 0, 4, 2, 5, 1]))
    p.out.fill_(math.nan)
    window = [poisoned(6, 3, n, dtype=dtype) for _ in range(2)]
    window.append(poisoned(6, 3, 3, dtype=p.dtype))
    x, ended = torch.randn(6, n).to(dtype), []
    for k in range(3):
        r = torch.nn.functional.normalize(torch.randn(6, n), dim=1)
        gx = (x + 5 * 1.2**k * r).to(dtype)
        q, y, oracles = oracle_of(p), x.double().clone(), [t.double().clone() for t in window]
        if solver == "picard":
            backend.picard_step(p, x, gx, 0.6)
            reference.picard_step(q, y, gx.double(), 0.6)
        else:
            backend.anderson_step(p, x, gx, 0.6, 0.05, 1e9, *window)
            reference.anderson_step(q, y, gx.double(), 0.6, 0.05, 1e9, *oracles)
        close(x, y, dtype, 30)
        close(p.out, q.out, dtype)
        same_record(p, q, dtype)
        ended.append((p.counters[:, STATUS] - 1).tolist())
    converged, limit = Status.CONVERGED, Status.MAX_ITERATIONS
    assert ended == [
        [-1, converged, converged, -1, -1, -1],
        [-1, converged, converged, -1, limit, -1],
        [limit, converged, converged, Status.STALLED, limit, -1],
    ]


def test_operators_refuse_to_be_differentiated():
    x, gx = torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True)
    p = Progress(x, FOREVER)
    with pytest.raises(RuntimeError, match="not differentiable"):
        native.picard_step(p, x, gx, 1.0)
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.func.jvp(lambda g: native.picard_step(p, x, g, 1.0), (gx.detach(),), (x,))


def test_operators_say_what_a_tensor_must_be(device):
    x = torch.zeros(2, 3)
    p = Progress(x, FOREVER)
    with pytest.raises(RuntimeError, match=r"gx must have shape \[2, 3\] \(got \[2, 4\]\)"):
        native.picard_step(p, x, torch.zeros(2, 4), 1.0)
    with pytest.raises(RuntimeError, match="gx must have the dtype of x"):
        native.picard_step(p, x, x.double(), 1.0)
    for shape, wanted in (((3,), "[2]"), ((2, 4), "[2, 6]")):
        p.bounds = torch.zeros(shape)
        with pytest.raises(RuntimeError, match=re.escape(f"bounds must have shape {wanted}")):
            native.picard_step(p, x, x, 1.0)
    p.bounds = None
    with pytest.raises(RuntimeError, match="index must be given"):
        native.picard_step(p, x[:1].clone(), x[:1].clone(), 1.0)
    most = native.MAX_HISTORY[device]
    big = most + 1
    with pytest.raises(RuntimeError, match=f"history must be 1 to {most} .got {big}"):
        native.anderson_step(
            p, x, x, 1.0, 0.0, 2.0, *(torch.zeros(2, big, 3),) * 2, torch.zeros(2, big, big)
        )


def test_csrc_and_python_write_down_the_same_numbers():
    p = Progress(torch.empty(1, 1), replace(FOREVER, own=torch.zeros(1, 5)))
    rows = {name: getattr(p, name).shape[1] for name in ("counters", "scalars", "bounds")}
    sizes = {**rows, "tally": len(p.tally)}
    assert _C.constants() == {
        "record": {
            n: v for n, v in vars(record).items() if n.isupper() and isinstance(v, float | int)
        },
        "status": {status.name: status + 1 for status in Status},
        "activations": native.CODES,
        "max_history": native.MAX_HISTORY,
        "sizes": {**sizes, "status": 1 + len(Status), "activations": len(ACTIVATIONS)},
    }


def test_scratch_memory_is_lent_to_one_solve_at_a_time():
    one, two = Scratch(), Scratch()
    shape, cpu = (3, 5), torch.device("cpu")
    a, b = one.empty(shape, torch.float32, cpu), two.empty(shape, torch.float32, cpu)
    assert a.data_ptr() != b.data_ptr()
    kept = a.data_ptr()
    del one, a
    c = Scratch()
    assert c.empty(shape, torch.float32, cpu).data_ptr() == kept
