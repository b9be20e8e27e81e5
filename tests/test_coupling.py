"""What "auto" finds out of how samples depend on each other, and when."""

import dataclasses
import functools
import gc
import warnings
import weakref
from collections import Counter

import pytest
import torch
from helpers_coupled import EXACT, MAPS, Mixing, chain, consensus, given, loop, solve
from tape import tape_fixture  # noqa: F401
from torch import nn
from torch.autograd import grad

from fpi_cuda import (
    Anderson,
    DenseStep,
    FixedPointLayer,
    FixedPointWarning,
    Picard,
    Tolerance,
    fixed_point,
)
from fpi_cuda.record import Limits, Progress, Record
from fpi_cuda.solve import coupling, independence

pytestmark = pytest.mark.usefixtures("one_thread")

SOLVERS = {"picard": Picard(), "damped": Picard(0.8), "anderson": Anderson()}
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
FOUND = "samples of this batch depend on each other"


@pytest.mark.parametrize("name", list(MAPS))
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


@pytest.mark.parametrize("driver", ["eager", "graph"])
def test_a_gradient_that_is_coupled_where_x_is_not_shows_it(driver, tape):
    """The forward solve starts at its solution, zero: nothing there tells."""
    z, w = given("consensus")
    z = torch.zeros_like(z).requires_grad_()
    true = loop(consensus, z, w)
    options = {"params": (w,), "driver": driver, **EXACT}
    x = fixed_point(consensus, true.detach(), z, **options).x
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
    # Beside the iterations: what a compaction compares; a look at the results; twice two mixtures,
    # and the results again.
    assert counts[:3] == [3 + 1 + 3, 1 + 3, 1]
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
                max_iterations=50,
            )


def test_a_structured_step_is_never_looked_at(monkeypatch):
    monkeypatch.setattr(coupling, "_look", None)
    z = torch.randn(6, 3).requires_grad_()
    for driver in ("auto", "eager"):
        FixedPointLayer(DenseStep(4, 3), driver=driver)(z).sum().backward()
    torch.func.grad(lambda z: FixedPointLayer(DenseStep(4, 3))(z).sum())(z)


def listen(x, z, w=1.0):
    """All samples hear of the first one; w: how much."""
    return 0.5 * x + 0.2 * w * torch.tanh(x[:1]) + z


def true_of(x, z, w=1.0):
    return bool(((listen(x, z, w) - x).norm(dim=1) <= 1e-5 * (1 + x.norm(dim=1))).all())


@dataclasses.dataclass
class Weighted:
    w: float

    def step(self, x, z):
        return listen(x, z, self.w)


net = nn.Module()
net.forward = lambda x, z: listen(x, z, float(net.training))


def by_global(w):
    net.train(w > 0)
    return lambda x, z: 1 * net(x, z)


def by_dict(w):
    held = {"w": w}
    return lambda x, z: listen(x, z, held["w"])


def by_object(w):
    held = Weighted(w)
    return lambda x, z: listen(x, z, held.w)


def by_keyword(w):
    return lambda x, z, *, w=w: listen(x, z, w)


CHANGES = {
    "a module among the globals": by_global,
    "a number in the closure": lambda w: lambda x, z: listen(x, z, w),
    "a default": lambda w: lambda x, z, w=w: listen(x, z, w),
    "a keyword": by_keyword,
    "a dict": by_dict,
    "an object": by_object,
    "an object's method": lambda w: Weighted(w).step,
    "a partial": lambda w: functools.partial(listen, w=w),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_g_reads_in_python_is_looked_at_at_once(change):
    make, (z, _) = CHANGES[change], given("consensus")
    for _ in range(10):
        solve(make(0.0), z)
    with pytest.warns(UserWarning, match=FOUND):
        x = solve(make(1.0), z).x
    assert true_of(x, z)
    s = solve(make(0.0), z)  # what is known of the one is not said of the other
    assert "one system" not in s.path


def test_details_that_change_in_every_call_hide_nothing():
    """Training steps with their number in the closure, and others without coupling between them."""
    z, _ = given("consensus")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(90):
            w = float(step % 3 > 0)
            s = solve(lambda x, z, w=w, step=step: listen(x, z, w) + 0 * step, z)
            assert true_of(s.x, z, w)
            assert ("one system" in s.path) == (w > 0)


def test_rows_of_a_captured_tensor_by_the_size_of_the_batch(backend):
    """g is right on the first rows only: they are not what is left when others have ended."""
    z, _ = given("consensus")
    rate = torch.linspace(0.9, 0, len(z), dtype=z.dtype)[:, None]
    table = torch.zeros_like(z)
    options = {"backend": backend, "solver": Picard()}

    def h(x):
        return rate[: len(x)] * x + z[: len(x)] + table[: len(x)]

    with pytest.warns(UserWarning, match="can't be given a part of the batch"):
        x = fixed_point(h, 0 * z, **options).x
    torch.testing.assert_close(x, z / (1 - rate), rtol=1e-4, atol=1e-5)
    # As where all rows are equal at first.
    rate, z = torch.full_like(rate, 0.5), torch.ones_like(z)
    z[0] = 3

    def late(x, s):
        return s * x + table[: len(x)] + 1

    s = torch.linspace(0, 0.9, len(z), dtype=z.dtype)[:, None]
    for _ in range(4):
        assert "compacted" in fixed_point(late, 0 * z, s, **options).path
    table += torch.arange(len(z), dtype=z.dtype)[:, None]
    with pytest.warns(UserWarning, match="can't be given a part of the batch") as caught:
        for _ in range(61):
            x = fixed_point(late, 0 * z, s, **options).x
            if caught:
                break
    torch.testing.assert_close(x, (1 + table) / (1 - s), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float16, None), (torch.bfloat16, None), (torch.float32, torch.float16)],
    ids=str,
)
def test_half_types_hide_no_coupling_behind_their_rounding(dtype, autocast, backend):
    z = (0.1 * torch.ones(16, 4)).to(dtype)
    rate = torch.full((16, 1), 0.1, dtype=dtype)
    z[0], rate[0] = 3, 0.9
    with (
        torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None),
        pytest.warns(UserWarning, match=FOUND),
    ):
        fixed_point(
            lambda x, z, r: r * x + z + 0.003 * x[:1],
            0 * z,
            z,
            rate,
            backend=backend,
            solver=Picard(),
        )


