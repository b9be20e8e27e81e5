"""Error estimates against true errors, over a zoo of maps, and where nothing can be measured."""

import pytest
import torch
import zoo
from helpers import TIGHT

from fpi_cuda import Anderson, DenseStep, Picard, Status, Tolerance, fixed_point
from fpi_cuda.record import Account

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def check(cells):
    """≥ 99 % of all covered, ≥ 95 % of each cell, each with a median over-estimate up to 4."""
    for cell, ratios in cells.items():
        share, median = zoo.coverage(ratios)
        assert share >= 0.95, (cell, share)
        assert 1 <= median <= 4, (cell, median)
        assert ratios.isfinite().double().mean() >= 0.95, cell
    assert zoo.coverage(torch.cat(list(cells.values())))[0] >= 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_estimate_covers_the_error(backend, dtype):
    rates = zoo.RATES if backend == "native" else (0.1, 0.5, 0.9)
    check(
        {
            (kind, name): zoo.overestimates(kind, s, DTYPES[dtype], backend, rates=rates, b=25)
            for kind in zoo.KINDS
            for name, s in zoo.SOLVERS.items()
        }
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_estimate_of_the_adjoint_covers_its_error(dtype):
    check(
        {
            (kind, name): zoo.overestimates(
                kind, s, DTYPES[dtype], "native", rates=(0.1, 0.5, 0.9), b=25, adjoint=True
            )
            for kind in ("symmetric", "general", "skew")
            for name, s in zoo.SOLVERS.items()
        }
    )


@pytest.mark.slow
def test_the_estimate_covers_the_error_of_many_maps():
    rows = zoo.table()
    assert min(row[5] for row in rows) >= 0.95
    assert max(row[6] for row in rows) <= 4
    assert sum(row[4] * row[5] for row in rows) >= 0.99 * sum(row[4] for row in rows)


# --- by themselves ------------------------------------------------------------------------------


def rotation(r):
    """x ↦ a quarter turn of x, times r, + z."""
    return lambda x, z: r * torch.stack((-x[:, 1], x[:, 0]), 1) + z


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_the_rate_of_a_rotation_is_its_own_whatever_the_damping(backend, beta, rate):
    z = torch.randn(4, 2, dtype=torch.float64)
    s = fixed_point(rotation(rate), torch.zeros_like(z), z, solver=Picard(beta), backend=backend)
    assert s.converged.all()
    torch.testing.assert_close(s.contraction, torch.full((4,), rate, dtype=torch.float64))


def test_the_rate_of_a_map_that_expands_is_above_one_where_damping_solves_it(backend):
    z = torch.randn(4, 3, dtype=torch.float64)
    s = fixed_point(
        lambda x, z: -1.5 * x + z, torch.zeros_like(z), z, solver=Picard(0.5), backend=backend
    )
    assert s.converged.all()
    torch.testing.assert_close(s.contraction, torch.full((4,), 1.5, dtype=torch.float64))
    error = torch.linalg.vector_norm(s.x - z / 2.5, dim=1)
    torch.testing.assert_close(s.error_estimate, Account._factor * error, rtol=1e-3, atol=0)


def test_opposite_eigenvalues_hide_from_successive_iterates_alone(backend):
    """The error is of the mode .95, while −.95 makes the differences of successive residuals."""
    a = torch.tensor([0.95, -0.95], dtype=torch.float64)
    z = torch.tensor([[0.1, 1.0]], dtype=torch.float64)
    s = fixed_point(
        lambda x, z: a * x + z,
        torch.zeros_like(z),
        z,
        solver=Picard(),
        backend=backend,
        max_iterations=2000,
    )
    error = torch.linalg.vector_norm(s.x - z / (1 - a), dim=1)
    assert (s.error_estimate >= error).all()
    assert (s.error_estimate <= 4 * error).all()


def test_a_start_at_the_solution_has_an_estimate(backend, solver):
    z = torch.randn(5, 3)
    at = fixed_point(lambda x, z: z + 0 * x, z.clone(), z, solver=solver, backend=backend)
    assert at.error_estimate.tolist() == [0.0] * 5
    near = fixed_point(lambda x, z: 0.5 * x + z, 2 * z + 1e-6, z, solver=solver, backend=backend)
    assert (near.iterations == 1).all()
    assert near.error_estimate.isinf().all()  # one residual says nothing of g
    assert not near.error_estimate.isnan().any()


def test_a_fixed_count_has_an_estimate(backend, solver):
    z = torch.randn(6, 4, dtype=torch.float64)
    s = fixed_point(
        lambda x, z: 0.8 * x + z,
        torch.zeros_like(z),
        z,
        solver=solver,
        backend=backend,
        tolerance=Tolerance(0, 0),
        max_iterations=2 if isinstance(solver, Anderson) else 7,
    )
    error = torch.linalg.vector_norm(s.x - 5 * z, dim=1)
    torch.testing.assert_close(s.error_estimate, Account._factor * error)


@pytest.mark.parametrize("form", ["whole", "eager"])
def test_a_whole_solve_measures_what_the_loop_does(solver, form):
    torch.manual_seed(3)
    step, z = DenseStep(12, 5).double(), torch.randn(9, 5, dtype=torch.float64)
    x0 = torch.zeros(9, 12, dtype=torch.float64)
    s = fixed_point(step, x0, z, solver=solver, driver=form)
    true = fixed_point(step, x0, z, tolerance=TIGHT, max_iterations=5000)
    error = torch.linalg.vector_norm(s.x - true.x, dim=1)
    assert (s.error_estimate >= error).all()
    assert (s.error_estimate <= 100 * error).all()
    assert ((s.contraction > 0) & (s.contraction < 1)).all()


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-7), (torch.float32, 1e-5), (torch.bfloat16, None)]
)
def test_the_bound_holds_at_the_rounding_level(backend, dtype, rtol):
    torch.manual_seed(1)
    a = 0.9 * torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0]
    z = torch.randn(64, 24, dtype=torch.float64).to(dtype)

    class Certified(torch.nn.Module):
        def certified_lipschitz(self):
            return 0.9

        def forward(self, x, z):
            return torch.sin(x @ a.to(x.dtype).mT) + z

    s = fixed_point(
        Certified(),
        torch.zeros_like(z),
        z,
        backend=backend,
        tolerance=Tolerance(rtol),
        max_iterations=1000,
        on_failure="return",
    )
    wide = a.to(dtype).double()
    true = fixed_point(
        lambda x, z: torch.sin(x @ wide.mT) + z,
        torch.zeros(64, 24, dtype=torch.float64),
        z.double(),
        tolerance=TIGHT,
        max_iterations=5000,
    )
    error = torch.linalg.vector_norm(s.x.double() - true.x, dim=1)
    usable = (s.status == Status.CONVERGED) | (s.status == Status.STALLED)
    assert usable.any()
    assert (error <= s.error_bound)[usable].all()


