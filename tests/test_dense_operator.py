"""The operator that solves a dense step whole: bits, threads, products, arguments, memory."""

import dataclasses
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import DTYPES, assert_close
from helpers_dense import (
    LAYERS,
    every_device,
    limits,
    matmul_fixture,  # noqa: F401
    same_bits,
    solve,
    step,
    taken,
)
from hypothesis import given
from hypothesis import strategies as st

from fpi_cuda import Anderson, Picard, Status
from fpi_cuda.backends import native
from fpi_cuda.drivers import whole
from fpi_cuda.forms import ACTIVATIONS, DenseForm
from fpi_cuda.record import Limits, Progress

pytestmark = pytest.mark.usefixtures("one_thread")


# --- bits ------------------------------------------------------------------------------------


def form_of(case, dtype):
    """A form of random kind, with samples of very different difficulty."""
    g = torch.Generator().manual_seed(case["seed"])
    b, n, h = case["b"], case["n"], case["hidden"]

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    gain = torch.rand(b, 1, generator=g, dtype=torch.float64).to(dtype)
    kind = dict(activation=case["activation"], residual=case["residual"], gain=gain)
    if case["scale"]:
        kind["scale"] = normal(b, n)
    if case["linear"]:
        kind["output_scale"] = normal(b, n)
    if h == 0:
        return DenseForm(normal(n, n, scale=0.4 / n**0.5), normal(b, n), **kind)
    return DenseForm(
        normal(n, h, scale=0.5 / h**0.5),
        normal(n) if case["shared"] else normal(b, n),
        hidden_weight=normal(h, n, scale=0.6 / n**0.5),
        hidden_u=normal(h) if case["shared"] else normal(b, h),
        hidden_activation="gelu",
        hidden_scale=normal(b, h) if case["scale"] else None,
        **kind,
    )


cases = st.fixed_dictionaries(
    {
        "b": st.integers(1, 60),
        "n": st.integers(1, 40),
        "hidden": st.sampled_from([0, 0, 1, 9, 34]),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "residual": st.sampled_from([0.0, 0.2]),
        "scale": st.booleans(),
        "linear": st.booleans(),
        "shared": st.booleans(),
        "seed": st.integers(0, 10**6),
        "dtype": st.sampled_from(DTYPES),
        "history": st.integers(1, 6),
        "slots": st.sampled_from([1, 2, 5, 7, 12, 64]),
        "threads": st.integers(1, 2),
    }
)


