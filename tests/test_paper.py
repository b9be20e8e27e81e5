"""The paper's statements (section 3) as the library must show them."""

import math

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, Energy, Net, contraction
from torch.func import jacrev, vmap

from fpi_cuda import (
    FixedPointLayer,
    GradientStep,
    ImplicitAdjoint,
    NeuralStep,
    Picard,
    Tolerance,
    fixed_point,
)
from fpi_cuda.operators import inner_product, partial

pytestmark = pytest.mark.usefixtures("one_thread")


def step(x, z, w):
    return torch.tanh(x @ w.mT + z)


def jacobians(x, z, w):
    """The dense ∂g/∂x of every sample, [B, N, N]."""
    return vmap(jacrev(lambda x, z: step(x[None], z[None], w)[0]))(x, z)


def test_theorem_1_twenty_starts_reach_one_fixed_point(backend, solver):
    w, z = contraction(6, 0.9), torch.randn(1, 6, dtype=torch.float64)
    x0 = torch.cat([10 ** (i / 4 - 2) * torch.randn(1, 6).double() for i in range(20)])
    solution = fixed_point(
        step,
        x0,
        z.expand(20, 6),
        params=(w,),
        solver=solver,
        backend=backend,
        tolerance=TIGHT,
        max_iterations=1000,
    )
    assert solution.converged.all()
    spread = (solution.x - solution.x[:1]).abs().max()
    assert spread < 1e-12 / (1 - 0.9)


def test_theorem_1_error_falls_by_the_lipschitz_constant_each_iteration(backend):
    """Banach: the error after n steps is at most k^n/(1-k) times the first step."""
    k = 0.7
    w, z = contraction(6, k), torch.randn(3, 6, dtype=torch.float64)
    x0 = torch.randn_like(z)
    first = torch.linalg.vector_norm(step(x0, z, w) - x0, dim=1)
    limit = fixed_point(step, x0, z, params=(w,), tolerance=TIGHT, max_iterations=1000).x
    for n in (1, 3, 10, 30):
        x = fixed_point(
            step,
            x0,
            z,
            params=(w,),
            solver=Picard(),
            tolerance=Tolerance(0, 0),
            backend=backend,
            max_iterations=n,
        ).x
        error = torch.linalg.vector_norm(x - limit, dim=1)
        assert (error <= k**n / (1 - k) * first + 1e-12).all()


