"""A sample whose adjoint fails has a zero gradient, and nobody else's knows of it."""

import math
import warnings

import pytest
import torch
from helpers_derivatives import double, options_fixture, tight  # noqa: F401
from tape import captures, tape_fixture  # noqa: F401
from torch import nn
from torch.autograd import grad
from torch.func import grad as fgrad
from torch.func import vmap

from fpi_cuda import (
    Anderson,
    FixedPointLayer,
    FixedPointWarning,
    ImplicitAdjoint,
    Picard,
    Status,
    fixed_point,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning"),
]
W = 0.6 * torch.eye(3, dtype=torch.float64) + double(3, 3, seed=1, scale=0.1).abs()
BAD, GOOD = 1, [0, 2, 3]
Z = double(4, 3, seed=2).abs() + 0.2
Z[BAD] = 0


def root(x, z, w):
    """Where z = 0, so is x, and the derivative there is infinite."""
    return 0.3 * torch.sqrt(x @ w.mT) + 0.1 * torch.tanh(x @ w) + z


def steep(x, z, w):
    """Where z = 0 the solve starts at a fixed point that repels: the adjoint diverges."""
    at_zero = (z == 0).all(-1, keepdim=True)
    return torch.where(at_zero, 4 * x, 0.5 * torch.tanh(x @ w.mT)) + z


class Step(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x, z):
        return root(x, z, self.w)


def by_params(g, z, w, options):
    return fixed_point(g, torch.zeros_like(z), z, params=(w,), **options).x


def by_module(g, z, w, options):
    step = Step(w.detach())
    step.w = w if isinstance(w, nn.Parameter) else nn.Parameter(w.detach())
    return fixed_point(step, torch.zeros_like(z), z, **options).x


def by_keyword(g, z, w, options):
    layer = FixedPointLayer(lambda x, z, *, w: g(x, z, w), state_shape=(3,), **options)
    return layer(z, w=w)


def by_tuple(g, z, w, options):
    def pair(x, z, w):
        return g(x[0], z, w), 0.5 * x[1] + 0.1 * x[0]

    x = fixed_point(pair, (torch.zeros_like(z),) * 2, z, params=(w,), **options).x
    return x[0] + x[1]


def captured(g, z, w, options):
    return fixed_point(lambda x, z: g(x, z, w), torch.zeros_like(z), z, **options).x


def derivatives(way, g, z, options, orders):
    """Of each order: w's and z's."""
    w, z = nn.Parameter(W.clone()), z.clone().requires_grad_()
    x, found = way(g, z, w, options), []
    value = (x.sin() * (1 + x)).sum()
    for order in range(orders):
        found.append(grad(value, (w, z), create_graph=order + 1 < orders))
        value = sum(t.sin().sum() for t in found[-1])
    return found


def check(way, options, orders=1, g=root, z=Z):
    """Against a solve of the good samples alone."""
    mine = derivatives(way, g, z, options, orders)
    true = derivatives(way, g, z[GOOD], options | {"driver": "eager"}, orders)
    for (dw, dz), (of_w, of_z) in zip(mine, true, strict=True):
        torch.testing.assert_close(dw, of_w, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(dz[GOOD], of_z, rtol=1e-7, atol=1e-8)
        assert not dz[BAD].any()


@pytest.mark.parametrize("per_sample", [True, "auto"])
def test_it_reaches_no_other_gradient_of_any_order(options, per_sample):
    orders = 3 if options["backend"] == "native" else 2
    check(by_params, options | {"per_sample": per_sample}, orders)


@pytest.mark.parametrize("way", [by_module, by_keyword, by_tuple])
def test_however_the_shared_tensor_comes(way):
    check(way, tight("native", Anderson()), orders=2)


def test_a_captured_tensor_too(options):
    check(captured, options)


@pytest.mark.parametrize("way, orders", [(by_params, 3), (captured, 1)])
def test_an_adjoint_that_diverges_is_masked(way, orders, backend):
    check(way, tight(backend, Picard()), orders, steep)


@pytest.mark.filterwarnings("ignore:fpi_cuda. no CUDA graph")
@pytest.mark.parametrize("way, orders", [(by_params, 2), (captured, 1)])
def test_the_graph_driver(way, orders, tape):
    options = tight("native", Picard()) | {"driver": "graph", "per_sample": True}
    w, z = nn.Parameter(W.clone()), Z.clone().requires_grad_()
    if way is by_params:
        for _ in range(2):
            (dw,) = grad(way(root, z, w, options).sum(), w)
            assert dw.isfinite().all()
        assert captures() == 2
    check(way, options, orders)


def test_a_nan_of_the_loss_goes_on_beside_it_in_a_graph(tape):
    options = tight("native", Picard()) | {"driver": "graph", "per_sample": True}
    z, v = Z.clone().requires_grad_(), torch.ones_like(Z)
    v[2] = math.nan
    (dz,) = grad(by_params(root, z, W, options), z, v)
    assert dz[2].isnan().any()
    assert dz[[0, 3]].isfinite().all()
    assert not dz[BAD].any()


def test_captured_tensors_backward_again_and_again():
    """The redirection of one backward is not the next one's; hooks and .grad are served once."""
    options, w, z = tight("native", Picard()), nn.Parameter(W.clone()), Z.clone().requires_grad_()
    x, seen = captured(root, z, 2 * w / 2, options), []
    w.register_hook(lambda d: seen.append(d) or 2 * d)
    passed = by_params(root, z, w, options)
    for loss in (lambda x: x.sum(), lambda x: x[GOOD].sin().sum(), lambda x: x[2].sum()):
        mine, true = (grad(loss(s), (w, z), retain_graph=True) for s in (x, passed))
        for a, b in zip(mine, true, strict=True):
            assert b.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert not any(t.any() for t in grad(x[BAD].sum(), (w, z), retain_graph=True))
    x = captured(steep, z, 2 * w / 2, options)
    passed = by_params(steep, z, w, options)
    for rows in (slice(None), GOOD):  # the second fails nobody's adjoint
        mine, true = (grad(s[rows].sum(), w, retain_graph=True)[0] for s in (x, passed))
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10)
    x.sum().backward(retain_graph=True)
    once = w.grad.clone()
    passed.sum().backward()
    torch.testing.assert_close(w.grad, 2 * once)


