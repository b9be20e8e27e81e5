"""torch.func's transforms of a solve; what can't be right raises."""

import pytest
import torch
from helpers import Net, contraction, linear, linear_solution, unroll
from helpers_derivatives import (
    close,
    double,
    form,
    options_fixture,  # noqa: F401
)
from torch.autograd import grad
from torch.func import functional_call, jacrev, vmap
from torch.func import grad as fgrad

from fpi_cuda import Picard, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")


# --- torch.func ------------------------------------------------------------------------------


@pytest.fixture
def problem(options):
    """F(z, w) -> x over a batch, with values for both."""

    def f(z, w):
        x0 = torch.zeros(z.shape[0], 3, dtype=z.dtype)
        return fixed_point(
            lambda x, z, w: torch.tanh(x @ w.mT + z), x0, z, params=(w,), **options
        ).x

    return f, double(2, 3), contraction(3, 0.6)


def test_jacrev_equals_autograds_jacobian(problem):
    f, z, w = problem
    for i in range(2):
        mine = jacrev(f, argnums=i)(z, w)
        close(mine, torch.autograd.functional.jacobian(f, (z, w))[i])


def test_jacrev_of_jacrev_equals_autograds_hessian_in_params(problem):
    f, z, w = problem

    def loss(w):
        return f(z, w).sin().sum()

    close(jacrev(jacrev(loss))(w), torch.autograd.functional.hessian(loss, w))


def test_vmap_over_inputs_equals_a_loop(problem):
    f, _, w = problem
    zs = double(3, 2, 3, seed=2)
    close(vmap(lambda z: f(z, w))(zs), torch.stack([f(z, w) for z in zs]))
    inner = vmap(lambda z: f(z, w), in_dims=1, out_dims=1)(zs)
    close(inner, torch.stack([f(zs[:, i], w) for i in range(2)], 1))


def test_vmap_over_params_equals_a_loop(problem):
    f, z, w = problem
    ws = torch.stack([w, 0.5 * w, -w])
    close(vmap(lambda w: f(z, w))(ws), torch.stack([f(z, w) for w in ws]))


def test_vmap_over_both_and_nested_equals_loops(problem):
    f, z, w = problem
    zs, ws = torch.stack([z, -z]), torch.stack([w, 0.5 * w])
    close(vmap(f)(zs, ws), torch.stack([f(a, b) for a, b in zip(zs, ws, strict=True)]))
    nested = vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))(zs, ws)
    close(nested, torch.stack([torch.stack([f(a, b) for b in ws]) for a in zs]))


def test_vmap_over_x0_finds_one_fixed_point(options):
    z, w = double(2, 3), contraction(3, 0.6)
    x0 = double(4, 2, 3, seed=3, scale=5.0)

    def f(x0):
        return fixed_point(linear, x0, z, params=(w,), **options).x

    close(vmap(f)(x0), linear_solution(z, w).expand(4, 2, 3))


def test_vmap_keeps_samples_of_every_slice_to_their_own_end(backend):
    """One slice is easy, one hard: their counts differ and stand in the record."""
    w = torch.stack([contraction(3, 0.1), contraction(3, 0.9)])
    z, seen = double(2, 3), []

    def f(w):
        sol = fixed_point(
            linear, torch.zeros_like(z), z, params=(w,), solver=Picard(), backend=backend
        )
        seen.append(sol.iterations)
        return sol.x

    vmap(f)(w)
    (iterations,) = seen
    assert iterations.shape == (2, 2)
    assert iterations[0].max() < iterations[1].min()


def test_vmap_of_grad_is_the_per_sample_gradient(problem):
    f, z, w = problem
    each = vmap(fgrad(lambda z, w: f(z[None], w).sin().sum(), argnums=1), in_dims=(0, None))(z, w)
    loop = torch.stack([fgrad(lambda w, t=t: f(t[None], w).sin().sum())(w) for t in z])
    close(each, loop)
    close(each.sum(0), fgrad(lambda w: f(z, w).sin().sum())(w))


def test_grad_of_vmap_equals_grad_of_a_loop(problem):
    f, z, w = problem
    ws = torch.stack([w, 0.5 * w])
    mine = fgrad(lambda ws: vmap(lambda w: f(z, w))(ws).sin().sum())(ws)
    close(mine, fgrad(lambda ws: torch.stack([f(z, w) for w in ws]).sin().sum())(ws))


