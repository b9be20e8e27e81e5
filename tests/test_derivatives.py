"""Derivatives of every order, by torch.autograd and by torch.func, per backend and solver."""

import pytest
import torch
from helpers import (
    SOLVERS,
    TIGHT,
    TIGHT_ADJOINT,
    Counter,
    Energy,
    Net,
    assert_close,
    contraction,
    linear,
    linear_solution,
    unroll,
)
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacrev, jvp, vjp, vmap
from torch.func import grad as fgrad

from fpi_cuda import (
    Anderson,
    FixedPointLayer,
    GradientStep,
    ImplicitAdjoint,
    NeuralStep,
    Picard,
    Tolerance,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# x = tanh(0.6 x + a) at a = 0.7: x', x'', x''' by implicit differentiation.
D1, D2, D3 = 0.373167250, -0.932071591, 2.762671450


def tight(backend, solver):
    return {
        "solver": solver,
        "backend": backend,
        "tolerance": TIGHT,
        "adjoint": TIGHT_ADJOINT,
        "max_iterations": 500,
    }


@pytest.fixture
def options(backend, solver):
    return tight(backend, solver)


def double(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=g)


def scalar_g(x, a):
    return torch.tanh(0.6 * x + a)


def form(name, options):
    step = NeuralStep(Net()) if name == "NN" else GradientStep(Energy(), 0.4)
    return FixedPointLayer(step, state_shape=(3,), **options)


# --- closed forms ----------------------------------------------------------------------------


def test_linear_map_has_the_closed_forms_value_and_first_and_second_derivatives(options):
    a, z = contraction(3, 0.7), double(2, 3)

    def solved(z, a):
        return fixed_point(linear, torch.zeros_like(z), z, params=(a,), **options).x

    def loss(solution):
        return lambda z, a: solution(z, a).sin().sum()

    assert_close(solved(z, a), linear_solution(z, a))
    inputs = (z, a)
    for mine, true in zip(
        torch.autograd.functional.jacobian(solved, inputs),
        torch.autograd.functional.jacobian(linear_solution, inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-11)
    mine = torch.autograd.functional.hessian(loss(solved), inputs)
    true = torch.autograd.functional.hessian(loss(linear_solution), inputs)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(mine[i][j], true[i][j], rtol=1e-10, atol=1e-10)


def test_gradient_is_the_dense_adjoint_solve(options):
    w, z, v = (
        contraction(4, 0.8).requires_grad_(),
        double(2, 4).requires_grad_(),
        double(2, 4, seed=1),
    )

    def g(x, z, w):
        return torch.tanh(x @ w.mT + z)

    x = fixed_point(g, torch.zeros_like(z), z, params=(w,), **options).x
    dz, dw = grad(x, (z, w), v)
    with torch.no_grad():
        slope = 1 - x**2  # tanh' at the fixed point
        for i in range(2):
            jacobian = slope[i, :, None] * w
            c = torch.linalg.solve((torch.eye(4, dtype=torch.float64) - jacobian).mT, v[i])
            torch.testing.assert_close(dz[i], slope[i] * c, rtol=1e-10, atol=1e-11)
        c = torch.stack(
            [
                torch.linalg.solve(torch.eye(4, dtype=torch.float64) - (s[:, None] * w).mT, r)
                for s, r in zip(slope, v, strict=True)
            ]
        )
        torch.testing.assert_close(dw, (slope * c).mT @ x, rtol=1e-10, atol=1e-11)


def test_scalar_map_has_three_right_derivatives_by_autograd(options):
    a = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    x = fixed_point(scalar_g, torch.zeros_like(a), a, **options).x
    (d1,) = grad(x.sum(), a, create_graph=True)
    (d2,) = grad(d1.sum(), a, create_graph=True)
    (d3,) = grad(d2.sum(), a)
    found = torch.cat([d1, d2, d3]).flatten()
    expected = torch.tensor([D1, D2, D3], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-8)


def test_scalar_map_has_three_right_derivatives_by_nested_func_grad(options):
    def f(a):
        return fixed_point(
            scalar_g, torch.zeros(1, 1, dtype=a.dtype), a[None, None], **options
        ).x.sum()

    a = torch.tensor(0.7, dtype=torch.float64)
    found = torch.stack([fgrad(f)(a), fgrad(fgrad(f))(a), fgrad(fgrad(fgrad(f)))(a)])
    expected = torch.tensor([D1, D2, D3], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_scalar_map_has_two_right_derivatives_by_jacrev_and_vjp(options):
    def f(a):
        return fixed_point(
            scalar_g, torch.zeros(1, 1, dtype=a.dtype), a[None, None], **options
        ).x.sum()

    a = torch.tensor(0.7, dtype=torch.float64)
    _, pull = vjp(f, a)
    ones = torch.ones((), dtype=torch.float64)
    found = torch.stack([jacrev(f)(a), pull(ones)[0], jacrev(jacrev(f))(a), jacrev(fgrad(f))(a)])
    expected = torch.tensor([D1, D1, D2, D2], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_third_jacrev_of_scalar_map_is_right(backend):
    def f(a):
        x0 = torch.zeros(1, 1, dtype=a.dtype)
        return fixed_point(scalar_g, x0, a[None, None], **tight(backend, Picard())).x.sum()

    found = jacrev(jacrev(jacrev(f)))(torch.tensor(0.7, dtype=torch.float64))
    assert abs(found.item() - D3) < 1e-8


# --- finite differences ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NN", "GD"])
def test_first_derivatives_pass_gradcheck(name, options):
    layer = form(name, options)
    z = double(2, 2).requires_grad_()
    # Random projections of the Jacobians on the slow oracle, the full ones elsewhere.
    fast = options["backend"] == "reference"
    assert gradcheck(lambda z, *_: layer(z), (z, *layer.parameters()), fast_mode=fast)
    assert layer.last.converged.all()


@pytest.mark.parametrize("name", ["NN", "GD"])
def test_second_derivatives_pass_gradgradcheck(name, options):
    layer = form(name, options)
    z = double(2, 2).requires_grad_()
    fast = options["backend"] == "reference" or name == "GD"
    assert gradgradcheck(lambda z, *_: layer(z), (z, *layer.parameters()), fast_mode=fast)


@pytest.mark.parametrize("name", ["NN", "GD"])
def test_third_derivatives_pass_gradgradcheck_of_the_first(name, options):
    layer = form(name, options)
    z = double(1, 2).requires_grad_()
    weight = next(layer.parameters())

    def first(z, _):
        return grad(layer(z).sin().sum(), (z, weight), create_graph=True)

    assert gradgradcheck(first, (z, weight), fast_mode=True)


@pytest.mark.parametrize("name", ["NN", "GD"])
def test_second_derivatives_equal_those_of_deep_unrolling(name, options):
    layer = form(name, options)
    z = double(2, 2).requires_grad_()
    tensors = (z, *layer.parameters())

    def second(x):
        first = grad(x.sin().sum(), tensors, create_graph=True)
        total = sum((t * double(*t.shape, seed=i)).sum() for i, t in enumerate(first))
        return grad(total, tensors)

    mine = second(layer(z))
    if name == "NN":
        true = second(unroll(layer.g, torch.zeros(2, 3, dtype=z.dtype), z, steps=150))
    else:
        energy = layer.g.energy

        def descend(x, z):  # no P here: the gradient as plain autograd takes it
            return x - 0.4 * grad(energy(x, z).sum(), x, create_graph=True)[0]

        x0 = torch.zeros(2, 3, dtype=z.dtype, requires_grad=True)
        true = second(unroll(descend, x0, z, steps=60))
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_state_tuple_passes_gradcheck_and_gradgradcheck(options):
    z, w = double(2, 2).requires_grad_(), contraction(5, 0.5).requires_grad_()

    def g(x, z, w):
        u, y = x
        joint = torch.tanh(torch.cat([u, y.flatten(1)], 1) @ w.mT)
        return joint[:, :3] + z.sum(1, keepdim=True), joint[:, 3:].reshape(-1, 2, 1) * z[..., None]

    x0 = (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 2, 1, dtype=torch.float64))

    def f(z, w):
        return fixed_point(g, x0, z, params=(w,), **options).x

    assert [t.shape for t in f(z, w)] == [(2, 3), (2, 2, 1)]
    assert gradcheck(f, (z, w), fast_mode=True)
    assert gradgradcheck(f, (z, w), fast_mode=True)


# --- torch.func ------------------------------------------------------------------------------


@pytest.fixture
def problem(options):
    """F(z, w) -> x over a batch, with values for both."""

    def f(z, w):
        x0 = torch.zeros(z.shape[0], 3, dtype=z.dtype)
        return fixed_point(
            lambda x, z, w: torch.tanh(x @ w.mT + z), x0, z, params=(w,), **options
        ).x

    return f, double(2, 3), contraction(3, 0.6)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_jacrev_equals_autograds_jacobian(problem):
    f, z, w = problem
    for i in range(2):
        mine = jacrev(f, argnums=i)(z, w)
        close(mine, torch.autograd.functional.jacobian(f, (z, w))[i])


def test_jacrev_of_jacrev_equals_autograds_hessian_in_params(problem):
    f, z, w = problem

    def loss(w):
        return f(z, w).sin().sum()

    close(jacrev(jacrev(loss))(w), torch.autograd.functional.hessian(loss, w))


def test_vmap_over_inputs_equals_a_loop(problem):
    f, _, w = problem
    zs = double(3, 2, 3, seed=2)
    close(vmap(lambda z: f(z, w))(zs), torch.stack([f(z, w) for z in zs]))
    inner = vmap(lambda z: f(z, w), in_dims=1, out_dims=1)(zs)
    close(inner, torch.stack([f(zs[:, i], w) for i in range(2)], 1))


def test_vmap_over_params_equals_a_loop(problem):
    f, z, w = problem
    ws = torch.stack([w, 0.5 * w, -w])
    close(vmap(lambda w: f(z, w))(ws), torch.stack([f(z, w) for w in ws]))


def test_vmap_over_both_and_nested_equals_loops(problem):
    f, z, w = problem
    zs, ws = torch.stack([z, -z]), torch.stack([w, 0.5 * w])
    close(vmap(f)(zs, ws), torch.stack([f(a, b) for a, b in zip(zs, ws, strict=True)]))
    nested = vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))(zs, ws)
    close(nested, torch.stack([torch.stack([f(a, b) for b in ws]) for a in zs]))


def test_vmap_over_x0_finds_one_fixed_point(options):
    z, w = double(2, 3), contraction(3, 0.6)
    x0 = double(4, 2, 3, seed=3, scale=5.0)

    def f(x0):
        return fixed_point(linear, x0, z, params=(w,), **options).x

    close(vmap(f)(x0), linear_solution(z, w).expand(4, 2, 3))


def test_vmap_keeps_samples_of_every_slice_to_their_own_end(backend):
    """One slice is easy, one hard: their counts differ and stand in the record."""
    w = torch.stack([contraction(3, 0.1), contraction(3, 0.9)])
    z, seen = double(2, 3), []

    def f(w):
        sol = fixed_point(
            linear, torch.zeros_like(z), z, params=(w,), solver=Picard(), backend=backend
        )
        seen.append(sol.iterations)
        return sol.x

    vmap(f)(w)
    (iterations,) = seen
    assert iterations.shape == (2, 2)
    assert iterations[0].max() < iterations[1].min()


def test_vmap_of_grad_is_the_per_sample_gradient(problem):
    f, z, w = problem
    each = vmap(fgrad(lambda z, w: f(z[None], w).sin().sum(), argnums=1), in_dims=(0, None))(z, w)
    loop = torch.stack([fgrad(lambda w, t=t: f(t[None], w).sin().sum())(w) for t in z])
    close(each, loop)
    close(each.sum(0), fgrad(lambda w: f(z, w).sin().sum())(w))


def test_grad_of_vmap_equals_grad_of_a_loop(problem):
    f, z, w = problem
    ws = torch.stack([w, 0.5 * w])
    mine = fgrad(lambda ws: vmap(lambda w: f(z, w))(ws).sin().sum())(ws)
    close(mine, fgrad(lambda ws: torch.stack([f(z, w) for w in ws]).sin().sum())(ws))


def test_second_derivative_under_vmap_equals_a_loop(problem):
    f, z, w = problem

    def curvature(w):
        return fgrad(lambda t: fgrad(lambda w: f(z, w).sin().sum())(t).square().sum())(w)

    ws = torch.stack([w, 0.5 * w])
    close(vmap(curvature)(ws), torch.stack([curvature(w) for w in ws]))


def test_vectorized_jacobian_and_batched_grads_equal_the_plain_ones(problem):
    f, z, w = problem
    jacobian = torch.autograd.functional.jacobian
    plain = jacobian(f, (z, w))
    for mine, true in zip(jacobian(f, (z, w), vectorize=True), plain, strict=True):
        close(mine, true)
    z = z.clone().requires_grad_()
    x = f(z, w)
    basis = torch.eye(6, dtype=z.dtype).reshape(6, 2, 3)
    (rows,) = grad(x, z, basis, is_grads_batched=True)
    close(rows.reshape(2, 3, 2, 3), plain[0])


def test_functional_call_puts_other_parameters_in(options):
    layer, other = form("NN", options), form("NN", options)
    other.g.net = Net(seed=1)
    z = double(2, 2)
    params = {k: v.detach() for k, v in other.named_parameters()}

    def loss(params):
        return functional_call(layer, params, (z,)).sin().sum()

    mine = fgrad(loss)(params)
    true = dict(zip(params, grad(other(z).sin().sum(), list(other.parameters())), strict=True))
    for name, value in mine.items():
        close(value, true[name])


def test_vmap_over_an_ensemble_of_modules_equals_a_loop(options):
    layers = [form("NN", options) for _ in range(2)]
    layers[1].g.net = Net(seed=1)
    params, buffers = torch.func.stack_module_state(layers)
    z = double(2, 2)
    mine = vmap(lambda p, b: functional_call(layers[0], (p, b), (z,)))(params, buffers)
    close(mine, torch.stack([layer(z) for layer in layers]))


# --- what can't be right raises --------------------------------------------------------------


def test_forward_mode_raises_and_never_returns_a_silent_zero(problem):
    f, z, w = problem
    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        jvp(lambda z: f(z, w), (z,), (torch.ones_like(z),))
    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        hessian(lambda z: f(z, w).sum())(z)
    with (
        pytest.raises((NotImplementedError, RuntimeError), match="forward"),
        torch.autograd.forward_ad.dual_level(),
    ):
        f(torch.autograd.forward_ad.make_dual(z, torch.ones_like(z)), w)


def test_nested_forward_mode_raises(problem):
    f, z, w = problem
    ones = torch.ones_like(z)

    def inner(z):
        return jvp(lambda z: f(z, w), (z,), (ones,))[1]

    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        jvp(inner, (z,), (ones,))


def test_captured_tensor_has_a_right_first_derivative(options):
    w, z = contraction(3, 0.6).requires_grad_(), double(2, 3).requires_grad_()
    captured = fixed_point(
        lambda x, z: torch.tanh(x @ w.mT + z), torch.zeros_like(z), z, **options
    ).x
    passed = fixed_point(
        lambda x, z, w: torch.tanh(x @ w.mT + z), torch.zeros_like(z), z, params=(w,), **options
    ).x
    for mine, true in zip(
        grad(captured.sin().sum(), (w, z)), grad(passed.sin().sum(), (w, z)), strict=True
    ):
        close(mine, true)


def test_captured_tensor_that_depends_on_others_has_a_right_first_derivative(options):
    w, z = contraction(3, 0.6).requires_grad_(), double(2, 3).requires_grad_()

    def solve(w, z):
        half = w * 0.5  # not a leaf
        return fixed_point(lambda x: torch.tanh(x @ half.mT + z), x0, per_sample=False, **options)

    x0 = torch.zeros(2, 3, dtype=torch.float64)
    mine = grad(solve(w, z).x.sin().sum(), (w, z))
    true = grad(
        unroll(lambda x: torch.tanh(x @ (w * 0.5).mT + z), x0, steps=100).sin().sum(), (w, z)
    )
    for a, b in zip(mine, true, strict=True):
        close(a, b)


def test_second_derivative_with_a_captured_tensor_raises_the_advice(options):
    w, z = contraction(3, 0.6).requires_grad_(), double(2, 3).requires_grad_()
    x = fixed_point(lambda x, z: torch.tanh(x @ w.mT + z), torch.zeros_like(z), z, **options).x
    with pytest.raises(RuntimeError, match=r"captures.*pass it in `inputs`.*or `params`"):
        grad(x.sum(), z, create_graph=True)


def test_captured_tensor_under_func_grad_raises_the_advice(options):
    z = double(2, 3)

    def f(w):
        return fixed_point(
            lambda x, z: torch.tanh(x @ w.mT + z), torch.zeros_like(z), z, **options
        ).x

    with pytest.raises(RuntimeError, match="captures"):
        fgrad(lambda w: f(w).sum())(contraction(3, 0.6))


# --- what the backward does ------------------------------------------------------------------


def test_first_order_backward_calls_g_once(options):
    g = Counter(lambda x, z: torch.tanh(0.6 * x + z))
    z = double(2, 3).requires_grad_()
    solution = fixed_point(g, torch.zeros_like(z), z, per_sample=False, **options)
    assert g.calls == solution.evaluations
    assert g.calls > 2
    forward = g.calls
    solution.x.sum().backward()
    assert g.calls == forward + 1
    assert solution.adjoint.iterations.max() > 2
    assert solution.adjoint.evaluations == 1


def test_loss_scaled_by_1e_minus_5_gives_the_same_gradient_to_rounding(backend, solver):
    z = torch.randn(3, 4, requires_grad=True)
    w = contraction(4, 0.8, dtype=torch.float32).requires_grad_()

    def gradients(scale):
        solution = fixed_point(
            lambda x, z, w: torch.tanh(x @ w.mT + z),
            torch.zeros_like(z),
            z,
            params=(w,),
            solver=solver,
            backend=backend,
        )
        found = grad(solution.x.sin().sum() * scale, (z, w))
        return found, solution.adjoint.iterations

    whole, iterations = gradients(1.0)
    small, small_iterations = gradients(1e-5)
    assert torch.equal(iterations, small_iterations)
    for a, b in zip(whole, small, strict=True):
        assert_close(b * 1e5, a)


def test_x0_gets_no_gradient(options):
    z = double(2, 3).requires_grad_()
    x0 = double(2, 3, seed=1).requires_grad_()
    x = fixed_point(scalar_g, x0, z, **options).x
    assert grad(x.sum(), (z, x0), allow_unused=True)[1] is None


def test_zero_cotangent_gives_a_zero_gradient_without_an_iteration(options):
    z = double(2, 3).requires_grad_()
    solution = fixed_point(scalar_g, torch.zeros_like(z), z, **options)
    (gradient,) = grad(solution.x, z, torch.zeros_like(z))
    assert torch.equal(gradient, torch.zeros_like(z))
    assert solution.adjoint.iterations.max() == 0


def test_only_the_samples_with_a_cotangent_are_iterated_backward(options):
    z = double(3, 2).requires_grad_()
    solution = fixed_point(scalar_g, torch.zeros_like(z), z, **options)
    (gradient,) = grad(solution.x[1].sum(), z)
    assert solution.adjoint.iterations.tolist()[::2] == [0, 0]
    assert gradient[::2].abs().max() == 0
    assert gradient[1].abs().min() > 0


def test_gradient_does_not_depend_on_x0(options):
    z = double(2, 3).requires_grad_()

    def gradient(x0):
        return grad(fixed_point(scalar_g, x0, z, **options).x.sin().sum(), z)[0]

    close(gradient(torch.zeros_like(z)), gradient(double(2, 3, seed=4, scale=3)))


def test_only_needed_gradients_are_given(options):
    z, w = double(2, 3), contraction(3, 0.6).requires_grad_()
    x = fixed_point(linear, torch.zeros_like(z), z, params=(w,), **options).x
    (dw,) = grad(x.sum(), w)
    reference = linear_solution(z, w)
    close(dw, grad(reference.sum(), w)[0])


def test_params_that_g_ignores_get_a_zero_or_no_gradient(options):
    z, unused = double(2, 3).requires_grad_(), double(4).requires_grad_()
    x = fixed_point(
        lambda x, z, _: scalar_g(x, z), torch.zeros_like(z), z, params=(unused,), **options
    )
    (d,) = grad(x.x.sum(), unused, allow_unused=True, retain_graph=True)
    assert d is None or not d.any()
    first = grad(x.x.sum(), (z, unused), create_graph=True, allow_unused=True)
    (second,) = grad(first[0].sum(), unused, allow_unused=True)
    assert second is None or not second.any()


def test_integer_input_rides_along(options):
    index = torch.tensor([[1], [0]])
    z = double(2, 3).requires_grad_()

    def g(x, z, index):
        return 0.5 * torch.tanh(x) + z * (1 + index)

    def derivatives(x):
        (first,) = grad(x.sin().sum(), z, create_graph=True)
        return first, grad(first.sum(), z)[0]

    mine = derivatives(fixed_point(g, torch.zeros_like(z), z, index, **options).x)
    true = derivatives(unroll(g, torch.zeros_like(z), z, index, steps=80))
    for a, b in zip(mine, true, strict=True):
        close(a, b)


def test_adjoint_uses_its_own_solver_tolerance_and_limit():
    z = double(2, 3).requires_grad_()

    def solve(adjoint):
        solution = fixed_point(
            lambda x, z: 0.9 * torch.tanh(x) + 0.1 * z,
            torch.zeros_like(z),
            z,
            solver=Anderson(),
            adjoint=adjoint,
            tolerance=TIGHT,
            on_failure="return",
        )
        solution.x.sum().backward()
        return solution.adjoint

    loose = solve(ImplicitAdjoint(solver=Picard(), tolerance=Tolerance(1e-2)))
    exact = solve(ImplicitAdjoint(solver=Picard(), tolerance=Tolerance(1e-10)))
    limited = solve(ImplicitAdjoint(solver=Picard(), tolerance=Tolerance(1e-10), max_iterations=3))
    assert loose.iterations.max() < exact.iterations.max()
    assert limited.iterations.max() == 3
    assert not limited.converged.any()


@pytest.mark.parametrize("name", list(SOLVERS))
def test_backends_agree_on_value_and_gradient(name):
    def run(backend):
        layer = form("NN", tight(backend, SOLVERS[name]))
        z = double(3, 2).requires_grad_()
        x = layer(z)
        return x, grad(x.sin().sum(), (z, *layer.parameters())), layer.last

    x, gradients, solution = run("reference")
    y, others, native = run("native")
    close(x, y)
    assert (solution.iterations - native.iterations).abs().max() <= 1
    for a, b in zip(gradients, others, strict=True):
        close(a, b)
