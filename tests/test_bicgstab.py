"""BiCGSTAB: adjoints and tangents beside dense float64 solves, its record, and its ends."""

import math

import pytest
import torch
from helpers import contraction, linear
from helpers_bicgstab import (
    HARD,
    adjoint,
    check_steps,
    error,
    exact,
    line,
    memory_of,
    random,
    residual,
    rotation,
    triangular,
    with_eigenvalues,
)
from tape import TapeRecorder, captures, tape_fixture  # noqa: F401
from torch.autograd import forward_ad

from fpi_cuda import (
    Anderson,
    BiCGSTAB,
    DenseStep,
    FixedPointLayer,
    ImplicitAdjoint,
    Picard,
    Status,
    Tolerance,
    backends,
    fixed_point,
)
from fpi_cuda.backends import native, reference
from fpi_cuda.record import Limits, Progress

pytestmark = pytest.mark.usefixtures("one_thread")

TIGHT = Tolerance(1e-12)
# Of gradients at rates up to .6, at default tolerances.
ALLOWED = {
    torch.float64: 4e-6,
    torch.float32: 4e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 7), (5, 33), (1, 130)], ids=str)
def test_adjoints_of_any_shape_and_dtype(backend, dtype, shape):
    a, v = contraction(shape[1], 0.6, dtype=dtype), random(*shape).to(dtype)
    c, record = adjoint(a, v, backend)
    assert record.converged.all()
    assert (error(c, exact(a, v)) < ALLOWED[dtype]).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_nothing_to_solve(backend, shape):
    c, record = adjoint(torch.zeros(shape[1], shape[1]), torch.zeros(shape), backend)
    assert c.shape == shape
    assert record.converged.all()


@pytest.mark.parametrize("name", HARD)
def test_hard_matrices(backend, name):
    a, v = HARD[name], random(3, len(HARD[name]), seed=4)
    c, record = adjoint(a, v, backend, tolerance=Tolerance(1e-9), most=600)
    assert record.converged.all(), record
    condition = float(torch.linalg.cond(torch.eye(len(a)) - a))
    allowed = 1e-9 * max(1.0, float(torch.linalg.matrix_norm(a, 2)))  # c is g of what was judged
    size = torch.maximum(*(torch.linalg.vector_norm(t, dim=1) for t in (c, v)))
    assert (residual(a, c, v) <= 1.01 * allowed * size).all()
    assert (error(c, exact(a, v)) < 3 * allowed * condition).all()


def test_fewer_products_than_anderson_where_it_is_slow():
    for name in ("symmetric .999", "positive .999", "non-normal .999"):
        a, v = HARD[name], random(3, 40)
        counts = [
            adjoint(a, v, solver=s, most=2000)[1].iterations.max() for s in (BiCGSTAB(), Anderson())
        ]
        assert 2 * counts[0] < counts[1], name


