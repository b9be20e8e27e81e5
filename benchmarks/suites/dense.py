"""Dense steps solved whole: the part that products take of a plain loop, and refill."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import fpi_cuda
from fpi_cuda.backends.progress import Limits
from fpi_cuda.drivers import whole
from fpi_cuda.forms import DenseForm

from .. import problems
from ..clock import interleave
from ..methods import ours, plain
from ..problems import Problem, Rule
from ..records import Row
from .cell import Cell, Options, Size, contest, mode


def cells(options: Options) -> Iterator[Cell]:
    for kind in ("easy", "energy"):
        for batch, size in problems.BIBTEX:
            for backward in (False, True):
                yield Cell(
                    f"dense/{kind}-{batch}x{size}-{options.dtype}-{mode(backward)}",
                    functools.partial(bibtex, options, kind, (batch, size), backward),
                )
    for size in (*(options.sizes or problems.SIZES), *problems.BIBTEX):
        name = f"dense/products-{size[0]}x{size[1]}"
        yield Cell(name, functools.partial(products, options, *size))
    yield Cell("dense/refill", functools.partial(refill, options))


def bibtex(options: Options, kind: str, size: Size, backward: bool) -> list[Row]:
    """The shape of that data set's labels; its words are z where --data has them."""
    methods = options.methods("ours", "plain")
    return contest("dense", options.make(kind, *size), methods, options, backward=backward)


FEW_PASSES, MANY_PASSES = 2, 10  # later an iterate may be its own image to the bit, and end


def products(options: Options, batch: int, size: int) -> list[Row]:
    """An iteration of the easy problem: a plain loop's, the product in it, and a whole solve's.

    The last is the slope over two fixed numbers of iterations.
    """
    problem = options.make("easy", batch, size, instances=2)
    kind = {"device": options.device, "dtype": problem.dtype}
    x, out = torch.randn(2, batch, size, **kind)
    offset = problem.rule.atol * size**0.5

    def product(i: int) -> None:
        torch.mm(x, problem.instances[i % 2].weights[0].T, out=out)

    def step(i: int) -> None:
        _, *rest = problem.instances[i % 2].arguments
        y = problem.g(x, *rest)
        bool(plain.finished(y - x, y, problem.rule.rtol, offset, None).all())

    calls = {"product": product, "plain loop's iteration": step}
    with torch.no_grad():
        measured = interleave(
            calls | {"few": passes(problem, FEW_PASSES), "many": passes(problem, MANY_PASSES)},
            device=options.device,
            budget=options.budget / 2,
            rounds=(21, 101),
            label=f"product {batch}x{size}",
        )
    weight = problem.instances[0].weights[0]
    moved = {
        "flops": 2 * batch * size * size,
        "bytes": (2 * batch * size + size * size) * weight.element_size(),
    }
    head = {"suite": "products", "batch": batch, "size": size, "dtype": options.dtype}
    rows = [head | {"method": name} | moved | measured[name].row() for name in calls]
    a_pass = (measured["many"].median - measured["few"].median) / (MANY_PASSES - FEW_PASSES)
    rows.append(head | {"method": "whole solve's iteration", "median_s": a_pass} | moved)
    return rows


def passes(problem: Problem, count: int) -> Callable[[int], Any]:
    """A whole solve of so many iterations."""
    fixed = replace(problem, rule=Rule(0.0, 0.0, max_iterations=count))
    return ours.Whole(fixed, fpi_cuda.Picard()).forward


REFILL_SIZE, FEWEST, MOST = 128, 3, 300  # values a sample; iterations of the fastest, the slowest


def refill(options: Options) -> list[Row]:
    """Samples of 3 to 300 iterations in one batch, beside batches whose samples all take as long.

    x ← s Q x + u with Q orthogonal: the residual falls by s in every iteration exactly, so each
    sample's number of iterations is known.
    """
    if options.device.startswith("cuda"):
        return [{"suite": "refill", "skipped": "resident slots of a device are not known here"}]
    slots = 24  # a thread's: csrc/cpu/dense_solve.cpp
    resident = slots * torch.get_num_threads()
    batch, n, rtol = 16 * resident, REFILL_SIZE, 1e-4
    v = torch.nn.functional.normalize(torch.randn(n), dim=0)
    weight = 2 * torch.outer(v, v) - torch.eye(n)
    counts = torch.linspace(FEWEST, MOST, batch)[torch.randperm(batch)]
    # ‖r‖ is s^(k − 1) ‖u‖ in iteration k, and x̂ about as long as u.
    spread = (rtol ** (1 / (counts - 1)))[:, None]
    slowest = torch.full_like(spread, float(spread.max()))
    u = torch.randn(batch, n)

    def run(rows: int, gain: Any) -> Callable[[int], Any]:
        form = DenseForm(weight, u[:rows], gain=gain[:rows])
        x0 = torch.zeros(rows, n)
        limits = Limits(rtol, 0.0, 0.0, 10**6, 4 * MOST)
        return lambda _: whole.solve(form, x0, fpi_cuda.Picard(), limits, slots=slots)

    calls = {
        "mixed": run(batch, spread),
        "all slowest": run(batch, slowest),
        "one tile": run(resident, slowest),
    }
    measured = interleave(calls, budget=options.budget, rounds=(11, 51), label="refill")
    totals = {name: call(0)[1].iterations for name, call in calls.items()}
    return [
        {
            "suite": "refill",
            "method": name,
            "batch": len(totals[name]),
            "size": n,
            "resident": resident,
            "iterations_sum": int(totals[name].sum()),
            "iterations_min": int(totals[name].min()),
            "iterations_max": int(totals[name].max()),
            **times.row(),
        }
        for name, times in measured.items()
    ]
