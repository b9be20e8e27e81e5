"""Anderson that mixes at every few iterations, and β halved where the residual grows for long."""

import pytest
import torch
import zoo
from helpers import TIGHT

from fpi_cuda import Anderson, DenseStep, ImplicitAdjoint, Picard, Tolerance, fixed_point
from fpi_cuda.backends import native, reference
from fpi_cuda.record import (
    HALVINGS,
    MAX_HALVINGS,
    NEVER,
    PLAIN,
    SLOW_ITERATIONS,
    WINDOW,
    WORSE,
    Progress,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def solve(g, z, solver, **more):
    options = {"tolerance": Tolerance(1e-8), "max_iterations": 2000, "per_sample": True, **more}
    return fixed_point(g, torch.zeros_like(z), z, solver=solver, **options)


@pytest.fixture(scope="module")
def slow():
    """A symmetric map of rate .99, and z."""
    generator = torch.Generator().manual_seed(0)
    w = zoo.matrices("symmetric", 0.99, 1, 128, generator)[0]
    z = torch.randn(4, 128, dtype=torch.float64, generator=generator)
    return (lambda x, z: x @ w + z), z, torch.linalg.solve(torch.eye(128) - w, z, left=False)


@pytest.mark.parametrize("every", [2, 3])
def test_symmetric_maps_take_half_of_the_evaluations(slow, every):
    g, z, right = slow
    each, alternating = (solve(g, z, Anderson(every=e), backend="native") for e in (1, every))
    assert alternating.converged.all()
    assert alternating.iterations.sum() < 0.55 * each.iterations.sum()
    torch.testing.assert_close(alternating.x, right, rtol=1e-5, atol=1e-5)


def test_backends_count_the_same(slow):
    g, z, _ = slow
    native, reference = (
        solve(g, z, Anderson(10, every=4), backend=backend).iterations
        for backend in ("native", "reference")
    )
    assert (native - reference).abs().max() <= 2


class Steps:
    """Steps whose residuals have the norms that are asked for, in directions at random."""

    def __init__(self, backend, every, beta=1.0, m=4, n=9):
        self.backend, self.beta, self.every = backend, beta, every
        self.generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, n, dtype=torch.float64, generator=self.generator)
        self.p = Progress(self.x, NEVER)
        self.window = [torch.full((1, m, n), torch.nan, dtype=torch.float64) for _ in range(2)]
        self.window.append(torch.full((1, m, m), torch.nan, dtype=torch.float64))

    def __call__(self, norm):
        """One step; x as it was, g(x), and x as it is."""
        r = torch.randn(self.x.shape, dtype=torch.float64, generator=self.generator)
        x, gx = self.x.clone(), self.x + r * (norm / r.norm())
        args = self.beta, 1e-12, 1e9, *self.window
        self.backend.anderson_step(self.p, self.x, gx, *args, every=self.every)
        return x, gx, self.x.clone()

    def counter(self, column):
        return int(self.p.counters[0, column])


BACKENDS = pytest.mark.parametrize("step", [native, reference], ids=lambda b: b.NAME)


@BACKENDS
def test_between_mixtures_steps_are_plain_and_join_the_window(step):
    steps, plain = Steps(step, 3), []
    for k in range(1, 10):
        _, gx, moved = steps(0.5**k)
        plain.append(torch.equal(gx, moved))
        assert steps.counter(WINDOW) == min(k, 4)
        assert steps.counter(PLAIN) == k % 3
    assert plain == [True, True, False] * 3


@BACKENDS
def test_a_residual_that_does_not_fall_is_mixed_at_once(step):
    steps = Steps(step, 100)
    for norm in (1, 0.9, 0.8):
        _, gx, moved = steps(norm)
        assert torch.equal(gx, moved)
    _, gx, moved = steps(0.7999)  # less than a thousandth below
    assert not torch.equal(gx, moved)
    assert steps.counter(PLAIN) == 0
    _, gx, moved = steps(0.7)
    assert torch.equal(gx, moved)


@BACKENDS
def test_plain_steps_are_damped_as_mixtures_are(step):
    x, gx, moved = Steps(step, 3, beta=0.25)(1.0)
    torch.testing.assert_close(moved, x + 0.25 * (gx - x))


