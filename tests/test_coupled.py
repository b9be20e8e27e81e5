"""Batches that are one system: their samples depend on each other through g."""

import functools
import math

import pytest
import torch
from helpers_coupled import EXACT, MAPS, B, Mixing, N, consensus, given, loop, seeded, solve
from tape import tape_fixture  # noqa: F401
from torch.autograd import grad

from fpi_cuda import (
    Anderson,
    DenseStep,
    FixedPointLayer,
    FixedPointWarning,
    Picard,
    Status,
    Tolerance,
    backends,
    fixed_point,
)
from fpi_cuda.record import STATUS, Limits, Progress
from fpi_cuda.solvers.coupled import Coupled

pytestmark = pytest.mark.usefixtures("one_thread")

SOLVERS = {"picard": Picard(), "damped": Picard(0.8), "anderson": Anderson()}
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
maps = pytest.mark.parametrize("name", list(MAPS))
FOUND = "samples of this batch depend on each other"


@maps
@solvers
def test_it_stops_when_every_sample_meets_its_tolerance_in_one_iteration(name, solver, backend):
    g, (z, w) = MAPS[name], given(name)
    seen = []

    def watched(x, z, w):
        seen.append((x.clone(), g(x, z, w)))
        return seen[-1][1]

    s = solve(watched, z, w, per_sample=False, solver=solver, backend=backend)
    rtol, atol = Tolerance().resolve(z.dtype)
    met = [
        bool(((gx - x).norm(dim=1) <= atol * N**0.5 + rtol * gx.norm(dim=1)).all())
        for x, gx in seen
    ]
    assert met == [False] * (len(met) - 1) + [True]
    assert s.status.tolist() == [Status.CONVERGED] * B
    assert s.iterations.tolist() == [len(seen)] * B
    assert s.evaluations == len(seen)
    assert "one system" in s.path
    x, gx = seen[-1]
    assert torch.equal(s.x, gx)
    torch.testing.assert_close(s.residual_norm, (gx - x).norm(dim=1), rtol=1e-10, atol=1e-14)


