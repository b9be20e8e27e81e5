"""Contraction, error estimates and bounds, and the record of the backward."""

import pytest
import torch
from helpers import TIGHT, linear, linear_solution
from helpers_solution import halving, symmetric

from fpi_cuda import Anderson, Picard, Status, Tolerance, fixed_point
from fpi_cuda.record import Account

pytestmark = pytest.mark.usefixtures("one_thread")


# --- rates and errors ------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.7])
def test_picards_contraction_is_the_rate_of_a_linear_map(backend, beta):
    a, z = symmetric(6, 0.9), torch.randn(3, 6, dtype=torch.float64)
    a = a @ a / 0.9  # positive: the slowest mode of the damped map is that of the map
    solution = fixed_point(
        linear,
        torch.zeros_like(z),
        z,
        params=(a,),
        solver=Picard(beta),
        backend=backend,
        tolerance=Tolerance(1e-10),
        max_iterations=2000,
    )
    torch.testing.assert_close(
        solution.contraction, torch.full((3,), 0.9, dtype=torch.float64), rtol=1e-3, atol=0
    )
    error = torch.linalg.vector_norm(solution.x - linear_solution(z, a), dim=1)
    # The estimate speaks of g(x), which is what x is; of one mode the gain is exact.
    torch.testing.assert_close(solution.error_estimate, Account._factor * error, rtol=1e-2, atol=0)


def test_andersons_contraction_is_the_secant_ratio(backend):
    """Every secant of 0.6 times a rotation has the ratio 0.6, whatever Anderson does."""
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    z = torch.randn(3, 6, dtype=torch.float64)
    solution = fixed_point(
        linear,
        torch.zeros_like(z),
        z,
        params=(0.6 * q,),
        solver=Anderson(),
        backend=backend,
        tolerance=Tolerance(1e-8),
    )
    torch.testing.assert_close(
        solution.contraction, torch.full((3,), 0.6, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_error_estimate_covers_the_true_error_of_contractions(backend, solver):
    w, z = symmetric(8, 0.9), torch.randn(32, 8, dtype=torch.float64)

    def g(x, z, w):
        return torch.tanh(x @ w.mT + 0.3 * z)

    solution = fixed_point(
        g,
        torch.zeros_like(z),
        z,
        params=(w,),
        solver=solver,
        backend=backend,
        tolerance=Tolerance(1e-5),
    )
    true = fixed_point(g, torch.zeros_like(z), z, params=(w,), tolerance=TIGHT, max_iterations=2000)
    error = torch.linalg.vector_norm(solution.x - true.x, dim=1)
    # An estimate, no bound: within a factor 2 for nine samples in ten, never by more than 10.
    assert (solution.error_estimate >= 0.5 * error).double().mean() >= 0.9
    assert (solution.error_estimate >= 0.1 * error).all()
    assert (solution.error_estimate <= 100 * error + 1e-12).all()


def test_contraction_of_one_iteration_is_unknown(backend, solver):
    z = torch.randn(2, 3)
    solution = fixed_point(lambda x, z: z, z.clone(), z, solver=solver, backend=backend)
    assert solution.iterations.tolist() == [1, 1]
    assert solution.contraction.isnan().all()


def test_error_estimate_is_infinite_where_the_solve_leaves_the_fixed_point(backend):
    solution = fixed_point(
        lambda x: 4 * x + 1,
        torch.zeros(2, 1),
        solver=Picard(),
        backend=backend,
        on_failure="return",
    )
    assert (solution.status == Status.DIVERGED).all()
    torch.testing.assert_close(solution.contraction, torch.full((2,), 4.0))
    assert solution.error_estimate.isinf().all()


def test_error_bound_exists_only_with_a_certificate(backend, solver):
    class Certified(torch.nn.Module):
        def certified_lipschitz(self):
            return 0.5

        def forward(self, x, z):
            return halving(torch.sin(x), z)

    z = torch.randn(3, 4, dtype=torch.float64)
    kwargs = {"solver": solver, "backend": backend, "tolerance": Tolerance(1e-4)}
    solution = fixed_point(Certified(), torch.zeros_like(z), z, **kwargs)
    true = fixed_point(Certified(), torch.zeros_like(z), z, tolerance=TIGHT)
    error = torch.linalg.vector_norm(solution.x - true.x, dim=1)
    assert (error <= solution.error_bound * (1 + 1e-9)).all()
    torch.testing.assert_close(solution.error_bound, solution.residual_norm)  # k/(1-k) = 1
    assert fixed_point(halving, torch.zeros_like(z), z).error_bound is None


# --- the backward's own record ---------------------------------------------------------------


def test_adjoint_record_is_filled_by_each_backward(backend, solver):
    z = torch.randn(3, 4, requires_grad=True)
    solution = fixed_point(
        lambda x, z: torch.tanh(0.9 * x + z), torch.zeros(3, 4), z, solver=solver, backend=backend
    )
    assert solution.adjoint is None
    solution.x.sum().backward(retain_graph=True)
    first = solution.adjoint
    assert first.converged.all()
    assert first.iterations.min() >= 1
    assert first.residual_norm.shape == (3,)
    solution.x.square().sum().backward()
    assert solution.adjoint is not first


# --- from the ring of squared secant ratios ------------------------------------------------------

RING = torch.tensor([[0.5, 0.9, 0.1, 0.3, 0.7], [0.0, 0.4, 0.0, 0.0, 0.2], [0.0] * 5]) ** 2


def test_picards_rate_is_the_geometric_mean_of_all_ratios_that_there_are():
    found = Picard().contraction(RING, torch.tensor([9, 3, 1]))
    wanted = torch.tensor([(0.5 * 0.9 * 0.1 * 0.3 * 0.7) ** (1 / 5), (0.4 * 0.2) ** 0.5, torch.nan])
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_andersons_rate_is_the_largest():
    found = Anderson().contraction(RING, torch.tensor([9, 3, 1]))
    torch.testing.assert_close(found, torch.tensor([0.9, 0.4, torch.nan]), equal_nan=True)


def test_ratios_of_iterates_that_were_not_finite_are_left_out(solver):
    ring = torch.tensor([[0.25, torch.nan, torch.inf, 0.25, 0.0]])
    torch.testing.assert_close(solver.contraction(ring, torch.tensor([5])), torch.tensor([0.5]))
