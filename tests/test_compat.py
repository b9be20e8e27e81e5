"""The old layer's interface: every behaviour that is kept."""

import copy
from functools import partial as bind
from itertools import pairwise

import pytest
import torch
from helpers import Counter, Energy, Net, contraction, unroll
from helpers_compat import (
    TIGHT,
    Descent,
    double,
    m_anderson_fixture,  # noqa: F401
    zeros,
)
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

from fpi_cuda.compat import FixedPointIteration, default_term_cond, fixed_point_iteration, partial

pytestmark = pytest.mark.usefixtures("one_thread")


def all_tight(count, x, x_prev):
    """As TIGHT, but every tensor of the tuple counts."""
    return any(TIGHT(count, (a,), (b,)) for a, b in zip(x, x_prev, strict=True))


class Pair(nn.Module):
    """g over tuples of two, the second of another shape."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, y):
        u, s = x
        return self.net(u, y[0]), 0.5 * torch.tanh(s) + u.mean()

    def unrolled(self, y, x0, steps=120):
        x = x0
        for _ in range(steps):
            x = self(x, y)
        return x


# --- signatures and semantics that are kept --------------------------------------------------


def test_a_state_may_be_one_number(m_anderson):
    y = (torch.tensor(0.3, dtype=torch.float64, requires_grad=True),)
    (x,) = fixed_point_iteration(
        y, (zeros(()),), lambda x, y: (torch.cos(0.5 * x[0]) + y[0],), TIGHT, TIGHT, m_anderson
    )
    assert x.shape == ()
    torch.testing.assert_close(x, torch.cos(0.5 * x) + y[0], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(grad(x, y[0])[0], 1 / (1 + 0.5 * torch.sin(0.5 * x)))


def test_state_input_and_result_are_tuples_of_any_shapes(m_anderson):
    g, y, x0 = Pair(), (double(2, 2),), (zeros(2, 3), zeros(()))
    x = fixed_point_iteration(y, x0, g, all_tight, all_tight, m_anderson)
    assert isinstance(x, tuple)
    assert [t.shape for t in x] == [(2, 3), ()]
    for mine, true in zip(x, g.unrolled(y, x0), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-11)


def test_derivatives_of_every_order_are_those_of_the_unrolled_loop(m_anderson):
    g, y, x0 = Pair(), (double(2, 2).requires_grad_(),), (zeros(2, 3), zeros(1))
    tensors = (*y, *g.parameters())

    def derivatives(x):
        loss = sum(t.sin().sum() for t in x)
        first = grad(loss, tensors, create_graph=True)
        second = grad(sum(t.square().sum() for t in first), tensors, create_graph=True)
        return first, second, grad(sum(t.square().sum() for t in second), tensors)

    layer = FixedPointIteration(g, all_tight, all_tight, m_anderson)
    for mine, true in zip(derivatives(layer(y, x0)), derivatives(g.unrolled(y, x0)), strict=True):
        for a, b in zip(mine, true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_gradcheck_and_gradgradcheck_of_the_layer(m_anderson):
    g, y, x0 = Pair(), double(1, 2).requires_grad_(), (zeros(1, 3), zeros(1))
    layer = FixedPointIteration(g, all_tight, all_tight, m_anderson)
    assert gradcheck(lambda y, *_: layer((y,), x0), (y, *g.parameters()))
    assert gradgradcheck(lambda y, *_: layer((y,), x0), (y, *g.parameters()), fast_mode=True)


def test_fpi_gd_by_compats_partial_has_right_second_derivatives():
    """The old layer's FPI_GD: g = x - γ P(f) inside a module."""
    g, y = Descent(), double(2, 2).requires_grad_()
    tensors = (y, *g.parameters())
    (x,) = FixedPointIteration(g, TIGHT, TIGHT)((y,), (zeros(2, 3),))

    def descend(x, y):
        return x - 0.4 * grad(g.energy(x, y).sum(), x, create_graph=True)[0]

    true = unroll(descend, zeros(2, 3).requires_grad_(), y, steps=70)

    def second(x):
        first = grad(x.sin().sum(), tensors, create_graph=True)
        return grad(sum(t.square().sum() for t in first), tensors)

    for a, b in zip(second(x), second(true), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_x0_gets_no_gradient(m_anderson):
    y, x0 = double(2, 3).requires_grad_(), double(2, 3).requires_grad_()
    (x,) = fixed_point_iteration(
        (y,), (x0,), lambda x, y: (0.5 * torch.tanh(x[0]) + y[0],), TIGHT, TIGHT, m_anderson
    )
    assert grad(x.sum(), (y, x0), allow_unused=True)[1] is None


def test_conditions_are_asked_with_count_state_and_state_before(m_anderson):
    """cond(count, x, x_prev), true = keep going, first with 1 after two evaluations of g."""
    asked = []

    def cond(count, x, x_prev):
        asked.append((count, x, x_prev))
        return count < 6

    g = Counter(lambda x, y: (0.5 * x[0] + y[0],))
    (x,) = fixed_point_iteration(
        (torch.ones(2, 1),), (torch.zeros(2, 1),), g, cond, cond, m_anderson
    )
    assert [count for count, _, _ in asked] == [1, 2, 3, 4, 5, 6]
    assert g.calls == 7
    for (_, new, _), (_, _, old) in pairwise(asked):
        assert isinstance(new, tuple)
        assert torch.equal(new[0], old[0])
    assert torch.equal(asked[-1][1][0], x)
    if not m_anderson:
        assert torch.equal(asked[0][1][0], torch.full((2, 1), 1.5))
        assert torch.equal(asked[0][2][0], torch.ones(2, 1))


def test_g_is_evaluated_at_least_twice():
    g = Counter(lambda x, y: (0.5 * x[0],))
    fixed_point_iteration((), (torch.ones(2, 1),), g, lambda *_: False, lambda *_: False)
    assert g.calls == 2


def test_the_backward_iteration_obeys_backward_cond_and_its_own_derivative_swaps_them():
    counts = {"forward": [], "backward": []}

    def cond(name, limit):
        def keep_going(count, x, x_prev):
            counts[name].append(count)
            return count < limit

        return keep_going

    y = double(2, 3).requires_grad_()
    (x,) = fixed_point_iteration(
        (y,),
        (zeros(2, 3),),
        lambda x, y: (torch.tanh(0.5 * x[0] + y[0]),),
        cond("forward", 40),
        cond("backward", 30),
    )
    assert (max(counts["forward"]), counts["backward"]) == (40, [])
    counts["forward"].clear()
    (first,) = grad(x.sum(), y, create_graph=True)
    assert (counts["forward"], max(counts["backward"])) == ([], 30)
    counts["backward"].clear()
    grad(first.sum(), y)
    # Backward of the adjoint: its own adjoint goes by forward_cond; x itself by backward_cond.
    assert max(counts["forward"]) == 40
    assert max(counts["backward"]) == 30


def test_first_order_backward_evaluates_g_once():
    g = Counter(lambda x, y: (torch.tanh(0.5 * x[0] + y[0]),))
    y = double(2, 3).requires_grad_()
    (x,) = fixed_point_iteration((y,), (zeros(2, 3),), g)
    before = g.calls
    x.sum().backward()
    assert g.calls == before + 1


def test_threshold_is_on_the_squared_norm_over_the_batch_of_the_first_tensor():
    x, px = torch.tensor([[3.0], [0.0]]), torch.tensor([[3.0], [0.1]])
    wild = (torch.tensor(1e9), torch.tensor(-1e9))  # later tensors do not count
    squared = float((x - px).square().sum())
    relative = squared / 9.01  # by the state before

    def keep_going(threshold, **options):
        return default_term_cond(5, (x, wild[0]), (px, wild[1]), threshold=threshold, **options)

    assert keep_going(0.99 * squared, normalized=False)
    assert not keep_going(1.01 * squared, normalized=False)
    assert keep_going(0.99 * relative)
    assert not keep_going(1.01 * relative)


def test_default_threshold_allows_a_relative_change_of_1e_minus_5():
    x = torch.ones(4, dtype=torch.float64)
    assert default_term_cond(5, (x,), (x * (1 + 1.01e-5),))
    assert not default_term_cond(5, (x,), (x * (1 + 0.99e-5),))


def test_a_zero_maximum_is_no_limit():
    g = Counter(lambda x, y: (0.999 * x[0] + 1,))
    (x,) = fixed_point_iteration(
        (), (zeros(1),), g, bind(default_term_cond, threshold=1e-13, maxIter=0)
    )
    assert g.calls > 3000
    assert x.item() == pytest.approx(1000, rel=1e-2)


def test_samples_are_coupled_as_they_were():
    """One stop decision for the batch: an easy sample is iterated as long as a hard one."""
    s = torch.tensor([[0.1], [0.95]], dtype=torch.float64)
    seen = Counter(lambda x, y: (y[0] * x[0] + 1,))

    def count(rows):
        seen.calls = 0
        fixed_point_iteration((s[rows],), (zeros(len(rows), 1),), seen)
        return seen.calls

    assert count([0, 1]) > 5 * count([0])


def test_checkpoints_keep_the_g_prefix_and_load(tmp_path):
    old, new = (FixedPointIteration(Net(seed=seed)) for seed in (1, 2))
    assert set(old.state_dict()) == {f"g.{key}" for key in Net().state_dict()}
    torch.save(old.state_dict(), tmp_path / "old.pt")
    assert str(new.load_state_dict(torch.load(tmp_path / "old.pt"))).startswith("<All keys matched")
    assert torch.equal(new.g.a.weight, old.g.a.weight)
    assert list(new.buffers()) == []


def test_layer_deepcopies_with_its_options():
    layer = FixedPointIteration(Pair(), TIGHT, TIGHT, 3, 1e-9)
    twin = copy.deepcopy(layer)
    y, x0 = (double(2, 2),), (zeros(2, 3), zeros(1))
    for a, b in zip(twin(y, x0), layer(y, x0), strict=True):
        assert torch.equal(a, b)
    assert (twin.m_anderson, twin.eps) == (3, 1e-9)


def test_param_names_tensors_that_a_plain_function_captures(m_anderson):
    """Derivatives of every order reach them, without g taking them as arguments."""
    w = contraction(3, 0.6).requires_grad_()
    half = w * 0.5  # no leaf: found by identity all the same
    y = double(2, 3).requires_grad_()

    def g(x, y):
        return (torch.tanh(torch.nn.functional.linear(x[0], half) + x[0] @ half + y[0]),)

    (x,) = fixed_point_iteration((y,), (zeros(2, 3),), g, TIGHT, TIGHT, m_anderson, param=(half,))
    true = unroll(lambda x: g((x,), (y,))[0], zeros(2, 3), steps=150)

    def second(x):
        first = grad(x.sin().sum(), (w, y), create_graph=True)
        return grad(sum(t.square().sum() for t in first), (w, y), retain_graph=True)

    for a, b in zip(second(x), second(true), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_integer_input_rides_along():
    index = torch.tensor([1, 0])
    y = double(2, 3).requires_grad_()
    (x,) = fixed_point_iteration(
        (y, index),
        (zeros(2, 3),),
        lambda x, y: (0.5 * torch.tanh(x[0]) + y[0][y[1]],),
        TIGHT,
        TIGHT,
    )
    true = unroll(lambda x: 0.5 * torch.tanh(x) + y[index], zeros(2, 3), steps=80)
    torch.testing.assert_close(grad(x.sin().sum(), y)[0], grad(true.sin().sum(), y)[0])


def test_torch_func_transforms_work():
    w = contraction(3, 0.6)

    def f(y):
        return fixed_point_iteration(
            (y, w), (zeros(2, 3),), lambda x, y: (torch.tanh(x[0] @ y[1].mT + y[0]),), TIGHT, TIGHT
        )[0]

    y = double(2, 3)
    jacobian = torch.autograd.functional.jacobian(f, y)
    torch.testing.assert_close(torch.func.jacrev(f)(y), jacobian, rtol=1e-9, atol=1e-10)
    ys = double(3, 2, 3)
    torch.testing.assert_close(
        torch.func.vmap(f)(ys), torch.stack([f(y) for y in ys]), rtol=1e-9, atol=1e-10
    )


# --- partial ---------------------------------------------------------------------------------


def test_partial_takes_x_y_and_param_as_independent():
    t = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (slope,) = partial(lambda x, y: x[0] * y[0] * t + x[0] ** 2 * t, (t**2,), (t,), (t,))
    assert slope.item() == pytest.approx(1.5 * 1.5 + 2 * 1.5**3)
    (total,) = grad(slope, t)  # d/dt (t² + 2t³)
    assert total.item() == pytest.approx(2 * 1.5 + 6 * 1.5**2)


def test_partial_of_a_module_finds_its_parameters():
    class Total(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = Energy()

        def forward(self, x, y):
            return self.energy(x[0], y[0]).sum()

    fun, x, y = Total(), double(2, 3).requires_grad_(), double(2, 2).requires_grad_()
    tensors = (x, y, *fun.parameters())
    true = grad(fun((x,), (y,)), x, create_graph=True)[0]
    for param in ((), tuple(fun.parameters())):
        (mine,) = partial(fun, (x,), (y,), param)
        torch.testing.assert_close(mine, true)
        for a, b in zip(
            grad(mine.sin().sum(), tensors),
            grad(true.sin().sum(), tensors, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_partial_returns_one_tensor_for_each_of_x():
    x, y = (double(2), double(3, 1)), (double(2),)
    a, b = partial(lambda x, y: (x[0] * y[0]).sum() + (x[1] ** 2).sum(), x, y)
    torch.testing.assert_close(a, y[0])
    torch.testing.assert_close(b, 2 * x[1])
