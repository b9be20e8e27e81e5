"""What a graph of a recorder can solve: options, states and steps of all kinds."""

import copy

import pytest
import torch
from helpers import Net, contraction, linear
from helpers_drivers import Affine, Residual, forward_backward, same, unquiet
from tape import captures, problem, tape_fixture  # noqa: F401
from torch import nn

from fpi_cuda import (
    Anderson,
    ConvStep,
    DenseStep,
    FixedPointError,
    FixedPointLayer,
    GradientStep,
    ImplicitAdjoint,
    Picard,
    Status,
    Tolerance,
    fixed_point,
)
from fpi_cuda.backends import native
from fpi_cuda.solve import direction


def test_options_autocast_and_precision_are_part_of_the_kind(tape, monkeypatch):
    g = Affine().float()
    z = problem().float()

    def solve(**options):
        before = captures()
        options = {"on_failure": "return", **options}
        FixedPointLayer(g, driver="graph", per_sample=True, **options)(z)
        return captures() - before

    assert solve() == 1
    assert solve() == 0
    assert solve(tolerance=Tolerance(1e-3)) == 1
    assert solve(solver=Picard()) == 1
    assert solve(solver=Anderson(history=3)) == 1
    assert solve(max_iterations=50) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert solve() == 1
        assert solve() == 0
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert solve() == 1
    assert solve(on_failure="warn") == 0  # the host's business


def test_explicit_params_are_copied_in(tape):
    z = problem()
    found, expected = [], []
    for seed in range(3):
        for driver, into in (("graph", found), ("eager", expected)):
            w = contraction(3, 0.5, seed).requires_grad_()
            s = fixed_point(linear, z * 0, z, params=(w,), driver=driver, per_sample=True)
            into.extend([s.x.detach(), *torch.autograd.grad(s.x.square().sum(), w)])
    same(found, expected)
    assert captures() == 2


def test_tuple_states_of_other_shapes_are_other_kinds(tape):
    def g(x, z):
        return tuple(torch.tanh(0.5 * part) + z for part in x)

    z = torch.ones(4, 1)
    for shapes in (((2,), (3,)), ((3,), (2,))):
        x0 = tuple(torch.zeros(4, *s) for s in shapes)
        a = fixed_point(g, x0, z, driver="graph", per_sample=True).x
        b = fixed_point(g, x0, z, driver="eager", per_sample=True).x
        same(a, b)
    assert captures() == 2


def test_spectral_norm_and_batch_norm(tape):
    net = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3, dtype=torch.float64)),
        nn.BatchNorm1d(3, dtype=torch.float64),
    )
    g = Residual(net)
    for mode in (True, False):
        g.train(mode)
        for seed in range(3):
            twin = copy.deepcopy(g)  # both move their buffers once a call
            _, found = forward_backward(g, problem(seed=seed), driver="graph")
            _, expected = forward_backward(twin, problem(seed=seed), driver="eager")
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
            same(g.buffers(), twin.buffers())
    assert captures() == 4


def test_gradient_step(tape):
    net = Net(3, 3)
    g = GradientStep(lambda x, z: 0.5 * (x - z).square().sum(1) + 0.1 * x.cos().sum(1), 0.5)
    z = problem().requires_grad_()
    found, expected = (
        torch.autograd.grad(fixed_point(g, z * 0, z, driver=d, per_sample=True).x.sum(), z)
        for d in ("graph", "eager")
    )
    same(found, expected)
    same(
        forward_backward(net, problem(), driver="graph")[1],
        forward_backward(net, problem(), driver="eager")[1],
    )


def test_channels_last(tape):
    conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    with torch.no_grad():
        conv.weight.mul_(0.3)
    g = Residual(conv)
    z = torch.randn(3, 4, 6, 6).to(memory_format=torch.channels_last)
    found, expected = (
        fixed_point(g, torch.zeros_like(z), z, driver=d, per_sample=True).x
        for d in ("graph", "eager")
    )
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)


class Kernels:
    """Stands in for kernels that leave finished samples out: plain torch, without a host's read."""

    STEPS = native  # which need no sums, and these leave none

    class Chain:
        tiles = 1

        def __init__(self, form, like, *, tf32):
            self.form = form

        def __call__(self, x, out, index, count, norms):
            listed = torch.arange(len(x), dtype=torch.int32) < count
            active = torch.zeros(len(x), dtype=torch.bool).index_put((index.long(),), listed)
            out.copy_(torch.where(active[:, None, None, None], self.form(x), out))

    @staticmethod
    def active_samples(status, into=None):
        ended = (status != 0).to(torch.int32)
        found = ended.argsort(stable=True).to(torch.int32), (1 - ended).sum()[None]
        if into is None:
            return found
        for to, t in zip(into, found, strict=True):
            to.copy_(t)
        return into


@pytest.mark.parametrize("kernels", [None, Kernels], ids=["torch", "masked"])
def test_a_step_of_convolutions(tape, monkeypatch, kernels, solver):
    if kernels:
        monkeypatch.setattr(direction, "convolutions", lambda *_: kernels)
    rows = "masked" if kernels else "whole batch"
    g = ConvStep(4, 2, hidden=(5,), output_activation="tanh", residual=0.1).double()
    for seed in range(3):
        z = problem(3 * 2, 5 * 4, seed=seed).view(3, 2, 5, 4)
        z *= torch.tensor([0.1, 1, 10.0], dtype=z.dtype)[:, None, None, None]
        s, found = forward_backward(g, z, driver="graph", solver=solver)
        assert s.path == s.adjoint.path == f"native, graph, {rows}"
        e, expected = forward_backward(g, z, driver="eager", solver=solver, backend="reference")
        assert torch.equal(s.iterations, e.iterations)
        assert torch.equal(s.adjoint.iterations, e.adjoint.iterations)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert captures() == 2