def test_a_system_is_estimated_as_a_whole():
    """Each sample's error comes from the residuals of all."""
    z = torch.zeros(8, 3, dtype=torch.float64)
    z[0] = 1

    def chain(x, z):
        return 0.9 * x.roll(1, 0) + z

    s = fixed_point(chain, torch.zeros_like(z), z, per_sample=False, max_iterations=2000)
    power = 0.9 ** torch.arange(8, dtype=torch.float64) / (1 - 0.9**8)
    error = torch.linalg.vector_norm(s.x - power[:, None], dim=1)
    assert s.converged.all()
    assert torch.linalg.vector_norm(s.error_estimate) >= torch.linalg.vector_norm(error)
    assert s.error_estimate.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_hides_of_a_damped_solve_is_not_measured(backend, dtype):
    """A residual told from Δx/β is off by the rounding of x times 1/β."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 2, generator=generator).to(dtype)
    a = (1.8 * torch.rand(200, 2, generator=generator) - 0.9).to(dtype)
    s = fixed_point(
        lambda x, z, a: a * x + z,
        torch.zeros_like(z),
        z,
        a,
        solver=Picard(0.3),
        backend=backend,
        max_iterations=400,
        on_failure="return",
    )
    error = torch.linalg.vector_norm(s.x.double() - z.double() / (1 - a.double()), dim=1)
    covered = (s.error_estimate >= error)[s.converged]
    assert s.converged.double().mean() > 0.9
    assert s.repelling.double().mean() <= 0.02
    assert covered.double().mean() >= 0.95
    assert s.error_estimate.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_estimate_knows_of_the_rounding_of_gs_value(backend, dtype):
    """At the half types' defaults a residual is a few roundings of x, or none is left of it."""
    ratios = [
        zoo.overestimates(kind, Anderson(), dtype, backend, rates=(0.1, 0.5, 0.9), b=20)
        for kind in ("symmetric", "rotations", "nonlinear")
    ]
    share, median = zoo.coverage(torch.cat(ratios))
    assert share >= 0.98  # 0.76 to 0.83 without
    assert median <= 4


def test_a_g_that_ignores_x_has_an_estimate_near_zero(backend):
    z = torch.randn(3, 4, dtype=torch.float64)
    s = fixed_point(lambda x, z: z, torch.ones_like(z), z, solver=Picard(0.5), backend=backend)
    assert s.converged.all()
    assert torch.equal(s.x, z)
    torch.testing.assert_close(s.error_estimate, torch.zeros(3, dtype=torch.float64))
