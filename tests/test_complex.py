"""Complex inputs, parameters and buffers around a real state, against unrolling in float64."""

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, unroll
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

from fpi_cuda import DenseStep, FixedPointLayer, GradientStep, fixed_point
from fpi_cuda.operators import inner_product, partial

pytestmark = pytest.mark.usefixtures("one_thread")

B, N = 3, 2  # of N complex numbers the state is 2 N real ones
STEPS = 80


def double(*shape, seed, scale=1.0, dtype=torch.complex128):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=dtype, generator=g)


def complex_g(x, z, w):
    c = torch.complex(x[..., :N], x[..., N:])
    c = 0.3 * torch.sin(c @ w + z) + 0.1 * z.conj() * c
    return torch.cat([c.real, c.imag], -1)


def energy(x, z, w):
    c = torch.complex(x[..., :N], x[..., N:])
    r = c @ w - z
    return 0.5 * x.square().sum(-1) + (0.3 * (r * r.conj()).real + r.real.cos()).sum(-1)


class Own(nn.Module):
    """A map of x, z and w with both as what the module owns: w a parameter, the rest buffers."""

    def __init__(self, f, z, w):
        super().__init__()
        self.f = f
        self.register_buffer("z", z)
        self.w = nn.Parameter(w)

    def forward(self, x, t):
        return self.f(x, self.z * t, self.w)


def problem(kind):
    """g(x, z, w), and z and w."""
    g = GradientStep(energy, 0.3) if kind == "gradient" else complex_g
    z = double(B, N, seed=0, scale=0.4).requires_grad_()
    return g, z, double(N, N, seed=1, scale=0.3).requires_grad_()


def solved(g, z, w, per_sample="auto", **options):
    x0 = torch.zeros(*z.shape[:-1], 2 * N, dtype=torch.float64)
    given = {"tolerance": TIGHT, "adjoint": TIGHT_ADJOINT, "max_iterations": 500, **options}
    return fixed_point(g, x0, z, params=(w,), per_sample=per_sample, **given).x


def looped(g, z, w):
    return unroll(g, torch.zeros(*z.shape[:-1], 2 * N, dtype=torch.float64), z, w, steps=STEPS)


def real(t):
    """A loss of it that is no square alone."""
    return (t.real.sin() + (t.imag.cos() * t.real if t.is_complex() else 0)).sum()


def orders(x, wanted):
    """First, second and third derivatives in turn."""
    found, y = [], real(x)
    for _ in range(3):
        grads = grad(y, wanted, create_graph=True)
        found += grads
        y = sum(map(real, grads))
    return found


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "per_sample"), [("function", True), ("function", False), ("gradient", True)]
)
def test_derivatives_to_third_order_are_those_of_the_unrolled_loop(kind, per_sample):
    g, z, w = problem(kind)
    mine = orders(solved(g, z, w, per_sample), (z, w))
    for a, b in zip(mine, orders(looped(g, z, w), (z, w)), strict=True):
        assert a.dtype == torch.complex128
        close(a, b)
    first = grad(real(solved(g, z, w, per_sample)), (z, w))  # the way without a graph
    for a, b in zip(first, mine, strict=False):
        close(a, b)


@pytest.mark.parametrize("f", [complex_g, GradientStep(energy, 0.3)], ids=["map", "gradient"])
def test_parameters_and_buffers_of_modules(f):
    _, z, w = problem("function")
    own = Own(f, z[0], w.detach())
    t = torch.full((B, 1), 0.9, dtype=torch.float64, requires_grad=True)  # real beside complex
    layer = FixedPointLayer(
        own, state_shape=(2 * N,), tolerance=TIGHT, adjoint=TIGHT_ADJOINT, max_iterations=500
    )
    wanted = (own.w, z, t)
    loop = unroll(own, torch.zeros(B, 2 * N, dtype=torch.float64), t, steps=STEPS)
    for a, b in zip(orders(layer(t), wanted), orders(loop, wanted), strict=True):
        close(a, b)


def test_gradcheck_with_complex_arguments():
    g, z, w = problem("function")
    assert gradcheck(lambda z, w: solved(g, z, w), (z, w), fast_mode=True)
    assert gradgradcheck(lambda z, w: solved(g, z, w), (z, w), fast_mode=True)


