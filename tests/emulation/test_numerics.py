"""What the CUDA bodies measure of g, at every scale of the state, and where g is not finite.

Beside the oracle in the same dtype, or beside themselves at another scale, in every plan.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
from dense_solves import IDENTITY, RELU, Dense, Solver
from machine import FORWARD, RANDOM, REVERSE, Machine
from test_kernels import PLANS
from test_primitives import FOREVER, TOLERANCE, poisoned, same_bits
from torch import Tensor

from fpi_cuda.backends import reference
from fpi_cuda.record import (
    ACTIVE,
    COUNTERS,
    GAIN,
    HALVINGS,
    HEAD,
    ITERATIONS,
    MAX_HALVINGS,
    MAX_RETREATS,
    PLAIN,
    REFERENCE,
    REFERENCE_ITERATION,
    RETREATS,
    RING,
    RING_START,
    SLOW_ITERATIONS,
    STATUS,
    TRAIL,
    WINDOW,
    Limits,
    Progress,
)
from fpi_cuda.solution import Status

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = torch.float16
ENDED = 1 + Status.MAX_ITERATIONS


@pytest.fixture(scope="module")
def machines():
    made = {order: Machine("sanitized", order, seed=3) for order in (FORWARD, REVERSE, RANDOM)}
    yield made
    for machine in made.values():
        machine.close()


@dataclass
class Solve:
    """A solve by steps of one backend, all that they write to poisoned first."""

    x: Tensor
    limits: Limits
    m: int = 1  # Picard
    beta: float = 1.0
    ridge: float = 1e-3
    every: int = 1

    def __post_init__(self) -> None:
        (b, n), dtype, m = self.x.shape, self.x.dtype, self.m
        self.p = Progress(self.x, self.limits)
        self.p.out.fill_(math.nan)
        self.trail = poisoned(b, TRAIL, n, dtype=dtype)
        self.values, self.residuals = (poisoned(b, m, n, dtype=dtype) for _ in range(2))
        self.gram = poisoned(b, m, m, dtype=self.p.dtype)

    def step(self, backend, gx: Tensor) -> None:
        gx = gx.to(self.x.dtype)
        if self.m == 1:
            backend.picard_step(self.p, self.x, gx, self.beta, self.trail)
        else:
            window = self.values, self.residuals, self.gram
            given = self.beta, self.ridge, 1e9, *window
            backend.anderson_step(self.p, self.x, gx, *given, every=self.every)

    def run(self, backend, g, most: int = 200) -> Solve:
        for _ in range(most):
            if (self.p.counters[:, STATUS] == ACTIVE).any():
                self.step(backend, g(self.x))
        return self

    @property
    def active(self) -> Tensor:
        return self.p.counters[:, STATUS] == ACTIVE


def together(machine: Machine, solve: Solve, values, most: int = 10**6) -> Solve:
    """Steps of the emulation, each beside the oracle's from the same state; values(k, x) is g.

    Before it returns that, it may change the state.
    """
    tolerance = TOLERANCE[solve.x.dtype] * 30
    wide = TOLERANCE[solve.p.dtype] * 100
    k = 0
    while solve.active.any() and k < most:
        gx = values(k, solve.x).to(solve.x.dtype)
        oracle = copy.deepcopy(solve)
        solve.step(machine, gx)
        oracle.step(reference, gx)
        assert torch.equal(solve.p.counters, oracle.p.counters)
        assert torch.equal(solve.p.tally, oracle.p.tally)
        for name, how in (("scalars", wide), ("out", tolerance)):
            a, b = getattr(solve.p, name), getattr(oracle.p, name)
            torch.testing.assert_close(a, b, rtol=how, atol=how, equal_nan=True)
        for name in ("x", "trail"):
            a, b = getattr(solve, name), getattr(oracle, name)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        k += 1
    return solve


def affine(b: int, n: int, dtype: torch.dtype, seed: int = 0):
    """Of each entry a rate of its own, below that of its sample; and a start."""
    generator = torch.Generator().manual_seed(seed)
    most = torch.linspace(0.1, 0.9, b)[:, None]
    rates = (most * torch.rand(b, n, generator=generator) * torch.tensor([1, -1]).repeat(n)[:n]).to(
        dtype
    )
    z, x = (torch.randn(b, n, generator=generator).to(dtype) for _ in range(2))
    return rates, z, x


# An odd length of each plan and one of whole packs; dtypes and orders in turns.
GAINS = [
    *((n, dtype) for n in (*PLANS.values(), 36) for dtype in (torch.float64, torch.float32)),
    *((n, HALF) for n in (36, 1025)),
    (1, torch.float32),
]


@pytest.mark.parametrize("beta", [1.0, 0.5, 1.5])
@pytest.mark.parametrize(("n", "dtype"), GAINS, ids=str)
def test_picard_measures_where_it_ends(machines, n, dtype, beta):
    """Iterates are kept near the end, and say how much g amplifies; to the oracle's figures."""
    rates, z, x = affine(4, n, dtype)
    rtol = 3e-2 if dtype == HALF else 1e-2
    own = torch.tensor([(rtol, 0.0, 1e6, 16.0, 0.0)] * 3 + [(0.0, 0.0, 1e6, 6.0, 0.0)])
    limits = Limits(0.0, 0.0, 0.0, 10**6, 16, own.to(Progress(x, FOREVER).dtype))
    solve = Solve(x, limits, beta=beta)
    machine = machines[(FORWARD, REVERSE, RANDOM)[n % 3]]
    together(machine, solve, lambda k, x: rates * x + z)
    status, scalars = solve.p.counters[:, STATUS], solve.p.scalars
    assert status[0] == 1 + Status.CONVERGED
    assert status[3] == ENDED
    assert (scalars[status == ENDED, GAIN] > 0).all()
    assert (solve.p.counters[status == ENDED, WINDOW] == TRAIL).all()
    if beta != 1:
        assert (scalars[status == ENDED, RING_START : RING_START + TRAIL] > 0).all()
        assert (scalars[:, RING_START + TRAIL :] == 0).all()


