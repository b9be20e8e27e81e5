"""Norms, bounds and what holds to them, against dense Jacobians and matrices in float64."""

import copy
import doctest
import io
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import TIGHT, TIGHT_ADJOINT, unroll
from torch import nn
from torch.nn.utils import parametrize

import fpi_cuda
from fpi_cuda import (
    ConvStep,
    DenseEnergy,
    DenseStep,
    FixedPointLayer,
    GradientStep,
    NeuralStep,
    fixed_point,
)
from fpi_cuda.contraction import (
    Certified,
    certificate,
    convolution,
    convolution_bound,
    convolution_norm,
    jacobian,
    jacobian_norm,
    jacobian_penalty,
    jacobian_radius,
    lipschitz,
    spectral_normalize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 6).double()


def step(net):
    return lambda x, z: torch.tanh(net(x.flatten(1)).view_as(x) + z)


@pytest.fixture
def x_and_z():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(4, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))


def dense(g, x, z) -> torch.Tensor:
    """[B, N, N]."""
    n = x[0].numel()
    rows = [
        torch.autograd.functional.jacobian(
            lambda q, i=i: g(q[None], z[i : i + 1])[0], x[i], create_graph=True
        ).view(n, n)
        for i in range(len(x))
    ]
    return torch.stack(rows)


def test_norm_converges_from_below(net, x_and_z):
    x, z = x_and_z
    true = torch.linalg.matrix_norm(dense(step(net), x, z), 2)
    norm, v = jacobian_norm(step(net), x, z)
    assert bool((norm <= true * (1 + 1e-12)).all())
    torch.testing.assert_close(torch.linalg.vector_norm(v.flatten(1), dim=1), torch.ones_like(norm))
    for _ in range(20):  # going on from v is the same as more iterations
        norm, v = jacobian_norm(step(net), x, z, v=v, iterations=20)
    torch.testing.assert_close(norm, true, rtol=1e-9, atol=0)


