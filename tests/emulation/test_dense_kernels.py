"""Whole solves of dense layers: the CUDA bodies on the host, against a plain float64 loop.

Every activation, layer and dtype; every order of threads and blocks; weights that stay in shared
memory, partly stay, or stream; and once more with each barrier, fence and wait taken out.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import pytest
import torch
from machine import FORWARD, RANDOM, REVERSE, EmulationError, Machine, assert_each_is_needed
from torch import Tensor

from fpi_cuda.backends import reference
from fpi_cuda.record import ITERATIONS, RESIDUAL, STATUS, Limits, Progress
from fpi_cuda.solution import Status

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
IDENTITY, TANH, RELU, SIGMOID, SOFTPLUS, GELU = range(6)
ACTIVATIONS = {
    IDENTITY: lambda t: t,
    TANH: torch.tanh,
    RELU: torch.relu,
    SIGMOID: torch.sigmoid,
    SOFTPLUS: torch.nn.functional.softplus,
    GELU: torch.nn.functional.gelu,
}
# Of a result against the float64 solve, relative to 1: rounding of the state and its tolerance.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 6e-3, torch.bfloat16: 5e-2}
RTOL = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHARED = 227 << 10  # bytes, of sm_90


@dataclass(frozen=True)
class Dense:
    """A step of dense layers; weights scaled to a spectral norm of 0.7 together."""

    n: int
    hidden: int | None = None
    activation: int = TANH
    hidden_activation: int = TANH
    residual: float = 0.0
    scaled: bool = False
    hidden_scaled: bool = False
    u: str = "sample"  # or "shared" or "none"
    norm: float = 0.7
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def fill(self, b: int, dtype: torch.dtype) -> Dense:
        n, h = self.n, self.hidden
        last = n if h is None else h
        t: dict[str, Tensor | None] = {"x0": 0.3 * torch.randn(b, n)}

        def weight(rows: int, columns: int, norm: float) -> Tensor:
            w = torch.randn(rows, columns)
            return w * (norm / torch.linalg.matrix_norm(w, 2)) if w.numel() else w

        def u(size: int) -> Tensor | None:
            shapes = {"sample": (b, size), "shared": (size,)}
            return torch.randn(shapes[self.u]) if self.u in shapes else None

        share = 1 - abs(self.residual)
        t["weight"] = weight(n, last, self.norm * share)
        t["u"] = u(n)
        t["scale"] = 0.2 + 0.8 * torch.rand(b, n) if self.scaled else None
        if h is not None:
            t["hidden_weight"] = weight(h, n, 1.0)
            t["hidden_u"] = None if self.hidden_scaled else u(h)
            t["hidden_scale"] = torch.rand(b, h) if self.hidden_scaled else None
        made = {name: a.to(dtype) for name, a in t.items() if a is not None}
        return dataclasses.replace(self, tensors=made)

    def g(self, x: Tensor) -> Tensor:
        """In float64."""
        t = {name: a.double() for name, a in self.tensors.items()}
        x = x * t["scale"] if self.scaled else x
        value = x
        if self.hidden is not None:
            value = value @ t["hidden_weight"].mT + t.get("hidden_u", 0.0)
            if self.hidden_scaled:
                value = value * t["hidden_scale"]
            else:
                value = ACTIVATIONS[self.hidden_activation](value)
        value = value @ t["weight"].mT + t.get("u", 0.0) + self.residual * x
        return ACTIVATIONS[self.activation](value)


@dataclass
class Solved:
    out: Tensor
    counters: Tensor
    scalars: Tensor
    tally: Tensor

    def of(self, sample: int) -> Tensor:
        rows = (self.out[sample], self.counters[sample], self.scalars[sample])
        return torch.cat([r.double() for r in rows])


@dataclass
class Solver:
    """A solve's numbers, and how it is laid over a device."""

    history: int = 1
    beta: float = 1.0
    ridge: float = 1e-6
    restart: float = 1e9
    rtol: float | None = None
    max_iterations: int = 100
    floor: float | None = None
    tf32: bool = False
    slots: int = 4
    blocks: int = 2
    limit: int = SHARED

    def limits(self, dtype: torch.dtype) -> Limits:
        rtol = RTOL[dtype] if self.rtol is None else self.rtol
        return Limits(rtol, 0.1 * rtol, 0.0, 10**6, self.max_iterations)

    def __call__(self, machine: Machine, dense: Dense, skip: list[int] | None = None) -> Solved:
        x0 = dense.tensors["x0"]
        b, n = x0.shape
        limits = self.limits(x0.dtype)
        p = Progress(x0, limits)
        out = torch.full_like(x0, math.nan)
        p.tally[0] = 77
        p.counters[skip or [], STATUS] = 1 + Status.CONVERGED
        floor = None if self.floor is None else torch.full((b,), self.floor, dtype=p.dtype)
        arrays = {
            **{name: t.contiguous().clone() for name, t in dense.tensors.items()},
            **{"out": out, "counters": p.counters, "scalars": p.scalars, "tally": p.tally},
            "floor": floor,
        }
        numbers = {
            "samples": b,
            "n": n,
            "hidden": -1 if dense.hidden is None else dense.hidden,
            "activation": dense.activation,
            "hidden_activation": dense.hidden_activation,
            "residual": dense.residual,
            "shares_u": dense.u == "shared",
            "shares_hidden_u": dense.u == "shared",
            "history": self.history,
            **{name: getattr(self, name) for name in ("beta", "ridge", "restart", "tf32", "slots")},
            "multiprocessors": self.blocks,
            "shared_limit": self.limit,
            **dataclasses.asdict(limits),
        }
        dtype = str(x0.dtype).removeprefix("torch.")
        machine.call(f"dense_solve.{dtype}", arrays, **{k: +v for k, v in numbers.items()})
        return Solved(out, p.counters, p.scalars, p.tally)

    def reference(self, dense: Dense) -> Solved:
        """In float64, from the same numbers. Samples that have ended are left alone."""
        x = dense.tensors["x0"].double().clone()
        b, n = x.shape
        floor = None if self.floor is None else torch.full((b,), self.floor).double()
        p = Progress(x, self.limits(dense.tensors["x0"].dtype), floor)
        p.out.fill_(math.nan)
        m = self.history
        window = [torch.zeros(b, *shape).double() for shape in ((m, n), (m, n), (m, m))]
        while (p.counters[:, STATUS] == 0).any():
            gx = dense.g(x)
            if m == 1:
                reference.picard_step(p, x, gx, self.beta)
            else:
                reference.anderson_step(p, x, gx, self.beta, self.ridge, self.restart, *window)
        return Solved(p.out, p.counters, p.scalars, p.tally)

    def check(self, machine: Machine, dense: Dense, scale: float = 1.0) -> Solved:
        dtype = dense.tensors["x0"].dtype
        mine, oracle = self(machine, dense), self.reference(dense)
        tolerance = (1e-2 if self.tf32 else TOLERANCE[dtype]) * scale
        torch.testing.assert_close(
            mine.out.double(), oracle.out, rtol=tolerance, atol=tolerance, equal_nan=True
        )
        if dtype == torch.float64:
            assert torch.equal(mine.counters, oracle.counters)
            assert torch.equal(mine.tally, oracle.tally)
            torch.testing.assert_close(
                mine.scalars[:, RESIDUAL], oracle.scalars[:, RESIDUAL], rtol=1e-6, atol=1e-13
            )
        else:
            assert torch.equal(mine.counters[:, STATUS], oracle.counters[:, STATUS])
        assert mine.tally[0] == 0
        return mine


