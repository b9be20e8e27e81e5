"""Drivers: the eager one's late read, and the graph one's captures, on the CPU and on a device.

Without a device the late read meets slots that arrive late on purpose, and the graph driver a
recorder that writes down every operator and repeats it on the same tensors, as a CUDA graph does:
Python runs at capture only, values and addresses are those of the capture.
"""

import copy
import gc
import pickle
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, Net, contraction, linear, row_tanh
from tape import TapeRecorder, captures, problem, tape_fixture  # noqa: F401
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
    backends,
    compat,
    fixed_point,
)
from fpi_cuda.backends import native
from fpi_cuda.drivers import capture, eager, graph
from fpi_cuda.solve import direction

on_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in backends.available()["native"],
    reason="needs a CUDA device and the native kernels for it",
)


# --- the eager driver reads late ---------------------------------------------------------------


class Tardy:
    """A copy that has arrived when it was asked for the n-th time."""

    def __init__(self, polls):
        self.polls = polls

    def take(self, tally):
        self.copy, self.left = tally.tolist(), self.polls

    def ready(self):
        self.left -= 1
        return self.left < 0

    def wait(self):
        self.left = 0

    def values(self):
        return self.copy


@pytest.fixture
def tardy(monkeypatch):
    def install(lag, polls):
        def reader(x, max_iterations):
            return eager.LateRead([Tardy(polls) for _ in range(lag + 1)], len(x), max_iterations)

        monkeypatch.setattr(eager, "reader", reader)

    return install


def uneven(b=24, n=4):
    """Samples that need very different numbers of iterations; g is exact in any batch."""
    w = contraction(n, 0.97, seed=1)
    z = torch.linspace(0.01, 3, b, dtype=torch.float64)[:, None] * torch.ones(n).double()
    return lambda x, z: row_tanh(x, z, w), torch.zeros_like(z), z[torch.randperm(b)]


def solved(g, x0, z, **options):
    z = z.detach().clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = fixed_point(g, x0, z, **options)
    (gradient,) = torch.autograd.grad(s.x.square().sum(), z)
    return s, gradient


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("polls", [0, 1, 3, 50])
@pytest.mark.parametrize("lag", [1, 2, 5])
def test_a_late_read_changes_no_bit(tardy, solver, lag, polls, per_sample):
    g, x0, z = uneven()
    options = {"solver": solver, "per_sample": per_sample, "tolerance": Tolerance(1e-9)}
    at_once, gradient = solved(g, x0, z, **options)
    tardy(lag, polls)
    late, late_gradient = solved(g, x0, z, **options)
    assert torch.equal(late.x, at_once.x)
    assert torch.equal(late.status, at_once.status)
    assert torch.equal(late.iterations, at_once.iterations)
    assert torch.equal(late.residual_norm, at_once.residual_norm)
    torch.testing.assert_close(late_gradient, gradient, rtol=1e-12, atol=1e-14)
    assert at_once.evaluations <= late.evaluations <= at_once.evaluations + lag
    assert ("compacted" in late.path) == ("compacted" in at_once.path) == per_sample


def test_a_late_read_calls_g_no_more_than_max_iterations(tardy, solver):
    tardy(3, 50)
    g, x0, z = uneven()
    s = fixed_point(g, x0, z, solver=solver, tolerance=Tolerance(0, 0), max_iterations=7)
    assert s.evaluations == 7
    assert (s.iterations == 7).all()


def test_a_late_read_knows_of_failures(tardy):
    tardy(2, 50)
    z = torch.ones(4, 3)
    with pytest.warns(UserWarning, match="4 of 4 samples MAX_ITERATIONS"):
        fixed_point(lambda x, z: 0.99 * x + z, z * 0, z, solver=Picard(), max_iterations=5)


@pytest.mark.parametrize("polls", [0, 1, 2, 50])
def test_late_read_returns_the_newest_arrival_and_waits_for_the_last(polls):
    read = eager.LateRead([Tardy(polls) for _ in range(3)], 9, 5)
    tallies = [torch.tensor([9 - k, k, k]) for k in range(1, 6)]
    seen = [read(t) for t in tallies]
    assert seen[0][:2] == ((8, 1) if polls == 0 else (9, 0))  # what has arrived by then
    assert max(k + 1 - failed for k, (_, failed, _) in enumerate(seen)) <= 2
    assert seen[-1][:2] == (4, 5)  # nothing can follow
    assert [rest for *_, rest in seen] == [9, 9, 8, 7, 6]  # two steps ago, whatever has arrived