def test_samples_end_each_at_its_own_time(backend):
    rates = (0.0, 0.3, 0.9, 0.999, 0.5, 0.99)
    a = torch.stack([triangular(21, r, seed=i) for i, r in enumerate(rates)])
    v = random(6, 21)
    v[4] = 0
    c, record = adjoint(a, v, backend, tolerance=TIGHT)
    together = record.iterations.tolist()
    assert record.converged.all()
    assert together[4] == 0
    assert len(set(together)) == 6
    assert "compacted" in record.path
    assert (error(c, exact(a, v))[v.any(1)] < 1e-8).all()
    assert not c[4].any()
    for i in (0, 2, 3):
        alone, its = adjoint(a[i : i + 1], v[i : i + 1], backend, tolerance=TIGHT)
        assert abs(int(its.iterations) - together[i]) <= 4
        torch.testing.assert_close(alone[0], c[i], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("power", [-100, 100])
def test_no_scale_of_the_loss_changes_anything(backend, power):
    a, v = triangular(33, 0.9).float(), random(4, 33).float()
    c, record = adjoint(a, v, backend)
    scaled, its = adjoint(a, v * 2.0**power, backend)
    assert torch.equal(scaled, c * 2.0**power)
    assert torch.equal(its.iterations, record.iterations)
    assert torch.equal(its.residual_norm, record.residual_norm * 2.0**power)


def test_what_breaks_down_goes_on():
    zero, one = torch.zeros(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    swap = one.roll(1, 0)
    cases = {"zero": zero, "two": 2 * one, "shift": swap.tril()}
    cases |= {"minus": -one, "half turn": rotation(4, math.pi, 1.0), "cycle": 0.9 * swap}
    for name, a in cases.items():
        v = random(3, 4)
        for backend in backends.available():
            if backend == "triton":
                continue
            c, record = adjoint(a, v, backend, tolerance=TIGHT)
            assert record.converged.all(), (name, backend, record)
            assert (error(c, exact(a, v)) < 1e-9).all(), (name, backend)


def test_a_singular_system_ends_without_nan(backend):
    a = with_eigenvalues(torch.tensor([1.0, 0.5, -0.3, 0.1, 0.7], dtype=torch.float64))
    v = random(3, 5)
    c, record = adjoint(a, v, backend, most=60)
    assert c.isfinite().all()
    met = residual(a, c, v) <= 1e-6 * torch.linalg.vector_norm(c, dim=1)
    assert (met | ~record.converged).all()


def test_infinite_derivatives_are_masked(backend):
    z = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    power = torch.tensor([[1.0], [0.5]], dtype=torch.float64)  # of the root it is infinite at 0
    s = fixed_point(
        lambda x, z, power: 0.5 * x**power + z, torch.zeros_like(z), z, power, backend=backend,
        adjoint=ImplicitAdjoint(BiCGSTAB()), on_failure="return", per_sample=True,
    )  # fmt: skip
    (c,) = torch.autograd.grad(s.x, z, torch.ones_like(z))
    assert s.adjoint.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    torch.testing.assert_close(c[0], torch.full((5,), 2.0, dtype=torch.float64))
    assert not c[1].any()


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 10, 31])
def test_a_count_that_ends_leaves_what_its_record_says(backend, most):
    """The last product is of an iterate, so that the residual is measured, never recursive."""
    a, v = with_eigenvalues(line(-0.999, 0.999, 40)), random(4, 40)
    c, record = adjoint(a, v, backend, most=most, tolerance=TIGHT)
    assert record.status.tolist() == [Status.MAX_ITERATIONS] * 4
    assert record.iterations.tolist() == [most] * 4
    assert (residual(a, c, v) <= 0.9991 * record.residual_norm).all()
    first = adjoint(a, v, backend, most=1, tolerance=TIGHT)[1].residual_norm
    assert (record.residual_norm <= first * (1 + 1e-12)).all()


def test_a_fixed_count_is_no_failure(backend):
    a, v = contraction(9, 0.9), random(2, 9)
    c, record = adjoint(a, v, backend, most=25, tolerance=Tolerance(0, 0), on_failure="raise")
    assert record.iterations.tolist() == [25, 25]
    assert (error(c, exact(a, v)) < 1e-12).all()


def test_samples_have_limits_of_their_own(backend):
    a, v = contraction(30, 0.95), random(3, 30)
    rtol = torch.tensor([1e-1, 1e-6, 1e-10])
    most = torch.tensor([100, 9, 100])
    c, record = adjoint(a, v, backend, tolerance=Tolerance(rtol), most=most)
    ends = Status.CONVERGED, Status.MAX_ITERATIONS, Status.CONVERGED
    assert record.status.tolist() == list(ends)
    assert record.iterations[0] < record.iterations[2]
    assert record.iterations[1] == 9
    assert error(c, exact(a, v))[2] < 1e-8


def test_below_the_rounding_level_a_sample_stalls(backend):
    a, v = contraction(30, 0.9).float(), random(3, 30).float()
    c, record = adjoint(a, v, backend, tolerance=Tolerance(1e-12))
    assert set(record.status.tolist()) <= {Status.STALLED, Status.CONVERGED}
    assert (record.iterations < 200).all()
    assert (error(c, exact(a, v)) < 1e-5).all()


def test_rate_and_error_estimate():
    covered = []
    for name, a in HARD.items():
        v = random(5, len(a), seed=9)
        c, record = adjoint(a, v, tolerance=Tolerance(1e-6), most=600)
        norm = float(torch.linalg.matrix_norm(a, 2))
        assert (record.contraction <= norm * (1 + 1e-6)).all(), name
        assert (record.contraction > 0.2 * norm).all(), name
        true = torch.linalg.vector_norm(c - exact(a, v), dim=1)
        covered.append((record.error_estimate >= true).double().mean())
        assert (record.error_estimate < 1e3 * true).all(), name
    assert torch.stack(covered).mean() > 0.8
    _, record = adjoint(0 * HARD["skew 5"], random(2, 40))
    assert record.iterations.tolist() == [1, 1]
    assert record.contraction.isnan().all()
    assert not record.error_estimate.any()


# --- derivatives ---------------------------------------------------------------------------------


