"""The CUDA kernels' bodies on the host, against the float64 reference.

Every plan of csrc/cuda/plan.h, at its borders; every order of threads and blocks; and once more
with each barrier and each fence taken out.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import test_alternation
import test_primitives
import test_stop_rule
import torch
from machine import FORWARD, RANDOM, REVERSE, Machine, assert_each_is_needed
from test_primitives import DTYPES, FOREVER, close, oracle_of, poisoned, same_record

from fpi_cuda.backends import reference
from fpi_cuda.record import ACTIVE, RESIDUAL, STATUS, TRAIL, Limits, Progress
from fpi_cuda.solution import Status

WARP_ROW, BLOCK_ROW = 1024, 16384  # bytes of the longest rows of plans a and b
# Rows, and their length: bytes, and values more.
ROWS = [
    *((b, 0, n) for b, n in [(1, 1), (3, 1), (2, 7), (5, 33)]),
    *((b, WARP_ROW, n) for b, n in [(6, 0), (5, 1)]),
    *((b, BLOCK_ROW, n) for b, n in [(2, 0), (2, 1)]),
    (3, 3 * BLOCK_ROW, 16),  # four parts, whole packs
    (2, 2 * BLOCK_ROW, 5),  # three parts, odd
]
PLANS = {"a": 37, "b": 1025, "c": 16411}  # an odd length of each plan, in every dtype


def length(dtype: torch.dtype, size: int, more: int) -> int:
    return size // dtype.itemsize + more


# Every dtype in one order, and some in each. What orders accesses does not depend on the dtype.
RUNS = [
    *(("sanitized", FORWARD, dtype) for dtype in DTYPES),
    *(("sanitized", REVERSE, dtype) for dtype in (torch.float32, torch.bfloat16)),
    *(("sanitized", RANDOM, dtype) for dtype in (torch.float64, torch.float16)),
    ("races", RANDOM, torch.float32),
]
pytestmark = pytest.mark.usefixtures("one_thread")


def run_id(run):
    return f"{run[0]}-{('forward', 'reverse', 'random')[run[1]]}-{run[2]}".replace("torch.", "")


@pytest.fixture(scope="module", params=RUNS, ids=run_id)
def run(request):
    build, order, dtype = request.param
    machine = Machine(build, order, seed=1)
    yield machine, dtype
    machine.close()


@pytest.fixture
def machine(run):
    return run[0]


@pytest.fixture
def dtype(run):
    return run[1]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_picard_step_matches_the_oracle(machine, rows, dtype):
    shape = rows[0], length(dtype, *rows[1:])
    for beta in (1.0, 0.6):
        test_primitives.test_picard_step_matches_the_oracle(machine, shape, dtype, beta)


# Short windows where rows are long; one so long that a pass can't take all its differences.
HISTORIES = [*zip(ROWS, [2, 5, 16, 6, 11, 4, 2, 2, 2, 3], strict=True), ((3, 0, 33), 18)]


@pytest.mark.parametrize(("rows", "history"), HISTORIES, ids=str)
def test_anderson_step_matches_the_oracle(run, rows, history):
    """Mixing at every iteration, or every second to fourth, in turns; and where residuals grow."""
    machine, dtype = run
    every = (
        1
        + (RUNS.index((machine.build, machine.order, dtype)) + HISTORIES.index((rows, history))) % 4
    )
    given = (rows[0], length(dtype, *rows[1:])), dtype, history, 0.6 if history % 2 else 1.0
    test_primitives.test_anderson_step_matches_the_oracle(machine, *given, every)


@pytest.fixture(scope="module")
def fast():
    """A machine without checks of memory, for long courses."""
    machine = Machine("races", RANDOM, seed=2)
    yield machine
    machine.close()


@pytest.mark.parametrize(
    ("plan", "course"),
    [*((plan, c) for plan in "ab" for c in test_alternation.COURSES), ("c", "grows between")],
)
def test_alternating_steps_follow_the_oracles(fast, plan, course):
    for starts_plain in (False, True):
        test_alternation.check_follows_the_oracle(fast, course, 3, starts_plain, n=PLANS[plan])


class Problem:
    """A solve that every step compares with the oracle's step from the same state."""

    def __init__(
        self,
        solver: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        limits: Limits = FOREVER,
        history: int = 3,
        index: list[int] | None = None,
        offset: int = 0,
        every: int = 1,
    ) -> None:
        b, n = shape
        rows = b if index is None else len(index)
        self.solver, self.dtype, self.every = solver, dtype, every
        self.x = torch.empty(rows * n + offset, dtype=dtype)[offset:].view(rows, n)
        self.x.copy_(torch.randn(rows, n))
        self.progress = Progress(torch.empty(b, n, dtype=dtype), limits)
        self.progress.out.fill_(math.nan)
        if index is not None:
            self.progress.narrow(torch.tensor(index))
        self.window = [poisoned(b, history, n, dtype=dtype) for _ in range(2)]
        self.window.append(poisoned(b, history, history, dtype=self.progress.dtype))
        self.trail = poisoned(b, TRAIL, n, dtype=dtype)

    def step(self, machine: Machine, gx: torch.Tensor, beta: float = 0.6) -> None:
        gx = gx.to(self.dtype)
        p, q, y = self.progress, oracle_of(self.progress), self.x.double().clone()
        if self.solver == "picard":
            trail = self.trail.double().clone()
            machine.picard_step(p, self.x, gx, beta, self.trail)
            reference.picard_step(q, y, gx.double(), beta, trail)
            assert torch.equal(self.trail.isnan(), trail.isnan())
            close(self.trail, trail, self.dtype)
        else:
            window = [t.double().clone() for t in self.window]
            given = beta, 0.05, 1e9
            machine.anderson_step(p, self.x, gx, *given, *self.window, every=self.every)
            reference.anderson_step(q, y, gx.double(), *given, *window, every=self.every)
            active = p.counters[:, STATUS] == ACTIVE  # of one that ended, nobody reads the window
            for mine, oracle in zip(self.window[:2], window[:2], strict=True):
                close(mine[active], oracle[active], self.dtype)
        close(self.x, y, self.dtype, 30)
        close(p.out, q.out, self.dtype)
        same_record(p, q, self.dtype)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("n", PLANS.values(), ids=PLANS)
