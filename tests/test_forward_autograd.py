"""torch.autograd's own checks and functions in forward mode: gradcheck, functional.jacobian."""

import pytest
import torch
from helpers_derivatives import tight
from helpers_forward import direction, joined, leaves, near, nested
from helpers_forward_problems import W, Z, looped, opaque, problem, truth
from torch.autograd import forward_ad, functional, gradcheck, gradgradcheck

from fpi_cuda import Anderson, Picard
from fpi_cuda.operators import partial

pytestmark = pytest.mark.usefixtures("one_thread")
NATIVE = tight("native", Anderson())


def f(z, w):
    return problem("opaque").solved(NATIVE)(z, w)


def slow(z, w):
    return looped(opaque)(z, w)


# --- gradcheck ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opaque", "one system", "tuple"])
def test_gradcheck_in_forward_mode(name):
    solved, _, z, w = problem(name)
    assert gradcheck(solved(NATIVE), leaves(z, w), check_forward_ad=True, fast_mode=name == "tuple")


def test_gradcheck_of_batches_of_tangents():
    assert gradcheck(
        f,
        leaves(Z, W),
        check_forward_ad=True,
        check_batched_forward_grad=True,
        check_batched_grad=True,
    )


def test_gradgradcheck_forward_over_reverse(backend):
    solved = problem("opaque").solved(tight(backend, Picard()))
    assert gradgradcheck(
        solved, leaves(Z[:1], W), check_fwd_over_rev=True, fast_mode=backend == "reference"
    )


def test_gradgradcheck_of_batches_of_cotangents():
    assert gradgradcheck(
        f, leaves(Z[:1], W), check_fwd_over_rev=True, check_batched_grad=True, fast_mode=False
    )


@pytest.mark.parametrize("name", ["module", "energy"])
def test_gradcheck_of_a_layer_with_parameters(name):
    """On random projections: the layers' parameters are many."""
    solved, _, z, w = problem(name)
    given = leaves(z, w)
    assert gradcheck(solved(NATIVE), given, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(solved(NATIVE), given, check_fwd_over_rev=True, fast_mode=True)


def test_gradcheck_of_p():
    def p(z, w):
        return partial(lambda z, w: (torch.tanh(z @ w) * z.sin()).sum(), z, w)

    given = leaves(Z[:1], W)
    assert gradcheck(p, given, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(p, given, check_fwd_over_rev=True)


# --- torch.autograd.functional -----------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_functional_jacobian(strategy):
    found = functional.jacobian(f, (Z, W), vectorize=True, strategy=strategy)
    near(joined(found), joined(functional.jacobian(slow, (Z, W))))
    near(found[1], truth("opaque", "jacfwd_w"))


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_functional_hessian(strategy):
    def of(f):
        return lambda z, w: f(z, w).sin().sum()

    found = functional.hessian(of(f), (Z, W), vectorize=True, outer_jacobian_strategy=strategy)
    near(joined(found), joined(functional.hessian(of(slow), (Z, W))))


def test_functional_products():
    dz, dw = tangents = direction(Z), direction(W)
    value, found = functional.jvp(f, (Z, W), tangents)
    near(value, slow(Z, W))
    near(found, truth("opaque", "jvp"))

    def loss(f):
        return lambda z, w: f(z, w).sin().sum()

    for product in (functional.hvp, functional.vhp):
        near(
            joined(product(loss(f), (Z, W), tangents)[1]),
            joined(product(loss(slow), (Z, W), tangents)[1]),
        )
    near(joined(functional.vjp(f, (Z, W), dz)[1]), joined(functional.vjp(slow, (Z, W), dz)[1]))
    assert dw.shape == W.shape


def test_functional_jacobian_of_a_jacobian():
    def first(f):
        def of(z, w):
            return joined(functional.jacobian(f, (z, w), create_graph=True, vectorize=True))

        return of

    found = functional.jacobian(first(f), (Z, W), vectorize=True)
    near(joined(found), joined(functional.jacobian(first(slow), (Z, W))))


# --- dual tensors by hand ----------------------------------------------------------------------


def test_a_dual_level_may_be_opened_and_closed_around_a_solve_again_and_again():
    z, w = leaves(Z, W)
    for _ in range(2):
        with forward_ad.dual_level():
            x = f(forward_ad.make_dual(z, direction(Z)), forward_ad.make_dual(w, direction(W)))
            near(forward_ad.unpack_dual(x).tangent, truth("opaque", "jvp"))
            near(forward_ad.unpack_dual(x).primal, slow(Z, W))
        assert forward_ad.unpack_dual(x, level=0).tangent is None
        near(joined(torch.autograd.grad(x.sin().sum(), (z, w))), truth("opaque", "backward"))


def test_backward_after_the_level_has_ended_is_right():
    def late(f):
        z, w = leaves(Z, W)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(
                f(forward_ad.make_dual(z, direction(Z)), forward_ad.make_dual(w, direction(W)))
            ).tangent.clone()
        return joined(torch.autograd.grad(tangent.sin().sum(), (z, w)))

    near(late(f), nested("backward_dual", slow)(Z, W))


def test_a_retained_graph_is_followed_at_one_level_after_another():
    """The graph of one solve: gradients without a tangent, with one, and without one again."""
    z, w = leaves(Z, W)
    x = f(z, w)
    v, dv = direction(x, 5), direction(x, 6)
    plain = joined(torch.autograd.grad(x, (z, w), v, retain_graph=True))
    tangents = truth("opaque", "dual_cotangent")
    for _ in range(2):
        with forward_ad.dual_level():
            found = torch.autograd.grad(x, (z, w), forward_ad.make_dual(v, dv), retain_graph=True)
            both = [forward_ad.unpack_dual(t) for t in found]
            near(joined([t.tangent for t in both]), tangents)
            near(joined([t.primal for t in both]), plain)
        again = torch.autograd.grad(x, (z, w), v, retain_graph=True)
        near(joined(again), plain)
        assert all(forward_ad.unpack_dual(t, level=0).tangent is None for t in again)
