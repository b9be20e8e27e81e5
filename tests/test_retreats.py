"""Anderson where g is not finite at a mixture: it goes back, it is counted, and there is an end."""

import pytest
import torch

from fpi_cuda import Anderson, Picard, Status, fixed_point
from fpi_cuda.record import MAX_RETREATS

pytestmark = pytest.mark.usefixtures("one_thread")


def logarithms(x):
    """Its fixed point is 1.3; it is defined for x > 1 alone, which mixtures leave."""
    return torch.log(3 / x) / torch.log(3.7477525683 * x / (x - 1)) + 1


START = torch.full((3, 1), 1.001, dtype=torch.float64)


def fenced(x, z):
    """Nothing beyond a wall that the fixed points of some samples lie behind."""
    return torch.where((x > 5).any(1, keepdim=True), torch.nan, 0.9 * x.flip(1) + z)


@pytest.mark.parametrize("solver", [Anderson(), Anderson(10), Anderson(3, beta=0.5)])
def test_a_mixture_outside_of_gs_domain_is_taken_back(backend, solver):
    plain = fixed_point(logarithms, START, solver=Picard(), backend=backend)
    assert plain.converged.all()
    assert (plain.retreats == 0).all()
    s = fixed_point(logarithms, START, solver=solver, backend=backend)
    assert s.converged.all()
    assert (s.retreats >= 1).all()
    assert s.contraction.isfinite().all()
    assert s.error_estimate.isfinite().all()
    torch.testing.assert_close(s.x, torch.full_like(START, 1.3), rtol=1e-6, atol=0)


def test_only_the_sample_goes_back(backend):
    """The others' bits are those of a solve without it."""
    z = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[2] = 0.49  # its mixtures meet the wall, its fixed point does not

    def solve(z):
        return fixed_point(
            fenced, torch.zeros_like(z), z, solver=Anderson(), backend=backend, on_failure="return"
        )

    alone = [solve(row[None]) for row in z]
    together = solve(z)
    assert sum(int(s.retreats) for s in alone) > 0
    for i, s in enumerate(alone):
        assert together.retreats[i] == s.retreats
        assert together.iterations[i] == s.iterations
        if backend == "native":
            assert torch.equal(together.x[i], s.x[0])
        else:
            torch.testing.assert_close(together.x[i], s.x[0])


def test_nonfinite_is_left_to_plain_iterates(backend):
    """What Picard solves Anderson does; what fails fails after so many retreats."""
    z = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 2

    def solve(solver):
        return fixed_point(
            fenced,
            torch.zeros_like(z),
            z,
            solver=solver,
            backend=backend,
            on_failure="return",
            max_iterations=500,
        )

    plain, mixed = solve(Picard()), solve(Anderson())
    assert plain.converged.any()
    assert (plain.status == Status.NONFINITE).any()
    assert torch.equal(plain.status, mixed.status)
    lost = mixed.status == Status.NONFINITE
    assert (mixed.retreats[lost] == MAX_RETREATS).all()
    assert mixed.x.isfinite().all()
    assert (mixed.x[lost] > 5).any(1).all()  # the plain iterate where g was not finite


def test_a_mixture_that_overflows_the_dtype_is_taken_back(backend):
    z = torch.zeros(2, 3, dtype=torch.float16)

    def clamped(x, z):
        return (0.98 * x.float() + 2000).clamp(max=60000.0).half() + z

    s = fixed_point(clamped, z.clone(), z, solver=Anderson(), backend=backend, max_iterations=100)
    assert s.converged.all()
    assert (s.retreats > 0).all()
    assert (s.x == 60000).all()


def test_a_step_back_that_fails_is_halved(backend):
    """From where the mixture was taken back, g(x') lies behind the wall too; halfway does not."""
    walls = iter([])

    def g(x):
        nonlocal walls
        wall = next(walls, torch.inf)
        return torch.where(x > wall, torch.nan, 0.5 * x + 1)

    start = torch.zeros(1, 1, dtype=torch.float64)
    # x: 0, 1, a mixture (2), then from x' = 1, g(x') = 1.5: 1.5 itself, 1.25.
    walls = iter([9, 9, 1.9, 1.4])
    s = fixed_point(g, start, solver=Anderson(), backend=backend, per_sample=True)
    assert s.converged.all()
    assert s.retreats.tolist() == [2]
    torch.testing.assert_close(s.x, torch.full_like(start, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("limit", range(2, 6))
def test_a_solve_that_ends_at_a_retreat_has_the_last_good_value(backend, limit):
    s = fixed_point(
        logarithms,
        START,
        solver=Anderson(),
        backend=backend,
        max_iterations=limit,
        on_failure="return",
    )
    assert (s.status == Status.MAX_ITERATIONS).all()
    assert (s.iterations == limit).all()
    assert s.record.failed == len(START)
    assert s.x.isfinite().all()
    assert s.residual_norm.isfinite().all()
    if limit == 3:  # g at the third iterate is not finite
        before = fixed_point(
            logarithms,
            START,
            solver=Anderson(),
            backend=backend,
            max_iterations=2,
            on_failure="return",
        )
        assert (s.retreats == 1).all()
        assert torch.equal(s.x, before.x)
        assert torch.equal(s.residual_norm, before.residual_norm)


def test_a_step_beyond_the_dtype_is_an_undamped_one(backend):
    z = torch.full((2, 3), 60000.0, dtype=torch.float16)

    def g(x, z):
        return torch.minimum(x + 20000, z)

    s = fixed_point(
        g,
        torch.zeros_like(z),
        z,
        solver=Picard(1.9),
        backend=backend,
        max_iterations=20,
        on_failure="return",
    )
    assert not (s.status == Status.NONFINITE).any()
    assert (s.x == 60000).all()


def test_the_first_iterate_is_plain(backend, solver):
    z = torch.full((2, 2), torch.nan)
    s = fixed_point(
        lambda x, z: x / 2 + z,
        torch.zeros(2, 2),
        z,
        solver=solver,
        backend=backend,
        on_failure="return",
    )
    assert (s.status == Status.NONFINITE).all()
    assert (s.iterations == 1).all()
    assert (s.x == 0).all()
    assert s.error_estimate.isinf().all()


def test_a_system_goes_back_as_a_whole():
    z = torch.full((4, 1), 0.001, dtype=torch.float64)

    def coupled(x, z):
        return logarithms(x) + 0.001 * (x.mean(0) - x) + 0 * z

    s = fixed_point(coupled, START[:1].expand(4, 1), z, per_sample=False, solver=Anderson())
    assert s.converged.all()
    assert (s.retreats == 1).all()
    torch.testing.assert_close(s.x, torch.full_like(z, 1.3), rtol=1e-6, atol=0)
    for limit in (2, 3, 4):
        cut = fixed_point(
            coupled,
            START[:1].expand(4, 1),
            z,
            per_sample=False,
            solver=Anderson(),
            max_iterations=limit,
            on_failure="return",
        )
        assert (cut.status == Status.MAX_ITERATIONS).all()
        assert cut.x.isfinite().all()
        assert cut.residual_norm.isfinite().all()
        assert (cut.iterations == limit).all()
