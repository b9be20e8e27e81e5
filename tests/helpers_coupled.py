"""Maps whose samples depend on each other, and the answers of the plain loop."""

import torch
from helpers import TIGHT, TIGHT_ADJOINT, contraction
from torch import nn

from fpi_cuda import fixed_point

EXACT = {"tolerance": TIGHT, "adjoint": TIGHT_ADJOINT, "max_iterations": 600}
B, N = 24, 3


def seeded(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chain(x, z, w):
    """Node i hears of node i - 1 alone."""
    return torch.tanh(0.9 * torch.cat([torch.zeros_like(x[:1]), x[:-1]]) @ w.mT) + z


def _graph():
    linked = (seeded(B, B, seed=5) > 1.2).double()
    return linked / linked.sum(1, keepdim=True).clamp(min=1)


LINKS = _graph()


def graph(x, z, w):
    """Nodes of a random graph, at a rate of 0.85; the first ones alone have an input."""
    return torch.tanh(0.85 * LINKS.to(x.dtype) @ x + 0.05 * x @ w.mT) + z


def attention(x, z, w):
    """Attention across the batch."""
    mix = torch.softmax(z @ z.mT, 1)
    return torch.tanh(0.6 * (mix @ x) @ w.mT + 0.2 * x) + z


def norm(x, z, w):
    """Batch norm as in training."""
    return torch.tanh(0.3 * nn.functional.batch_norm(x + z, None, None, training=True) @ w.mT) + z


def largest(x, z, w):
    """Samples of very different rates, scaled by the largest value of the batch."""
    rate = torch.linspace(0.02, 0.9, len(x), dtype=x.dtype)[:, None]
    return rate * x / (1 + 0.05 * x.abs().amax()) + z + 0.01 * x @ w.mT


def consensus(x, z, w):
    """Every sample is drawn to the mean."""
    return torch.tanh(0.5 * x.mean(0, keepdim=True) + 0.3 * x @ w.mT) + z


MAPS = {f.__name__: f for f in (chain, graph, attention, norm, largest, consensus)}


def given(name):
    """z and w; where nodes hear of each other, few of them have an input."""
    z, w = seeded(B, N, seed=1), contraction(N, 0.9, seed=2)
    if name in ("chain", "graph"):
        z[2:] = 0
    return z, w


def loop(g, z, w, steps=250):
    """The plain loop, differentiable."""
    x = torch.zeros_like(z)
    for _ in range(steps):
        x = g(x, z, w)
    return x


def solve(g, z, *params, **options):
    return fixed_point(g, torch.zeros_like(z), z, params=params, **options)


class Mixing(nn.Module):
    def __init__(self, g, w):
        super().__init__()
        self.g, self.w = g, nn.Parameter(w.clone())

    def forward(self, x, z):
        return self.g(x, z, self.w)
