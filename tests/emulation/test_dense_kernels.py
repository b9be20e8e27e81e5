"""Whole solves of dense layers: the CUDA bodies on the host, against a plain float64 loop.

Every activation, layer and dtype; every order of threads and blocks; weights that stay in shared
memory, partly stay, or stream; and once more with each barrier, fence and wait taken out.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from dense_solves import (  # noqa: F401
    ACTIVATIONS,
    DTYPES,
    IDENTITY,
    SHARED,
    TANH,
    Dense,
    Solver,
    dtype_fixture,
    ending,
    machine_fixture,
    machine_of,
    plan,
    run_fixture,
)
from machine import FORWARD, RANDOM, REVERSE, EmulationError, Machine, assert_each_is_needed

from fpi_cuda.record import ITERATIONS, STATUS
from fpi_cuda.solution import Status

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("history", [1, 3])
def test_every_activation_after_either_layer(activation, history):
    machine = machine_of("sanitized")
    solver = Solver(history, every=2)
    solver.check(machine, Dense(9, activation=activation).fill(5, torch.float64))
    hidden = Dense(9, 12, TANH if activation == IDENTITY else activation, activation)
    solver.check(machine, hidden.fill(5, torch.float64))
    solver.check(machine, hidden.fill(5, torch.float32))


@pytest.mark.parametrize("u", ["sample", "shared", "none"])
@pytest.mark.parametrize("hidden", [None, 21], ids=["one", "two"])
@pytest.mark.parametrize("history", [1, 3])
def test_what_a_layer_is_made_of(machine, dtype, u, hidden, history):
    dense = Dense(20, hidden, u=u, residual=0.3, scaled=True)
    Solver(history, beta=0.8).check(machine, dense.fill(5, dtype))
    if hidden is not None:
        adjoint = Dense(20, hidden, IDENTITY, u=u, residual=-0.2, hidden_scaled=True)
        Solver(history).check(machine, adjoint.fill(5, dtype))
    tangent = Dense(20, hidden, u=u, residual=-0.2, output_scaled=True)
    tangent = dataclasses.replace(tangent, hidden_scaled=hidden is not None)
    Solver(history).check(machine, tangent.fill(5, dtype))


# N, H, slots, samples: odd ones; one warp's columns and one more; rows of a tensor core's tile and
# one more; rows longer than a warp takes; nothing.
SHAPES = [
    (1, None, 2, 3),
    (7, 1, 3, 7),
    (31, 33, 4, 9),
    (33, 7, 16, 17),
    (159, 200, 17, 17),
    (200, 159, 2, 3),
    (257, None, 8, 7),
    (64, None, 33, 34),
    (64, None, 64, 65),
    (8, 8, 64, 65),
    (0, None, 2, 3),
    (5, 0, 2, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(machine, dtype, shape):
    n, hidden, slots, b = shape
    dense = Dense(n, hidden).fill(b, dtype)
    solver = Solver(1 + 2 * (n % 2), slots=slots, rtol=0.0, max_iterations=3, blocks=1)
    solver.check(machine, dense)


def test_a_block_takes_a_long_row(machine, dtype):
    n = 2048 // dtype.itemsize + 3
    if dtype == torch.float16:
        pytest.skip("as bfloat16")
    dense = Dense(n, u="shared", norm=0.3).fill(3, dtype)
    solver = Solver(2, slots=2, max_iterations=2, limit=120_000)
    assert plan(solver, dense, 3, dtype)["teams"] == 1
    solver.check(machine, dense)


@pytest.mark.parametrize("b", [0, 1, 5])
def test_few_samples(machine, dtype, b):
    for history in (5, 7):
        Solver(history, every=3, slots=0, blocks=3).check(machine, Dense(12).fill(b, dtype))


def test_tensor_cores_of_float32():
    for build, order in (("sanitized", FORWARD), ("races", RANDOM)):
        machine = machine_of(build, order)
        for n, hidden, slots in ((33, None, 4), (40, 57, 17), (64, 20, 40)):
            dense = Dense(n, hidden).fill(slots + 2, torch.float32)
            Solver(3, slots=slots, tf32=True, rtol=2e-3, blocks=1).check(machine, dense)


def limits_of(solver: Solver, dense: Dense, b: int, dtype: torch.dtype) -> list[int]:
    """Bytes of shared memory, so that all of the weights stay in it, most rows, some and none."""
    solver = dataclasses.replace(solver, limit=SHARED)
    whole = plan(solver, dense, b, dtype)
    limits = {}
    for limit in range(41_000, min(whole["bytes"], SHARED) + 1, 500):
        p = plan(dataclasses.replace(solver, limit=limit), dense, b, dtype)
        if p["slots"] == solver.slots:
            limits.setdefault((p["shared_output"] + p["shared_hidden"], p["is_shared"]), limit)
    kept = sorted(limits)
    assert len(kept) >= 2, "some rows of the weights stream"
    chosen = {kept[0], kept[len(kept) // 2], kept[-1]}
    return [limits[k] for k in sorted(chosen)]


# By tiles of two rows, of eight or 16, and the widest.
@pytest.mark.parametrize(
    ("n", "hidden", "slots"),
    [(97, 130, 2), (97, 130, 6), (163, None, 17), (257, None, 25)],
    ids=str,
)
def test_weights_stay_or_stream(machine, dtype, n, hidden, slots):
    """To the bit, whatever stays in shared memory; and the state there or in device memory."""
    if slots > 6 and dtype in (torch.float16, torch.float64):
        pytest.skip("as bfloat16 and float32")
    dense = Dense(n, hidden).fill(slots + 1, dtype)
    solver = Solver(2, slots=slots, blocks=1, max_iterations=3, rtol=0.0)
    expected = solver.check(machine, dense)
    for limit in limits_of(solver, dense, slots + 1, dtype):
        mine = dataclasses.replace(solver, limit=limit)(machine, dense)
        for i in range(slots + 1):
            assert torch.equal(mine.of(i), expected.of(i))


@pytest.mark.parametrize("history", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_has_its_bits_in_any_batch_order_and_tile(history, dtype):
    b, n = 39, 37
    dense = Dense(n, 18, scaled=True).fill(b, dtype)
    base = Solver(history, every=3, slots=39, blocks=1, max_iterations=12)

    def some(rows: list[int]) -> Dense:
        tensors = {
            name: t[rows].contiguous() if t.shape[0] == b else t
            for name, t in dense.tensors.items()
        }
        return dataclasses.replace(dense, tensors=tensors)

    tf32 = (False, True) if dtype == torch.float32 else (False,)
    for wide in tf32:
        solver = dataclasses.replace(base, tf32=wide, rtol=2e-3 if wide else None)
        together = solver(machine_of("sanitized"), dense)
        assert together.out.isfinite().all()
        for rows, slots, blocks, order in [
            ([3], 1, 1, FORWARD),
            ([38, 3, 0], 2, 1, REVERSE),
            (list(range(38, -1, -1)), 5, 3, RANDOM),
            (list(range(20)), 17, 2, RANDOM),
        ]:
            mine = dataclasses.replace(solver, slots=slots, blocks=blocks)(
                machine_of("sanitized", order), some(rows)
            )
            for i, row in enumerate(rows):
                assert torch.equal(mine.of(i), together.of(row))


@pytest.mark.parametrize("history", [1, 3])
def test_samples_end_alone(machine, dtype, history):
    """NaN in one, growth in another, one that needs no iteration but the first."""
    b, n = 7, 20
    dense = Dense(n, activation=IDENTITY, scaled=True).fill(b, dtype)
    t = dense.tensors
    t["scale"][:] = 0.5
    solver = Solver(history, every=3, slots=3, max_iterations=30, ridge=1e-3)
    before = solver(machine, dense)
    t["u"][1, n - 1] = math.nan
    t["scale"][2] = 0
    t["x0"][2] = t["u"][2]
    t["scale"][4] = 100
    after = solver(machine, dense)
    for i in (0, 3, 5, 6):
        assert torch.equal(before.of(i), after.of(i))
    status = after.counters[:, STATUS]
    assert status[1] == 1 + Status.NONFINITE
    assert status[2] == 1 + Status.CONVERGED
    assert after.counters[2, ITERATIONS] == 1
    if history == 1:
        assert status[4] in (1 + Status.DIVERGED, 1 + Status.NONFINITE)
    assert torch.equal(after.out[1], t["x0"][1]), "the last finite iterate is returned"


def test_all_fail_at_once_and_none_converges(machine, dtype):
    dense = Dense(20).fill(9, dtype)
    slow = Solver(slots=2, rtol=0.0, max_iterations=3).check(machine, dense)
    assert slow.tally.tolist() == [0, 9, 3]
    assert (slow.counters[:, STATUS] == 1 + Status.MAX_ITERATIONS).all()
    dense.tensors["u"].fill_(math.inf)
    dense = dataclasses.replace(dense, activation=IDENTITY)
    failed = Solver(slots=2).check(machine, dense)
    assert failed.tally.tolist() == [0, 9, 1]
    assert torch.equal(failed.out, dense.tensors["x0"])


def test_samples_that_have_their_results_are_left_alone(machine, dtype):
    """A status given is kept, and the slots go on to others; all of a block's may be such."""
    b = 13
    dense = Dense(20).fill(b, dtype)
    solver = Solver(slots=2)
    all_of_them = solver(machine, dense)
    for skip in ([0, 1, 2, 3, 4, 5, 12], [2, 7], list(range(b))):
        some = solver(machine, dense, skip)
        assert some.out[skip].isnan().all()
        assert (some.counters[skip] == torch.tensor([1 + Status.CONVERGED, *[0] * 7])).all()
        for i in set(range(b)) - set(skip):
            assert torch.equal(some.of(i), all_of_them.of(i))
        assert some.tally[2] == some.counters[:, ITERATIONS].max()


