"""Tolerances and iteration limits that each sample has of its own, as tensors [B]."""

import pytest
import torch
from helpers import contraction
from helpers_dense import on_cuda
from helpers_limits import (
    ATOL,
    CONVERGED,
    ENDS,
    LIMIT,
    MOST,
    RTOL,
    B,
    N,
    account,
    inputs,
    same,
    sine,
    solve,
)
from tape import captures, tape_fixture  # noqa: F401

from fpi_cuda import (
    Anderson,
    DenseStep,
    FixedPointError,
    FixedPointWarning,
    ImplicitAdjoint,
    Picard,
    Tolerance,
)
from fpi_cuda.drivers import eager
from fpi_cuda.drivers.whole import tf32_allowed
from fpi_cuda.norms import row_norms
from fpi_cuda.solve import coupling, limits

pytestmark = pytest.mark.usefixtures("one_thread")


def alone(z, **options):
    """Each sample's row of the solve whose numbers are its own."""
    rows = []
    for i in range(len(z)):
        s = solve(z, float(RTOL[i]), float(ATOL[i]), int(MOST[i]), **options)
        rows.append([t[i] for t in account(s, z)])
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("per_sample", [True, "auto"])
def test_each_sample_ends_as_with_numbers_of_its_own(backend, solver, dtype, per_sample):
    z, options = inputs(dtype), {"solver": solver, "backend": backend, "per_sample": per_sample}
    s = solve(z, **options)
    assert "compacted" in s.path
    assert s.status.tolist() == ENDS
    assert s.iterations[3:].tolist() == [4, 3, 1]
    assert len(set(s.iterations.tolist())) >= 4
    found = account(s, z)
    assert s.adjoint.iterations[3:].tolist() == [4, 3, 1]
    expected = alone(z, **options)
    if backend == "reference" and solver == Anderson():  # whose factors have other bits alone
        assert torch.equal(found[3], expected[3]) and torch.equal(found[7], expected[7])
        assert torch.allclose(found[0], expected[0], 1e-3, 1e-3)
    else:
        same(found, expected)


def test_the_whole_driver_too(solver, dtype):
    step = DenseStep(N, N)
    with torch.no_grad():
        step.state_weight.copy_(contraction(N, 0.9))
    step = step.to(dtype)
    z, options = inputs(dtype), {"solver": solver, "g": step, "driver": "whole"}
    s = solve(z, **options)
    assert s.path == "native, whole"
    assert s.iterations[3:].tolist() == [4, 3, 1]
    same(account(s, z), alone(z, **options))


def test_a_graph_serves_every_limit(tape, solver):
    def g(x, z):  # graphs are kept with it
        return sine(x, z)

    options = {"solver": solver, "driver": "graph", "per_sample": True, "g": g}
    for rtol, most in ((RTOL, MOST.clamp(max=2)), (RTOL.flip(0) / 100, MOST), (RTOL, MOST + 1)):
        z = inputs()
        s = solve(z, rtol, most=most, **options)
        assert "graph" in s.path
        found = account(s, z)
        assert "graph" in s.adjoint.path
        same(found, account(solve(z, rtol, most=most, solver=solver, per_sample=True), z))
    assert captures() == 2
    solve(inputs(), RTOL + 3e-3, **options)
    assert captures() == 3, "rounded to tf32, another kind"
    solve(inputs(), 1e-2, 1e-3, 60, **options)
    assert captures() == 4, "numbers too"


def test_a_graph_complains_by_the_limits_of_the_call(tape):
    def g(x, z):
        return sine(x, z)

    options = {"driver": "graph", "per_sample": True, "on_failure": "warn", "most": 2, "g": g}
    counted = torch.zeros(B)
    first = solve(inputs(), counted, counted, **options)
    for failing in (1, 4):
        rtol = counted.clone()
        rtol[failing] = 1e-9
        with pytest.warns(FixedPointWarning, match=rf"1 of 6 samples MAX.*\(samples {failing}\)"):
            assert "graph" in solve(inputs(), rtol, counted, **options).path
    assert captures() == 1
    assert first.record.failures() == "", "a later launch changes nothing of it"


