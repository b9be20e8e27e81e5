"""What the tests of the old layer's interface share."""

from functools import partial as bind

import pytest
import torch
from helpers import Energy
from torch import nn

from fpi_cuda.compat import default_term_cond, partial

TIGHT = bind(default_term_cond, threshold=1e-28, epsilon=1e-20, maxIter=500)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


@pytest.fixture(name="m_anderson", params=[0, 4], ids=["plain", "anderson"])
def m_anderson_fixture(request):
    return request.param


class Descent(nn.Module):
    """The old layer's FPI_GD."""

    def __init__(self):
        super().__init__()
        self.energy = Energy()

    def forward(self, x, y):
        slope = partial(
            lambda x, y: self.energy(x[0], y[0]).sum(), x, y, tuple(self.energy.parameters())
        )
        return (x[0] - 0.4 * slope[0],)