def layer(**options):
    step = DenseStep(4, 2).double()
    solver = {"solver": Anderson(), "adjoint": ImplicitAdjoint(BiCGSTAB(), TIGHT)}
    return FixedPointLayer(step, tolerance=TIGHT, **{**solver, **options})


def test_gradients_of_first_and_second_order():
    solve = layer()
    z = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def of(z, *params):
        return torch.func.functional_call(solve, dict(zip(names, params, strict=True)), (z,))

    names, params = zip(*solve.named_parameters(), strict=True)
    given = z, *(p.detach().clone().requires_grad_() for p in params)
    assert torch.autograd.gradcheck(of, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(of, given, fast_mode=True)


def test_tangents_are_solved_by_it_too():
    a = contraction(12, 0.95).requires_grad_()
    z, dz = random(3, 12), random(3, 12, seed=1)
    with forward_ad.dual_level():
        s = fixed_point(
            linear, torch.zeros_like(z), forward_ad.make_dual(z, dz), params=(a,),
            adjoint=ImplicitAdjoint(BiCGSTAB(), TIGHT), tolerance=TIGHT,
        )  # fmt: skip
        tangent = forward_ad.unpack_dual(s.x).tangent
    assert (error(tangent, exact(a.detach().mT, dz)) < 1e-10).all()


def test_whole_solves_say_that_they_have_none():
    pytest.importorskip("fpi_cuda._C")
    solve = layer()
    solve(torch.randn(3, 2, dtype=torch.float64)).sum().backward()
    assert "whole" in solve.last.path
    assert "eager (not whole: the kernel has no BiCGSTAB)" in solve.last.adjoint.path


def test_a_warm_start_saves_products():
    solve = layer(warm=True)
    z = torch.randn(3, 2, dtype=torch.float64)
    counts = []
    for scale in (1.0, 1.0, 1e-25):
        (solve(z).sum() * scale).backward()
        counts.append(int(solve.last.adjoint.iterations.max()))
    assert counts[0] > 3
    assert max(counts[1:]) <= 2


@pytest.mark.parametrize("per_sample", [True, False])
def test_graphs_repeat_it(tape, per_sample):
    solve = layer(driver="graph", backend="native", per_sample=per_sample)
    for seed in range(2):
        z = random(3, 2, seed=seed).requires_grad_()
        s = solve(z)
        (c,) = torch.autograd.grad(s.sin().sum(), z)
        graph = solve.last.adjoint
        eager = layer(driver="eager", backend="native", per_sample=per_sample)
        eager.load_state_dict(solve.state_dict())
        (expected,) = torch.autograd.grad(eager(z).sin().sum(), z)
        torch.testing.assert_close(c, expected)
        assert "graph" in graph.path
        assert torch.equal(graph.iterations, eager.last.adjoint.iterations)
    assert captures() == 2


def test_images_in_channels_last():
    w = (0.05 * random(3, 3, 3, 3)).float()
    z = random(2, 3, 4, 5).float().to(memory_format=torch.channels_last).requires_grad_()

    def gradient(solver):
        s = fixed_point(
            lambda x, z, w: torch.nn.functional.conv2d(x, w, padding=1).tanh() + z,
            torch.zeros_like(z), z, params=(w,), adjoint=ImplicitAdjoint(solver, Tolerance(1e-6)),
        )  # fmt: skip
        return torch.autograd.grad(s.x.square().sum(), z)[0]

    torch.testing.assert_close(gradient(BiCGSTAB()), gradient(Anderson()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e20])
def test_under_autocast(half, scale):
    a, z = contraction(16, 0.8, dtype=torch.float32), random(5, 16).float().requires_grad_()
    with torch.autocast("cpu", dtype=half):
        s = fixed_point(
            lambda x, z, a: x @ a.mT + z, torch.zeros_like(z), z, params=(a,),
            adjoint=ImplicitAdjoint(BiCGSTAB()),
        )  # fmt: skip
    v = random(5, 16, seed=1).float()
    (c,) = torch.autograd.grad(s.x, z, v * scale)
    assert s.adjoint.converged.all()
    assert (error(c / scale, exact(a, v)) < (0.02 if half == torch.float16 else 0.1)).all()


def test_under_vmap():
    a, v = contraction(6, 0.9), random(4, 3, 6)

    def c(z, v):
        x = fixed_point(
            linear, torch.zeros_like(z), z, params=(a,), tolerance=TIGHT,
            adjoint=ImplicitAdjoint(BiCGSTAB(), TIGHT), backend="reference",
        ).x  # fmt: skip
        return (x * v).sum()

    found = torch.vmap(torch.func.grad(c))(torch.zeros_like(v), v)
    assert (error(found.reshape(12, 6), exact(a, v.reshape(12, 6))) < 1e-9).all()


# --- a batch that is one system ------------------------------------------------------------------


def links(b, rate):
    mix = random(b, b, seed=3)
    return mix * (rate / torch.linalg.matrix_norm(mix, 2))


@pytest.mark.parametrize("rate", [0.5, 0.95, 3.0])
def test_a_batch_of_one_system(backend, rate):
    b, n = 7, 5
    mix, a, v = links(b, rate), contraction(n, 1.0, seed=2), random(b, n)
    v[1] = 0
    z = torch.zeros(b, n, dtype=torch.float64, requires_grad=True)
    s = fixed_point(
        lambda x, z: mix @ x @ a.mT + z, torch.zeros_like(z), z, solver=Picard(),
        max_iterations=1, tolerance=Tolerance(0, 0), backend=backend, per_sample=False,
        adjoint=ImplicitAdjoint(BiCGSTAB(), Tolerance(1e-10), 300),
    )  # fmt: skip
    (c,) = torch.autograd.grad(s.x, z, v)
    whole = torch.kron(mix, a)
    expected = exact(whole, v.reshape(1, -1)).view(b, n)
    record = s.adjoint
    assert record.converged.all(), record
    assert len(record.iterations.unique()) == 1
    assert (error(c, expected) < 1e-7).all()
    mc = mix.mT @ c @ a + v - c
    floor = torch.linalg.vector_norm(v) / b**0.5
    measure = torch.linalg.vector_norm(c, dim=1).clamp(min=float(floor))
    assert (torch.linalg.vector_norm(mc, dim=1) <= 1e-10 * measure * max(1.0, rate)).all()


def test_one_system_that_can_not_converge_says_so(backend):
    z = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    mix = torch.ones(3, 3, dtype=torch.float64) / 3  # has an eigenvalue of 1
    s = fixed_point(
        lambda x, z: mix @ x + z, torch.zeros_like(z), z, solver=Picard(), max_iterations=1,
        tolerance=Tolerance(0, 0), backend=backend, per_sample=False, on_failure="return",
        adjoint=ImplicitAdjoint(BiCGSTAB(), Tolerance(1e-10), 40),
    )  # fmt: skip
    (c,) = torch.autograd.grad(s.x, z, torch.ones_like(z))
    assert c.isfinite().all()
    assert (s.adjoint.iterations <= 40).all()
    record = s.adjoint
    size = torch.linalg.vector_norm(c, dim=1)
    assert (~record.converged | (record.residual_norm <= 1e-10 * size * (1 + 1e-6))).all()


# --- refusals, and the operators -----------------------------------------------------------------


def test_it_solves_no_forward_problem():
    z = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"BiCGSTAB solves linear equations alone.*ImplicitAdjoint"):
        fixed_point(lambda x: 0.5 * x, z, solver=BiCGSTAB())
    with pytest.raises(TypeError, match="linear equations alone"):
        FixedPointLayer(DenseStep(3, 2), solver=BiCGSTAB())


