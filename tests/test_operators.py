"""P and H: partial derivatives on an independent graph, differentiable to any order."""

import pytest
import torch
from helpers import Counter
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import grad as fgrad
from torch.func import jacrev, vmap

from fpi_cuda.operators import inner_product, partial

pytestmark = pytest.mark.usefixtures("one_thread")


def double(*shape, **kwargs):
    return torch.randn(*shape, dtype=torch.float64, **kwargs)


def energy(x, y, t):
    return (torch.sin(x * y) * t + x**2 * y.mean()).sum()


def test_partial_takes_each_argument_as_independent():
    t = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x = t**2  # x and θ depend on each other outside
    (dx,) = partial(lambda x, t: x * t + t**3, x, t, which=(0,))
    assert dx.item() == 1.5
    (dt,) = partial(lambda x, t: x * t + t**3, x, t, which=(1,))
    assert dt.item() == pytest.approx(1.5**2 + 3 * 1.5**2)
    # ...while the result is attached: d/dt of (x + 3t²) with x = t² is 2t + 6t.
    (total,) = grad(dt, t)
    assert total.item() == pytest.approx(8 * 1.5)


def test_partial_equals_torch_funcs_grad():
    s = double(2, 3), double(2, 3), double(2, 1)
    for mine, true in zip(partial(energy, *s), fgrad(energy, argnums=(0, 1, 2))(*s), strict=True):
        torch.testing.assert_close(mine, true)
    (only,) = partial(energy, *s, which=(1,))
    torch.testing.assert_close(only, fgrad(energy, argnums=1)(*s))
    back = partial(energy, *s, which=(2, 0))
    torch.testing.assert_close(back[0], fgrad(energy, argnums=2)(*s))


def test_partial_passes_gradcheck_to_third_order():
    s = tuple(double(1, 2).requires_grad_() for _ in range(3))

    def p(*s):
        return partial(energy, *s)

    assert gradcheck(p, s)
    assert gradgradcheck(p, s)

    def derivative_of_p(*s):
        return grad(sum(t.sin().sum() for t in p(*s)), s, create_graph=True)

    assert gradgradcheck(derivative_of_p, s, fast_mode=True)


def test_partial_of_dependent_arguments_has_right_second_and_third_derivatives():
    """P inside a chain x(θ): against the same formula written by hand."""
    t = double(3).requires_grad_()

    def chain(p):
        x = torch.sin(t) * t
        total = (p(x, t) ** 2).sum()
        (first,) = grad(total, t, create_graph=True)
        (second,) = grad(first.sin().sum(), t, create_graph=True)
        return first, second, grad(second.sum(), t)[0]

    mine = chain(lambda x, t: partial(lambda x, t: (x**3 * t).sum(), x, t, which=(0,))[0])
    true = chain(lambda x, t: 3 * x**2 * t)
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_r_is_called_once_for_the_first_second_and_third_derivatives():
    r = Counter(energy)
    s = tuple(double(2, 3).requires_grad_() for _ in range(3))
    first = partial(r, *s)
    assert r.calls == 1
    second = grad(sum(t.sin().sum() for t in first), s, create_graph=True)
    third = grad(sum(t.sin().sum() for t in second), s, create_graph=True)
    grad(sum(t.sum() for t in third), s)
    assert r.calls == 1


def test_partial_can_be_differentiated_twice_over_one_graph():
    r = Counter(energy)
    s = tuple(double(2, 3).requires_grad_() for _ in range(3))
    p = partial(r, *s)
    one = grad(p[0].sum(), s[1], retain_graph=True)[0]
    two = grad(p[0].sum(), s[1], retain_graph=True)[0]
    assert torch.equal(one, two)
    assert r.calls == 1


def test_backward_of_partial_is_partial_of_the_inner_product():
    """The paper's rule: gradients δ at P(s; r) give P(δ ∪ s; H(δ; ρ)), ρ(s) = P(s; r)."""
    s = tuple(double(2, 3).requires_grad_() for _ in range(3))
    delta = tuple(double(2, 3) for _ in range(3))
    mine = grad(partial(energy, *s), s, delta)
    eta = inner_product(delta, fgrad(energy, argnums=(0, 1, 2)))
    by_rule = partial(eta, *(t.detach() for t in s))
    for a, b in zip(mine, by_rule, strict=True):
        torch.testing.assert_close(a, b)


def test_partial_of_partial_composes():
    x = double(4).requires_grad_()

    def slope(x):
        return partial(lambda x: (x**4).sum(), x)[0].sum()

    (second,) = partial(slope, x)
    torch.testing.assert_close(second, 12 * x**2)
    (third,) = grad(second.sum(), x)
    torch.testing.assert_close(third, 24 * x)