@pytest.mark.parametrize("place", ["rtol", "atol", "max_iterations"])
def test_a_tensor_of_one_value_gives_the_bits_of_the_number(backend, solver, dtype, place):
    values = {"rtol": 3e-3, "atol": 1e-3, "max_iterations": 11}
    tensors = values | {place: torch.full((B,), values[place])}
    found = []
    for of in (values, tensors):
        z = inputs(dtype)
        rtol, atol, most = of.values()
        found.append(account(solve(z, rtol, atol, most, solver=solver, backend=backend), z))
    same(*found)


def test_a_tensor_without_dimensions_is_a_number():
    z = inputs()
    expected = account(solve(z, 1e-3, 0.0, 7), z)
    found = solve(z, torch.tensor(1e-3, dtype=torch.float64), torch.tensor(0.0), torch.tensor(7))
    same(account(found, z), expected)
    assert Tolerance(torch.tensor(0.5)) == Tolerance(0.5)
    assert ImplicitAdjoint(max_iterations=torch.tensor(7)) == ImplicitAdjoint(max_iterations=7)


@pytest.mark.parametrize("whole", [torch.uint8, torch.int8, torch.int32, torch.uint64])
@pytest.mark.parametrize("floating", [torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_tensors_may_be_of_any_dtype_of_their_kind(floating, whole):
    z, t, k = inputs(), torch.full((B,), 2.0**-6), torch.full((B,), 100)
    found = solve(z, t.to(floating), t.to(floating)[:1].expand(B), k.to(whole))
    same(account(found, z), account(solve(z, 2.0**-6, 2.0**-6, 100), z))


@on_cuda
@pytest.mark.parametrize("driver", ["eager", "graph"])
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_tensors_may_be_on_another_device(solver, driver, place):
    z, here = inputs(), [t.to(place) for t in (RTOL, ATOL, MOST)]
    options = {"solver": solver, "driver": driver, "per_sample": True}
    on_device = z.detach().cuda().requires_grad_()
    found = account(solve(on_device, *here, **options), on_device)
    expected = account(solve(z, solver=solver, per_sample=True), z)
    for i in (2, 3, 6, 7):  # statuses and iterations
        assert torch.equal(found[i].cpu(), expected[i])
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-9, atol=1e-10)


def test_what_is_not_given_is_the_default():
    z, t = inputs(torch.float32), torch.full((B,), 1e-2)
    for tensors, numbers in (((t, None), (1e-2, None)), ((None, t), (None, 1e-2))):
        found = [account(solve(z, *of, most=50), z) for of in (tensors, numbers)]
        same(*found)
    s = solve(z, adjoint=ImplicitAdjoint())
    account(s, z)
    assert s.adjoint.iterations[4:].tolist() == [3, 1], "the forward's limits"


# --- a fixed count ----------------------------------------------------------------------------


def test_a_sample_of_a_fixed_count_never_fails_for_want_of_convergence(backend, solver):
    """Nor is it stalled at the rounding level; the others' failures are told."""
    z, rtol = inputs(torch.float32), torch.tensor([0.0, 1e-3, 0.0, 1e-3, 1e-3, 0.0])
    most = torch.tensor([150, 150, 2, 150, 150, 1])
    options = {"solver": solver, "backend": backend, "on_failure": "warn"}
    s = solve(z, rtol, 0.0, most, **options)
    assert s.status[[2, 5]].tolist() == [LIMIT] * 2
    assert s.status[[1, 3, 4]].tolist() == [CONVERGED] * 3
    assert s.status[0] == CONVERGED or s.iterations[0] == 150  # where a residual is exactly zero
    most[3] = 2
    with pytest.warns(FixedPointWarning, match=r"fixed_point: 1 of 6 samples MAX.*\(samples 3\)"):
        solve(z, rtol, 0.0, most, **options)
    with pytest.raises(FixedPointError, match=r"1 of 6 samples MAX"):
        solve(z, rtol, 0.0, most, **options | {"on_failure": "raise"})


def test_a_tolerance_below_the_states_dtype_is_no_fixed_count(backend):
    z, tiny = inputs(torch.float32), torch.full((B,), 1e-60, dtype=torch.float64)
    options = {"most": 200, "backend": backend, "solver": Picard()}
    expected = account(solve(z, 1e-60, 0.0, **options), z)
    assert LIMIT not in expected[2]
    same(account(solve(z, tiny, 0.0, **options), z), expected)
    same(account(solve(z, 0.0, tiny, **options), z), account(solve(z, 0.0, 1e-60, **options), z))


def test_a_failure_of_a_fixed_count_is_told():
    z = inputs()
    with torch.no_grad():
        z[1, 0] = torch.nan
    with pytest.warns(FixedPointWarning, match=r"1 of 6 samples NONFINITE \(samples 1\)[^M]*$"):
        solve(z, torch.zeros(B), torch.zeros(B), 5, on_failure="warn")


# --- a batch that is one system ---------------------------------------------------------------


def mixed(x, z):
    return 0.6 * torch.sin(x) + 0.3 * x.mean(0, keepdim=True) + z


@pytest.mark.parametrize("driver", ["eager", "graph"])
def test_one_system_stops_where_each_sample_meets_its_own(tape, backend, solver, driver):
    if (driver, backend) == ("graph", "reference"):
        pytest.skip("reads the device in every iteration")
    seen, rtol = [], torch.tensor([1e-1, 1e-6, 1e-2, 1e-3, 1e-1, 1e-4], dtype=torch.float64)

    def watched(x, z):
        if driver == "eager":
            seen.append((x.clone(), mixed(x, z)))
        return mixed(x, z)

    options = {"solver": solver, "backend": backend, "driver": driver, "per_sample": False}
    s = solve(inputs(), rtol, 0.0, 200, g=watched, **options)
    assert driver in s.path and "one system" in s.path
    assert s.status.tolist() == [CONVERGED] * B
    if driver == "eager":
        met = [bool(((gx - x).norm(dim=1) <= rtol * gx.norm(dim=1)).all()) for x, gx in seen]
        assert met == [False] * (len(met) - 1) + [True]
        loose, tight = (
            int(solve(inputs(), float(t), 0.0, 200, g=mixed, **options).iterations[0])
            for t in (rtol.max(), rtol.min())
        )
        assert loose < len(seen) <= tight


def test_one_system_has_the_most_iterations_of_any(backend, solver):
    options = {"solver": solver, "backend": backend, "per_sample": False, "g": mixed}
    s = solve(inputs(), 1e-12, 0.0, torch.tensor([1, 2, 9, 3, 4, 5]), **options)
    assert s.iterations.tolist() == [9] * B
    assert s.status.tolist() == [LIMIT] * B


def test_a_sample_beyond_its_own_limit_goes_on_with_its_system(backend, solver):
    rtol = torch.tensor([1e-6, 1e-1, 1e-1, 1e-1, 1e-1, 1e-1], dtype=torch.float64)
    options = {"solver": solver, "backend": backend, "per_sample": False, "g": mixed}
    s = solve(inputs(), rtol, 0.0, torch.tensor([1, 80, 80, 80, 80, 80]), **options)
    assert s.status.tolist() == [CONVERGED] * B
    assert s.residual_norm[0] <= 1e-6 * s.x[0].norm()


def test_a_count_of_one_sample_is_its_systems(backend):
    """And no failure: nothing else could have been asked for."""
    rtol = torch.tensor([1e-2, 0.0, 1e-2, 1e-2, 1e-2, 1e-2])
    options = {"backend": backend, "per_sample": False, "g": mixed, "on_failure": "raise"}
    s = solve(inputs(torch.float32), rtol, 0.0, 12, solver=Picard(), **options)
    assert s.iterations.tolist() == [12] * B


# --- transforms and derivatives ---------------------------------------------------------------


def test_slices_of_vmap_share_them(solver):
    z = torch.stack([inputs().detach() + 0.1 * i for i in range(4)]).requires_grad_()
    kept = []

    def value(z):
        kept.append(solve(z, solver=solver))
        return kept[-1].x

    x = torch.vmap(value)(z)
    (grad,) = torch.autograd.grad(x.sum(), z)
    for i in range(4):
        s = solve(z[i], solver=solver)
        assert torch.equal(kept[0].iterations[i], s.iterations)
        torch.testing.assert_close(x[i], s.x, rtol=1e-12, atol=1e-13)
        (expected,) = torch.autograd.grad(s.x.sum(), z)
        torch.testing.assert_close(grad[i], expected[i], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", ["rtol", "atol", "most"])
def test_one_that_vmap_maps_is_refused_by_name(name, rank):
    z = inputs().detach().expand(4, B, N)
    t = {"rtol": RTOL, "atol": ATOL, "most": MOST}[name].expand(4, B)
    t = t if rank == 2 else t[:, 0]
    full = {"most": "max_iterations"}.get(name, name)
    with pytest.raises(ValueError, match=f"{full} must not be mapped by torch.vmap"):
        torch.vmap(lambda z, t: solve(z, **{name: t}).x)(z, t)


def test_derivatives_of_every_order_keep_to_them():
    z, tight = inputs(), torch.full((B,), 1e-13, dtype=torch.float64)

    def loss(z):
        return solve(z, tight, tight * 1e-1, torch.full((B,), 500)).x.square().sum()

    assert torch.autograd.gradcheck(loss, (z,))
    assert torch.autograd.gradgradcheck(loss, (z,))
    hessian = torch.func.jacrev(torch.func.grad(loss))(z.detach())
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, z))
    # A limit of the adjoint's holds in the backward of the backward too.
    least = ImplicitAdjoint(max_iterations=torch.tensor([1, 200, 200, 200, 200, 200]))
    s = solve(z, tight, 0.0, 500, adjoint=least)
    (g,) = torch.autograd.grad(s.x.sum(), z, create_graph=True)
    assert s.adjoint.iterations[0] == 1 < s.adjoint.iterations[1]
    (again,) = torch.autograd.grad(g.sum(), z)
    right = 0.8 * torch.cos(s.x)
    assert torch.allclose(g[1:], 1 / (1 - right[1:])) and not torch.allclose(
        g[0], 1 / (1 - right[0])
    )
    assert again.isfinite().all()


