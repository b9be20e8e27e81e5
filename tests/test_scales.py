"""Solves are free of the state's scale: the same for a state times any power of two."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from fpi_cuda import Anderson, DenseStep, ImplicitAdjoint, Picard, Tolerance, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")

# Powers of two by which the states below stay normal numbers: least and most exponent.
EXPONENTS = {
    torch.float32: (-100, 100),
    torch.float64: (-900, 900),
    torch.float16: (0, 8),
    torch.bfloat16: (-100, 100),
}
RTOL = {torch.float32: 1e-6, torch.float64: 1e-10}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "native"])
MIXING = {
    "picard": Picard(),
    "damped": Picard(0.7),
    "anderson": Anderson(),
    "short": Anderson(2, beta=0.8),
    "long": Anderson(9),
}


def problem(dtype, n, seed=0):
    """A map that is homogeneous in x and z together; its fixed points are of order 1.

    Each value has two neighbours, with weights of its own, added by elementwise operations: a
    library's products would have other bits where memory begins at another place.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = 0.4 * (2 * torch.rand(2, n, dtype=torch.float64, generator=generator) - 1)
    z = torch.randn(5, n, dtype=torch.float64, generator=generator)
    x0 = torch.randn(5, n, dtype=torch.float64, generator=generator)
    if dtype == torch.float16:  # whose subnormal numbers are near: no value becomes small
        weights, z, x0 = weights.abs(), z.abs() + 1, x0.abs() + 1
    return weights.to(dtype), z.to(dtype), x0.to(dtype)


def neighbours(x, z, weights):
    return weights[0] * x.roll(1, 1) + weights[1] * x.roll(-1, 1) + z


def exponents(dtype):
    least, most = EXPONENTS[dtype]
    return st.one_of(st.sampled_from([least, most]), st.integers(least, most))


def solve(a, z, x0, backend, solver, dtype, **kwargs):
    return fixed_point(
        neighbours,
        x0,
        z,
        params=(a,),
        solver=solver,
        backend=backend,
        tolerance=Tolerance(RTOL.get(dtype), 0.0),
        max_iterations=300,
        on_failure="return",
        per_sample=True,
        **kwargs,
    )


def check(scaled, plain, exponent, exact):
    """Record and state are those of the plain solve, times the power where they have a unit."""
    assert torch.equal(scaled.status, plain.status)
    assert torch.equal(scaled.iterations, plain.iterations)
    power = 2.0**exponent
    # Differences of residuals have all their bits where these are normal numbers by far.
    residual = plain.residual_norm * power
    normal = residual >= 2**24 * torch.finfo(residual.dtype).tiny
    if exact:
        hypothesis.event("all normal" if normal.all() else "some subnormal")
    for name, unit in (
        ("contraction", 1),
        ("residual_norm", power),
        ("error_estimate", power),
        ("x", power),
    ):
        wanted, found = getattr(plain, name) * unit, getattr(scaled, name)
        if not exact:
            torch.testing.assert_close(found, wanted, equal_nan=True)
            continue
        torch.testing.assert_close(found[normal], wanted[normal], equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-3, atol=1e-3 * unit)


@BACKENDS
@pytest.mark.parametrize("solver", MIXING)
@pytest.mark.parametrize("dtype", EXPONENTS)
@hypothesis.given(data=st.data(), n=st.sampled_from([1, 5, 33, 130]))
def test_a_solve_times_a_power_of_two(backend, solver, dtype, data, n):
    exponent = data.draw(exponents(dtype))
    a, z, x0 = problem(dtype, n, data.draw(st.integers(0, 99)))
    plain = solve(a, z, x0, backend, MIXING[solver], dtype)
    power = 2.0**exponent
    scaled = solve(a, z * power, x0 * power, backend, MIXING[solver], dtype)
    if dtype == torch.float16 and isinstance(MIXING[solver], Anderson):
        # The residuals that it keeps are subnormal at some scales, and have fewer bits there.
        assert torch.equal(scaled.converged, plain.converged)
        torch.testing.assert_close(scaled.x, plain.x * power, rtol=0.02, atol=0.02 * power)
        return
    check(scaled, plain, exponent, exact=backend == "native")


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@hypothesis.given(data=st.data())
def test_a_whole_solve_times_a_power_of_two(solver, dtype, data):
    exponent = data.draw(exponents(dtype))
    torch.manual_seed(0)
    step = DenseStep(12, 5, activation="relu", bias=False, exact=True).to(dtype)
    z, x0 = torch.randn(9, 5, dtype=dtype), torch.randn(9, 12, dtype=dtype)

    def whole(power):
        return fixed_point(
            step,
            x0 * power,
            z * power,
            solver=MIXING[solver],
            driver="whole",
            tolerance=Tolerance(RTOL[dtype], 0.0),
            max_iterations=300,
            on_failure="return",
        )

    check(whole(2.0**exponent), whole(1.0), exponent, exact=True)


@BACKENDS
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@hypothesis.given(data=st.data())
def test_a_cotangent_times_a_power_of_two(backend, solver, dtype, data):
    exponent = data.draw(exponents(dtype))
    a, z, x0 = problem(dtype, 7)
    leaf = z.clone().requires_grad_()
    adjoint = ImplicitAdjoint(tolerance=Tolerance(RTOL[dtype]), solver=MIXING[solver])
    s = solve(a, leaf, x0, backend, Picard(), dtype, adjoint=adjoint)
    v = torch.randn(5, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))
    (plain,) = torch.autograd.grad(s.x, leaf, v, retain_graph=True)
    before = s.adjoint
    (scaled,) = torch.autograd.grad(s.x, leaf, v * 2.0**exponent, retain_graph=True)
    assert torch.equal(s.adjoint.iterations, before.iterations)
    assert torch.equal(s.adjoint.status, before.status)
    torch.testing.assert_close(s.adjoint.contraction, before.contraction)
    if backend == "native":
        assert torch.equal(scaled, plain * 2.0**exponent)
    else:
        torch.testing.assert_close(scaled, plain * 2.0**exponent, atol=0, rtol=1e-6)
    eye = torch.eye(7, dtype=torch.float64)
    jacobian = neighbours(eye, 0, a.double()).mT
    direct = torch.linalg.solve(eye - jacobian.mT, v.double().mT).mT
    torch.testing.assert_close(plain.double(), direct, rtol=1e-3, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_residuals_near_the_largest_number(backend, dtype):
    """Two iterates tell all of a line, so the third is its fixed point."""
    c = 0.44 * torch.finfo(dtype).max
    x0 = torch.zeros(1, 1, dtype=dtype)
    solution = fixed_point(lambda x: c - 1.2 * x, x0, backend=backend, on_failure="return")
    assert solution.status.tolist() == [0] and solution.iterations.tolist() == [3]
    torch.testing.assert_close(solution.x / c, torch.full_like(x0, 1 / 2.2))