@pytest.mark.parametrize("way", [by_params, by_module, by_keyword, by_tuple, captured])
def test_where_all_fail_gradients_are_zero(way):
    orders = 1 if way is captured else 3
    for g in (root,) if way is by_module else (root, steep):
        options = tight("native", Picard())
        for found in derivatives(way, g, torch.zeros_like(Z), options, orders):
            assert not any(t.any() for t in found)


def test_where_all_failed_before_a_captured_tensor_has_a_zero_gradient_too():
    w, z = W.clone().requires_grad_(), torch.full_like(Z, math.nan).requires_grad_()
    x = captured(root, z, w, tight("native", Picard()))
    assert not any(t.any() for t in grad(x.sum(), (w, z)))


def test_a_sample_left_out_by_the_loss_is_no_stand_in():
    w, z = W.clone().requires_grad_(), torch.cat((Z[[BAD]], Z)).requires_grad_()
    (dw,) = grad(by_params(root, z, w, tight("native", Picard()))[1:].sum(), w)
    (true,) = grad(by_params(root, Z[GOOD], w, tight("native", Picard())).sum(), w)
    torch.testing.assert_close(dw, true)


@pytest.mark.parametrize("way", [by_params, captured])
def test_one_system_fails_as_one(way):
    options = tight("native", Picard()) | {"per_sample": False}
    for found in derivatives(way, root, Z, options, 1 if way is captured else 2):
        assert not any(t.any() for t in found)


@pytest.mark.parametrize("way", [by_params, captured])
def test_a_sample_that_the_loss_leaves_out_does_no_harm(way, backend):
    """Its adjoint does not fail: it is never iterated."""
    w, z = nn.Parameter(W.clone()), Z.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = way(root, z, w, tight(backend, Picard()))
        mine = grad(x[GOOD].sum(), (w, z))
    good = Z[GOOD].requires_grad_()
    true = grad(way(root, good, w, tight(backend, Picard())).sum(), (w, good))
    torch.testing.assert_close(mine[0], true[0])
    torch.testing.assert_close(mine[1][GOOD], true[1])
    assert not mine[1][BAD].any()


def test_transforms():
    options = tight("native", Picard())

    def loss(w, z):
        return by_params(root, z, w, options).sin().sum()

    slices = torch.stack([Z, torch.zeros_like(Z), Z.flip(0)])
    good = [fgrad(loss)(W, Z[GOOD]), torch.zeros_like(W), fgrad(loss)(W, Z[GOOD])]
    torch.testing.assert_close(vmap(fgrad(loss), (None, 0))(W, slices), torch.stack(good))
    w = W.clone().requires_grad_()
    (first,) = grad(vmap(lambda z: loss(w, z))(slices).sum(), w, create_graph=True)
    torch.testing.assert_close(first, sum(good))
    (second,) = grad(first.sin().sum(), w)
    true = fgrad(lambda w: (2 * fgrad(loss)(w, Z[GOOD])).sin().sum())(W)
    torch.testing.assert_close(second, true)
    (plain,) = grad(vmap(lambda z: loss(w, z))(slices).sum(), w)
    torch.testing.assert_close(plain, sum(good))


