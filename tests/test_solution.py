"""What a solve returns: values, statuses, counts, rates and errors, for every dtype and shape."""

import math
import warnings

import pytest
import torch
from helpers import (
    DTYPES,
    TIGHT,
    Counter,
    assert_close,
    assert_solved,
    contraction,
    linear,
    linear_solution,
    unroll,
)

from fpi_cuda import (
    Anderson,
    FixedPointWarning,
    ImplicitAdjoint,
    Picard,
    Solution,
    Status,
    Tolerance,
    fixed_point,
)
from fpi_cuda.backends.scratch import Scratch
from fpi_cuda.record import Limits, Progress

pytestmark = pytest.mark.usefixtures("one_thread")


def halving(x, z):
    return 0.5 * x + z


# --- the stop rule ---------------------------------------------------------------------------


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
        per_sample=False,
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


def test_counts_are_of_g_and_of_each_samples_part_in_it(backend, solver):
    g = Counter(lambda x, s: s * torch.tanh(x) + 1)
    s = torch.tensor([[0.0], [0.3], [0.9]])
    solution = fixed_point(
        g, torch.zeros(3, 1), s, solver=solver, backend=backend, per_sample=False
    )
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


# --- rates and errors ------------------------------------------------------------------------


def symmetric(n, k, seed=0):
    a = contraction(n, 1.0, seed)
    a = a + a.mT
    return a * (k / torch.linalg.matrix_norm(a, 2))


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
    if beta == 1:  # the estimate speaks of g(x), which is what x is
        torch.testing.assert_close(solution.error_estimate, error, rtol=1e-2, atol=0)


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


def test_error_estimate_is_infinite_where_nothing_contracts(backend):
    solution = fixed_point(
        lambda x: 1.5 * x + 1,
        torch.zeros(2, 1),
        solver=Picard(),
        backend=backend,
        max_iterations=5,
        on_failure="return",
    )
    assert solution.contraction.min() > 1
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


# --- dtypes and shapes -----------------------------------------------------------------------


def test_every_dtype_is_solved_and_differentiated_to_its_tolerance(backend, solver, dtype):
    g64 = torch.Generator().manual_seed(0)
    z64 = torch.randn(4, 6, generator=g64, dtype=torch.float64).to(dtype).double()
    w64 = contraction(6, 0.6).to(dtype).double()

    def g(x, z, w):
        return torch.tanh(x @ w.mT + z)

    z, w = z64.to(dtype).requires_grad_(), w64.to(dtype).requires_grad_()
    solution = fixed_point(g, torch.zeros_like(z), z, params=(w,), solver=solver, backend=backend)
    assert solution.x.dtype == dtype
    assert solution.converged.all()
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    assert solution.residual_norm.dtype == accumulate
    z64.requires_grad_()
    w64.requires_grad_()
    true = unroll(g, torch.zeros(4, 6, dtype=torch.float64), z64, w64, steps=100)
    assert_solved(solution.x, true)
    v = torch.randn(4, 6, generator=g64, dtype=torch.float64).to(dtype)
    mine = torch.autograd.grad(solution.x, (z, w), v)
    for a, b in zip(mine, torch.autograd.grad(true, (z64, w64), v.double()), strict=True):
        assert a.dtype == dtype
        scale = b.abs().max()
        assert_solved(a / scale.to(dtype), b / scale)


