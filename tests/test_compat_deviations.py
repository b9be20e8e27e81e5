"""The old layer's interface: every documented deviation, and wrong arguments."""

import math
import warnings
from functools import partial as bind

import pytest
import torch
from helpers import Counter, contraction, linear_solution, unroll
from helpers_compat import (
    TIGHT,
    double,
    m_anderson_fixture,  # noqa: F401
    zeros,
)
from torch import nn
from torch.autograd import grad

from fpi_cuda import FixedPointWarning, compat
from fpi_cuda.compat import FixedPointIteration, default_term_cond, fixed_point_iteration, partial

pytestmark = pytest.mark.usefixtures("one_thread")


# --- documented deviations -------------------------------------------------------------------


def test_nan_ends_the_iteration_at_once_with_a_warning_and_shows(m_anderson):
    def g(x, y):
        return (torch.where(torch.tensor(calls.calls >= 4), math.nan, 0.5 * x[0] + y[0]),)

    calls = Counter(g)
    with pytest.warns(FixedPointWarning, match="NaN or Inf after 4 evaluations of g"):
        (x,) = fixed_point_iteration(
            (torch.ones(2),), (torch.zeros(2),), calls, lambda *_: True, m_anderson=m_anderson
        )
    assert calls.calls == 4
    assert x.isnan().all()


def test_divergence_with_no_limit_ends():
    for dtype in (torch.float32, torch.float64):
        with pytest.warns(FixedPointWarning, match="NaN or Inf"):
            (x,) = fixed_point_iteration(
                (), (torch.ones(3, dtype=dtype),), lambda x, y: (9 * x[0] + 1,)
            )
        assert x.isinf().all()


def test_nan_in_the_loss_ends_the_backward_with_a_warning():
    y = torch.ones(2, requires_grad=True)
    (x,) = fixed_point_iteration((y,), (torch.zeros(2),), lambda x, y: (0.5 * x[0] + y[0],))
    with pytest.warns(FixedPointWarning, match="backward"):
        (gradient,) = grad(x, y, torch.tensor([math.nan, 1.0]))
    assert gradient.isnan().any()


def test_anderson_runs_on_current_torch_over_the_whole_batch_and_saves_evaluations():
    a = contraction(6, 0.95)
    a = (a + a.mT) / 2
    z = double(3, 6)

    def solve(m, z, **options):
        g = Counter(lambda x, y: (x[0] @ a.mT + y[0],))
        (x,) = fixed_point_iteration(
            (z,), (torch.zeros_like(z),), g, TIGHT, m_anderson=m, **options
        )
        torch.testing.assert_close(x, linear_solution(z, a), rtol=1e-8, atol=1e-8)
        return g.calls

    plain = solve(0, z)
    assert solve(5, z) < 0.5 * plain
    assert solve(5, z, eps=1e-10) < 0.5 * plain
    # One set of weights for all samples: the batch as a whole needs more than a sample alone.
    assert solve(5, z[:1]) < solve(5, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anderson_works_in_narrow_dtypes_at_the_default_eps(dtype):
    z = torch.randn(4, 5).to(dtype)
    (x,) = fixed_point_iteration(
        (z,),
        (torch.zeros_like(z),),
        lambda x, y: (0.5 * torch.tanh(x[0]) + y[0],),
        bind(default_term_cond, threshold=1e-4, maxIter=50),
        m_anderson=4,
    )
    true = unroll(lambda x: 0.5 * torch.tanh(x) + z.double(), zeros(4, 5), steps=60)
    torch.testing.assert_close(x.double(), true, rtol=3e-2, atol=3e-2)


def test_buffers_move_once_a_call():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x, y):
            return (torch.tanh(0.3 * x[0] + self.norm(y[0])),)

    layer = FixedPointIteration(Normalised())
    layer((torch.randn(4, 3, requires_grad=True),), (torch.zeros(4, 3),))[0].sum().backward()
    assert layer.g.norm.num_batches_tracked == 1