def test_the_floor_ends_samples_early(machine, dtype):
    done = Solver(floor=1e6, rtol=1e-3).check(machine, Dense(20).fill(4, dtype))
    assert done.tally.tolist() == [0, 0, 1]


@pytest.mark.parametrize("history", [1, 3])
def test_samples_end_at_bounds_of_their_own(machine, dtype, history):
    """A slot's next sample brings its own; beside the floor, or without one."""
    b, most = 7, [5, 1, 9, 2, 4, 3, 50]
    dense = Dense(20).fill(b, dtype)
    for floor in (None, 1e-3):
        own = [(0.0, 0.0, k) for k in most[:-1]] + [(0.2, 0.0, 50)]
        solved = Solver(history, slots=2, floor=floor, own=own).check(machine, dense)
        assert solved.counters[:-1, ITERATIONS].tolist() == most[:-1]
        assert (solved.counters[:-1, STATUS] == 1 + Status.MAX_ITERATIONS).all()
        assert solved.counters[-1, STATUS] == 1 + Status.CONVERGED
        assert solved.tally.tolist() == [0, 6, 9]


@pytest.mark.parametrize(("slots", "limit"), [(2, SHARED), (2, 64_000), (33, SHARED)])
def test_map_has_the_bits_of_a_solves_product(machine, dtype, slots, limit):
    """One iteration of an affine step without residual is its map."""
    b, n = slots + 1, 131
    dense = Dense(n, activation=IDENTITY, u="shared").fill(b, dtype)
    t = dense.tensors
    tf32 = dtype == torch.float32 and slots == 33
    solver = Solver(slots=slots, max_iterations=1, rtol=0.0, limit=limit, tf32=tf32)
    solved = solver(machine, dense)
    out = torch.full((b, n), math.nan, dtype=dtype)
    machine.call(
        f"dense_map.{str(dtype).removeprefix('torch.')}",
        {"x": t["x0"], "weight": t["weight"], "u": t["u"], "out": out},
        rows=b,
        k=n,
        n=n,
        tf32=+tf32,
        shares_u=1,
        multiprocessors=3,
        shared_limit=limit,
    )
    assert torch.equal(out, solved.out)


