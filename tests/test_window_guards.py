"""When an Anderson step starts a sample's window anew, at the edges of each guard."""

import pytest
import torch
from test_primitives import DTYPES, FOREVER, device, every_backend, poisoned  # noqa: F401

from fpi_cuda.record import WINDOW, Progress


def kept(backend, dtype, first, second, restart=1e9):
    """How many iterates the window holds after two residuals, each at x = 0."""
    x = torch.zeros(1, 1, dtype=dtype)
    p = Progress(x, FOREVER)
    window = [poisoned(1, 3, 1, dtype=dtype), poisoned(1, 3, 1, dtype=dtype)]
    window.append(poisoned(1, 3, 3, dtype=p.dtype))
    for residual in (first, second):
        x.zero_()
        backend.anderson_step(p, x, x + residual, 1.0, 1e-3, restart, *window)
    return int(p.counters[0, WINDOW])


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 32.0])
def test_differences_up_to_two_roundings_of_the_value_say_nothing(backend, dtype, size):
    eps = torch.finfo(dtype).eps  # two roundings
    assert kept(backend, dtype, size, size * (1 + eps)) == 1
    assert kept(backend, dtype, size, size * (1 + 2 * eps)) == 2


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_more_than_restart_times_the_least_drops_what_was_before(backend, dtype):
    eps = torch.finfo(dtype).eps
    assert kept(backend, dtype, 1.0, 8.0, restart=8.0) == 2
    assert kept(backend, dtype, 1.0, 8.0 * (1 + eps), restart=8.0) == 1