def run_id(run: tuple[str, int, torch.dtype]) -> str:
    return f"{run[0]}-{('forward', 'reverse', 'random')[run[1]]}-{run[2]}".replace("torch.", "")


# What orders accesses differs between the exact product and that of tensor cores alone.
RUNS = [
    ("sanitized", FORWARD, torch.float64),
    ("sanitized", REVERSE, torch.float32),
    ("sanitized", RANDOM, torch.bfloat16),
    ("sanitized", REVERSE, torch.float16),
    ("races", RANDOM, torch.float32),
    ("races", RANDOM, torch.bfloat16),
]
MACHINES: dict[tuple[str, int], Machine] = {}


def machine_of(build: str, order: int = FORWARD, seed: int = 1) -> Machine:
    if (build, order) not in MACHINES:
        MACHINES[build, order] = Machine(build, order, seed)
    return MACHINES[build, order]


@pytest.fixture(scope="module", autouse=True)
def ending():
    yield
    for machine in MACHINES.values():
        machine.close()


@pytest.fixture(params=RUNS, ids=run_id)
def run(request):
    build, order, dtype = request.param
    return machine_of(build, order), dtype


@pytest.fixture
def machine(run):
    return run[0]


@pytest.fixture
def dtype(run):
    return run[1]


def plan(solver: Solver, dense: Dense, b: int, dtype: torch.dtype) -> dict[str, int]:
    """What csrc/cuda/dense_plan.h decides."""
    names = ("slots", "shared_hidden", "shared_output", "is_shared", "bytes", "teams")
    values = torch.zeros(6, dtype=torch.int64)
    machine_of("sanitized").call(
        "dense_plan",
        {"plan": values},
        n=dense.n,
        hidden=-1 if dense.hidden is None else dense.hidden,
        value_bytes=dtype.itemsize,
        history=solver.history,
        tf32=+solver.tf32,
        samples=b,
        slots=solver.slots,
        multiprocessors=solver.blocks,
        shared_limit=solver.limit,
    )
    return dict(zip(names, values.tolist(), strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("history", [1, 3])
def test_every_activation_after_either_layer(activation, history):
    machine = machine_of("sanitized")
    solver = Solver(history)
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
    Solver(3, slots=0, blocks=3).check(machine, Dense(12).fill(b, dtype))


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
    base = Solver(history, slots=39, blocks=1, max_iterations=12)

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
    solver = Solver(history, slots=3, max_iterations=30, ridge=1e-3)
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
        assert (some.counters[skip] == torch.tensor([1 + Status.CONVERGED, 0, 0, 0, 0])).all()
        for i in set(range(b)) - set(skip):
            assert torch.equal(some.of(i), all_of_them.of(i))
        assert some.tally[2] == some.counters[:, ITERATIONS].max()


def test_the_floor_ends_samples_early(machine, dtype):
    done = Solver(floor=1e6, rtol=1e-3).check(machine, Dense(20).fill(4, dtype))
    assert done.tally.tolist() == [0, 0, 1]


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