def test_a_tensor_that_grad_follows_counts_by_its_values():
    def loss(z):
        return solve(z, RTOL * (1 + 0 * z.sum())).x.sum()

    z = inputs()
    expected = account(solve(z), z)[1]
    assert torch.equal(torch.func.grad(loss)(z.detach()), expected)


# --- where a solve's numbers were read --------------------------------------------------------


def test_the_loop_reads_on_to_the_last_samples_limit(monkeypatch):
    told, reader = [], eager.reader
    monkeypatch.setattr(eager, "reader", lambda x, most: told.append(most) or reader(x, most))
    z = inputs()
    account(solve(z, adjoint=ImplicitAdjoint(max_iterations=MOST + 7)), z)
    assert told == [60, 67]


def test_tf32_is_left_to_solves_whose_every_sample_allows_it():
    """And a sample's rtol and offset are what its residual is compared with afterwards."""
    found = []

    def keep(problem, start, adjoint):
        found.append(limits_of(problem, start, adjoint=adjoint))
        return found[-1]

    limits_of = limits.limits_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpi_cuda.solve.direction.limits_of", keep)
        for rtol in (torch.full((B,), 1e-2), RTOL + 3e-3, RTOL):
            solve(inputs(torch.float32), rtol)
    assert [tf32_allowed(each) for each in found] == [True, True, False]