def test_picard_without_a_trail(machines):
    rates, z, x = affine(4, 37, torch.float32)
    solves = [Solve(x.clone(), Limits(1e-3, 0.0, 0.0, 10**6, 9), beta=0.5) for _ in range(2)]
    solves[1].trail = None
    for solve in solves:
        solve.run(machines[FORWARD], lambda x: rates * x + z)
    measured, plain = (solve.p for solve in solves)
    assert (measured.scalars[:, GAIN] > 0).any()
    assert (plain.scalars[:, GAIN:] == 0).all()
    assert torch.equal(measured.scalars[:, :GAIN], plain.scalars[:, :GAIN])
    assert torch.equal(measured.counters, plain.counters)
    assert torch.equal(measured.out, plain.out)


@pytest.mark.parametrize(("m", "beta", "every"), [(2, 1.0, 1), (3, 0.5, 3), (7, 1.5, 2)])
@pytest.mark.parametrize("n", PLANS.values(), ids=PLANS)
def test_anderson_measures_all_the_way(machines, n, m, beta, every):
    if n == PLANS["c"] and m == 7:
        pytest.skip("long, and as the others")
    for dtype in (torch.float64, torch.float32)[n == PLANS["c"] :]:
        rates, z, x = affine(3, n, dtype)
        limits = Limits(1e-2, 0.0, 0.0, 10**6, 2 * m)
        solve = Solve(x, limits, m, beta, every=every)
        together(machines[REVERSE], solve, lambda k, x: rates * x + z)  # noqa: B023
        assert (solve.p.scalars[:, GAIN] > 0).all()
        assert (solve.p.scalars[:, RING_START] > 0).all()


EXPONENTS = {torch.float32: (-100, 49, 97), torch.float64: (-900, 900), HALF: (8, 1)}


@pytest.mark.parametrize(
    ("m", "beta", "every"),
    [(1, 1.0, 1), (1, 0.7, 1), (2, 1.0, 1), (4, 0.7, 1), (5, 1.0, 3), (18, 1.0, 2)],
)
@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
@pytest.mark.parametrize("n", PLANS.values(), ids=PLANS)
def test_a_solve_times_a_power_of_two_has_its_bits(machines, n, dtype, m, beta, every):
    """Wherever nothing is subnormal: half's residuals, which Anderson keeps, are."""
    if (n != PLANS["a"] and (m == 18 or dtype == HALF)) or (m > 1 and dtype == HALF):
        pytest.skip("long, and as the others; or has fewer bits")
    rates, z, x = affine(2, n, dtype)
    rtol = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 1e-2)
    limits = Limits(rtol, 0.0, 0.0, 10**6, 30 if n == PLANS["a"] else 5)

    def solved(exponent: int) -> tuple[Tensor, ...]:
        power = 2.0**exponent
        solve = Solve(x * power, limits, m, beta, every=every).run(
            machines[FORWARD], lambda x: rates * x + z * power
        )
        p = solve.p
        unscaled = p.scalars[:, :GAIN] / power
        return p.counters, unscaled, p.scalars[:, GAIN:], p.out / power, solve.x / power

    plain = solved(0)
    assert (plain[0][:, ITERATIONS] > 2).all()
    assert (plain[2][:, 0] > 0).all()
    for exponent in EXPONENTS[dtype]:
        for mine, wanted in zip(solved(exponent), plain, strict=True):
            same_bits(mine, wanted)


