"""memory: peak bytes against iterations, and against what the library says that it holds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..methods import COMPACTED, HISTORY, PEERS, Method
from ..problems import Instance, Problem, Rule
from ..records import Row
from .cell import Cell, Options, head, mode, stopped

ITERATIONS = (8, 16, 32, 64, 128)
SIZES = ((256, 128), (1024, 256))
# States that the library may hold at once, its results and g's value among them.
THE_CALLERS = 4  # with a backward: x̂, loss·x̂, its gradient, dL/du
LIMITS = {"Picard": 6, "Anderson": 2 * HISTORY + 6}


def cells(options: Options) -> Iterator[Cell]:
    for size in options.sizes_or(SIZES)[: 1 if options.quick else None]:
        for backward in (False, True):
            yield Cell(
                f"memory/easy-{size[0]}x{size[1]}-{options.dtype}-{mode(backward)}",
                functools.partial(against_iterations, options, size, backward),
            )
        name = f"memory/states-{size[0]}x{size[1]}-{options.dtype}"
        yield Cell(name, functools.partial(states, options, size))


def against_iterations(options: Options, size: tuple[int, int], backward: bool) -> list[Row]:
    """Solves made to take so many iterations, whatever the residual."""
    problem = options.make("easy", *size, instances=1)
    rows: list[Row] = []
    for method in options.methods("ours", "plain", "replaced", *PEERS):
        if method.reason(problem) or method.slow:
            continue
        if method.family == "plain" and method.name not in (COMPACTED, "plain Anderson"):
            continue
        if method.name in ("compat layer", "old layer, pure Python"):
            continue  # their conditions cannot be told to never stop
        few = options.quick or options.tiny
        for count in ITERATIONS[:: len(ITERATIONS) - 1 if few else 1]:
            never = Rule(0.0, 0.0, 0.0, max_iterations=count)
            row = measured(method, replace(problem, rule=never), backward=backward)
            rows.append(row)
            if "peak_bytes" not in row:
                break
    return rows


def states(options: Options, size: tuple[int, int]) -> list[Row]:
    """What the library alone holds, in states: g is one operation that makes its value."""
    batch, n = size
    kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    x0, u, loss = torch.zeros(batch, n, **kind), *torch.randn(2, batch, n, **kind)
    instance = Instance(x0, u, torch.ones(batch, 1, **kind), (torch.tensor(0.5, **kind),), loss)
    problem = Problem("half", half, batch, n, (instance,), Rule(0.0, 0.0, 0.0, 20))
    rows = []
    for method in options.methods("ours"):
        for backward in (False, True) if method.name in LIMITS else ():
            row = measured(method, problem, backward=backward)
            most = LIMITS[method.name] + (THE_CALLERS if backward else 0)
            rows.append(row | {"limit": most * row["state_bytes"]})
    return rows


def measured(method: Method, problem: Problem, *, backward: bool) -> Row:
    row = head("memory", problem, method, backward=backward)
    row |= {
        "iterations": problem.rule.max_iterations,
        "state_bytes": problem.instances[0].x0.nbytes,
    }
    try:
        runner = method.build(problem)
        runner.call(backward=backward)(0)
        return row | {"peak_bytes": runner.peak_bytes(backward=backward)}
    except Exception as error:
        return row | stopped(method, error)


def half(x: Tensor, u: Tensor, s: Tensor, weight: Tensor) -> Tensor:
    return torch.addcmul(u, x, weight)
