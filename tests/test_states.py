"""The state that a user gives and gets: its type, its shape, and that it is his own."""

from typing import NamedTuple

import pytest
import torch
from helpers_bad_input import raises
from helpers_derivatives import close, double
from helpers_layers import EXACT
from torch import nn
from torch.autograd import grad
from torch.func import grad as fgrad
from torch.func import vmap

from fpi_cuda import DenseStep, FixedPointLayer, GradientStep, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")
Z = double(4, 3)


def g(x, z):
    return 0.5 * torch.tanh(x) + z


def pair(x, z):
    return 0.5 * torch.tanh(x[0]) + z, 0.5 * x[1] + x[0].sum(1)[:, None]


KINDS = {
    "one tensor": (g, (3,)),
    "an image": (lambda x, z: 0.5 * x + z[:, :, None], (3, 2)),
    "a tuple": (pair, ((3,), (1,))),
}


def tensors(x):
    return x if isinstance(x, tuple) else (x,)


# --- the output is the caller's own ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_change_of_the_output_leaves_the_warm_start_as_it_was(kind, mode):
    step, shape = kind
    layer = FixedPointLayer(step, state_shape=shape, **EXACT)
    with mode():
        y = tensors(layer(Z))
        before = [t.clone() for t in y]
        for t in y:
            t.zero_()
        for t, old in zip(tensors(layer.last.x), before, strict=True):
            assert torch.equal(t, old) and not t.requires_grad
        layer(Z, x0=layer.last.x)
        assert layer.last.iterations.max() == 1


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_output_may_be_changed_in_place(kind):
    step, shape = kind
    z = Z.clone().requires_grad_()
    layer = FixedPointLayer(step, state_shape=shape, **EXACT)
    mine, true = tensors(layer(z)), [(2 * t).relu() for t in tensors(layer(z))]
    for t in mine:
        t.mul_(2).relu_()
    loss = [sum(t.sin().sum() for t in x) for x in (mine, true)]
    first = [grad(value, z, create_graph=True)[0] for value in loss]
    close(*first)
    close(*(grad(d.square().sum(), z)[0] for d in first))


def test_the_output_may_be_changed_in_place_where_g_captures():
    w = double(3, 3, seed=1, scale=0.2).requires_grad_()
    layer = FixedPointLayer(lambda x, z: torch.tanh(x @ w.mT + z), **EXACT)
    (mine,) = grad(nn.Sequential(layer, nn.ReLU(inplace=True))(Z).sum(), w)
    close(mine, grad(layer(Z).relu().sum(), w)[0])


def test_a_structured_steps_output_may_be_changed_in_place():
    layer = FixedPointLayer(DenseStep(5, 3).double(), **EXACT)
    (mine,) = grad(nn.Sequential(layer, nn.ReLU(inplace=True))(Z).sum(), layer.g.state_weight)
    assert layer.last.path == "native, whole"
    close(mine, grad(layer(Z).relu().sum(), layer.g.state_weight)[0])


def test_a_changed_solution_of_fixed_point_is_refused_by_its_backward():
    z = Z.clone().requires_grad_()
    x = fixed_point(g, torch.zeros_like(z), z).x
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_after_a_transform_the_last_solution_is_plain():
    layer = FixedPointLayer(g, **EXACT)
    true = layer(Z)
    vmap(lambda z: layer(z[None]))(Z)
    close(layer.last.x, true[:, None])
    vmap(vmap(lambda z: layer(z[None]), in_dims=1))(torch.stack([Z.mT, -Z.mT]))
    close(layer.last.x[0], true[:, None])
    fgrad(lambda z: layer(z).sum())(Z)
    close(layer.last.x, true)
    vmap(fgrad(lambda z: layer(z[None]).sum()), in_dims=1)(Z.mT)
    close(layer.last.x + 0, true[:, None])
    both = FixedPointLayer(pair, state_shape=((3,), (1,)), **EXACT)
    vmap(lambda z: both(z[None])[0])(Z)
    assert [t.shape for t in both.last.x] == [(4, 1, 3), (4, 1, 1)]
    assert not any(torch.func.debug_unwrap(t) is not t for t in both.last.x)


# --- named tuples ----------------------------------------------------------------------------


