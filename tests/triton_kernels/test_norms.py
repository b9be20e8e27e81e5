"""Where Triton's convolutions run, Picard's step is Triton's too: it reads the sums they leave."""

from __future__ import annotations

import pytest
import torch
from interpreted import INTERPRETED

from fpi_cuda import (
    Anderson,
    ConvStep,
    FixedPointLayer,
    ImplicitAdjoint,
    Picard,
    Tolerance,
    fixed_point,
)
from fpi_cuda.backends import available, native, triton
from fpi_cuda.backends.triton import configs, conv, picard
from fpi_cuda.backends.triton.configs import Config
from fpi_cuda.drivers import capture
from fpi_cuda.solve import direction

pytestmark = pytest.mark.skipif(not INTERPRETED, reason='the CPU, where "auto" has native steps')


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """backend="auto" has Triton's convolutions and native steps, as where nvcc built them."""
    if "cpu" not in available()["native"]:
        pytest.skip("this build has no native kernels for the CPU")
    monkeypatch.setattr(
        direction,
        "convolutions",
        lambda backend, form, x: conv if backend in ("auto", "triton") else None,
    )
    small = Config(True, (4, 8), pixels=32, outputs=32, blocks=1)
    monkeypatch.setattr(configs, "choose", lambda *_: small)


@pytest.fixture
def calls(monkeypatch):
    """Which step operator ran, and whether it had sums to read."""
    found = []

    def watched(module, name):
        plain = getattr(module, name)

        def call(p, *rest, **more):
            found.append((module.__name__.split(".")[2], name, p.norms is not None))
            plain(p, *rest, **more)

        monkeypatch.setattr(module, name, call)

    watched(native, "picard_step")
    watched(native, "anderson_step")
    watched(picard, "picard_step")
    monkeypatch.setattr(triton, "picard_step", picard.picard_step, raising=False)
    return found


class Recorder:
    """The graph driver's, without a device: runs again what it was given."""

    unroll, note = 1, ""

    def __init__(self, device):
        self.parts = []

    random_state = staticmethod(torch.get_rng_state)

    def warm_up(self, run):
        run()

    def record(self, run):
        run()
        self.parts.append(run)

    def loop(self, tally, max_iterations):
        before, body, *after = self.parts

        def launch():
            before()
            body()
            while tally[0] > 0 and tally[2] < max_iterations:
                body()
            for part in after:
                part()

        return launch


def make(dtype=torch.float64):
    step = ConvStep(3, 2, hidden=(5,), activation="tanh").to(dtype)
    with torch.no_grad():
        step.layers[0].weight.mul_(0.15)  # few iterations: the interpreter takes long for each
    z = torch.randn(2, 2, 3, 5, dtype=dtype)
    return step, z * torch.tensor([0.01, 4.0], dtype=dtype)[:, None, None, None]


def solved(step, z, solver, backend, driver):
    tolerance = Tolerance(1e-6 if z.dtype == torch.float64 else 1e-3)
    layer = FixedPointLayer(
        step,
        solver=solver,
        backend=backend,
        driver=driver,
        tolerance=tolerance,
        adjoint=ImplicitAdjoint(tolerance=tolerance),
    )
    leaf = z.clone().requires_grad_()
    x = layer(leaf)
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    grads = torch.autograd.grad((weights * x).sum(), (leaf, *step.parameters()))
    return layer.last, x, grads


@pytest.mark.parametrize(
    ("beta", "dtype", "driver"),
    [
        (1.0, torch.float64, "eager"),
        (0.7, torch.float64, "graph"),
        (0.7, torch.float32, "eager"),
        (1.0, torch.float32, "graph"),
    ],
    ids=str,
)
def test_picard_reads_the_sums_and_counts_as_native_steps_do(
    beta, dtype, driver, calls, monkeypatch
):
    step, z = make(dtype)
    wanted, x, grads = solved(step, z, Picard(beta), "native", "eager")
    assert {(who, read) for who, _, read in calls} == {("native", False)}
    calls.clear()
    if driver == "graph":
        monkeypatch.setitem(capture.RECORDERS, "cpu", Recorder)
    last, found, gradients = solved(step, z, Picard(beta), "auto", driver)
    assert set(calls) == {("triton", "picard_step", True)}
    for record in (last, last.adjoint):
        assert record.path == f"triton, {driver}, masked"
    for ours, other in ((last, wanted), (last.adjoint, wanted.adjoint)):
        assert torch.equal(ours.iterations, other.iterations)
        assert torch.equal(ours.status, other.status)
    close = dict(rtol=1e-9, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, x, **close)
    for a, b in zip(gradients, grads, strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("driver", ["eager", "graph"])
def test_anderson_keeps_the_native_step(driver, calls, monkeypatch):
    if driver == "graph":
        monkeypatch.setitem(capture.RECORDERS, "cpu", Recorder)
    last, _, _ = solved(*make(), Anderson(3), "auto", driver)
    assert set(calls) == {("native", "anderson_step", False)}
    assert last.path == last.adjoint.path == f"native, {driver}, masked"


def test_a_window_of_one_is_picards(calls):
    last, _, _ = solved(*make(), Anderson(1), "auto", "eager")
    assert set(calls) == {("triton", "picard_step", True)}
    assert last.path == last.adjoint.path == "triton, eager, masked"


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_backend_that_was_asked_for_is_the_one(backend):
    last, _, _ = solved(*make(), Picard(), backend, "eager")
    assert last.path.startswith(f"{backend}, eager")
    assert "masked" not in last.path


def test_a_tuple_state_has_no_kernels_that_leave_sums(calls):
    step, z = make()

    def g(state, z):
        x, y = state
        return step(x, z), 0.5 * y + 1

    x0 = (torch.zeros(2, 3, 3, 5, dtype=z.dtype), torch.zeros(2, 2, dtype=z.dtype))
    sol = fixed_point(g, x0, z, solver=Picard(), tolerance=Tolerance(1e-6))
    assert sol.converged.all()
    assert {(who, read) for who, _, read in calls} == {("native", False)}
