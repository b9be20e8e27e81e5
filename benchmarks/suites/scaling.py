"""scaling: time against B, N, the spread of difficulty, and the number of iterations."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..clock import interleave
from ..methods import COMPACTED, PEERS, Method
from ..problems import Rule
from ..records import Row
from .cell import Cell, Options, contest, head

NAMES = (
    "Picard",
    "Anderson",
    "Picard, whole",
    "Anderson, whole",
    COMPACTED,
    "plain Anderson, compacted",
    "unrolled",
    "torchdeq fixed point",
    "jaxopt fixed point",  # optimistix's default adjoint holds B Jacobians
)
BATCHES, SIZES = (16, 64, 256, 1024, 4096), (16, 32, 64, 128, 256, 512, 1024)
CUDA_BATCHES = (1, 16, 256, 4096, 65536)  # at N = 1024: B·N from 10³ to 10⁸ nearly
SLOWEST = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)  # the slowest sample's factor; the fastest's is 0.1
COUNTS = (10, 30, 100, 300)


def axes(options: Options) -> dict[str, list[tuple[float, tuple[int, int], dict[str, Any]]]]:
    cuda = options.device.startswith("cuda")
    batches = [(b, (b, 1024), {}) for b in CUDA_BATCHES] if cuda else []
    return {
        "batch": batches or [(b, (b, 128), {}) for b in BATCHES],
        "size": [(n, (256, n), {}) for n in SIZES],
        "spread": [(s, (256, 128), {"slowest": s}) for s in SLOWEST],
    }


def cells(options: Options) -> Iterator[Cell]:
    for axis, points in axes(options).items():
        for value, size, more in points:
            name = f"scaling/{axis}-{value:g}-{options.dtype}"
            yield Cell(name, functools.partial(point, options, axis, value, size, more))
    yield Cell("scaling/iterations", functools.partial(iterations, options))


def chosen(options: Options) -> list[Method]:
    """Ours, the loops that come nearest, and other libraries' fixed-point iterations."""
    found = options.methods("ours", "plain", "replaced", *PEERS)
    return [method for method in found if method.name in NAMES]


def point(
    options: Options, axis: str, value: float, size: tuple[int, int], more: dict[str, Any]
) -> list[Row]:
    problem = options.make("hard", *size, instances=2, **more)
    # Few values bend tanh less: the slowest sample then needs more than 200 iterations.
    problem = replace(problem, rule=replace(problem.rule, max_iterations=2000))
    short = replace(options, budget=options.budget / 4)
    return contest(
        "scaling", problem, chosen(options), short, backward=True, axis=axis, value=value
    )


def iterations(options: Options) -> list[Row]:
    """Solves made to take so many iterations: the slope is what one costs."""
    rows: list[Row] = []
    for count in COUNTS:
        problem = options.make("easy", 256, 128, instances=1)
        problem = replace(problem, rule=Rule(0.0, 0.0, 0.0, max_iterations=count))
        methods = {m.name: m for m in chosen(options) if not m.reason(problem)}
        measured = interleave(
            {name: method.build(problem).forward for name, method in methods.items()},
            device=options.device,
            budget=options.budget / 4,
            rounds=options.rounds,
            label=f"{count} iterations",
        )
        for name, times in measured.items():
            row = head("scaling", problem, methods[name], backward=False)
            rows.append(row | {"axis": "iterations", "value": count} | times.row())
    return rows
