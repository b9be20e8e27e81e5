"""Buffers are explicit tensors as parameters are; attributes that g sets come from the solution."""

import copy

import pytest
import torch
from helpers import unroll
from helpers_layers import EXACT, close, double
from torch import nn
from torch.autograd import grad
from torch.func import functional_call, stack_module_state

from fpi_cuda import FixedPointLayer, GradientStep, fixed_point, operators

pytestmark = pytest.mark.usefixtures("one_thread")


class Scaled(nn.Module):
    """x ↦ tanh(W x) b + z, b and an integer in buffers."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(0.2 * torch.randn(3, 3, dtype=torch.float64, generator=generator))
        self.register_buffer("b", torch.rand(3, dtype=torch.float64, generator=generator))
        self.register_buffer("twice", torch.tensor(2))
        self.register_buffer("nothing", None)

    def forward(self, x, z):
        return torch.tanh(x @ self.w.T) * self.b * self.twice / 2 + z


def unrolled(g, z):
    return unroll(g, torch.zeros_like(z), z, steps=80)


def derivatives(x, tensors):
    first = grad(x.sin().sum(), tensors, create_graph=True)
    return [*first, *grad(sum(t.square().sum() for t in first), tensors)]


def test_derivatives_by_a_buffer_are_those_by_any_tensor(backend, solver):
    layer = FixedPointLayer(Scaled(), backend=backend, solver=solver, **EXACT)
    z, b = double(4, 3).requires_grad_(), double(3).requires_grad_()
    tensors = (z, b, layer.g.w)
    x = functional_call(layer, {"g.b": b}, z)
    true = unrolled(lambda x, z: functional_call(layer.g, {"b": b}, (x, z)), z)
    for mine, a in zip(derivatives(x, tensors), derivatives(true, tensors), strict=True):
        close(mine, a)


def test_a_buffer_that_requires_gradients_gets_its_gradient():
    layer = FixedPointLayer(Scaled(), **EXACT)
    layer.g.b.requires_grad_()
    z = double(4, 3)
    layer(z).sin().sum().backward()
    (true,) = grad(unrolled(layer.g, z).sin().sum(), layer.g.b)
    close(layer.g.b.grad, true)


def test_torch_func_differentiates_by_a_buffer_to_the_second_order():
    layer, z, b = FixedPointLayer(Scaled(), **EXACT), double(2, 3), double(3)

    def mine(b):
        return functional_call(layer, {"g.b": b}, z).sin().sum()

    def true(b):
        return unrolled(lambda x, z: functional_call(layer.g, {"b": b}, (x, z)), z).sin().sum()

    for f in (torch.func.grad, lambda f: torch.func.jacrev(torch.func.grad(f))):
        close(f(mine)(b), f(true)(b))


def test_an_ensemble_is_mapped_over_stacked_parameters_and_buffers():
    steps, z = [Scaled(seed) for seed in range(3)], double(4, 3)
    layers = [FixedPointLayer(step, **EXACT) for step in steps]
    params, buffers = stack_module_state(layers)

    def one(params, buffers):
        return functional_call(layers[0], (params, buffers), z)

    together = torch.vmap(one)(params, buffers)
    close(together, torch.stack([layer(z) for layer in layers]))
    of_buffers = torch.func.grad(lambda b: torch.vmap(one)(params, b).sin().sum())
    buffers = {name: b for name, b in buffers.items() if name != "g.twice"}
    for i, step in enumerate(steps):
        step.b.requires_grad_()
        (true,) = grad(unrolled(step, z).sin().sum(), step.b)
        close(of_buffers(buffers)["g.b"][i], true)


def test_buffers_of_training_batch_norm_pass_torch_func_and_the_second_order():
    norm = nn.BatchNorm1d(3, dtype=torch.float64)
    g = nn.Sequential(norm)
    g.forward = lambda x, z: torch.tanh(0.2 * x + norm(z + 0.1 * x))
    z = double(5, 3).requires_grad_()
    twin = copy.deepcopy(norm)
    layer = FixedPointLayer(g, per_sample=False, **EXACT)
    tensors = (z, norm.weight)
    true = derivatives(
        unrolled(lambda x, z: torch.tanh(0.2 * x + twin(z + 0.1 * x)), z), (z, twin.weight)
    )
    for mine, a in zip(derivatives(layer(z), tensors), true, strict=True):
        torch.testing.assert_close(mine, a, rtol=1e-8, atol=1e-8)
    assert norm.num_batches_tracked == 1
    (mine,) = torch.func.vjp(lambda z: layer(z).sin().sum(), z.detach())[1](torch.ones(()).double())
    torch.testing.assert_close(mine, true[0], rtol=1e-8, atol=1e-8)
    assert norm.num_batches_tracked == 1


class Counting(nn.Module):
    """Counts its calls in a buffer, in any mode; scales by another one."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("b", torch.full((3,), 0.5, dtype=torch.float64))

    def forward(self, x, z):
        if self.how == "written":
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return self.b * torch.tanh(x) + z


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["written", "assigned"])
def test_a_buffer_moves_once_a_call_and_never_in_backward(how, training, backend):
    g = Counting(how).train(training)
    layer = FixedPointLayer(g, backend=backend, **EXACT)
    z = double(4, 3).requires_grad_()
    x = layer(z)
    assert g.calls == 1
    (first,) = grad(x.sin().sum(), z, create_graph=True)
    first.sum().backward()
    assert g.calls == 1
    with torch.no_grad():
        layer(z)
    with torch.inference_mode():
        layer(z)
    assert g.calls == 3