@given(case=cases)
def test_bits_depend_on_neither_batch_order_slots_nor_threads(case):
    dtype = case["dtype"]
    form = form_of(case, dtype)
    solver = Anderson(case["history"]) if case["history"] > 1 else Picard()
    lim = limits(dtype, case["n"])
    x0 = torch.randn(case["b"], case["n"], dtype=torch.float64).to(dtype)
    x, record = whole.solve(form, x0, solver, lim)
    order = torch.randperm(case["b"])[: max(1, case["b"] // 2)]
    torch.set_num_threads(case["threads"])
    y, again = whole.solve(taken(form, order), x0[order], solver, lim, slots=case["slots"])
    torch.set_num_threads(1)
    assert same_bits(x[order], y)
    assert torch.equal(record.progress.counters[order], again.progress.counters)
    assert same_bits(record.progress.scalars[order], again.progress.scalars)
    one, _ = whole.solve(taken(form, order[:1]), x0[order[:1]], solver, lim)
    assert same_bits(one[0], y[0])


@given(case=cases, every=st.integers(2, 5), gain=st.sampled_from([float("nan"), 1e4, -3.0]))
def test_samples_that_fail_leave_nothing_in_their_slots(case, every, gain):
    """Those beside them, and those that take their slots next, have the bits they have alone."""
    dtype = case["dtype"]
    form = form_of(case, dtype)
    solver = Anderson(case["history"]) if case["history"] > 1 else Picard()
    lim = limits(dtype, case["n"])
    x0 = torch.randn(case["b"], case["n"], dtype=torch.float64).to(dtype)
    fails = torch.arange(case["b"]) % every == 0
    form.gain[fails] = gain
    torch.set_num_threads(case["threads"])
    x, record = whole.solve(form, x0, solver, lim, slots=case["slots"])
    torch.set_num_threads(1)
    y, alone = whole.solve(taken(form, ~fails), x0[~fails], solver, lim)
    assert same_bits(x[~fails], y)
    assert torch.equal(record.progress.counters[~fails], alone.progress.counters)
    assert same_bits(record.progress.scalars[~fails], alone.progress.scalars)
    if math.isnan(gain):
        assert set(record.status[fails].tolist()) == {Status.NONFINITE}


@every_device
@pytest.mark.parametrize("hidden", LAYERS.values(), ids=LAYERS)
def test_an_exact_layer_has_a_samples_bits_in_any_batch(hidden, device):
    g = step(33, d=21, hidden=hidden, dtype=torch.float32, exact=True).to(device)
    z = torch.randn(100, 21).to(device)
    x, _ = solve(g, z, backward=False)
    assert x.path == "native, whole"
    for rows in (torch.arange(1), torch.arange(7, 50), torch.randperm(100)):
        part, _ = solve(g, z[rows], backward=False)
        assert torch.equal(part.x, x.x[rows])
    loose = step(33, d=21, hidden=hidden, dtype=torch.float32).to(device)
    (ours, a), (theirs, b) = solve(g, z), solve(loose, z)
    assert_close(ours.x, theirs.x)
    for mine, other in zip(a, b, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


# --- several threads -------------------------------------------------------------------------


def stepped(x, values, history):
    """x and its record after the solver's steps with these values of g."""
    b, n = x.shape
    x, p = x.clone(), Progress(x, Limits(0.0, 0.0, 0.0, 10**6, 10**6))
    window = [x.new_zeros(b, history, k) for k in (n, n, history)]
    for gx in values:
        if history == 1:
            native.picard_step(p, x, gx, 0.7)
        else:
            native.anderson_step(p, x, gx, 1.0, 1e-3, 1e9, *window)
    return x, p.counters, p.scalars


def work_of(sizes, b, device):
    """Calls that each give tensors: whole solves and steps of rows of these sizes."""
    calls = []
    for n in sizes:
        normal = torch.randn(5, b, n).to(device)
        form = DenseForm((torch.randn(n, n) / (3 * n**0.5)).to(device), normal[0])
        for history in (1, 3):
            solver = Anderson(history) if history > 1 else Picard()

            def solve_whole(form=form, solver=solver, n=n):
                x, record = whole.solve(
                    form, torch.zeros_like(form.u), solver, limits(torch.float32, n)
                )
                return x, record.progress.counters, record.progress.scalars

            calls += [solve_whole, lambda h=history, v=normal: stepped(v[1], v[2:5], h)]
    return calls


@every_device
@pytest.mark.parametrize("streams", ["one stream", "own streams"])
def test_threads_do_not_disturb_each_other(device, streams):
    """Two at a time, 50 rounds: the same kernels for rows of other sizes, to the bit as alone.

    On CUDA the sizes need unlike amounts of shared memory, the larger more than 48 KiB.
    """
    work = [work_of((24, 700), 5, device), work_of((160, 48), 37, device)]
    alone = [[call() for call in calls] for calls in work]
    begin = threading.Barrier(len(work), timeout=60)

    def repeat(calls, expected):
        own = device == "cuda" and streams == "own streams"
        if own:
            torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream() if own else None):
            begin.wait()
            for _ in range(50):
                for call, right in zip(calls, expected, strict=True):
                    for mine, other in zip(call(), right, strict=True):
                        assert same_bits(mine, other)

    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(repeat, *pair) for pair in zip(work, alone, strict=True)]:
            done.result(timeout=300)


# --- the operator ----------------------------------------------------------------------------


PRODUCTS = [(1, 1, 1), (3, 5, 7), (25, 33, 31), (64, 159, 200)]
# On CUDA: rows of W that partly stay in shared memory, and more rows of x than blocks have at once.
PRODUCTS += [(9, 300, 290), (150, 40, 70)]


def product(b, k, n, dtype, device):
    """Operands of a product and, in float64, what it is and what its terms sum to in magnitude."""
    x, weight = (torch.randn(*shape).to(dtype) for shape in ((b, k), (n, k)))
    right = x.double() @ weight.double().mT
    magnitude = x.abs().double() @ weight.abs().double().mT
    return x.to(device), weight.to(device), right, magnitude


@every_device
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_match_float64(shape, dtype, device):
    x, weight, right, magnitude = product(*shape, dtype, device)
    u = torch.randn(shape[2]).to(device, dtype)
    for strided in (weight, weight.mT.contiguous().mT):
        for bias, expected in ((None, right), (u, right + u.double().cpu())):
            found = native.dense_map(x, strided, bias)
            assert found.dtype == dtype and found.device == x.device
            error = (found.double().cpu() - expected).abs()
            eps = torch.finfo(dtype).eps  # k roundings of either sign add up as their root
            assert (error <= eps * (max(2, shape[1] ** 0.5) * magnitude + 1)).all()


@every_device
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_round_to_tf32_where_torch_is_set_to_it(shape, device, matmul):
    """On CUDA alone; and to the bit the same rows in any batch."""
    x, weight, right, magnitude = product(*shape, torch.float32, device)
    matmul.fp32_precision = "ieee"
    exact = native.dense_map(x, weight, None)
    matmul.fp32_precision = "tf32"
    rounded = native.dense_map(x, weight, None)
    assert torch.equal(exact, rounded) == (device == "cpu")
    assert ((rounded.double().cpu() - right).abs() <= 1.1e-3 * magnitude).all()
    for rows in (slice(0, 1), slice(shape[0] // 2, None)):
        assert torch.equal(native.dense_map(x[rows], weight, None), rounded[rows])


def test_arguments_are_checked():
    form = DenseForm(torch.randn(4, 4), torch.randn(3, 4))
    lim, x0 = limits(torch.float32, 4), torch.zeros(3, 4)
    for wrong, message in (
        (dict(weight=torch.randn(4, 5)), r"weight must have shape \[·, 4\]"),
        (dict(weight=torch.randn(5, 4)), r"weight must have shape \[4, 4\] \(got \[5, 4\]\)"),
        (dict(weight=torch.randn(4, 4).double()), "weight must have the dtype of x"),
        (dict(u=torch.randn(3, 5)), r"u must have shape \[3, 4\]"),
        (dict(scale=torch.randn(4)), r"scale must have shape \[3, 4\]"),
        (dict(hidden_weight=torch.randn(6, 3)), r"hidden_weight must have shape \[·, 4\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            whole.solve(dataclasses.replace(form, **wrong), x0, Picard(), lim)


POISONED = """
import ctypes
import torch
from fpi_cuda import *
M_PERTURB = -6
assert ctypes.CDLL(None).mallopt(M_PERTURB, 1)
torch.manual_seed(0)
for hidden in (None, 21):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        g = DenseStep(37, 5, hidden, residual=0.1).to(dtype)
        z = torch.randn(91, 5).to(dtype).requires_grad_()
        for solver in (Picard(), Anderson()):
            found = []
            for backend in ("native", "reference"):
                sol = fixed_point(g, torch.zeros(91, 37, dtype=dtype), z, solver=solver,
                                  backend=backend)
                found.append((sol, *torch.autograd.grad(sol.x.sum(), (z, g.state_weight))))
            assert found[0][0].path == found[0][0].adjoint.path == "native, whole"
            close = 0.1 if dtype == torch.bfloat16 else 1e-3
            for a, b in zip((found[0][0].x, *found[0][1:]), (found[1][0].x, *found[1][1:])):
                torch.testing.assert_close(a, b, rtol=close, atol=close)
print("solved")
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_with_poisoned_memory(capability):
    """What malloc gives holds -1.7e38: to read it before it is written would show."""
    environment = os.environ | {"FPI_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", POISONED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "must be one of" in done.stderr:
        pytest.skip(f"this machine has no {capability}")
    assert done.stdout == "solved\n", done.stderr
