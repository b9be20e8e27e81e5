"""Auto: plain steps where they are enough, else mixtures; each sample chooses for itself."""

import pytest
import torch
import zoo
from helpers import TIGHT

from fpi_cuda import (
    Anderson,
    Auto,
    DenseStep,
    FixedPointLayer,
    ImplicitAdjoint,
    Picard,
    Status,
    Tolerance,
    fixed_point,
)
from fpi_cuda.record import PLAIN, STARTING, WINDOW

pytestmark = pytest.mark.usefixtures("one_thread")


def solve(g, z, solver=Auto(), **more):  # noqa: B008 - frozen
    options = {"tolerance": Tolerance(1e-8), "max_iterations": 2000, "per_sample": True, **more}
    return fixed_point(g, torch.zeros_like(z), z, solver=solver, **options)


def sines(rate):
    return lambda x, z: rate * x.sin() + z


def mixed(seed=0, n=24):
    """Symmetric maps, each sample's of a rate of its own, and their z."""
    generator = torch.Generator().manual_seed(seed)
    rates = (0.001, 0.03, 0.5, 0.9, 0.99)
    w = torch.cat([zoo.matrices("symmetric", rate, 1, n, generator) for rate in rates])
    return w, torch.randn(len(w), n, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("rate", [1e-3, 0.05])
def test_where_picard_is_enough_it_is_picard(backend, rate):
    z = torch.randn(5, 7, dtype=torch.float64)
    auto = solve(sines(rate), z, backend=backend, tolerance=Tolerance(1e-5))
    plain = solve(sines(rate), z, Picard(), backend=backend, tolerance=Tolerance(1e-5))
    assert torch.equal(auto.iterations, plain.iterations)
    assert torch.equal(auto.x, plain.x)
    assert (auto.record.progress.counters[:, PLAIN] == STARTING).all()
    assert (
        auto.error_estimate >= (auto.x - solve(sines(rate), z, TIGHT_SOLVER).x).norm(dim=1)
    ).all()


TIGHT_SOLVER = Anderson()


def test_samples_choose_for_themselves(backend):
    w, z = mixed()
    g = lambda x, z, w: torch.einsum("bij,bj->bi", w, x) + z  # noqa: E731

    def of(rows, solver):
        return fixed_point(
            g,
            torch.zeros_like(z[rows]),
            z[rows],
            w[rows],
            solver=solver,
            backend=backend,
            tolerance=Tolerance(1e-8),
            max_iterations=2000,
            per_sample=True,
        )

    everything = slice(None)
    auto, plain = of(everything, Auto()), of(everything, Picard())
    alternating, each = of(everything, Anderson(every=3)), of(everything, Anderson())
    best = torch.stack([s.iterations for s in (plain, alternating, each)]).amin(0)
    assert auto.converged.all()
    assert (auto.iterations <= torch.maximum(best + 2, (1.15 * best).int())).all()
    assert auto.record.progress.counters[0, PLAIN] == STARTING
    assert (auto.record.progress.counters[2:, WINDOW] > 1).all()
    if backend == "native":
        alone = [of(slice(i, i + 1), Auto()).iterations for i in range(len(z))]
        assert torch.equal(torch.cat(alone), auto.iterations)


def test_far_fewer_evaluations_than_anderson_on_a_slow_symmetric_map():
    generator = torch.Generator().manual_seed(0)
    w = zoo.matrices("symmetric", 0.999, 1, 256, generator)[0]
    z = torch.randn(3, 256, dtype=torch.float64, generator=generator)
    s = solve(lambda x, z: x @ w + z, z)
    assert s.converged.all()
    assert s.iterations.max() <= 420


def test_a_counted_solve_turns_at_once(backend):
    """No number of plain steps reaches a tolerance of zero."""
    z = torch.randn(2, 6, dtype=torch.float64)
    s = solve(sines(0.5), z, tolerance=Tolerance(0, 0), max_iterations=9, backend=backend)
    assert s.iterations.tolist() == [9, 9]
    assert (s.record.progress.counters[:, WINDOW] > 1).all()


def test_what_is_not_finite_among_plain_steps_is_left_to_them(backend):
    z = torch.ones(2, 3, dtype=torch.float64)
    g = lambda x, z: torch.where(x > 0.5, torch.nan, x + z)  # noqa: E731
    s = solve(g, z, on_failure="return", backend=backend)
    assert (s.status == Status.NONFINITE).all()
    assert (s.retreats == 0).all()


def test_growing_maps_are_solved_as_anderson_solves_them(backend):
    generator = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator))
    w = q * torch.linspace(-4, 0.5, 16, dtype=torch.float64) @ q.T
    z = torch.randn(4, 16, dtype=torch.float64, generator=generator)
    s = solve(lambda x, z: torch.tanh(x @ w + z), z, backend=backend)
    assert s.converged.all()


def test_the_whole_driver_takes_as_many_iterations_as_the_loop():
    torch.manual_seed(0)
    step = DenseStep(16, 24, activation="tanh").double()
    z = torch.randn(9, 24, dtype=torch.float64) * torch.logspace(-3, 1, 9)[:, None]
    x0 = torch.zeros(9, 16, dtype=torch.float64)
    with torch.no_grad():
        whole, loop = (
            fixed_point(step, x0, z, solver=Auto(), driver=driver, backend="native")
            for driver in ("whole", "eager")
        )
    assert "whole" in whole.path
    assert torch.equal(whole.iterations, loop.iterations)
    torch.testing.assert_close(whole.x, loop.x, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("per_sample", [True, False])
def test_derivatives(per_sample):
    torch.manual_seed(0)
    w = (0.4 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def x(z, w):
        return fixed_point(
            lambda x, z, w: torch.tanh(x @ w + z),
            torch.zeros_like(z),
            z,
            params=(w,),
            solver=Auto(),
            tolerance=TIGHT,
            adjoint=ImplicitAdjoint(tolerance=TIGHT),
            per_sample=per_sample,
        ).x

    assert torch.autograd.gradcheck(x, (z, w), check_forward_ad=True)


def test_by_name():
    z = torch.randn(3, 4, dtype=torch.float64)
    named, given = (solve(sines(0.5), z, solver) for solver in ("auto", Auto()))
    assert torch.equal(named.iterations, given.iterations)
    z.requires_grad_()
    s = solve(sines(0.9), z, Picard(), adjoint=ImplicitAdjoint(solver="auto"))
    s.x.sum().backward()
    assert (s.adjoint.record.progress.counters[:, WINDOW] > 1).any()
    with pytest.raises(TypeError, match=r'solver must be Picard.*, Auto.*"auto"'):
        solve(sines(0.5), z, "fast")


def test_a_layers_solver_may_be_named_later():
    z = torch.randn(3, 4, dtype=torch.float64)
    layer, named = (FixedPointLayer(sines(0.5), solver=solver) for solver in (Picard(), "auto"))
    layer.solver = "auto"
    assert torch.equal(layer(z), named(z))
    assert torch.equal(layer.last.iterations, named.last.iterations)


def test_arguments_are_andersons():
    assert Auto(7, 0.9).history == 7
    assert Auto() != Anderson(every=3)
    with pytest.raises(ValueError, match="Auto: beta"):
        Auto(beta=3)
