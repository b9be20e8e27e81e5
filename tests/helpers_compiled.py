"""What the tests of compiled layers share."""

import pytest
import torch
from helpers import Net
from helpers_layers import EXACT, close, double
from torch.autograd import grad

from fpi_cuda import (
    DenseEnergy,
    DenseStep,
    FixedPointLayer,
    GradientStep,
    NeuralStep,
)

MARKS = [
    pytest.mark.usefixtures("one_thread", "fresh_compiler"),
    pytest.mark.no_poison,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # dynamo looks at it
]

Z = double(5, 3)
NET = Net(d=3)
W = (0.3 * double(3, 3)).requires_grad_()


def compiled(f, backend="aot_eager", **options):
    return torch.compile(f, backend=backend, fullgraph=True, **options)


def layer_of(g, **options):
    return FixedPointLayer(g, **{**EXACT, **options})


def same(f, inputs, parameters=(), backend="aot_eager", loss=lambda y: y.sin().sum()):
    """The compiled function has the eager one's value and gradients."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    of, found = [*inputs, *parameters], []
    for call in (compiled(f, backend), f):
        value = loss(call(*inputs))
        found.append((value, *grad(value, of, allow_unused=True)))
    for mine, true in zip(*found, strict=True):
        if true is None:
            assert mine is None
        else:
            close(mine, true)


def around(x, z):
    return NET(x, z)


STEPS = {
    "module": lambda: Net(d=3),
    "function around a module": lambda: around,
    "dense": lambda: DenseStep(3, 3),
    "two dense layers": lambda: NeuralStep(DenseStep(3, 3, 5)),
    "dense energy": lambda: GradientStep(DenseEnergy(3, 3, 6), 0.2),
    "energy": lambda: GradientStep(lambda x, z: (x * x).sum(1) + (x * z).sin().sum(1), 0.2),
}


LAYER = layer_of(NET)