def test_batched_cotangents():
    z, w = Z.clone().requires_grad_(), W.clone().requires_grad_()
    x, v = by_params(root, z, w, tight("native", Picard())), double(2, 4, 3)
    mine = grad(x, (z, w), v, is_grads_batched=True, retain_graph=True)
    each = [grad(x, (z, w), row, retain_graph=True) for row in v]
    for a, b in zip(mine, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.filterwarnings("ignore:fpi_cuda. g can't be given a part of the batch")
@pytest.mark.parametrize("shared", ["passed", "captured"])
def test_rows_that_g_captures_have_a_stand_in(shared):
    """Inf in a sample's own row of a constant: it fails forward, and its derivative is infinite."""
    rows = torch.ones_like(Z)
    rows[BAD] = math.inf
    z = Z + 0.1

    def found(at):
        w, given, here = W.clone().requires_grad_(), z[at].requires_grad_(), rows[at]
        way = by_params if shared == "passed" else captured
        g = lambda x, z, w: here * 0.5 * torch.tanh(x @ w.mT + z)  # noqa: E731
        value, all_of_them = way(g, given, w, tight("native", Picard())).sin().sum(), []
        for more in (True, False) if shared == "passed" else (False,):
            all_of_them.append(grad(value, (w, given), create_graph=more))
            value = sum(t.sin().sum() for t in all_of_them[-1])
        return all_of_them

    mine = found(slice(None))
    for (dw, dz), (of_w, of_z) in zip(mine, found(GOOD), strict=True):
        torch.testing.assert_close(dw, of_w)
        torch.testing.assert_close(dz[GOOD], of_z)
        assert not dz[BAD].any()


@pytest.mark.filterwarnings("ignore:fpi_cuda. g can't be given a part of the batch")
def test_a_constant_with_as_many_rows_as_samples_is_not_taken_for_theirs():
    """A mask and a bias over a state's parts, which are as many as the samples."""
    mask = torch.full((3, 3), -math.inf, dtype=torch.float64).tril(-1)
    bias, rows, at = double(3, seed=5), torch.ones(3, 3, dtype=torch.float64), [0, 2]
    rows[1] = math.inf

    def found(z, rows):
        def g(x, z, w):
            mixed = torch.softmax(w + mask, -1) @ x[..., None]
            return rows * torch.tanh(0.5 * mixed[..., 0] + bias) + z

        return derivatives(by_params, g, z, tight("native", Picard()), 1)[0]

    (dw, dz), (of_w, of_z) = found(Z[:3], rows), found(Z[at], rows[at])
    torch.testing.assert_close(dw, of_w)
    torch.testing.assert_close(dz[at], of_z)


@pytest.mark.filterwarnings("ignore:fpi_cuda. g can't be given a part of the batch")
def test_infinity_in_a_constant_that_nobody_sees_stays_out_of_its_samples_gradient():
    columns = torch.ones(3, 4, dtype=torch.float64)
    columns[:, BAD] = math.inf
    w, z = W.clone().requires_grad_(), (Z + 0.1).requires_grad_()

    def g(x, z, w):
        return 0.5 * torch.tanh(x @ w.mT) + z * columns.T

    dw, dz = grad(by_params(g, z, w, tight("native", Picard())).sum(), (w, z))
    assert dw.isfinite().all()
    assert dz[GOOD].all()
    assert not dz[BAD].any()


def test_the_message_says_that_the_derivative_is_not_finite(backend, solver):
    z = Z.clone().requires_grad_()
    x = fixed_point(root, torch.zeros_like(z), z, params=(W,), backend=backend, solver=solver).x
    with pytest.warns(FixedPointWarning) as caught:
        grad(x.sum(), z)
    (message,) = {str(w.message) for w in caught}
    assert "adjoint: 1 of 4 samples NONFINITE (samples 1): g's derivative at" in message
    assert "g returned" not in message
    assert "the loss" not in message


def test_the_message_says_that_the_loss_has_no_finite_gradient(backend, solver):
    z, v = (Z + 0.1).requires_grad_(), torch.ones_like(Z)
    v[2, 0] = math.nan
    x = fixed_point(root, torch.zeros_like(z), z, params=(W,), backend=backend, solver=solver).x
    with pytest.warns(FixedPointWarning, match=r"adjoint: 1 of 4 .*2\): the gradient of the loss"):
        grad(x, z, v)
    both = Z.clone().requires_grad_()
    x = fixed_point(root, torch.zeros_like(z), both, params=(W,), backend=backend, solver=solver).x
    with pytest.warns(FixedPointWarning, match=r"\(samples 1, 2\): g's deriv.* Or: the gradient"):
        grad(x, both, v)


def test_use_lets_it_through_and_the_record_tells_of_the_second_call():
    def solve(failed):
        z, w = Z.clone().requires_grad_(), W.clone().requires_grad_()
        options = tight("native", Picard()) | {"adjoint": ImplicitAdjoint(failed=failed)}
        s = fixed_point(root, torch.zeros_like(z), z, params=(w,), **options)
        (dw,) = grad(s.x.sum(), w, retain_graph=True)
        assert s.adjoint.status.tolist() == [0, Status.NONFINITE, 0, 0]
        count = s.adjoint.evaluations
        (of_good,) = grad(s.x[GOOD].sum(), w)
        assert of_good.isfinite().all() == dw.isfinite().all()
        return dw, count

    used, one = solve("use")
    masked, two = solve("mask")
    assert used.isnan().any()
    assert masked.isfinite().all()
    assert two == one + 1