class Sizes:
    """A row-wise g that notes the size of each batch it is given."""

    def __init__(self, w):
        self.w, self.seen = w, []

    def __call__(self, x, z):
        self.seen.append(len(x))
        return row_tanh(x, z, self.w)


def test_when_samples_are_left_out_does_not_depend_on_timing(tardy, solver):
    """A library's product has other bits in a smaller batch: arrivals must not choose it."""
    _, x0, z = uneven(b=64)
    runs = []
    for polls in (0, 1, 2, 50):
        tardy(2, polls)
        g = Sizes(contraction(4, 0.97, seed=1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            s = fixed_point(g, x0, z, solver=solver, per_sample=True, tolerance=Tolerance(1e-9))
        runs.append(g.seen[: int(s.iterations.max())])  # later ones are on finished samples
    assert len(set(runs[0])) > 2
    assert all(run == runs[0] for run in runs)


def test_first_rows_puts_the_active_first():
    x = torch.zeros(5, 2)
    from fpi_cuda.record import STATUS, Limits, Progress

    progress = Progress(x, Limits(0, 0, 0, 1, 1))
    progress.counters[:, STATUS] = torch.tensor([1, 0, 2, 0, 1])
    assert progress.first_rows(2).tolist() == [1, 3]
    assert progress.first_rows(4).tolist() == [1, 3, 0, 2]
    progress.narrow(torch.tensor([0, 1, 3]))
    assert progress.first_rows(2).tolist() == [1, 2]


# --- the graph driver, with a recorder that needs no device ------------------------------------


class Affine(nn.Module):
    """x ↦ tanh(s W x + shift) + z, with a buffer and a Python number."""

    def __init__(self, n=3):
        super().__init__()
        self.weight = nn.Parameter(contraction(n, 0.6, seed=2))
        self.register_buffer("shift", torch.full((n,), 0.1, dtype=torch.float64))
        self.scale = 1.0

    def forward(self, x, z):
        return torch.tanh(self.scale * (x @ self.weight.mT) + self.shift) + z


@pytest.fixture
def tanh_calls(monkeypatch):
    """How often Python has called torch.tanh, as `Affine` does once: a list, for its length."""
    calls, tanh = [], torch.tanh

    def counted(x):
        calls.append(1)
        return tanh(x)

    monkeypatch.setattr(torch, "tanh", counted)
    return calls


def forward_backward(g, z, **options):
    """x̂ and the gradients of z and of g's parameters."""
    z = z.detach().clone().requires_grad_()
    layer = FixedPointLayer(g, per_sample=False, **options)
    x = layer(z)
    wanted = [z, *(p for p in g.parameters() if p.requires_grad)]
    return layer.last, [x.detach(), *torch.autograd.grad(x.square().sum(), wanted)]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_graph_gives_the_eager_answer_and_gradients(tape, solver):
    g = Affine()
    for seed in range(3):
        z = problem(seed=seed)
        s, found = forward_backward(g, z, driver="graph", solver=solver)
        e, expected = forward_backward(g, z, driver="eager", solver=solver)
        same(found, expected)
        assert s.path == "native, graph, whole batch"
        assert s.adjoint.path == "native, graph, whole batch"
        assert e.path == e.adjoint.path == "native, eager, whole batch"
        for name in ("status", "iterations", "residual_norm", "contraction", "error_estimate"):
            assert torch.equal(getattr(s, name), getattr(e, name)), name
            assert torch.equal(getattr(s.adjoint, name), getattr(e.adjoint, name)), name
        assert (s.evaluations, s.adjoint.evaluations) == (e.evaluations, e.adjoint.evaluations)
    assert captures() == 2  # forward and backward, once each


def test_a_graph_runs_no_python_of_g(tape, tanh_calls):
    g = Affine().eval()  # a training g with buffers is called once more, at the solution
    forward_backward(g, problem(), driver="graph")
    before = len(tanh_calls)
    assert before > 0
    for seed in range(1, 4):
        forward_backward(g, problem(seed=seed), driver="graph")
    assert len(tanh_calls) == before


def test_auto_captures_nothing(tape):
    """That a graph pays is for a device to show; until then it is asked for by name."""
    g = Affine()
    for _ in range(4):
        s, _ = forward_backward(g, problem())
        assert s.path == s.adjoint.path == "native, eager, whole batch"
    assert captures() == 0


def test_iterations_may_be_repeated_several_at_a_time(tape, monkeypatch, solver):
    """Without a loop on the device four are replayed together: those too many change nothing."""
    g, z = Affine(), problem()
    _, expected = forward_backward(g, z, driver="eager", solver=solver)
    monkeypatch.setattr(TapeRecorder, "unroll", 4)
    monkeypatch.setattr(TapeRecorder, "note", " (replayed)")
    s, found = forward_backward(g, z, driver="graph", solver=solver)
    same(found, expected)
    assert s.path == s.adjoint.path == "native, graph (replayed), whole batch"
    assert s.evaluations % 4 == 0
    options = {"solver": solver, "tolerance": Tolerance(0, 0), "max_iterations": 6}
    few, many = (
        fixed_point(g, z * 0, z, driver=d, per_sample=False, **options) for d in ("eager", "graph")
    )
    assert torch.equal(few.x, many.x)
    assert many.iterations.tolist() == [6] * 5


class Replayed:
    """Stands in for a captured CUDA graph."""

    def __init__(self, run):
        self.replays, self.run = 0, run

    def replay(self):
        self.replays += 1
        self.run()


@pytest.mark.parametrize("polls", [0, 1, 50])
def test_replays_end_with_the_last_active_sample(monkeypatch, polls):
    tally = torch.zeros(3, dtype=torch.int32)

    def iterations():
        tally[0] = max(int(tally[0]) - 4, 0)

    monkeypatch.setattr(eager, "PinnedSlot", lambda: Tardy(polls))
    recorder = object.__new__(capture.CudaRecorder)
    recorder.unroll = 4
    before, body = Replayed(lambda: tally.copy_(torch.tensor([21, 0, 0]))), Replayed(iterations)
    recorder.graphs = [before, body, Replayed(lambda: None)]
    run = recorder._replays(tally, 200)
    for k in (1, 2):
        run()
        assert tally[0] == 0
        assert [g.replays for g in recorder.graphs[::2]] == [k, k]
        assert 6 * k <= body.replays <= (6 + eager.LAG) * k
    recorder._replays(tally, 10)()  # three replays have made ten iterations
    assert tally[0] == 21 - 3 * 4


def test_machines_without_a_loop_on_the_device_say_why(monkeypatch):
    monkeypatch.setattr(native, "devices", lambda: ("cpu", "cuda"))
    monkeypatch.setattr(native, "_too_old", lambda index: None)

    def reason(library):
        monkeypatch.setattr(capture._build, "cuda", library)
        capture.no_while_node.cache_clear()
        return capture.no_while_node(torch.device("cuda", 0))

    try:
        assert reason(None) == "this build has no CUDA library"
        old = SimpleNamespace(driver_version=lambda: 12020)
        assert reason(old) == "the CUDA driver is for 12.2, before 12.4"
        new = SimpleNamespace(driver_version=lambda: 13000)
        assert reason(new) is None
        monkeypatch.setattr(native, "_too_old", lambda index: "too old")
        assert reason(new) == "too old"
    finally:
        capture.no_while_node.cache_clear()


def test_two_forwards_then_two_backwards(tape):
    g = Affine()
    layer = FixedPointLayer(g, driver="graph", per_sample=False)  # shared by both calls
    zs = [problem(seed=i).requires_grad_() for i in range(2)]
    xs = [layer(z) for z in zs]
    wanted = [(z, *g.parameters()) for z in zs]
    found = [torch.autograd.grad(x.square().sum(), w) for x, w in zip(xs, wanted, strict=True)]
    for x, z, gradients in zip(xs, zs, found, strict=True):
        _, expected = forward_backward(g, z, driver="eager")
        same([x.detach(), *gradients], expected)
    assert captures() == 2


def test_results_are_not_the_graphs_own(tape):
    g = Affine()
    layer = FixedPointLayer(g, driver="graph", per_sample=False)
    first = layer(problem())
    kept = first.detach().clone()
    record = layer.last
    iterations = record.iterations.clone()
    layer(1000 * problem(seed=1))
    assert torch.equal(first, kept)
    assert torch.equal(record.iterations, iterations)


def changed(g, change):
    """The solve after a change, by a graph whose first capture was before; and captures made."""
    forward_backward(g, problem(), driver="graph")
    before = captures()
    change(g)
    _, found = forward_backward(g, problem(seed=1), driver="graph")
    _, expected = forward_backward(g, problem(seed=1), driver="eager")
    same(found, expected)
    return captures() - before


def halve(g):
    with torch.no_grad():
        g.weight.mul_(0.5)


def optimise(g):
    for kind in (torch.optim.SGD, torch.optim.Adam):  # the optimiser replaced
        optimiser = kind(g.parameters(), lr=1e-2)
        z = problem().requires_grad_()
        FixedPointLayer(g, driver="graph", per_sample=False)(z).sum().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("change", [halve, optimise, lambda g: g.shift.add_(0.3)])
def test_values_may_change_in_place(tape, change):
    assert changed(Affine(), change) == 0


def replace_buffer(g):
    g.shift = g.shift + 1


def test_a_buffer_may_be_another_tensor(tape):
    assert changed(Affine(), replace_buffer) == 0  # a snapshot is copied in


def assign(g):
    g.load_state_dict({k: v.clone() * 0.5 for k, v in g.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        assign,
        lambda g: g.eval(),
        lambda g: setattr(g, "scale", 0.5),
        lambda g: g.register_forward_hook(lambda m, a, out: out * 0.5),
    ],
    ids=["assign", "eval", "number", "hook"],
)
def test_what_a_graph_has_built_in_is_captured_anew(tape, change):
    assert changed(Affine(), change) == 2


def test_a_frozen_parameter_is_another_backward(tape):
    assert changed(Affine(), lambda g: g.weight.requires_grad_(False)) == 1


def test_moving_the_module_captures_anew(tape):
    g = Affine()
    forward_backward(g, problem(), driver="graph")
    g.to(torch.float32)
    z = problem(seed=1).float()
    _, found = forward_backward(g, z, driver="graph")
    same(found, forward_backward(g, z, driver="eager")[1])
    assert captures() == 4


def test_a_replaced_submodule_captures_anew(tape):
    g = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Tanh())
    layer = FixedPointLayer(Residual(g), driver="graph", per_sample=False)
    layer(problem())
    g[1] = nn.Sigmoid()
    x = layer(problem())
    assert captures() == 2
    expected = fixed_point(layer.g, torch.zeros(5, 3).double(), problem(), per_sample=False).x
    assert torch.equal(x, expected)


class Residual(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, z):
        return 0.5 * self.net(x) + z


def test_options_autocast_and_precision_are_part_of_the_kind(tape, monkeypatch):
    g = Affine().float()
    z = problem().float()

    def solve(**options):
        before = captures()
        options = {"on_failure": "return", **options}
        FixedPointLayer(g, driver="graph", per_sample=False, **options)(z)
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
            s = fixed_point(linear, z * 0, z, params=(w,), driver=driver, per_sample=False)
            into.extend([s.x.detach(), *torch.autograd.grad(s.x.square().sum(), w)])
    same(found, expected)
    assert captures() == 2


def test_tuple_states_of_other_shapes_are_other_kinds(tape):
    def g(x, z):
        return tuple(torch.tanh(0.5 * part) + z for part in x)

    z = torch.ones(4, 1)
    for shapes in (((2,), (3,)), ((3,), (2,))):
        x0 = tuple(torch.zeros(4, *s) for s in shapes)
        a = fixed_point(g, x0, z, driver="graph", per_sample=False).x
        b = fixed_point(g, x0, z, driver="eager", per_sample=False).x
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
        torch.autograd.grad(fixed_point(g, z * 0, z, driver=d, per_sample=False).x.sum(), z)
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
        fixed_point(g, torch.zeros_like(z), z, driver=d, per_sample=False).x
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


def unquiet(g, z, **options):
    z = z.clone().requires_grad_()
    s = fixed_point(g, torch.zeros_like(z), z, solver=Picard(), per_sample=False, **options)
    return s, torch.autograd.grad(s.x.sum(), z)[0]


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
            per_sample=False,
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
        s = fixed_point(g, torch.zeros(5, 3).double(), z, driver=driver, per_sample=False)
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
    layer = FixedPointLayer(g, driver="graph", per_sample=False)
    with torch.inference_mode():
        inside = layer(problem())
    outside = layer(problem())
    assert torch.equal(inside, outside)
    outside.sum().backward()
    assert g.weight.grad is not None


def test_empty_batches_run_eagerly(tape):
    s = fixed_point(Affine(), torch.zeros(0, 3).double(), problem(b=0), driver="graph")
    assert "eager (the state is empty)" in s.path


# --- what a graph can't do ---------------------------------------------------------------------


def fallback(g, match, z=None, **options):
    """Two solves that fall back, with one warning in all."""
    z = problem() if z is None else z
    with pytest.warns(UserWarning, match=match) as caught:
        for _ in range(2):
            s = fixed_point(g, torch.zeros_like(z), z, driver="graph", per_sample=False, **options)
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert "eager (" in s.path
    expected = fixed_point(g, torch.zeros_like(z), z, driver="eager", per_sample=False, **options)
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
            s = fixed_point(g, z * 0, z, driver="graph", per_sample=False)
        assert "eager" in s.path
    assert "graph" in fixed_point(g, z * 0, z, driver="graph", per_sample=False).path


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
    options = {"driver": "graph", "per_sample": False}
    first = fixed_point(g, z * 0, z, **options).x
    with pytest.raises(RuntimeError, match="cudaGraphLaunch"):
        fixed_point(g, z * 0, z, **options)
    assert torch.equal(fixed_point(g, z * 0, z, **options).x, first)
    assert captures() == 2


def test_a_solve_within_g_falls_back(tape):
    inner = FixedPointLayer(Affine(), driver="graph", per_sample=False)

    def g(x, z):
        return 0.1 * inner(x) + z

    with pytest.warns(UserWarning, match="it runs eagerly") as caught:
        s = fixed_point(g, problem() * 0, problem(), driver="graph", per_sample=False)
    assert s.converged.all()
    assert caught
    expected = fixed_point(g, problem() * 0, problem(), driver="eager", per_sample=False).x
    torch.testing.assert_close(s.x, expected)


def test_nobody_waits_for_a_capture(tape):
    g, z = Affine(), problem()
    with graph._capturing:
        s = fixed_point(g, z * 0, z, driver="graph", per_sample=False)
    assert s.path == "native, eager (another solve is being captured), whole batch"
    assert "graph," in fixed_point(g, z * 0, z, driver="graph", per_sample=False).path


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


# --- lifetimes ---------------------------------------------------------------------------------


def test_graphs_go_with_the_layer(tape):
    layer = FixedPointLayer(Affine(), driver="graph", per_sample=False)
    layer(problem()).sum().backward()
    assert captures() == 2
    assert all(ref() is not None for ref in TapeRecorder.made)
    del layer
    gc.collect()
    assert all(ref() is None for ref in TapeRecorder.made)


def test_the_least_recently_used_graph_goes(tape):
    g = Affine()

    def solve(b):
        fixed_point(g, torch.zeros(b, 3).double(), problem(b), driver="graph", per_sample=False)

    for b in range(1, graph.MAX_GRAPHS + 1):
        solve(b)
    solve(1)
    solve(graph.MAX_GRAPHS + 1)  # pushes out b = 2
    gc.collect()
    alive = [ref() is not None for ref in TapeRecorder.made]
    assert alive == [True, False, *[True] * (graph.MAX_GRAPHS - 1)]
    before = captures()
    solve(1)
    assert captures() == before
    solve(2)
    assert captures() == before + 1


def test_layers_copy_and_pickle_with_their_driver(tape):
    layer = FixedPointLayer(Net(), state_shape=(3,), driver="graph", per_sample=False)
    z = torch.randn(4, 2, dtype=torch.float64)
    x = layer(z)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.driver == "graph"
        assert torch.equal(twin(z), x)
    assert list(layer.state_dict()) == [f"g.{k}" for k in layer.g.state_dict()]


def test_threads_share_a_graph(tape):
    g = Affine()
    zs = [problem(seed=i) for i in range(8)]
    expected = [forward_backward(g, z, driver="graph")[1][0] for z in zs]
    found = [None] * len(zs)

    def work(i):
        with torch.no_grad():
            found[i] = FixedPointLayer(g, driver="graph", per_sample=False)(zs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(zs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    same(found, expected)


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


# --- on a device -------------------------------------------------------------------------------


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
    layer = FixedPointLayer(g, driver="graph", per_sample=False)
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
            s = fixed_point(g, z * 0, z, driver="graph", per_sample=False)
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
    fixed_point(g, z * 0, z, driver=driver, per_sample=False)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="can't be captured into a CUDA graph"),
        warnings.catch_warnings(),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        warnings.simplefilter("ignore")  # torch: the graph is empty
        fixed_point(g, z, z, driver=driver, per_sample=False)
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
    layer = FixedPointLayer(moved(Affine(512)), driver="graph", per_sample=False)
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
