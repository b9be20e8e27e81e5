"""The drivers on a CUDA device."""

import gc
import warnings

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, Net, contraction, row_tanh
from helpers_drivers import (
    Affine,
    Residual,
    assign,
    forward_backward,
    halve,
    replace_buffer,
    solved,
    tanh_calls_fixture,  # noqa: F401
    uneven,
    unquiet,
)
from tape import problem
from torch import nn

from fpi_cuda import FixedPointLayer, GradientStep, Tolerance, backends, fixed_point
from fpi_cuda.drivers import capture, eager

on_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in backends.available()["native"],
    reason="needs a CUDA device and the native kernels for it",
)


def moved(g):
    return g.cuda().eval()


def close(found, expected):
    # g's GEMMs are the same in both, so are the steps; torch chooses by the batch's size.
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@on_cuda
def test_cuda_eager_reads_late(solver):
    _, x0, z = uneven(b=512)
    z = z.cuda()
    w = contraction(4, 0.97, seed=1).cuda()

    def on_device(x, z):
        return row_tanh(x, z, w)

    options = {"solver": solver, "driver": "eager", "tolerance": Tolerance(1e-9)}
    s, gradient = solved(on_device, x0.cuda(), z, **options)
    e, expected = solved(on_device, x0.cuda(), z, **options, backend="reference")
    torch.testing.assert_close(s.x, e.x, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert s.evaluations <= int(s.iterations.max()) + eager.LAG + 1  # one more: the probe
    assert "compacted" in s.path


@on_cuda
def test_cuda_eager_stops_at_max_iterations(solver):
    g, z = moved(Affine()), problem(64).cuda()
    options = {"tolerance": Tolerance(0, 0), "max_iterations": 9, "driver": "eager"}
    assert fixed_point(g, z * 0, z, solver=solver, **options).evaluations == 9


@on_cuda
def test_cuda_graph_gives_the_eager_answer_and_gradients(solver, tanh_calls):
    g = moved(Affine())
    for seed in range(4):
        z = problem(64, seed=seed).cuda()
        s, found = forward_backward(g, z, driver="graph", solver=solver)
        e, expected = forward_backward(g, z, driver="eager", solver=solver)
        close(found, expected)
        assert s.path == s.adjoint.path == "native, graph, whole batch"
        assert torch.equal(s.status, e.status)
        assert torch.equal(s.iterations, e.iterations)
        assert torch.equal(s.adjoint.iterations, e.adjoint.iterations)
    before = len(tanh_calls)
    forward_backward(g, problem(64, seed=9).cuda(), driver="graph")
    assert len(tanh_calls) == before


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_graph_in_other_dtypes(dtype):
    g = moved(Affine(64)).to(dtype)
    z = problem(128, 64).to("cuda", dtype)
    for _ in range(3):
        _, found = forward_backward(g, z, driver="graph", on_failure="return")
    _, expected = forward_backward(g, z, driver="eager", on_failure="return")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def derivatives_are_right(device, driver, solver):
    w = contraction(3, 0.6).to(device).requires_grad_()
    z = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)

    def g(x, z, w):
        return torch.tanh(x @ w.mT + z)

    def solved(z, w):
        options = {"solver": solver, "tolerance": TIGHT, "adjoint": TIGHT_ADJOINT}
        return fixed_point(g, torch.zeros_like(z), z, params=(w,), driver=driver, **options).x

    assert torch.autograd.gradcheck(solved, (z, w))
    assert torch.autograd.gradgradcheck(solved, (z, w))


def test_the_check_of_derivatives_holds_on_the_cpu(solver):
    derivatives_are_right("cpu", "eager", solver)


@on_cuda
@pytest.mark.parametrize("driver", ["eager", "graph"])
def test_cuda_derivatives(driver, solver):
    derivatives_are_right("cuda", driver, solver)


@on_cuda
def test_cuda_auto_captures_nothing():
    g = moved(Affine())
    for seed in range(4):
        assert "eager" in forward_backward(g, problem(seed=seed).cuda())[0].path


@on_cuda
def test_cuda_replays_give_what_the_loop_on_the_device_gives(monkeypatch, solver):
    g, z = moved(Affine()), problem(64).cuda()
    _, expected = forward_backward(g, z, driver="graph", solver=solver)
    monkeypatch.setattr(capture, "no_while_node", lambda _: "none for this test")
    twin = moved(Affine())
    for _ in range(2):
        s, found = forward_backward(twin, z, driver="graph", solver=solver)
        assert "graph (replayed 4 iterations at a time: none for this test)" in s.path
        close(found, expected)


@on_cuda
def test_cuda_two_forwards_then_two_backwards():
    g = moved(Affine())
    layer = FixedPointLayer(g, driver="graph", per_sample=True)
    zs = [problem(seed=i).cuda().requires_grad_() for i in range(2)]
    xs = [layer(z) for z in zs]
    found = [
        torch.autograd.grad(x.square().sum(), (z, *g.parameters()))
        for x, z in zip(xs, zs, strict=True)
    ]
    for x, z, gradients in zip(xs, zs, found, strict=True):
        close([x.detach(), *gradients], forward_backward(g, z, driver="eager")[1])