def test_radius_converges(x_and_z):
    x, z = x_and_z
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    values = torch.tensor([0.9, -0.5, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    a = vectors @ values.diag() @ torch.linalg.inv(vectors)
    radius, _ = jacobian_radius(
        lambda x, z: (x.flatten(1) @ a.T).view_as(x) + z, x, z, iterations=200
    )
    torch.testing.assert_close(radius, torch.full_like(radius, 0.9), rtol=1e-9, atol=0)


def test_radius_of_a_complex_pair(x_and_z):
    x, _ = x_and_z
    a = torch.tensor([[0.0, -0.9], [0.4, 0.0]], dtype=torch.float64)  # ±0.6i; norm 0.9
    x = x.flatten(1)[:, :2]
    radius, _ = jacobian_radius(lambda x: x @ a.T, x, iterations=40)
    torch.testing.assert_close(radius, torch.full_like(radius, 0.6), rtol=1e-9, atol=0)


@pytest.mark.parametrize("measure", [jacobian_norm, jacobian_radius])
def test_penalty_and_its_derivative(net, x_and_z, measure):
    """At the converged v of a symmetric Jacobian both measures' derivatives are the true norm's."""
    x, z = x_and_z
    g = lambda x, z: (x.flatten(1) @ (net.weight + net.weight.T)).view_as(x) + z  # noqa: E731
    true = torch.linalg.matrix_norm(dense(g, x, z), 2)
    expected = (true - 0.3).relu().square().mean()
    v = None
    for _ in range(20):
        penalty, v = jacobian_penalty(g, x, z, bound=0.3, v=v, measure=measure)
        _, v = measure(g, x, z, v=v, iterations=50)
    torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=0)
    (got,) = torch.autograd.grad(penalty, net.weight)
    (want,) = torch.autograd.grad(expected, net.weight)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert float(jacobian_penalty(g, x, z, bound=1e3, v=v, measure=measure)[0].detach()) == 0


def test_derivative_with_v_held(net, x_and_z):
    x, z = x_and_z
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    unit = v / torch.linalg.vector_norm(v.flatten(1), dim=1).view(-1, 1, 1)
    jacobian = dense(step(net), x, z)
    want = torch.linalg.vector_norm((unit.flatten(1)[:, None] @ jacobian)[:, 0], dim=1)
    for measure in (jacobian_norm, jacobian_radius):
        got, _ = measure(step(net), x, z, v=v)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got.sum(), net.parameters(), retain_graph=True),
            torch.autograd.grad(want.sum(), net.parameters(), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("measure", [jacobian_norm, jacobian_radius])
def test_degenerate(measure):
    x, z = torch.zeros(2, 3), torch.ones(2, 3)
    constant, v = measure(lambda x, z: z.clone(), x, z, iterations=3)
    assert float(constant.detach().max()) < 1e-30
    assert bool(v.isfinite().all())
    # One sample's v at zero starts anew, alone.
    v[0] = 0
    half, _ = measure(lambda x, z: x / 2 + z, x, z, v=v)
    torch.testing.assert_close(half, torch.full((2,), 0.5))
    net = nn.Linear(3, 3)
    with torch.no_grad():
        value, v = measure(lambda x, z: net(x) + z, x, z)
    assert not value.requires_grad
    assert not v.requires_grad
    x = x.requires_grad_()
    value, _ = measure(lambda x, z: net(x) ** 2 + z, x, z)
    value.sum().backward()
    assert x.grad is None
    assert net.weight.grad is not None
    assert measure(lambda x: x, torch.zeros(0, 3))[0].shape == (0,)


@pytest.mark.parametrize("measure", [jacobian_norm, jacobian_radius])
def test_errors(measure):
    x = torch.zeros(2, 3)
    for bad in (x.long(), [1.0], torch.tensor(1.0)):
        with pytest.raises(TypeError, match="floating tensor"):
            measure(lambda x: x, bad)
    with pytest.raises(TypeError, match="return a tensor"):
        measure(lambda x: None, x)
    with pytest.raises(ValueError, match=r"shape of x, \(2, 3\) \(got \(2, 1\)\)"):
        measure(lambda x: x[:, :1], x)
    with pytest.raises(ValueError, match="v must have the shape"):
        measure(lambda x: x, x, v=x[:1])
    with pytest.raises(ValueError, match="iterations must be >= 1"):
        measure(lambda x: x, x, iterations=0)
    with pytest.raises(ValueError, match="bound must be >= 0"):
        jacobian_penalty(lambda x: x, x, bound=-1.0, measure=measure)


# --- norms of convolutions -------------------------------------------------------------------


def kernel(o, i, k, seed=0, dtype=torch.float64):
    k = (k, k) if isinstance(k, int) else k
    return torch.randn(o, i, *k, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrix(weight, size) -> torch.Tensor:
    """[I H W, O H W], the zero-padded convolution."""
    i = weight.shape[1]
    n = i * size[0] * size[1]
    images = torch.eye(n, dtype=weight.dtype).view(n, i, *size)
    return F.conv2d(images, weight, padding=tuple(k // 2 for k in weight.shape[2:])).flatten(1)


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


# --- certificates ----------------------------------------------------------------------------


def perturbed(step, factor=1.0, seed=0):
    """The step in float64 with weights, biases and signs of any kind."""
    generator = torch.Generator().manual_seed(seed)
    step = step.double()
    with torch.no_grad():
        for p in step.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.shape[-1])
            p.mul_(factor)
    return step


DENSE = (torch.Size([5]), torch.Size([3]))
IMAGE = (torch.Size([2, 4, 5]), torch.Size([1, 4, 5]))
STEPS = {
    "dense": (lambda: DenseStep(5, 3), DENSE),
    "dense, residual": (lambda: DenseStep(5, 3, residual=-0.4, activation="gelu"), DENSE),
    "two layers": (
        lambda: DenseStep(
            5, 3, hidden=4, activation="sigmoid", output_activation="softplus", residual=0.3
        ),
        DENSE,
    ),
    "descent": (lambda: GradientStep(DenseEnergy(5, 3, hidden=7, curvature=0.5), 0.3), DENSE),
    "descent, few terms": (
        lambda: GradientStep(DenseEnergy(5, 3, hidden=2, activation="sigmoid"), 1.5),
        DENSE,
    ),
    "descent, not convex": (
        lambda: GradientStep(DenseEnergy(5, 3, hidden=7, activation="gelu", convex=False), 0.4),
        DENSE,
    ),
    "conv": (lambda: ConvStep(2, 1, hidden=(3, 4), residual=0.2), IMAGE),
    "conv, one layer": (lambda: ConvStep(2, 1, hidden=(), residual=-0.3, kernel_size=5), IMAGE),
    "conv, outer activation": (
        lambda: ConvStep(2, 1, hidden=(3,), activation="gelu", output_activation="tanh"),
        IMAGE,
    ),
    "wrapped": (lambda: NeuralStep(DenseStep(5, 3)), DENSE),
}


@pytest.mark.parametrize("name", list(STEPS))
@hypothesis.given(
    seed=st.integers(0, 10**6),
    factor=st.sampled_from([0.3, 1.0, 3.0]),
    distance=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_certificate_holds_for_any_two_states(name, seed, factor, distance):
    make, (state, given_shape) = STEPS[name]
    step = perturbed(make(), factor, seed)
    bound = lipschitz(step)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(64, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, z = draw(state), draw(given_shape)
    y = x + distance * draw(state)
    with torch.no_grad():
        moved = (step(x, z) - step(y, z)).flatten(1)
    assert bool((moved.norm(dim=1) <= bound * (x - y).flatten(1).norm(dim=1) * (1 + 1e-9)).all())


@pytest.mark.parametrize("name", list(STEPS))
def test_certificate_is_not_far_from_the_jacobian(name):
    """Above the Jacobian's norm at the steepest of many points, and of its order."""
    make, (state, given_shape) = STEPS[name]
    step = perturbed(make())
    x, z = (3 * torch.randn(200, *shape, dtype=torch.float64) for shape in (state, given_shape))
    measured = float(jacobian_norm(step, x, z, iterations=30)[0].detach().max())
    assert measured <= lipschitz(step) <= 10 * measured


def test_linear_steps_have_exact_certificates():
    def norm(a):
        return float(torch.linalg.matrix_norm(a.detach(), 2))

    eye = torch.eye(5, dtype=torch.float64)
    one = perturbed(DenseStep(5, 3, activation="identity", residual=-0.5))
    assert lipschitz(one) == pytest.approx(norm(one.state_weight - 0.5 * eye), rel=1e-8)
    two = perturbed(DenseStep(5, 3, hidden=4, activation="identity"))
    product = norm(two.output_weight) * norm(two.state_weight)
    assert lipschitz(two) == pytest.approx(product, rel=1e-8)
    energy = DenseEnergy(5, 3, hidden=7, activation="identity", curvature=0.5, convex=False)
    descent = perturbed(GradientStep(energy, 0.2))
    w, a = energy.state_weight, energy.term_weight
    hessian = 0.5 * eye + w.T @ (a[:, None] * w)
    assert lipschitz(descent) == pytest.approx(norm(eye - 0.2 * hessian), rel=1e-8)
    assert lipschitz(NeuralStep(NeuralStep(descent))) == lipschitz(descent)
    conv = perturbed(ConvStep(2, 1, hidden=(), activation="relu", residual=0.5))
    dense = matrix(conv.layers[0].weight.detach(), (12, 12)) + 0.5 * torch.eye(2 * 144)
    assert norm(dense) <= lipschitz(conv) <= 1.06 * norm(dense)


def test_slopes_of_every_layer_count():
    step = perturbed(ConvStep(2, 1, hidden=(3, 4), activation="sigmoid", output_activation="gelu"))
    norms = (float(convolution_bound(layer.weight.detach())) for layer in step.layers)
    assert lipschitz(step) == pytest.approx(1.129 * 0.25**2 * math.prod(norms), rel=1e-8)


def test_where_gelu_falls_an_energy_is_concave():
    energy = DenseEnergy(5, None, hidden=7, activation="gelu", convex=False, curvature=0.0).double()
    step = GradientStep(energy, 0.1)
    with torch.no_grad():
        energy.term_weight.fill_(1)
        energy.state_weight.mul_(0.3)
        energy.bias.fill_(-math.sqrt(2))  # the slope is least there
    zeros = torch.zeros(1, 7, dtype=torch.float64)
    measured = float(torch.linalg.matrix_norm(dense(step, zeros[:, :5], zeros)[0].detach(), 2))
    assert measured > 1
    assert measured - 1 == pytest.approx(lipschitz(step) - 1, rel=1e-3)


def test_a_convex_energy_with_a_small_step_contracts():
    energy = DenseEnergy(6, 2, hidden=9)
    assert lipschitz(GradientStep(energy, 1.9 / energy.smoothness())) < 1
    trained = nn.Parameter(torch.tensor(2.5 / energy.smoothness()))
    assert lipschitz(GradientStep(energy, trained)) > 1


def test_certificate_of_a_sequence():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, dilation=2),
        nn.SiLU(),
        nn.Conv2d(3, 2, 2, padding=4),
        nn.Sequential(nn.Flatten(), nn.Linear(312, 9), nn.Sigmoid()),
        nn.GELU(),
    ).double()
    bound = lipschitz(net)
    x = torch.randn(100, 2, 14, 16, dtype=torch.float64)
    y = x + 1e-3 * torch.randn_like(x)
    with torch.no_grad():
        assert net(x).shape == (100, 9)
        ratio = (net(x) - net(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert ratio.max() <= bound
    factors = [float(convolution_bound(m.weight.detach())) for m in (net[0], net[2])]
    factors.append(float(torch.linalg.matrix_norm(net[3][1].weight.detach(), 2)))
    assert bound == pytest.approx(math.prod(factors) * 1.1 * 0.25 * 1.13, rel=1e-8)


def test_a_weight_that_is_not_finite_has_no_bound():
    dense, conv = DenseStep(3, 2), ConvStep(2, 1)
    descent = GradientStep(DenseEnergy(3, 2, hidden=2), 0.1)
    for step, weight in (
        (dense, dense.state_weight),
        (descent, descent.energy.state_weight),
        (conv, conv.layers[1].weight),
    ):
        assert math.isfinite(lipschitz(step))
        with torch.no_grad():
            weight.view(-1)[0] = math.nan
        assert lipschitz(step) == math.inf


def test_what_a_certificate_can_not_be_given_for():
    class Other(DenseStep):
        def form(self, *args):
            return super().form(*args)

    hooked = DenseStep(3, 2)
    hooked.register_forward_hook(lambda *_: None)
    inner = nn.Sequential(nn.Linear(3, 3))
    inner[0].register_forward_hook(lambda *_: None)
    for bad in (
        Other(3, 2),
        hooked,
        NeuralStep(hooked),
        inner,
        nn.Conv2d(2, 2, 3),
        len,
        nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)),
        nn.Sequential(nn.LayerNorm(3)),
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")),
        GradientStep(lambda x: x.sum(1), 0.1),
    ):
        for function in (lipschitz, spectral_normalize, Certified):
            with pytest.raises(TypeError, match="must be a DenseStep, a ConvStep"):
                function(bad)

    class Own(nn.Module):
        def certified_lipschitz(self):
            return 0.25

    assert lipschitz(NeuralStep(Own())) == 0.25
    with pytest.raises(TypeError, match="must be a DenseStep"):
        spectral_normalize(Own())


def test_certified_steps_bound_the_error_of_a_solution():
    step = perturbed(DenseStep(5, 3), 0.5)
    z = torch.randn(6, 3, dtype=torch.float64)
    x0 = torch.zeros(6, 5, dtype=torch.float64)
    coarse = fixed_point(Certified(step), x0, z, tolerance=fpi_cuda.Tolerance(1e-3))
    plain = fixed_point(step, x0, z, tolerance=fpi_cuda.Tolerance(1e-3))
    fine = fixed_point(step, x0, z, tolerance=TIGHT)
    error = torch.linalg.vector_norm(coarse.x - fine.x, dim=1)
    assert 0 < lipschitz(step) < 1
    assert bool((error <= coarse.error_bound).all())
    assert coarse.path == plain.path
    assert torch.equal(coarse.x, plain.x)
    assert plain.error_bound is None


# --- weights held below their share ----------------------------------------------------------


HELD = {
    "dense": lambda: DenseStep(5, 3),
    "two layers": lambda: DenseStep(5, 3, hidden=7, activation="sigmoid", residual=-0.3),
    "gelu": lambda: DenseStep(5, 3, hidden=4, activation="gelu", output_activation="gelu"),
    "descent": lambda: GradientStep(DenseEnergy(5, 3, hidden=7, curvature=0.6), 1.0),
    "descent, sigmoid": lambda: GradientStep(
        DenseEnergy(5, 3, hidden=7, activation="sigmoid"), step_size=1.2
    ),
    "conv": lambda: ConvStep(2, 1, hidden=(3, 4), residual=0.2),
    "conv, 5": lambda: ConvStep(2, 1, hidden=(), kernel_size=5, output_activation="tanh"),
    "sequence": lambda: NeuralStep(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 2, 3, padding="same"))
    ),
}


def inputs_of(step):
    if any(isinstance(m, nn.Conv2d) for m in step.modules()):
        images = torch.randn(3, 2, 6, 7), torch.randn(3, 1, 6, 7)
        return images[:1] if isinstance(step, NeuralStep) else images
    return torch.randn(3, 5), torch.randn(3, 3)


def train(step, optimiser, steps=1):
    for _ in range(steps):
        inputs = inputs_of(step)
        optimiser.zero_grad()
        (-step(*inputs).abs().mean()).backward()
        optimiser.step()
        with torch.no_grad():
            step(*inputs)  # an energy's vector does not move under its gradient


@pytest.mark.parametrize("bound", [0.9, 2.5])
@pytest.mark.parametrize("name", list(HELD))
def test_certified_weights_keep_the_bound_through_training(name, bound):
    step = spectral_normalize(HELD[name](), bound, certified=True)
    assert lipschitz(step) <= bound
    raw = {n: p.detach().clone() for n, p in step.named_parameters()}
    train(step, torch.optim.SGD(step.parameters(), lr=100.0))
    assert any("original" in n and not torch.equal(p, raw[n]) for n, p in step.named_parameters())
    assert lipschitz(step) <= bound
    with torch.no_grad():
        for n, p in step.named_parameters():
            if "original" in n:
                p.mul_(100)
    tight = lipschitz(step)
    assert tight <= bound
    assert tight == pytest.approx(bound, rel=1e-5)
    assert not list(step.buffers())


@pytest.mark.parametrize("name", list(HELD))
def test_estimates_follow_the_weights_through_training(name):
    size = (6, 7) if "conv" in name or name == "sequence" else None
    step = HELD[name]()
    with torch.no_grad():
        for p in step.parameters():
            p.mul_(3)
    spectral_normalize(step, size=size)
    train(step, torch.optim.Adam(step.parameters(), lr=1e-2), steps=100)
    held = [m for m in step.modules() if isinstance(m, parametrize.ParametrizationList)]
    assert held

    def norms(weights):
        dense = (matrix(w.detach(), size) if size else w.detach() for w in weights)
        return torch.stack([torch.linalg.matrix_norm(w, 2) for w in dense])

    assert norms([w.original for w in held]).max() > 1.02 * held[0][0].share
    assert norms([w() for w in held]).max() <= 1.05 * held[0][0].share


def test_without_a_size_convolutions_take_the_bound_and_matrices_an_estimate():
    assert not list(spectral_normalize(ConvStep(2, 1)).buffers())
    assert len(list(spectral_normalize(ConvStep(2, 1), size=(5, 6)).buffers())) == 3
    assert len(list(spectral_normalize(DenseStep(4, 1)).buffers())) == 1
    net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(40, 3))
    images, vector = spectral_normalize(net, size=(4, 5)).buffers()
    assert images.shape == (2, 4, 5)
    assert vector.shape == (40,)