@pytest.mark.parametrize("roundings", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_neighbours_matter_from_three_roundings_of_a_half_type_on(dtype, roundings, backend):
    """Two are a sum's in another order."""
    z = torch.ones(8, 3, dtype=dtype)
    eps = torch.finfo(dtype).eps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        s = solve(
            lambda x, z: z + roundings * eps * (x.sum() > 23).to(dtype),
            z,
            solver=Picard(),
            backend=backend,
            tolerance=Tolerance(eps / 2),
        )
    assert s.x.unique().tolist() == [1 + roundings * eps]
    assert [FOUND in str(w.message) for w in caught] == [True] * (roundings == 3)


@pytest.mark.parametrize("roundings", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_g_is_random_from_five_roundings_of_a_half_type_on(dtype, roundings, backend):
    calls = []

    def g(x, z):
        calls.append(1)
        return z + len(calls) % 2 * roundings * torch.finfo(dtype).eps

    z = torch.ones(2, 3, dtype=dtype)
    options = {"tolerance": Tolerance(1e-3), "max_iterations": 9, "per_sample": True}
    message = "raise max_iterations" if roundings == 4 else "other values for the same arguments"
    with pytest.warns(FixedPointWarning, match=message):
        solve(g, z, solver=Picard(), backend=backend, **options)


def test_an_adjoint_meets_its_tolerance_by_the_norm_that_came_in():
    """Where c is smaller than v: else each of its solves would be looked at closely."""
    x, y = torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [2.1]])
    progress = Progress(x, Limits(0.1, 0.0, 0.0, 9, 9))
    record = Record(progress, x.shape[:1], rate=None, path="", failed=0)
    assert coupling._met(x, y, record, torch.full((3,), 10.0)).tolist() == [True, True, False]
    assert coupling._met(x, y, record, None).tolist() == [False] * 3


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_first_solve_that_tells_nothing_is_not_the_one_that_counts(shift, backend):
    """It starts at its solution: there is no other value to give to neighbours."""
    z = torch.ones(24, 3)  # all end at once: nothing else tells

    def g(x, z):
        return 0.1 * torch.tanh(x.roll(shift, 0)) + 0.3 * x + z

    for _ in range(3):
        fixed_point(g, 0 * z, 0 * z, backend=backend)
    with pytest.warns(UserWarning, match=FOUND):
        fixed_point(g, 0 * z, z, backend=backend)


@pytest.mark.parametrize("off", [0.0, 1e-6])
def test_a_start_at_the_solution_hides_nothing(off, backend):
    """As where x0 is what the last call returned."""
    z = torch.ones(24, 3)

    def g(x, z):
        return 0.1 * torch.tanh(x.roll(1, 0)) + 0.3 * x + z

    start = torch.zeros_like(z)
    for _ in range(60):
        start = g(start, z)
    with pytest.warns(UserWarning, match=FOUND):
        fixed_point(g, start + off, z, backend=backend)


def test_nothing_that_g_is_made_of_is_kept():
    z, _ = given("consensus")

    def run():
        held = torch.ones(3, dtype=z.dtype)

        class Step(nn.Module):
            def forward(self, x, z):
                return 0.5 * x + z * held

        text = "a" * 10**6
        step = Step()
        solve(step, z)
        solve(lambda x, z: 0.5 * x + z * held + 0 * len(text), z)
        return [weakref.ref(o) for o in (held, Step, step)]

    refs = run()
    gc.collect()
    assert all(len(v) < 100 for key in independence._known for v in key if isinstance(v, str))
    assert [r() for r in refs] == [None] * 3