def test_shapes_that_do_not_fit_are_refused():
    solver = Solver(slots=0)
    assert plan(solver, Dense(4096), 3, torch.float32)["slots"] > 0
    assert plan(solver, Dense(4097), 3, torch.float32)["slots"] == 0
    assert plan(solver, Dense(64, 60_000), 3, torch.float32)["slots"] == 0
    assert plan(Solver(32), Dense(4096), 3, torch.float32)["slots"] > 0
    with pytest.raises(EmulationError, match="does not fit"):
        Solver(limit=20_000)(machine_of("sanitized"), Dense(200).fill(2, torch.float32))


@pytest.mark.parametrize("limit", [SHARED, 163 << 10], ids=["sm_90", "sm_80"])
def test_plans_keep_within_shared_memory(limit):
    for dtype in DTYPES:
        for b, n, hidden in [
            (256, 128, None),
            (1024, 256, None),
            (64, 1024, None),
            (4096, 64, None),
            (32, 159, 200),
            (2515, 159, 200),
        ]:
            for history in (1, 5, 32):
                solver = Solver(history, slots=0, limit=limit, blocks=132)
                p = plan(solver, Dense(n, hidden), b, dtype)
                assert 0 < p["bytes"] <= limit
                assert p["slots"] * 132 >= min(b, 64 * 132) / 2


