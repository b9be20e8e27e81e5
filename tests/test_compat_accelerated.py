"""The old layer's call with accelerate=True: the same answers, each sample stopped by itself."""

import copy
import pickle
import warnings
from functools import partial as bind

import pytest
import torch
from helpers import Net, contraction, unroll
from helpers_compat import Descent, double, zeros
from torch import nn
from torch.autograd import grad
from torch.nn.functional import linear

from fpi_cuda import FixedPointWarning, Picard
from fpi_cuda.compat import (
    FixedPointIteration,
    default_term_cond,
    each_sample,
    fixed_point_iteration,
)
from fpi_cuda.compat.conditions import NO_LIMIT, read

pytestmark = pytest.mark.usefixtures("one_thread")

# Tight enough for second derivatives, above rounding: rtol 1e-13.
TIGHT = bind(default_term_cond, threshold=1e-26, maxIter=500)
accelerated = bind(fixed_point_iteration, accelerate=True)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, y):
        return (self.net(x[0], y[0]),)


class Pair(nn.Module):
    """g over tuples of two, the second of another shape."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, y):
        u, s = x
        return self.net(u, y[0]), 0.5 * torch.tanh(s) + u.mean(1, keepdim=True)


def derivatives(x, tensors):
    """Of first, second and third order."""
    loss, found = sum(t.sin().sum() for t in x), []
    for order in (1, 2, 3):
        found.append(grad(loss, tensors, create_graph=order < 3))
        loss = sum(t.square().sum() for t in found[-1])
    return found


def case(name):
    """g, y, x0, param, what gets derivatives."""
    y = double(4, 2).requires_grad_()
    if name == "plain function with param":
        w, y = contraction(3, 0.6).requires_grad_(), double(4, 3).requires_grad_()

        def g(x, y):
            return (torch.tanh(linear(x[0], w) + y[0]),)

        return g, (y,), (zeros(4, 3),), (w,), (y, w)
    if name == "shared tensors":
        w, y = contraction(3, 0.6).requires_grad_(), double(4, 3).requires_grad_()
        scale, flip = zeros(()).add(0.8).requires_grad_(), torch.tensor([2, 0, 1])

        def g(x, y):
            scale, w, z, flip = y
            return (torch.tanh(scale * linear(x[0], w)[:, flip] + z),)

        return g, (scale, w, y, flip), (zeros(4, 3),), (), (scale, y, w)
    g = {"module": Wide, "tuples": Pair, "energy": Descent}[name]()
    x0 = (zeros(4, 3), zeros(4, 1))[: 1 + (name == "tuples")]
    return g, (y,), x0, (), (y, *g.parameters())


CASES = ("module", "tuples", "energy", "plain function with param", "shared tensors")


@pytest.mark.parametrize("m_anderson", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_every_order_are_those_of_the_unrolled_loop(name, m_anderson):
    g, y, x0, param, tensors = case(name)
    x = accelerated(y, x0, g, TIGHT, TIGHT, m_anderson, param=param)
    assert isinstance(x, tuple)
    true = tuple(t.clone().requires_grad_() for t in x0)  # P in g differentiates by the state
    for _ in range(90):
        true = g(true, y)
    for mine, exact in zip((x, *derivatives(x, tensors)), (true, *derivatives(true, tensors)),
                           strict=True):  # fmt: skip
        for a, b in zip(mine, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_answer_is_the_whole_batchs_within_the_tolerance():
    g, y, x0, _, tensors = case("module")
    cond = bind(default_term_cond, threshold=1e-8)

    def both(**options):
        (x,) = fixed_point_iteration(y, x0, g, cond, cond, **options)
        return x, *grad(x.sin().sum(), tensors)

    for a, b in zip(both(), both(accelerate=True), strict=True):
        assert (a - b).norm() <= 20 * 1e-4 * b.norm()


@pytest.mark.parametrize("square", ["weight", "parameter", "scale"])
def test_a_shared_tensor_with_as_many_rows_as_the_batch_is_found_out(square):
    """Solved right, whether it is told apart at once (a parameter) or by looking."""
    n = 5
    scales = torch.tensor([0.1, 0.2, 0.4, 0.7, 0.95], dtype=torch.float64)
    s = torch.diag(scales).requires_grad_() if square != "scale" else scales.requires_grad_()
    s = nn.Parameter(s.detach()) if square == "parameter" else s
    z = torch.diag(torch.linspace(1, 2, n)).double()  # a sample converges as its own scale does

    def g(x, y):
        return (torch.tanh(x[0] @ y[1]) + y[0] if y[1].dim() == 2 else x[0] * y[1] + y[0],)

    true = unroll(lambda x: g((x,), (z, s))[0], zeros(n, n), steps=700)
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (x,) = accelerated((z, s), (zeros(n, n),), g, TIGHT, TIGHT)
            (ds,) = grad(x.sin().sum(), s)
        torch.testing.assert_close(x, true, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ds, grad(true.sin().sum(), s, retain_graph=True)[0],
                                   rtol=1e-8, atol=1e-8)  # fmt: skip
        assert all("part of the batch" in str(w.message) for w in caught)
        assert not (caught and square == "parameter")


def test_the_last_batch_may_have_as_many_rows_as_a_weight():
    """What was found out with six samples is not known of seven, of which a weight has as many."""
    weight, slow = torch.eye(7).double() * 0.5, torch.logspace(-3, 1, 7).double()[:, None]
    layer = FixedPointIteration(
        lambda x, y: (torch.tanh(x[0] @ y[1]) + y[0],), TIGHT, TIGHT, accelerate=True
    )
    for b in (6, 6, 6, 7):
        z = slow[:b].expand(b, 7).flip(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (x,) = layer((z, weight), (zeros(b, 7),))
        torch.testing.assert_close(torch.tanh(0.5 * x) + z, x, rtol=1e-9, atol=1e-9)
        assert ("compacted" in layer.last.path) == (b == 6)


def test_samples_that_depend_on_each_other_are_one_system():
    """A chain: 0.5 of the state of the node before; each node would be done before it has begun."""
    n, z = 6, zeros(6, 1)
    z[0] = 1
    layer = FixedPointIteration(
        lambda x, y: (0.5 * x[0].roll(1, 0) * y[1] + y[0],), TIGHT, TIGHT, accelerate=True
    )
    with pytest.warns(UserWarning, match="depend on each other"):
        (x,) = layer((z, (torch.arange(n) > 0)[:, None].double()), (zeros(n, 1),))
    torch.testing.assert_close(x[:, 0], 0.5 ** torch.arange(n).double())


def test_transforms_work():
    w = contraction(3, 0.6)

    def f(y, accelerate=True):
        return fixed_point_iteration(
            (y, w), (zeros(2, 3),), lambda x, y: (torch.tanh(x[0] @ y[1].mT + y[0]),), TIGHT, TIGHT,
            accelerate=accelerate,
        )[0]  # fmt: skip

    y, ys = double(2, 3), double(4, 2, 3)
    torch.testing.assert_close(
        torch.func.jacrev(f)(y), torch.func.jacrev(bind(f, accelerate=False))(y)
    )
    torch.testing.assert_close(torch.func.vmap(f)(ys), torch.stack([f(y) for y in ys]))


def test_the_layer_keeps_the_last_solution_detached():
    layer = FixedPointIteration(Wide(), TIGHT, TIGHT, accelerate=True)
    assert layer.last is None
    y = double(4, 2).requires_grad_()
    (x,) = layer((y,), (zeros(4, 3),))
    assert bool(layer.last.converged.all())
    assert not layer.last.x.requires_grad
    torch.testing.assert_close(layer.last.x, x)
    x.sum().backward()
    assert int(layer.last.adjoint.iterations.max()) > 1
    assert set(layer.state_dict()) == {f"g.net.{key}" for key in Net().state_dict()}
    torch.func.vmap(lambda y: layer((y,), (zeros(4, 3),))[0])(double(2, 4, 2))
    assert layer.last.x.shape == (2, 4, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.last is None
        torch.testing.assert_close(twin((y,), (zeros(4, 3),))[0], x)
    assert FixedPointIteration(Wide()).last is None


def test_each_sample_stops_by_itself():
    s = torch.tensor([[0.1], [0.99]], dtype=torch.float64)
    layer = FixedPointIteration(lambda x, y: (y[0] * torch.cos(x[0]) + 1,), accelerate=True)
    layer((s,), (zeros(2, 3),))
    easy, hard = layer.last.iterations.tolist()
    assert easy < hard


def test_what_does_not_converge_is_told_and_max_iter_is_one_evaluation_less():
    layer = FixedPointIteration(
        lambda x, y: (1.5 * x[0].roll(1, 1) + y[0],),
        bind(default_term_cond, maxIter=6),
        accelerate=True,
    )
    with pytest.warns(FixedPointWarning, match="2 of 2 samples"):
        layer((torch.randn(2, 7),), (torch.zeros(2, 7),))
    assert layer.last.iterations.tolist() == [7, 7]


# --- conditions ------------------------------------------------------------------------------


def handed_on(count, x, px):
    return default_term_cond(count, x, px, 1e-6, maxIter=40)


def limits(terms, values):
    tolerance = terms.tolerance(values)
    return tolerance.rtol, tolerance.atol


class Owner:
    threshold = 1e-6

    def keep_going(self, count, x, px):
        if count > 10**9:
            raise RuntimeError
        return default_term_cond(count, px=px, x=x, threshold=self.threshold, maxIter=40)


@pytest.mark.parametrize(
    "cond",
    [
        bind(default_term_cond, threshold=1e-6, maxIter=40),
        bind(handed_on),
        handed_on,
        lambda *a: default_term_cond(*a, threshold=1e-6, maxIter=40, minIter=3, display=2),
        Owner().keep_going,
    ],
    ids=["partial", "partial of a function", "function", "lambda", "method"],
)
def test_a_condition_that_hands_on_is_read(cond, capsys):
    terms = read("forward_cond", cond)
    assert terms == (1e-6, 1e-30, True, 40)
    assert terms.max_iterations == 41
    assert limits(terms, 16) == pytest.approx((1e-3, 1e-18 / 4), rel=1e-12, abs=0)
    assert capsys.readouterr().out == ""


def test_what_a_condition_implies():
    assert read("", default_term_cond).max_iterations == NO_LIMIT == 10_000
    assert read("", default_term_cond).tolerance(1).rtol == pytest.approx(1e-5)
    terms = read("", bind(default_term_cond, threshold=1e-4, normalized=False, maxIter=4e3))
    assert terms.max_iterations == 4001
    # All samples at their bound together change by the threshold: 6 · 5 values of this squared.
    assert limits(terms, 30) == pytest.approx((0, (1e-4 / 30) ** 0.5), rel=1e-12, abs=0)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e5])
def test_the_first_tensor_of_several_meets_its_condition_however_large_the_others_are(scale):
    y = torch.linspace(0.1, 2, 6, dtype=torch.float64)[:, None].requires_grad_()
    shift = scale * torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
    cond = bind(default_term_cond, threshold=1e-8, maxIter=4000)

    def g(x, y):
        return 0.9 * torch.sin(x[0]) + y[0], 0.9 * x[1] + y[1]

    layer = FixedPointIteration(g, cond, cond, accelerate=True)
    x = layer((y, shift), (zeros(6, 3), zeros(6, 1)))
    assert layer.last.converged.all()
    change = (g(x, (y, shift))[0] - x[0]).norm(dim=1) / x[0].norm(dim=1)
    assert change.max() < 2e-4
    slope = 1 / (1 - 0.9 * torch.cos(x[0]))
    torch.testing.assert_close(
        grad(x[0].sum(), y)[0], slope.sum(1, keepdim=True), rtol=1e-2, atol=0
    )


def test_the_first_tensor_is_solved_below_the_rounding_of_the_others():
    """What can't be met is told, not taken for met."""
    z = torch.linspace(0.1, 2, 6)[:, None].expand(6, 3)
    cond = bind(default_term_cond, threshold=1e-8, maxIter=500)

    def g(x, y):
        return 0.7 * torch.sin(x[0]) + y[0], 0.9 * torch.cos(x[1]) + 1e6

    layer = FixedPointIteration(g, cond, cond, accelerate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FixedPointWarning)
        x, _ = layer((z,), (torch.zeros(6, 3), torch.zeros(6, 4)))
    assert (0.7 * torch.sin(x) + z - x).norm(dim=1).max() < 1e-4 * x.norm(dim=1).min()


