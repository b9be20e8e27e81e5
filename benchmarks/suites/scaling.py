"""scaling: time against B, N, the spread of difficulty, and the number of iterations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..clock import interleave
from ..methods import COMPACTED, PEERS, Method, NotForThis
from ..problems import Problem, Rule
from ..records import Row
from .cell import TINY, Cell, Options, contest, head, stopped

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
    if options.tiny:
        few = [(b, (b, TINY[1]), {}) for b in (32, 64)]
        return {"batch": few, "spread": [(0.9, TINY, {"slowest": 0.9})]}
    batches = [(b, (b, 1024), {}) for b in CUDA_BATCHES] if options.is_cuda else []
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
    for count in options.either(COUNTS, COUNTS[:2]):
        problem = options.make("easy", *options.either((256, 128), TINY), instances=1)
        problem = replace(problem, rule=Rule(0.0, 0.0, 0.0, max_iterations=count))
        methods = {m.name: m for m in chosen(options) if not m.reason(problem)}
        stops: dict[str, Row] = {}
        calls: dict[str, Callable[[int], Any]] = {}
        for name, method in methods.items():
            try:
                calls[name] = to_its_end(method, problem, count)
            except Exception as error:
                stops[name] = stopped(method, error)
        measured = interleave(
            calls,
            device=options.device,
            budget=options.budget / 4,
            rounds=options.turns(*options.rounds),
            label=f"{count} iterations",
        )
        for name, method in methods.items():
            row = head("scaling", problem, method, backward=False)
            row |= {"axis": "iterations", "value": count}
            rows.append(row | (measured[name].row() if name in measured else stops[name]))
    return rows


def to_its_end(method: Method, problem: Problem, count: int) -> Callable[[int], Any]:
    """A method's forward that makes all the iterations, but for a few of a sample at its end.

    There an iterate may be its own image to the bit.
    """
    runner = method.build(problem)
    runner.forward(0)
    if method.family == "ours":
        _, mean = runner.count()
        if not mean >= 0.98 * count:
            raise NotForThis(f"ends by itself after {mean:.1f} of {count} iterations")
    return runner.forward
