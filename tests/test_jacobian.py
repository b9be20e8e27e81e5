"""Norm, radius and penalty of ∂g/∂x at a point, against dense Jacobians."""

import pytest
import torch
from helpers_contraction import dense
from torch import nn

from fpi_cuda.contraction import jacobian_norm, jacobian_penalty, jacobian_radius

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


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 7])
def test_radius_is_the_mean_growth_of_the_last_half(x_and_z, iterations):
    x, z = (t.flatten(1) for t in x_and_z)
    a = torch.randn(6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    growth, v = [], z
    for _ in range(iterations):
        grown = (v / torch.linalg.vector_norm(v, dim=1, keepdim=True)) @ a
        growth.append(torch.linalg.vector_norm(grown, dim=1))
        v = grown
    half = growth[iterations // 2 :]
    radius, _ = jacobian_radius(lambda x: x @ a.T, x, v=z, iterations=iterations)
    torch.testing.assert_close(radius, torch.stack(half).prod(0) ** (1 / len(half)))


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


@pytest.mark.parametrize("dtype, exponent", [(torch.float32, 100), (torch.float64, 900)])
@pytest.mark.parametrize("measure", [jacobian_norm, jacobian_radius])
def test_a_jacobian_of_any_scale_is_measured_as_well(measure, dtype, exponent):
    a, x = torch.randn(3, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    start = torch.randn(2, 3, dtype=dtype)

    def size(factor):
        return measure(lambda x: x @ (a * factor).T, x, v=start, iterations=6)[0].detach() / factor

    for e in (-exponent, exponent):
        torch.testing.assert_close(size(2.0**e), size(1.0))
