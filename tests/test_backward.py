"""What a first-order backward does, and what it leaves out."""

import pytest
import torch
from helpers import (
    SOLVERS,
    TIGHT,
    Counter,
    assert_close,
    contraction,
    linear,
    linear_solution,
    unroll,
)
from helpers_derivatives import (
    close,
    double,
    form,
    options_fixture,  # noqa: F401
    scalar_g,
    tight,
)
from tape import captures, tape_fixture  # noqa: F401
from torch.autograd import grad

from fpi_cuda import Anderson, ImplicitAdjoint, Picard, Tolerance, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")


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


def scaled_gradients(dtype, exponents, options, per_sample=True):
    """By exponent: the gradients under a cotangent times 2**exponent, divided by it; iterations."""
    w = contraction(3, 0.7).to(dtype).requires_grad_()
    z, v = (double(4, 3, seed=s).to(dtype).requires_grad_() for s in (1, 2))
    adjoint = ImplicitAdjoint(solver=Picard())
    options = options | {"per_sample": per_sample, "adjoint": adjoint}
    s = fixed_point(
        lambda x, z, w: torch.tanh(x @ w.mT + z), torch.zeros_like(z), z, params=(w,), **options
    )
    found = {}
    for e in exponents:
        given = v.detach() * 2.0**e
        gradients = grad(s.x, (z, w), given, retain_graph=True)
        found[e] = [t * 2.0**-e for t in gradients], s.adjoint.iterations.tolist()
    return found


@pytest.mark.parametrize("per_sample", [True, False], ids=["samples", "one system"])
@pytest.mark.parametrize(
    "dtype, exponents",
    [(torch.float64, (0, -900, -540, 520, 900)), (torch.float32, (0, -100, -70, 70, 100))],
)
def test_a_cotangent_of_any_scale_gives_the_same_bits(dtype, exponents, per_sample, backend):
    found = scaled_gradients(dtype, exponents, {"backend": backend}, per_sample)
    gradients, iterations = found[0]
    assert min(iterations) > 3
    for e in exponents[1:]:
        assert found[e][1] == iterations
        for a, b in zip(found[e][0], gradients, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "dtype, exponents", [(torch.float64, (0, -900, 900)), (torch.float32, (0, -100, 100))]
)
def test_a_graph_measures_cotangents_of_any_scale_too(dtype, exponents, tape):
    found = scaled_gradients(dtype, exponents, {"driver": "graph", "backend": "native"})
    eager = scaled_gradients(dtype, (0,), {"backend": "native"})[0]
    assert captures() == 2
    for gradients, iterations in found.values():
        assert iterations == eager[1]
        for a, b in zip(gradients, eager[0], strict=True):
            assert torch.equal(a, b)