def test_an_unnamed_captured_tensor_gets_first_derivatives_and_raises_at_the_second():
    w, y = contraction(3, 0.6).requires_grad_(), double(2, 3).requires_grad_()

    def g(x, y):
        return (torch.tanh(x[0] @ w.mT + y[0]),)

    def solve():
        return fixed_point_iteration((y,), (zeros(2, 3),), g, TIGHT, TIGHT)[0]

    true = grad(unroll(lambda x: g((x,), (y,))[0], zeros(2, 3), steps=120).sin().sum(), (w, y))
    for a, b in zip(grad(solve().sin().sum(), (w, y)), true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    with pytest.raises(RuntimeError, match="captures"):
        grad(solve().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="captures"):
        torch.func.grad(
            lambda w: fixed_point_iteration(
                (), (zeros(2, 3),), lambda x, y: (torch.tanh(x[0] @ w.mT),)
            )[0].sum()
        )(contraction(3, 0.6))


def test_a_call_that_goes_well_makes_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = torch.randn(2, 3, requires_grad=True)
        fixed_point_iteration((y,), (torch.zeros(2, 3),), lambda x, y: (0.5 * x[0] + y[0],))[
            0
        ].sum().backward()


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: fixed_point_iteration((), torch.zeros(2), g), TypeError, r"write \(x0,\)"),
        (
            lambda g: fixed_point_iteration(torch.zeros(2), (torch.zeros(2),), g),
            TypeError,
            r"\(y,\)",
        ),
        (lambda g: fixed_point_iteration((), (), g), ValueError, "at least one tensor"),
        (
            lambda g: fixed_point_iteration((), (torch.arange(2),), g),
            TypeError,
            r"x0\[0\] must be floating \(got torch.int64\); write x0\[0\].float",
        ),
        (
            lambda g: fixed_point_iteration((), (torch.zeros(2) * 1j,), g),
            TypeError,
            r"real .*\(got torch.complex64\); give g torch.view_as_real\(x0\[0\]\)",
        ),
        (
            lambda g: fixed_point_iteration((), (torch.zeros(2), zeros(2)), g),
            TypeError,
            r"x0\[1\] must be floating, of x0\[0\]'s dtype",
        ),
        (
            lambda g: fixed_point_iteration((), (torch.zeros(2),), lambda x, y: x[0]),
            TypeError,
            r"must return a tuple of 1 tensors like x0 \(got Tensor\)",
        ),
        (
            lambda g: fixed_point_iteration((), (torch.zeros(2),), lambda x, y: (x[0][:1],)),
            ValueError,
            r"x0's shape \(2,\) at 0 \(got \(1,\)\)",
        ),
        (
            lambda g: fixed_point_iteration((), (torch.zeros(2),), lambda x, y: (x[0].double(),)),
            TypeError,
            "dtype",
        ),
        (
            lambda g: fixed_point_iteration((), (torch.zeros(2),), g, maxiter=3),
            TypeError,
            "maxiter",
        ),
        (lambda g: FixedPointIteration(g, m_anderson=-1), ValueError, "m_anderson must be"),
        (lambda g: partial(lambda x, y: x[0], (torch.zeros(2),), ()), ValueError, "scalar"),
    ],
    ids=[
        *(
            "bare x0",
            "bare y",
            "empty",
            "integer",
            "complex",
            "dtypes",
            "bare value",
            "shape",
            "value dtype",
        ),
        *("option", "m_anderson", "scalar"),
    ],
)
def test_wrong_arguments_say_what_must_hold(call, error, message):
    with pytest.raises(error, match=message):
        call(lambda x, y: tuple(0.5 * t for t in x))


def test_docstring_example_holds():
    import doctest

    assert doctest.testmod(compat, extraglobs={"torch": torch}) == (0, 3)


HUGE = [(torch.float32, 3e38), (torch.float64, 1.7e308), (torch.float64, 1e200)]


@pytest.mark.parametrize("m_anderson", [0, 3])
@pytest.mark.parametrize(("dtype", "huge"), HUGE, ids=str)
def test_states_whose_norm_overflows_are_solved(dtype, huge, m_anderson):
    """A constant map, and one that contracts there; the loop ends, with the right state."""
    q = torch.zeros(3, 4, dtype=dtype)
    count = []

    def constant(x, y):
        count.append(1)
        return (torch.full_like(x[0], huge),)

    def contracting(x, y):
        count.append(1)
        return (0.5 * x[0].flip(1) + 0.5 * huge,)

    for g in (constant, contracting):
        count.clear()
        (x,) = fixed_point_iteration((q,), (q,), g, m_anderson=m_anderson)
        torch.testing.assert_close(x / huge, torch.ones_like(q), rtol=1e-4, atol=0)
        assert len(count) < 40


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("dtype", "huge"), HUGE, ids=str)
def test_the_change_of_states_whose_norm_overflows(dtype, huge, normalized):
    x = torch.full((5,), huge, dtype=dtype)

    def goes_on(new, old):
        return default_term_cond(1, (new,), (old,), normalized=normalized)

    assert not goes_on(x, x.clone())
    assert goes_on(-x, x), "where the difference overflows too"
    assert goes_on(x, 0 * x) and goes_on(0 * x, x)
    assert goes_on(x * (1 - 2e-4), x)


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float32, 1e-30), (torch.float64, 1e-200)])
def test_without_an_epsilon_the_change_has_no_scale(dtype, tiny):
    x = torch.full((5,), tiny, dtype=dtype)

    def goes_on(factor, threshold):
        return default_term_cond(1, (x * factor,), (x,), threshold, epsilon=0.0)

    assert goes_on(1.25, 0.06) and not goes_on(1.25, 0.065) and not goes_on(1.0, 0.0)