@pytest.mark.parametrize("k", [0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_proposition_1_the_adjoint_contracts_at_least_as_fast(k, seed, backend):
    w = contraction(8, k, seed)
    z = torch.randn(5, 8, dtype=torch.float64).mul_(0.3).requires_grad_()
    solution = fixed_point(
        step,
        torch.zeros_like(z),
        z,
        params=(w,),
        solver=Picard(),
        backend=backend,
        tolerance=Tolerance(1e-10),
        max_iterations=3000,
        adjoint=ImplicitAdjoint(tolerance=Tolerance(1e-8)),
    )
    norms = torch.linalg.matrix_norm(jacobians(solution.x.detach(), z.detach(), w), 2)
    assert (norms <= k).all()
    solution.x.backward(torch.randn_like(z))
    assert solution.adjoint.converged.all()
    # Residuals of the adjoint's iteration shrink by ‖J‖₂ or faster, so their mean rate does too.
    assert (solution.adjoint.contraction <= 1.01 * norms).all()
    assert (solution.adjoint.contraction <= 1.01 * k).all()


def test_equation_9_the_gradient_in_z_of_an_additive_map_is_c(backend, solver):
    """With g = f(x) + z, ∂g/∂z is I, so ∇z L is c itself, which solves c = Jᵀc + v."""
    w, v = contraction(5, 0.8), torch.randn(3, 5, dtype=torch.float64)
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def g(x, z, w):
        return torch.tanh(x @ w.mT) + z

    x = fixed_point(
        g,
        torch.zeros_like(z),
        z,
        params=(w,),
        solver=solver,
        backend=backend,
        tolerance=TIGHT,
        adjoint=TIGHT_ADJOINT,
    ).x
    (c,) = torch.autograd.grad(x, z, v)
    (jc,) = partial(inner_product((c,), lambda x: (g(x, z.detach(), w),)), x.detach())
    torch.testing.assert_close(c, jc + v, rtol=1e-11, atol=1e-12)


def test_equation_6_the_derivative_in_a_parameter_is_the_dense_solve(backend, solver):
    w = contraction(4, 0.8)
    t = torch.tensor(0.9, dtype=torch.float64)
    z = torch.randn(2, 4, dtype=torch.float64)

    def g(x, z, w, t):
        return torch.tanh(t * (x @ w.mT) + z)

    def f(t):
        return fixed_point(
            g,
            torch.zeros_like(z),
            z,
            params=(w, t),
            solver=solver,
            backend=backend,
            tolerance=TIGHT,
            adjoint=TIGHT_ADJOINT,
        ).x

    x = f(t)
    mine = jacrev(f)(t)
    slope = 1 - x**2
    inner = x @ w.mT
    for i in range(2):
        jacobian = slope[i, :, None] * t * w
        dense = torch.linalg.solve(
            torch.eye(4, dtype=torch.float64) - jacobian, slope[i] * inner[i]
        )
        torch.testing.assert_close(mine[i], dense, rtol=1e-10, atol=1e-11)


def test_fpi_nn_is_a_fixed_point_of_its_net(backend, solver):
    net = Net()
    layer = FixedPointLayer(
        NeuralStep(net), state_shape=(3,), solver=solver, backend=backend, tolerance=TIGHT
    )
    z = torch.randn(4, 2, dtype=torch.float64)
    x = layer(z)
    torch.testing.assert_close(net(x, z), x, rtol=1e-12, atol=1e-12)


def test_fpi_gd_finds_the_minimiser_of_its_energy(backend, solver):
    energy = Energy()
    layer = FixedPointLayer(
        GradientStep(energy, 0.4),
        state_shape=(3,),
        solver=solver,
        backend=backend,
        tolerance=TIGHT,
    )
    a = torch.randn(4, 2, dtype=torch.float64)
    x = layer(a).detach().requires_grad_()
    (slope,) = torch.autograd.grad(energy(x, a).sum(), x)
    assert slope.abs().max() < 1e-11
    for direction in torch.randn(20, 4, 3, dtype=torch.float64):
        assert (energy(x + 0.01 * direction, a) > energy(x, a)).all()


def test_fpi_gd_of_a_quadratic_energy_is_its_closed_form(backend, solver):
    """½ xᵀQx − aᵀx: the minimiser is Q⁻¹a, its derivative Q⁻¹."""
    m = torch.randn(3, 3, dtype=torch.float64)
    q = m @ m.mT + 0.5 * torch.eye(3, dtype=torch.float64)
    largest = torch.linalg.eigvalsh(q)[-1]
    a = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def energy(x, a, q):
        return 0.5 * ((x @ q) * x).sum(1) - (a * x).sum(1)

    class Quadratic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Parameter(q)

        def forward(self, x, a):
            return energy(x, a, self.q)

    layer = FixedPointLayer(
        GradientStep(Quadratic(), float(1 / largest)),
        solver=solver,
        backend=backend,
        tolerance=TIGHT,
        adjoint=TIGHT_ADJOINT,
        max_iterations=5000,
    )
    x = layer(a)
    torch.testing.assert_close(x, torch.linalg.solve(q, a.mT).mT, rtol=1e-9, atol=1e-10)
    v = torch.randn_like(x)
    (da,) = torch.autograd.grad(x, a, v)
    torch.testing.assert_close(da, torch.linalg.solve(q, v.mT).mT, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("learned", [False, True])
def test_fpi_gd_step_size_moves_no_fixed_point_and_has_no_gradient(learned, backend):
    """x̂ is where the slope is 0, whatever γ: its derivative in a learned γ is 0."""
    a = torch.randn(2, 2, dtype=torch.float64)
    energy, values = Energy(), []
    for gamma in (0.2, 0.5):
        size = torch.nn.Parameter(torch.tensor(gamma, dtype=torch.float64)) if learned else gamma
        layer = FixedPointLayer(
            GradientStep(energy, size),
            state_shape=(3,),
            backend=backend,
            tolerance=TIGHT,
            adjoint=TIGHT_ADJOINT,
        )
        values.append(layer(a))
        if learned:
            (slope,) = torch.autograd.grad(values[-1].sin().sum(), size, retain_graph=True)
            assert abs(slope.item()) < 1e-10
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-11)


def test_state_and_input_need_not_have_the_same_shape(backend):
    layer = FixedPointLayer(NeuralStep(Net(n=5, d=2)), state_shape=(5,), backend=backend)
    assert layer(torch.randn(3, 2, dtype=torch.float64)).shape == (3, 5)


def test_memory_of_the_graph_does_not_grow_with_the_iterations(backend):
    """One node a layer: what backward keeps is x̂, z and θ."""
    saved = []

    def pack(t):
        saved.append(t.numel())
        return t

    w = contraction(6, 0.99)
    z = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    sizes = []
    for n in (5, 500):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fixed_point(
                step,
                torch.zeros_like(z),
                z,
                params=(w,),
                tolerance=Tolerance(0, 0),
                max_iterations=n,
                backend=backend,
            )
        sizes.append(sum(saved))
    assert sizes[0] == sizes[1]
    assert sizes[0] <= 2 * z.numel() + w.numel() + 3
    assert math.isfinite(sizes[0])


@pytest.mark.parametrize("inside", [False, True], ids=["z from outside", "z of the mode"])
def test_an_energy_has_its_gradient_in_inference_mode(inside, backend):
    """Where torch.enable_grad does nothing: zeros would come out, called CONVERGED."""
    z = torch.randn(3, 6, dtype=torch.float64)
    layer = FixedPointLayer(GradientStep(Energy(6, 6).double(), 0.3), backend=backend)
    with torch.no_grad():
        expected = layer(z)
    with torch.inference_mode():
        z = z * 1 if inside else z
        assert torch.equal(layer(z), expected)
        (slope,) = partial(lambda x: x.sin().sum(), z)
        torch.testing.assert_close(slope, z.cos())
