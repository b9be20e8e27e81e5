"""scale: neither the state's nor the loss's scale may matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

import fpi_cuda

from ..judge import relative_error
from ..methods import SOLVERS, gradients, ours
from ..problems import Instance, Problem
from ..records import Row
from .cell import TINY, Cell, Options

SCALES = (1e-3, 1.0, 1e3)
LOSS_SCALE = 1e-5


def cells(options: Options) -> Iterator[Cell]:
    yield Cell("scale", lambda: scale_rows(options))


def scale_rows(options: Options) -> list[Row]:
    rows = []
    problem = options.make("hard", *options.either((256, 128), TINY), instances=1)
    (instance,) = problem.instances
    for name, solver in SOLVERS.items():
        head = {"suite": "scale", "method": name}
        for atol in (0.0, problem.rule.atol):
            counts = {c: iterations_at_scale(problem, solver, c, atol) for c in SCALES}
            for c in SCALES:
                row = {
                    "what": "state",
                    "scale": c,
                    "atol": atol * c,
                    "iterations_max": int(counts[c].max()),
                    "iterations_mean": float(counts[c].double().mean()),
                    "difference": int((counts[c] - counts[1.0]).abs().max()),
                }
                rows.append(head | row)
        run = ours.opaque(solver, options.backend)(problem.rule)
        _, *true = gradients(run, problem.g, instance)
        small = replace(instance, loss=instance.loss * LOSS_SCALE)
        _, *scaled = gradients(run, problem.g, small)
        errors = (
            relative_error(a.double() / LOSS_SCALE, b.double())
            for a, b in zip(scaled, true, strict=True)
        )
        row = {"what": "loss", "scale": LOSS_SCALE, "difference": max(errors)}
        rows.append(head | row)
    return rows


def iterations_at_scale(problem: Problem, solver: Any, c: float, atol: float) -> torch.Tensor:
    """[B]: iterations of the same map in the variable c·x."""
    i: Instance = problem.instances[0]

    def scaled(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return c * problem.g(x / c, *rest)

    with torch.no_grad():
        solution = fpi_cuda.fixed_point(
            scaled,
            i.x0,
            i.u,
            i.s,
            params=i.weights,
            solver=solver,
            tolerance=fpi_cuda.Tolerance(problem.rule.rtol, atol * c),
            on_failure="return",
        )
    return solution.iterations