def test_rows_finish_freeze_and_follow_their_index(machine, solver, n, dtype):
    limits = Limits(rtol=1e-2, offset=0.0, rounding=0.0, patience=10**6, max_iterations=3)
    problem = Problem(solver, (6, n), dtype, limits, index=[4, 1, 5, 0, 2])
    p, x = problem.progress, problem.x
    p.bounds = torch.zeros(6, dtype=p.dtype)
    p.bounds[2] = 1e6  # converges at once
    first = x.clone()
    gx = torch.randn(x.shape).to(dtype)
    gx[0] = x[0]  # converges at once
    gx[2, n // 2] = math.inf
    gx[3, n - 1] = math.nan
    problem.step(machine, gx)
    converged, failed = 1 + Status.CONVERGED, 1 + Status.NONFINITE
    assert p.counters[:, STATUS].tolist() == [failed, 0, converged, 0, converged, failed]
    assert torch.equal(p.out[[4, 2]], gx[[0, 4]])
    assert torch.equal(p.out[[5, 0]], first[[2, 3]]), "the last finite iterate is returned"
    frozen = x[[0, 2, 3, 4]].clone()
    for _ in range(2):
        problem.step(machine, torch.randn(x.shape))
        assert torch.equal(x[[0, 2, 3, 4]], frozen)
    assert p.tally.tolist() == [0, 3, 3]
    problem.step(machine, torch.randn(x.shape))  # nobody is left
    assert p.out[3].isnan().all(), "samples without a row are left alone"


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("n", PLANS.values(), ids=PLANS)
def test_rows_end_at_bounds_of_their_own(machine, solver, n, dtype):
    test_primitives.test_rows_end_at_bounds_of_their_own(machine, solver, n, dtype)


@pytest.mark.parametrize("group", test_stop_rule.GROUPS)
@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_samples_end_where_the_rule_says(start, solver, group):
    machine = start("sanitized", FORWARD)
    dtype = {"picard": torch.float32, "anderson": torch.float64}[solver]
    test_stop_rule.test_samples_end_where_the_rule_says(machine, solver, group, dtype)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("n", PLANS.values(), ids=PLANS)
def test_norms_neither_underflow_nor_overflow(machine, solver, n, dtype):
    if dtype == torch.float16:
        pytest.skip("no float16 has a square beyond float32")
    for exponent in (20, -20) if dtype != torch.float64 else (160, -160):
        factor = 10.0**exponent
        problem = Problem(solver, (2, n), dtype)
        problem.x.mul_(factor)
        gx = (torch.randn(2, n, dtype=torch.float64) * factor).to(dtype)
        problem.x[1] = gx[1] = 0  # beside a norm that is measured again
        residual = ((gx.double() - problem.x.double()) / factor).norm(dim=1) * factor
        problem.step(machine, gx)
        assert problem.progress.scalars[:, RESIDUAL].tolist() == pytest.approx(
            residual.tolist(), rel=1e-4
        )


def test_a_singular_or_grown_window_restarts_alone(machine, dtype):
    if dtype.itemsize >= 4:
        test_primitives.test_a_singular_window_takes_a_picard_step_alone(machine, dtype)
    test_primitives.test_a_grown_residual_restarts_its_window_alone(machine)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("shape", [(0, 4), (0, 16411), (3, 0), (0, 0)], ids=str)
def test_nothing_to_do_counts_as_a_step(machine, solver, shape, dtype):
    problem = Problem(solver, shape, dtype)
    for _ in range(2):
        problem.step(machine, torch.randn(shape))
    assert problem.progress.tally.tolist()[2] == 2


@pytest.mark.parametrize("size", [WARP_ROW, BLOCK_ROW, BLOCK_ROW + 16])
def test_the_longest_window_fits_shared_memory(machine, size, dtype):
    problem = Problem("anderson", (5, size // dtype.itemsize), dtype, history=32)
    for _ in range(2):
        problem.step(machine, torch.randn(problem.x.shape))


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("n", [36, 1024, 16400])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_has_its_bits_in_any_batch_order_and_place(start, solver, n, dtype):
    """Alone, and amid others; first thread first, and drawn; on 16-byte boundaries, and off."""
    gx = torch.randn(3, 5, n)
    starts = torch.randn(5, n)

    def solved(rows: list[int], offset: int, *order: int) -> torch.Tensor:
        machine = start("sanitized", *order)
        problem = Problem(solver, (5, n), dtype, index=rows, offset=offset)
        problem.x.copy_(starts[rows])
        for k in range(3):
            problem.step(machine, gx[k, rows])
        return torch.cat([problem.x[-1].double(), problem.progress.scalars[3].double()])

    alone = solved([3], 0, FORWARD)
    assert alone.isfinite().all()
    for rows, offset, order in [
        ([0, 1, 4, 3], 0, (REVERSE,)),
        ([4, 3], 0, (RANDOM, 7)),
        ([2, 3], 1, (RANDOM, 8, 2)),
    ]:
        assert torch.equal(alone, solved(rows, offset, *order))


def scenarios():
    """Small runs that come to every barrier and fence together."""

    def run(solver, n, history=3, factor=1.0, limits=FOREVER, every=1):
        def scenario(machine):
            torch.manual_seed(0)
            problem = Problem(solver, (5, n), torch.float32, limits, history, every=every)
            problem.x.mul_(factor)
            problem.x[1] = 0
            for _ in range(history if history > 3 else 2 if factor == 1 else 4):
                gx = torch.randn(5, n) * factor
                gx[1] = 0
                gx[2, 0] = math.inf  # ends, and is left alone then
                problem.step(machine, gx)

        return scenario

    for n in (37, 257, 8197):
        for solver in ("picard", "anderson"):
            yield run(solver, n)
            yield run(solver, n, factor=1e-20)
            yield run(solver, n, limits=replace(FOREVER, max_iterations=2))
        yield run("anderson", n, 5, every=3)
    yield run("anderson", 37, 18)
    yield run("anderson", 257, 18, every=4)


# What may be missing, alone: a part of the chain of calls that leads to it, and why.
REDUNDANT = {
    "rows.cuh: device_fence(); #2 < picard_step.cuh": "parts are read past the cache, behind the "
    "barrier that follows; the fence makes it an acquire in the memory model's own terms, which "
    "Anderson's residuals need",
    "rows.cuh: device_fence(); #3": "puts a thread's atomics on several counts in their order, "
    "which they always have in the emulation",
    "rows.cuh: device_fence(); #4": "counts are read past the cache, by the thread whose atomic "
    "was the last; likewise",
    "warp_barrier(); < team.cuh: barrier(); #1 < rows.cuh: team.reduce(mine, stage(team), joined, "
    "Larger{})": "of one value and one warp, lane 0 writes the stage and reads it",
    "warp_barrier(); < team.cuh: barrier(); #1 < rows.cuh: team.reduce(mine, stage(team), joined, "
    "Add{}); < rows.cuh: whole_sums<1>": "likewise",
    "warp_barrier(); < team.cuh: barrier(); #2 < rows.cuh: team.reduce(mine, stage(team), joined, "
    "Add{}); < anderson_step.cuh: batch.template whole_sums<kPair>": "a lane reads what it wrote",
    "rows.cuh: team.barrier(); #3 < rows.cuh: squares": "what all have read, the largest entry, is "
    "next written behind a barrier of the reduction that follows",
    "rows.cuh: team.barrier(); #4": "the sum likewise",
    "anderson_step.cuh: team.barrier(); #2": "the last product is one alone, by the thread that "
    "solves the system; those before come before barriers of reductions",
    "team.barrier(); #1 < rows.cuh: join_parts(team, row, kCount, joined); < anderson_step.cuh: "
    "batch.template whole_sums<3>": "the system's sums follow",
}


def test_every_barrier_and_fence_is_needed(start):
    assert_each_is_needed(start("races", RANDOM, 5), scenarios(), REDUNDANT, at_least=20)