SHAPES = {
    "contiguous": lambda: torch.randn(3, 4),
    "transposed": lambda: torch.randn(4, 3).mT,
    "sliced": lambda: torch.randn(6, 8)[::2, ::2],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "image": lambda: torch.randn(2, 3, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
    "batch_second": lambda: torch.randn(4, 3, 2).transpose(0, 1),
    "one_value": lambda: torch.randn(3, 1),
    "vector": lambda: torch.randn(3),
    "one_sample": lambda: torch.randn(1, 5),
    "no_sample": lambda: torch.randn(0, 5),
    "no_value": lambda: torch.randn(3, 0),
    "nothing": lambda: torch.randn(0, 0),
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_shape_and_layout_is_solved_and_differentiated(shape, backend, solver):
    z = SHAPES[shape]().requires_grad_()
    x0 = torch.zeros_like(z)  # keeps dense strides

    def g(x, z):
        return torch.tanh(0.5 * x + z)

    solution = fixed_point(g, x0, z, solver=solver, backend=backend)
    assert solution.x.shape == z.shape
    assert solution.status.shape == solution.residual_norm.shape == z.shape[:1]
    assert solution.converged.all()
    true = unroll(g, x0.double(), z.double(), steps=60)
    assert_solved(solution.x, true)
    (gradient,) = torch.autograd.grad(solution.x.sin().sum(), z)
    assert_solved(gradient, torch.autograd.grad(true.sin().sum(), z)[0])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
def test_x0_of_any_layout_is_read_and_never_written(layout, backend, solver):
    x0 = SHAPES[layout]()
    before = x0.clone()
    z = torch.randn(x0.shape)
    solution = fixed_point(
        lambda x, z: torch.tanh(0.5 * x + z), x0, z, solver=solver, backend=backend
    )
    assert torch.equal(x0, before)
    true = unroll(lambda x, z: torch.tanh(0.5 * x + z), x0.double(), z.double(), steps=60)
    assert_solved(solution.x, true)


def test_g_may_return_another_layout_than_its_argument(backend, solver):
    z = torch.randn(3, 4, 5, requires_grad=True)

    def g(x, z):  # transposed strides, the first time and later ones alike
        return torch.tanh(0.5 * x + z).transpose(1, 2).contiguous().transpose(1, 2)

    solution = fixed_point(g, torch.zeros_like(z), z, solver=solver, backend=backend)
    true = unroll(g, torch.zeros(3, 4, 5).double(), z.double(), steps=60)
    assert_solved(solution.x, true)
    (gradient,) = torch.autograd.grad(solution.x.sin().sum(), z)
    assert_solved(gradient, torch.autograd.grad(true.sin().sum(), z)[0])


def test_g_may_change_its_layout_between_calls(backend, solver):
    z = torch.randn(3, 4, 5)
    calls = []

    def g(x, z):
        calls.append(0)
        gx = torch.tanh(0.5 * x + z)
        return gx.transpose(1, 2).contiguous().transpose(1, 2) if len(calls) % 2 else gx

    solution = fixed_point(g, torch.zeros_like(z), z, solver=solver, backend=backend)
    assert_solved(solution.x, unroll(g, torch.zeros(3, 4, 5).double(), z.double(), steps=60))


def test_g_may_return_its_argument_or_a_view_of_its_input(backend, solver):
    x0 = torch.randn(3, 4)
    solution = fixed_point(lambda x: x, x0, solver=solver, backend=backend)
    assert torch.equal(solution.x, x0)
    assert solution.iterations.tolist() == [1] * 3
    solution = fixed_point(lambda x, z: z, x0, torch.ones(3, 4), solver=solver, backend=backend)
    assert torch.equal(solution.x, torch.ones(3, 4))


def test_state_tuple_has_one_norm_a_sample(backend, solver):
    """Solved as a tuple or as one tensor: the same counts, residuals and values."""
    z = torch.randn(4, 5)

    def g(x, z):
        return torch.tanh(0.7 * x.roll(1, 1) + z)

    def pair(x, z):
        y = g(torch.cat([x[0], x[1].flatten(1)], 1), z)
        return y[:, :3], y[:, 3:].reshape(-1, 1, 2)

    whole = fixed_point(g, torch.zeros(4, 5), z, solver=solver, backend=backend)
    parts = fixed_point(
        pair, (torch.zeros(4, 3), torch.zeros(4, 1, 2)), z, solver=solver, backend=backend
    )
    assert isinstance(parts.x, tuple)
    assert torch.equal(whole.x, torch.cat([parts.x[0], parts.x[1].flatten(1)], 1))
    assert torch.equal(whole.iterations, parts.iterations)
    assert torch.equal(whole.residual_norm, parts.residual_norm)


def test_list_state_gives_a_tuple():
    solution = fixed_point(
        lambda x: (0.5 * x[0] + 1, 0.5 * x[1]), [torch.zeros(2, 1), torch.ones(2, 2)]
    )
    assert isinstance(solution.x, tuple)
    assert_solved(solution.x[0], torch.full((2, 1), 2.0))


# --- use -------------------------------------------------------------------------------------


def test_warm_start_at_the_solution_takes_one_evaluation(backend, solver):
    z, w = torch.randn(3, 6), contraction(6, 0.9, dtype=torch.float32)

    def solve(x0):
        return fixed_point(
            lambda x, z, w: torch.tanh(x @ w.mT + z),
            x0,
            z,
            params=(w,),
            solver=solver,
            backend=backend,
        )

    cold = solve(torch.zeros(3, 6))
    warm = solve(cold.x)
    assert cold.iterations.min() > 3
    assert warm.iterations.max() <= 2
    near = solve(cold.x + 1e-3)
    assert near.iterations.max() < cold.iterations.max()


def test_x_is_attached_only_where_gradients_are_asked_for(backend):
    z = torch.randn(2, 3, requires_grad=True)

    def solve():
        return fixed_point(halving, torch.zeros(2, 3), z, backend=backend)

    assert solve().x.requires_grad
    with torch.no_grad():
        assert not solve().x.requires_grad
    with torch.inference_mode():
        x = solve().x
    assert_solved(x, solve().x.detach())
    assert not fixed_point(halving, torch.zeros(2, 3), z.detach(), backend=backend).x.requires_grad


def test_detached_solution_keeps_the_record_but_no_graph(backend):
    z = torch.randn(2, 3, requires_grad=True)
    solution = fixed_point(halving, torch.zeros(2, 3), z, backend=backend)
    cut = solution.detach()
    assert isinstance(cut, Solution)
    assert not cut.x.requires_grad
    assert torch.equal(cut.x, solution.x)
    assert torch.equal(cut.iterations, solution.iterations)


def test_same_call_twice_gives_the_same_bits(backend, solver):
    z, w = torch.randn(5, 33), contraction(33, 0.9, dtype=torch.float32)

    def run():
        zz = z.clone().requires_grad_()
        solution = fixed_point(
            lambda x, z, w: torch.tanh(x @ w.mT + z),
            torch.zeros(5, 33),
            zz,
            params=(w,),
            solver=solver,
            backend=backend,
        )
        return solution.x, torch.autograd.grad(solution.x.sum(), zz)[0], solution.residual_norm

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_auto_takes_the_native_backend_on_the_cpu_and_says_so():
    z = torch.randn(2, 3)
    assert fixed_point(halving, torch.zeros(2, 3), z).path.startswith("native")
    for name in ("native", "reference"):
        assert fixed_point(halving, torch.zeros(2, 3), z, backend=name).path.startswith(name)


def test_backends_count_the_same_iterations(solver):
    w, z = symmetric(16, 0.95).float(), torch.randn(32, 16) * 0.1
    one, other = (
        fixed_point(
            lambda x, z, w: torch.tanh(x @ w.mT + z),
            torch.zeros(32, 16),
            z,
            params=(w,),
            solver=solver,
            backend=name,
        )
        for name in ("reference", "native")
    )
    assert (one.iterations - other.iterations).abs().max() <= 1
    assert_solved(one.x, other.x)


def test_anderson_with_history_1_is_picard(backend):
    z, w = torch.randn(4, 6), contraction(6, 0.8, dtype=torch.float32)
    for beta in (1.0, 0.6):
        picard, anderson = (
            fixed_point(
                lambda x, z, w: torch.tanh(x @ w.mT + z),
                torch.zeros(4, 6),
                z,
                params=(w,),
                solver=s,
                backend=backend,
            )
            for s in (Picard(beta), Anderson(history=1, beta=beta))
        )
        assert torch.equal(picard.x, anderson.x)
        assert torch.equal(picard.iterations, anderson.iterations)


@pytest.mark.parametrize("history", [2, 3, 8])
def test_anderson_solves_a_linear_map_of_dimension_below_its_history_in_few_steps(history, backend):
    """Anderson with m > n is GMRES-like: a linear map of n dimensions takes n + 2 iterations."""
    n = history - 1
    a, z = symmetric(n, 0.95), torch.randn(3, n, dtype=torch.float64)
    solution = fixed_point(
        linear,
        torch.zeros_like(z),
        z,
        params=(a,),
        solver=Anderson(history=history, ridge=0.0),
        backend=backend,
        tolerance=Tolerance(1e-8),
    )
    assert solution.converged.all()
    assert solution.iterations.max() <= n + 2
    torch.testing.assert_close(solution.x, linear_solution(z, a), rtol=1e-6, atol=1e-6)


def test_anderson_needs_fewer_iterations_than_picard_on_a_hard_map(backend):
    w, z = symmetric(16, 0.99).float(), torch.randn(8, 16) * 0.1

    def count(solver):
        solution = fixed_point(
            lambda x, z, w: torch.tanh(x @ w.mT + z),
            torch.zeros(8, 16),
            z,
            params=(w,),
            solver=solver,
            backend=backend,
            max_iterations=1000,
        )
        assert solution.converged.all()
        return solution.iterations.double().mean()

    assert count(Anderson()) < 0.5 * count(Picard())


def test_damped_picard_takes_the_documented_step(backend):
    z, w = torch.randn(4, 6, dtype=torch.float64), contraction(6, 0.8)

    def g(x):
        return torch.tanh(x @ w.mT + z)

    solution = fixed_point(
        g,
        torch.zeros_like(z),
        solver=Picard(0.3),
        tolerance=Tolerance(0, 0),
        max_iterations=9,
        backend=backend,
        per_sample=False,
    )
    x = unroll(lambda x: x + 0.3 * (g(x) - x), torch.zeros_like(z), steps=8)
    torch.testing.assert_close(solution.x, g(x), rtol=1e-13, atol=1e-13)


def test_solve_makes_no_warning_when_all_is_well(backend, solver):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z = torch.randn(8, 6, requires_grad=True)
        s = torch.linspace(0, 0.9, 8)[:, None]
        x = fixed_point(
            lambda x, z, s: torch.tanh(s * x + z),
            torch.zeros(8, 6),
            z,
            s,
            solver=solver,
            backend=backend,
        ).x
        x.sum().backward()


def test_memory_that_the_library_takes_holds_nan_in_these_tests():
    """What conftest's poison promises; without it a read before a write would go unseen."""
    out = Progress(torch.zeros(2, 3), Limits(0.0, 0.0, 0.0, 1, 1)).out
    kept = Scratch().empty((2, 3), torch.float32, torch.device("cpu"))
    assert out.isnan().all()
    assert kept.isnan().all()
