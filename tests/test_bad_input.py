"""Wrong input: an error that says what must hold, what was got and what to do; or a status."""

import math
import warnings

import pytest
import torch
from helpers import Counter, assert_close
from torch import nn

from fpi_cuda import (
    Anderson,
    FixedPointError,
    FixedPointLayer,
    FixedPointWarning,
    GradientStep,
    ImplicitAdjoint,
    Picard,
    Status,
    Tolerance,
    backends,
    fixed_point,
    operators,
)

pytestmark = pytest.mark.usefixtures("one_thread")

X0 = torch.zeros(2, 3)


def half(x, *_):
    return 0.5 * x


def raises(error, message):
    return pytest.raises(error, match=message)


# --- what g returns --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("g", "error", "message"),
    [
        (
            lambda x: x[:, :2],
            ValueError,
            r"g must return the shape of x, \(2, 3\) \(got \(2, 2\)\)",
        ),
        (lambda x: x[:1], ValueError, r"g must return the shape of x, \(2, 3\) \(got \(1, 3\)\)"),
        (lambda x: x.sum(), ValueError, r"g must return the shape of x, \(2, 3\) \(got \(\)\)"),
        (lambda x: x.double(), TypeError, r"g must return x's dtype, torch.float32 \(got torch.fl"),
        (
            lambda x: x.long(),
            TypeError,
            r"g must return x's dtype, torch.float32 \(got torch.int64",
        ),
        (lambda x: x.to("meta"), ValueError, r"on x's device, cpu \(got meta\)"),
        (lambda x: None, TypeError, r"g must return a tensor like x \(got NoneType\)"),
        (lambda x: (x,), TypeError, r"g must return a tensor like x \(got tuple\)"),
        (lambda x: x.numpy(), TypeError, r"g must return a tensor like x \(got ndarray\)"),
    ],
    ids=["columns", "rows", "scalar", "wider", "integer", "device", "none", "tuple", "numpy"],
)
def test_what_g_returns_must_be_like_x(g, error, message, backend):
    with raises(error, message):
        fixed_point(g, X0, backend=backend)


@pytest.mark.parametrize("change_at", [2, 3])
def test_g_that_changes_its_shape_later_raises_there(change_at, backend):
    g = Counter(lambda x: 0.5 * x + 1 if g.calls < change_at else x[:, :2])
    with raises(ValueError, r"\(got \(2, 2\)\)"):
        fixed_point(g, X0, backend=backend)


@pytest.mark.parametrize(
    ("g", "error", "message"),
    [
        (lambda x: x[0], TypeError, "must return a tuple of 2 tensors like x0"),
        (lambda x: (x[0],), TypeError, r"a tuple of 2 tensors like x0 \(got 1 items\)"),
        (lambda x: (x[0], 1.0), TypeError, r"must return tensors \(got float at 1\)"),
        (lambda x: (x[0], x[1][:, :1]), ValueError, r"shape \[B, 2\] at 1 \(got \(2, 1\)\)"),
        (lambda x: (x[0].double(), x[1].double()), TypeError, "x's dtype"),
    ],
    ids=["bare", "short", "float", "shape", "dtype"],
)
def test_what_g_returns_must_be_like_a_tuple_state(g, error, message):
    with raises(error, message):
        fixed_point(g, (torch.zeros(2, 3), torch.zeros(2, 2)))


def test_g_must_not_write_to_its_argument(backend):
    with raises(RuntimeError, r"must not change its argument x in place; write x \* 2"):
        fixed_point(lambda x: x.mul_(0.5), torch.ones(2, 3), backend=backend)


def test_g_must_be_callable():
    with raises(TypeError, r"g must be callable \(got Tensor\)"):
        fixed_point(X0, X0)


def test_an_error_inside_g_passes_unchanged(backend):
    def g(x):
        raise KeyError("mine")

    with raises(KeyError, "mine"):
        fixed_point(g, X0, backend=backend)


