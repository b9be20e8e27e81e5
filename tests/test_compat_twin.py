"""compat beside the old layer: counts, the change, windows, by hand or by a loop written here."""

import math
from functools import partial as bind

import pytest
import torch
from helpers import Counter
from helpers_compat import double, zeros
from torch.autograd import grad

from fpi_cuda import FixedPointWarning
from fpi_cuda.compat import default_term_cond, fixed_point_iteration

pytestmark = pytest.mark.usefixtures("one_thread")


def loop(f, x, threshold, limit):
    """The old loop: the first comparison has the count 1, after the second evaluation of f."""
    old, x, count = x, f(x), 0
    while True:
        old, x, count = x, f(x), count + 1
        change = ((x - old) ** 2).sum() / ((old**2).sum() + 1e-30)
        if count >= limit or not change > threshold:
            return x, count + 1


def loops(g, y, x, threshold, limit):
    """x and the gradient of its sum by y, with the evaluations of the two loops."""
    x, forward = loop(lambda x: g(x, y).detach(), x, threshold, limit)

    def adjoint(c):
        leaf = x.clone().requires_grad_()
        return grad(g(leaf, y), leaf, c)[0] + 1

    c, backward = loop(adjoint, torch.ones_like(x), threshold, limit)
    leaf = y.detach().requires_grad_()
    return x, grad(g(x, leaf), leaf, c)[0], forward, backward


def mine(g, y, x, threshold, limit):
    """The same by compat."""
    asked = {"forward": 0, "backward": 0}

    def cond(name, *args):
        asked[name] = args[0]
        return default_term_cond(*args, threshold=threshold, maxIter=limit)

    y, conds = y.detach().requires_grad_(), (bind(cond, "forward"), bind(cond, "backward"))
    (x,) = fixed_point_iteration((y,), (x,), lambda x, y: (g(x[0], y[0]),), *conds)
    return x.detach(), grad(x.sum(), y)[0], asked["forward"] + 1, asked["backward"] + 1


@pytest.mark.parametrize("limit", [*range(1, 9), 4000])
def test_a_two_cycle_ends_at_the_state_that_it_ended_at(limit):
    """From 0, x ← y − x goes y, 0, y, ...; from v, c ← v − c goes 0, v, 0, ...: limit + 1 times."""
    y = torch.tensor([2.0, 3.0])
    x, slope, forward, backward = mine(lambda x, y: y - x, y, torch.zeros(2), 1e-8, limit)
    assert torch.equal(x, y if limit % 2 == 0 else torch.zeros(2))
    assert torch.equal(slope, torch.zeros(2) if limit % 2 == 0 else torch.ones(2))
    assert (forward, backward) == (limit + 1, limit + 1)


