"""NaN, infinity and a g that does not contract: a status, for that sample alone."""

import math
import warnings

import pytest
import torch
from helpers import Counter, assert_close
from helpers_bad_input import half, raises

from fpi_cuda import (
    Anderson,
    FixedPointError,
    FixedPointWarning,
    ImplicitAdjoint,
    Picard,
    Status,
    Tolerance,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- NaN and Inf: that sample alone ----------------------------------------------------------


def one_third(x, z):
    return torch.tanh(x / 3) + z


def clean(z, backend, solver):
    z = z.clone().requires_grad_()
    x = fixed_point(one_third, torch.zeros_like(z), z, solver=solver, backend=backend).x
    return x.detach(), torch.autograd.grad(x.sin().sum(), z)[0]


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["x0", "z"])
def test_nonfinite_input_is_that_samples_alone(value, where, backend, solver):
    z, x0 = torch.randn(4, 3), torch.zeros(4, 3)
    (x0 if where == "x0" else z)[2, 1] = value
    good = [0, 1, 3]
    z.requires_grad_()
    with pytest.warns(FixedPointWarning, match=r"1 of 4 samples NONFINITE \(samples 2\)"):
        solution = fixed_point(one_third, x0, z, solver=solver, backend=backend)
    assert solution.status.tolist() == [0, 0, Status.NONFINITE, 0]
    x, gradient = clean(z.detach()[good], backend, solver)
    assert_close(solution.x[good].detach(), x)
    (mine,) = torch.autograd.grad(solution.x[good].sin().sum(), z)
    assert_close(mine[good], gradient)
    assert mine[2].tolist() == [0, 0, 0]


@pytest.mark.usefixtures("whole_batch")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_nonfinite_g_at_iteration_k_ends_that_sample_there(value, k, backend, solver):
    z = torch.randn(4, 3, requires_grad=True)

    def g(x, z):
        gx = one_third(x, z)
        g.calls += 1
        return torch.where(torch.arange(4)[:, None] == 1, value, gx) if g.calls == k else gx

    g.calls = 0
    if isinstance(solver, Anderson) and k == 5:  # at a mixture, which is taken back
        solution = fixed_point(
            g, torch.zeros_like(z), z, solver=solver, backend=backend, per_sample=True
        )
        assert solution.converged.all()
        assert solution.retreats.tolist() == [0, 1, 0, 0]
        right = clean(z.detach(), backend, solver)[0]
        torch.testing.assert_close(solution.x.detach(), right, rtol=1e-3, atol=1e-3)
        return
    with pytest.warns(FixedPointWarning, match="1 of 4 samples NONFINITE"):
        solution = fixed_point(
            g, torch.zeros_like(z), z, solver=solver, backend=backend, per_sample=True
        )
    assert solution.status.tolist() == [0, Status.NONFINITE, 0, 0]
    assert solution.iterations[1] == k
    # What is returned is the last finite iterate: g's argument at iteration k.
    assert solution.x[1].isfinite().all()
    x, gradient = clean(z.detach(), backend, solver)
    good = [0, 2, 3]
    assert_close(solution.x[good].detach(), x[good])
    (mine,) = torch.autograd.grad(solution.x.sin().sum(), z)
    assert_close(mine[good], gradient[good])
    assert mine[1].tolist() == [0, 0, 0]


def test_last_finite_iterate_of_a_nonfinite_sample_is_returned(backend):
    def g(x):
        return torch.where(x > 3.5, math.nan, x + 1)

    with pytest.warns(FixedPointWarning, match="NONFINITE"):
        solution = fixed_point(g, torch.zeros(1, 1), solver=Picard(), backend=backend)
    assert solution.x.item() == 4
    assert solution.iterations.item() == 5


def test_params_gradient_leaves_a_nonfinite_sample_out(backend, solver):
    z, w = torch.randn(4, 3), torch.full((3,), 0.5, requires_grad=True)
    z[2, 0] = math.nan

    def solve(z):
        return fixed_point(
            lambda x, z, w: torch.tanh(w * x) + z,
            torch.zeros_like(z),
            z,
            params=(w,),
            solver=solver,
            backend=backend,
        ).x

    with pytest.warns(FixedPointWarning):
        (mine,) = torch.autograd.grad(solve(z)[[0, 1, 3]].sin().sum(), w)
    (true,) = torch.autograd.grad(solve(z[[0, 1, 3]]).sin().sum(), w)
    assert_close(mine, true)