def scenarios():
    """Small runs that come to every barrier, fence and wait together."""

    def run(dtype, slots, n=37, hidden=None, history=1, streams=True, blocks=1):
        def scenario(machine):
            torch.manual_seed(0)
            b = slots + 2
            dense = Dense(n, hidden, scaled=True).fill(b, dtype)
            solver = Solver(history, slots=slots, max_iterations=2, blocks=blocks, floor=0.5)
            if streams:
                solver.limit = limits_of(solver, dense, b, dtype)[-2]
            solver.check(machine, dense)

        return scenario

    yield run(torch.float32, 3, hidden=20, streams=False, blocks=2)
    yield run(torch.float32, 3, history=3, streams=False, blocks=2)
    yield run(torch.float32, 2, 520, history=3, blocks=2)
    for slots, n in [(2, 160), (4, 160), (17, 163), (25, 257)]:  # each kind of tile
        yield run(torch.float32, slots, n)
    for slots, n in [(3, 160), (25, 257)]:
        yield run(torch.bfloat16, slots, n)


def tallied(machine: Machine) -> None:
    """Blocks that end apart: the last one sees what all have counted."""
    dense = Dense(5).fill(8, torch.float32)
    Solver(slots=1, blocks=4, max_iterations=3).check(machine, dense)


# What may be missing, alone: a part of the chain of calls that leads to it, and why.
REDUNDANT = {
    "dense_solve.cuh: device_fence(); #1": "puts a thread's atomics on several counts in their "
    "order, which they always have in the emulation",
    "dense_solve.cuh: device_fence(); #2": "counts are read past the cache, by the thread whose "
    "atomic was the last; the fence makes it an acquire in the memory model's own terms",
}


def concerns_dense(chain: str) -> bool:
    """What the step's own bodies do among themselves is test_kernels.py's."""
    first = chain.split(" < ", maxsplit=1)[0]
    return "dense_" in first or "product" in first


def test_every_barrier_fence_and_wait_is_needed(start):
    assert_each_is_needed(
        start("races", RANDOM, 5), [*scenarios(), tallied], REDUNDANT, 10, concerns_dense
    )