@pytest.mark.parametrize("certified", [True, False])
def test_a_weight_below_its_share_stays_as_it_is(certified):
    step = DenseStep(5, 3, hidden=4)
    x, z = inputs_of(step)
    with torch.no_grad():
        for weight in (step.state_weight, step.output_weight):
            weight.mul_(0.4)
        plain = step(x, z)
        weight = step.state_weight.clone()
        spectral_normalize(step, certified=certified)
        assert torch.equal(step.state_weight, weight)
        assert torch.equal(step(x, z), plain)
        step.state_weight = torch.zeros(4, 5)
        assert torch.equal(step.state_weight, torch.zeros(4, 5))
    step(x, z).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in step.parameters())


def test_derivatives_pass_through_the_scale():
    step = spectral_normalize(DenseStep(4, 2).double(), 0.5, certified=True)
    raw = step.parametrizations.state_weight.original

    def weight(raw):
        norm = torch.linalg.matrix_norm(raw, 2)
        return raw * (0.5 / norm)

    c = torch.randn(4, 4, dtype=torch.float64)
    (got,) = torch.autograd.grad((step.state_weight * c).sum(), raw)
    (want,) = torch.autograd.grad((weight(raw) * c).sum(), raw)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    estimated = spectral_normalize(DenseStep(4, 2).double(), 0.5).eval()
    raw = estimated.parametrizations.state_weight.original
    held = estimated.parametrizations.state_weight[0]
    assert torch.autograd.gradcheck(held, raw)


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize("name", ["dense", "two layers", "descent", "conv"])
def test_a_normalised_step_is_solved_like_any_other(name, certified):
    step = HELD[name]().double()
    with torch.no_grad():
        for p in step.parameters():
            p.mul_(3)
    size = (6, 7) if name == "conv" and not certified else None
    plain_path = FixedPointLayer(step, max_iterations=3, on_failure="return")
    z = inputs_of(step)[1].double().requires_grad_()
    plain_path(z)
    spectral_normalize(step, 0.6, size=size, certified=certified)
    for v in step.buffers():
        v.add_(0.1 * torch.randn_like(v))  # away from where it rests
    oracle = copy.deepcopy(step).eval()
    before = [b.clone() for b in step.buffers()]
    layer = FixedPointLayer(step, tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
    layer.eval()
    x = layer(z)
    assert layer.last.path.split(",")[:2] == plain_path.last.path.split(",")[:2]
    assert bool(layer.last.converged.all())
    true = unroll(oracle, torch.zeros_like(x), z, steps=90)
    torch.testing.assert_close(x, true)
    mine = torch.autograd.grad(x.sin().sum(), (z, *step.parameters()))
    theirs = torch.autograd.grad(true.sin().sum(), (z, *oracle.parameters()))
    torch.testing.assert_close(mine, theirs)
    assert all(torch.equal(a, b) for a, b in zip(before, step.buffers(), strict=True))
    layer.train()(z)  # a training call moves each vector once, by one iteration
    once = copy.deepcopy(oracle).train()
    with torch.no_grad():
        once(x, z)
    for a, b, c in zip(step.buffers(), once.buffers(), before, strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("size", [None, (6, 7)])
def test_the_estimate_is_good_before_any_training(size):
    layer = nn.Linear(30, 20) if size is None else nn.Conv2d(2, 3, 3, padding=1)
    with torch.no_grad():
        layer.weight.mul_(20)
    spectral_normalize(nn.Sequential(layer).eval(), 0.5, size=size)
    weight = layer.weight.detach()
    norm = torch.linalg.matrix_norm(weight if size is None else matrix(weight, size), 2)
    assert float(norm) == pytest.approx(0.5, rel=2e-3)


def test_a_training_call_is_ten_iterations_and_another_none():
    step = spectral_normalize(ConvStep(2, 1, hidden=()), size=(6, 7))
    held = step.layers[0].parametrizations.weight
    start = torch.randn(2, 6, 7)
    start /= torch.linalg.vector_norm(start)
    held[0].v.copy_(start)
    with torch.no_grad():
        held.original.mul_(9)
        for training in (False, True):
            weight = step.train(training).layers[0].weight
            norm, v = convolution_norm(
                held.original, (6, 7), iterations=10 if training else 0, v=start
            )
            torch.testing.assert_close(weight, held.original * (0.9 / norm), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(held[0].v, v, rtol=1e-4, atol=1e-5)


def test_lipschitz_moves_no_buffer():
    step = spectral_normalize(DenseStep(5, 3), 0.5)
    v = next(step.buffers()).copy_(torch.ones(5) / 5**0.5).clone()
    lipschitz(step)
    assert torch.equal(next(step.buffers()), v)
    step(*inputs_of(step))
    assert not torch.equal(next(step.buffers()), v)


@pytest.mark.parametrize(("make", "size"), [(HELD["dense"], None), (HELD["conv"], (6, 7))])
def test_copies_and_state_dicts(make, size):
    step = spectral_normalize(make(), 0.5, size=size)
    train(step, torch.optim.SGD(step.parameters(), lr=1.0))
    inputs = inputs_of(step)
    file = io.BytesIO()
    torch.save(step.state_dict(), file)
    file.seek(0)
    fresh = spectral_normalize(make(), 0.5, size=size)
    fresh.load_state_dict(torch.load(file))
    twin = copy.deepcopy(step)
    with torch.no_grad():
        for other in (fresh, twin):
            assert torch.equal(other.eval()(*inputs), step.eval()(*inputs))
    train(twin.train(), torch.optim.SGD(twin.parameters(), lr=1.0))
    assert torch.equal(fresh(*inputs), step(*inputs))  # the copy has its own tensors
    plain = step.state_weight if size is None else step.layers[0].weight
    module = step if size is None else step.layers[0]
    name = "state_weight" if size is None else "weight"
    parametrize.remove_parametrizations(module, name)
    assert type(module) in (DenseStep, nn.Conv2d)
    torch.testing.assert_close(getattr(module, name), plain)


def test_half_and_moved_dtypes():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for size in (None, (4, 4)):
            step = spectral_normalize(ConvStep(2, 1, hidden=(3,)), 0.5, size=size).to(dtype)
            with torch.no_grad():
                for layer in step.layers:
                    layer.parametrizations.weight.original.mul_(8)
            for layer in step.layers:
                assert layer.weight.dtype == dtype
            if size is None:
                assert lipschitz(step) <= 0.5
            else:
                norms = (matrix(layer.weight.detach().double(), size) for layer in step.layers)
                assert math.prod(float(torch.linalg.matrix_norm(a, 2)) for a in norms) <= 0.52


def test_a_shared_layer_is_normalised_once():
    layer = nn.Linear(4, 4)
    net = spectral_normalize(nn.Sequential(layer, nn.Tanh(), layer), 0.25, certified=True)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(100)
    assert len(layer.parametrizations.weight) == 1
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(0.5, rel=1e-5)
    assert lipschitz(net) == pytest.approx(0.25, rel=1e-5)


def test_what_can_not_be_normalised():
    for bad in (0.0, -1.0, math.inf, math.nan, "0.9", None):
        with pytest.raises(ValueError, match="bound must be a finite number > 0"):
            spectral_normalize(DenseStep(3, 2), bad)
    for step in (DenseStep(3, 2, residual=-0.9), ConvStep(2, 1, residual=1.0)):
        with pytest.raises(ValueError, match=r"\|residual\| must be below"):
            spectral_normalize(step, 0.9)
    with pytest.raises(ValueError, match=r"step_size \* curvature\| must be below bound"):
        spectral_normalize(GradientStep(DenseEnergy(3, 2, hidden=2, curvature=0.1), 0.5))
    for step in (
        GradientStep(DenseEnergy(3, 2, hidden=2, convex=False), 0.5),
        GradientStep(DenseEnergy(3, 2, hidden=2), nn.Parameter(torch.tensor(0.5))),
    ):
        with pytest.raises(TypeError, match="convex and its step size a number"):
            spectral_normalize(step)
    with pytest.raises(ValueError, match="no weight"):
        spectral_normalize(nn.Sequential(nn.Tanh()))
    with pytest.raises(ValueError, match="leave size out"):
        spectral_normalize(ConvStep(2, 1), size=(4, 4), certified=True)
    with pytest.raises(ValueError, match="stride 1"):
        spectral_normalize(nn.Sequential(nn.Conv2d(2, 2, 3)), size=(4, 4))
    for size in ((4,), (4, 4, 4), (0, 4), (4.0, 4), 4, "44", (True, 4)):
        with pytest.raises(ValueError, match=r"size must be \(H, W\)"):
            spectral_normalize(ConvStep(2, 1), size=size)
    step = spectral_normalize(DenseStep(3, 2))
    with pytest.raises(ValueError, match="parametrised already"):
        spectral_normalize(step)
    assert len(step.parametrizations.state_weight) == 1


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


def test_the_examples_run():
    names = {"torch": torch, "fixed_point": fixed_point}
    for module in (certificate, convolution, jacobian):
        failed, run = doctest.testmod(module, extraglobs=names)
        assert failed == 0 < run
