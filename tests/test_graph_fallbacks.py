"""What a graph can't do runs eagerly, says why and leaves nothing; wrong input."""

import gc
from types import SimpleNamespace

import pytest
import torch
from helpers import contraction
from helpers_drivers import Affine, forward_backward, same
from tape import TapeRecorder, captures, problem, tape_fixture  # noqa: F401
from torch import nn

from fpi_cuda import FixedPointLayer, backends, compat, fixed_point
from fpi_cuda.backends import native
from fpi_cuda.drivers import eager, graph

# --- what a graph can't do ---------------------------------------------------------------------


def fallback(g, match, z=None, **options):
    """Two solves that fall back, with one warning in all."""
    z = problem() if z is None else z
    with pytest.warns(UserWarning, match=match) as caught:
        for _ in range(2):
            s = fixed_point(g, torch.zeros_like(z), z, driver="graph", per_sample=True, **options)
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert "eager (" in s.path
    expected = fixed_point(g, torch.zeros_like(z), z, driver="eager", per_sample=True, **options)
    assert torch.equal(s.x, expected.x)


def test_a_host_sync_falls_back(tape):
    def g(x, z):
        return 0.5 * x * float(z.abs().max().clamp(max=1)) + z

    fallback(g, "it runs eagerly: operation not permitted when stream is capturing")


def test_a_captured_tensor_falls_back(tape):
    w = contraction(3, 0.5)
    fallback(lambda x, z: x @ w + z, r"g captures a tensor of shape \(3, 3\)")
    module = Affine()
    module.forward = lambda x, z: x @ w + z
    fallback(module, "g captures a tensor")


def test_a_constant_made_in_g_does_not(tape):
    def g(x, z):
        return x * torch.tensor([0.5, 0.2, 0.1], dtype=x.dtype) + torch.ones(3).double() + z

    s = fixed_point(g, torch.zeros(5, 3).double(), problem(), driver="graph")
    assert "graph" in s.path


def test_random_numbers_are_refused(tape):
    def g(x, z):
        return 0.5 * nn.functional.dropout(x, 0.5) + z

    z = problem()
    state = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"draws random numbers.*freeze dropout"):
            fixed_point(g, z * 0, z, driver="graph")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_capture_that_fails_midway_leaves_nothing(tape, monkeypatch, part):
    record = TapeRecorder.record

    def failing(self, run):
        if len(self.tapes) == part:
            run()
            raise RuntimeError("capture invalidated\nby something")
        record(self, run)

    monkeypatch.setattr(TapeRecorder, "record", failing)
    g = Affine()
    with pytest.warns(UserWarning, match="runs eagerly: capture invalidated$"):
        s, found = forward_backward(g, problem(), driver="graph")
    same(found, forward_backward(g, problem(), driver="eager")[1])
    assert "eager (capture invalidated)" in s.adjoint.path
    gc.collect()
    alive = [ref for ref in TapeRecorder.made if ref() is not None]
    assert len(alive) == (1 if part == 2 else 0)  # a forward has two parts only


def test_out_of_memory_is_tried_again(tape, monkeypatch):
    def full(self, run):
        raise torch.OutOfMemoryError("no room")

    g, z = Affine(), problem()
    with monkeypatch.context() as patch:
        patch.setattr(TapeRecorder, "record", full)
        with pytest.warns(UserWarning, match="memory could not be allocated"):
            s = fixed_point(g, z * 0, z, driver="graph", per_sample=True)
        assert "eager" in s.path
    assert "graph" in fixed_point(g, z * 0, z, driver="graph", per_sample=True).path


def test_a_launch_that_fails_is_forgotten(tape, monkeypatch):
    loop = TapeRecorder.loop

    def failing(self, *arguments):
        launch = loop(self, *arguments)

        def once():
            if self.launches:
                raise RuntimeError("cudaGraphLaunch: out of memory")
            launch()

        return once

    monkeypatch.setattr(TapeRecorder, "loop", failing)
    g, z = Affine(), problem()
    options = {"driver": "graph", "per_sample": True}
    first = fixed_point(g, z * 0, z, **options).x
    with pytest.raises(RuntimeError, match="cudaGraphLaunch"):
        fixed_point(g, z * 0, z, **options)
    assert torch.equal(fixed_point(g, z * 0, z, **options).x, first)
    assert captures() == 2


def test_a_solve_within_g_falls_back(tape):
    inner = FixedPointLayer(Affine(), driver="graph", per_sample=True)

    def g(x, z):
        return 0.1 * inner(x) + z

    with pytest.warns(UserWarning, match="it runs eagerly") as caught:
        s = fixed_point(g, problem() * 0, problem(), driver="graph", per_sample=True)
    assert s.converged.all()
    assert caught
    expected = fixed_point(g, problem() * 0, problem(), driver="eager", per_sample=True).x
    torch.testing.assert_close(s.x, expected)


