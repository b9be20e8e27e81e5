"""What a solve returns, for every dtype, shape, layout, backend and solver."""

import math
import re
import warnings

import pytest
import torch
from helpers import Counter, assert_solved, contraction, linear, linear_solution, unroll
from helpers_solution import halving, symmetric

from fpi_cuda import Anderson, FixedPointWarning, Picard, Solution, Tolerance, fixed_point
from fpi_cuda.backends.scratch import Scratch
from fpi_cuda.record import Limits, Progress

pytestmark = pytest.mark.usefixtures("one_thread")


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


# --- what it says ------------------------------------------------------------------------------


def test_it_says_in_a_line_how_samples_ended(backend):
    z = torch.tensor([[0.1], [math.nan], [3.0]])
    s = fixed_point(
        lambda x, z: x * x * z + 0.1,
        torch.zeros(3, 1),
        z,
        solver=Picard(),
        backend=backend,
        max_iterations=4,
        tolerance=Tolerance(1e-7),
        on_failure="return",
        per_sample=True,
    )
    said = rf"3 samples: 1 CONVERGED, 1 MAX_.*, 1 NON.*; 1 to 4 .*most 0\.01\d+; {backend}, eager, "
    assert re.fullmatch(rf"Solution\(x \[3, 1\] float32; {said}\w+\)", repr(s))
    assert re.fullmatch(rf"Record\({said}\w+\)", repr(s.record))
    assert s.record.summary() in repr(s.detach())


def test_a_line_of_nothing_and_of_tuples():
    assert re.fullmatch(
        r"Solution\(x \[0, 2\] float32, \[0\] float32; 0 samples; native, .*\)",
        repr(fixed_point(lambda x: x, (torch.zeros(0, 2), torch.zeros(0)))),
    )
    s = fixed_point(lambda x: x, torch.zeros(2, 1, device="meta"))
    assert repr(s) == "Solution(x [2, 1] float32; meta: shapes only, g called once)"
    one = fixed_point(lambda x: 0 * x, torch.zeros(2, 1))
    assert "2 samples: 2 CONVERGED; 1 iterations; residual_norm at most 0; " in repr(one)


def test_a_fixed_point_that_may_repel_is_told(backend):
    """Anderson finds it; 3 x + z has no other."""
    a = torch.tensor([[3.0], [0.5]], dtype=torch.float64)
    s = fixed_point(
        lambda x, a: a * x + 1, torch.zeros_like(a), a, backend=backend, per_sample=True
    )
    assert s.converged.all()
    assert s.repelling.tolist() == s.record.repelling.tolist() == [True, False]
    assert "; 1 at fixed points that may repel (contraction >= 1); " in repr(s)
    begun = fixed_point(lambda x: 3 * x, torch.zeros(2, 1), backend=backend)
    assert not begun.repelling.any(), "nothing was measured"


def test_what_diverged_may_have_a_fixed_point(backend):
    """And it is none of those that were found."""
    with pytest.warns(FixedPointWarning, match=r"2 .* DIVERGED .*repels this iteration may exist"):
        s = fixed_point(lambda x: 3 * x + 1, torch.zeros(2, 1), solver=Picard(), backend=backend)
    assert not s.repelling.any()


def test_a_noisy_g_and_a_looser_rtol_are_thought_of():
    with pytest.warns(FixedPointWarning, match=r"raise max_iterations, loosen rtol.*A noisy g"):
        fixed_point(lambda x: 1 - x, torch.zeros(2, 1), solver=Picard(), max_iterations=3)


@pytest.mark.parametrize("good", [1, 4])
def test_where_mixtures_left_gs_domain_picard_is_named(solver, good):
    """Not where g was at no mixture yet, nor of Picard."""

    def finite(x):
        y = 0.9 * torch.sin(x) + 0.1
        return y if g.calls <= good else y * math.nan

    g = Counter(finite)
    with pytest.warns(FixedPointWarning, match="2 of 2 samples NONFINITE") as told:
        s = fixed_point(g, torch.zeros(2, 3), solver=solver)
    n = int(s.retreats.sum())
    named = f"taken back {n} times; Picard() makes none" in str(told[0].message)
    assert named == (solver == Anderson() and good > 1)
