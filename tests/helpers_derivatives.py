"""What the tests of derivatives share."""

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, Energy, Net

from fpi_cuda import FixedPointLayer, GradientStep, NeuralStep


def tight(backend, solver):
    return {
        "solver": solver,
        "backend": backend,
        "tolerance": TIGHT,
        "adjoint": TIGHT_ADJOINT,
        "max_iterations": 500,
    }


@pytest.fixture(name="options")
def options_fixture(backend, solver):
    return tight(backend, solver)


def double(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=g)


def scalar_g(x, a):
    return torch.tanh(0.6 * x + a)


def form(name, options):
    step = NeuralStep(Net()) if name == "NN" else GradientStep(Energy(), 0.4)
    return FixedPointLayer(step, state_shape=(3,), **options)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