def test_a_buffer_written_to_after_the_solve_leaves_backward_right():
    layer = FixedPointLayer(Scaled(), **EXACT)
    z = double(4, 3).requires_grad_()
    (true,) = grad(layer(z).sin().sum(), z)
    x = layer(z)
    layer.g.b.zero_()
    close(grad(x.sin().sum(), z)[0], true)


# --- P ---------------------------------------------------------------------------------------


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.register_buffer("b", double(3))
        self.aux = None

    def forward(self, x):
        self.aux = x.square().sum()
        return (self.norm(x) * self.b).sin().sum() + self.aux


@pytest.mark.parametrize("graph", [True, False])
def test_partial_moves_buffers_once_and_sets_attributes(graph):
    r, x = Energy(), double(4, 3).requires_grad_()
    twin = copy.deepcopy(r)
    with torch.set_grad_enabled(graph):
        (mine,) = operators.partial(r, x)
    (true,) = grad(twin(x), x, create_graph=True)
    close(mine, true)
    close(r.norm.running_mean, twin.norm.running_mean)
    assert r.norm.num_batches_tracked == 1
    close(r.aux, twin.aux)
    if graph:
        again = grad(mine.sin().sum(), (x, r.norm.weight))  # torch has no third order from 2.14 on
        for a, b in zip(again, grad(true.sin().sum(), (x, twin.norm.weight)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        assert r.norm.num_batches_tracked == 1


def test_partial_is_differentiable_by_buffers_and_mapped_over_them():
    r, x = Energy().eval(), double(4, 3)
    r.norm.reset_running_stats()

    def mine(b):
        return functional_call(P(r), {"r.b": b}, x).sin().sum()

    def true(b):
        def energy(x):
            return functional_call(r, {"b": b}, x)

        return torch.func.grad(energy)(x).sin().sum()

    b = double(5, 3)
    close(torch.func.grad(mine)(b[0]), torch.func.grad(true)(b[0]))
    close(torch.vmap(torch.func.grad(mine))(b), torch.vmap(torch.func.grad(true))(b))
    b0 = b[0].clone().requires_grad_()
    for a, c in zip(derivatives(mine(b0), (b0,)), derivatives(true(b0), (b0,)), strict=True):
        close(a, c)


class P(nn.Module):
    def __init__(self, r):
        super().__init__()
        self.r = r

    def forward(self, x):
        return operators.partial(self.r, x)[0]


# --- attributes ------------------------------------------------------------------------------


class Router(nn.Module):
    """A step that leaves a loss behind."""

    def __init__(self, norm=False):
        super().__init__()
        self.gate = nn.Linear(3, 3, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64) if norm else nn.Identity()
        self.aux, self.calls = None, 0

    def forward(self, x, z):
        self.calls += 1
        gate = torch.softmax(self.gate(x), 1)
        self.aux = gate.square().sum()
        return 0.5 * gate * torch.tanh(x) + self.norm(z)


@pytest.mark.parametrize("way", ["module", "child", "method"])
def test_attributes_are_those_of_the_solution_attached_to_it(way, backend, solver):
    g = Router()
    around = {"module": g, "child": Child(g), "method": Child(g).forward}[way]
    layer = FixedPointLayer(around, backend=backend, solver=solver, **EXACT)
    twin, z = copy.deepcopy(g), double(4, 3).requires_grad_()
    x, true_x = layer(z), unrolled(twin, z)
    twin(true_x, z)
    assert g.calls == 1
    close(g.aux, twin.aux)
    losses = (g.aux + x.sum()), (twin.aux + true_x.sum())
    tensors = ((z, *g.parameters()), (z, *twin.parameters()))
    for a, b in zip(*map(grad, losses, tensors, (None,) * 2, (True,) * 2), strict=True):
        close(a, b)
    assert g.calls == 1
    with torch.no_grad():
        layer(z)
    assert not g.aux.requires_grad
    assert g.calls == 2


class Child(nn.Module):
    def __init__(self, g):
        super().__init__()
        self.inner = g

    def forward(self, x, z):
        return self.inner(x, z)


def test_one_call_sets_attributes_and_moves_buffers():
    g = Router(norm=True)
    FixedPointLayer(g, per_sample=False, **EXACT)(double(4, 3).requires_grad_())
    assert g.calls == g.norm.num_batches_tracked == 1
    assert g.aux.requires_grad


def test_attributes_of_an_energy_are_set_at_the_solution():
    energy = Attentive()
    layer = FixedPointLayer(GradientStep(energy, 0.5), **EXACT)
    x = layer(double(4, 3).requires_grad_())
    close(energy.seen, x.detach())
    assert energy.norm.num_batches_tracked == 1


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, x, z):
        self.norm(x)
        self.seen = x
        return (x - z).square().sum(1)


def test_a_step_without_attributes_of_its_own_is_called_no_more_often():
    calls, net = 0, Scaled().eval()

    def g(x, z):
        nonlocal calls
        calls += 1
        return net(x, z)

    solution = fixed_point(g, torch.zeros(4, 3).double(), double(4, 3), per_sample=True, **EXACT)
    assert calls == solution.record.evaluations