def test_nobody_waits_for_a_capture(tape):
    g, z = Affine(), problem()
    with graph._capturing:
        s = fixed_point(g, z * 0, z, driver="graph", per_sample=True)
    assert s.path == "native, eager (another solve is being captured), whole batch"
    assert "graph," in fixed_point(g, z * 0, z, driver="graph", per_sample=True).path


def test_a_g_that_is_wrong_says_so(tape):
    def in_place(x, z):
        return x.mul_(0.5) + z

    with (
        pytest.warns(UserWarning, match="it runs eagerly"),
        pytest.raises(RuntimeError, match="must not change its argument"),
    ):
        fixed_point(in_place, problem() * 0, problem(), driver="graph")


@pytest.mark.parametrize("m_anderson", [0, 3])
def test_compats_conditions_decide_on_a_device_too(tape, m_anderson):
    """A graph stops by the tally, so it must never run what a condition is to stop."""
    w, z = contraction(3, 0.7), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    asked = []

    def cond(count, x, previous):
        asked.append(count)
        return count < 40

    def g(x, y):
        return (torch.tanh(x[0] @ y[1].mT) + y[0],)

    for _ in range(4):
        (x,) = compat.fixed_point_iteration((z, w), (z * 0,), g, cond, cond, m_anderson)
        x.sum().backward()
        torch.testing.assert_close(x, g((x,), (z, w))[0], rtol=1e-5, atol=1e-5)
    assert asked.count(40) == 8
    assert captures() == 0


def test_the_reference_backend_is_eager(tape):
    z = problem()
    assert "reference backend reads" in fixed_point(
        Affine(), z * 0, z, driver="graph", backend="reference"
    ).path  # fmt: skip


def test_what_is_not_asked_is_not_tried(tape):
    z = problem()
    for _ in range(4):
        assert fixed_point(Affine(), z * 0, z, driver="eager").path.startswith("native, eager,")
    assert captures() == 0


# --- bad input ---------------------------------------------------------------------------------


def test_graph_needs_a_device():
    with pytest.raises(ValueError, match=r'driver "graph" needs a CUDA device.*x0 is on cpu'):
        fixed_point(Affine(), problem() * 0, problem(), driver="graph")


def test_misspelt_drivers_raise():
    accepted = r"driver must be one of \('auto', 'eager', 'graph', 'whole'\)"
    with pytest.raises(ValueError, match=accepted):
        FixedPointLayer(Affine(), driver="cudagraph")


def test_inputs_on_other_devices_raise():
    x0 = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"inputs\[0\] must be on x0's device, cpu \(got meta\)"):
        fixed_point(lambda x, z: x, x0, torch.zeros(2, 3, device="meta"))
    with pytest.raises(ValueError, match=r"params\[0\] must be on x0's device"):
        fixed_point(lambda x, w: x, x0, params=(torch.zeros(2, 3, device="meta"),))


def test_native_without_cuda_names_the_rebuild():
    if "cuda" in backends.available()["native"]:
        pytest.skip("this build has CUDA kernels")
    x = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="FPI_CUDA_BUILD=cuda pip install"):
        backends.choose("native", x)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["80", "90+PTX"], (8, 0), True),
        (["80", "90+PTX"], (8, 6), True),
        (["80", "90+PTX"], (9, 0), True),
        (["80", "90+PTX"], (12, 0), True),  # compiled by the driver from PTX
        (["80", "90"], (12, 0), False),
        (["80", "90+PTX"], (7, 5), False),
        (["90"], (8, 0), False),
        (["90a"], (9, 0), True),
        (["90a+PTX"], (10, 0), False),
        (["100f"], (10, 3), True),
        (["100f+PTX"], (12, 0), False),
        (["100"], (10, 3), True),
    ],
)
def test_a_device_that_the_build_has_no_code_for_is_named(monkeypatch, built, capability, runs):
    monkeypatch.setattr(native, "devices", lambda: ("cpu", "cuda"))
    monkeypatch.setattr(native._build, "build_info", lambda: {"cuda_archs": built})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    native._too_old.cache_clear()
    x = SimpleNamespace(device=torch.device("cuda", 0))
    try:
        if runs:
            assert backends.choose("native", x) is backends.choose("auto", x) is native
            return
        monkeypatch.setattr(backends.triton, "missing", lambda device: "not here")
        assert backends.choose("auto", x) is backends.reference
        name = ".".join(map(str, capability))
        with pytest.raises(RuntimeError, match=rf"the device has {name}; rebuild with TORCH_CUDA"):
            backends.choose("native", x)
    finally:
        native._too_old.cache_clear()


def test_a_users_capture_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="can't be captured into a CUDA graph"):
        eager.reader(SimpleNamespace(device=torch.device("cuda", 0)), 3)
