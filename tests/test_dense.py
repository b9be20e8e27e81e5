"""Dense steps solved whole: against the reference in float64, and bit by bit against themselves."""

import copy
import dataclasses
import itertools
import math
import os
import pickle
import subprocess
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import DTYPES, TIGHT, TIGHT_ADJOINT, assert_close, assert_solved
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fpi_cuda import (
    Anderson,
    DenseEnergy,
    DenseStep,
    FixedPointError,
    FixedPointLayer,
    GradientStep,
    ImplicitAdjoint,
    NeuralStep,
    Picard,
    Status,
    Tolerance,
    fixed_point,
)
from fpi_cuda.backends import native
from fpi_cuda.drivers import whole
from fpi_cuda.forms import ACTIVATIONS, DenseForm
from fpi_cuda.record import Limits, Progress

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = {torch.float64: (1e-9, 1e-11)}  # of solves that stop at the same iteration
LAYERS = {"one layer": None, "two layers": 11}

on_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in native.dense_devices(),
    reason="needs a CUDA device and a build with CUDA",
)
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])


def step(n, d=3, hidden=None, dtype=torch.float64, seed=0, **options):
    """A contraction of rate about 0.6, whatever the activation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if hidden is not None:
            options.setdefault("output_activation", "tanh")
        made = DenseStep(n, d, hidden, **options).double()
        with torch.no_grad():
            for weight in filter(lambda w: w is not None, (made.state_weight, made.output_weight)):
                weight.mul_(0.7 / torch.linalg.matrix_norm(weight, 2).clamp(min=1e-9))
            for bias in filter(lambda b: b is not None, (made.bias, made.output_bias)):
                bias.normal_()
    return made.to(dtype)


def solve(g, z, *more, n=None, backward=True, **options):
    """x̂, its record, and the gradients of a loss that weighs every value differently."""
    n = g.state_shape[0] if n is None else n
    z = z.clone().requires_grad_()
    x0 = z.new_zeros(len(z), n)
    solution = fixed_point(g, x0, z, *more, on_failure="return", **options)
    gradients = ()
    if backward:
        loss = (solution.x * torch.linspace(-1, 1, n, dtype=z.dtype, device=z.device)).sum()
        wanted = (z, *g.parameters())
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return solution, gradients


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def assert_same_record(a, b):
    assert a.iterations.tolist() == b.iterations.tolist()
    assert a.status.tolist() == b.status.tolist()


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


# --- bits ------------------------------------------------------------------------------------


def limits(dtype, n, max_iterations=40):
    rtol, atol = Tolerance().resolve(dtype)
    return Limits(rtol, atol * n**0.5, 0.0, 10**6, max_iterations)


def form_of(case, dtype):
    """A form of random kind, with samples of very different difficulty."""
    g = torch.Generator().manual_seed(case["seed"])
    b, n, h = case["b"], case["n"], case["hidden"]

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    gain = torch.rand(b, 1, generator=g, dtype=torch.float64).to(dtype)
    kind = dict(activation=case["activation"], residual=case["residual"], gain=gain)
    if case["scale"]:
        kind["scale"] = normal(b, n)
    if h == 0:
        return DenseForm(normal(n, n, scale=0.4 / n**0.5), normal(b, n), **kind)
    return DenseForm(
        normal(n, h, scale=0.5 / h**0.5),
        normal(n) if case["shared"] else normal(b, n),
        hidden_weight=normal(h, n, scale=0.6 / n**0.5),
        hidden_u=normal(h) if case["shared"] else normal(b, h),
        hidden_activation="gelu",
        hidden_scale=normal(b, h) if case["scale"] else None,
        **kind,
    )


def in_float64(form):
    tensors = {k: t.double() for k, t in vars(form).items() if isinstance(t, torch.Tensor)}
    return dataclasses.replace(form, **tensors)


def taken(form, rows):
    """The same for these samples only."""
    names = ("u", "hidden_u", "gain", "scale", "hidden_scale")
    tensors = {name: getattr(form, name) for name in names}
    parts = {k: t[rows] for k, t in tensors.items() if t is not None and t.dim() == 2}
    return dataclasses.replace(form, **parts)


cases = st.fixed_dictionaries(
    {
        "b": st.integers(1, 60),
        "n": st.integers(1, 40),
        "hidden": st.sampled_from([0, 0, 1, 9, 34]),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "residual": st.sampled_from([0.0, 0.2]),
        "scale": st.booleans(),
        "shared": st.booleans(),
        "seed": st.integers(0, 10**6),
        "dtype": st.sampled_from(DTYPES),
        "history": st.integers(1, 6),
        "slots": st.sampled_from([1, 2, 5, 7, 12, 64]),
        "threads": st.integers(1, 2),
    }
)


@given(case=cases)
def test_bits_depend_on_neither_batch_order_slots_nor_threads(case):
    dtype = case["dtype"]
    form = form_of(case, dtype)
    solver = Anderson(case["history"]) if case["history"] > 1 else Picard()
    lim = limits(dtype, case["n"])
    x0 = torch.randn(case["b"], case["n"], dtype=torch.float64).to(dtype)
    x, record = whole.solve(form, x0, solver, lim)
    order = torch.randperm(case["b"])[: max(1, case["b"] // 2)]
    torch.set_num_threads(case["threads"])
    y, again = whole.solve(taken(form, order), x0[order], solver, lim, slots=case["slots"])
    torch.set_num_threads(1)
    assert same_bits(x[order], y)
    assert torch.equal(record.progress.counters[order], again.progress.counters)
    assert same_bits(record.progress.scalars[order], again.progress.scalars)
    one, _ = whole.solve(taken(form, order[:1]), x0[order[:1]], solver, lim)
    assert same_bits(one[0], y[0])


@given(case=cases, every=st.integers(2, 5), gain=st.sampled_from([float("nan"), 1e4, -3.0]))
def test_samples_that_fail_leave_nothing_in_their_slots(case, every, gain):
    """Those beside them, and those that take their slots next, have the bits they have alone."""
    dtype = case["dtype"]
    form = form_of(case, dtype)
    solver = Anderson(case["history"]) if case["history"] > 1 else Picard()
    lim = limits(dtype, case["n"])
    x0 = torch.randn(case["b"], case["n"], dtype=torch.float64).to(dtype)
    fails = torch.arange(case["b"]) % every == 0
    form.gain[fails] = gain
    torch.set_num_threads(case["threads"])
    x, record = whole.solve(form, x0, solver, lim, slots=case["slots"])
    torch.set_num_threads(1)
    y, alone = whole.solve(taken(form, ~fails), x0[~fails], solver, lim)
    assert same_bits(x[~fails], y)
    assert torch.equal(record.progress.counters[~fails], alone.progress.counters)
    assert same_bits(record.progress.scalars[~fails], alone.progress.scalars)
    if math.isnan(gain):
        assert set(record.status[fails].tolist()) == {Status.NONFINITE}


@every_device
@pytest.mark.parametrize("hidden", LAYERS.values(), ids=LAYERS)
def test_an_exact_layer_has_a_samples_bits_in_any_batch(hidden, device):
    g = step(33, d=21, hidden=hidden, dtype=torch.float32, exact=True).to(device)
    z = torch.randn(100, 21).to(device)
    x, _ = solve(g, z, backward=False)
    assert x.path == "native, whole"
    for rows in (torch.arange(1), torch.arange(7, 50), torch.randperm(100)):
        part, _ = solve(g, z[rows], backward=False)
        assert torch.equal(part.x, x.x[rows])
    loose = step(33, d=21, hidden=hidden, dtype=torch.float32).to(device)
    (ours, a), (theirs, b) = solve(g, z), solve(loose, z)
    assert_close(ours.x, theirs.x)
    for mine, other in zip(a, b, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


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


# --- where it is used ------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", LAYERS.values(), ids=LAYERS)
def test_a_solve_saves_the_solution_the_inputs_and_the_parameters(hidden, solver):
    g, z = step(40, d=6, hidden=hidden), torch.randn(70, 6, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = fixed_point(g, torch.zeros(70, 40, dtype=torch.float64), z, solver=solver).x
    x.sum().backward()
    once = {t.data_ptr(): t.numel() for t in saved}
    assert sum(once.values()) <= 70 * (40 + 6 + 1) + sum(p.numel() for p in g.parameters())


def test_tf32_is_for_loose_tolerances_forward_and_backward(monkeypatch):
    asked, kernel = [], native.dense_solve

    def watched(*arguments):
        *most, tf32, slots = arguments
        asked.append(tf32)
        kernel(*most, False, slots)

    monkeypatch.setattr(native, "tf32_wanted", lambda x: True)
    monkeypatch.setattr(native, "dense_solve", watched)
    g, z = step(5, dtype=torch.float32), torch.randn(4, 3)
    for forward, backward in ((2e-3, 1.9e-3), (1.9e-3, 2e-3)):
        adjoint = ImplicitAdjoint(tolerance=Tolerance(backward))
        sol, _ = solve(g, z, tolerance=Tolerance(forward), adjoint=adjoint)
        found = [path.endswith(", tf32") for path in (sol.path, sol.adjoint.path)]
        assert found == asked == [forward >= 2e-3, backward >= 2e-3]
        asked.clear()


@pytest.fixture
def matmul():
    """torch's settings of CUDA's products; monkeypatch can't put them back."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


