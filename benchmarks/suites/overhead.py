"""What an iteration costs outside g; on a device also the host's waits and the bare graph."""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fpi_cuda.backends import native
from fpi_cuda.record import Limits, Progress

from .. import problems
from ..clock import interleave, timed
from ..methods import HISTORY, SOLVERS, absent, ours, plain
from ..methods.runner import Counting, Solve
from ..problems import Rule
from ..records import Row
from .cell import Cell, Options

FIXED = 20  # evaluations; at s = 0.99 no sample is done by then, so that none is left out


def overhead(options: Options) -> Iterator[Cell]:
    for batch, size in options.sizes_or(problems.SIZES):
        name = f"overhead/{batch}x{size}-{options.dtype}"
        yield Cell(name, functools.partial(outside_g, options, batch, size))


def outside_g(options: Options, batch: int, size: int) -> list[Row]:
    """Seconds outside g an evaluation, at the same number of evaluations whatever the residual."""
    problem = options.make("hard", batch, size)
    instances = [replace(i, s=torch.full_like(i.s, 0.99)) for i in problem.instances]
    g = Counting(problem.g, options.device)

    def clock(call: Callable[[], Any], device: str) -> float:
        g.reset()
        total = timed(call, device)
        if g.calls != FIXED:
            raise RuntimeError(f"overhead: a method made {g.calls} evaluations, not {FIXED}")
        return (total - g.seconds) / g.calls

    def call(run: Solve) -> Callable[[int], Any]:
        return lambda i: run(g, *instances[i % len(instances)].arguments)

    with torch.no_grad():
        measured = interleave(
            {name: call(run) for name, run in fixed_count(options, FIXED).items()},
            device=options.device,
            budget=options.budget,
            rounds=options.turns(*options.rounds),
            label=f"{batch}x{size}",
            clock=clock,
        )
    head = {"suite": "overhead", "batch": batch, "size": size, "dtype": options.dtype}
    return [
        head | {"method": name, "history": HISTORY, "evaluations": FIXED} | times.row()
        for name, times in measured.items()
    ]


def fixed_count(
    options: Options, count: int, drivers: tuple[str, ...] = ()
) -> dict[str, Callable[..., Any]]:
    """Methods by so many evaluations. With drivers: ours by each, returning the solution."""
    never = Rule(rtol=0.0, atol=0.0, max_iterations=count)
    runs: dict[str, Callable[..., Any]] = {}
    for name, solver in SOLVERS.items():
        for driver in drivers:
            build = ours.solution(solver, options.backend, driver=driver)
            runs[f"ours {name}, {driver}"] = build(never)
        if not drivers:
            runs[f"ours {name}"] = ours.opaque(solver, options.backend)(never)
    if not drivers:
        runs["plain loop"] = plain.plain(plain.picard)(never)
        runs["plain Anderson"] = plain.plain(plain.anderson)(never)
    if absent("torchdeq") is None:
        from ..methods.torchdeq import torchdeq

        runs["torchdeq fixed point"] = torchdeq("fixed_point_iter")(never)
        runs["torchdeq Anderson"] = torchdeq("anderson", m=HISTORY)(never)
    allowed = options.families
    return {n: run for n, run in runs.items() if not allowed or n.split()[0] in allowed}


# --- on a device ------------------------------------------------------------------------------

FEW, MANY = 20, 120  # iterations
SPREAD = 0.99  # of g's factors over a row: slow enough that no residual becomes zero by then


def loop(options: Options) -> Iterator[Cell]:
    """Seconds an iteration with a g of one small kernel, by the slope over fixed counts.

    Beside the drivers: torchdeq; g and the step as nodes of a plain graph, which is what the device
    itself needs; and a WHILE body of one tiny kernel. Syncs are counted in a whole solve.
    """
    if options.is_cuda:
        for batch, size in options.sizes_or(problems.SIZES):
            yield Cell(f"loop/{batch}x{size}", functools.partial(loop_at, options, batch, size))


