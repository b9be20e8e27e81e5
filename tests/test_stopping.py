"""When a sample stops, and as what: the stop rule, statuses, scale."""

import math

import pytest
import torch
from helpers import DTYPES, Counter, assert_close, assert_solved, contraction, unroll

from fpi_cuda import FixedPointWarning, ImplicitAdjoint, Picard, Status, Tolerance, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the stop rule ---------------------------------------------------------------------------


@pytest.mark.usefixtures("whole_batch")
@pytest.mark.parametrize("tolerance", [Tolerance(), Tolerance(1e-3, 0), Tolerance(0, 1e-5)])
def test_each_sample_stops_at_the_first_iterate_whose_residual_passes(backend, solver, tolerance):
    z, w = 10 ** torch.linspace(-3, 2, 5)[:, None] * torch.randn(5, 7), contraction(7, 0.8)
    w, iterates = w.float(), []

    def g(x, z, w):
        gx = torch.tanh(x @ w.mT) + z
        iterates.append((x.clone(), gx))
        return gx

    solution = fixed_point(
        g,
        torch.zeros(5, 7),
        z,
        params=(w,),
        solver=solver,
        backend=backend,
        tolerance=tolerance,
        per_sample=True,
    )
    rtol, atol = tolerance.resolve(torch.float32)
    assert solution.converged.all()
    assert len(set(solution.iterations.tolist())) > 1
    for i in range(5):
        last = int(solution.iterations[i])
        for k, (x, gx) in enumerate(iterates[:last], 1):
            residual = torch.linalg.vector_norm((gx[i] - x[i]).double())
            size = torch.linalg.vector_norm(gx[i].double())
            passed = residual <= atol * math.sqrt(7) + rtol * size
            assert passed == (k == last)
        # x is g of the iterate that passed, its residual is that iterate's; then it is frozen.
        assert torch.equal(solution.x[i], gx[i])
        assert_close(solution.residual_norm[i], residual)
        for x, _ in iterates[last:]:
            assert torch.equal(x[i], solution.x[i])


def test_defaults_by_dtype_are_as_documented():
    found = {dtype: Tolerance().resolve(dtype) for dtype in DTYPES}
    assert found == {
        torch.float64: (1e-6, 1e-12),
        torch.float32: (1e-4, 1e-6),
        torch.float16: (2e-3, 1e-3),
        torch.bfloat16: (1e-2, 1e-3),
    }
    assert Tolerance().resolve(torch.float32, adjoint=True) == (1e-4, 0)


@pytest.mark.usefixtures("whole_batch")
def test_counts_are_of_g_and_of_each_samples_part_in_it(backend, solver):
    g = Counter(lambda x, s: s * torch.tanh(x) + 1)
    s = torch.tensor([[0.0], [0.3], [0.9]])
    solution = fixed_point(g, torch.zeros(3, 1), s, solver=solver, backend=backend, per_sample=True)
    assert solution.evaluations == g.calls == solution.iterations.max()
    assert solution.iterations[0] == 2
    assert solution.iterations[1:].min() > 2
    assert solution.iterations.dtype == torch.int32
    assert solution.status.dtype == torch.int8
    assert solution.converged.tolist() == [True] * 3


def test_fixed_count_is_silent_exact_and_equals_the_plain_loop(backend):
    z, w = torch.randn(4, 5, dtype=torch.float64), contraction(5, 0.9)
    g = Counter(lambda x, z, w: torch.tanh(x @ w.mT + z))
    x0 = torch.zeros_like(z)
    solution = fixed_point(
        g,
        x0,
        z,
        params=(w,),
        solver=Picard(),
        tolerance=Tolerance(0, 0),
        max_iterations=17,
        backend=backend,
        on_failure="raise",
    )
    assert g.calls == 17
    assert torch.equal(solution.x, unroll(g.f, x0, z, w, steps=17))
    assert solution.iterations.tolist() == [17] * 4


def test_fixed_count_of_a_rotation_neither_fails_nor_masks_its_gradient(backend, solver):
    z = torch.ones(2, 2, requires_grad=True)
    turn = torch.tensor([[0.0, -0.5], [0.5, 0.0]])
    solution = fixed_point(
        lambda x, z, t: x @ t + z,
        torch.zeros(2, 2),
        z,
        params=(turn,),
        solver=solver,
        tolerance=Tolerance(0, 0),
        max_iterations=4,
        backend=backend,
        on_failure="raise",
        adjoint=ImplicitAdjoint(solver=Picard(), tolerance=Tolerance(0, 0), max_iterations=4),
    )
    (gradient,) = torch.autograd.grad(solution.x.sum(), z)
    c = unroll(lambda c: c @ turn.mT + 1, torch.ones(2, 2), steps=4)
    assert_close(gradient, c)


# --- statuses --------------------------------------------------------------------------------


def cycle_of(size):
    """A g that ends in a 2-cycle of this size around 1, on every element."""
    return lambda x: torch.where(x <= 1, 1 + size, 1 - size / 2)


