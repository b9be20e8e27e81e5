"""Norms and bounds of convolutions, against their matrices in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers_contraction import matrix

from fpi_cuda.contraction import convolution_bound, convolution_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def kernel(o, i, k, seed=0, dtype=torch.float64):
    k = (k, k) if isinstance(k, int) else k
    return torch.randn(o, i, *k, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def supremum(weight, n=96) -> float:
    """Of the symbol's norm over a fine grid; short of the true one by at most 0.3 % for k = 5."""
    symbols = torch.fft.fft2(weight, s=(n, n)).permute(2, 3, 0, 1)
    return float(torch.linalg.matrix_norm(symbols, 2).max())


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
@pytest.mark.parametrize("k", [1, 3, 5, (3, 5)])
@pytest.mark.parametrize(("o", "i"), [(1, 1), (3, 2), (2, 4)])
def test_convolution_norm_is_that_of_its_matrix(o, i, k, size):
    weight = kernel(o, i, k)
    true = torch.linalg.matrix_norm(matrix(weight, size), 2)
    early, _ = convolution_norm(weight, size, iterations=1)
    norm, v = convolution_norm(weight, size, iterations=400)
    assert early <= true * (1 + 1e-12)
    torch.testing.assert_close(norm, true, rtol=1e-4, atol=0)
    assert v.shape == (i, *size)
    torch.testing.assert_close(torch.linalg.vector_norm(v), torch.ones_like(true))


def test_power_iteration_goes_on_from_v():
    weight, start = kernel(3, 2, 3), kernel(2, 4, (6, 7), 1)[:, 0]
    _, half = convolution_norm(weight, (6, 7), v=start)
    two = convolution_norm(weight, (6, 7), iterations=3, v=half)
    one = convolution_norm(weight, (6, 7), iterations=13, v=1e3 * start)
    torch.testing.assert_close(two, one)
    at_start, v = convolution_norm(weight, (6, 7), iterations=0, v=start)
    torch.testing.assert_close(v, start / torch.linalg.vector_norm(start))
    out = F.conv2d(v, weight, padding=1)
    torch.testing.assert_close(at_start, torch.linalg.vector_norm(out))


def test_the_estimate_follows_a_moving_weight_better_than_plain_iteration():
    size, ours, theirs = (8, 8), 0.0, 0.0
    _, v = convolution_norm(kernel(4, 4, 3, 2), size, iterations=100)
    plain = v
    for t in range(40):  # other singular vectors overtake
        weight = kernel(4, 4, 3, 2) + 0.05 * t * kernel(4, 4, 3, 102)
        true = float(torch.linalg.matrix_norm(matrix(weight, size), 2))
        norm, v = convolution_norm(weight, size, v=v)
        for _ in range(10):
            plain = F.conv_transpose2d(F.conv2d(plain, weight, padding=1), weight, padding=1)
            plain = plain / torch.linalg.vector_norm(plain)
        other = torch.linalg.vector_norm(F.conv2d(plain, weight, padding=1))
        ours, theirs = max(ours, 1 - float(norm) / true), max(theirs, 1 - float(other) / true)
    assert ours < 0.05
    assert ours < 0.7 * theirs


def test_norm_of_a_convolution_is_not_that_of_its_flattened_matrix():
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)  # 3 flattened
    norm, _ = convolution_norm(weight, (32, 32), iterations=50)
    assert 8.8 < norm < 9


def test_derivative_of_the_norm():
    weight = kernel(3, 2, 3).requires_grad_()
    _, v = convolution_norm(weight, (4, 5), iterations=2)
    assert torch.autograd.gradcheck(
        lambda w: convolution_norm(w, (4, 5), iterations=0, v=v)[0], weight
    )
    norm, v = convolution_norm(weight, (4, 5), iterations=400)
    assert not v.requires_grad
    (got,) = torch.autograd.grad(norm, weight)
    (want,) = torch.autograd.grad(torch.linalg.matrix_norm(matrix(weight, (4, 5)), 2), weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, (1, 3), (4, 3)])