def damp(x: torch.Tensor, u: torch.Tensor, s: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """One kernel. No two values of a row are damped alike: Anderson needs many iterations too."""
    return torch.addcmul(u, x, c)


def damped(batch: int, size: int, device: str) -> tuple[torch.Tensor, ...]:
    """x₀ and the rest of damp's arguments."""
    c = torch.linspace(-SPREAD, SPREAD, size, device=device)
    x0, u = torch.zeros(batch, size, device=device), torch.randn(batch, size, device=device)
    return x0, u, torch.zeros(batch, 1, device=device), c


def check_count(
    run: Callable[..., Any], tensors: tuple[torch.Tensor, ...], count: int, name: str
) -> None:
    """Every sample must go through all iterations, or a slope over them says nothing."""
    if name.startswith("ours"):
        iterations = run(damp, *tensors).iterations
        found = sorted({int(iterations.min()), int(iterations.max())})
    else:
        g = Counting(damp, str(tensors[0].device))
        for _ in range(2):  # the first call of all may look at g more often
            g.reset()
            run(g, *tensors)
        found = [g.calls]
    if found != [count]:
        raise RuntimeError(f"loop: {name} made {found} iterations, not {count}")


def loop_at(options: Options, batch: int, size: int) -> list[Row]:
    device, tensors = options.device, damped(batch, size, options.device)
    calls: dict[str, Callable[[int], Any]] = {}
    head = {"suite": "loop", "batch": batch, "size": size}
    rows = []
    with torch.no_grad():
        for count in (FEW, MANY):
            for name, run in fixed_count(options, count, ("eager", "graph")).items():
                for _ in range(3):  # a graph is made by then
                    check_count(run, tensors, count, name)
                calls[f"{name} {count}"] = lambda _, run=run: run(damp, *tensors)  # type: ignore[misc]
        names = [name.removesuffix(f" {FEW}") for name in calls if name.endswith(f" {FEW}")]
        syncs = {name: count_syncs(calls[f"{name} {MANY}"]) for name in names}
        measured = interleave(
            calls,
            device=device,
            budget=options.budget,
            rounds=options.turns(*options.rounds),
            label=f"loop {batch}x{size}",
        )
        for name in names:
            few, many = (measured[f"{name} {k}"].median for k in (FEW, MANY))
            row = {"method": name.removeprefix("ours "), "iterations": MANY, "syncs": syncs[name]}
            row |= {"seconds_an_iteration": (many - few) / (MANY - FEW), "solve_s": many}
            rows.append(head | row)
        for name, seconds in bare(*tensors).items():
            rows.append(head | {"method": name, "seconds_an_iteration": seconds})
    return rows


def count_syncs(run: Callable[[int], Any]) -> int:
    """Waits of the host for the device during one call that torch knows of."""
    run(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen)


class Bare:
    """g and a solver's step on a record of their own, without a driver around them."""

    def __init__(self, solver: Any, x0: torch.Tensor, *rest: torch.Tensor) -> None:
        self.x0, self.x, self.rest = x0, x0.clone(), rest
        self.progress = Progress(self.x, Limits(0.0, 0.0, 0.0, 2**30, 2**30))
        self.step = solver.start(native, self.progress, self.x)

    def __call__(self) -> None:
        self.step(self.x, damp(self.x, *self.rest))

    def restart(self) -> None:
        """From x₀ with all samples active: later in a solve there may be nothing left to do."""
        self.x.copy_(self.x0)
        for t in (self.progress.counters, self.progress.scalars, self.progress.tally):
            t.zero_()

    def check(self, count: int) -> None:
        """Raise unless every row went through so many iterations since the restart, and goes on."""
        active, failed, done = self.progress.tally.tolist()
        if (active, failed, done) != (len(self.x), 0, count):
            raise RuntimeError(
                f"loop: all {len(self.x)} rows must be active after {count} bare iterations "
                f"(got {active} active, {failed} failed, {done} iterations)"
            )


def bare(*tensors: torch.Tensor) -> dict[str, float]:
    """Seconds an iteration of g and the steps as nodes of a graph, and of a WHILE body alone."""
    from fpi_cuda import _build

    device, found = tensors[0].device, {}
    for solver in SOLVERS.values():
        iterate = Bare(solver, *tensors)
        graph = torch.cuda.CUDAGraph()
        iterate()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(MANY):
                iterate()
        seconds = []
        for _ in range(12):
            iterate.restart()
            seconds.append(timed(graph.replay, str(device)))
            iterate.check(MANY)
        found[f"{type(solver).__name__}, nodes of a graph"] = statistics.median(seconds[2:]) / MANY

    tally = torch.tensor([1, 0, 0], dtype=torch.int32, device=device)
    before, body = (torch.cuda.CUDAGraph(keep_graph=True) for _ in range(2))
    count = tally[2:]
    count.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(before):
        count.zero_()
    with torch.cuda.graph(body):
        count.add_(1)
    many = 100 * MANY
    loop = _build.cuda.WhileGraph(
        before.raw_cuda_graph(), body.raw_cuda_graph(), 0, tally.data_ptr(), many
    )
    stream = torch.cuda.current_stream(device).cuda_stream
    seconds = [timed(lambda: loop.launch(stream), str(device)) for _ in range(12)][2:]
    if int(tally[2]) != many:
        raise RuntimeError(f"loop: the WHILE node made {int(tally[2])} iterations, not {many}")
    found["WHILE body of one tiny kernel"] = statistics.median(seconds) / many
    return found