class Two(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


class One(NamedTuple):
    a: torch.Tensor


def named(x, z):
    assert type(x) is Two
    return Two(0.5 * torch.tanh(x.a) + z, 0.5 * x.b + x.a.sum(1)[:, None])


X0 = Two(torch.zeros_like(Z), torch.zeros(4, 1, dtype=Z.dtype))


@pytest.mark.parametrize("step", [named, lambda x, z: tuple(named(x, z))], ids=["named", "plain"])
def test_a_named_tuple_stays_one(step):
    z = Z.clone().requires_grad_()
    x = fixed_point(step, X0, z, **EXACT).x
    true = fixed_point(pair, tuple(X0), z, **EXACT).x
    assert type(x) is Two and type(true) is tuple
    for mine, other in zip(x, true, strict=True):
        close(mine, other)
    close(grad(x.b.sum(), z)[0], grad(true[1].sum(), z)[0])


def test_a_layer_keeps_a_named_tuple():
    layer = FixedPointLayer(named, state_shape=Two((3,), (1,)), **EXACT)
    x = layer(Z)
    assert type(x) is type(layer.last.x) is type(layer(Z, x0=layer.last.x)) is Two
    assert layer.last.iterations.max() == 1
    assert type(vmap(lambda z: layer(z[None]))(Z)) is Two


def test_an_energy_gets_the_named_tuple():
    def energy(x, z):
        return ((x.a - z) ** 2).sum(1) + ((x.b - 1) ** 2).sum(1)

    x = fixed_point(GradientStep(energy, 0.3), X0, Z, **EXACT).x
    close(x.a, Z)
    close(x.b, torch.ones_like(x.b))
    alone = GradientStep(lambda x, z: ((x.a - z) ** 2).sum(1), 0.3)
    assert type(alone(One(Z), Z)) is One
    close(fixed_point(alone, One(X0.a), Z, **EXACT).x.a, Z)
    bare = GradientStep(lambda x, z: ((x - z) ** 2).sum(1), 0.3)
    close(fixed_point(bare, (X0.a,), Z, **EXACT).x[0], Z)


# --- shapes that g hides ---------------------------------------------------------------------

BROADCAST = {
    "one tensor": (g, (4, 3)),
    "as torch.Size": (g, Z.shape),
    "numbers": (lambda x, z: 0.5 * x + z[:, 0], (4,)),
    "a module": (nn.Sequential, (4, 3)),
    "a tuple": (lambda x, z: (0.5 * x[0] + z, 0.5 * x[1]), ((4, 3), (4, 1))),
}


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, z):
        self.calls += 1
        return 0.5 * x + z


@pytest.mark.parametrize("kind", BROADCAST.values(), ids=BROADCAST)
def test_a_state_shape_that_holds_the_batch_is_named(kind):
    step, shape = kind
    step = Normed() if step is nn.Sequential else step
    layer = FixedPointLayer(step, state_shape=shape)
    with raises(ValueError, r"state_shape must be the shape of one sample's state.*for a batch of"):
        layer(Z)
    if isinstance(step, nn.Module):
        assert step.calls == 0


@pytest.mark.parametrize(
    ("step", "shape", "z"),
    [
        (lambda x, z: 0.5 * x + z[:, None], (4, 3), Z),  # the batch by chance
        (lambda x, z: 0.5 * x + z, (4, 3), Z[:, None]),
        (lambda x, z: 0.5 * x, (4, 3), Z),  # z has no say
        (lambda x, z: 0.5 * x + z[:, :1], (4,), Z),
        (lambda x, z: 0.5 * x + (Z + z)[:, None], (4, 3), Z),  # takes no other batch
        (lambda x, z: 0.5 * x + z, (1, 3), Z[:1]),
    ],
)
def test_a_state_as_large_as_the_batch_is_no_mistake(step, shape, z):
    calls = []

    def counted(x, z):
        calls.append(x.shape)
        return step(x, z)

    layer = FixedPointLayer(counted, state_shape=shape)
    for _ in range(2):
        calls.clear()
        assert layer(z).shape == (len(z), *shape)
    assert len(calls) == layer.last.evaluations  # asked once


def test_a_state_shape_of_another_type_is_named():
    with raises(TypeError, r"state_shape must be .*a tuple \(got 3\)"):
        FixedPointLayer(g, state_shape=3)(Z)


@pytest.mark.parametrize(
    ("step", "x0", "words"),
    [
        (lambda x: x.mean(0, keepdim=True), torch.zeros(4, 3), r"shape of x, \(4, 3\) \(got \(1"),
        (lambda x: x.mean(0), torch.zeros(4, 3), r"shape of x, \(4, 3\) \(got \(3,\)"),
        (lambda x: 0.5 * x + Z, Z[:1], r"shape of x, \(1, 3\) \(got \(4, 3\)\)"),
        (
            lambda x: (0.5 * x[0] + Z, 0.5 * x[1]),
            (Z[:1], Z[:1]),
            r"one batch size, that of x, in all tensors \(got 4 at \[0\] and 1 at \[1\]\)",
        ),
    ],
)
def test_a_g_that_changes_the_batch_is_named(step, x0, words):
    with raises(ValueError, words):
        fixed_point(step, x0, per_sample=False)
