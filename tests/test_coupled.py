"""Batches that are one system: their samples depend on each other through g."""

import functools
import warnings
from collections import Counter

import pytest
import torch
from helpers_coupled import EXACT, MAPS, B, N, chain, consensus, given, loop, seeded
from tape import tape_fixture  # noqa: F401
from torch import nn
from torch.autograd import grad

from fpi_cuda import (
    Anderson,
    DenseStep,
    FixedPointLayer,
    FixedPointWarning,
    Picard,
    Status,
    Tolerance,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SOLVERS = {"picard": Picard(), "damped": Picard(0.8), "anderson": Anderson()}
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
maps = pytest.mark.parametrize("name", list(MAPS))
FOUND = "samples of this batch depend on each other"


def solve(g, z, *params, **options):
    return fixed_point(g, torch.zeros_like(z), z, params=params, **options)


# --- said in advance -------------------------------------------------------------------------


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


class Mixing(nn.Module):
    def __init__(self, g, w):
        super().__init__()
        self.g, self.w = g, nn.Parameter(w.clone())

    def forward(self, x, z):
        return self.g(x, z, self.w)


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


# --- found out -------------------------------------------------------------------------------


@maps
@solvers
def test_auto_finds_it_and_solves_again(name, solver, backend):
    g, (z, w) = MAPS[name], given(name)
    with pytest.warns(UserWarning, match=FOUND) as caught:
        s = solve(g, z, w, solver=solver, backend=backend)
    assert len(caught) == 1
    said = solve(g, z, w, solver=solver, backend=backend, per_sample=False)
    assert torch.equal(s.x, said.x)
    assert torch.equal(s.iterations, said.iterations)
    assert s.evaluations > said.evaluations
    again = solve(g, z, w, solver=solver, backend=backend)  # known by now: silent
    assert again.evaluations == said.evaluations


@pytest.mark.parametrize("driver", ["eager", "graph"])
def test_one_that_appears_later_is_found_after_60_solves_at_most(driver, tape):
    z, w = given("chain")
    step = Mixing(chain, 0 * w)
    layer = FixedPointLayer(step, driver=driver, solver=Picard())
    for _ in range(70):
        layer(z)
    with torch.no_grad():
        step.w.copy_(w)  # in place: nothing but its values tells
    with pytest.warns(UserWarning, match=FOUND) as caught:
        for _ in range(61):
            x = layer(z)
            if caught:
                break
    assert (step(x, z) - x).norm(dim=1).max() < 1e-5


def test_a_number_that_changes_is_looked_at_at_once():
    """As where a module's attribute, or what a lambda captures, switches a coupling on."""
    z, _ = given("consensus")

    class Switched(nn.Module):
        alpha = 0.0

        def forward(self, x, z):
            return torch.tanh(self.alpha * x.mean(0, keepdim=True) + 0.2 * x) + z

    step = Switched()
    for _ in range(10):
        solve(step, z)
    step.alpha = 0.5
    with pytest.warns(UserWarning, match=FOUND):
        x = solve(step, z).x
    torch.testing.assert_close(x, step(x, z), rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_coupled_where_x_is_not_shows_it(backend):
    """The forward solve starts at the solution: no residual there tells."""
    z, w = given("consensus")
    z.requires_grad_()
    true = loop(consensus, z, w)
    x = fixed_point(consensus, true.detach(), z, params=(w,), backend=backend, **EXACT).x
    with pytest.warns(UserWarning, match=FOUND):
        (found,) = grad(x[3].sum(), z)
    torch.testing.assert_close(found, grad(true[3].sum(), z)[0], rtol=1e-8, atol=1e-9)


def test_a_lambda_made_anew_in_each_call_is_of_one_kind(backend):
    z, w = given("consensus")
    with pytest.warns(UserWarning, match=FOUND) as caught:
        for _ in range(5):
            fixed_point(lambda x: consensus(x, z, w), torch.zeros_like(z), backend=backend)
    assert len(caught) == 1
    alone = Counter()

    def independent(x, z):
        alone["calls"] += 1
        return torch.tanh(0.5 * x) + z

    counts = []
    for _ in range(140):
        before = alone["calls"]
        s = solve(
            lambda x, z: 1 * independent(x, z),
            z,
            per_sample="auto",
            backend=backend,
            solver=Picard(),
        )
        counts.append(alone["calls"] - before - int(s.iterations.max()))
    # Beside the iterations: what a compaction compares; a look at the result; two mixtures, twice.
    assert counts[:3] == [2 + 1 + 2, 1 + 2, 1]
    looked = [n for n, extra in enumerate(counts) if extra]
    assert looked == [0, 1, 2, 3, 4, 8, 16, 32, 61, 64, 122, 128]


def test_expansive_maps_and_random_ones_are_not_taken_for_coupled(backend):
    z, w = given("consensus")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s = solve(lambda x, z, w: -6 * torch.tanh(x) + z, z, w, backend=backend)
        assert s.converged.all()
    for noise in (1e-9, 1e-2):  # below the tolerance, and above it
        with pytest.warns(UserWarning, match="other values for the same arguments"):
            solve(
                lambda x, z, noise=noise: 0.5 * x + z + noise * torch.randn_like(x),
                z,
                backend=backend,
                tolerance=Tolerance(1e-3),
                on_failure="return",
                max_iterations=50,
            )


def test_a_structured_step_is_never_looked_at(monkeypatch):
    from fpi_cuda.solve import coupling

    monkeypatch.setattr(coupling, "_look", None)
    z = torch.randn(6, 3).requires_grad_()
    for driver in ("auto", "eager"):
        FixedPointLayer(DenseStep(4, 3), driver=driver)(z).sum().backward()
    torch.func.grad(lambda z: FixedPointLayer(DenseStep(4, 3))(z).sum())(z)
