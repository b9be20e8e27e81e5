"""What a solve shows of itself: each sample's residual by iteration, and a callback."""

import gc
import warnings
import weakref
from collections import namedtuple
from itertools import pairwise

import pytest
import torch
from helpers import contraction, row_tanh
from helpers_coupled import chain
from helpers_derivatives import double
from helpers_drivers import Affine, Tardy, uneven
from helpers_states import Part
from tape import problem, tape_fixture  # noqa: F401

from fpi_cuda import (
    Anderson,
    DenseStep,
    FixedPointError,
    FixedPointLayer,
    Picard,
    Tolerance,
    fixed_point,
)
from fpi_cuda.drivers import eager, observe

pytestmark = pytest.mark.usefixtures("one_thread")


def norms(r, batch_dims=1):
    return torch.linalg.vector_norm(r.flatten(batch_dims), dim=batch_dims)


def by_hand(g, x, *tensors, steps):
    """The residuals of the plain loop, [T, B]."""
    found = []
    for _ in range(steps):
        gx = g(x, *tensors)
        found.append(norms(gx - x))
        x = gx
    return torch.stack(found)


class Shown(list):
    """A callback that keeps what it is shown."""

    def __call__(self, iteration, x, residual_norm):
        self.append((iteration, x, residual_norm))


def assert_is_of_callback(s, shown, g):
    """Of every iteration: g's residual at the x shown, and solutions of samples that had ended."""
    iterations, trace = s.iterations, s.trace
    assert s.trace_iterations.tolist() == [k for k, _, _ in shown]
    assert len(trace) == int(iterations.max())
    for (k, x, residual), kept in zip(shown, trace, strict=True):
        there = iterations >= k
        torch.testing.assert_close(norms(g(x) - x)[there], residual[there], rtol=1e-6, atol=1e-13)
        assert torch.equal(x[~there], s.x[~there])
        assert torch.equal(residual[~there], s.residual_norm[~there])
        assert torch.equal(kept[there], residual[there])
        assert kept[~there].isnan().all()


