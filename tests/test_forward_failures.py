"""A failed sample has a zero tangent, of any order, and nobody else's knows of it."""

import math

import pytest
import torch
from helpers import contraction, unroll
from helpers_derivatives import double, tight
from helpers_forward import direction, dual, joined, near, nested, tangent_of
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap

from fpi_cuda import (
    Anderson,
    FixedPointError,
    FixedPointWarning,
    ImplicitAdjoint,
    Picard,
    Tolerance,
    fixed_point,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning"),
]
W, BAD, GOOD = contraction(3, 0.3), 1, [0, 2]
PLACE = torch.eye(3, dtype=torch.float64)[:, GOOD]
NATIVE = tight("native", Picard())


def half(x, z, w):
    """An infinite z has an infinite solution."""
    return 0.5 * torch.tanh(x @ w.mT) + z


def growing(x, z, w):
    """Diverges where z starts with a large number."""
    return torch.where(z[:, :1] > 5, 3 * x + 1, torch.tanh(x @ w.mT + z))


def repelled(x, z, w):
    """Where z = 0 the solve starts at a solution that repels: the tangent's solve diverges."""
    at_zero = (z == 0).all(-1, keepdim=True)
    return torch.where(at_zero, 4 * x, torch.tanh(x @ w.mT)) + z


def scaled(x, z, w):
    """Where z is NaN so is the derivative by all else."""
    return 0.4 * torch.tanh(x @ w.mT + 1) * z


def with_bad(value):
    z = double(3, 3, seed=6)
    z[BAD] = value
    return z


WAYS = {
    "infinite": (half, with_bad(math.inf)),
    "NaN": (half, with_bad(math.nan)),
    "NaN derivative": (scaled, with_bad(math.nan)),
    "diverges": (growing, with_bad(9.0)),
    "tangent diverges": (repelled, with_bad(0.0)),
}
ways = pytest.mark.parametrize("way", WAYS)


def solving(g, **options):
    def f(z, w):
        return fixed_point(g, torch.zeros_like(z), z, params=(w,), **NATIVE | options).x

    return f


def of_the_good(g):
    """A plain loop of the other samples, zeros in the failed one's place."""
    return lambda z, w: PLACE @ unroll(g, torch.zeros_like(z[GOOD]), z[GOOD], w, steps=40)


NESTINGS = (
    *("jvp", "jvp_w", "jvp_other jvp", "jvp jvp jvp", "jacfwd_w", "hessian", "tangents"),
    *("grad_w jvp", "jvp grad_w", "vmap_w jvp jvp", "dual", "dual_backward", "backward_dual"),
)


@pytest.mark.parametrize("nesting", NESTINGS)
@ways
def test_a_failed_samples_tangents_are_zero_and_the_others_right(way, nesting):
    g, z = WAYS[way]
    found = nested(nesting, solving(g))(z, W)
    near(found, nested(nesting, of_the_good(g))(z, W))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "tangent diverges"])
def test_with_anderson_on_the_reference_backend_too(way):
    g, z = WAYS[way]
    options = tight("reference", Anderson())
    for nesting in ("jvp", "jvp_other jvp", "hessian", "dual"):
        found = nested(nesting, solving(g, **options))(z, W)
        near(found, nested(nesting, of_the_good(g))(z, W))


@ways
def test_jacobians_hold_zeros_in_its_rows_and_columns(way):
    g, z = WAYS[way]
    jacobian = jacfwd(solving(g))(z, W)
    assert jacobian.isfinite().all()
    assert not jacobian[BAD].any()
    assert not jacobian[:, :, BAD].any()
    assert jacobian[GOOD, :, GOOD].any()
    second = hessian(lambda z: solving(g)(z, W).sin().sum())(z)
    assert second.isfinite().all()
    assert not second[BAD].any()
    assert not second[:, :, BAD].any()


def test_one_slice_of_vmap_fails_and_the_others_do_not():
    zs = torch.stack([with_bad(0.3), with_bad(math.inf), with_bad(-0.2)])

    def along(f):
        return lambda z: jvp(lambda z: f(z, W), (z,), (direction(z),))[1]

    found = vmap(along(solving(half)))(zs)
    plain = lambda z, w: unroll(half, torch.zeros_like(z), z, w, steps=40)  # noqa: E731
    for i, (z, f) in enumerate(zip(zs, (plain, of_the_good(half), plain), strict=True)):
        near(found[i], along(f)(z))
    twice = vmap(along(lambda z, w: along(solving(half))(z)))(zs)
    near(twice[0], along(lambda z, w: along(plain)(z))(zs[0]))
    near(twice[1], along(lambda z, w: along(of_the_good(half))(z))(zs[1]))