def test_masked_gradient_is_zero_at_second_order_too(backend):
    z = torch.randn(3, 2, dtype=torch.float64)
    z[1, 0] = math.nan
    z.requires_grad_()
    with pytest.warns(FixedPointWarning, match="NONFINITE"):
        x = fixed_point(one_third, torch.zeros_like(z), z, backend=backend).x
    (first,) = torch.autograd.grad(x[[0, 2]].sin().sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first[[0, 2]].sin().sum(), z)
    assert first[1].tolist() == [0, 0]
    assert second[1].tolist() == [0, 0]
    good = z.detach()[[0, 2]].requires_grad_()
    x = fixed_point(one_third, torch.zeros_like(good), good, backend=backend).x
    (first,) = torch.autograd.grad(x.sin().sum(), good, create_graph=True)
    (true,) = torch.autograd.grad(first.sin().sum(), good)
    torch.testing.assert_close(second[[0, 2]], true, rtol=1e-5, atol=1e-6)


def test_all_samples_nonfinite_gives_zero_gradients_and_no_error(backend, solver):
    z = torch.full((2, 3), math.nan, requires_grad=True)
    with pytest.warns(FixedPointWarning, match="2 of 2 samples NONFINITE"):
        solution = fixed_point(one_third, torch.zeros(2, 3), z, solver=solver, backend=backend)
    (gradient,) = torch.autograd.grad(solution.x.sum(), z)
    assert gradient.tolist() == [[0] * 3] * 2


def test_nan_in_the_loss_is_not_hidden(backend, solver):
    z = torch.randn(3, 2, requires_grad=True)
    x = fixed_point(one_third, torch.zeros(3, 2), z, solver=solver, backend=backend).x
    v = torch.ones(3, 2)
    v[1, 0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FixedPointWarning)
        (gradient,) = torch.autograd.grad(x, z, v)
    assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()


# --- a g that does not contract --------------------------------------------------------------


def test_growing_samples_are_diverged_and_counted_in_the_warning(backend):
    slope = torch.tensor([[0.5], [10.0], [0.2], [20.0]])
    with pytest.warns(
        FixedPointWarning, match=r"2 of 4 samples DIVERGED \(samples 1, 3\): .*no contraction"
    ):
        solution = fixed_point(
            lambda x, s: s * x + 1, torch.zeros(4, 1), slope, solver=Picard(), backend=backend
        )
    assert solution.status.tolist() == [0, Status.DIVERGED, 0, Status.DIVERGED]
    assert_close(solution.x[[0, 2], 0], torch.tensor([2.0, 1.25]), {torch.float32: (2e-4, 0)})
    assert solution.iterations[1] < 200


def test_rotation_ends_at_max_iterations_with_a_warning(backend):
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    with pytest.warns(FixedPointWarning, match=r"2 of 2 samples MAX_ITERATIONS .*beta < 1"):
        solution = fixed_point(
            lambda x, t: x @ t,
            torch.ones(2, 2),
            params=(turn,),
            solver=Picard(),
            max_iterations=30,
            backend=backend,
        )
    assert solution.status.tolist() == [Status.MAX_ITERATIONS] * 2
    assert solution.iterations.tolist() == [30, 30]
    assert solution.evaluations == 30 + 2  # at one state twice: is g random?


def test_damping_or_anderson_tames_the_rotation(backend):
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    for solver in (Picard(beta=0.5), Anderson()):
        solution = fixed_point(
            lambda x, t: x @ t, torch.ones(2, 2), params=(turn,), solver=solver, backend=backend
        )
        assert solution.converged.all()
        assert solution.x.abs().max() < 1e-4


def test_on_failure_raise_carries_the_solution(backend, solver):
    z = torch.tensor([[1.0], [math.nan]])
    with raises(FixedPointError, "1 of 2 samples NONFINITE") as caught:
        fixed_point(
            one_third, torch.zeros(2, 1), z, solver=solver, backend=backend, on_failure="raise"
        )
    solution = caught.value.solution
    assert solution.status.tolist() == [0, Status.NONFINITE]
    assert_close(solution.x[0], one_third(solution.x[0], z[0]), {torch.float32: (1e-3, 1e-3)})


def test_on_failure_raise_raises_from_backward_naming_samples(backend, solver):
    z = torch.ones(3, 1, requires_grad=True)
    solution = fixed_point(
        lambda x, z: 0.9 * torch.tanh(x) + 0.1 * z,
        torch.zeros(3, 1),
        z,
        solver=solver,
        backend=backend,
        on_failure="raise",
        adjoint=ImplicitAdjoint(solver=Picard(), max_iterations=2, tolerance=Tolerance(1e-6)),
    )
    with raises(FixedPointError, r"adjoint: .*MAX_ITERATIONS \(samples 1\)") as caught:
        torch.autograd.grad(solution.x[1].sum(), z)
    assert caught.value.solution.status.tolist() == [0, Status.MAX_ITERATIONS, 0]
    assert caught.value.solution.x.shape == (3, 1)


