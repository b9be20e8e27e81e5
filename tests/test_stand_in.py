"""A kept sample's row stands in for a failed one's in the backward: there zero times NaN is NaN."""

import math

import pytest
import torch
from helpers_derivatives import double
from torch.autograd import grad

from fpi_cuda import Picard, fixed_point

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning"),
]


def g(x, z, w):
    """Its derivatives by x, z and w are NaN where x or z is."""
    return torch.tanh((x * w).roll(1, 1) + z) * 0.9


def gradients(way, x0, z, w, backend):
    """Of a loss on all samples, by z and w."""
    z, w = z.clone().requires_grad_(), w.clone().requires_grad_()
    options = {"solver": Picard(), "backend": backend, "per_sample": True}
    if way == "captured":
        x = fixed_point(lambda x, z: g(x, z, w), x0, z, **options).x
    else:
        x = fixed_point(g, x0, z, params=(w,), **options).x
    return grad(x.nan_to_num().sin().sum(), (z, w), create_graph=way == "any order")


@pytest.mark.parametrize("way", ["first order", "any order", "captured"])
@pytest.mark.parametrize("where", ["x0", "z", "both"])
@pytest.mark.parametrize("bad", [[0, 2], [3], [1, 2, 3]], ids=str)
def test_what_the_batch_shares_has_the_gradient_of_the_good_samples(backend, way, where, bad):
    x0, z, w = torch.zeros(4, 3).double(), double(4, 3), double(3, seed=1, scale=0.4)
    if where != "z":
        x0[bad, 1] = math.nan
    if where != "x0":
        z[bad, 2] = math.nan
    good = [i for i in range(4) if i not in bad]
    for_z, for_w = gradients(way, x0, z, w, backend)
    expected_z, expected_w = gradients(way, x0[good], z[good], w, backend)
    torch.testing.assert_close(for_w, expected_w)
    torch.testing.assert_close(for_z[good], expected_z)
    assert not for_z[bad].any()