def test_what_met_its_own_tolerance_is_not_taken_for_wrong(monkeypatch):
    """Whether samples depend on each other is looked at by each one's own numbers."""
    z, met = inputs(), []

    def keep(x, y, record, floor):
        met.append(of(x, y, record, floor))
        residual, size = row_norms(y - x), row_norms(y)
        assert (
            met[-1].tolist()
            == (
                residual
                <= 2 * (ATOL * N**0.5 + RTOL * size) + record.progress.limits.rounding * size
            ).tolist()
        )
        return met[-1]

    of = coupling._met
    monkeypatch.setattr(coupling, "_met", keep)
    s = solve(z, per_sample="auto")
    assert met and met[0][:3].all() and not met[0][4:].all()
    assert "one system" not in s.path


def test_samples_of_a_fixed_count_cost_no_look(monkeypatch):
    def another(x, z):
        return sine(x, z)

    looks, look = [], coupling._look
    monkeypatch.setattr(coupling, "_look", lambda *a: looks.append(1) or look(*a))
    rtol = torch.tensor([0.0, 1e-3, 1e-3, 1e-3, 1e-3, 0.0])
    for _ in range(8):
        solve(inputs(), rtol, 0.0, 30, solver=Anderson(history=2))
    due = len(looks)
    looks.clear()
    for _ in range(8):
        solve(inputs(), 1e-3, 0.0, 30, solver=Anderson(history=2), g=another)
    assert due == len(looks)