@pytest.mark.parametrize("kind", ["function", "gradient"])
def test_transforms_of_torch_func(kind):
    g, z, w = problem(kind)
    z, w = z.detach(), w.detach()
    twice = torch.stack([z, 0.5 * z])

    def of(solve):
        f = torch.func
        loss = lambda z, w: real(solve(g, z, w))  # noqa: E731
        v = torch.ones(B, 2 * N, dtype=torch.float64)
        return [
            *f.grad(loss, argnums=(0, 1))(z, w),
            *f.vjp(lambda z, w: solve(g, z, w), z, w)[1](v),
            f.grad(lambda w: real(f.grad(loss, argnums=1)(z, w)))(w),
            f.vmap(f.grad(loss), in_dims=(0, None))(twice, w),
            f.vmap(lambda z: f.grad(loss, argnums=1)(z[None], w))(z),
        ]

    for a, b in zip(of(solved), of(looped), strict=True):
        close(a, b)


def test_jacobians_by_transforms_and_by_batched_gradients():
    g, z, w = problem("function")
    v = torch.eye(2 * B * N, dtype=torch.float64).view(-1, B, 2 * N)
    true = torch.stack([grad(looped(g, z, w), w, one)[0] for one in v])
    x = solved(g, z, w)
    for create_graph in (False, True):
        (batched,) = grad(
            x, w, v, is_grads_batched=True, retain_graph=True, create_graph=create_graph
        )
        close(batched, true)
    mapped = torch.func.vmap(
        lambda v: torch.func.vjp(lambda w: solved(g, z.detach(), w), w.detach())[1](v)[0]
    )(v)
    close(mapped, true)


def test_a_captured_complex_tensor_gets_first_derivatives():
    g, z, w = problem("function")
    x0 = torch.zeros(B, 2 * N, dtype=torch.float64)
    x = fixed_point(
        lambda x, z: g(x, z, w), x0, z, tolerance=TIGHT, adjoint=TIGHT_ADJOINT, max_iterations=500
    ).x
    close(grad(real(x), w)[0], grad(real(looped(g, z, w)), w)[0])


def r(a, b, t):
    return (a * b.conj() * t).real.sum() + (a.abs() ** 2).sum().sin()


def test_p_is_torchs_gradient_to_third_order():
    s = [double(2, 3, seed=i).requires_grad_() for i in range(2)]
    s.append(double(2, 1, seed=2, dtype=torch.float64).requires_grad_())
    every = partial(r, *s)
    true = grad(r(*s), s, create_graph=True)
    for order in range(2):
        for a, b in zip(every, true, strict=True):
            close(a, b)
        if order == 0:
            every = grad(sum(map(real, every)), s, create_graph=True)
            true = grad(sum(map(real, true)), s, create_graph=True)
    (only,) = partial(r, *s, which=(0,))
    assert only.dtype == torch.complex128
    assert gradgradcheck(lambda *s: partial(r, *s), tuple(s), fast_mode=True)
    with torch.no_grad():
        close(partial(r, *s)[0], only)


def test_p_of_h_is_the_vector_jacobian_product():
    s = double(3, seed=0).requires_grad_()
    v = double(3, seed=1), double(3, seed=2)

    def u(s):
        return s**2 * (1 + 2j), s.conj() * s.real

    (mine,) = partial(inner_product(v, u), s)
    close(mine, grad(u(s), s, v)[0])


def test_complex_states_and_values_are_refused_with_a_way_out():
    z = torch.zeros(2, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"x0 must be real.*complex64.*torch\.view_as_real"):
        fixed_point(lambda x: 0.5 * x, z)
    with pytest.raises(TypeError, match=r"x0\[1\] must be real.*torch\.view_as_real"):
        fixed_point(lambda x: x, (z.real, z))
    with pytest.raises(TypeError, match=r"g must return x's dtype.*complex64.*torch\.view_as_real"):
        fixed_point(lambda x, z: 0.5 * x + z, z.real, z)
    with pytest.raises(ValueError, match=r"real scalar \(got torch.complex64\); take \.real"):
        partial(lambda s: s.sum(), z)


def test_a_layer_with_a_complex_input_starts_from_real_zeros():
    _, z, w = problem("function")
    layer = FixedPointLayer(lambda x, z: complex_g(x, z, w.detach()), state_shape=(2 * N,))
    assert layer(z.detach()).dtype == torch.float64


@pytest.mark.parametrize("driver", ["auto", "eager"])
def test_known_layers_of_complex_weights(driver):
    """Not computed by kernels of real numbers; alone they are modules like any other."""
    step = DenseStep(3, 3, exact=True)
    for p in step.parameters():
        p.data = p.data.to(torch.complex64)
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"Complex|complex"):
        fixed_point(step, x, x * 1j, driver=driver)
    assert step(x * 1j, x * 1j).dtype == torch.complex64
