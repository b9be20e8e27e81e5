"""The graph driver with a recorder that needs no device: answers, what may change, lifetimes.

The recorder writes down every operator and repeats it on the same tensors, as a CUDA graph does:
Python runs at capture only, values and addresses are those of the capture.
"""

import copy
import gc
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import Net
from helpers_drivers import (
    Affine,
    Residual,
    Tardy,
    assign,
    forward_backward,
    halve,
    replace_buffer,
    same,
    tanh_calls_fixture,  # noqa: F401
)
from tape import TapeRecorder, captures, problem, tape_fixture  # noqa: F401
from torch import nn

from fpi_cuda import FixedPointLayer, Tolerance, fixed_point
from fpi_cuda.backends import native
from fpi_cuda.drivers import capture, eager, graph

# --- the graph driver, with a recorder that needs no device ------------------------------------


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
        fixed_point(g, z * 0, z, driver=d, per_sample=True, **options) for d in ("eager", "graph")
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
    layer = FixedPointLayer(g, driver="graph", per_sample=True)  # shared by both calls
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
    layer = FixedPointLayer(g, driver="graph", per_sample=True)
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


def optimise(g):
    for kind in (torch.optim.SGD, torch.optim.Adam):  # the optimiser replaced
        optimiser = kind(g.parameters(), lr=1e-2)
        z = problem().requires_grad_()
        FixedPointLayer(g, driver="graph", per_sample=True)(z).sum().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("change", [halve, optimise, lambda g: g.shift.add_(0.3)])
def test_values_may_change_in_place(tape, change):
    assert changed(Affine(), change) == 0


def test_a_buffer_may_be_another_tensor(tape):
    assert changed(Affine(), replace_buffer) == 0  # a snapshot is copied in


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
    layer = FixedPointLayer(Residual(g), driver="graph", per_sample=True)
    layer(problem())
    g[1] = nn.Sigmoid()
    x = layer(problem())
    assert captures() == 2
    expected = fixed_point(layer.g, torch.zeros(5, 3).double(), problem(), per_sample=True).x
    assert torch.equal(x, expected)


# --- lifetimes ---------------------------------------------------------------------------------


def test_graphs_go_with_the_layer(tape):
    layer = FixedPointLayer(Affine(), driver="graph", per_sample=True)
    layer(problem()).sum().backward()
    assert captures() == 2
    assert all(ref() is not None for ref in TapeRecorder.made)
    del layer
    gc.collect()
    assert all(ref() is None for ref in TapeRecorder.made)


def test_the_least_recently_used_graph_goes(tape):
    g = Affine()

    def solve(b):
        fixed_point(g, torch.zeros(b, 3).double(), problem(b), driver="graph", per_sample=True)

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
    layer = FixedPointLayer(Net(), state_shape=(3,), driver="graph", per_sample=True)
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
            found[i] = FixedPointLayer(g, driver="graph", per_sample=True)(zs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(zs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    same(found, expected)