@pytest.mark.parametrize("limit", [10**12, float("inf")])
def test_a_huge_limit_is_no_limit(limit):
    layer = FixedPointIteration(
        lambda x, y: (0.5 * x[0] + y[0],), bind(default_term_cond, maxIter=limit), accelerate=True
    )
    (x,) = layer((torch.ones(2, 3),), (torch.zeros(2, 3),))
    torch.testing.assert_close(x, torch.full((2, 3), 2.0), rtol=1e-4, atol=0)


def test_each_direction_has_its_own_condition(monkeypatch):
    given = {}
    monkeypatch.setattr(each_sample, "fixed_point", lambda *a, **options: given.update(options))
    conds = (bind(default_term_cond, threshold=t, maxIter=k) for t, k in ((1e-4, 7), (1e-8, 9)))
    each_sample.solve((), (zeros(2, 3),), Wide(), *conds, Picard(), ())
    assert (given["tolerance"].rtol, given["max_iterations"]) == (1e-2, 8)
    assert (given["adjoint"].tolerance.rtol, given["adjoint"].max_iterations) == (1e-4, 10)
    assert given["solver"] == Picard()


def test_an_absolute_threshold_is_met_by_the_batch():
    cond = bind(default_term_cond, threshold=1e-4, normalized=False, maxIter=500)
    g, y = (lambda x, y: (0.9 * torch.cos(x[0]) + y[0],)), (double(6, 5),)
    layer = FixedPointIteration(g, cond, cond, accelerate=True)
    layer(y, (zeros(6, 5),))
    assert bool(layer.last.converged.all())
    assert layer.last.residual_norm.square().sum() <= 1e-4