@pytest.mark.parametrize("limit", [3, 4, 4000])
@pytest.mark.parametrize("threshold", [1e-4, 1e-10])
@pytest.mark.parametrize("gain", [0.3, -0.9, -4.0])
def test_states_gradients_and_counts_are_those_of_the_old_loop(gain, threshold, limit):
    """With the gain −4 the state ends in a two-cycle, where g is flat and the adjoint converges."""

    def g(x, y):
        return torch.tanh(gain * x + y)

    y, x0 = torch.tensor([0.1, 0.4, -0.2]), torch.tensor([0.5, 0.0, 0.1])
    found, true = (f(g, y, x0, threshold, limit) for f in (mine, loops))
    assert found[2:] == true[2:]
    for a, b in zip(found[:2], true[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def change(new, old, threshold, **options):
    """Whether the squared change is above the threshold."""
    new, old = (torch.as_tensor(t, dtype=torch.float32) for t in (new, old))
    return default_term_cond(5, (new,), (old,), threshold=threshold, **options)


def test_the_change_is_relative_to_the_state_before():
    assert change([3.0], [1.0], 3.99)  # 4 / 1
    assert not change([3.0], [1.0], 4.01)
    assert change([1.0], [0.0], 0.99e30)  # 1 / (0 + 1e-30): so the start at zero never ends it
    assert not change([1.0], [0.0], 1.01e30)
    assert not change([1.0], [0.0], 2.01, epsilon=0.5)
    assert change([1.0], [0.0], 1.99, epsilon=0.5)


@pytest.mark.parametrize(
    ("new", "old", "threshold", "goes_on"),
    [
        (1e-25, 2e-25, 0.0, False),  # 1e-50 is 0 in float32, where the old layer took the square
        (1e-21, 2e-21, 0.0, True),  # 1e-42 is not
        (1.1e20, 1e20, 0.0101, False),  # Inf / Inf was NaN: here 0.01
        (1.1e20, 1e20, 0.0099, True),
        (1e20, 1e20 - 1e15, 1e-9, False),  # 1e30 / Inf was 0: here 1e-10
        (1e20, 1e20 - 1e15, 1e-11, True),
        (math.nan, 1.0, 0.0, False),
        (math.inf, 1.0, 0.0, False),
    ],
)
def test_squares_are_the_states_own_until_they_overflow(new, old, threshold, goes_on):
    assert change([new, 0.0], [old, 0.0], threshold) is goes_on


def test_an_overflow_without_normalisation_is_a_large_change():
    assert change([1.3e20, 0.0], [1e20, 0.0], 8.9e38, normalized=False)
    assert not change([1.3e20, 0.0], [1e20, 0.0], 9.1e38, normalized=False)
    assert change([1.3e20, 0.0], [1e20, 0.0], 0.0089, epsilon=9e40)
    assert not change([1.3e20, 0.0], [1e20, 0.0], 0.0101, epsilon=9e40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_nothing_moves_at_zero(dtype):
    x = (torch.zeros(3, dtype=dtype),)
    assert not default_term_cond(1, x, x, threshold=0.0)
    assert not default_term_cond(1, x, x, threshold=0.0, epsilon=0.0)


def test_display_prints_at_every_so_manieth_count(capsys):
    def printed(display):
        for count in range(1, 8):
            default_term_cond(count, (torch.ones(2),), (torch.zeros(2),), display=display)
        return capsys.readouterr().out.splitlines()

    assert printed(0) == printed(False) == []
    assert len(printed(True)) == 7
    third = printed(3)
    assert [line.split(":")[0] for line in third] == ["iteration 3", "iteration 6"]
    assert third[0].endswith("2.000e+30")


def test_m_anderson_counts_differences():
    """With d of them an affine map of d dimensions is solved: d + 1 iterates determine it."""
    a = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], dtype=torch.float64)
    b = torch.ones(2, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - a, b)

    def error(m, evaluations):
        (x,) = fixed_point_iteration(
            (), (zeros(2),), lambda x, y: (a @ x[0] + b,), lambda k, *_: k < evaluations - 1,
            m_anderson=m, eps=0.0,
        )  # fmt: skip
        return float((x - exact).norm())

    assert error(2, 4) < 1e-9
    assert error(1, 4) > 1e-2
    assert error(0, 4) > 1e-2
    one = fixed_point_iteration(
        (), (zeros(1),), lambda x, y: (0.99 * x[0] + 1,), lambda k, *_: k < 2, m_anderson=1
    )
    assert one[0].item() == pytest.approx(100)  # the secant


@pytest.mark.parametrize("m", [0, 1, 4])
def test_max_iter_is_one_evaluation_less_forward_and_backward(m):
    g, asked = Counter(lambda x, y: (torch.cos(x[0] + y[0]),)), []

    def cond(*args):
        asked.append(args[0])
        return default_term_cond(*args, threshold=0, maxIter=5)

    y = double(3).requires_grad_()
    (x,) = fixed_point_iteration((y,), (double(3),), g, cond, cond, m_anderson=m)
    assert g.calls == 6
    x.sum().backward()
    assert asked == [1, 2, 3, 4, 5] * 2


def test_min_iter_is_a_least_count_and_max_iter_is_the_stronger():
    """A difference: a count not above minIter ended the old loop."""
    far, near = (torch.ones(1),), (torch.zeros(1),)
    assert default_term_cond(10**9, far, near, maxIter=0)
    assert default_term_cond(6, far, near, maxIter=7)
    assert not default_term_cond(7, far, near, maxIter=7)
    assert default_term_cond(7, far, far, minIter=7)
    assert not default_term_cond(8, far, far, minIter=7)
    assert not default_term_cond(3, far, near, minIter=7, maxIter=3)
    g = Counter(lambda x, y: x)
    fixed_point_iteration((), (torch.ones(1),), g, bind(default_term_cond, minIter=4))
    assert g.calls == 6  # the count 5 is the first above it


def test_nan_ends_with_a_warning():
    """A difference: the old loop ended in silence."""
    with pytest.warns(FixedPointWarning, match="NaN or Inf after 1 evaluations"):
        fixed_point_iteration((), (torch.ones(1),), lambda x, y: (x[0] * math.nan,))


@pytest.mark.parametrize("accelerate", [False, True])
def test_the_result_may_be_changed_in_place(accelerate):
    y = torch.randn(4, 3).requires_grad_()

    def solve():
        return fixed_point_iteration(
            (y,), (torch.zeros(4, 3),), lambda x, y: (0.5 * torch.tanh(x[0]) + y[0],),
            accelerate=accelerate,
        )[0]  # fmt: skip

    (true,) = grad(torch.relu(solve()).sum(), y)
    torch.testing.assert_close(grad(solve().relu_().sum(), y)[0], true)
