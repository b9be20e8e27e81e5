"""Wrong input: an error that says what must hold, what was got and what to do."""

import math

import numpy as np
import pytest
import torch
from helpers import Counter
from helpers_bad_input import half, raises
from torch import nn

from fpi_cuda import (
    Anderson,
    FixedPointLayer,
    GradientStep,
    ImplicitAdjoint,
    Picard,
    Tolerance,
    backends,
    fixed_point,
    operators,
)

pytestmark = pytest.mark.usefixtures("one_thread")

X0 = torch.zeros(2, 3)
Z = torch.tensor([[0.0], [1.0]]).expand(2, 3)  # one sample is done at once


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
        (lambda x: (x[0], 1.0), TypeError, r"must return tensors \(got float at \[1\]\)"),
        (lambda x: (x[0], x[1][:, :1]), ValueError, r"shape \[B, 2\] at \[1\] \(got \(2, 1\)\)"),
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


class Writing(torch.autograd.Function):
    """Half of x, by a backward that writes to what it is given."""

    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, v):
        return v.div_(2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("per_sample", ["auto", True, False])
@pytest.mark.parametrize("at", [2, 6])
def test_a_write_of_a_later_call_is_seen_too(at, per_sample, autocast, backend):
    """Where some samples have been left out as well, in views of x, and under autocast."""

    def half_plus(x, z):
        if g.calls == at:
            x[:, :1].add_(1)
        return 0.5 * x + z

    g, autocast = Counter(half_plus), torch.autocast("cpu", enabled=autocast)
    with autocast, raises(RuntimeError, r"must not change its argument x in place"):
        fixed_point(g, X0, Z, backend=backend, solver=Picard(), per_sample=per_sample)
    assert g.calls == at


def test_a_write_while_g_is_linearised_is_seen():
    """It is to x̂ itself, which the caller holds."""
    z = torch.ones(2, 3, requires_grad=True)

    def g(x, z):
        y = 0.5 * x + z
        if x.requires_grad:
            x.detach().zero_()
        return y

    x = fixed_point(g, X0, z).x
    with raises(RuntimeError, r"must not change its argument x in place"):
        x.sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_derivative_must_not_write_to_its_gradient(create_graph):
    z = torch.ones(2, 3, requires_grad=True)
    x = fixed_point(lambda x, z: Writing.apply(x) + z, X0, z).x
    with raises(RuntimeError, r"derivative of g must not change .* in place .*; write grad \* 2"):
        torch.autograd.grad(x.sum(), z, create_graph=create_graph)


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
        (torch.tensor(1.0), ValueError, "must have a batch dimension first"),
        ((), ValueError, r"must hold at least one tensor \(got an empty tuple\)"),
        (None, TypeError, r"x0 must be a tensor or a tuple, .* \(got NoneType\)"),
        ({"a": [torch.zeros(2, 3), None]}, TypeError, r"x0\['a'\]\[1\] must be .* NoneType"),
        ([[1.0, 2.0]], TypeError, r"x0\[0\]\[0\] must be a tensor \(got float\)"),
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
        *(
            "int",
            "bool",
            "scalar",
            "empty",
            "none",
            "dict",
            "list",
            "part",
            "batch",
            "dtype",
        ),
        "device",
    ],
)
def test_x0_must_be_floating_tensors_with_one_batch(x0, error, message):
    with raises(error, message):
        fixed_point(half, x0)


@pytest.mark.filterwarnings("ignore:.*(prototype|beta).*:UserWarning")
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda x: x.to_sparse(), r"must be dense \(got torch.sparse_coo\); write x0.to_dense\(\)"),
        (lambda x: x.to_sparse_csr(), r"must be dense \(got torch.sparse_csr\)"),
        (lambda x: torch.nested.nested_tensor([x, x[:1]]), "one shape .*nested.*to_padded_tensor"),
        (
            lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
            "one shape .*nested.*to_padded_tensor",
        ),
    ],
    ids=["coo", "csr", "nested", "jagged"],
)
def test_x0_must_be_dense(made, message):
    with raises(TypeError, message):
        fixed_point(half, made(torch.ones(2, 3)))


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
    with raises(
        TypeError, r"s\[1\] must be floating or complex to be differentiated \(got torch.int64\)"
    ):
        operators.partial(lambda a, b: (a * b).sum(), X0, torch.arange(3), which=(1,))


def test_layer_without_an_input_is_an_error():
    layer, z = FixedPointLayer(half), torch.zeros(2, 3)
    for call, got in (
        (layer, "nothing"),
        (lambda: layer(z=z), "z="),
        (lambda: layer(z.numpy(), 2), "ndarray, int"),
    ):
        with raises(TypeError, rf"needs an input or x0 .* \[B, ...\] by position \(got {got}\)"):
            call()
    with raises(TypeError, "got a nested one"):
        layer(torch.nested.nested_tensor([z[0], z[1]], layout=torch.jagged))
    with raises(TypeError, r"state_shape must be .* \(got \(3.0,\)\)"):
        FixedPointLayer(half, state_shape=(3.0,))(z)


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf, -math.inf])
def test_tolerance_must_be_finite_and_not_negative(name, value):
    with raises(ValueError, rf"Tolerance: {name} must be a finite number >= 0 \(got "):
        Tolerance(**{name: value})


def test_iterations_are_as_many_as_can_be_counted():
    x = torch.zeros(2, 3)
    with raises(ValueError, r"max_iterations must be at most 2147483647 \(got "):
        fixed_point(torch.cos, x, max_iterations=2**31)
    assert fixed_point(torch.cos, x, max_iterations=2**31 - 1).converged.all()


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, math.nan, "10"])
def test_max_iterations_must_be_a_whole_number_from_1(value):
    with raises(ValueError, r"max_iterations must be a whole number >= 1 \(got "):
        fixed_point(half, X0, max_iterations=value)
    with raises(ValueError, r"max_iterations must be a whole number >= 1 \(got "):
        FixedPointLayer(half, max_iterations=value)
    if value is not None and (value != 0 or type(value) is not int):  # an adjoint may make none
        with raises(ValueError, r"max_iterations must be a whole number >= 0 \(got "):
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
    [
        ("backend", "cuda"),
        ("on_failure", "ignore"),
        ("per_sample", "yes"),
        ("per_sample", 0),
        ("per_sample", np.False_),
        ("backend", None),
    ],
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


def test_module_that_returns_another_shape_raises():
    with raises(ValueError, r"g must return the shape of x, \(2, 3\) \(got \(2, 5\)\)"):
        fixed_point(nn.Linear(3, 5), X0)
