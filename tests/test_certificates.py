"""Certificates of steps hold, and are not far from what is measured."""

import doctest
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers import TIGHT
from helpers_contraction import dense, matrix
from torch import nn

import fpi_cuda
from fpi_cuda import ConvStep, DenseEnergy, DenseStep, GradientStep, NeuralStep, fixed_point
from fpi_cuda.contraction import (
    Certified,
    certificate,
    convolution,
    convolution_bound,
    jacobian,
    jacobian_norm,
    lipschitz,
    spectral_normalize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("k", [0.0, 1 - 2**-20, 1.0, 1 + 2**-20, math.inf])
def test_a_bound_of_the_error_takes_a_constant_below_1(k):
    class Claims(nn.Module):
        def certified_lipschitz(self):
            return k

        def forward(self, x, z):
            return 0 * x + z

    z = torch.ones(2, 3)
    bound = fixed_point(Claims(), torch.zeros_like(z), z).error_bound
    assert (bound is not None) == (k < 1)


def test_the_examples_run():
    names = {"torch": torch, "fixed_point": fixed_point}
    for module in (certificate, convolution, jacobian):
        failed, run = doctest.testmod(module, extraglobs=names)
        assert failed == 0 < run


class OwnLinear(nn.Linear):
    pass


def hooked(m):
    m.register_forward_hook(lambda *_: None)
    return m


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (
            nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 3, groups=2)),
            r"item 1 of nn\.Sequential Conv2d with padding_mode='zeros' and groups=2",
        ),
        (nn.Sequential(nn.Sequential(nn.ConvTranspose2d(1, 1, 3))), "item 0 .* ConvTranspose2d"),
        (NeuralStep(nn.Conv1d(1, 1, 3)), r"\(got Conv1d\)"),
        (nn.Conv2d(1, 1, 3, stride=2, dilation=2), r"Conv2d by itself; write nn\.Sequential"),
        (nn.Sequential(OwnLinear(3, 3)), "OwnLinear, a subclass of Linear"),
        (nn.Sequential(hooked(nn.Linear(3, 3))), "Linear with a hook"),
        (GradientStep(nn.Bilinear(3, 3, 1), 0.1), "a GradientStep of Bilinear"),
    ],
)
@pytest.mark.parametrize("f", [lipschitz, spectral_normalize])
def test_what_of_a_step_is_not_known_is_named(f, step, found):
    with pytest.raises(TypeError, match=found):
        f(step)
