"""Modules that g calls without being one: closures, partials, methods, patches, torch.compile."""

# ruff: noqa: PLC3002, PLW0108 - lambdas around modules are what this is about

import copy
import functools
import pickle
import sys
import types
import warnings

import pytest
import torch
from helpers import Net, unroll
from helpers_layers import EXACT, Normalised, close, double
from torch import nn
from torch.autograd import grad

from fpi_cuda import DenseStep, FixedPointLayer, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")
LOOSE = {"rtol": 1e-8, "atol": 1e-8}


class Holder:
    """A plain object around a module."""

    def __init__(self, net):
        self.net = net

    def step(self, x, z):
        return self.net(x, z)

    def __call__(self, x, z):
        return self.net(x, z)


class Model(nn.Module):
    """A layer inside the module that its g closes over."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.unused = nn.Linear(3, 3, dtype=torch.float64)
        self.layer = FixedPointLayer(lambda x, z: self.net(x, z), **EXACT)

    def whole(self, x, z):
        return handed_on(self, x, z)

    @property
    def alias(self):
        return self.net

    def helper(self, x, z):
        self.seen = x
        return sum(self.alias(x, z) for _ in range(1))

    def through_members(self, x, z):
        return self.helper(x, z)

    def make(self):
        return lambda x, z: self.net(x, z)


def handed_on(model, x, z):
    return model.net(x, z)


class Scaled(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, z):
        return 0.8 * self.net(x, z)


def spectral(norm):
    net = Net(d=3)
    if norm == "parametrization":
        nn.utils.parametrizations.spectral_norm(net.a)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.spectral_norm(net.a)
    return net


def nested(net):
    def inner(x, z):
        return net(x, z)

    def outer(x, z):
        return inner(x, z)

    return outer


def recursive(net):
    def g(x, z, again=True):
        return g(x, z, False) if again else net(x, z)

    return g


def patched(net):
    net = copy.copy(net)  # the same parameters and buffers: the caller's are those that move
    plain = net.forward
    net.forward = lambda x, z: plain(x, z)
    return net


def patched_method(net):
    outer = nn.Module()
    outer.net = net
    outer.forward = types.MethodType(lambda self, x, z: self.net(x, z), outer)
    return outer


def hooked(net):
    outer = nn.Identity()
    outer.register_forward_hook(lambda m, args, y: net(y, args[1]))
    outer.forward = lambda x, z: x
    return outer


def unregistered(net):
    outer = nn.Module()
    outer.nets = [net]
    outer.forward = lambda x, z: outer.nets[0](x, z)
    return outer


def submodule_compiled(net):
    outer = nn.Module()
    outer.net = torch.compile(net, backend="eager")
    outer.forward = types.MethodType(lambda self, x, z: self.net(x, z), outer)
    return outer


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


def by_globals(net):
    globals()["NET"] = net
    return lambda x, z: helper(x, z) + SHIFT


def helper(x, z):
    return NET(x, z)


NET = None
SHIFT = 0.0


def test_globals_other_than_modules_are_those_of_now(monkeypatch):
    z = double(4, 3)
    layer = FixedPointLayer(by_globals(Net(d=3)), **EXACT)
    before = layer(z)
    monkeypatch.setattr(sys.modules[__name__], "SHIFT", 0.5)
    assert not torch.allclose(layer(z), before)


WAYS = {
    "globals": by_globals,
    "module": lambda net: net,
    "lambda": lambda net: lambda x, z: net(x, z),
    "default": lambda net: lambda x, z, net=net: net(x, z),
    "keyword default": lambda net: lambda x, z, *, net=net: net(x, z),
    "partial": lambda net: functools.partial(lambda f, x, z: f(x, z), net),
    "partial of the module": lambda net: functools.partial(net),
    "keyword of a partial": lambda net: functools.partial(lambda x, z, f: f(x, z), f=net),
    "bound method": lambda net: net.step,
    "bound forward": lambda net: net.forward,
    "object's method": lambda net: Holder(net).step,
    "callable object": Holder,
    "closure over an object": lambda net: (lambda h: lambda x, z: h.net(x, z))(Holder(net)),
    "method of a model": lambda net: Model(net).through_members,
    "nested closure": nested,
    "recursive function": recursive,
    "list": lambda net: (lambda nets: lambda x, z: nets[0](x, z))([net]),
    "nested containers": lambda net: (lambda d: lambda x, z: d["a"][0](x, z))({"a": (net,)}),
    "model around the layer": lambda net: Model(net).layer.g,
    "model's method": lambda net: Model(net).make(),
    "patched forward": patched,
    "patched by a method": patched_method,
    "hook": hooked,
    "unregistered": unregistered,
}
COMPILED = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled in place": compiled_in_place,
    "compiled submodule": submodule_compiled,
    "compiled function": lambda net: torch.compile(lambda x, z: net(x, z), backend="eager"),
    "lambda around compiled": lambda net: (lambda c: lambda x, z: c(x, z))(
        torch.compile(net, backend="eager")
    ),
}


def unrolled(g, z, steps=60):
    return unroll(g, torch.zeros(len(z), 3, dtype=z.dtype), z, steps=steps)


def derivatives(x, tensors):
    first = grad(x.sin().sum(), tensors, create_graph=True)
    return [*first, *grad(sum(t.square().sum() for t in first), tensors)]


@pytest.mark.parametrize("way", [*WAYS, *COMPILED])
def test_a_found_module_is_as_one_that_is_g(way):
    """Derivatives of both orders are right, buffers move once, and modes are those of the solve."""
    net, z = Normalised(), double(5, 3).requires_grad_()
    twin = copy.deepcopy(net)
    g = {**WAYS, **COMPILED}[way](net)
    layer = FixedPointLayer(g, per_sample=False, **EXACT)

    x, true_x = layer(z), unrolled(twin, z)
    close(x, true_x)
    assert net.norm.num_batches_tracked == 1
    mine = derivatives(x, (z, *net.parameters()))
    for a, b in zip(mine, derivatives(true_x, (z, *twin.parameters())), strict=True):
        torch.testing.assert_close(a, b, **LOOSE)
    assert net.norm.num_batches_tracked == 1

    for m in (net, twin):
        m.norm.reset_running_stats()
        m.eval()
    x, true_x = layer(z), unrolled(twin, z)
    net.train()  # too late for this solve
    if isinstance(g, nn.Module):
        g.train()
    mine = grad(x.sin().sum(), (z, *net.parameters()))
    true = grad(true_x.sin().sum(), (z, *twin.parameters()))
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, **LOOSE)
    assert net.norm.num_batches_tracked == 0


@pytest.mark.parametrize("way", ["lambda", "model's method", "compiled", "patched forward"])
def test_torch_func_sees_through_to_a_found_module(way):
    net, z = Normalised(), double(5, 3)
    twin = copy.deepcopy(net)
    g = {**WAYS, **COMPILED}[way](net)

    def loss(z):
        return fixed_point(g, torch.zeros_like(z), z, per_sample=False, **EXACT).x.sin().sum()

    mine = torch.func.grad(loss)(z)
    z = z.clone().requires_grad_()
    (true,) = grad(unrolled(twin, z).sin().sum(), z)
    torch.testing.assert_close(mine, true, **LOOSE)


def test_a_hook_of_a_compiled_module_still_runs():
    from torch._dynamo.utils import counters

    seen, compiled = [], dict(counters["frames"])
    g = torch.compile(Normalised().eval(), backend="eager")
    g.register_forward_hook(lambda m, args, y: seen.append(len(y)))
    z = double(5, 3)
    FixedPointLayer(g, per_sample=False, **EXACT)(z)
    assert seen[0] == 5
    assert compiled == dict(counters["frames"])  # g ran as what it was made of


def test_a_compiled_step_of_known_layers_is_solved_whole():
    step = DenseStep(3, 3).double()
    z = double(4, 3).requires_grad_()
    layer, plain = (FixedPointLayer(g, **EXACT) for g in (torch.compile(step), step))
    mine, true = (derivatives(of(z), (z, *step.parameters())) for of in (layer, plain))
    assert layer.last.path == plain.last.path
    assert "whole" in layer.last.path
    for a, b in zip(mine, true, strict=True):
        close(a, b)


def test_variables_of_a_closure_stay_shared_and_captured_tensors_attached():
    net, calls, b = Net(d=3), 0, double(3).requires_grad_()

    def g(x, z):
        nonlocal calls
        calls += 1
        return net(x, z) + 0.1 * b

    z = double(4, 3).requires_grad_()
    x = FixedPointLayer(g, per_sample=False, **EXACT)(z)
    assert calls > 3
    tensors = (z, b, *net.parameters())
    true = grad(unrolled(g, z, steps=150).sin().sum(), tensors)
    for mine, a in zip(grad(x.sin().sum(), tensors), true, strict=True):
        close(mine, a)


def test_two_ways_to_one_module_give_one_module():
    net = Net(d=3)
    pair = [net, functools.partial(net)]

    def g(x, z, other=net):
        return 0.5 * pair[0](x, z) + 0.3 * pair[1](x, z) + 0.2 * other(x, z)

    z = double(4, 3).requires_grad_()
    x = FixedPointLayer(g, per_sample=False, **EXACT)(z)
    tensors = (z, *net.parameters())
    true = derivatives(unrolled(net, z, steps=150), tensors)
    for mine, a in zip(derivatives(x, tensors), true, strict=True):
        close(mine, a)


def test_only_what_code_looks_up_counts_of_an_object():
    """The rest of a model is no part of the solve: it may be stepped before backward."""
    model = Model(Net(d=3))
    z = double(4, 3).requires_grad_()
    for layer in (model.layer, FixedPointLayer(model.through_members, **EXACT)):
        x = layer(z)
        with torch.no_grad():
            model.unused.weight.add_(1)
        (first,) = grad(x.sin().sum(), model.net.a.weight, create_graph=True)  # it was found
        first.sum().backward()
        assert model.unused.weight.grad is None
    close(model.seen, x)
    x = FixedPointLayer(model.whole, **EXACT)(z)  # hands the model on: all of it may be read
    with torch.no_grad():
        model.unused.weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        x.sum().backward()


@pytest.mark.parametrize("norm", ["parametrization", "hook"])
def test_spectral_norm_in_a_closure_iterates_once_a_call(norm):
    net = spectral(norm)
    z = double(4, 3).requires_grad_()
    oracle, layer = copy.deepcopy(net), FixedPointLayer(lambda x, z: 0.8 * net(x, z), **EXACT)
    module = FixedPointLayer(Scaled(oracle), **EXACT)
    x, true = layer(z), module(z)
    close(x, true)
    for a, b in zip(net.buffers(), oracle.buffers(), strict=True):
        close(a, b)
    mine = derivatives(x, (z, *net.parameters()))
    for a, b in zip(mine, derivatives(true, (z, *oracle.parameters())), strict=True):
        close(a, b)


def test_copies_pickles_and_averages_of_a_model_solve_by_their_own_modules():
    model = nn.Sequential(FixedPointLayer(Scaled(Net(d=3)), **EXACT))
    z = double(4, 3)
    before = model(z)
    average = torch.optim.swa_utils.AveragedModel(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), average]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    assert not torch.allclose(model(z), before)
    for other in copies:
        close(other(z), before)