def test_on_failure_raise_of_a_tuple_state_carries_a_tuple():
    with raises(FixedPointError, "DIVERGED") as caught:
        fixed_point(
            lambda x: (4 * x[0] + 1, 4 * x[1] + 1),
            (torch.zeros(2, 3), torch.zeros(2, 1, 2)),
            solver=Picard(),
            on_failure="raise",
        )
    assert [t.shape for t in caught.value.solution.x] == [(2, 3), (2, 1, 2)]


def test_on_failure_return_is_silent_but_the_status_is_there(backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = fixed_point(
            lambda x: 4 * x + 1,
            torch.zeros(2, 1),
            solver=Picard(),
            backend=backend,
            on_failure="return",
        )
    assert solution.status.tolist() == [Status.DIVERGED] * 2


def test_adjoint_that_does_not_converge_warns_with_counts(backend):
    z = torch.ones(3, 1, requires_grad=True)
    solution = fixed_point(
        lambda x, z: 0.9 * torch.tanh(x) + 0.1 * z,
        torch.zeros(3, 1),
        z,
        backend=backend,
        adjoint=ImplicitAdjoint(solver=Picard(), max_iterations=2, tolerance=Tolerance(1e-6)),
    )
    with pytest.warns(FixedPointWarning, match="adjoint: 3 of 3 samples MAX_ITERATIONS"):
        (gradient,) = torch.autograd.grad(solution.x.sum(), z)
    assert gradient.abs().min() > 0  # kept: MAX_ITERATIONS is not masked


def test_diverged_samples_gradient_is_masked_or_used_as_asked(backend):
    slope = torch.tensor([[0.5], [2.0]])
    z = torch.ones(2, 1)

    def gradient(failed):
        zz = z.clone().requires_grad_()
        solution = fixed_point(
            lambda x, z, s: torch.where(s > 1, s * x + z, torch.tanh(s * x) + z),
            torch.zeros(2, 1),
            zz,
            slope,
            solver=Picard(),
            backend=backend,
            on_failure="return",
            adjoint=ImplicitAdjoint(failed=failed, max_iterations=4, tolerance=Tolerance(0, 0)),
        )
        assert solution.status.tolist() == [0, Status.DIVERGED]
        return torch.autograd.grad(solution.x.sum(), zz)[0]

    masked, used = gradient("mask"), gradient("use")
    assert masked[0] == used[0] != 0
    assert masked[1] == 0
    assert used[1] != 0


def test_halving_converges_to_its_fixed_point_zero(backend, solver, dtype):
    solution = fixed_point(half, torch.ones(2, 3, dtype=dtype), solver=solver, backend=backend)
    assert solution.converged.all()
    _, atol = Tolerance().resolve(dtype)
    assert solution.x.abs().max() <= 2 * atol


def test_warning_points_at_the_callers_line():
    with pytest.warns(FixedPointWarning) as caught:
        fixed_point(lambda x: 4 * x + 1, torch.zeros(2, 1), solver=Picard())
    assert caught[0].filename == __file__


@pytest.mark.parametrize("per_sample", ["auto", True, False])
@pytest.mark.parametrize("b, sample", [(1, (4,)), (6, (4,)), (6, ()), (6, (2, 2))])
def test_a_random_g_is_named_as_random_where_a_sample_does_not_converge(b, sample, per_sample):
    calls = Counter(lambda x, z: 0.5 * torch.tanh(x) + z + torch.rand_like(x))
    with pytest.warns(FixedPointWarning) as warned:
        s = fixed_point(
            calls,
            torch.zeros(b, *sample),
            torch.randn(b, *sample),
            solver=Picard(),  # whose residuals are the noise; a mixture's may vanish by chance
            max_iterations=20,
            per_sample=per_sample,
        )
    (message,) = {str(w.message) for w in warned}
    assert "other values for the same arguments (dropout" in message
    assert f"{b} of {b} samples MAX_ITERATIONS" in message
    assert "raise max_iterations" not in message
    assert s.evaluations == calls.calls


def test_a_g_that_is_not_random_is_called_twice_more_at_most_and_not_called_random():
    calls = Counter(lambda x, z: -x + z)
    z = torch.randn(6, 4)
    given = calls, torch.zeros(6, 4), z
    with pytest.warns(FixedPointWarning, match="raise max_iterations"):
        fixed_point(*given, solver=Picard(), max_iterations=20, per_sample=True)
    assert calls.calls == 22
    fixed_point(*given, solver=Picard(), max_iterations=20, per_sample=True, on_failure="return")
    assert calls.calls == 42
