"""Dense steps solved whole: the part that products take of a plain loop, and refill."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import fpi_cuda
from fpi_cuda.drivers import whole
from fpi_cuda.forms import DenseForm
from fpi_cuda.record import Limits

from .. import problems
from ..clock import interleave
from ..methods import NotForThis, ours, plain
from ..problems import Problem, Rule
from ..records import Row
from .cell import TINY, Cell, Options, Size, contest, mode


def cells(options: Options) -> Iterator[Cell]:
    for kind in ("easy", "energy"):
        for batch, size in options.either(problems.BIBTEX, (TINY,)):
            for backward in (False, True):
                yield Cell(
                    f"dense/{kind}-{batch}x{size}-{options.dtype}-{mode(backward)}",
                    functools.partial(bibtex, options, kind, (batch, size), backward),
                )
    sizes = (*options.sizes_or(problems.SIZES), *options.either(problems.BIBTEX, ()))
    for size in (*sizes, *(CUDA_SIZES if options.is_cuda and not options.tiny else ())):
        name = f"dense/products-{size[0]}x{size[1]}"
        yield Cell(name, functools.partial(products, options, *size))
    yield Cell("dense/refill", functools.partial(refill, options))


def bibtex(options: Options, kind: str, size: Size, backward: bool) -> list[Row]:
    """The shape of that data set's labels; its words are z where --data has them."""
    methods = options.methods("ours", "plain")
    return contest("dense", options.make(kind, *size), methods, options, backward=backward)


CUDA_SIZES: tuple[Size, ...] = ((2112, 256), (4096, 256))  # more than a wave, weights that fill it
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
    few, many = (passes(problem, count) for count in (FEW_PASSES, MANY_PASSES))
    weight = problem.instances[0].weights[0]
    moved = {
        "flops": 2 * batch * size * size,
        "bytes": (2 * batch * size + size * size) * weight.element_size(),
    }
    head = {"suite": "products", "batch": batch, "size": size, "dtype": options.dtype}
    last = head | {"method": "whole solve's iteration"} | moved
    solves: dict[str, Callable[[int], Any]] = {"few": few, "many": many}
    try:
        few(0)
    except NotForThis as reason:
        solves = {}
        last["skipped"] = str(reason)
    with torch.no_grad():
        measured = interleave(
            calls | solves,
            device=options.device,
            budget=options.budget / 2,
            rounds=options.turns(21, 101),
            label=f"product {batch}x{size}",
        )
    rows = [head | {"method": name} | moved | measured[name].row() for name in calls]
    if solves:
        spent = measured["many"].median - measured["few"].median
        last["median_s"] = spent / (MANY_PASSES - FEW_PASSES)
    return [*rows, last]


def passes(problem: Problem, count: int) -> Callable[[int], Any]:
    """A whole solve of so many iterations."""
    fixed = replace(problem, rule=Rule(0.0, 0.0, max_iterations=count))
    return ours.Whole(fixed, fpi_cuda.Picard()).forward


REFILL_SIZE, FEWEST, MOST = 128, 3, 300  # values a sample; iterations of the fastest, the slowest


@torch.no_grad()
def refill(options: Options) -> list[Row]:
    """Samples of 3 to 300 iterations in one batch, beside batches whose samples all take as long.

    x ← s Q x + u with Q orthogonal: the residual falls by s in every iteration exactly, so each
    sample's number of iterations is known.
    """
    n, rtol, most = REFILL_SIZE, 1e-4, options.either(MOST, 20)
    v = torch.nn.functional.normalize(torch.randn(n), dim=0)
    weight = (2 * torch.outer(v, v) - torch.eye(n)).to(options.device)
    slots = 0 if options.is_cuda else CPU_SLOTS

    def gain(counts: torch.Tensor) -> torch.Tensor:
        # ‖r‖ is s^(k − 1) ‖u‖ in iteration k, and x̂ about as long as u.
        return (rtol ** (1 / (counts - 1)))[:, None].to(options.device)

    def run(counts: torch.Tensor) -> Callable[[int], Any]:
        u = torch.randn(len(counts), n).to(options.device)
        form = DenseForm(weight, u, gain=gain(counts))
        x0 = torch.zeros_like(u)
        limits = Limits(rtol, 0.0, 0.0, 10**6, 4 * most)
        return lambda _: whole.solve(form, x0, fpi_cuda.Picard(), limits, slots=slots)

    def slowest(batch: int) -> torch.Tensor:
        return torch.full((batch,), float(most))

    resident = resident_slots(options, lambda batch: run(slowest(batch)))
    batch = 16 * resident
    mixed = torch.linspace(FEWEST, most, batch)[torch.randperm(batch)]
    calls = {
        "mixed": run(mixed),
        "all slowest": run(slowest(batch)),
        "one tile": run(slowest(resident)),
    }
    measured = interleave(
        calls,
        device=options.device,
        budget=options.budget,
        rounds=options.turns(11, 51),
        label="refill",
    )
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


CPU_SLOTS = 24  # a thread's: csrc/cpu/dense_solve.cpp
BLOCK_SLOTS = 64  # the most of a block: csrc/cuda/dense_plan.h
AS_FAST = 0.9  # of the best rate


def resident_slots(options: Options, solve: Callable[[int], Callable[[int], Any]]) -> int:
    """Samples that are iterated at a time.

    On a device the host does not know how many blocks a multiprocessor holds, so it is measured: of
    batches of 1, 2 and 4 blocks each, whose samples all take as long, the least that is done at
    the best rate. A larger one is done in several waves, or with blocks in each other's way.
    """
    if not options.is_cuda:
        return CPU_SLOTS * torch.get_num_threads()
    count = torch.cuda.get_device_properties(options.device).multi_processor_count
    waves = [blocks * options.either(BLOCK_SLOTS * count, 4) for blocks in (1, 2, 4)]
    measured = interleave(
        {str(batch): solve(batch) for batch in waves},
        device=options.device,
        budget=options.budget / 4,
        rounds=options.turns(5, 21),
        label="slots",
    )
    rates = {batch: batch / measured[str(batch)].median for batch in waves}
    return next(batch for batch in waves if rates[batch] >= AS_FAST * max(rates.values()))