def test_a_slice_of_vmap_whose_samples_all_fail_spoils_no_other():
    zs = torch.stack([with_bad(0.3), torch.full((3, 3), math.nan, dtype=torch.float64)])

    def of_w(f):
        tangent = lambda w, z: jvp(lambda w: f(z, w), (w,), (direction(w),))[1]  # noqa: E731
        return lambda z, w: grad(lambda w: tangent(w, z).sin().sum())(w)

    found = vmap(of_w(solving(scaled)), in_dims=(0, None))(zs, W)
    plain = lambda z, w: unroll(scaled, torch.zeros_like(z), z, w, steps=40)  # noqa: E731
    near(found[0], of_w(plain)(zs[0], W))
    assert not found[1].any()
    # By what the slices share, too.
    shared = of_w(lambda zs, w: vmap(solving(scaled), in_dims=(0, None))(zs, w)[:1])
    near(shared(zs, W), found[0])


def test_one_tangent_of_several_that_is_not_finite_spoils_no_other():
    f, z = solving(half), with_bad(0.3)
    tangents = torch.stack([direction(z), direction(z, 1)])
    tangents[1, BAD, 0] = math.nan
    found = vmap(lambda dz: jvp(lambda z: f(z, W), (z,), (dz,))[1])(tangents)
    plain = lambda z: unroll(half, torch.zeros_like(z), z, W, steps=40)  # noqa: E731
    near(found[0], jvp(plain, (z,), (tangents[0],))[1])
    true = jvp(lambda z: of_the_good(half)(z, W), (z,), (tangents[1].nan_to_num(0),))[1]
    near(found[1, GOOD], true[GOOD])


def test_a_system_fails_as_one():
    z = with_bad(math.inf)
    for nesting in ("jvp", "jvp jvp", "jacfwd", "dual"):
        found = nested(nesting, solving(half, per_sample=False))(z, W)
        assert not found.any()


def test_where_all_fail_all_tangents_are_zero():
    for g, value in ((half, math.inf), (growing, 9.0), (repelled, 0.0)):
        z = torch.full((3, 3), value, dtype=torch.float64)
        for nesting in ("jvp", "jvp jvp", "hessian", "dual", "vmap_w jvp"):
            assert not nested(nesting, solving(g))(z, W).any()


def test_use_lets_the_tangent_through_as_it_lets_the_gradient():
    def f(z):
        adjoint = ImplicitAdjoint(failed="use")
        options = {**NATIVE, "adjoint": adjoint, "on_failure": "return"}
        return fixed_point(lambda x, z: 0.5 * x + z, torch.zeros_like(z), z, **options).x

    z = with_bad(math.inf)
    dz = direction(z)
    found = jvp(f, (z,), (dz,))[1]
    torch.testing.assert_close(found, 2 * dz, rtol=1e-5, atol=1e-7)
    with forward_ad.dual_level():
        torch.testing.assert_close(tangent_of(f(dual(z))), 2 * dz, rtol=1e-5, atol=1e-7)
    z = z.requires_grad_()
    (gradient,) = torch.autograd.grad(f(z), z, dz)
    torch.testing.assert_close(gradient, found, rtol=1e-5, atol=1e-7)


# --- what the user is told ---------------------------------------------------------------------


def test_raise_raises_where_the_tangents_solve_fails():
    z = with_bad(0.0)
    dz, f = direction(z), solving(repelled, on_failure="raise")
    f(z, W)
    with pytest.raises(FixedPointError, match="DIVERGED"):
        jvp(lambda z: f(z, W), (z,), (dz,))
    with pytest.raises(FixedPointError, match="DIVERGED"), forward_ad.dual_level():
        f(dual(z), W)
    short = NATIVE["adjoint"].__class__(tolerance=Tolerance(1e-13), max_iterations=2)
    f, z = solving(half, on_failure="raise", adjoint=short), with_bad(0.3)
    f(z, W)
    with pytest.raises(FixedPointError, match="MAX_ITERATIONS"):
        jvp(lambda z: f(z, W), (z,), (dz,))


def test_raise_raises_where_the_solve_fails():
    f, z = solving(half, on_failure="raise"), with_bad(math.inf)
    with pytest.raises(FixedPointError, match="NONFINITE"):
        jvp(lambda z: f(z, W), (z,), (direction(z),))
    with pytest.raises(FixedPointError, match="NONFINITE"), forward_ad.dual_level():
        f(dual(z), W)


def test_warn_warns_of_the_tangents_solve():
    z = with_bad(0.0)
    with pytest.warns(FixedPointWarning, match="1 of 3 samples DIVERGED"):
        jvp(lambda z: solving(repelled)(z, W), (z,), (direction(z),))


def test_the_scale_of_the_tangents_has_no_part_in_them():
    z = with_bad(0.3)
    f = solving(half, tolerance=Tolerance(), adjoint=ImplicitAdjoint())
    plain = jvp(lambda z: f(z, W), (z,), (direction(z),))[1]
    for scale in (1e20, 1e-25):
        found = jvp(lambda z: f(z, W), (z,), (scale * direction(z),))[1]
        torch.testing.assert_close(found / scale, plain, rtol=1e-4, atol=1e-5)
    near(joined([jvp(lambda z: f(z, W), (z,), (0 * z,))[1]]), torch.zeros(9, dtype=z.dtype))