def test_the_trace_is_that_of_the_loop_by_hand(backend):
    g, x0, z = uneven()
    s = fixed_point(g, x0, z, solver=Picard(), backend=backend, per_sample=True, trace=True)
    assert "compacted" in s.path
    assert s.trace.dtype == torch.float64
    expected = by_hand(g, x0, z, steps=int(s.iterations.max()))
    late = s.trace_iterations[:, None] > s.iterations
    assert late.any()
    assert s.trace[late].isnan().all()
    torch.testing.assert_close(s.trace[~late], expected[~late], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("solver", [Picard(), Picard(beta=0.7), Anderson()], ids=str)
def test_a_callback_sees_where_g_was_and_its_residual(backend, solver, per_sample):
    g, x0, z = uneven()
    options = {"solver": solver, "backend": backend, "per_sample": per_sample}
    shown = Shown()
    s = fixed_point(g, x0, z, trace=True, callback=shown, **options)
    assert len(shown) > 5
    assert torch.equal(shown[0][1], x0)
    assert_is_of_callback(s, shown, lambda x: g(x, z))
    plain = fixed_point(g, x0, z, **options)
    assert plain.trace is plain.trace_iterations is None
    assert torch.equal(plain.x, s.x)
    assert (plain.evaluations, plain.path) == (s.evaluations, s.path)


def test_of_one_system_it_is_each_samples_own(backend):
    w, z = contraction(3, 0.8), double(6, 3)
    options = {"solver": Picard(), "backend": backend, "tolerance": Tolerance(1e-9)}
    s = fixed_point(chain, 0 * z, z, params=(w,), **options, per_sample=False, trace=True)
    assert "one system" in s.path
    expected = by_hand(chain, 0 * z, z, w, steps=len(s.trace))
    torch.testing.assert_close(s.trace, expected, rtol=1e-9, atol=1e-15)


def test_where_it_is_found_out_the_solve_begins_again_and_so_do_the_iterations():
    w, z, shown = contraction(3, 0.8), double(6, 3), Shown()

    def unknown(x, z, w):  # of a kind that no other test has made known
        return chain(x, z, w)

    with pytest.warns(UserWarning, match="depend on each other"):
        s = fixed_point(
            *(unknown, 0 * z, z),
            params=(w,),
            solver=Picard(),
            trace=True,
            callback=shown,
        )
    count = len(s.trace)
    assert [k for k, _, _ in shown][-count:] == list(range(1, count + 1))
    assert len(shown) > count
    torch.testing.assert_close(s.trace, torch.stack([r for _, _, r in shown][-count:]))


def test_a_callback_may_write_to_what_it_is_given():
    g, x0, z = uneven()
    for state in (x0, (x0[:, :1], x0[:, 1:])):
        joined = isinstance(state, tuple)

        def step(x, z, joined=joined):
            return g(torch.cat(x, 1), z).split([1, 3], 1) if joined else g(x, z)

        def spoil(_, x, residual, joined=joined):
            for t in (*x, residual) if joined else (x, residual):
                assert not t.requires_grad
                t.fill_(torch.nan)

        x = fixed_point(step, state, z.requires_grad_(), callback=spoil).x
        expected = fixed_point(step, state, z).x
        for a, b in zip(x, expected, strict=True):
            assert torch.equal(a, b)


def test_the_state_is_shown_as_g_gets_it_mapped_dimensions_first():
    Pair = namedtuple("Pair", "a b")
    z, shown = double(3, 5, 2), Shown()

    def g(x, z):
        return Pair(0.5 * torch.tanh(x.b) + z, 0.3 * x.a)

    def solve(z, callback=None):
        start = Pair(torch.zeros_like(z), torch.zeros_like(z))
        s = fixed_point(g, start, z, callback=callback, trace=True, per_sample=True)
        records.append(s.record)
        return s.x

    records = []
    x = torch.vmap(lambda z: solve(z, shown))(z)
    (record,) = records
    assert record.trace.shape == (len(record.trace_iterations), 3, 5)
    alone = [fixed_point(g, Pair(0 * row, 0 * row), row, trace=True) for row in z]
    for i, s in enumerate(alone):
        n = len(s.trace)
        torch.testing.assert_close(record.trace[:n, i], s.trace, equal_nan=True)
        assert record.trace[n:, i].isnan().all()
    for _, state, residual in shown:
        assert type(state) is Pair
        assert state.a.shape == state.b.shape == (3, 5, 2)
        assert residual.shape == (3, 5)
    k, state, residual = shown[1]
    assert k == 2
    moved = torch.cat([t - s for t, s in zip(g(state, z), state, strict=True)], 2)
    torch.testing.assert_close(norms(moved, 2), residual)
    assert x.a.shape == (3, 5, 2)


def test_a_class_that_torch_does_not_know_is_shown_under_vmap_too():
    z, shown = double(2, 5, 3), Shown()

    def solve(z):
        start = {"p": Part(torch.zeros_like(z), z.new_zeros(len(z)))}
        g = lambda x, z: {"p": Part(0.5 * torch.tanh(x["p"].a) + z, 0.3 * x["p"].b + z.sum(1))}  # noqa: E731
        return fixed_point(g, start, z, callback=shown, per_sample=True).x["p"].b

    torch.vmap(solve)(z)
    _, state, _ = shown[-1]
    assert type(state["p"]) is Part
    assert state["p"].a.shape == (2, 5, 3)
    assert state["p"].b.shape == (2, 5)


def test_channels_last_states_are_shown_in_their_own_order():
    x0 = torch.zeros(3, 4, 5, 2).double().to(memory_format=torch.channels_last)
    z, shown = double(3, 4, 5, 2).to(memory_format=torch.channels_last), Shown()

    def g(x, z):
        return 0.7 * torch.sin(x) + z

    s = fixed_point(g, x0, z, per_sample=True, trace=True, callback=shown)
    assert_is_of_callback(s, shown, lambda x: g(x, z))


@pytest.mark.parametrize("steps", [1024, 1025, 3000])
def test_a_long_trace_is_thinned_and_says_which_iterations_it_has(steps):
    x0 = torch.ones(2, 1).double()
    s = fixed_point(
        lambda x: 0.999 * x,
        x0,
        solver=Picard(),
        tolerance=Tolerance(0, 0),
        max_iterations=steps,
        trace=True,
    )
    kept = s.trace_iterations.tolist()
    stride = {1024: 1, 1025: 2, 3000: 4}[steps]
    assert kept == list(range(1, steps + 1, stride))
    assert len(kept) <= observe.MOST_KEPT
    expected = 0.001 * 0.999 ** (s.trace_iterations.double() - 1)
    torch.testing.assert_close(s.trace, expected[:, None].expand(-1, 2), rtol=1e-8, atol=0)


def test_a_thinned_trace_is_the_full_one_at_every_so_many_iterations(monkeypatch):
    g, x0, z = uneven()
    options = {"solver": Picard(), "trace": True, "tolerance": Tolerance(1e-12)}
    full = fixed_point(g, x0, z, **options, max_iterations=500)
    for most in (1, 2, 3, 7, 8):
        monkeypatch.setattr(observe, "MOST_KEPT", most)
        s = fixed_point(g, x0, z, **options, max_iterations=500)
        kept = s.trace_iterations.tolist()
        assert 1 <= len(kept) <= most
        assert kept[0] == 1
        assert len({b - a for a, b in pairwise(kept)}) <= 1
        torch.testing.assert_close(s.trace, full.trace[[k - 1 for k in kept]], equal_nan=True)


def test_an_iteration_that_anderson_takes_back_repeats_the_residual_before(backend):
    def g(x):  # defined for x > 1 alone, which mixtures leave
        return torch.log(3 / x) / torch.log(3.7477525683 * x / (x - 1)) + 1

    shown = Shown()
    start = torch.full((1, 1), 1.001).double()
    s = fixed_point(g, start, solver=Anderson(), backend=backend, trace=True, callback=shown)
    back = [k for k, x, _ in shown if not g(x).isfinite().all()]
    assert len(back) == int(s.retreats) > 0
    for k in back:
        assert torch.equal(s.trace[k - 1], s.trace[k - 2])


def test_a_late_reader_shows_no_iteration_too_many_in_the_trace(monkeypatch):
    g, x0, z = uneven()
    options = {"solver": Picard(), "trace": True, "per_sample": True}
    expected = fixed_point(g, x0, z, **options)

    def reader(x, max_iterations):
        return eager.LateRead([Tardy(50) for _ in range(3)], len(x), max_iterations)

    monkeypatch.setattr(eager, "reader", reader)
    shown = Shown()
    late = fixed_point(g, x0, z, **options, callback=shown)
    assert torch.equal(late.trace_iterations, expected.trace_iterations)
    torch.testing.assert_close(late.trace, expected.trace, rtol=0, atol=0, equal_nan=True)
    assert len(expected.trace) < len(shown) <= len(expected.trace) + 2
    assert_is_of_callback_after_the_end(late, shown)


def assert_is_of_callback_after_the_end(s, shown):
    for k, x, residual in shown:
        if k > int(s.iterations.max()):
            assert torch.equal(x, s.x)
            assert torch.equal(residual, s.residual_norm)


def test_the_whole_driver_leaves_observed_solves_to_the_eager_one():
    step = DenseStep(3, 2, 4).double()
    z, x0 = double(4, 2).requires_grad_(), torch.zeros(4, 3).double()
    plain = fixed_point(step, x0, z)
    if "whole" not in plain.path:
        pytest.skip("this build has no whole solve")
    s = fixed_point(step, x0, z, trace=True)
    assert "eager (not whole: trace" in s.path
    torch.testing.assert_close(s.x, plain.x)
    s.x.sum().backward()
    assert "whole" in s.adjoint.path  # which is not observed
    assert s.adjoint.trace is None
    with pytest.warns(UserWarning, match='driver="whole" is not possible: callback'):
        fixed_point(step, x0, z, callback=print_nothing, driver="whole")
    with pytest.warns(UserWarning, match="trace and callback"):
        fixed_point(step, x0, z, trace=True, callback=print_nothing, driver="whole")


def print_nothing(*_):
    pass


def test_the_graph_driver_leaves_observed_solves_to_the_eager_one(tape):
    g, z = Affine(), problem().requires_grad_()
    x0 = torch.zeros_like(z)
    with pytest.warns(UserWarning, match='driver="graph" is not possible: trace'):
        s = fixed_point(g, x0, z, trace=True, driver="graph", solver=Picard())
    assert "eager (trace)" in s.path
    assert tape.made == []
    calls = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = fixed_point(g, x0, z, callback=lambda *_: calls.append(1), driver="graph")
    before = len(calls)
    assert before == int(s.iterations.max())
    s.x.sum().backward()
    assert len(calls) == before  # derivatives are not observed


def test_derivatives_of_higher_order_are_not_observed():
    g, x0, z = uneven(4)
    z = z.requires_grad_()
    shown = Shown()
    s = fixed_point(g, x0, z, callback=shown, trace=True)
    before = len(shown)
    (first,) = torch.autograd.grad(s.x.square().sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z)
    assert second.isfinite().all()
    assert len(shown) == before


def test_a_solve_that_linearize_runs_again_shows_nothing():
    z, shown = double(2, 3), Shown()

    def f(z):
        return fixed_point(lambda x, z: 0.5 * x + z, torch.zeros_like(z), z, callback=shown).x.sin()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempted to insert")  # torch's own
        _, along = torch.func.linearize(f, z)
        seen = len(shown)
        found = along(z)
    torch.testing.assert_close(found, 2 * z * (2 * z).cos(), rtol=1e-5, atol=1e-6)
    assert len(shown) == seen


def test_what_a_callback_raises_comes_out_as_it_is():
    class Enough(Exception):
        pass

    def stop(iteration, x, residual):
        if iteration == 3:
            raise error

    error = Enough()
    g, x0, z = uneven(4)
    with pytest.raises(Enough) as caught:
        fixed_point(g, x0, z.requires_grad_(), callback=stop)
    assert caught.value is error
    assert fixed_point(g, x0, z, callback=lambda *_: "ignored").converged.all()


def test_what_a_callback_holds_is_not_kept_by_the_graph():
    class Owner:
        def watch(self, *_):
            pass

    g, x0, z = uneven(4)
    owner = Owner()
    owner.x = fixed_point(g, x0, z.requires_grad_(), callback=owner.watch).x
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_a_solution_that_comes_with_an_error_has_its_trace():
    z = torch.ones(2, 3).double()
    with pytest.raises(FixedPointError) as caught:
        fixed_point(
            lambda x, z: 0.9 * x + z,
            0 * z,
            z,
            solver=Picard(),
            max_iterations=4,
            on_failure="raise",
            trace=True,
        )
    assert caught.value.solution.trace.shape == (4, 2)


def test_an_empty_batch_has_an_empty_trace():
    s = fixed_point(lambda x: x, torch.zeros(0, 3), trace=True)
    assert s.trace.shape == (0, 0)
    assert s.trace_iterations.shape == (0,)


def test_a_layer_takes_them_and_under_compile_too():
    w, z, shown = contraction(4, 0.6), double(5, 4), Shown()
    layer = FixedPointLayer(lambda x, z: row_tanh(x, z, w), trace=True, callback=shown)
    x = layer(z)
    assert len(layer.last.trace) == len(shown) == int(layer.last.iterations.max())
    assert "\n" not in repr(layer.last)
    compiled = torch.compile(layer, backend="eager")(z)
    torch.testing.assert_close(compiled, x)
    assert len(shown) == 2 * len(layer.last.trace)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"trace": 1}, ValueError, r"trace must be one of \(True, False\) \(got 1\)"),
        ({"has_aux": None}, ValueError, r"has_aux must be one of \(True, False\) \(got None\)"),
        ({"callback": [print]}, TypeError, r"callback must be callable as callback\(iteration, x,"),
    ],
)
def test_options_of_another_kind_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        fixed_point(lambda x: 0.5 * x, torch.ones(2, 1), **options)
    with pytest.raises(error, match=match):
        FixedPointLayer(lambda x: 0.5 * x, **options)