@pytest.mark.parametrize(
    ("cond", "what"),
    [
        (lambda count, x, px: count < 40, "value is not what default_term_cond says"),
        (lambda *a: a[0] < 50 and default_term_cond(*a), "at count 100 its value"),
        (lambda *a: default_term_cond(*a) and a[0] < 50, "at count 1 its value"),
        (lambda *a: default_term_cond(*a) or a[0] < 50, "at count 1 its value"),
        (lambda *a: not default_term_cond(*a), "at count 1 its value"),
        (lambda *a: bool(default_term_cond(*a)), "at count 1 its value"),
        (lambda count, x, px: default_term_cond(count + 1, x, px), "at count 1 its value"),
        (lambda count, x, px: default_term_cond(count, x, x), "at count 1 its value"),
        (lambda count, x, px: default_term_cond(count, px, x), "raised TypeError"),
        (lambda count, x, px: default_term_cond(count, x[1:], px[1:]), "raised TypeError"),
        (lambda count, x, px: (x[0] - px[0]).norm() > 1e-3, "raised TypeError"),
        (lambda *a: default_term_cond(*a, threshold=10.0 ** -a[0]), "changes from call to call"),
        (
            lambda *a: default_term_cond(*a, 1e-2) and default_term_cond(*a, 1e-3),
            "at count 1 its value",
        ),
        (lambda count: True, "raised TypeError"),
        (None, "raised TypeError"),
    ],
)
@pytest.mark.parametrize("name", ["forward_cond", "backward_cond"])
def test_a_condition_that_can_not_be_read_is_refused_with_advice(cond, what, name):
    with pytest.raises(ValueError, match=rf"reads from {name}.*{what}.*leave accelerate out"):
        FixedPointIteration(Wide(), accelerate=True, **{name: cond})
    with pytest.raises(ValueError, match=what):
        accelerated((double(2, 2),), (zeros(2, 3),), Wide(), **{name: cond})