@pytest.mark.parametrize("hidden", [None, 4])
def test_a_step_of_dense_layers(tape, hidden):
    g = DenseStep(3, 2, hidden=hidden).double()
    z = problem(5, 2)
    s, found = forward_backward(g, z, driver="graph")
    assert s.path == s.adjoint.path == "native, graph, whole batch"
    _, expected = forward_backward(g, z, driver="eager")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_failed_samples_are_masked_in_the_graph(tape):
    def g(x, z):
        return torch.where(z > 5, 3 * x + 1, 0.5 * x) + z

    z = torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0]], dtype=torch.float64)
    results = []
    for driver in ("graph", "eager"):
        with pytest.warns(UserWarning, match="1 of 3 samples DIVERGED"):
            s, gradient = unquiet(g, z, driver=driver)
        results.append([s.x.detach(), gradient])
        assert s.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
        assert gradient[1].eq(0).all()
    same(*results)
    with pytest.raises(FixedPointError, match="DIVERGED"):
        fixed_point(g, z * 0, z, driver="graph", solver=Picard(), on_failure="raise")


@pytest.mark.parametrize("failed", ["mask", "use"])
def test_adjoint_failures_are_masked_in_the_graph(tape, failed):
    def g(x, z, k, w):
        return z + w * (x - z + k).sqrt()  # sample 0 stays at z, where the slope is infinite

    z, k = problem(), torch.ones(5, 3).double()
    k[0] = 0
    w = torch.full((3,), 0.5).double().requires_grad_()
    results = []
    for driver in ("graph", "eager"):
        leaf = z.clone().requires_grad_()
        s = fixed_point(
            *(g, z, leaf, k),
            params=(w,),
            driver=driver,
            per_sample=True,
            on_failure="return",
            adjoint=ImplicitAdjoint(failed=failed),
        )
        results.append(torch.autograd.grad(s.x.sum(), (leaf, w)))
        assert s.adjoint.status.tolist() == [Status.NONFINITE, *[Status.CONVERGED] * 4]
        assert driver in s.adjoint.path
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_short_adjoint_gives_the_same_in_the_graph(tape):
    g = Affine()
    options = {"adjoint": ImplicitAdjoint(max_iterations=1), "on_failure": "return"}
    same(
        forward_backward(g, problem(), driver="graph", **options)[1],
        forward_backward(g, problem(), driver="eager", **options)[1],
    )


def test_samples_without_a_gradient_cost_nothing(tape):
    g = Affine()
    grads = []
    for driver in ("graph", "eager"):
        z = problem().requires_grad_()
        s = fixed_point(g, torch.zeros(5, 3).double(), z, driver=driver, per_sample=True)
        grads += torch.autograd.grad(s.x[2].sum(), z)
        assert s.adjoint.iterations.tolist().count(0) == 4
    assert torch.equal(*grads)


def test_higher_orders_and_vmap_run_eagerly(tape):
    g = Affine()
    z = problem()[:, :3].requires_grad_()
    s = fixed_point(
        g, torch.zeros(5, 3).double(), z, driver="graph", tolerance=Tolerance(1e-12),
        adjoint=ImplicitAdjoint(tolerance=Tolerance(1e-12)),
    )  # fmt: skip
    (first,) = torch.autograd.grad(s.x.square().sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z)
    assert second.isfinite().all()
    many = torch.stack([problem(seed=i) for i in range(3)])

    def solve(z):
        return fixed_point(g, torch.zeros_like(z), z, driver="graph").x

    mapped = torch.vmap(solve)(many)
    for one, z in zip(mapped, many, strict=True):
        torch.testing.assert_close(one, solve(z), rtol=1e-4, atol=1e-5)


def test_inference_mode(tape):
    g = Affine()
    layer = FixedPointLayer(g, driver="graph", per_sample=True)
    with torch.inference_mode():
        inside = layer(problem())
    outside = layer(problem())
    assert torch.equal(inside, outside)
    outside.sum().backward()
    assert g.weight.grad is not None


def test_empty_batches_run_eagerly(tape):
    s = fixed_point(Affine(), torch.zeros(0, 3).double(), problem(b=0), driver="graph")
    assert "eager (the state is empty)" in s.path


class Noting(Affine):
    """Leaves a loss behind."""

    aux = None

    def forward(self, x, z):
        self.aux = x.square().sum()
        return super().forward(x, z)


@pytest.mark.parametrize("closure", [False, True])
def test_attributes_that_g_sets_come_from_the_solution_of_each_launch(tape, closure):
    g = Noting()
    z, before = problem().requires_grad_(), captures()
    step = g.forward if closure else g
    for _ in range(2):
        g.aux = None  # a solve of the same kind as the first
        s = fixed_point(step, torch.zeros_like(z), z, driver="graph", per_sample=False)
        assert "graph" in s.path
        same([g.aux], [s.x.square().sum()])
        mine = torch.autograd.grad(g.aux, z, retain_graph=True)
        same(mine, torch.autograd.grad(s.x.square().sum(), z))
    assert captures() == before + 2  # forward and backward, once each