def injected(gx: Tensor, k: int, where: dict[int, set[int]], value: float = math.nan) -> Tensor:
    """Values that are not finite: of each row, in such iterations."""
    gx = gx.clone()
    for row, iterations in where.items():
        if k in iterations:
            gx[row, -1] = value
    return gx


@pytest.mark.parametrize("m", [3, 5])
@pytest.mark.parametrize("n", PLANS.values(), ids=PLANS)
def test_beta_is_halved_where_the_residual_has_grown_for_long(machines, n, m):
    """Mixtures, plain steps and a step back have it; at most so often, of that sample alone."""
    draws = torch.randn(2, n, generator=torch.Generator().manual_seed(5))
    turned = torch.randn(14, 2, n, generator=torch.Generator().manual_seed(6)) / 8
    sizes = [1.0, 0.9, 5.0, 2.5, 1.2, 0.6, 20.0, 15.0, 10.0, 7.0, 4.0, 2.0, 1.0, 0.5]
    for beta in (1.0, 0.8):
        solve = Solve(torch.zeros(2, n), FOREVER, m, beta, every=3)
        kept, plain = [], []

        def values(k: int, x: Tensor) -> Tensor:
            counters = solve.p.counters  # noqa: B023
            kept.append(counters[0, HALVINGS].item())  # noqa: B023
            plain.append(counters[0, PLAIN].item())  # noqa: B023
            if k in (2, 6):  # as if it had been so for long, of the first sample alone
                counters[0, REFERENCE_ITERATION] -= SLOW_ITERATIONS
                solve.p.scalars[0, REFERENCE] = 0.5  # noqa: B023
                solve.p.scalars[0, RING_START:] = 9.0  # noqa: B023
            gx = x + torch.tensor([[sizes[k]], [0.9**k]]) * (draws + turned[k])
            if k == 10:
                gx[0, -1] = math.nan
            return gx

        together(machines[REVERSE], solve, values, len(sizes))
        assert kept[-1] == MAX_HALVINGS and kept[3] == 1
        assert solve.p.counters[1, HALVINGS] == 0
        assert max(plain) == 2 and solve.p.counters[0, RETREATS] == 1


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("beta", "value"), [(1.0, math.nan), (0.6, math.inf)])
@pytest.mark.parametrize("n", PLANS.values(), ids=PLANS)
def test_mixtures_are_taken_back_alone(machines, n, beta, value, every):
    """Once, twice in a row, over and over; at the first iterate and at a plain one it's the end."""
    always = set(range(20))
    where = {1: {3}, 2: {2, 3}, 3: {2, 4, 6, 8}, 4: always - {0, 1}, 5: always, 6: {1}, 7: {7}}
    generator = torch.Generator().manual_seed(4)
    draws = torch.randn(8, 8, n, generator=generator)
    for dtype in (torch.float32, HALF) if n < PLANS["c"] else (torch.float32,):
        limits = replace(FOREVER, max_iterations=8)
        solve = Solve(torch.zeros(8, n, dtype=dtype), limits, 3, beta, every=every)
        together(machines[RANDOM], solve, lambda k, x: injected(draws[k], k, where, value))
        c = solve.p.counters
        lost = 1 + Status.NONFINITE
        assert c[:, RETREATS].tolist() == [0, 1, 2, MAX_RETREATS, MAX_RETREATS, 0, 0, 1]
        assert c[:, STATUS].tolist() == [ENDED] * 4 + [lost] * 3 + [ENDED]
        assert c[4, ITERATIONS] == 3 + MAX_RETREATS
        assert solve.p.out.isfinite().all()
        # The last of all was taken back as it ended: to the value before, which is the result.
        assert torch.equal(solve.p.out[7], draws[6, 7].to(dtype))
        assert torch.equal(solve.x[7], solve.p.out[7])