@maps
def test_anderson_takes_one_set_of_weights_for_the_batch(name, backend):
    """The iterates are those of the batch as one sample."""
    g, (z, w) = MAPS[name], given(name)
    options = {"backend": backend, "max_iterations": 9, "tolerance": Tolerance(0, 0)}
    s = solve(g, z, w, per_sample=False, **options)
    one = fixed_point(
        lambda x, z, w: g(x[0], z[0], w)[None], z[None] * 0, z[None], params=(w,), **options
    )
    torch.testing.assert_close(s.x, one.x[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(s.contraction, one.contraction.expand(B), rtol=1e-6, atol=0)


LOSSES = {"one": slice(3, 4), "ten": slice(2, 12), "all": slice(None)}
losses = pytest.mark.parametrize("rows", LOSSES.values(), ids=list(LOSSES))
ways = pytest.mark.parametrize("per_sample", ["auto", False])


def derivatives(x, tensors):
    """First and second derivatives of a loss on x."""
    first = grad(x.sin().sum(), tensors, create_graph=True)
    second = grad(sum((t * t).sum() for t in first), tensors)
    return [*first, *second]


@functools.cache
def of_the_loop(name, start, stop):
    tensors = [t.requires_grad_() for t in given(name)]
    x = loop(MAPS[name], *tensors)[start:stop]
    return x, [*grad(x.sin().sum(), tensors, retain_graph=True), *derivatives(x, tensors)]


@maps
@losses
@ways
@pytest.mark.filterwarnings(f"ignore:.*{FOUND}:UserWarning")
def test_derivatives_are_those_of_the_plain_loop(name, rows, per_sample, backend):
    g, tensors = MAPS[name], [t.requires_grad_() for t in given(name)]
    x = solve(g, *tensors, per_sample=per_sample, backend=backend, **EXACT).x[rows]
    found = [*grad(x.sin().sum(), tensors, retain_graph=True), *derivatives(x, tensors)]
    true, expected = of_the_loop(name, rows.start, rows.stop)
    torch.testing.assert_close(x, true, rtol=1e-9, atol=1e-10)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@maps
@ways
@pytest.mark.filterwarnings(f"ignore:.*{FOUND}:UserWarning")
def test_under_torch_func_too(name, per_sample):
    g, (z, w) = MAPS[name], given(name)
    options = {"per_sample": per_sample, **EXACT}

    def loss(solved):
        return lambda z, w: solved(z, w)[3].sin().sum()

    def ours(z, w):
        return solve(g, z, w, **options).x

    def plain(z, w):
        return loop(g, z, w)

    both = (0, 1)
    for transform in (
        lambda f: torch.func.grad(f, both)(z, w),
        lambda f: torch.func.grad(lambda z, w: torch.func.grad(f)(z, w).square().sum(), both)(z, w),
    ):
        for a, b in zip(transform(loss(ours)), transform(loss(plain)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    # Each of two batches is a system of its own, and stops by itself.
    batches = torch.stack([z, 30 * z])
    torch.testing.assert_close(
        torch.vmap(ours, (0, None))(batches, w), torch.stack([plain(b, w) for b in batches])
    )
    found = torch.vmap(torch.func.grad(loss(ours)), (0, None))(batches, w)
    expected = torch.stack([torch.func.grad(loss(plain))(b, w) for b in batches])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", sorted(MAPS.keys() - {"graph"}))  # which reads a tensor of its own
@solvers
def test_a_graph_gives_what_the_eager_loop_gives(name, solver, tape):
    g, (z, w) = MAPS[name], given(name)
    step = Mixing(g, w)
    found = {}
    for driver in ("graph", "eager"):
        for scale in (1.0, 2.0):  # a second launch starts afresh
            leaf = (scale * z).requires_grad_()
            s = solve(step, leaf, driver=driver, per_sample=False, solver=solver)
            assert driver in s.path
            gradient = grad(s.x[4].sum(), [leaf, step.w])
            assert driver in s.adjoint.path
            assert "one system" in s.path
            assert "one system" in s.adjoint.path
            found[driver, scale] = s.x.detach(), s.iterations, s.contraction, *gradient
            assert s.adjoint.iterations.unique().numel() == 1
    for scale in (1.0, 2.0):
        for a, b in zip(found["graph", scale], found["eager", scale], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_whole_refuses_with_the_reason():
    layer = FixedPointLayer(DenseStep(4, 3), driver="whole", per_sample=False)
    with pytest.warns(UserWarning, match="the batch is one system"):
        layer(torch.randn(5, 3))
    assert "eager (not whole: the batch is one system (per_sample=False))" in layer.last.path
    assert layer.last.iterations.unique().numel() == 1


@solvers
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_failure_is_the_batchs(solver, value, backend, tape):
    z, w = given("consensus")
    z[5, 1] = value
    z.requires_grad_()
    for driver in ("eager", "graph"):
        if driver == "graph" and backend == "reference":
            continue
        with pytest.warns(FixedPointWarning, match=f"{B} of {B} samples NONFINITE"):
            s = solve(
                Mixing(consensus, w),
                z,
                per_sample=False,
                solver=solver,
                backend=backend,
                driver=driver,
            )
        assert s.status.tolist() == [Status.NONFINITE] * B
        assert s.record.failed == B
        assert s.x.isfinite().all()
        assert not grad(s.x.sum(), z)[0].any()


def test_growth_and_the_end_of_patience_are_the_batchs_too(backend):
    z, _ = given("graph")
    options = {"per_sample": False, "solver": Picard(), "backend": backend}
    with pytest.warns(FixedPointWarning, match=f"{B} of {B} samples DIVERGED"):
        s = solve(lambda x, z: 3 * x.roll(1, 0) + z, z, **options)
    assert s.x.isfinite().all()
    with pytest.warns(FixedPointWarning, match=f"{B} of {B} samples MAX_ITERATIONS"):
        s = solve(lambda x, z: 0.99 * x.roll(1, 0) + z, z, max_iterations=7, **options)
    assert s.iterations.tolist() == [7] * B
    # One value waits for ten iterations, then jumps: no growth of the batch, which goes on.
    s = solve(lambda x, z: 0.9 * torch.cat([z[:1], x[:-1]]), 1e6 * z, **options)
    assert s.converged.all()
    assert s.iterations[0] >= B


def test_stalled_only_where_every_sample_is_at_the_rounding_level(backend):
    """A sample of tiny values goes on falling beside one of large ones that can't."""
    z = torch.tensor([[1e6], [1.0]])
    rate = torch.tensor([[0.0], [0.9]])
    noise = []

    def g(x, z, rate):
        noise.append(1)
        rounding = torch.tensor([[1e6 * 6e-8 * (-1) ** len(noise)], [0.0]])
        return rate * x + z + rounding + 0 * x.sum()

    s = solve(
        g, z, rate, per_sample=False, solver=Picard(), backend=backend, tolerance=Tolerance(1e-5)
    )
    assert s.converged.all()
    with pytest.warns(FixedPointWarning, match="2 of 2 samples STALLED"):
        solve(
            g,
            z,
            rate,
            per_sample=False,
            solver=Picard(),
            backend=backend,
            tolerance=Tolerance(3e-8),
        )


def test_the_adjoints_tolerance_is_of_the_whole_gradient(backend):
    """Rows that a loss reaches through many others hold next to nothing: no digits are sought."""
    z = torch.ones(40, 2).requires_grad_()
    s = solve(lambda x, z: 0.01 * x.roll(1, 0) + z, z, per_sample=False, backend=backend)
    (found,) = grad(s.x[0].sum(), z)
    assert s.adjoint.iterations[0] < 8
    assert s.adjoint.converged.all()
    expected = 0.01 ** ((-torch.arange(40.0)) % 40)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-3, atol=1e-4)
    # And the scale of the loss plays no part.
    (small,) = grad(
        (
            1e-20
            * solve(lambda x, z: 0.5 * x.roll(1, 0) + z, z, per_sample=False, backend=backend).x[0]
        ).sum(),
        z,
    )
    torch.testing.assert_close(1e20 * small[39], torch.tensor([0.5, 0.5]), rtol=1e-3, atol=0)


def test_tuple_states_images_and_low_precision(backend, dtype):
    z = seeded(4, 2, 3, 3).to(dtype)

    def g(x, z):
        a, b = x
        return 0.3 * b.mean((0, 2, 3))[None] + z[:, :, 0, 0], torch.tanh(
            0.3 * a[:, :, None, None] + z
        )

    x0 = torch.zeros(4, 2, dtype=dtype), torch.zeros_like(z)
    s = fixed_point(g, x0, z, per_sample=False, backend=backend)
    assert s.converged.all()
    assert s.iterations.unique().numel() == 1
    wide = fixed_point(g, tuple(t.double() for t in x0), z.double(), per_sample=False, **EXACT)
    rtol, atol = Tolerance().resolve(dtype)
    for a, b in zip(s.x, wide.x, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=20 * (rtol + atol))
    channels_last = z.to(memory_format=torch.channels_last)
    t = solve(
        lambda x, z: torch.tanh(0.3 * x.mean(0, keepdim=True) + z),
        channels_last,
        per_sample=False,
        backend=backend,
    )
    assert t.converged.all()
    torch.testing.assert_close(
        t.x, torch.tanh(0.3 * t.x.mean(0) + z), rtol=20 * rtol, atol=20 * atol
    )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 3)])
def test_batches_of_none_and_of_one(shape, backend):
    s = solve(
        lambda x, z: 0.5 * x.mean(0, keepdim=True) + z,
        torch.ones(*shape),
        per_sample=False,
        backend=backend,
    )
    assert s.x.shape == shape
    assert s.converged.all()


def test_a_system_ends_at_max_iterations_whatever_its_samples_did_before(tape):
    """A sample that hears late had a residual of zero: it has not grown from there."""

    def cycle(x, z):
        return torch.stack([1 - x[0], x[0]])

    def late(x, z):
        return 0.7 * torch.cat([torch.roll(x[:3], 1, 0), x[2:-1]]) + z

    z = torch.zeros(2, 3)
    for options in ({"backend": "reference"}, {}, {"driver": "graph"}):
        with pytest.warns(FixedPointWarning, match="2 of 2 samples MAX_ITERATIONS"):
            s = solve(cycle, z, per_sample=False, solver=Picard(), max_iterations=50, **options)
        assert s.iterations.tolist() == [50, 50]
    z = torch.zeros(12, 2)
    z[0] = 1
    s = solve(late, z, per_sample=False, tolerance=Tolerance(1e-8, 0), on_failure="return")
    assert s.status.unique().numel() == 1
    assert s.iterations[0] < 120


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("scale", [1e20, 1e-25])
def test_the_scale_of_a_loss_has_no_part_in_its_gradient(scale, per_sample, backend):
    z = torch.ones(3, 4).requires_grad_()
    x = solve(lambda x, z: 0.5 * x + z, z, per_sample=per_sample, backend=backend).x
    (found,) = grad(x, z, scale * torch.ones_like(x))
    torch.testing.assert_close(found / scale, torch.full_like(z, 2), rtol=1e-3, atol=0)


def test_a_system_that_has_ended_stays_what_it_is(backend):
    """A device is asked late: steps follow the last one."""
    x = torch.ones(4, 3)
    step = backends.choose(backend, x)
    progress = Progress(x, Limits(1e-3, 0.0, 1e-6, 10, 50))
    update = Coupled(Picard(), samples=2).start(step, progress, progress.out)
    gx = torch.cat([x[:2], 2 * x[2:]])
    update(x, gx.clone())
    assert progress.tally.tolist() == [2, 0, 1]
    update(x, torch.cat([math.nan * gx[:2], gx[2:]]))
    assert progress.tally.tolist()[:2] == [0, 0]
    assert torch.equal(progress.out, gx)
    assert progress.counters[:, STATUS].tolist() == [Status.CONVERGED + 1] * 4
