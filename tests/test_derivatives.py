"""Derivatives of every order: closed forms, finite differences, deep unrolling."""

import pytest
import torch
from helpers import assert_close, contraction, linear, linear_solution, unroll
from helpers_derivatives import (
    double,
    form,
    options_fixture,  # noqa: F401
    scalar_g,
    tight,
)
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import grad as fgrad
from torch.func import jacrev, vjp

from fpi_cuda import Picard, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")

# x = tanh(0.6 x + a) at a = 0.7: x', x'', x''' by implicit differentiation.
D1, D2, D3 = 0.373167250, -0.932071591, 2.762671450


# --- closed forms ----------------------------------------------------------------------------


def test_linear_map_has_the_closed_forms_value_and_first_and_second_derivatives(options):
    a, z = contraction(3, 0.7), double(2, 3)

    def solved(z, a):
        return fixed_point(linear, torch.zeros_like(z), z, params=(a,), **options).x

    def loss(solution):
        return lambda z, a: solution(z, a).sin().sum()

    assert_close(solved(z, a), linear_solution(z, a))
    inputs = (z, a)
    for mine, true in zip(
        torch.autograd.functional.jacobian(solved, inputs),
        torch.autograd.functional.jacobian(linear_solution, inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-11)
    mine = torch.autograd.functional.hessian(loss(solved), inputs)
    true = torch.autograd.functional.hessian(loss(linear_solution), inputs)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(mine[i][j], true[i][j], rtol=1e-10, atol=1e-10)


def test_gradient_is_the_dense_adjoint_solve(options):
    w, z, v = (
        contraction(4, 0.8).requires_grad_(),
        double(2, 4).requires_grad_(),
        double(2, 4, seed=1),
    )

    def g(x, z, w):
        return torch.tanh(x @ w.mT + z)

    x = fixed_point(g, torch.zeros_like(z), z, params=(w,), **options).x
    dz, dw = grad(x, (z, w), v)
    with torch.no_grad():
        slope = 1 - x**2  # tanh' at the fixed point
        for i in range(2):
            jacobian = slope[i, :, None] * w
            c = torch.linalg.solve((torch.eye(4, dtype=torch.float64) - jacobian).mT, v[i])
            torch.testing.assert_close(dz[i], slope[i] * c, rtol=1e-10, atol=1e-11)
        c = torch.stack(
            [
                torch.linalg.solve(torch.eye(4, dtype=torch.float64) - (s[:, None] * w).mT, r)
                for s, r in zip(slope, v, strict=True)
            ]
        )
        torch.testing.assert_close(dw, (slope * c).mT @ x, rtol=1e-10, atol=1e-11)


def test_scalar_map_has_three_right_derivatives_by_autograd(options):
    a = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    x = fixed_point(scalar_g, torch.zeros_like(a), a, **options).x
    (d1,) = grad(x.sum(), a, create_graph=True)
    (d2,) = grad(d1.sum(), a, create_graph=True)
    (d3,) = grad(d2.sum(), a)
    found = torch.cat([d1, d2, d3]).flatten()
    expected = torch.tensor([D1, D2, D3], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-8)


def test_scalar_map_has_three_right_derivatives_by_nested_func_grad(options):
    def f(a):
        return fixed_point(
            scalar_g, torch.zeros(1, 1, dtype=a.dtype), a[None, None], **options
        ).x.sum()

    a = torch.tensor(0.7, dtype=torch.float64)
    found = torch.stack([fgrad(f)(a), fgrad(fgrad(f))(a), fgrad(fgrad(fgrad(f)))(a)])
    expected = torch.tensor([D1, D2, D3], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_scalar_map_has_two_right_derivatives_by_jacrev_and_vjp(options):
    def f(a):
        return fixed_point(
            scalar_g, torch.zeros(1, 1, dtype=a.dtype), a[None, None], **options
        ).x.sum()

    a = torch.tensor(0.7, dtype=torch.float64)
    _, pull = vjp(f, a)
    ones = torch.ones((), dtype=torch.float64)
    found = torch.stack([jacrev(f)(a), pull(ones)[0], jacrev(jacrev(f))(a), jacrev(fgrad(f))(a)])
    expected = torch.tensor([D1, D1, D2, D2], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_third_jacrev_of_scalar_map_is_right(backend):
    def f(a):
        x0 = torch.zeros(1, 1, dtype=a.dtype)
        return fixed_point(scalar_g, x0, a[None, None], **tight(backend, Picard())).x.sum()

    found = jacrev(jacrev(jacrev(f)))(torch.tensor(0.7, dtype=torch.float64))
    assert abs(found.item() - D3) < 1e-8


# --- finite differences ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NN", "GD"])
def test_first_derivatives_pass_gradcheck(name, options):
    layer = form(name, options)
    z = double(2, 2).requires_grad_()
    # Random projections of the Jacobians on the slow oracle, the full ones elsewhere.
    fast = options["backend"] == "reference"
    assert gradcheck(lambda z, *_: layer(z), (z, *layer.parameters()), fast_mode=fast)
    assert layer.last.converged.all()


@pytest.mark.parametrize("name", ["NN", "GD"])
def test_second_derivatives_pass_gradgradcheck(name, options):
    layer = form(name, options)
    z = double(2, 2).requires_grad_()
    fast = options["backend"] == "reference" or name == "GD"
    assert gradgradcheck(lambda z, *_: layer(z), (z, *layer.parameters()), fast_mode=fast)


@pytest.mark.parametrize("name", ["NN", "GD"])
def test_third_derivatives_pass_gradgradcheck_of_the_first(name, options):
    layer = form(name, options)
    z = double(1, 2).requires_grad_()
    weight = next(layer.parameters())

    def first(z, _):
        return grad(layer(z).sin().sum(), (z, weight), create_graph=True)

    assert gradgradcheck(first, (z, weight), fast_mode=True)


@pytest.mark.parametrize("name", ["NN", "GD"])
def test_second_derivatives_equal_those_of_deep_unrolling(name, options):
    layer = form(name, options)
    z = double(2, 2).requires_grad_()
    tensors = (z, *layer.parameters())

    def second(x):
        first = grad(x.sin().sum(), tensors, create_graph=True)
        total = sum((t * double(*t.shape, seed=i)).sum() for i, t in enumerate(first))
        return grad(total, tensors)

    mine = second(layer(z))
    if name == "NN":
        true = second(unroll(layer.g, torch.zeros(2, 3, dtype=z.dtype), z, steps=150))
    else:
        energy = layer.g.energy

        def descend(x, z):  # no P here: the gradient as plain autograd takes it
            return x - 0.4 * grad(energy(x, z).sum(), x, create_graph=True)[0]

        x0 = torch.zeros(2, 3, dtype=z.dtype, requires_grad=True)
        true = second(unroll(descend, x0, z, steps=60))
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_state_tuple_passes_gradcheck_and_gradgradcheck(options):
    z, w = double(2, 2).requires_grad_(), contraction(5, 0.5).requires_grad_()

    def g(x, z, w):
        u, y = x
        joint = torch.tanh(torch.cat([u, y.flatten(1)], 1) @ w.mT)
        return joint[:, :3] + z.sum(1, keepdim=True), joint[:, 3:].reshape(-1, 2, 1) * z[..., None]

    x0 = (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 2, 1, dtype=torch.float64))

    def f(z, w):
        return fixed_point(g, x0, z, params=(w,), **options).x

    assert [t.shape for t in f(z, w)] == [(2, 3), (2, 2, 1)]
    assert gradcheck(f, (z, w), fast_mode=True)
    assert gradgradcheck(f, (z, w), fast_mode=True)