def test_a_mixture_that_overflows_is_taken_back(machines):
    def g(x: Tensor) -> Tensor:
        return (0.98 * x.float() + 2000).clamp(max=60000.0).half()

    for n in (PLANS["a"], 520):
        solve = Solve(torch.zeros(2, n, dtype=HALF), Limits(1e-3, 0.0, 0.0, 10**6, 100), 3)
        solve.run(machines[FORWARD], g)
        assert (solve.p.counters[:, STATUS] == 1 + Status.CONVERGED).all()
        assert (solve.p.counters[:, RETREATS] > 0).all()
        assert (solve.p.out == 60000).all()


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("n", PLANS.values(), ids=PLANS)
def test_a_damped_step_that_overflows_is_undamped(machines, n, m):
    solve = Solve(torch.zeros(2, n, dtype=HALF), FOREVER, m, 1.5)
    gx = torch.full((2, n), 60000.0)
    gx[:, 0] = 1000
    solve.step(machines[FORWARD], gx)
    assert (solve.x[:, 0] == 1500).all()
    assert (solve.x[:, 1:] == 60000).all()


@pytest.mark.parametrize("n", [PLANS["a"], PLANS["c"]])
@pytest.mark.parametrize("m", [1, 3])
def test_no_counter_leads_out_of_bounds(machines, n, m):
    """Whatever the memory holds: AddressSanitizer watches."""
    for head, window in [(77, 1000), (-5, -7), (2**31 - 1, 2**31 - 1), (-(2**31), -(2**31))]:
        solve = Solve(torch.randn(2, n), FOREVER, m)
        solve.p.counters[:, HEAD], solve.p.counters[:, WINDOW] = head, window
        solve.p.counters[:, PLAIN], solve.every = window, 3
        solve.values.zero_(), solve.residuals.zero_(), solve.gram.zero_()
        for _ in range(3):
            gx = torch.randn(2, n)
            solve.step(machines[FORWARD], gx)
        gx = torch.randn(2, n)
        gx[0, 0] = math.nan
        solve.p.limits = replace(FOREVER, max_iterations=1)
        solve.step(machines[FORWARD], gx)
        assert (solve.p.counters[1, STATUS] == ENDED).all()


@pytest.mark.parametrize("history", [1, 3])
def test_a_whole_solve_times_a_power_of_two_has_its_bits(machines, history):
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        dense = Dense(20, activation=RELU, residual=0.2).fill(5, dtype)
        solver = Solver(history, beta=0.9, slots=2)

        def solved(exponent: int) -> tuple[Tensor, ...]:
            t = dict(dense.tensors)  # noqa: B023
            t["x0"], t["u"] = t["x0"] * 2.0**exponent, t["u"] * 2.0**exponent
            # atol is 0.1 rtol: too little to act, and too much beside a small state
            tight = replace(solver, own=[(1e-5, 0.0, 50)] * 5)  # noqa: B023
            done = tight(machines[FORWARD], replace(dense, tensors=t))  # noqa: B023
            power = 2.0**exponent
            return done.counters, done.scalars[:, GAIN:], done.out / power

        plain = solved(0)
        assert (plain[1][:, 0] > 0).all()
        for exponent in EXPONENTS[dtype]:
            for mine, wanted in zip(solved(exponent), plain, strict=True):
                same_bits(mine, wanted)


def test_a_whole_solve_takes_mixtures_back(machines):
    """clamp(0.98 x + 2000, max=60000), as two layers: its mixtures overflow half."""
    n, most = 5, 60000.0
    eye = torch.eye(n)
    tensors = {
        "x0": torch.zeros(3, n),
        "weight": -eye,
        "u": torch.full((3, n), most),
        "hidden_weight": -0.98 * eye,
        "hidden_u": torch.full((3, n), most - 2000),
    }
    dense = Dense(n, n, IDENTITY, RELU, tensors={name: t.half() for name, t in tensors.items()})
    done = Solver(3, slots=2, rtol=1e-3)(machines[RANDOM], dense)
    assert (done.counters[:, STATUS] == 1 + Status.CONVERGED).all()
    assert (done.counters[:, RETREATS] > 0).all()
    assert (done.out == most).all()
    for limit in range(1, 8):
        cut = Solver(3, slots=2, rtol=0.0, max_iterations=limit)(machines[FORWARD], dense)
        assert (cut.counters[:, ITERATIONS] <= limit).all()
        assert cut.out.isfinite().all()


def test_the_records_columns_are_all_told_apart():
    assert Progress(torch.empty(1, 1), FOREVER).counters.shape[1] == COUNTERS == HALVINGS + 1
    assert Progress(torch.empty(1, 1), FOREVER).scalars.shape[1] == RING_START + RING
