"""A g that keeps things, leads to itself, or holds its modules in unusual ways."""

import gc
import sys
import warnings
import weakref

import pytest
import torch
from helpers_layers import EXACT, close, double
from torch import nn
from torch.autograd import grad

from fpi_cuda import FixedPointLayer, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")


def contraction():
    net = nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        net.weight.mul_(0.3)
    return net


class Keeping(nn.Module):
    """Attached values in an attribute, a list and a dict."""

    def __init__(self):
        super().__init__()
        self.net, self.seen, self.named = contraction(), [], {}

    def forward(self, x, z):
        y = torch.tanh(self.net(x)) + z
        self.aux = y.square().mean()
        self.seen[:] = [y]
        self.named["y"] = y
        return y


WAYS = {
    "module": lambda g: g,
    "closure": lambda g: lambda x, z: 1 * g(x, z),
    "method": lambda g: g.forward,
}


@pytest.mark.parametrize("way", list(WAYS))
def test_solves_do_not_hold_one_another_nor_themselves(way):
    g = Keeping()
    layer, nodes = FixedPointLayer(WAYS[way](g)), []
    for _ in range(4):
        x = layer(double(2, 3))
        nodes.append(weakref.ref(x.grad_fn.next_functions[0][0]))
        (x.sum() + g.aux + g.seen[0].sum() + g.named["y"].sum()).backward()
    assert [n() is None for n in nodes] == [True, True, True, False]
    refs = [nodes[-1], weakref.ref(g)]
    del layer, x, g
    gc.collect()
    assert [r() for r in refs] == [None, None]


def by_closure(net):
    cache = {}

    def g(x, z):
        if "w" not in cache:
            cache["w"] = net.weight / (1 + net.weight.norm())
        return torch.tanh(x @ cache["w"]) + z

    return g, cache.clear


def by_attribute(net):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.kept = net, []

        def forward(self, x, z):
            if not self.kept:
                self.kept.append(0.5 * self.net.weight)
            return torch.tanh(x @ self.kept[0]) + z

    step = Step()
    return step, step.kept.clear


@pytest.mark.parametrize("make", [by_closure, by_attribute])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_g_makes_of_a_weight_once_has_its_gradient(make, wrapped):
    net, z = contraction(), double(4, 3)
    g, clear = make(net)
    step = (lambda x, z: 1 * g(x, z)) if wrapped else g
    for _ in range(2):
        x = fixed_point(step, torch.zeros_like(z), z, **EXACT).x
        (found,) = grad(x.square().sum(), net.weight)
        clear()
        y = torch.zeros_like(z)
        for _ in range(60):
            y = g(y, z)
        close(found, grad(y.square().sum(), net.weight)[0])
        clear()


def in_a_set(net):
    known = {net}
    return lambda x, z: net(x) * (1.0 if net in known else 9.0) + z


def in_a_dict(net):
    scale = {net: 0.5}
    return lambda x, z: net(x) * scale[net] + z


def in_a_weak_dict(net):
    scale = weakref.WeakKeyDictionary({net: 0.5})
    return lambda x, z: net(x) * scale.get(net, 9.0) + z


def in_a_hook(net):
    names, seen = {net: "net"}, {}
    net.register_forward_hook(lambda m, given, out: seen.__setitem__(names[m], out.detach()))
    return lambda x, z: net(x) + z


def by_proxy(net):
    net.me = weakref.proxy(net)
    return lambda x, z: net(x) * (1 if net.me.in_features else 9) + z


class Slotted(nn.Linear):
    __slots__ = ("scale",)


def with_slots(net):
    other = Slotted(3, 3, dtype=torch.float64)
    other.load_state_dict(net.state_dict())
    other.scale = 0.5
    return lambda x, z: other.scale * other(x) + z


def lazy(net):
    other = nn.LazyLinear(3, bias=False, dtype=torch.float64)
    return lambda x, z: 0.2 * torch.tanh(other(x)) + z


def composed(net):
    def around(f):
        return lambda x: 1 * f(x)

    g = net.forward
    for _ in range(200):
        g = around(g)
    return lambda x, z: g(x) + z


class Frozen(dict):
    def __setitem__(self, key, value):
        raise TypeError("frozen")


def in_a_dict_of_its_own_kind(net):
    held = Frozen(net=net)
    return lambda x, z: held["net"](x) + z


ODD = [
    *(in_a_set, in_a_dict, in_a_weak_dict, in_a_hook, by_proxy, with_slots, lazy, composed),
    in_a_dict_of_its_own_kind,
]


@pytest.mark.parametrize("make", ODD)
def test_modules_that_are_held_in_unusual_ways(make):
    g, z = make(contraction()), double(4, 3).requires_grad_()
    x = fixed_point(g, torch.zeros(4, 3).double(), z, **EXACT).x
    close(x, g(x, z))
    y = torch.zeros(4, 3).double()
    for _ in range(60):
        y = g(y, z)
    close(grad(x.sin().sum(), z)[0], grad(y.sin().sum(), z)[0])


def test_what_g_draws_at_its_first_call_is_that_of_the_solve():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.mask = contraction(), None

        def forward(self, x, z):
            if self.mask is None:
                self.mask = torch.rand_like(x)
            return self.mask * self.net(x) + z

    g, z = Masked(), double(4, 3)
    x = fixed_point(g, torch.zeros_like(z), z, **EXACT).x
    close(x, g(x, z))


def test_what_g_notes_beside_a_module_is_noted_once_a_solve():
    held, z = {"net": contraction(), "calls": 0}, double(4, 3)

    def g(x, z):
        held["calls"] += 1
        held["y"] = held["net"](x)
        return held["y"] + z

    x = fixed_point(g, torch.zeros_like(z), z, **EXACT).x
    assert held["calls"] == 1
    close(held["y"], held["net"](x))


def test_clones_that_lead_to_themselves_wait_for_no_collector():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("large", torch.zeros(2**20))
            self.act = self._act

        def _act(self, x):
            return 0.5 * x + 0 * self.large[0]

        def forward(self, x, z):
            return self.act(x) + z

    gc.collect()
    gc.disable()
    try:
        before = sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor)
        layer = FixedPointLayer(Own())
        with torch.no_grad(), warnings.catch_warnings():
            for _ in range(5):
                layer(torch.ones(2, 3))
        after = sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor)
    finally:
        gc.enable()
    assert after - before < 3 * 2**20
    assert sys.getrefcount(layer) < 5


def test_a_step_that_hands_attributes_on_is_asked_for_them():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x, z):
            return 0.1 * x.expand(-1, 5) + z.sum(1, keepdim=True)

    inner = nn.Linear(2, 2)
    inner.state_shape = (5,)
    assert FixedPointLayer(Around(inner))(torch.ones(4, 3)).shape == (4, 5)


def test_as_many_nodes_as_samples_is_no_mistake_of_state_shape():
    a = 0.1 * torch.rand(4, 4)
    layer = FixedPointLayer(lambda x, z: x @ a + z, state_shape=(4,))
    assert layer(torch.ones(4, 4)).shape == (4, 4)
    b = FixedPointLayer(lambda x, z: a @ x + z, state_shape=(4,), per_sample=False)
    assert b(torch.ones(4, 4)).shape == (4, 4)
