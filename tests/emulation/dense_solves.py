"""Steps of dense layers and their solves by the emulated CUDA bodies."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import pytest
import torch
from machine import FORWARD, RANDOM, REVERSE, Machine, limits_of
from torch import Tensor

from fpi_cuda.backends import reference
from fpi_cuda.record import GAIN, STATUS, TRAIL, Limits, Progress, accumulate_dtype
from fpi_cuda.solution import Status

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
    output_scaled: bool = False
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
            t["hidden_u"] = u(h)
            t["hidden_scale"] = torch.rand(b, h) if self.hidden_scaled else None
        t["output_scale"] = torch.rand(b, n) if self.output_scaled else None
        made = {name: a.to(dtype) for name, a in t.items() if a is not None}
        return dataclasses.replace(self, tensors=made)

    def g(self, x: Tensor) -> Tensor:
        """In float64."""
        t = {name: a.double() for name, a in self.tensors.items()}
        x = x * t["scale"] if self.scaled else x
        value = x
        if self.hidden is not None:
            value, u = value @ t["hidden_weight"].mT, t.get("hidden_u", 0.0)
            if self.hidden_scaled:
                value = value * t["hidden_scale"] + u
            else:
                value = ACTIVATIONS[self.hidden_activation](value + u)
        value, u = value @ t["weight"].mT + self.residual * x, t.get("u", 0.0)
        if self.output_scaled:
            return value * t["output_scale"] + u
        return ACTIVATIONS[self.activation](value + u)


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
    every: int = 1
    rtol: float | None = None
    max_iterations: int = 100
    floor: float | None = None
    own: list[tuple[float, float, int]] | None = None  # rtol, offset, max_iterations of each
    tf32: bool = False
    slots: int = 4
    blocks: int = 2
    limit: int = SHARED

    def progress(self, x: Tensor, dtype: torch.dtype) -> Progress:
        """The record of a solve from x whose limits are those for states of this dtype."""
        rtol = RTOL[dtype] if self.rtol is None else self.rtol
        limits = Limits(rtol, 0.1 * rtol, 0.0, 10**6, self.max_iterations)
        wide = accumulate_dtype(x.dtype)
        if self.own is not None:
            rows = [(rtol, offset, 10**6, most, 0.0) for rtol, offset, most in self.own]
            limits = dataclasses.replace(limits, own=torch.tensor(rows, dtype=wide))
        floor = None if self.floor is None else torch.full((len(x),), self.floor, dtype=wide)
        return Progress(x, limits, floor)

    def __call__(self, machine: Machine, dense: Dense, skip: list[int] | None = None) -> Solved:
        x0 = dense.tensors["x0"]
        b, n = x0.shape
        p = self.progress(x0, x0.dtype)
        out = torch.full_like(x0, math.nan)
        p.tally[0] = 77
        p.counters[skip or [], STATUS] = 1 + Status.CONVERGED
        arrays = {
            **{name: t.contiguous().clone() for name, t in dense.tensors.items()},
            **{"out": out, "counters": p.counters, "scalars": p.scalars, "tally": p.tally},
            "bounds": p.bounds,
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
            **{name: getattr(self, name) for name in ("beta", "ridge", "restart", "every")},
            "tf32": self.tf32,
            "slots": self.slots,
            "multiprocessors": self.blocks,
            "shared_limit": self.limit,
            **limits_of(p),
        }
        dtype = str(x0.dtype).removeprefix("torch.")
        machine.call(f"dense_solve.{dtype}", arrays, **{k: +v for k, v in numbers.items()})
        return Solved(out, p.counters, p.scalars, p.tally)

    def reference(self, dense: Dense) -> Solved:
        """In float64, from the same numbers. Samples that have ended are left alone."""
        x = dense.tensors["x0"].double().clone()
        b, n = x.shape
        p = self.progress(x, dense.tensors["x0"].dtype)
        p.out.fill_(math.nan)
        m = self.history
        window = [torch.zeros(b, *shape).double() for shape in ((m, n), (m, n), (m, m))]
        trail = torch.full((b, TRAIL, n), math.nan, dtype=torch.float64)
        while (p.counters[:, STATUS] == 0).any():
            gx = dense.g(x)
            if m == 1:
                reference.picard_step(p, x, gx, self.beta, trail)
            else:
                given = self.beta, self.ridge, self.restart, *window, self.every
                reference.anderson_step(p, x, gx, *given)
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
            for columns, rtol in ((slice(GAIN), 1e-6), (slice(GAIN, None), 1e-4)):
                torch.testing.assert_close(
                    mine.scalars[:, columns],
                    oracle.scalars[:, columns],
                    rtol=rtol,
                    atol=1e-13,
                    equal_nan=True,
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


@pytest.fixture(params=RUNS, ids=run_id, name="run")
def run_fixture(request):
    build, order, dtype = request.param
    return machine_of(build, order), dtype


@pytest.fixture(name="machine")
def machine_fixture(run):
    return run[0]


@pytest.fixture(name="dtype")
def dtype_fixture(run):
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
