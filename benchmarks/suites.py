"""The suites: each returns rows, plain dicts that go into the JSON and that the report reads."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

import fpi_cuda

from . import methods, problems
from .measure import (
    Counting,
    Exact,
    exact,
    gradients,
    interleave,
    judge,
    relative_error,
    synchronize,
)
from .methods import HISTORY, Method
from .problems import Instance, Problem, Rule

Row = dict[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class Options:
    device: str = "cpu"
    sizes: tuple[Size, ...] = problems.SIZES
    families: tuple[str, ...] = ()  # none: all
    budget: float = 3.0  # seconds of timed calls a variant
    rounds: tuple[int, int] = (5, 31)
    slow_start: bool = True  # torch.compile too


# --- solve: whole solves, forward and with the backward ---------------------------------------


def solve(options: Options, kinds: Sequence[str] = problems.KINDS) -> list[Row]:
    rows = []
    cells = [(kind, size) for kind in kinds for size in options.sizes]
    for kind, (batch, size) in tqdm(cells, desc="solve"):
        problem = problems.make(kind, batch, size, options.device)
        truth = tuple(exact(instance) for instance in problem.instances)
        for backward in (False, True):
            rows += solve_cell(problem, truth, options, backward=backward)
    return rows


def solve_cell(
    problem: Problem, truth: tuple[Exact, ...], options: Options, *, backward: bool
) -> list[Row]:
    rows, calls = [], {}
    for method in methods.all_methods():
        if options.families and method.family not in options.families:
            continue
        row: Row = {
            "suite": "solve",
            "problem": problem.kind,
            "batch": problem.batch,
            "size": problem.size,
            "mode": "forward+backward" if backward else "forward",
            "method": method.name,
            "family": method.family,
        }
        rows.append(row)
        reason = method.missing
        if method.slow_start and not options.slow_start:
            reason = "compiles for long; `solve` has it"
        if reason:
            row["skipped"] = reason
            continue
        run = method.build(problem.rule)
        row |= gate(run, problem, truth, backward=backward, device=options.device)
        if row["refused"] is None:
            calls[method.name] = timed_call(run, problem, backward=backward)
        if method.name == "plain loop, compacted" and not backward:
            problems.check_spread(problem, row["iterations_max"], row["iterations_mean"])
    label = f"{problem.name} {rows[0]['mode']}"
    measured = interleave(
        calls, device=options.device, budget=options.budget, rounds=options.rounds, label=label
    )
    for row in rows:
        if row["method"] in measured:
            row |= measured[row["method"]].row()
    return rows


def gate(
    run: methods.Solve,
    problem: Problem,
    truth: tuple[Exact, ...],
    *,
    backward: bool,
    device: str,
) -> Row:
    """Judge a method before it is timed; count the calls of g in its forward on the way."""
    first = problem.instances[0]
    g = Counting(problems.g, device)
    with torch.no_grad():
        run(g, *first.arguments)
        g.reset()  # the first call of all may look at g more often
        run(g, *first.arguments)
    forward, rows = g.calls, g.rows
    correct = judge(run, problems.g, problem, truth, backward=backward)
    return {
        "evaluations": forward,
        "iterations_max": forward,
        "iterations_mean": rows / problem.batch,
        "worst_residual": correct.residual,
        "residual_in_tolerances": correct.in_tolerances,
        "gradient_error": correct.gradient_error,
        "input_gradient_error": correct.input_gradient_error,
        "refused": correct.refusal(),
    }


def timed_call(
    run: methods.Solve, problem: Problem, *, backward: bool
) -> Callable[[int], Any]:
    instances = problem.instances

    def forward(i: int) -> None:
        with torch.no_grad():
            run(problems.g, *instances[i % len(instances)].arguments)

    def both(i: int) -> None:
        gradients(run, problems.g, instances[i % len(instances)])

    return both if backward else forward


SUITES = {"solve": solve}
