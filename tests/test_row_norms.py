"""Norms of rows: right whatever their scale, and the same bits under a power of two."""

import math

import pytest
import torch
from helpers_derivatives import double

from fpi_cuda.norms import row_norms

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("look", [True, False])
def test_rows_times_a_power_of_two_have_their_norms_times_it(look):
    rows = double(3, 7)
    before = row_norms(rows, look)
    for exponent in range(-1000, 1001, 50):
        assert torch.equal(row_norms(rows * 2.0**exponent, look), before * 2.0**exponent)
    torch.testing.assert_close(before, torch.linalg.vector_norm(rows, dim=1), rtol=1e-15, atol=0)


@pytest.mark.parametrize("look", [True, False])
def test_rows_of_different_scales_of_nothing_and_of_what_is_not_finite(look):
    tiny = 5e-324
    rows = [[3, 4], [0, 0], [3e200, 4e200], [tiny, 0], [math.inf, 1], [math.nan, 1], [3e-200, 0]]
    norms = row_norms(torch.tensor(rows, dtype=torch.float64), look)
    expected = torch.tensor([5, 0, 5e200, tiny, math.inf, math.nan, 3e-200], dtype=torch.float64)
    torch.testing.assert_close(norms, expected, rtol=1e-15, atol=0, equal_nan=True)
    assert row_norms(torch.zeros(2, 0), look).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrower_dtypes_are_summed_in_float64(dtype):
    least = torch.finfo(dtype).tiny
    rows = torch.tensor([[3, 4], [0.25, 0]], dtype=dtype) * least
    assert row_norms(rows).tolist() == [5 * least, least / 4]


def test_derivatives_and_transforms():
    rows = (double(3, 4) * 2.0**-900).requires_grad_()
    (d,) = torch.autograd.grad(row_norms(rows, look=False).sum(), rows)
    torch.testing.assert_close(d, torch.nn.functional.normalize(double(3, 4), dim=1))
    try:
        torch.vmap(lambda t: t.view(torch.int64))(rows.detach())
    except RuntimeError:
        pytest.skip("this torch (2.11) maps no view in another dtype, nor does any solve ask it to")
    mapped = torch.vmap(lambda t: row_norms(t, look=False))(torch.stack([rows.detach()] * 2))
    assert torch.equal(mapped[1], row_norms(rows.detach()))