@BACKENDS
def test_beta_is_halved_where_the_residual_has_grown_for_long(step):
    steps = Steps(step, 3)
    steps(1.0)
    for k in range(MAX_HALVINGS + 1):
        for _ in range(SLOW_ITERATIONS - 1):
            steps(WORSE + 1)
            assert steps.counter(HALVINGS) == k
        steps(WORSE + 1)
        assert steps.counter(HALVINGS) == min(k + 1, MAX_HALVINGS)
    steps(2.0)
    x, gx, moved = steps(1.5)  # a plain step
    torch.testing.assert_close(moved, x + 0.25 * (gx - x))


@BACKENDS
def test_beta_stays_where_the_residual_falls_or_hardly_grows(step):
    steps = Steps(step, 1)
    for k in range(40):
        steps(1 + 0.04 * k)
    for k in range(40):
        steps(0.99**k)
    assert steps.counter(HALVINGS) == 0


def test_jacobians_far_below_minus_one_are_solved(backend):
    generator = torch.Generator().manual_seed(3)
    q, _ = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=generator))
    w = q * torch.linspace(-8, 0.9, 32, dtype=torch.float64) @ q.T
    z = torch.randn(6, 32, dtype=torch.float64, generator=generator)
    s = solve(lambda x, z: torch.tanh(x @ w + z), z, Anderson(every=3), backend=backend)
    assert s.converged.all()


def test_the_whole_driver_takes_as_many_iterations_as_the_loop():
    torch.manual_seed(0)
    step = DenseStep(16, 24, activation="tanh").double()
    z = torch.randn(9, 24, dtype=torch.float64)
    x0 = torch.zeros(9, 16, dtype=torch.float64)
    with torch.no_grad():
        whole, loop = (
            fixed_point(
                step, x0, z, solver=Anderson(4, 0.9, every=3), driver=driver, backend="native"
            )
            for driver in ("whole", "eager")
        )
    assert "whole" in whole.path
    assert torch.equal(whole.iterations, loop.iterations)
    torch.testing.assert_close(whole.x, loop.x, rtol=1e-6, atol=1e-8)


def test_a_step_after_a_mixture_that_fails_is_taken_back_by_half(backend):
    """x: 0, 1, 1.5, a mixture (2), a plain step from there; then half of that step."""
    walls = iter([9, 9, 9, 9, -9])

    def g(x):
        return torch.where(x > next(walls, torch.inf), torch.nan, 0.5 * x + 1 + 0.01 * x.sin())

    start = torch.zeros(1, 1, dtype=torch.float64)
    s = fixed_point(g, start, solver=Anderson(every=3), backend=backend, per_sample=True)
    assert s.converged.all()
    assert s.retreats.tolist() == [1]


@pytest.mark.parametrize("per_sample", [True, False])
def test_derivatives_of_both_orders(per_sample):
    torch.manual_seed(0)
    w = 0.4 * torch.randn(3, 3, dtype=torch.float64)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def x(z, w):
        options = {"solver": Anderson(4, every=3), "tolerance": TIGHT}
        adjoint = ImplicitAdjoint(tolerance=TIGHT)
        start = torch.zeros_like(z)
        g = lambda x, z, w: torch.tanh(x @ w + z)  # noqa: E731
        return fixed_point(
            g, start, z, params=(w,), adjoint=adjoint, per_sample=per_sample, **options
        ).x

    w.requires_grad_()
    assert torch.autograd.gradcheck(x, (z, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(x, (z, w))


def test_one_is_what_it_was_and_picard_is_history_one():
    assert Anderson() == Anderson(every=1)
    z = torch.randn(3, 4, dtype=torch.float64)
    g = lambda x, z: 0.5 * x.sin() + z  # noqa: E731
    one, plain = solve(g, z, Anderson(1, every=3)), solve(g, z, Picard())
    assert torch.equal(one.iterations, plain.iterations)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, 2**31])
def test_every_is_a_whole_number(every):
    with pytest.raises(ValueError, match="every must be"):
        Anderson(every=every)