def test_a_residual_that_stays_at_rounding_is_stalled(backend, solver):
    eps = torch.finfo(torch.float32).eps
    with pytest.warns(FixedPointWarning, match="2 of 2 samples STALLED.*loosen rtol"):
        solution = fixed_point(
            cycle_of(eps),
            torch.zeros(2, 3),
            tolerance=Tolerance(1e-9, 0),
            backend=backend,
            solver=solver,
        )
    assert solution.status.tolist() == [Status.STALLED] * 2
    assert 10 < solution.iterations.max() < 20
    torch.testing.assert_close(solution.x, torch.ones(2, 3))


def test_a_slow_contraction_above_rounding_is_not_called_stalled(backend):
    """At N = 4096 the rounding level is 6e-5 ‖g(x)‖; a rate of 0.998 falls by 2 % in ten steps."""
    rate, n = 0.998, 4096
    x0, u = torch.zeros(2, n), torch.full((2, n), 1 - rate)
    solution = fixed_point(
        lambda x, u: rate * x + u,
        x0,
        u,
        solver=Picard(),
        tolerance=Tolerance(1e-5, 0.0),
        max_iterations=5000,
        backend=backend,
    )
    assert solution.converged.all(), solution.status


def test_a_real_map_with_a_tolerance_below_rounding_ends_stalled_or_converged(backend, solver):
    z, w = torch.randn(16, 32), contraction(32, 0.7, dtype=torch.float32)
    solution = fixed_point(
        lambda x, z, w: torch.tanh(x @ w.mT + z),
        torch.zeros(16, 32),
        z,
        params=(w,),
        solver=solver,
        backend=backend,
        tolerance=Tolerance(1e-9, 0),
        on_failure="return",
    )
    assert set(solution.status.tolist()) <= {Status.STALLED, Status.CONVERGED}
    assert (solution.status == Status.STALLED).any()
    assert solution.iterations.max() < 120
    true = unroll(
        lambda x: torch.tanh(x @ w.double().mT + z), torch.zeros(16, 32).double(), steps=120
    )
    assert_close(solution.x, true)


def test_a_large_cycle_is_not_stalled_but_runs_out(backend):
    with pytest.warns(FixedPointWarning, match="2 of 2 samples MAX_ITERATIONS"):
        solution = fixed_point(
            cycle_of(1e-2), torch.zeros(2, 3), solver=Picard(), backend=backend, max_iterations=40
        )
    assert solution.iterations.tolist() == [40, 40]


def test_stalled_samples_keep_their_gradient(backend):
    eps = torch.finfo(torch.float32).eps
    z = torch.zeros(2, 1, requires_grad=True)
    solution = fixed_point(
        lambda x, z: cycle_of(eps)(x).detach() + 0.5 * (x - x.detach()) + z,
        torch.zeros(2, 1),
        z,
        solver=Picard(),
        backend=backend,
        tolerance=Tolerance(1e-9, 0),
        on_failure="return",
    )
    assert (solution.status == Status.STALLED).all()
    (gradient,) = torch.autograd.grad(solution.x.sum(), z)
    assert_solved(gradient, torch.full((2, 1), 2.0))


def test_every_status_has_a_sentence_that_says_what_to_try():
    for status in Status:
        assert len(status.message) > 20 or status is Status.CONVERGED
    assert [int(s) for s in Status] == [0, 1, 2, 3, 4]


def test_one_warning_counts_every_kind_of_failure(backend):
    slope = torch.tensor([[0.5], [10.0], [math.nan], [-1.0]])
    with pytest.warns(FixedPointWarning) as caught:
        fixed_point(
            lambda x, s: s * x + 1, torch.zeros(4, 1), slope, solver=Picard(), backend=backend
        )
    assert len(caught) == 1
    message = str(caught[0].message)
    for part in ("MAX_ITERATIONS (samples 3)", "DIVERGED (samples 1)", "NONFINITE (samples 2)"):
        assert f"1 of 4 samples {part}" in message


# --- scale -----------------------------------------------------------------------------------


def scaled(scale, solver, backend):
    n = 24
    w, z = contraction(n, 0.9, dtype=torch.float32), torch.randn(8, n, generator=seeded())
    w = (w + w.mT) / 2

    def g(x, z, w):
        return scale * torch.tanh((x / scale) @ w.mT + z)

    return fixed_point(
        g,
        torch.zeros(8, n),
        z,
        params=(w,),
        solver=solver,
        backend=backend,
        tolerance=Tolerance(1e-5, 0),
    )


def seeded():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 2.0**-40, 2.0**40])
def test_scaled_state_takes_the_same_iterations(scale, solver, backend):
    one, other = scaled(1.0, solver, backend), scaled(scale, solver, backend)
    assert one.converged.all()
    assert (one.iterations - other.iterations).abs().max() <= 1
    assert_close(other.x / scale, one.x, {torch.float32: (1e-4, 1e-5)})
