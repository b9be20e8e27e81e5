"""The fixture that perturbs library products does, and only them."""

import numpy as np
import pytest
import torch
from products import perturbed
from torch.nn import functional as F

pytestmark = pytest.mark.plain_products  # each test perturbs them itself

ORDER = torch.tensor([2, 0, 3, 1])


def conv_gradient(z, kernel):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(F.conv2d(z, kernel).square().sum(), z)[0]


def linear_gradient(z, w):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(F.linear(z, w).square().sum(), z)[0]


def autocast(z, w):
    with torch.autocast("cpu", torch.bfloat16):
        return z @ w


def alone(z, found):
    return zip(z.split(1), found.split(1), strict=True)


ROWS = (4, 37)
MATRICES = (4, 5, 5)
IMAGES = (4, 2, 5, 5)
OPERATORS = {
    "mm": (lambda z, w: z @ w, ROWS, (37, 37)),
    "batch in the columns": (lambda z, w: (w @ z.mT).mT, ROWS, (37, 37)),
    "mv": (lambda z, w: z @ w, (4, 37), (37,)),
    "linear": (F.linear, ROWS, (37, 37)),
    "linear with bias": (lambda z, w: F.linear(z, w, w[0]), ROWS, (37, 37)),
    "linear's gradient": (linear_gradient, ROWS, (37, 37)),
    "bmm": (lambda z, w: z @ z.mT, MATRICES, (1,)),
    "baddbmm": (lambda z, w: torch.baddbmm(z, z, z), MATRICES, (1,)),
    "einsum": (lambda z, w: torch.einsum("bij,jk->bik", z, w), MATRICES, (5, 5)),
    "vmap": (lambda z, w: torch.func.vmap(lambda row: w @ row)(z), ROWS, (37, 37)),
    "jvp": (lambda z, w: torch.func.jvp(lambda t: t @ w, (z,), (z,))[1], ROWS, (37, 37)),
    "conv2d": (F.conv2d, IMAGES, (3, 2, 3, 3)),
    "conv_transpose2d": (F.conv_transpose2d, IMAGES, (2, 3, 3, 3)),
    "conv2d's gradient": (conv_gradient, IMAGES, (3, 2, 3, 3)),
    "solve": (torch.linalg.solve, MATRICES, (5, 1)),
    "autocast": (autocast, ROWS, (37, 37)),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_rows_bits_depend_on_its_place(name, dtype):
    if dtype == torch.bfloat16 and name in ("solve", "autocast"):
        pytest.skip("not of this dtype")
    operator, shape, others = OPERATORS[name]
    z, w = torch.randn(shape).to(dtype), torch.randn(others).to(dtype)
    plain = operator(z, w)
    with perturbed():
        found = operator(z, w)
        assert torch.equal(operator(z.clone(), w), found), "the same call, the same bits"
        assert not torch.equal(operator(z[ORDER], w), found[ORDER])
        assert any(not torch.equal(operator(row, w), at) for row, at in alone(z, found))
    assert torch.equal(operator(z, w), plain), "the block has ended"
    rtol = 200 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, plain, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_a_value_moves_by_one_unit_in_the_last_place(dtype):
    z, w = torch.randn(40, 7).to(dtype), torch.randn(7, 40).to(dtype)
    plain = z @ w
    with perturbed():
        found = z @ w
    a, b = plain.numpy(), found.numpy()
    assert set(np.unique(np.round((b - a) / np.spacing(np.minimum(abs(a), abs(b)))))) == {-1, 0, 1}


def test_zeros_and_what_is_not_finite_stay():
    z = torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]])
    plain = z @ torch.eye(2).abs().add(1)
    with perturbed():
        found = z @ torch.eye(2).abs().add(1)
    torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)


def test_sums_and_elementwise_functions_stay():
    z = torch.randn(5, 300)
    plain = z.tanh().sum(1), torch.linalg.vector_norm(z, dim=1)
    with perturbed():
        found = z.tanh().sum(1), torch.linalg.vector_norm(z, dim=1)
    assert all(map(torch.equal, found, plain))


def test_inside_a_device_context_and_a_dispatch_mode():
    from torch.utils.flop_counter import FlopCounterMode

    z = torch.randn(4, 4)
    with perturbed(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        found = z @ z
    assert not torch.equal(found, z @ z)
    assert counter.get_total_flops() == 2 * 4**3