@on_cuda
@pytest.mark.parametrize("change", [halve, assign, replace_buffer])
def test_cuda_changes(change):
    g = moved(Affine())
    forward_backward(g, problem().cuda(), driver="graph")
    change(g)
    z = problem(seed=1).cuda()
    s, found = forward_backward(g, z, driver="graph")
    assert "graph," in s.path
    close(found, forward_backward(g, z, driver="eager")[1])


@on_cuda
def test_cuda_convolution_with_batch_norm():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh())
    g = moved(Residual(net)).to(memory_format=torch.channels_last)
    z = torch.randn(4, 8, 12, 12, device="cuda").to(memory_format=torch.channels_last)
    _, found = forward_backward(g, z, driver="graph")
    _, expected = forward_backward(g, z, driver="eager")
    assert found[0].stride() == expected[0].stride()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@on_cuda
def test_cuda_gradient_step():
    net = Net(3, 3).cuda()

    class Convex(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, z):
            return 0.5 * (x - z).square().sum(1) + 0.1 * self.net(x, z).square().sum(1)

    g = GradientStep(Convex(), 0.5)
    z = problem().cuda()
    close(
        forward_backward(g, z, driver="graph")[1],
        forward_backward(g, z, driver="eager")[1],
    )


@on_cuda
def test_cuda_failures_are_masked():
    def g(x, z):
        return torch.where(z > 5, 3 * x + 1, 0.5 * x) + z

    z = torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0]], dtype=torch.float64, device="cuda")
    results = []
    for driver in ("graph", "eager"):
        with pytest.warns(UserWarning, match="1 of 3 samples DIVERGED"):
            s, gradient = unquiet(g, z, driver=driver)
        results.append([s.x.detach(), gradient])
    close(*results)


@on_cuda
def test_cuda_host_sync_falls_back_and_leaves_torch_whole():
    def g(x, z):
        return 0.5 * x * float(z.abs().max().clamp(max=1)) + z

    z = problem().cuda()
    with pytest.warns(UserWarning, match="it runs eagerly") as caught:
        for _ in range(2):
            s = fixed_point(g, z * 0, z, driver="graph", per_sample=True)
    assert len(caught) == 1
    assert "eager (" in s.path
    # The stream, the generator and the allocator are out of the capture, and another one works.
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.rand(8, device="cuda").isfinite().all()
    torch.cuda.empty_cache()
    assert "graph," in forward_backward(moved(Affine()), z, driver="graph")[0].path


@on_cuda
def test_cuda_random_numbers_are_refused():
    def g(x, z):
        return 0.5 * nn.functional.dropout(x, 0.5) + z

    z = problem().cuda()
    state = torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError, match="draws random numbers"):
        fixed_point(g, z * 0, z, driver="graph")
    assert torch.equal(torch.cuda.get_rng_state(), state)


@on_cuda
@pytest.mark.parametrize("driver", ["eager", "graph"])
def test_cuda_inside_a_users_capture_raises(driver):
    g, z = moved(Affine()), problem().cuda()
    fixed_point(g, z * 0, z, driver=driver, per_sample=True)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="can't be captured into a CUDA graph"),
        warnings.catch_warnings(),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        warnings.simplefilter("ignore")  # torch: the graph is empty
        fixed_point(g, z, z, driver=driver, per_sample=True)
    assert "graph," in forward_backward(g, z, driver="graph")[0].path


@on_cuda
@pytest.mark.parametrize("driver", ["eager", "graph"])
def test_cuda_work_runs_on_the_current_stream(driver):
    g = moved(Affine())
    z = problem(256).cuda()
    expected = forward_backward(g, z, driver="eager")[1]
    stream = torch.cuda.Stream()
    for _ in range(3):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)  # z is late: a solve on another stream would not see it
            late = torch.zeros_like(z).copy_(z)
            found = forward_backward(g, late, driver=driver)[1]
        torch.cuda.current_stream().wait_stream(stream)
        close(found, expected)


@on_cuda
def test_cuda_graphs_go_with_the_layer_and_give_their_memory_back():
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    layer = FixedPointLayer(moved(Affine(512)), driver="graph", per_sample=True)
    layer(problem(2048, 512).cuda()).sum().backward()
    assert torch.cuda.memory_reserved() > before
    del layer
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # Libraries keep a workspace of some MiB; the graphs held more than ten states of 8 MiB.
    assert torch.cuda.memory_reserved() - before < 48 * 2**20


@on_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("driver", ["eager", "graph"])
def test_cuda_second_device(driver):
    g = Affine().eval().to("cuda:1")
    z = problem().to("cuda:1")
    _, found = forward_backward(g, z, driver=driver)
    assert found[0].device == z.device
    close([t.cpu() for t in found], forward_backward(g.cpu(), z.cpu())[1])


@on_cuda
def test_cuda_inputs_elsewhere_raise():
    with pytest.raises(ValueError, match=r"inputs\[0\] must be on x0's device, cuda:0 \(got cpu\)"):
        fixed_point(lambda x, z: x, torch.zeros(2, 3, device="cuda"), torch.zeros(2, 3))
