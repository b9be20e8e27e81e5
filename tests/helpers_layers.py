"""What the tests of layers share."""

import torch
from helpers import TIGHT, TIGHT_ADJOINT, unroll
from torch import nn

from fpi_cuda import FixedPointLayer, NeuralStep

EXACT = {"tolerance": TIGHT, "adjoint": TIGHT_ADJOINT, "max_iterations": 500}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def layer_of(net, **options):
    return FixedPointLayer(NeuralStep(net), state_shape=(3,), **{**EXACT, **options})


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def unrolled(net, z, steps=150):
    return unroll(net, torch.zeros(len(z), 3, dtype=z.dtype), z, steps=steps)


class Normalised(nn.Module):
    """A contraction with batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.mul_(0.2)

    def forward(self, x, z):
        return torch.tanh(self.linear(x) + self.norm(z + 0.1 * x))

    def step(self, x, z):
        return self(x, z)
