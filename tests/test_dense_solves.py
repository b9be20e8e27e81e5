"""Dense steps solved whole: against the reference in float64, here and on a device."""

import copy
import dataclasses
import itertools

import pytest
import torch
from helpers import DTYPES, TIGHT, TIGHT_ADJOINT, assert_close, assert_solved
from helpers_dense import (
    LAYERS,
    NEAR,
    assert_same_record,
    every_device,
    limits,
    matmul_fixture,  # noqa: F401
    on_cuda,
    same_bits,
    solve,
    step,
    taken,
)
from torch import nn

from fpi_cuda import (
    Anderson,
    DenseEnergy,
    FixedPointError,
    GradientStep,
    ImplicitAdjoint,
    Picard,
    Status,
    Tolerance,
    fixed_point,
)
from fpi_cuda.drivers import whole
from fpi_cuda.forms import ACTIVATIONS, DenseForm
from fpi_cuda.record import Limits

pytestmark = pytest.mark.usefixtures("one_thread")


# --- against the reference -------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("n", [1, 7, 31, 33, 159, 257])
def test_the_kernel_agrees_with_the_reference_in_float64(activation, hidden, n, solver):
    g = step(n, hidden=hidden, activation=activation, residual=0.1)
    z = torch.randn(5, 3, dtype=torch.float64)
    ours, gradients = solve(g, z, solver=solver)
    theirs, expected = solve(g, z, solver=solver, backend="reference")
    assert ours.path == ours.adjoint.path == "native, whole"
    assert "reference, eager" in theirs.path
    assert_same_record(ours, theirs)
    assert_same_record(ours.adjoint, theirs.adjoint)
    assert_close(ours.residual_norm, theirs.residual_norm, {torch.float64: (1e-3, 1e-14)})
    if n > 1:  # of one value Anderson's secants soon are of rounding alone
        torch.testing.assert_close(
            ours.contraction, theirs.contraction, rtol=1e-3, atol=0, equal_nan=True
        )
    assert ours.evaluations == int(ours.iterations.max())
    for mine, other in zip((ours.x, *gradients), (theirs.x, *expected), strict=True):
        assert_close(mine, other, NEAR)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("n", [7, 33, 257])
