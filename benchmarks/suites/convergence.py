"""convergence: the residual after each evaluation of g, and time against the residual reached."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..methods import Method, Solver
from ..problems import Problem, at
from ..records import Row
from .cell import TINY, Cell, Options, contest, head
from .scaling import chosen

PLACES = {"hard": (256, 128), "energy": at("energy"), "stiff": at("stiff")}
LONGEST = 1000  # evaluations that are kept
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def cells(options: Options) -> Iterator[Cell]:
    for kind in options.kinds or PLACES:
        size = (
            options.sizes[0]
            if options.sizes
            else options.either(PLACES.get(kind) or at(kind), TINY)
        )
        name = f"convergence/{kind}-{size[0]}x{size[1]}-{options.dtype}"
        yield Cell(name, functools.partial(history, options, kind, size))
        if kind == "stiff":  # its residual says little: the error is a thousand times that
            continue
        for rtol in options.either(TOLERANCES, TOLERANCES[:1]):
            yield Cell(
                f"{name}-{rtol:g}", functools.partial(work_precision, options, kind, size, rtol)
            )


class Recording:
    """g that keeps the worst relative residual of every batch it is given."""

    def __init__(self, problem: Problem) -> None:
        self.g, self.residuals = problem.g, list[float]()

    def __call__(self, x: Tensor, *rest: Tensor) -> Tensor:
        y = self.g(x, *rest)
        r = torch.linalg.vector_norm((y - x).double(), dim=1)
        self.residuals.append(float((r / torch.linalg.vector_norm(y.double(), dim=1)).max()))
        return y


def history(options: Options, kind: str, size: tuple[int, int]) -> list[Row]:
    """Of methods that call g; what a compacted one has left out met the tolerance."""
    problem = options.make(kind, *size, instances=1)
    rule = replace(problem.rule, max_iterations=min(LONGEST, problem.rule.max_iterations))
    problem = replace(problem, rule=rule)
    rows = []
    for method in chosen(options):
        if method.reason(problem) or not opaque(method):
            continue
        g = Recording(problem)
        runner = method.build(replace(problem, g=g))
        for _ in range(6):  # the first calls may look at g more often
            start = len(g.residuals)
            runner.forward(0)
        row = head("convergence", problem, method, backward=False)
        row |= {"curve": "history", "rtol": rule.rtol, "residuals": g.residuals[start:]}
        rows.append(row)
    return rows


def opaque(method: Method) -> bool:
    build = method.build
    return isinstance(build, functools.partial) and build.func is Solver


def work_precision(options: Options, kind: str, size: tuple[int, int], rtol: float) -> list[Row]:
    problem = options.make(kind, *size, instances=1)
    rule = replace(problem.rule, rtol=rtol, atol=0.0, adjoint_rtol=rtol, max_iterations=2000)
    short = replace(options, budget=options.budget / 4)
    methods = [method for method in chosen(options) if method.name != "unrolled"]
    return contest(
        "convergence",
        replace(problem, rule=rule),
        methods,
        short,
        backward=False,
        curve="work-precision",
        rtol=rtol,
    )
