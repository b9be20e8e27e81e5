"""failing: half of a batch makes the map expand; who says so, and who solves the other half."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

import fpi_cuda

from ..clock import timed
from ..judge import relative_error, sample_residuals
from ..methods import PEERS, SOLVERS
from ..methods.ours import options_for
from ..problems import Problem
from ..records import Row
from .cell import TINY, Cell, Options, brief, head, stopped


def cells(options: Options) -> Iterator[Cell]:
    batch, size = options.either((256, 128), TINY)
    name = f"failing/expanding-{batch}x{size}-{options.dtype}"
    yield Cell(name, lambda: failing_rows(options))


def failing_rows(options: Options) -> list[Row]:
    problem = options.make("expanding", *options.either((256, 128), TINY), instances=1)
    rows: list[Row] = []
    for method in options.methods("ours", "plain", "replaced", *PEERS):
        if method.reason(problem) or method.slow:
            continue
        row = head("failing", problem, method, backward=False) | {"refused": None}
        rows.append(row)
        try:
            runner = method.build(problem)
            evaluations, mean = runner.count()
            row |= {"evaluations": evaluations, "iterations_mean": mean}
            row["once_s"] = timed(lambda call=runner.forward: call(0), options.device)
            row |= outcome(problem, runner.tensors(runner.forward(0)))
        except Exception as error:  # whatever a rival does about it is what is reported
            row["raised"] = brief(error)
            if method.family == "ours":
                row |= stopped(method, error)
    for row in rows:
        if row["method"] in SOLVERS and "crashed" not in row:
            row.update(what_we_say(problem, options, row["method"]))
    return rows


def outcome(problem: Problem, x: torch.Tensor) -> Row:
    """How many of the samples on which the map contracts were solved."""
    solved, easy = met(problem, x), (problem.instances[0].s < 1).squeeze(1)
    return {
        "solvable": int(easy.sum()),
        "solved": int((solved & easy).sum()),
        "finite": int(x.isfinite().all(dim=1).sum()),
    }


def met(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    """[B]: whose true residual is within two tolerances."""
    rule = problem.rule
    r, size = sample_residuals(problem, problem.instances[0], x)
    return r <= 2 * (rule.atol * math.sqrt(problem.size) + rule.rtol * size)


def what_we_say(problem: Problem, options: Options, name: str) -> Row:
    """Statuses and masked gradients against the truth; `refused` where one of them is wrong."""
    i, solver = problem.instances[0], SOLVERS[name]
    u = i.u.clone().requires_grad_()
    kept = options_for(solver, problem.rule, options.backend)
    solution = fpi_cuda.fixed_point(problem.g, i.x0, u, i.s, params=i.weights, **kept)
    (du,) = torch.autograd.grad((solution.x * i.loss).sum(), u)
    easy = (i.s < 1).squeeze(1)
    raised = "nothing"
    try:
        loud = kept | {"on_failure": "raise"}
        fpi_cuda.fixed_point(problem.g, i.x0, i.u, i.s, params=i.weights, **loud)
    except fpi_cuda.FixedPointError as error:
        raised = str(error).splitlines()[0][:160]
    wrong = []
    if bool((solution.converged & ~met(problem, solution.x)).any()):
        wrong.append("a sample is called converged that is not")
    if not bool(solution.converged[easy].all()):
        wrong.append("failing batch-mates keep a sample from converging")
    lost = (solution.status == fpi_cuda.Status.DIVERGED) | (
        solution.status == fpi_cuda.Status.NONFINITE
    )
    if bool(du[lost].any()):
        wrong.append("a diverged sample's gradient is not masked")
    (alone,) = alone_gradient(problem, kept, easy)
    # Not to the bit: a product's rounding may change with the batch.
    if not relative_error(alone, du[easy].double()) <= 4 * problem.rule.adjoint_rtol:
        wrong.append("failing batch-mates change a gradient")
    if not bool(solution.x.isfinite().all()):
        wrong.append("a returned state is not finite")
    if raised == "nothing":
        wrong.append("on_failure='raise' did not raise")
    names = {s.name: int((solution.status == s).sum()) for s in fpi_cuda.Status}
    return {
        "statuses": {name: count for name, count in names.items() if count},
        "on_raise": raised,
        "refused": "; ".join(wrong) or None,
    }


def alone_gradient(problem: Problem, kept: Row, easy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    i = problem.instances[0]
    u = i.u[easy].clone().requires_grad_()
    solution = fpi_cuda.fixed_point(problem.g, i.x0[easy], u, i.s[easy], params=i.weights, **kept)
    return torch.autograd.grad((solution.x * i.loss[easy]).sum(), u)