def test_every_dtype_solves_to_its_tolerance(activation, hidden, n, dtype, solver):
    g = step(n, hidden=hidden, dtype=dtype, activation=activation)
    z = torch.randn(5, 3).to(dtype)
    ours, gradients = solve(g, z, solver=solver)
    exact = copy.deepcopy(g).double()
    true, expected = solve(exact, z.double(), solver=solver, tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
    assert ours.path == "native, whole"
    assert bool(ours.converged.all())
    assert_solved(ours.x, true.x)
    for mine, other in zip(gradients, expected, strict=True):
        assert_solved(mine.reshape(1, -1), other.reshape(1, -1), factor=12)


SLOTS = 24  # of csrc/cpu/dense_solve.cpp


@pytest.mark.parametrize("b", [0, 1, 5, SLOTS - 1, SLOTS, SLOTS + 1, 2 * SLOTS + 1, 150])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_number_of_samples(b, threads, solver):
    torch.set_num_threads(threads)
    g = step(9)
    z = torch.randn(b, 3, dtype=torch.float64)
    ours, gradients = solve(g, z, solver=solver)
    theirs, expected = solve(g, z, solver=solver, backend="reference")
    assert_same_record(ours, theirs)
    for mine, other in zip((ours.x, *gradients), (theirs.x, *expected), strict=True):
        assert_close(mine, other, NEAR)


@pytest.mark.parametrize("hidden", LAYERS.values(), ids=LAYERS)
def test_iterations_of_every_shape_and_activation_in_every_dtype(hidden, dtype):
    """Three of them against plain torch in float64, from the same u."""
    few = Limits(rtol=0.0, offset=0.0, rounding=0.0, patience=10**6, max_iterations=3)
    rounded = 30 * torch.finfo(dtype).eps
    for n in (1, 7, 31, 33, 159, 257):
        g = step(n, hidden=hidden, dtype=dtype, residual=0.1)
        for activation, b in itertools.product(ACTIVATIONS, (0, 1, 5, SLOTS - 1, SLOTS, SLOTS + 1)):
            g.activation = g.output_activation = activation
            x0 = torch.randn(b, n).to(dtype)
            with torch.no_grad():
                form = g.form(x0, torch.randn(b, 3).to(dtype))
                x, record = whole.solve(form, x0, Picard(), few)
                exact, expected = in_float64(form), x0.double()
                for _ in range(3):
                    expected = exact(expected)
            torch.testing.assert_close(x.double(), expected, rtol=rounded, atol=rounded)
            assert (record.iterations <= 3).all(), "fewer where an iterate is its own image"


@every_device
@pytest.mark.parametrize("hidden", LAYERS.values(), ids=LAYERS)
def test_iterations_of_rows_beyond_two_kilobytes(hidden, dtype, device):
    """On CUDA a block takes such a row, not a warp; more samples than slots, so that all refill."""
    few = Limits(rtol=0.0, offset=0.0, rounding=0.0, patience=10**6, max_iterations=3)
    n, b = 2048 // dtype.itemsize + 9, 150
    g = step(n, hidden=hidden, dtype=dtype, residual=0.1).to(device)
    with torch.no_grad():
        x0 = torch.randn(b, n).to(device, dtype)
        form = g.form(x0, torch.randn(b, 3).to(device, dtype))
        x, record = whole.solve(form, x0, Picard(), few, slots=1)
        again, _ = whole.solve(form, x0, Picard(), few)
        exact, expected = in_float64(form), x0.double()
        for _ in range(3):
            expected = exact(expected)
    rounded = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(x.double(), expected, rtol=rounded, atol=rounded)
    assert same_bits(x, again)
    assert (record.iterations <= 3).all(), "fewer where an iterate is its own image"


@every_device
def test_rows_beyond_two_kilobytes_solve_to_their_tolerance(dtype, solver, device):
    """With a hidden layer: few weights, so that CUDA takes them whole too."""
    n = 2048 // dtype.itemsize + 9
    g = step(n, hidden=11, dtype=dtype).to(device)
    z = torch.randn(5, 3).to(device, dtype)
    ours, gradients = solve(g, z, solver=solver)
    exact = copy.deepcopy(g).double()
    true, expected = solve(exact, z.double(), solver=solver, tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
    assert ours.path == ours.adjoint.path == "native, whole"
    assert bool(ours.converged.all())
    assert_solved(ours.x, true.x)
    for mine, other in zip(gradients, expected, strict=True):
        assert_solved(mine.reshape(1, -1), other.reshape(1, -1), factor=12)


@pytest.mark.parametrize("beta", [0.5, 1.2])
def test_damping_histories_and_tolerances(beta):
    g = step(17, hidden=5, residual=-0.2)
    z = torch.randn(11, 3, dtype=torch.float64)
    for solver in (Picard(beta), *(Anderson(m, beta) for m in (1, 2, 3, 9, 30))):
        options = dict(solver=solver, tolerance=Tolerance(1e-9, 0.0), max_iterations=60)
        assert_same_record(
            solve(g, z, **options)[0], solve(g, z, backend="reference", **options)[0]
        )


def test_gain_weighs_a_sample_and_has_a_gradient():
    for hidden in (None, 6):
        g = step(8, hidden=hidden)
        z = torch.randn(20, 3, dtype=torch.float64)
        gain = torch.linspace(0.1, 1.3, 20, dtype=torch.float64)[:, None].requires_grad_()
        found = []
        for backend in ("native", "reference"):
            sol, gradients = solve(g, z, gain, backend=backend)
            again, _ = solve(g, z, gain, backend=backend, backward=False)
            (at_gain,) = torch.autograd.grad(again.x.sum(), gain)
            found.append((sol, *gradients, at_gain))
        assert found[0][0].path == found[0][0].adjoint.path == "native, whole"
        assert_same_record(found[0][0], found[1][0])
        assert_same_record(found[0][0].adjoint, found[1][0].adjoint)
        for mine, other in zip(found[0][1:], found[1][1:], strict=True):
            assert_close(mine, other, NEAR)


KINDS = [{}, {"residual": 0.15}, {"bias": False}, {"d": None}, {"exact": True}]
KINDS += [{"exact": True, "bias": False}]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("hidden", LAYERS.values(), ids=LAYERS)
def test_derivatives_of_first_and_second_order(hidden, options, solver):
    g = step(4, **{"d": 3, "hidden": hidden} | options)
    width = 3 if "d" not in options else (hidden or 4)
    z = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in g.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in g.parameters()]

    def f(z, *values):
        module = copy.copy(g)
        module._parameters = dict(g._parameters) | dict(zip(names, values, strict=True))
        x0 = torch.zeros(3, 4, dtype=torch.float64)
        sol = fixed_point(module, x0, z, solver=solver, tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
        assert sol.path == "native, whole"
        return sol.x

    assert torch.autograd.gradcheck(f, (z, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (z, *values), fast_mode=True)


def with_tensors(g, values):
    """g with these in place of its parameters."""
    made = copy.deepcopy(g)
    for (path, _), value in zip(g.named_parameters(), values, strict=True):
        owner, _, name = path.rpartition(".")
        made.get_submodule(owner)._parameters[name] = value
    return made


def an_energys_step():
    energy = DenseEnergy(4, 3, 5, curvature=1.5, convex=False).double()
    rate = nn.Parameter(torch.tensor(1 / energy.smoothness(), dtype=torch.float64))
    return GradientStep(energy, rate), ()


def a_step_with_gain():
    gain = torch.linspace(0.2, 1.2, 3, dtype=torch.float64)[:, None].requires_grad_()
    return step(4, hidden=5), (gain,)


@pytest.mark.parametrize("made", [an_energys_step, a_step_with_gain])
def test_derivatives_in_energies_step_sizes_and_gains(made, solver):
    g, more = made()
    z = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in g.parameters()]

    def f(z, *tensors):
        module = with_tensors(g, tensors[len(more) :])
        options = dict(tolerance=TIGHT, adjoint=TIGHT_ADJOINT, max_iterations=1000)
        x0 = torch.zeros(3, 4, dtype=torch.float64)
        sol = fixed_point(module, x0, z, *tensors[: len(more)], solver=solver, **options)
        assert sol.path == "native, whole"
        return sol.x

    assert torch.autograd.gradcheck(f, (z, *more, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (z, *more, *values), fast_mode=True)


def in_float64(form):
    tensors = {k: t.double() for k, t in vars(form).items() if isinstance(t, torch.Tensor)}
    return dataclasses.replace(form, **tensors)


# --- what ends a sample ends it alone --------------------------------------------------------


def test_a_nan_ends_its_sample_and_no_bit_of_another(solver):
    g = step(19, hidden=8, dtype=torch.float32)
    z = torch.randn(70, 3)
    clean, clean_gradients = solve(g, z, solver=solver)
    z[31, 1] = float("nan")
    sol, (at_z, *_) = solve(g, z, solver=solver)
    others = torch.arange(70) != 31
    assert torch.equal(sol.x[others], clean.x[others])
    assert torch.equal(at_z[others], clean_gradients[0][others])
    assert sol.status[31] == Status.NONFINITE
    assert sol.iterations[31] == 1
    assert not sol.x[31].any(), "the last finite iterate is returned"
    assert not at_z[31].any(), "its gradient is masked"


def test_a_sample_that_is_no_contraction_ends_alone():
    g = step(12, activation="identity")
    z = torch.randn(40, 3, dtype=torch.float64)
    gain = torch.full((40, 1), 0.5, dtype=torch.float64)
    clean, _ = solve(g, z, gain, solver=Picard())
    gain[17] = 10.0
    sol, _ = solve(g, z, gain, solver=Picard())
    reference, _ = solve(g, z, gain, solver=Picard(), backend="reference")
    others = torch.arange(40) != 17
    assert torch.equal(sol.x[others], clean.x[others])
    assert sol.status[17] == reference.status[17] == Status.DIVERGED
    assert_same_record(sol, reference)


def test_all_may_fail_at_once_and_none_may_converge(solver):
    g = step(6, activation="identity")
    z = torch.full((130, 3), float("inf"), dtype=torch.float64)
    sol, _ = solve(g, z, solver=solver)
    assert sol.iterations.tolist() == [1] * 130
    assert set(sol.status.tolist()) == {Status.NONFINITE}
    z = torch.randn(130, 3, dtype=torch.float64)
    for most in (1, 7):
        sol, _ = solve(g, z, solver=solver, tolerance=Tolerance(0, 0), max_iterations=most)
        assert sol.iterations.tolist() == [most] * 130
        assert set(sol.status.tolist()) == {Status.MAX_ITERATIONS}
        assert sol.evaluations == most


def test_a_zero_gradient_costs_no_iteration():
    g = step(5)
    z = torch.randn(30, 3, dtype=torch.float64, requires_grad=True)
    sol = fixed_point(g, torch.zeros(30, 5, dtype=torch.float64), z)
    (at_z,) = torch.autograd.grad(sol.x[10:].sum(), z)
    assert sol.adjoint.path == "native, whole"
    assert sol.adjoint.iterations[:10].tolist() == [0] * 10
    assert not at_z[:10].any() and at_z[10:].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_tolerance_below_rounding_stalls_as_in_the_reference(dtype):
    """Unless an iterate is its own image to the bit, which is convergence at any tolerance."""
    g = step(40, activation="identity", dtype=dtype)
    z = torch.randn(30, 3).to(dtype)
    for backend in ("auto", "reference"):
        sol, _ = solve(g, z, solver=Picard(), tolerance=Tolerance(1e-30, 0), backend=backend)
        assert set(sol.status.tolist()) <= {Status.STALLED, Status.CONVERGED}
        assert (sol.iterations < 200).all()


def test_a_failure_raises_from_forward_and_from_backward():
    g = step(5)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(4, 5, dtype=torch.float64)
    with pytest.raises(FixedPointError, match="4 of 4") as raised:
        fixed_point(g, x0, z, max_iterations=2, on_failure="raise")
    assert raised.value.solution.path == "native, whole"
    once = ImplicitAdjoint(max_iterations=1)
    x = fixed_point(g, x0, z, adjoint=once, on_failure="raise").x
    with pytest.raises(FixedPointError, match="adjoint: 4 of 4"):
        x.sum().backward()


# --- on a device -----------------------------------------------------------------------------


def moved(g, z, **options):
    """The solve on the device, and on the CPU by the reference."""
    found = []
    for device, backend in (("cuda", "auto"), ("cpu", "reference")):
        on = copy.deepcopy(g).to(device)
        zs = z.to(device).requires_grad_()
        x0 = torch.zeros(len(z), on.state_shape[0], dtype=z.dtype, device=device)
        sol = fixed_point(on, x0, zs, backend=backend, on_failure="return", **options)
        loss = (sol.x * torch.linspace(-1, 1, x0.shape[1], dtype=z.dtype, device=device)).sum()
        gradients = torch.autograd.grad(loss, (zs, *on.parameters()))
        found.append((sol, [t.cpu() for t in (sol.x, *gradients)]))
    return found


@on_cuda
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("n", [1, 33, 159, 200])
def test_cuda_agrees_with_the_reference_in_float64(activation, hidden, n, solver):
    g = step(n, hidden=hidden, activation=activation, residual=0.1)
    for b in (1, 5, 3000):
        z = torch.randn(b, 3, dtype=torch.float64)
        (ours, mine), (theirs, other) = moved(g, z, solver=solver)
        assert ours.path == ours.adjoint.path == "native, whole"
        assert ours.iterations.tolist() == theirs.iterations.tolist()
        assert ours.status.tolist() == theirs.status.tolist()
        for a, e in zip(mine, other, strict=True):
            assert_close(a, e, NEAR)


@on_cuda
@pytest.mark.parametrize("hidden", LAYERS.values(), ids=LAYERS)
def test_cuda_solves_every_dtype_to_its_tolerance(hidden, dtype, solver):
    g = step(130, hidden=hidden, dtype=dtype)
    z = torch.randn(700, 3).to(dtype)
    (ours, (x, *_)), _ = moved(g, z, solver=solver)
    true, _ = solve(copy.deepcopy(g).double(), z.double(), tolerance=TIGHT, backward=False)
    assert ours.path == "native, whole" and bool(ours.converged.all())
    assert_solved(x, true.x)


@on_cuda
def test_cuda_takes_tf32_where_torch_and_the_tolerance_allow(matmul):
    g, z = step(130, dtype=torch.float32), torch.randn(700, 3)
    matmul.fp32_precision = "tf32"
    (loose, (x, *_)), (_, (y, *_)) = moved(g, z, tolerance=Tolerance(1e-2))
    assert loose.path == "native, whole, tf32"
    torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)
    (tight, _), _ = moved(g, z, tolerance=Tolerance(1e-4))
    assert tight.path == "native, whole"


@on_cuda
def test_cuda_bits_depend_on_neither_batch_nor_slots():
    for dtype in DTYPES:
        form = DenseForm(
            *(t.to(dtype).cuda() for t in (torch.randn(90, 90) / 20, torch.randn(500, 90)))
        )
        x0 = torch.zeros(500, 90, dtype=dtype, device="cuda")
        for solver in (Picard(), Anderson()):
            x, _ = whole.solve(form, x0, solver, limits(dtype, 90))
            rows = torch.randperm(500, device="cuda")[:77]
            y, _ = whole.solve(taken(form, rows), x0[rows], solver, limits(dtype, 90), slots=3)
            assert same_bits(x[rows], y)