@pytest.mark.parametrize(
    ("x0", "error", "message"),
    [
        ((zeros(2, 3), zeros(3, 1)), ValueError, r"of one size \(got shapes \(2, 3\), \(3, 1\)"),
        ((zeros(2, 3), zeros(())), ValueError, r"must have the batch as its first dimension"),
        ((zeros(()),), ValueError, r"must have the batch as its first dimension"),
        ((), ValueError, "at least one tensor"),
        ((torch.zeros(2, dtype=torch.long),), TypeError, "must be floating"),
        (zeros(2, 3), TypeError, r"write \(x0,\)"),
    ],
)
def test_a_state_without_a_batch_is_refused(x0, error, message):
    with pytest.raises(error, match=message):
        accelerated((), x0, lambda x, y: x)


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_a_threshold_that_nothing_meets_is_refused(threshold):
    with pytest.raises(ValueError, match="the threshold and the epsilon of forward_cond"):
        read("forward_cond", bind(default_term_cond, threshold=threshold))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x, y: x[0], r"must return a tuple of 1 tensors like x0 \(got Tensor\)"),
        (lambda x, y: (x[0][:, :1],), r"x0's shape \(2, 3\) at 0 \(got \(2, 1\)\)"),
    ],
)
def test_wrong_values_of_g_are_named(value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        accelerated((), (zeros(2, 3),), value)