def test_second_derivative_under_vmap_equals_a_loop(problem):
    f, z, w = problem

    def curvature(w):
        return fgrad(lambda t: fgrad(lambda w: f(z, w).sin().sum())(t).square().sum())(w)

    ws = torch.stack([w, 0.5 * w])
    close(vmap(curvature)(ws), torch.stack([curvature(w) for w in ws]))


def test_vectorized_jacobian_and_batched_grads_equal_the_plain_ones(problem):
    f, z, w = problem
    jacobian = torch.autograd.functional.jacobian
    plain = jacobian(f, (z, w))
    for mine, true in zip(jacobian(f, (z, w), vectorize=True), plain, strict=True):
        close(mine, true)
    z = z.clone().requires_grad_()
    x = f(z, w)
    basis = torch.eye(6, dtype=z.dtype).reshape(6, 2, 3)
    (rows,) = grad(x, z, basis, is_grads_batched=True)
    close(rows.reshape(2, 3, 2, 3), plain[0])


def test_functional_call_puts_other_parameters_in(options):
    layer, other = form("NN", options), form("NN", options)
    other.g.net = Net(seed=1)
    z = double(2, 2)
    params = {k: v.detach() for k, v in other.named_parameters()}

    def loss(params):
        return functional_call(layer, params, (z,)).sin().sum()

    mine = fgrad(loss)(params)
    true = dict(zip(params, grad(other(z).sin().sum(), list(other.parameters())), strict=True))
    for name, value in mine.items():
        close(value, true[name])


def test_vmap_over_an_ensemble_of_modules_equals_a_loop(options):
    layers = [form("NN", options) for _ in range(2)]
    layers[1].g.net = Net(seed=1)
    params, buffers = torch.func.stack_module_state(layers)
    z = double(2, 2)
    mine = vmap(lambda p, b: functional_call(layers[0], (p, b), (z,)))(params, buffers)
    close(mine, torch.stack([layer(z) for layer in layers]))


# --- what can't be right raises --------------------------------------------------------------


def test_captured_tensor_has_a_right_first_derivative(options):
    w, z = contraction(3, 0.6).requires_grad_(), double(2, 3).requires_grad_()
    captured = fixed_point(
        lambda x, z: torch.tanh(x @ w.mT + z), torch.zeros_like(z), z, **options
    ).x
    passed = fixed_point(
        lambda x, z, w: torch.tanh(x @ w.mT + z), torch.zeros_like(z), z, params=(w,), **options
    ).x
    for mine, true in zip(
        grad(captured.sin().sum(), (w, z)), grad(passed.sin().sum(), (w, z)), strict=True
    ):
        close(mine, true)


def test_captured_tensor_that_depends_on_others_has_a_right_first_derivative(options):
    w, z = contraction(3, 0.6).requires_grad_(), double(2, 3).requires_grad_()

    def solve(w, z):
        half = w * 0.5  # not a leaf
        return fixed_point(lambda x: torch.tanh(x @ half.mT + z), x0, per_sample=False, **options)

    x0 = torch.zeros(2, 3, dtype=torch.float64)
    mine = grad(solve(w, z).x.sin().sum(), (w, z))
    true = grad(
        unroll(lambda x: torch.tanh(x @ (w * 0.5).mT + z), x0, steps=100).sin().sum(), (w, z)
    )
    for a, b in zip(mine, true, strict=True):
        close(a, b)


def test_second_derivative_with_a_captured_tensor_raises_the_advice(options):
    w, z = contraction(3, 0.6).requires_grad_(), double(2, 3).requires_grad_()
    x = fixed_point(lambda x, z: torch.tanh(x @ w.mT + z), torch.zeros_like(z), z, **options).x
    with pytest.raises(RuntimeError, match=r"captures.*pass it in `inputs`.*or `params`"):
        grad(x.sum(), z, create_graph=True)


def test_captured_tensor_under_func_grad_raises_the_advice(options):
    z = double(2, 3)

    def f(w):
        return fixed_point(
            lambda x, z: torch.tanh(x @ w.mT + z), torch.zeros_like(z), z, **options
        ).x

    with pytest.raises(RuntimeError, match="captures"):
        fgrad(lambda w: f(w).sum())(contraction(3, 0.6))
