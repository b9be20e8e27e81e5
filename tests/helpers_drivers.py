"""What the tests of drivers share."""

import warnings

import pytest
import torch
from helpers import contraction, row_tanh
from torch import nn

from fpi_cuda import FixedPointLayer, Picard, fixed_point


class Tardy:
    """A copy that has arrived when it was asked for the n-th time."""

    def __init__(self, polls):
        self.polls = polls

    def take(self, tally):
        self.copy, self.left = tally.tolist(), self.polls

    def ready(self):
        self.left -= 1
        return self.left < 0

    def wait(self):
        self.left = 0

    def values(self):
        return self.copy


def uneven(b=24, n=4):
    """Samples that need very different numbers of iterations; g is exact in any batch."""
    w = contraction(n, 0.97, seed=1)
    z = torch.linspace(0.01, 3, b, dtype=torch.float64)[:, None] * torch.ones(n).double()
    return lambda x, z: row_tanh(x, z, w), torch.zeros_like(z), z[torch.randperm(b)]


def solved(g, x0, z, **options):
    z = z.detach().clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = fixed_point(g, x0, z, **options)
    (gradient,) = torch.autograd.grad(s.x.square().sum(), z)
    return s, gradient


class Affine(nn.Module):
    """x ↦ tanh(s W x + shift) + z, with a buffer and a Python number."""

    def __init__(self, n=3):
        super().__init__()
        self.weight = nn.Parameter(contraction(n, 0.6, seed=2))
        self.register_buffer("shift", torch.full((n,), 0.1, dtype=torch.float64))
        self.scale = 1.0

    def forward(self, x, z):
        return torch.tanh(self.scale * (x @ self.weight.mT) + self.shift) + z


@pytest.fixture(name="tanh_calls")
def tanh_calls_fixture(monkeypatch):
    """How often Python has called torch.tanh, as `Affine` does once: a list, for its length."""
    calls, tanh = [], torch.tanh

    def counted(x):
        calls.append(1)
        return tanh(x)

    monkeypatch.setattr(torch, "tanh", counted)
    return calls


def forward_backward(g, z, **options):
    """x̂ and the gradients of z and of g's parameters."""
    z = z.detach().clone().requires_grad_()
    layer = FixedPointLayer(g, per_sample=True, **options)
    x = layer(z)
    wanted = [z, *(p for p in g.parameters() if p.requires_grad)]
    return layer.last, [x.detach(), *torch.autograd.grad(x.square().sum(), wanted)]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def halve(g):
    with torch.no_grad():
        g.weight.mul_(0.5)


def replace_buffer(g):
    g.shift = g.shift + 1


def assign(g):
    g.load_state_dict({k: v.clone() * 0.5 for k, v in g.state_dict().items()}, assign=True)


class Residual(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, z):
        return 0.5 * self.net(x) + z


def unquiet(g, z, **options):
    z = z.clone().requires_grad_()
    s = fixed_point(g, torch.zeros_like(z), z, solver=Picard(), per_sample=True, **options)
    return s, torch.autograd.grad(s.x.sum(), z)[0]
