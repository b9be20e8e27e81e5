"""Steps with state of their own: batch norm, spectral norm, other parametrisations."""

import copy
import warnings

import pytest
import torch
from helpers import unroll
from helpers_layers import EXACT, Normalised, close, double, unrolled
from torch import nn
from torch.autograd import grad

from fpi_cuda import FixedPointLayer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_batch_norm_moves_its_buffers_once_a_call_and_never_in_backward(backend, solver):
    g = Normalised()
    once, z = copy.deepcopy(g), double(8, 3).requires_grad_()
    layer = FixedPointLayer(g, backend=backend, solver=solver, per_sample=False, **EXACT)
    x = layer(z)
    assert layer.last.iterations.max() > 3
    once(x.detach(), z.detach())
    for mine, true in zip(g.buffers(), once.buffers(), strict=True):
        close(mine, true)
    x.sin().sum().backward()
    assert g.norm.num_batches_tracked == 1
    layer(z)
    assert g.norm.num_batches_tracked == 2


def test_batch_norm_in_train_mode_has_the_gradient_of_its_batch_statistics(backend, solver):
    g = Normalised()
    z = double(8, 3).requires_grad_()
    tensors = (z, *g.parameters())
    true = grad(unrolled(copy_of := copy.deepcopy(g), z).sin().sum(), (z, *copy_of.parameters()))
    layer = FixedPointLayer(g, backend=backend, solver=solver, per_sample=False, **EXACT)
    for a, b in zip(grad(layer(z).sin().sum(), tensors), true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_batch_norm_in_eval_mode_moves_nothing(backend):
    g = Normalised().eval()
    before = [b.clone() for b in g.buffers()]
    z = double(8, 3).requires_grad_()
    FixedPointLayer(g, backend=backend, **EXACT)(z).sum().backward()
    for a, b in zip(g.buffers(), before, strict=True):
        assert torch.equal(a, b)


class Spectral(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(3)
        self.linear = wrap(nn.Linear(3, 3, dtype=torch.float64))

    def forward(self, x, z):
        return 0.8 * torch.tanh(self.linear(x) + z)


def old_spectral_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(module)


WRAPS = {
    "parametrization": nn.utils.parametrizations.spectral_norm,
    "hook": old_spectral_norm,
}


@pytest.mark.parametrize("wrap", list(WRAPS))
def test_spectral_norm_iterates_once_a_call_and_has_the_right_gradient(wrap, backend):
    g = Spectral(WRAPS[wrap])
    z = double(4, 3).requires_grad_()
    once, oracle = copy.deepcopy(g), copy.deepcopy(g)
    layer = FixedPointLayer(g, backend=backend, **EXACT)
    x = layer(z)
    once(x.detach(), z.detach())
    for mine, true in zip(g.buffers(), once.buffers(), strict=True):
        close(mine, true)

    # The oracle: one power iteration, then the weight is a fixed function of the raw weight.
    if wrap == "hook":
        oracle.linear(z.detach())  # computes `weight` with its graph
    weight = oracle.linear.weight

    def plain(x, z):
        return 0.8 * torch.tanh(nn.functional.linear(x, weight, oracle.linear.bias) + z)

    true_x = unroll(plain, torch.zeros(4, 3, dtype=z.dtype), z, steps=150)
    close(x, true_x)
    mine = grad(x.sin().sum(), (z, *g.parameters()))
    true = grad(true_x.sin().sum(), (z, *oracle.parameters()))
    names = [n for n, _ in g.named_parameters()]
    assert names == [n for n, _ in oracle.named_parameters()]
    for a, b in zip(mine, true, strict=True):
        close(a, b)
    after = [b.clone() for b in g.buffers()]
    layer(z).sum().backward()
    assert any(not torch.equal(a, b) for a, b in zip(g.buffers(), after, strict=True))


@pytest.mark.parametrize("wrap", list(WRAPS))
def test_spectral_norm_has_right_second_derivatives(wrap, backend):
    g = Spectral(WRAPS[wrap]).eval()
    with torch.no_grad():
        g.train()(double(1, 3), double(1, 3))
    g.eval()
    z = double(2, 3).requires_grad_()
    tensors = (z, *g.parameters())

    def second(x):
        first = grad(x.sin().sum(), tensors, create_graph=True)
        return grad(sum(t.square().sum() for t in first), tensors)

    mine = second(FixedPointLayer(g, backend=backend, **EXACT)(z))
    for a, b in zip(mine, second(unrolled(g, z)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_weight_norm_and_orthogonal_have_the_gradient_of_the_unrolled_loop(backend):
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        g = Spectral(wrap)
        z = double(2, 3).requires_grad_()
        tensors = (z, *g.parameters())
        x = FixedPointLayer(g, backend=backend, **EXACT)(z)
        true = grad(unrolled(g, z, steps=100).sin().sum(), tensors)
        for a, b in zip(grad(x.sin().sum(), tensors), true, strict=True):
            close(a, b)


def test_gru_cell_is_a_step_like_any_other(backend):
    cell = nn.GRUCell(2, 3, dtype=torch.float64)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x, z):
            return 0.5 * self.cell(z, x)

    z = double(2, 2).requires_grad_()
    tensors = (z, *cell.parameters())
    x = FixedPointLayer(Step(), state_shape=(3,), backend=backend, **EXACT)(z)
    true = grad(unroll(Step(), torch.zeros(2, 3).double(), z, steps=100).sin().sum(), tensors)
    for a, b in zip(grad(x.sin().sum(), tensors), true, strict=True):
        close(a, b)


def test_the_module_is_left_as_it_was(backend):
    g = Spectral(nn.utils.parametrizations.spectral_norm)
    before = {name: id(p) for name, p in g.named_parameters()}
    kind, keys = type(g.linear), list(g.state_dict())
    x = FixedPointLayer(g, backend=backend, **EXACT)(double(2, 3))
    x.sum().backward()
    assert {name: id(p) for name, p in g.named_parameters()} == before
    assert type(g.linear) is kind
    assert list(g.state_dict()) == keys
    assert nn.utils.parametrize.is_parametrized(g.linear)
