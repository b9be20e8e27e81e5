"""Complex states, inputs, parameters and buffers, against unrolling in float64."""

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, unroll
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

from fpi_cuda import DenseStep, FixedPointLayer, GradientStep, Picard, Tolerance, fixed_point
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


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_complex_values_that_are_wrong_are_refused_with_a_way_out():
    z = torch.zeros(2, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"x0 must be .*complex32.*x0\.to\(.*torch\.view_as_real"):
        fixed_point(lambda x: 0.5 * x, z.to(torch.complex32))
    with pytest.raises(TypeError, match=r"g must return x's dtype.*complex64.*take its real part"):
        fixed_point(lambda x, z: 0.5 * x + z, z.real, z)
    with pytest.raises(
        TypeError, match=r"return x's dtype.*got torch.float32.*\.to\(torch.complex"
    ):
        fixed_point(lambda x: x.abs(), z)
    with pytest.raises(
        TypeError, match=r"return x's dtype, torch.complex64 \(got torch.complex128"
    ):
        fixed_point(lambda x: x.cdouble(), z)
    with pytest.raises(ValueError, match=r"shape \[B, 3\] \(got \(2, 2\)\)"):
        fixed_point(lambda x: x[:, :2], z)
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


# --- complex states --------------------------------------------------------------------------


def of_z(x, z, w):
    """Holomorphic in all."""
    return 0.3 * torch.sin(x @ w + z) + 0.1 * z * x


def of_conjugates(x, z, w):
    return 0.3 * torch.sin(x.conj() @ w + z) + 0.1 * (z.conj() * x.abs().square()).conj()


def within(x, z, w):
    """Beside real tensors; the complex one begins at an odd place of the row."""
    c = of_conjugates(x["c"], z, w)
    return {"r": 0.4 * x["r"].cos() + x["c"].abs().square().sum(-1), "c": c + 0.1 * x["r"][:, None]}


STATES = {
    "holomorphic": (of_z, torch.zeros_like),
    "not holomorphic": (of_conjugates, torch.zeros_like),
    "beside a real tensor": (
        within,
        lambda z: {"r": torch.zeros(len(z), dtype=torch.float64), "c": torch.zeros_like(z)},
    ),
}
STATE = pytest.mark.parametrize("state", STATES.values(), ids=STATES)


def both(state):
    """The solution and the loop's, as functions of z and w that give one tensor."""
    g, start = state

    def flat(x):
        return x if isinstance(x, torch.Tensor) else x["c"] + x["r"].sin()[:, None]

    def solve(z, w, **options):
        given = {"tolerance": TIGHT, "adjoint": TIGHT_ADJOINT, "max_iterations": 500, **options}
        return flat(fixed_point(g, start(z), z, params=(w,), **given).x)

    return solve, lambda z, w: flat(unroll(g, start(z), z, w, steps=STEPS))


@STATE
@pytest.mark.parametrize("per_sample", [True, False])
def test_a_complex_state_and_its_derivatives_are_those_of_the_loop(state, per_sample):
    _, z, w = problem("function")
    solve, loop = both(state)
    x = solve(z, w, per_sample=per_sample)
    assert x.dtype == torch.complex128
    close(x, loop(z, w))
    mine, true = orders(x, (z, w)), orders(loop(z, w), (z, w))
    for a, b in zip(mine, true, strict=True):
        close(a, b)
    first = grad(real(solve(z, w, per_sample=per_sample)), (z, w))  # the way without a graph
    for a, b in zip(first, mine, strict=False):
        close(a, b)


@STATE
def test_transforms_of_a_complex_state(state):
    _, z, w = problem("function")
    z, w = z.detach(), w.detach()

    def of(solve):
        f = torch.func
        loss = lambda z, w: real(solve(z, w))  # noqa: E731
        v = double(4, B, N, seed=3)
        return [
            *f.grad(loss, argnums=(0, 1))(z, w),
            f.vmap(lambda v: f.vjp(lambda w: solve(z, w), w)[1](v)[0])(v),
            f.grad(lambda w: real(f.grad(loss, argnums=1)(z, w)))(w),
            f.vmap(f.grad(loss), in_dims=(1, None))(torch.stack([z, 0.5 * z], 1), w),
            f.vmap(lambda z: f.grad(loss, argnums=1)(z[None], w))(z),
            grad(solve(z, w_ := w.clone().requires_grad_()), w_, v, is_grads_batched=True)[0],
        ]

    for a, b in zip(*map(of, both(state)), strict=True):
        close(a, b)


def test_a_complex_states_record_is_of_absolute_values():
    _, z, w = problem("function")
    x0 = torch.zeros_like(z).detach().conj()
    s = fixed_point(of_conjugates, x0, z, params=(w,), tolerance=Tolerance(1e-3), solver=Picard())
    assert s.residual_norm.dtype == torch.float64 and s.converged.all()
    off = (of_conjugates(s.x, z, w) - s.x).detach().abs().square().sum(1).sqrt()
    close(s.residual_at_x, off)
    assert "x [3, 2] complex128" in repr(s)


def test_a_failed_samples_complex_gradient_is_zero():
    z = torch.tensor([[0.5 + 0.1j], [3 + 30j], [0.2j]], requires_grad=True)
    s = fixed_point(
        lambda x, z: z * x + 1, torch.zeros_like(z), z, solver=Picard(), on_failure="return"
    )
    assert s.status.tolist()[0] == s.status.tolist()[2] == 0 != s.status[1]
    (mine,) = grad(s.x.real.sum(), z)
    true = grad((1 / (1 - z)).real.sum(), z)[0] * (z.detach().abs() < 1)
    torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-4)
    assert s.x.dtype == torch.complex64


def test_a_layer_solves_for_a_complex_state_from_a_complex_start():
    _, z, w = problem("function")
    layer = FixedPointLayer(lambda x, z: of_z(x, z, w.detach()), tolerance=TIGHT)
    x = layer(z, x0=torch.zeros_like(z))
    close(x, unroll(of_z, torch.zeros_like(z), z, w, steps=STEPS))
    layer(z, x0=layer.last.x)
    assert layer.last.iterations.max() == 1


def test_an_energy_of_a_complex_state_descends_along_torchs_gradient():
    """Its minimiser is z; torch's gradient of |x - z|^2 is 2 (x - z)."""
    _, z, _ = problem("function")
    step = GradientStep(lambda x, z: (x - z).abs().square().sum(1), 0.3)
    x0 = torch.zeros_like(z)
    close(step(x0 + 1j, z), x0 + 1j - 0.6 * (x0 + 1j - z))
    x = fixed_point(step, x0, z, tolerance=TIGHT, adjoint=TIGHT_ADJOINT).x
    close(x, z)
    close(grad(real(x), z)[0], grad(real(z), z)[0])


def test_gradcheck_of_a_complex_state():
    _, z, w = problem("function")
    solve, _ = both(STATES["not holomorphic"])
    assert gradcheck(solve, (z, w), fast_mode=True)
    assert gradgradcheck(solve, (z, w), fast_mode=True)