def test_a_backend_without_the_operator_uses_another():
    class Lacking:
        NAME = "lacking"

    x = torch.zeros(1, 1)
    here = native if "cpu" in native.devices() else reference
    assert backends.operator(Lacking, "bicgstab_step", x) is here.bicgstab_step
    assert backends.operator(reference, "bicgstab_step", x) is reference.bicgstab_step


def test_operators_check_what_they_are_given():
    pytest.importorskip("fpi_cuda._C")
    x = torch.randn(2, 3)
    p = Progress(x, Limits(1e-3, 0.0, 0.0, 10, 100))
    base, vectors, numbers = memory_of(2, 3, x.dtype)
    for wrong, message in (
        ((base[:, :1].clone(), vectors, numbers), r"base must have shape \[2, 2, 3\]"),
        ((base, vectors.double(), numbers), "vectors must have the dtype of scalars"),
        ((base, vectors, numbers[:1].clone()), r"numbers must have shape \[2, 6\]"),
    ):
        with pytest.raises(RuntimeError, match=f"_bicgstab_step: {message}"):
            native.bicgstab_step(p, x, x, *wrong)
    p.counters[1, 3] = 3
    with pytest.raises(RuntimeError, match="a window of 0 to 2"):
        native.bicgstab_step(p, x, x, base, vectors, numbers)


def test_steps_match_the_oracle(dtype):
    pytest.importorskip("fpi_cuda._C")
    for shape in ((5, 37), (4, 11), (4, 300)):
        check_steps(native, dtype, shape)
    check_steps(native, dtype, (6, 21), index=[4, 1, 5, 0, 2])