@pytest.mark.parametrize(("o", "i"), [(1, 1), (3, 2), (2, 4)])
def test_bound_is_above_the_supremum_and_near_it(o, i, k):
    weight = kernel(o, i, k, seed=1)
    true, bound = supremum(weight), float(convolution_bound(weight))
    assert true <= bound <= 1.021 * true
    loose = float(convolution_bound(weight, samples=2))
    assert true <= loose <= true / math.cos(math.pi / 4) ** 2 * 1.004


def test_a_grid_alone_falls_short_of_the_supremum():
    """What divides the grid's maximum is needed, and enough, over many kernels."""
    short = 0
    for seed in range(40):
        weight = kernel(1, 1, 3, seed)
        true = supremum(weight)
        grid = float(torch.fft.fft2(weight, s=(4, 4)).abs().max())
        short += grid < 0.97 * true
        assert convolution_bound(weight, samples=2) >= true
    assert short > 5


@pytest.mark.parametrize("k", [1, 3, 5])
def test_bound_holds_at_every_size_and_is_near_at_large_ones(k):
    weight = kernel(3, 2, k)
    bound = convolution_bound(weight)
    norms = [torch.linalg.matrix_norm(matrix(weight, s), 2) for s in [(1, 1), (3, 5), (8, 8)]]
    norms.append(convolution_norm(weight, (40, 40), iterations=100)[0])
    assert all(norm <= bound for norm in norms)
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(norms))
    assert norms[-1] > 0.96 * bound


def test_derivative_of_the_bound():
    for shape in ((3, 2, 3, 3), (2, 3, 1, 3), (2, 2, 2, 2)):
        weight = torch.randn(shape, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda w: convolution_bound(w, samples=4), weight)
    weight = torch.zeros(2, 2, 3, 3, requires_grad=True)
    bound = convolution_bound(weight)
    bound.backward()
    assert bound == 0
    assert bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    weight = kernel(3, 2, 3).to(dtype)
    exact = weight.double()
    for got, want in (
        (convolution_bound(weight), convolution_bound(exact)),
        (
            convolution_norm(weight, (8, 8), iterations=100)[0],
            torch.linalg.matrix_norm(matrix(exact, (8, 8)), 2),
        ),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)
    assert convolution_bound(weight).double() >= convolution_bound(exact) * (1 - 1e-12)


def test_autocast_does_not_coarsen_a_norm():
    weight = kernel(3, 2, 3, dtype=torch.float32)
    v = torch.randn(2, 6, 6)
    plain = convolution_norm(weight, (6, 6), v=v)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(convolution_norm(weight, (6, 6), v=v)[0], plain)


def test_bad_kernels():
    weight = kernel(2, 2, 3)
    for function in (lambda w: convolution_norm(w, (4, 4)), convolution_bound):
        for bad in (weight[0], weight.long(), [1.0]):
            with pytest.raises(TypeError, match=r"floating tensor \[O, I, k, k\]"):
                function(bad)
    with pytest.raises(ValueError, match="must be odd"):
        convolution_norm(kernel(2, 2, 2), (4, 4))
    with pytest.raises(ValueError, match="size must be"):
        convolution_norm(weight, (4, 0))
    with pytest.raises(ValueError, match="iterations must be"):
        convolution_norm(weight, (4, 4), iterations=-1)
    with pytest.raises(ValueError, match=r"v must have the shape \[I, H, W\], \(2, 4, 5\)"):
        convolution_norm(weight, (4, 5), v=weight[0])
    for bad in (1, 2.0, True):
        with pytest.raises(ValueError, match="samples must be"):
            convolution_bound(weight, samples=bad)


@pytest.mark.parametrize("exponent", [-90, 90])
def test_a_norm_is_free_of_the_weights_scale(exponent):
    w, v = torch.randn(3, 2, 3, 3), torch.randn(2, 8, 8)
    norm, last = convolution_norm(w, (8, 8), iterations=30, v=v)
    scaled, other = convolution_norm(w * 2.0**exponent, (8, 8), iterations=30, v=v)
    torch.testing.assert_close(scaled, norm * 2.0**exponent)
    torch.testing.assert_close(other, last)