# --- x0, inputs, params ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x0", "error", "message"),
    [
        (
            torch.zeros(2, 3, dtype=torch.int64),
            TypeError,
            r"\(got torch.int64\); write x0.float\(\)",
        ),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, r"must be float64, .*\(got torch.bool\)"),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError, r"\(got torch.complex64\)"),
        (torch.tensor(1.0), ValueError, "must have a batch dimension first"),
        ((), ValueError, r"must hold at least one tensor \(got an empty tuple\)"),
        (None, TypeError, r"x0 must be a tensor \(got NoneType\)"),
        ([[1.0, 2.0]], TypeError, r"x0\[0\] must be a tensor \(got list\)"),
        ((torch.zeros(2, 1), 3.0), TypeError, r"x0\[1\] must be a tensor \(got float\)"),
        (
            (torch.zeros(2, 1), torch.zeros(3, 1)),
            ValueError,
            r"x0\[1\] .* batch size of x0\[0\], 2",
        ),
        (
            (torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.float64)),
            ValueError,
            r"x0\[1\] must have the dtype of x0\[0\], torch.float32 \(got torch.float64\)",
        ),
        (
            (torch.zeros(2, 1), torch.zeros(2, 1, device="meta")),
            ValueError,
            r"x0\[1\] must have the device of x0\[0\], cpu \(got meta\)",
        ),
    ],
    ids=[
        *("int", "bool", "complex", "scalar", "empty", "none", "list", "part", "batch", "dtype"),
        "device",
    ],
)
def test_x0_must_be_floating_tensors_with_one_batch(x0, error, message):
    with raises(error, message):
        fixed_point(half, x0)


def test_input_without_the_batch_dimension_is_sent_to_params():
    with raises(
        ValueError, r"inputs\[0\] must have the batch size 2 as first dimension .* params="
    ):
        fixed_point(lambda x, w: x @ w, X0, torch.zeros(3, 3))
    with raises(ValueError, r"inputs\[1\] must have the batch size 2"):
        fixed_point(lambda x, z, s: x * s + z, X0, X0, torch.tensor(0.5))


@pytest.mark.parametrize("where", ["inputs", "params"])
def test_inputs_and_params_must_be_tensors(where):
    with raises(TypeError, rf"{where}\[0\] must be a tensor \(got float\); .*functools.partial"):
        if where == "inputs":
            fixed_point(half, X0, 0.5)
        else:
            fixed_point(half, X0, params=(0.5,))


@pytest.mark.parametrize("params", [torch.tensor(0.5), torch.ones(1, 3)])
def test_params_given_as_a_bare_tensor_is_an_error(params):
    with raises((TypeError, ValueError), r"params must .*params=\("):
        fixed_point(lambda x, w: 0.5 * x * w, X0, params=params)


def test_integer_argument_of_partial_that_is_to_be_differentiated_is_an_error():
    with raises(TypeError, r"s\[1\] must be floating to be differentiated \(got torch.int64\)"):
        operators.partial(lambda a, b: (a * b).sum(), X0, torch.arange(3), which=(1,))


def test_layer_without_an_input_is_an_error():
    with raises(TypeError, "needs an input or x0"):
        FixedPointLayer(half)()


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf, -math.inf])
def test_tolerance_must_be_finite_and_not_negative(name, value):
    with raises(ValueError, rf"Tolerance: {name} must be a finite number >= 0 \(got "):
        Tolerance(**{name: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, math.nan, "10"])
def test_max_iterations_must_be_a_whole_number_from_1(value):
    with raises(ValueError, r"max_iterations must be a whole number >= 1 \(got "):
        fixed_point(half, X0, max_iterations=value)
    with raises(ValueError, r"max_iterations must be a whole number >= 1 \(got "):
        FixedPointLayer(half, max_iterations=value)
    if value is not None:
        with raises(ValueError, r"max_iterations must be a whole number >= 1 \(got "):
            ImplicitAdjoint(max_iterations=value)


@pytest.mark.parametrize("value", [0, -2, 2.0, True, None])
def test_history_must_be_a_whole_number_from_1(value):
    with raises(ValueError, r"history must be a whole number >= 1 \(got "):
        Anderson(history=value)


