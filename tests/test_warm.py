"""`layer.warm`: solves start where the last one of their key ended, forward and backward."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import Net, contraction, linear
from helpers_layers import EXACT, Normalised, close, double, layer_of, unrolled
from torch.autograd import grad

from benchmarks import warm as benchmark
from fpi_cuda import (
    DenseStep,
    FixedPointError,
    FixedPointLayer,
    ImplicitAdjoint,
    Picard,
    Tolerance,
)
from fpi_cuda.warm import Slot

pytestmark = pytest.mark.usefixtures("one_thread")


def iterations(layer):
    """The most of any sample, forward and backward."""
    return tuple(int(record.iterations.max()) for record in (layer.last, layer.last.adjoint))


def differentiated(layer, z, weight=1.0, **call):
    z = z.detach().requires_grad_()
    x = layer(z, **call)
    (x.sin().sum() * weight).backward()
    return x.detach(), z.grad


@pytest.fixture(params=["native, whole", "native, eager", "reference, eager"])
def dense(request, solver):
    backend, _, driver = request.param.partition(", ")
    if backend == "native":
        pytest.importorskip("fpi_cuda._C")
    driver = "auto" if driver == "whole" else driver
    return FixedPointLayer(
        DenseStep(5, 2), solver=solver, backend=backend, driver=driver, warm=True
    )


def test_where_nothing_changed_a_solve_takes_an_iteration_or_two(dense):
    z = torch.randn(4, 2)
    x, dz = differentiated(dense, z)
    assert min(iterations(dense)) > 3
    for weight in (1.0, 64.0, 1e-25):  # the loss's scale is no change
        again, dz_again = differentiated(dense, z, weight)
        assert max(iterations(dense)) <= 2
        torch.testing.assert_close(again, x, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(dz_again / weight, dz, rtol=1e-3, atol=1e-4)
    assert (dense.warm.hits, dense.warm.misses) == (3, 1)


def test_training_takes_fewer_iterations_and_has_the_gradients_of_the_unrolled_loop(backend):
    net, z = Net(), double(4, 2)
    options = {"backend": backend, "solver": Picard()}
    warm, cold = (layer_of(net, warm=w, **options) for w in (True, False))
    taken = []
    for _ in range(4):
        for layer in (cold, warm):
            found = grad(layer(z).sin().sum(), tuple(net.parameters()))
            taken.append(iterations(layer))
        true = grad(unrolled(net, z).sin().sum(), tuple(net.parameters()))
        for one, expected in zip(found, true, strict=True):
            close(one, expected)
        with torch.no_grad():
            for p, g in zip(net.parameters(), true, strict=True):
                p.sub_(1e-4 * g)
    assert taken[0] == taken[1]
    for of_cold, of_warm in zip(taken[2::2], taken[3::2], strict=True):
        assert of_warm[0] <= of_cold[0] - 3
        assert of_warm[1] <= of_cold[1] - 3


def test_the_adjoint_of_another_direction_starts_as_if_nothing_were_known():
    a = contraction(3, 0.6)
    layer = FixedPointLayer(lambda x, z: linear(x, z, a), solver=Picard(), warm=True, **EXACT)
    v = torch.eye(3, dtype=torch.float64)
    true = torch.linalg.inv(torch.eye(3, dtype=a.dtype) - a)
    for row in (0, 1, 2):  # each orthogonal to the one before
        z = double(1, 3).requires_grad_()
        layer(z).backward(v[row : row + 1])
        close(z.grad[0], true[row])
        found = layer.last.adjoint.iterations
        layer.warm.clear()
        layer(z).backward(v[row : row + 1])
        assert torch.equal(found, layer.last.adjoint.iterations)


def test_samples_without_a_gradient_have_none_whatever_came_before(dense):
    z = torch.randn(4, 2)
    differentiated(dense, z)
    z = z.requires_grad_()
    (dense(z)[:2].sin().sum()).backward()
    assert not z.grad[2:].any()
    assert dense.last.adjoint.iterations[2:].tolist() == [0, 0]
    assert dense.last.adjoint.converged.all()
    differentiated(dense, z)  # and those left out start cold again
    found = dense.last.adjoint.iterations
    assert found[:2].max() <= 2 < found[2:].min()


@pytest.mark.parametrize("state", ["tuple", "one system"])
def test_tuple_states_and_systems_start_warm(state, solver, backend):
    options = {"solver": solver, "backend": backend, "on_failure": "raise", **EXACT}
    z, norm = double(4, 3), Normalised()
    if state == "tuple":

        def g(x, z):
            return 0.5 * x[0].tanh() + z, 0.3 * x[1] + x[0][:, :2]

        layer = FixedPointLayer(g, state_shape=((3,), (2,)), **options)
    else:
        layer = FixedPointLayer(norm, per_sample=False, **options)

    def loss(x):
        return sum(t.sin().sum() for t in (x if isinstance(x, tuple) else (x,)))

    z.requires_grad_()
    (true,) = grad(loss(layer(z)), z)
    layer.warm = True
    for _ in range(2):
        (mine,) = grad(loss(layer(z)), z)
    assert max(iterations(layer)) <= 2
    close(mine, true)


# --- what is not kept ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_a_sample_that_failed_starts_cold_and_the_others_warm(where, backend):
    layer = layer_of(Net(), backend=backend, solver=Picard(), warm=True, on_failure="return")
    z = double(4, 2)
    x, dz = differentiated(layer, z)
    cold = layer.last.iterations, layer.last.adjoint.iterations
    gone = torch.tensor([1])
    if where == "input":
        differentiated(layer, z.index_fill(0, gone, torch.nan))
    else:
        z.requires_grad_()
        layer(z).backward(torch.ones(4, 3, dtype=z.dtype).index_fill(0, gone, torch.nan))
        assert layer.last.adjoint.converged.tolist() == [True, False, True, True]
    again, dz_again = differentiated(layer, z)
    close(again, x)
    close(dz_again, dz)
    assert layer.last.adjoint.iterations[1] == cold[1][1]
    if where == "input":
        assert layer.last.iterations[1] == cold[0][1]
        for record in (layer.last, layer.last.adjoint):
            assert record.iterations[[0, 2, 3]].max() <= 2


@pytest.mark.parametrize("failed", ["mask", "use"])
def test_an_adjoint_that_is_not_finite_leaves_nothing(failed, backend):
    """The derivative of the square root at 0 is infinite, in one sample alone."""
    layer = FixedPointLayer(
        lambda x, z, s: 0.5 * x + z + s * x.abs().sqrt(),
        backend=backend,
        adjoint=ImplicitAdjoint(failed=failed),
        on_failure="return",
        warm=True,
    )
    z, s = torch.tensor([[0.0], [1.0]], requires_grad=True), torch.tensor([[1.0], [0.0]])
    layer(z, s).sum().backward()
    assert layer.last.adjoint.converged.tolist() == [False, True]
    z = torch.ones(2, 1, requires_grad=True)
    layer(z, torch.zeros_like(s)).sum().backward()
    assert layer.warm.hits == 1
    torch.testing.assert_close(z.grad, torch.full_like(z, 2.0), rtol=1e-3, atol=0)


def test_a_solve_that_raises_leaves_nothing():
    layer = layer_of(Net(), warm=True)
    z = double(2, 2)
    layer(z)
    at_first = layer.last.iterations
    layer.on_failure = "raise"
    with pytest.raises(FixedPointError):
        layer(z * torch.nan)
    layer(z)
    assert torch.equal(layer.last.iterations, at_first)


def test_a_solve_that_runs_away_does_not_go_on_in_the_next_call():
    """x ← 1.1 x + 1 for ten iterations: each call would end 2.6 times as far out."""
    layer = FixedPointLayer(
        lambda x, z: 1.1 * x + z,
        solver=Picard(),
        max_iterations=10,
        warm=True,
        on_failure="return",
    )
    z = torch.ones(1, 1, dtype=torch.float64)
    ends = []
    for _ in range(3):
        x, dz = differentiated(layer, z)
        ends.append((x.item(), dz.item()))
    assert len(set(ends)) == 1


def test_a_solve_out_of_iterations_goes_on_in_the_next_call(backend):
    layer = layer_of(Net(), backend=backend, solver=Picard(), on_failure="return", warm=True)
    layer.max_iterations = 5
    z = double(4, 2)
    for _ in range(20):
        x, dz = differentiated(layer, z)
    z.requires_grad_()
    true = unrolled(layer.g.net, z)
    close(x, true.detach())
    close(dz, grad(true.sin().sum(), z)[0])


def test_no_graph_and_no_input_is_kept():
    layer = layer_of(Net(), warm=True)
    gc.collect()
    gc.disable()
    try:
        z = double(4, 2).requires_grad_()
        x = layer(z)
        x.sin().sum().backward()
        known = weakref.ref(z), weakref.ref(x)
        del x, z
        assert [r() for r in known] == [None, None]
    finally:
        gc.enable()
    (slot,) = layer.warm._slots.values()
    assert not any(t.requires_grad for t in (slot.x, *slot.c[:2]))


def test_higher_orders_start_cold_and_leave_nothing(monkeypatch):
    left, keep = [], Slot.keep_adjoint
    monkeypatch.setattr(Slot, "keep_adjoint", lambda *given: left.append(given) or keep(*given))
    warm, cold = (layer_of(Net(), warm=w) for w in (True, False))
    z, found = double(2, 2).requires_grad_(), []
    for layer in (cold, warm, warm):
        (first,) = grad(layer(z).sin().sum(), z, create_graph=True)
        counts = layer.last.adjoint.iterations
        assert len(left) == max(len(found) - 1, 0)
        found.append((grad(first.square().sum(), z)[0], counts))
    assert len(left) == 2  # g's own adjoint once each, without a graph; not that of the adjoint
    for second, counts in found[1:]:
        close(second, found[0][0])
        assert torch.equal(counts, found[0][1])


def test_transforms_start_cold_and_leave_nothing():
    layer = layer_of(Net(), warm=True)
    z = double(2, 2)
    layer(z)
    counts = layer.last.iterations
    kept = copy.copy(vars(next(iter(layer.warm._slots.values()))))
    torch.func.jacrev(layer)(z)
    assert torch.equal(layer.last.iterations, counts)
    mapped = torch.vmap(layer)(double(3, 2, 2))
    assert mapped.shape == (3, 2, 3)
    (slot,) = layer.warm._slots.values()
    assert vars(slot) == kept
    assert (layer.warm.hits, layer.warm.misses) == (0, 1)


def test_samples_that_depend_on_each_other_are_found_out_from_a_start_near_the_solution():
    def g(x, z):
        return 0.5 * (x - x.mean(0)).tanh() + 0.4 * x.mean(0) + z

    layer = FixedPointLayer(g, per_sample=False, solver=Picard(), warm=True)
    z = torch.randn(6, 3)
    for _ in range(3):
        layer(z)
    layer.per_sample = "auto"
    with pytest.warns(UserWarning, match="depend on each other"):
        layer(z)
    assert layer.last.record.system == 6


# --- keys, and what is kept under them -------------------------------------------------------


def test_each_key_has_its_own_start_and_a_change_of_shape_forgets_it():
    layer = layer_of(Net(), warm=True)
    a, b = double(2, 2), double(2, 2) + 3
    for key, z in (("a", a), ("b", b)):
        layer(z, key=key)
        assert layer.last.iterations.max() > 3
    for key, z in (("a", a), ("b", b)):
        layer(z, key=key)
        assert layer.last.iterations.max() <= 2
    layer(double(3, 2), key="a")
    layer(a, key="a")
    assert layer.last.iterations.min() > 3
    layer.float()(a.float(), key="b")
    assert layer.last.iterations.min() > 3
    assert (layer.warm.hits, layer.warm.misses) == (2, 5)


def test_without_a_key_each_shape_has_a_start():
    layer = layer_of(Net(), warm=True)
    full, rest = double(4, 2), double(3, 2)
    for z in (full, rest, full, rest):
        layer(z)
    assert (layer.warm.hits, layer.warm.misses) == (2, 2)
    assert layer.last.iterations.max() <= 2


def test_a_start_that_is_given_wins_and_is_replaced_by_its_solution():
    layer = FixedPointLayer(lambda x, z: x**2 + z, warm=True)  # repels at 0.9, attracts at 0.1
    z = torch.full((1, 1), 0.09, dtype=torch.float64)
    close(layer(z, x0=torch.full_like(z, 0.9)), torch.full_like(z, 0.9))
    close(layer(z), torch.full_like(z, 0.9))  # of two fixed points, the last call's
    layer.warm.clear()
    torch.testing.assert_close(layer(z), torch.full_like(z, 0.1), rtol=1e-5, atol=0)


def test_the_least_recently_used_key_goes_first():
    layer = layer_of(Net(), warm=2)
    z = double(2, 2)
    for key in (0, 1, 0, 2):  # 1 goes
        layer(z, key=key)
    assert repr(layer.warm) == "Warm(2 of 2 slots, 1 hits, 3 misses)"
    for key, hits in ((0, 2), (1, 2), (0, 3)):
        layer(z, key=key)
        assert layer.warm.hits == hits
    layer.warm.capacity = 1
    layer(z, key=5)
    assert "1 of 1" in repr(layer.warm)


def test_two_forwards_of_a_key_before_their_backwards(solver):
    net = Net()
    layer = layer_of(net, solver=solver, warm=True)
    tensors = tuple(net.parameters())
    for _ in range(2):
        a, b = double(2, 2), double(2, 2)
        x, y = layer(a), layer(b)
        for mine, z in ((y, b), (x, a)):
            true = grad(unrolled(net, z).sin().sum(), tensors)
            for one, expected in zip(grad(mine.sin().sum(), tensors), true, strict=True):
                close(one, expected)


def test_it_may_be_set_later_and_serves_eval_and_inference_too():
    layer = layer_of(Net())
    assert layer.warm is None
    layer.warm = True
    kept = layer.warm
    layer.warm = True
    assert layer.warm is kept
    z = double(2, 2)
    with torch.inference_mode():
        layer.eval()(z)
    _, dz = differentiated(layer.train(), z)
    assert layer.last.iterations.max() <= 2
    z.requires_grad_()
    close(dz, grad(unrolled(layer.g.net, z).sin().sum(), z)[0])
    layer.warm = False
    layer(z)
    assert layer.last.iterations.min() > 3


def test_copies_and_pickles_start_empty_and_state_dict_has_nothing():
    layer = layer_of(Net(), warm=3)
    z = double(2, 2)
    x, _ = differentiated(layer, z)
    assert set(layer.state_dict()) == {f"g.{key}" for key in layer.g.state_dict()}
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin.warm) == "Warm(0 of 3 slots, 0 hits, 0 misses)"
        close(twin(z), x)
    assert repr(layer.warm) == "Warm(1 of 3 slots, 0 hits, 1 misses)"


def test_a_layer_in_the_step_of_another_starts_warm():
    inner = layer_of(Net(n=3, d=3), warm=True)
    tight = {"tolerance": Tolerance(1e-10), "adjoint": ImplicitAdjoint(tolerance=Tolerance(1e-10))}
    outer = FixedPointLayer(lambda x, z: 0.3 * inner(x) + z, solver=Picard(), **tight)
    z = double(2, 3)
    found = differentiated(outer, z)
    assert inner.warm.hits > 0
    inner.warm = False
    for one, expected in zip(found, differentiated(outer, z), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-8, atol=1e-8)


def test_the_benchmark_counts_fewer_iterations_where_it_starts_warm():
    found = benchmark.runs(0.8, Picard(), 1e-3, benchmark.SAMPLES, 2)
    cold, warm = (found[name].counts[0] for name in ("cold", "warm"))
    assert warm[0] < cold[0] - 1
    assert warm[1] < cold[1] - 1


@pytest.mark.parametrize(
    ("key", "match"), [(torch.tensor(1), r"key=int\(i\)"), ([1], "must be hashable")]
)
def test_what_can_be_no_key_is_refused(key, match):
    with pytest.raises(TypeError, match=match):
        layer_of(Net())(double(2, 2), key=key)


@pytest.mark.parametrize("warm", [0, -1, 1.5, "yes"])
def test_what_can_be_no_number_of_keys_is_refused(warm):
    with pytest.raises(ValueError, match="warm must be a whole number >= 1"):
        layer_of(Net(), warm=warm)