def test_tf32_is_wanted_where_torch_is_set_to_it(matmul):
    on_cuda = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    half = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    for setting in ("ieee", "tf32"):
        matmul.fp32_precision = setting
        assert native.tf32_wanted(on_cuda) == (setting == "tf32")
        assert not native.tf32_wanted(half)
        assert not native.tf32_wanted(torch.zeros(1))


@pytest.mark.parametrize("wrap", [lambda g: g, NeuralStep], ids=["itself", "NeuralStep"])
def test_a_layer_takes_it_as_any_step(wrap):
    layer = FixedPointLayer(wrap(step(9, hidden=4, dtype=torch.float32)))
    z = torch.randn(6, 3)
    x = layer(z)
    assert x.shape == (6, 9)
    assert layer.last.path == "native, whole"
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(twin(z), x)
    twin.load_state_dict(layer.state_dict())
    layer.double()
    assert layer(z.double()).dtype == torch.float64


def test_spectral_norm_is_taken_and_its_parameters_get_gradients():
    g = step(9)
    torch.nn.utils.parametrizations.spectral_norm(g, "state_weight")
    z = torch.randn(4, 3, dtype=torch.float64)
    g.eval()
    sol, gradients = solve(g, z, tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
    _, expected = solve(g, z, backend="reference", tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
    assert sol.path == "native, whole"
    for mine, other in zip(gradients, expected, strict=True):
        assert_close(mine, other, NEAR)


def doubled(module, arguments, output):
    return 0.5 * output


class Shifted(DenseStep):
    def forward(self, x, z, gain=None):
        return super().forward(x, z, gain) + 1


def test_what_is_more_than_its_layers_is_called():
    z = torch.randn(4, 3, dtype=torch.float64)
    hooked = step(5)
    hooked.register_forward_hook(doubled)
    shifted = step(5)
    shifted.__class__ = Shifted
    patched = step(5)
    patched.forward = lambda x, z: 0.5 * DenseStep.forward(patched, x, z)
    watched = step(5)
    watched.register_full_backward_hook(lambda module, at_input, at_output: None)
    for g in (hooked, shifted, patched, watched):
        sol, _ = solve(g, z, backward=False, tolerance=TIGHT)
        assert sol.path.startswith("native, eager (layers not used: g does more than its layers)")
        assert_close(sol.x, g(sol.x, z))
    captured = step(5)
    sol = fixed_point(lambda x, z: 1 * captured(x, z), torch.zeros(4, 5, dtype=torch.float64), z)
    assert sol.path.startswith("native, eager, ")


@pytest.mark.parametrize("driver", ["auto", "eager"])
def test_what_a_step_captures_gets_its_gradient(driver):
    """A step size or a weight that is no parameter: found, and then g is called."""
    z = torch.randn(4, 3, dtype=torch.float64)
    energy = DenseEnergy(5, 3, 6).double()
    rate = torch.tensor(1 / energy.smoothness(), dtype=torch.float64, requires_grad=True)
    dense = step(5)
    weight = dense.state_weight.detach().clone().requires_grad_()
    del dense.state_weight
    dense.state_weight = weight
    few = dict(tolerance=Tolerance(0, 0), max_iterations=60, adjoint=TIGHT_ADJOINT)
    for g, captured in ((GradientStep(energy, rate), rate), (dense, weight)):
        x0 = torch.zeros(4, 5, dtype=torch.float64)
        solution = fixed_point(g, x0, z, solver=Picard(), driver=driver, **few)
        (found,) = torch.autograd.grad(solution.x.square().sum(), captured)
        x = x0
        for _ in range(300):
            x = g(x, z)
        (expected,) = torch.autograd.grad(x.square().sum(), captured)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_exact_step_is_a_module_like_any_other():
    g = DenseStep(4, 3, exact=True)
    x, z = torch.randn(6, 4), torch.randn(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert g(x, z.bfloat16()).dtype == torch.bfloat16
    assert g.to("meta")(x.to("meta"), z.to("meta")).shape == (6, 4)


def test_other_drivers_and_shapes_still_solve():
    g = step(5)
    z = torch.randn(4, 3, dtype=torch.float64)
    tight = Tolerance(1e-11, 0)
    expected, gradients = solve(g, z, tolerance=tight, adjoint=TIGHT_ADJOINT)
    eager, found = solve(g, z, tolerance=tight, adjoint=TIGHT_ADJOINT, driver="eager")
    assert "eager" in eager.path and "eager" in eager.adjoint.path
    assert_close(eager.x, expected.x, NEAR)
    for mine, other in zip(found, gradients, strict=True):
        assert_close(mine, other, NEAR)
    wide = fixed_point(
        g, torch.zeros(2, 2, 5, dtype=torch.float64), z.view(2, 2, 3), tolerance=tight
    )
    assert wide.path.startswith("native, eager (layers not used: a state of 3 dimensions)")
    assert_close(wide.x.view(4, 5), expected.x, NEAR)
    mapped = torch.vmap(lambda z: fixed_point(g, torch.zeros_like(wide.x[0]), z, tolerance=tight).x)
    assert_close(mapped(z.view(2, 2, 3)).view(4, 5), expected.x, NEAR)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fixed_point(g.float(), torch.zeros(4, 5), z.float(), tolerance=Tolerance(0.02))
    assert cast.path.startswith("native, eager (layers not used: autocast)")


def test_weights_beyond_any_cache_are_left_to_the_library(monkeypatch):
    g = step(8, hidden=4)
    z = torch.randn(4, 3, dtype=torch.float64)
    expected, gradients = solve(g, z)
    monkeypatch.setitem(native.MOST_WEIGHTS, "cpu", 2 * 8 * 4 * 8)
    assert solve(g, z)[0].path == "native, whole"
    monkeypatch.setitem(native.MOST_WEIGHTS, "cpu", 2 * 8 * 4 * 8 - 1)
    found, others = solve(g, z)
    for path in (found.path, found.adjoint.path):
        assert path.startswith("native, eager (not whole: weights beyond any cache")
    assert_same_record(found, expected)
    for mine, other in zip((found.x, *others), (expected.x, *gradients), strict=True):
        assert_close(mine, other, NEAR)


def test_asking_for_whole_where_it_can_not_be_warns():
    g = step(5)
    z = torch.randn(4, 3, dtype=torch.float64)
    x0 = torch.zeros(4, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match='driver="whole".*not of dense layers'):
        sol = fixed_point(lambda x, z: 1 * g(x, z), x0, z, driver="whole")
    assert "eager" in sol.path
    with pytest.warns(UserWarning, match='driver="whole".*backend "reference" has no whole solve'):
        fixed_point(g, x0, z, driver="whole", backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fixed_point(g, x0, z, driver="whole").path == "native, whole"


def test_the_module_is_an_ordinary_one():
    for hidden in (None, 7):
        g = step(5, hidden=hidden, residual=0.3)
        x, z = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
        u = z @ g.input_weight.mT + g.bias
        if hidden is None:
            expected = torch.tanh(0.3 * x + x @ g.state_weight.mT + u)
        else:
            h = torch.tanh(x @ g.state_weight.mT + u)
            expected = torch.tanh(0.3 * x + h @ g.output_weight.mT + g.output_bias)
        assert_close(g(x, z), expected)
        assert sum(p.numel() for p in g.parameters()) == sum(
            t.numel() for t in g.state_dict().values()
        )


@pytest.mark.slow
def test_the_module_compiles():
    g = step(5, hidden=4, dtype=torch.float32)
    x, z = torch.randn(6, 5), torch.randn(6, 3)
    assert_close(torch.compile(g, fullgraph=True)(x, z), g(x, z))


@pytest.mark.filterwarnings("ignore")
def test_the_module_and_its_layer_are_traced():
    """What torch.compile does before a compiler is called: the module whole, the layer in parts."""
    g = step(5, hidden=4, dtype=torch.float32)
    x, z = torch.randn(6, 5), torch.randn(6, 3)
    torch.compiler.reset()
    assert_close(torch.compile(g, fullgraph=True, backend="aot_eager")(x, z), g(x, z))
    layer = FixedPointLayer(g)
    expected = torch.autograd.grad(layer(z).sum(), g.state_weight)[0]
    traced = torch.compile(layer, backend="aot_eager")
    found = torch.autograd.grad(traced(z).sum(), g.state_weight)[0]
    assert layer.last.path == "native, whole"
    assert_close(found, expected)


# --- energies --------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "identity", "gelu"])
@pytest.mark.parametrize("convex", [True, False])
def test_an_energys_step_is_its_gradient_step(activation, convex, solver):
    if convex and activation == "gelu":
        with pytest.raises(ValueError, match="activation must be one of"):
            DenseEnergy(6, 3, 9, activation)
        return
    energy = DenseEnergy(6, 3, 9, activation, curvature=0.8, convex=convex).double()
    gradient_step = GradientStep(energy, step_size=1 / energy.smoothness())
    x, z = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(leaf, z).sum(), leaf)
    assert_close(gradient_step(x, z), x - gradient / energy.smoothness())
    assert_close(gradient_step.form(x, z)(x), x - gradient / energy.smoothness())
    options = dict(solver=solver, tolerance=TIGHT, adjoint=TIGHT_ADJOINT, max_iterations=2000)
    ours, gradients = solve(gradient_step, z, **options)
    theirs, expected = solve(gradient_step, z, **options, backend="reference")
    assert ours.path == ours.adjoint.path == "native, whole"
    assert_close(ours.x, theirs.x, {torch.float64: (1e-9, 1e-10)})
    for mine, other in zip(gradients, expected, strict=True):
        assert_close(mine, other, {torch.float64: (1e-7, 1e-9)})


def test_a_step_size_may_be_learned():
    energy = DenseEnergy(4, 3, 5).double()
    g = GradientStep(energy, nn.Parameter(torch.tensor(0.3, dtype=torch.float64)))
    z = torch.randn(4, 3, dtype=torch.float64)
    one = dict(tolerance=Tolerance(0, 0), max_iterations=3, solver=Picard())
    ours, gradients = solve(g, z, **one)
    _, expected = solve(g, z, backend="reference", **one)
    assert ours.path == "native, whole"
    for mine, other in zip(gradients, expected, strict=True):
        assert_close(mine, other, NEAR)


def test_an_energy_of_its_own_is_called():
    class Tilted(DenseEnergy):
        def forward(self, x, z):
            return super().forward(x, z) + x.sum(-1)

    sol, _ = solve(GradientStep(Tilted(4, 3, 5).double(), 0.2), torch.randn(2, 3).double())
    assert sol.path != "native, whole"


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


# --- several threads -------------------------------------------------------------------------


def stepped(x, values, history):
    """x and its record after the solver's steps with these values of g."""
    b, n = x.shape
    x, p = x.clone(), Progress(x, Limits(0.0, 0.0, 0.0, 10**6, 10**6))
    window = [x.new_zeros(b, history, k) for k in (n, n, history)]
    for gx in values:
        if history == 1:
            native.picard_step(p, x, gx, 0.7)
        else:
            native.anderson_step(p, x, gx, 1.0, 1e-3, 1e9, *window)
    return x, p.counters, p.scalars


def work_of(sizes, b, device):
    """Calls that each give tensors: whole solves and steps of rows of these sizes."""
    calls = []
    for n in sizes:
        normal = torch.randn(5, b, n).to(device)
        form = DenseForm((torch.randn(n, n) / (3 * n**0.5)).to(device), normal[0])
        for history in (1, 3):
            solver = Anderson(history) if history > 1 else Picard()

            def solve_whole(form=form, solver=solver, n=n):
                x, record = whole.solve(
                    form, torch.zeros_like(form.u), solver, limits(torch.float32, n)
                )
                return x, record.progress.counters, record.progress.scalars

            calls += [solve_whole, lambda h=history, v=normal: stepped(v[1], v[2:5], h)]
    return calls


@every_device
@pytest.mark.parametrize("streams", ["one stream", "own streams"])
def test_threads_do_not_disturb_each_other(device, streams):
    """Two at a time, 50 rounds: the same kernels for rows of other sizes, to the bit as alone.

    On CUDA the sizes need unlike amounts of shared memory, the larger more than 48 KiB.
    """
    work = [work_of((24, 700), 5, device), work_of((160, 48), 37, device)]
    alone = [[call() for call in calls] for calls in work]
    begin = threading.Barrier(len(work), timeout=60)

    def repeat(calls, expected):
        own = device == "cuda" and streams == "own streams"
        if own:
            torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream() if own else None):
            begin.wait()
            for _ in range(50):
                for call, right in zip(calls, expected, strict=True):
                    for mine, other in zip(call(), right, strict=True):
                        assert same_bits(mine, other)

    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(repeat, *pair) for pair in zip(work, alone, strict=True)]:
            done.result(timeout=300)


# --- the operator ----------------------------------------------------------------------------


PRODUCTS = [(1, 1, 1), (3, 5, 7), (25, 33, 31), (64, 159, 200)]
# On CUDA: rows of W that partly stay in shared memory, and more rows of x than blocks have at once.
PRODUCTS += [(9, 300, 290), (150, 40, 70)]


def product(b, k, n, dtype, device):
    """Operands of a product and, in float64, what it is and what its terms sum to in magnitude."""
    x, weight = (torch.randn(*shape).to(dtype) for shape in ((b, k), (n, k)))
    right = x.double() @ weight.double().mT
    magnitude = x.abs().double() @ weight.abs().double().mT
    return x.to(device), weight.to(device), right, magnitude


@every_device
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_match_float64(shape, dtype, device):
    x, weight, right, magnitude = product(*shape, dtype, device)
    u = torch.randn(shape[2]).to(device, dtype)
    for strided in (weight, weight.mT.contiguous().mT):
        for bias, expected in ((None, right), (u, right + u.double().cpu())):
            found = native.dense_map(x, strided, bias)
            assert found.dtype == dtype and found.device == x.device
            error = (found.double().cpu() - expected).abs()
            eps = torch.finfo(dtype).eps  # k roundings of either sign add up as their root
            assert (error <= eps * (max(2, shape[1] ** 0.5) * magnitude + 1)).all()


@every_device
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_round_to_tf32_where_torch_is_set_to_it(shape, device, matmul):
    """On CUDA alone; and to the bit the same rows in any batch."""
    x, weight, right, magnitude = product(*shape, torch.float32, device)
    matmul.fp32_precision = "ieee"
    exact = native.dense_map(x, weight, None)
    matmul.fp32_precision = "tf32"
    rounded = native.dense_map(x, weight, None)
    assert torch.equal(exact, rounded) == (device == "cpu")
    assert ((rounded.double().cpu() - right).abs() <= 1.1e-3 * magnitude).all()
    for rows in (slice(0, 1), slice(shape[0] // 2, None)):
        assert torch.equal(native.dense_map(x[rows], weight, None), rounded[rows])


def test_arguments_are_checked():
    form = DenseForm(torch.randn(4, 4), torch.randn(3, 4))
    lim, x0 = limits(torch.float32, 4), torch.zeros(3, 4)
    for wrong, message in (
        (dict(weight=torch.randn(4, 5)), r"weight must have shape \[·, 4\]"),
        (dict(weight=torch.randn(5, 4)), r"weight must have shape \[4, 4\] \(got \[5, 4\]\)"),
        (dict(weight=torch.randn(4, 4).double()), "weight must have the dtype of x"),
        (dict(u=torch.randn(3, 5)), r"u must have shape \[3, 4\]"),
        (dict(scale=torch.randn(4)), r"scale must have shape \[3, 4\]"),
        (dict(hidden_weight=torch.randn(6, 3)), r"hidden_weight must have shape \[·, 4\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            whole.solve(dataclasses.replace(form, **wrong), x0, Picard(), lim)


def test_bad_arguments_of_the_modules():
    for make, message in (
        (lambda: DenseStep(0, 3), "state_features must be a whole number >= 1"),
        (lambda: DenseStep(4, 2.5), "input_features must be a whole number >= 1"),
        (lambda: DenseStep(4, 3, hidden=True), "hidden must be a whole number >= 1"),
        (lambda: DenseStep(4, 3, activation="swish"), "activation must be one of"),
        (lambda: DenseStep(4, 3, output_activation="relu"), "output_activation belongs to two"),
        (lambda: DenseStep(4, 3, residual=float("nan")), "residual must be a finite number"),
        (lambda: DenseEnergy(4, 3, 5, "softplus"), "activation must be one of"),
        (lambda: DenseEnergy(4, 3, 5, curvature=-1), "curvature must be a finite number >= 0"),
        (lambda: DenseStep(4, 3)(torch.randn(2, 5), torch.randn(2, 3)), "dimension of x must be 4"),
        (lambda: DenseStep(4, 3)(torch.randn(2, 4), torch.randn(2, 2)), "dimension of z must be 3"),
        (
            lambda: fixed_point(DenseStep(4, 3), torch.zeros(2, 5), torch.randn(2, 3)),
            "dimension of x must be 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


POISONED = """
import ctypes
import torch
from fpi_cuda import *
M_PERTURB = -6
assert ctypes.CDLL(None).mallopt(M_PERTURB, 1)
torch.manual_seed(0)
for hidden in (None, 21):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        g = DenseStep(37, 5, hidden, residual=0.1).to(dtype)
        z = torch.randn(91, 5).to(dtype).requires_grad_()
        for solver in (Picard(), Anderson()):
            found = []
            for backend in ("native", "reference"):
                sol = fixed_point(g, torch.zeros(91, 37, dtype=dtype), z, solver=solver,
                                  backend=backend)
                found.append((sol, *torch.autograd.grad(sol.x.sum(), (z, g.state_weight))))
            assert found[0][0].path == found[0][0].adjoint.path == "native, whole"
            close = 0.1 if dtype == torch.bfloat16 else 1e-3
            for a, b in zip((found[0][0].x, *found[0][1:]), (found[1][0].x, *found[1][1:])):
                torch.testing.assert_close(a, b, rtol=close, atol=close)
print("solved")
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_with_poisoned_memory(capability):
    """What malloc gives holds -1.7e38: to read it before it is written would show."""
    environment = os.environ | {"FPI_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", POISONED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "must be one of" in done.stderr:
        pytest.skip(f"this machine has no {capability}")
    assert done.stdout == "solved\n", done.stderr