def test_inner_product_is_the_sum_of_products():
    v = double(2), double(3, 1)
    u = inner_product(v, lambda a, b: (a * b, torch.stack([a.sum(), b, b])[:, None]))
    a, b = double(2), torch.tensor(2.0, dtype=torch.float64)
    expected = (v[0] * a * b).sum() + v[1][0, 0] * a.sum() + (v[1][1:] * b).sum()
    torch.testing.assert_close(u(a, b), expected)
    with pytest.raises(ValueError, match=r"must return 2 tensors, as many as v \(got 1\)"):
        inner_product(v, lambda a: (a,))(a)


def test_a_modules_parameters_are_further_arguments():
    net = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.Tanh())

    class Total(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).square().sum()

    x = double(2, 3).requires_grad_()
    tensors = (x, *net.parameters())

    def second(slope):
        return grad(slope.sin().sum(), tensors)

    mine = second(partial(Total(), x)[0])
    true = second(grad(Total()(x), x, create_graph=True)[0])
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b)


def test_arguments_that_r_ignores_get_zeros_at_every_order():
    x, y = double(2).requires_grad_(), double(3).requires_grad_()
    dx, dy = partial(lambda x, y: (x**2).sum(), x, y)
    assert torch.equal(dy, torch.zeros_like(y))
    torch.testing.assert_close(dx, 2 * x)
    gradients = grad(dx.sum() + dy.sum(), (x, y), allow_unused=True)
    torch.testing.assert_close(gradients[0], torch.full((2,), 2.0, dtype=torch.float64))
    assert gradients[1] is None or not gradients[1].any()


def test_constant_and_linear_r_have_zero_further_derivatives():
    x = double(2).requires_grad_()
    (zero,) = partial(lambda x: torch.tensor(1.0, dtype=torch.float64), x)
    assert torch.equal(zero, torch.zeros_like(x))
    (constant,) = partial(lambda x: x.sum(), x)
    assert torch.equal(constant, torch.ones_like(x))
    (second,) = grad(constant.sum(), x, allow_unused=True)
    assert second is None or not second.any()


def test_integer_arguments_ride_along():
    x, index = double(4).requires_grad_(), torch.tensor([0, 2])
    (dx,) = partial(lambda x, i: (x[i] ** 3).sum(), x, index)
    (second,) = grad(dx.sum(), x)
    expected = torch.zeros_like(x)
    expected[index] = 6 * x.detach()[index]
    torch.testing.assert_close(second, expected)


def test_without_grad_mode_the_value_is_the_same_and_no_graph_is_left():
    s = tuple(double(2, 3).requires_grad_() for _ in range(3))
    with torch.no_grad():
        values = partial(energy, *s)
    for a, b in zip(values, partial(energy, *s), strict=True):
        assert not a.requires_grad
        assert torch.equal(a, b)


def test_partial_under_torch_func_equals_autograd():
    x, y, t = double(2, 3), double(2, 3), double(2, 1)

    def loss(x):
        return partial(energy, x, y, t, which=(0,))[0].sin().sum()

    def plain(x):
        return fgrad(energy)(x, y, t).sin().sum()

    torch.testing.assert_close(fgrad(loss)(x), fgrad(plain)(x))
    torch.testing.assert_close(jacrev(jacrev(loss))(x), jacrev(jacrev(plain))(x))
    xs = double(4, 2, 3)
    torch.testing.assert_close(vmap(loss)(xs), vmap(plain)(xs))
    torch.testing.assert_close(vmap(fgrad(loss))(xs), vmap(fgrad(plain))(xs))
    both = vmap(lambda x, y: partial(energy, x, y, t), in_dims=(0, None))(xs, y)
    for k, value in enumerate(both):
        expected = torch.stack([partial(energy, x, y, t)[k] for x in xs])
        torch.testing.assert_close(value, expected)


def test_batched_grads_of_partial_equal_a_loop():
    s = tuple(double(2).requires_grad_() for _ in range(3))
    (p,) = partial(energy, *s, which=(0,))
    rows = grad(p, s, torch.eye(2, dtype=torch.float64), is_grads_batched=True, retain_graph=True)
    for i in range(2):
        one = grad(p, s, torch.eye(2, dtype=torch.float64)[i], retain_graph=True)
        for a, b in zip(rows, one, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (lambda x: x, r"must return a scalar tensor \(got \(2, 3\)\); sum it"),
        (lambda x: 1.0, r"must return a scalar tensor \(got float\)"),
        (lambda x: None, r"must return a scalar tensor \(got NoneType\)"),
    ],
)
def test_r_must_return_a_scalar(r, message):
    with pytest.raises(ValueError, match=message):
        partial(r, double(2, 3))
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        partial(r, double(2, 3))


def test_r_that_captures_a_tensor_that_needs_gradients_raises():
    w = double(2, 3).requires_grad_()
    with pytest.raises(ValueError, match=r"captures.*pass it in s, or make r an nn.Module"):
        partial(lambda x: (w * x).sum(), double(2, 3))


def test_arguments_must_be_tensors():
    with pytest.raises(TypeError, match=r"s\[1\] must be a tensor \(got float\)"):
        partial(energy, double(2), 1.0, double(2))