@pytest.mark.parametrize("make", [Picard, Anderson])
@pytest.mark.parametrize("value", [0, -0.5, 2, math.nan, math.inf])
def test_beta_must_lie_between_0_and_2(make, value):
    with raises(ValueError, r"beta must lie in \(0, 2\) \(got "):
        make(beta=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": -1e-3}, "ridge must lie in"),
        ({"ridge": math.nan}, "ridge must lie in"),
        ({"ridge": 1.0}, "ridge must lie in"),
        ({"restart": 1.0}, "restart must be > 1"),
        ({"restart": math.nan}, "restart must be > 1"),
    ],
)
def test_anderson_options_must_be_in_range(options, message):
    with raises(ValueError, message):
        Anderson(**options)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fixed_point(half, X0, max_iter=10),
        lambda: fixed_point(half, X0, tol=1e-3),
        lambda: FixedPointLayer(half, max_itr=10),
        lambda: Picard(damping=0.5),
        lambda: Anderson(m=5),
        lambda: Tolerance(tol=1e-3),
        lambda: ImplicitAdjoint(max_iter=3),
        lambda: GradientStep(half, 0.1, momentum=0.9),
        lambda: operators.partial(lambda x: x.sum(), X0, argnums=(0,)),
    ],
)
def test_misspelt_option_is_a_type_error(call):
    with raises(TypeError, "unexpected keyword argument"):
        call()


@pytest.mark.parametrize(
    ("name", "value"),
    [("backend", "cuda"), ("on_failure", "ignore"), ("per_sample", "yes"), ("backend", None)],
)
def test_unknown_choice_names_the_choices(name, value):
    for call in (fixed_point, FixedPointLayer):
        args = (half, X0) if call is fixed_point else (half,)
        with raises(ValueError, rf"{name} must be one of \(.*\) \(got {value!r}\)"):
            call(*args, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("solver", "anderson"),
        ("solver", Picard),
        ("adjoint", Picard()),
        ("tolerance", 1e-4),
        ("tolerance", None),
    ],
)
def test_option_of_the_wrong_type_is_a_type_error(name, value):
    with raises(TypeError, rf"{name} must be "):
        fixed_point(half, X0, **{name: value})
    with raises(TypeError, rf"{name} must be "):
        FixedPointLayer(half, **{name: value})


def test_adjoint_options_are_checked():
    with raises(TypeError, "solver must be Picard"):
        ImplicitAdjoint(solver="picard")
    with raises(TypeError, "tolerance must be a Tolerance"):
        ImplicitAdjoint(tolerance=1e-3)
    with raises(ValueError, r'failed must be "mask" or "use" \(got \'zero\'\)'):
        ImplicitAdjoint(failed="zero")


def test_backend_that_is_not_there_raises_and_names_those_that_are():
    with raises(RuntimeError, r'"triton".*use backend="auto"'):
        fixed_point(half, X0, backend="triton")
    with raises(RuntimeError, r'"native" .*: this build has no kernels for device meta'):
        backends.choose("native", X0.to("meta"))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_step_size_must_be_positive(value):
    with raises(ValueError, r"step_size must be > 0 \(got "):
        GradientStep(lambda x: x.sum(1), value)


def test_energy_must_return_one_value_a_sample():
    step = GradientStep(lambda x: x.square().sum(), 0.1)
    with raises(ValueError, r"energy must return one value a sample, shape \[2\] \(got \(\)\)"):
        fixed_point(step, X0)


def test_history_above_the_native_limit_says_so():
    with raises((ValueError, RuntimeError), "history"):
        fixed_point(half, torch.ones(2, 3), solver=Anderson(history=1000), backend="native")


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_nonfinite_g_at_iteration_k_ends_that_sample_there(value, k, backend, solver):
    z = torch.randn(4, 3, requires_grad=True)

    def g(x, z):
        gx = one_third(x, z)
        g.calls += 1
        return torch.where(torch.arange(4)[:, None] == 1, value, gx) if g.calls == k else gx

    g.calls = 0
    with pytest.warns(FixedPointWarning, match="1 of 4 samples NONFINITE"):
        solution = fixed_point(
            g, torch.zeros_like(z), z, solver=solver, backend=backend, per_sample=False
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
    assert solution.evaluations == 30


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


def test_module_that_returns_another_shape_raises():
    with raises(ValueError, r"g must return the shape of x, \(2, 3\) \(got \(2, 5\)\)"):
        fixed_point(nn.Linear(3, 5), X0)
