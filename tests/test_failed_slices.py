"""Failed samples have zero gradients under torch.func too, whatever is mapped and nested."""

import math

import pytest
import torch
from helpers_derivatives import close, double, tight
from torch.autograd import grad
from torch.func import grad as fgrad
from torch.func import jacrev, vmap

from fpi_cuda import Anderson, Picard, fixed_point

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning"),
]
OPTIONS = tight("reference", Anderson())
W = double(3, 3, seed=1, scale=0.2)
GOOD = double(4, 3)
# Rows and slices of two that hold NaN: some of one slice, all of another.
SOME = GOOD.clone()
SOME[1, 0] = math.nan
SLICE = SOME.clone()
SLICE[0, 2] = math.nan


def loss(z, w):
    """Of a batch; a failed sample's own part is left out."""
    x = fixed_point(
        lambda x, z, w: torch.tanh(x @ w.mT + z), torch.zeros_like(z), z, params=(w,), **OPTIONS
    ).x
    return x.sin().sum()


def good(z):
    return z.isfinite().all(-1)


def per_sample(of, bad):
    """[of(sample)], zero where the sample failed."""
    return torch.stack(
        [of(z[None]) if z.isfinite().all() else torch.zeros_like(of(GOOD[:1])) for z in bad]
    )


@pytest.mark.parametrize("bad", [SOME, SLICE], ids=["some", "a slice"])
def test_per_sample_gradients(bad):
    mine = vmap(fgrad(lambda z: loss(z[None], W)))(bad)
    close(mine, per_sample(lambda z: fgrad(loss)(z, W)[0], bad))
    mine = vmap(fgrad(lambda w, z: loss(z[None], w)), (None, 0))(W, bad)
    close(mine, per_sample(lambda z: fgrad(loss, 1)(z, W), bad))


@pytest.mark.parametrize("bad", [SOME, SLICE], ids=["some", "a slice"])
def test_gradients_by_slice(bad):
    slices = bad.view(2, 2, 3)
    mine = vmap(fgrad(lambda w, z: loss(z, w)), (None, 0))(W, slices)
    close(mine, torch.stack([fgrad(lambda w, z=z: loss(z[good(z)], w))(W) for z in slices]))


@pytest.mark.parametrize("bad", [SOME, SLICE], ids=["some", "a slice"])
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_of_a_mapped_solve(bad, order):
    """grad(vmap), and autograd through vmap."""
    slices, left = bad.view(2, 2, 3), bad[good(bad)]

    def mapped(w):
        return vmap(lambda z: loss(z, w))(slices).sum()

    mine, true = mapped, lambda w: loss(left, w)
    for _ in range(order):
        mine, true = (fgrad(lambda w, f=f: f(w).sin().sum()) for f in (mine, true))
    close(mine(W), true(W))
    w = W.clone().requires_grad_()
    value = mapped(w)
    for _ in range(order):
        (value,) = grad(value.sin().sum(), w, create_graph=True)
    close(value, true(W))


def test_gradients_of_weights_that_are_mapped():
    """A sample may fail in one slice alone, and all in another."""
    ws = torch.stack([W, torch.full_like(W, math.nan), -W])

    def mapped(ws):
        return vmap(lambda w: loss(SOME, w))(ws)

    mine = fgrad(lambda ws: mapped(ws).sum())(ws)
    each = [fgrad(lambda w: loss(SOME[good(SOME)], w))(w) for w in (W, -W)]
    close(mine, torch.stack([each[0], torch.zeros_like(W), each[1]]))
    shared = SOME.clone().requires_grad_()
    (mine,) = grad(vmap(lambda w: loss(shared, w))(ws).sum(), shared)
    close(mine, sum(fgrad(loss)(SOME, w) for w in (W, -W)))


@pytest.mark.parametrize("bad", [SOME, SLICE], ids=["some", "a slice"])
def test_second_derivatives(bad):
    mine = vmap(jacrev(jacrev(lambda w, z: loss(z[None], w))), (None, 0))(W, bad)
    close(mine, per_sample(lambda z: jacrev(jacrev(lambda w: loss(z, w)))(W), bad))
    mine = jacrev(jacrev(lambda w: loss(bad, w)))(W)
    close(mine, jacrev(jacrev(lambda w: loss(bad[good(bad)], w)))(W))


def test_nested_maps():
    """vmap(grad(vmap)): slices of slices, of which one failed as a whole."""
    deep = torch.stack([SLICE, GOOD]).view(2, 2, 2, 3)
    mine = vmap(fgrad(lambda w, z: vmap(lambda z: loss(z, w))(z).sum()), (None, 0))(W, deep)
    true = [fgrad(lambda w, z=z: loss(z[good(z)], w))(W) for z in (SLICE, GOOD)]
    close(mine, torch.stack(true))


def test_all_samples_fail():
    bad = torch.full_like(GOOD, math.nan)
    assert not vmap(fgrad(lambda z: loss(z[None], W)))(bad).any()
    assert not fgrad(loss, 1)(bad, W).any()
    assert not jacrev(jacrev(lambda w: loss(bad, w)))(W).any()
    assert not fgrad(lambda w: vmap(lambda z: loss(z[None], w))(bad).sum())(W).any()


def test_a_batch_that_fails_as_one():
    """Rows that diverge together: finite, but masked."""

    def f(w, z):
        x = fixed_point(
            lambda x, z, w: x @ w + z,
            torch.zeros_like(z),
            z,
            params=(w,),
            per_sample=False,
            solver=Picard(),
        ).x
        return x.sum()

    big = 3 * torch.eye(3, dtype=W.dtype)
    ws = torch.stack([W, big])
    mine = vmap(fgrad(f), (0, None))(ws, GOOD)
    close(mine[0], fgrad(f)(W, GOOD))
    assert not mine[1].any()
    assert not fgrad(f)(big, GOOD).any()
