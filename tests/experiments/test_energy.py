"""The convex energy network: its convexity, its minimum by FPI_GD, its Hessian's products."""

import pytest
import torch

from experiments.multilabel.energy import ConvexNetwork, certify
from fpi_cuda import FixedPointLayer, GradientStep, ImplicitAdjoint, Tolerance, fixed_point

N, INPUTS, WIDTH = 5, 4, 8
TIGHT = Tolerance(rtol=1e-12, atol=1e-14)


@pytest.fixture
def energy():
    torch.manual_seed(0)
    network = ConvexNetwork(N, INPUTS, WIDTH, curvature=0.5).double()
    with torch.no_grad():
        network.between.copy_(torch.randn(WIDTH, WIDTH))  # both layers matter
        network.first.weight *= 2
    return network


def at(b=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(b, n, generator=g, dtype=torch.float64) for n in (N, INPUTS))


def hessian(energy, x, h):
    return torch.autograd.functional.hessian(lambda t: energy(t[None], h[None])[0], x)


def test_the_hessian_lies_between_the_modulus_and_the_bound(energy):
    bound = float(energy.smoothness())
    largest = 0.0
    for x, h in zip(*at(40), strict=True):
        values = torch.linalg.eigvalsh(hessian(energy, 3 * x, h))
        assert float(values[0]) >= energy.curvature
        largest = max(largest, float(values[-1]))
    assert largest <= bound
    assert bound < 50 * largest  # and says something


def test_the_fixed_point_is_the_minimum_and_the_certificate_holds(energy):
    x0, h = at()
    step = GradientStep(energy, step_size=2 / (energy.curvature + float(energy.smoothness())))
    solution = fixed_point(
        step, torch.zeros_like(x0), h, tolerance=TIGHT, max_iterations=2000, on_failure="raise"
    )
    x = solution.x.detach()
    found = certify(energy, energy.curvature, x, h)
    assert float(found.gradient_norm.max()) < 1e-9
    # Newton's method, which knows nothing of the step, ends at the same place.
    newton = torch.zeros_like(x)
    for _ in range(50):
        newton = torch.stack([newton_step(energy, t, z) for t, z in zip(newton, h, strict=True)])
    assert torch.allclose(newton, x, atol=1e-10)
    # At a point that is no minimum the bounds are not exceeded, and not idle.
    away = x + 0.1 * x0
    rough = certify(energy, energy.curvature, away, h)
    distance = torch.linalg.vector_norm(away - x, dim=1)
    gap = (energy(away, h) - energy(x, h)).detach()
    assert bool((distance <= rough.distance).all()) and bool((gap <= rough.gap).all())
    assert bool((rough.distance < 100 * distance).all())


def newton_step(energy, x, h):
    gradient = torch.autograd.functional.jacobian(lambda t: energy(t[None], h[None])[0], x)
    return x - torch.linalg.solve(hessian(energy, x, h), gradient)


def test_the_adjoint_multiplies_by_the_hessian(energy):
    x, h = at()
    v = torch.randn(len(x), N, dtype=torch.float64)
    step_size = 0.03
    leaf = x.clone().requires_grad_()
    (product,) = torch.autograd.grad(GradientStep(energy, step_size)(leaf, h), leaf, v)
    _, hv = torch.autograd.functional.hvp(lambda t: energy(t, h).sum(), x, v)
    assert torch.allclose(product, v - step_size * hv, atol=1e-12)


def test_first_and_second_derivatives_of_the_minimum(energy):
    _, h = at(2)
    layer = FixedPointLayer(
        GradientStep(energy, step_size=2 / (energy.curvature + float(energy.smoothness()))),
        tolerance=TIGHT,
        adjoint=ImplicitAdjoint(tolerance=TIGHT),
        max_iterations=2000,
        on_failure="raise",
    )
    given = (h.requires_grad_(),)
    assert torch.autograd.gradcheck(layer, given, eps=1e-4, atol=1e-6)
    assert torch.autograd.gradgradcheck(layer, given, eps=1e-4, atol=1e-5)
    # Implicit function theorem: ∂x̂/∂h = −H⁻¹ ∂²f/∂x∂h.
    x = layer(h).detach()
    i = 0
    mixed = torch.autograd.functional.jacobian(
        lambda z: torch.autograd.grad(
            energy(at_i := x[i : i + 1].requires_grad_(), z[None]).sum(), at_i, create_graph=True
        )[0][0],
        h[i].detach(),
        vectorize=False,
    )
    expected = -torch.linalg.solve(hessian(energy, x[i].detach(), h[i].detach()), mixed)
    jacobian = torch.autograd.functional.jacobian(lambda z: layer(z[None])[0], h[i].detach())
    assert torch.allclose(jacobian, expected, atol=1e-7)
