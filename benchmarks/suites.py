"""The suites: each returns rows, plain dicts that go into the JSON and that the report reads."""

from __future__ import annotations

import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import torch
from tqdm import tqdm

import fpi_cuda
from fpi_cuda.backends import native
from fpi_cuda.backends.progress import Limits, Progress
from fpi_cuda.drivers import whole
from fpi_cuda.forms import DenseForm

from . import convolutions, methods, problems
from .measure import (
    ROOT,
    Counting,
    Exact,
    Times,
    exact,
    gradients,
    interleave,
    judge,
    relative_error,
    timed,
)
from .methods import HISTORY
from .problems import Instance, Problem, Rule

Row = dict[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class Options:
    device: str = "cpu"
    sizes: tuple[Size, ...] = problems.SIZES
    kinds: tuple[str, ...] = problems.DENSE
    families: tuple[str, ...] = ()  # none: all
    budget: float = 3.0  # seconds of timed calls a variant
    rounds: tuple[int, int] = (5, 31)
    instances: int = problems.INSTANCES
    without: tuple[str, ...] = ()  # methods to leave out
    peers_at: tuple[Size, ...] = ()  # where `quick` runs torchdeq


# --- solve: whole solves, forward and with the backward ---------------------------------------


def solve(options: Options) -> list[Row]:
    rows = []
    cells = [(kind, size) for kind in options.kinds for size in options.sizes]
    for kind, (batch, size) in tqdm(cells, desc="solve"):
        problem = problems.make(kind, batch, size, options.device, options.instances)
        truth = tuple(exact(instance) for instance in problem.instances)
        counts: dict[str, Row] = {}
        for backward in (False, True):
            rows += solve_cell(problem, truth, options, counts, backward=backward)
    return rows


def solve_cell(
    problem: Problem,
    truth: tuple[Exact, ...],
    options: Options,
    counts: dict[str, Row],
    *,
    backward: bool,
) -> list[Row]:
    """The rows of one table. counts: of the forward, by method; filled where they are missing."""
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
        if method.name in methods.WHOLE and problem.kind in ("conv", "denoise"):
            reason = "no dense layers"
        if method.name in methods.CONVOLUTIONS and problem.kind != "denoise":
            reason = "no net of convolutions"
        if method.name in options.without:
            reason = "left out"
        if reason:
            row["skipped"] = reason
            continue
        run = method.build(problem.rule)
        if method.name not in counts:
            counts[method.name] = count(run, problem, options.device)
        row |= counts[method.name]
        correct = judge(run, problems.g, problem, truth, backward=backward)
        row |= {
            "worst_residual": correct.residual,
            "residual_in_tolerances": correct.in_tolerances,
            "gradient_error": correct.gradient_error,
            "input_gradient_error": correct.input_gradient_error,
            "refused": correct.refusal(),
        }
        if row["refused"] is None:
            calls[method.name] = timed_call(run, problem, backward=backward)
        if method.name == methods.COMPACTED:
            problems.check_spread(problem, row["evaluations"], row["iterations_mean"])
    label = f"{problem.name} {rows[0]['mode']}"
    measured = interleave(
        calls, device=options.device, budget=options.budget, rounds=options.rounds, label=label
    )
    for row in rows:
        if row["method"] in measured:
            row.update(measured[row["method"]].row())
    return rows


def count(run: methods.Solve, problem: Problem, device: str) -> Row:
    """Calls of g in a forward, and the rows in them over B: most and mean iterations."""
    g = Counting(problems.g, device)
    with torch.no_grad():
        for _ in range(2):  # the first call of all may look at g more often
            g.reset()
            run(g, *problem.instances[0].arguments)
    if isinstance(run, (methods.Whole, methods.Convolutions)):  # nobody calls g
        assert run.last is not None
        mean = float(run.last.iterations.double().mean())
        return {"evaluations": run.last.evaluations, "iterations_mean": mean}
    return {"evaluations": g.calls, "iterations_mean": g.rows / problem.batch}


def timed_call(run: methods.Solve, problem: Problem, *, backward: bool) -> Callable[[int], Any]:
    instances = problem.instances

    def forward(i: int) -> None:
        with torch.no_grad():
            run(problems.g, *instances[i % len(instances)].arguments)

    def both(i: int) -> None:
        gradients(run, problems.g, instances[i % len(instances)])

    return both if backward else forward


# --- dense: steps of dense layers that one kernel solves whole --------------------------------


def dense(options: Options) -> list[Row]:
    """Whole solves of the Bibtex shape, the part that products take of a plain loop, and refill."""
    bibtex = replace(options, sizes=problems.BIBTEX, kinds=("easy", "energy"))
    return solve(bibtex) + products(options) + refill(options)


def denoise(options: Options) -> list[Row]:
    """Whole solves of the denoising net, by those methods that have a chance: they are dear."""
    out = ("Picard", methods.PLAIN, methods.COMPILED, "plain Anderson")
    chosen = replace(
        options,
        sizes=problems.DENOISE,
        kinds=("denoise",),
        instances=1,
        rounds=(3, 9),
        without=(*options.without, *out),
    )
    return solve(chosen)


FEW_PASSES, MANY_PASSES = 2, 10  # later an iterate may be its own image to the bit, and end


def products(options: Options) -> list[Row]:
    """An iteration of the easy problem: a plain loop's, the product in it, and a whole solve's.

    The last is the slope over two fixed numbers of iterations.
    """
    rows = []
    for batch, size in (*options.sizes, *problems.BIBTEX):
        problem = problems.make("easy", batch, size, options.device, instances=2)
        x, out = torch.randn(2, batch, size, device=options.device)
        offset = problem.rule.atol * size**0.5

        def product(i: int, x: Any = x, out: Any = out, problem: Problem = problem) -> None:
            torch.mm(x, problem.instances[i % 2].weight.T, out=out)

        def step(i: int, x: Any = x, problem: Problem = problem, offset: float = offset) -> None:
            _, u, s, weight = problem.instances[i % 2].arguments
            y = problems.g(x, u, s, weight)
            bool(methods.finished(y - x, y, problem.rule.rtol, offset, None).all())

        def whole(count: int, problem: Problem = problem) -> Callable[[int], Any]:
            run = methods.Whole(fpi_cuda.Picard(), Rule(0.0, 0.0, max_iterations=count))
            return lambda i: run(problems.g, *problem.instances[i % 2].arguments)

        with torch.no_grad():
            calls = {"product": product, "plain loop's iteration": step}
            measured = interleave(
                calls | {"few": whole(FEW_PASSES), "many": whole(MANY_PASSES)},
                device=options.device,
                budget=options.budget / 2,
                rounds=(21, 101),
                label=f"product {batch}x{size}",
            )
        head = {"suite": "products", "batch": batch, "size": size}
        rows += [head | {"method": name} | measured[name].row() for name in calls]
        passes = (measured["many"].median - measured["few"].median) / (MANY_PASSES - FEW_PASSES)
        rows.append(head | {"method": "whole solve's iteration", "median_s": passes})
    return rows


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


# --- overhead: what an iteration costs outside g ----------------------------------------------

FIXED = 20  # evaluations; at s = 0.99 no sample is done by then, so that none is left out


def overhead(options: Options) -> list[Row]:
    """Time outside g an evaluation: Anderson, the same window, the same number of evaluations."""
    rows = []
    for batch, size in tqdm(options.sizes, desc="overhead"):
        problem = problems.make("hard", batch, size, options.device)
        instances = [replace(i, s=torch.full_like(i.s, 0.99)) for i in problem.instances]
        g = Counting(problems.g, options.device)
        runs = {
            name: run
            for name, run in fixed_count_runs().items()
            if not options.families or name.split()[0] in options.families
        }

        def clock(call: Callable[[], Any], device: str, g: Counting = g) -> float:
            g.reset()
            total = timed(call, device)
            if g.calls != FIXED:
                raise RuntimeError(f"overhead: a method made {g.calls} evaluations, not {FIXED}")
            return (total - g.seconds) / g.calls

        def call(run: methods.Solve) -> Callable[[int], Any]:
            return lambda i: run(g, *instances[i % len(instances)].arguments)  # noqa: B023

        with torch.no_grad():
            measured = interleave(
                {name: call(run) for name, run in runs.items()},
                device=options.device,
                budget=options.budget,
                rounds=options.rounds,
                label=f"{batch}x{size}",
                clock=clock,
            )
        for name, times in measured.items():
            rows.append(
                {
                    "suite": "overhead",
                    "batch": batch,
                    "size": size,
                    "method": name,
                    "history": HISTORY,
                    "evaluations": FIXED,
                    **times.row(),
                }
            )
    return rows


def fixed_count_runs() -> dict[str, methods.Solve]:
    """Anderson by FIXED evaluations, whatever the residual."""
    never = Rule(rtol=0.0, atol=0.0, max_iterations=FIXED)
    runs = {
        "ours Anderson": methods.ours(fpi_cuda.Anderson(history=HISTORY))(never),
        "plain Anderson": methods.plain(methods.anderson)(never),
    }
    if methods.absent("torchdeq") is None:
        runs["torchdeq Anderson"] = methods.torchdeq("anderson", m=HISTORY)(never)
    return runs


# --- scale: neither the state's nor the loss's scale may matter -------------------------------

SCALES = (1e-3, 1.0, 1e3)
LOSS_SCALE = 1e-5


def scale(options: Options) -> list[Row]:
    rows = []
    batch, size = options.sizes[0]
    problem = problems.make("hard", batch, size, options.device, instances=1)
    (instance,) = problem.instances
    for name, solver in (
        ("Picard", fpi_cuda.Picard()),
        ("Anderson", fpi_cuda.Anderson(history=HISTORY)),
    ):
        for atol in (0.0, problem.rule.atol):
            counts = {c: iterations_at_scale(instance, solver, c, atol) for c in SCALES}
            for c in SCALES:
                rows.append(
                    {
                        "suite": "scale",
                        "method": name,
                        "what": "state",
                        "scale": c,
                        "atol": atol * c,
                        "iterations_max": int(counts[c].max()),
                        "iterations_mean": float(counts[c].double().mean()),
                        "difference": int((counts[c] - counts[1.0]).abs().max()),
                    }
                )
        run = methods.ours(solver)(problem.rule)
        _, weight, u = gradients(run, problems.g, instance)
        small = replace(instance, loss=instance.loss * LOSS_SCALE)
        _, small_weight, small_u = gradients(run, problems.g, small)
        rows.append(
            {
                "suite": "scale",
                "method": name,
                "what": "loss",
                "scale": LOSS_SCALE,
                "difference": max(
                    relative_error(small_weight.double() / LOSS_SCALE, weight.double()),
                    relative_error(small_u.double() / LOSS_SCALE, u.double()),
                ),
            }
        )
    return rows


def iterations_at_scale(instance: Instance, solver: Any, c: float, atol: float) -> torch.Tensor:
    """[B]: iterations of the same map in the variable c·x."""

    def scaled(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return c * problems.g(x / c, *rest)

    with torch.no_grad():
        solution = fpi_cuda.fixed_point(
            scaled,
            instance.x0,
            instance.u,
            instance.s,
            params=(instance.weight,),
            solver=solver,
            tolerance=fpi_cuda.Tolerance(problems.Rule.rtol, atol * c),
            on_failure="return",
        )
    return solution.iterations


# --- kernels: one step's bytes against the machine's copy -------------------------------------


CPU_KERNELS = ((4096, 1024, "float32"),)
CUDA_KERNELS = (
    (65536, 64, "float32"),
    (16384, 1024, "float32"),
    (16384, 1024, "bfloat16"),
    (256, 32768, "float32"),
    (256, 32768, "bfloat16"),
    (8, 1048576, "float32"),
    (8, 1048576, "float64"),
)


def kernels(options: Options) -> list[Row]:
    """Bandwidth of one step with a full window, for the bytes of the committed layout.

    The copy touches as many bytes of memory as the step does and counts what it reads and writes.
    """
    if torch.device(options.device).type not in native.devices():
        return [{"suite": "kernels", "skipped": f"no native step kernels for {options.device}"}]
    shapes = CUDA_KERNELS if options.device.startswith("cuda") else CPU_KERNELS
    return [row for shape in shapes for row in kernels_at(options, *shape)]


def step_vectors(device: str, row_bytes: int, m: int) -> dict[str, int]:
    """Vectors of N that a step moves; docs/design.md says which."""
    if not device.startswith("cuda"):
        return {"Anderson": 2 * m + 4, "Picard": 3}
    if row_bytes <= 16384:
        return {"Anderson": 2 * m + 3, "Picard": 3}
    return {"Anderson": 2 * m + 5, "Picard": 4}


def kernels_at(options: Options, batch: int, size: int, dtype: str) -> list[Row]:
    device, m = options.device, HISTORY
    kind = {"device": device, "dtype": getattr(torch, dtype)}
    x = torch.randn(batch, size, **kind)
    values_of_g = cycle([torch.randn(batch, size, **kind) for _ in range(m + 1)])
    progress = Progress(x, Limits(1e-9, 0.0, 0.0, 10**6, 10**6))
    window = [torch.empty(batch, m, size, **kind) for _ in range(2)]
    window.append(torch.empty(batch, m, m, device=device, dtype=progress.dtype))
    # On a device many at once, so that the host's launches hide behind them.
    repeats = 20 if device.startswith("cuda") else 1

    def anderson(_: int) -> None:
        for _ in range(repeats):
            native.anderson_step(progress, x, next(values_of_g), 1.0, 1e-6, 1e30, *window)

    def picard(_: int) -> None:
        for _ in range(repeats):
            native.picard_step(progress, x, next(values_of_g), 1.0)

    def copy_of(nbytes: int) -> Callable[[int], Any]:
        source = torch.randn(nbytes // 8, device=device)
        target = torch.randn(nbytes // 8, device=device)

        def copy(_: int) -> None:
            for _ in range(repeats):
                target.copy_(source)

        return copy

    vectors = step_vectors(device, x.nbytes // batch, m)
    touched = {"Anderson": (2 * m + 2) * x.nbytes, "Picard": 2 * x.nbytes}
    rows = []
    for name, step in (("Anderson", anderson), ("Picard", picard)):
        for _ in range(2 * m):
            step(0)
        measured = interleave(
            {"step": step, "copy": copy_of(touched[name])},
            device=device,
            budget=options.budget,
            rounds=(11, 101),
            label=f"{name} step",
        )
        if progress.tally[:2].tolist() != [batch, 0]:
            raise RuntimeError(f"kernels: samples finished during the {name} step's timing")
        seconds = measured["step"].over(repeats)
        moved = vectors[name] * x.nbytes
        bandwidth = moved / seconds.median
        copied = touched[name] * repeats / measured["copy"].median
        rows.append(
            {
                "suite": "kernels",
                "method": f"{name} step",
                "batch": batch,
                "size": size,
                "device": device,
                "dtype": dtype,
                "history": m if name == "Anderson" else None,
                "bytes": moved,
                "working_set": touched[name],
                "bytes_per_s": bandwidth,
                "copy_bytes_per_s": copied,
                "of_copy": bandwidth / copied,
                **seconds.row(),
            }
        )
    return rows


# --- loop: what an iteration costs on a device, beside the kernels ------------------------------


def loop(options: Options) -> list[Row]:
    """Seconds an iteration with a g of one small kernel, by the slope over fixed counts.

    Beside the drivers: torchdeq; g and the step as nodes of a plain graph, which is what the device
    itself needs; and a WHILE body of one tiny kernel. Syncs are counted in a whole solve.
    """
    if not options.device.startswith("cuda"):
        return [{"suite": "loop", "skipped": "needs a CUDA device"}]
    return [row for size in options.sizes for row in loop_at(options, *size)]


FEW, MANY = 20, 120  # iterations


def loop_at(options: Options, batch: int, size: int) -> list[Row]:
    device = options.device
    x0 = torch.zeros(batch, size, device=device)
    u = torch.randn(batch, size, device=device)
    unused = torch.zeros(0, device=device)

    def g(x: torch.Tensor, u: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.add(u, x, alpha=0.5)

    builds = {
        f"{type(solver).__name__}, {driver}": methods.ours(solver, driver=driver)
        for solver in (fpi_cuda.Picard(), fpi_cuda.Anderson(history=HISTORY))
        for driver in ("eager", "graph")
    }
    if methods.absent("torchdeq") is None:
        builds["torchdeq fixed point"] = methods.torchdeq("fixed_point_iter")
        builds["torchdeq Anderson"] = methods.torchdeq("anderson", m=HISTORY)

    def call(build: Any, count: int) -> Callable[[int], Any]:
        run = build(Rule(rtol=0.0, atol=0.0, max_iterations=count))
        return lambda _: run(g, x0, u, torch.zeros(batch, 1, device=device), unused)

    calls = {(n, k): call(b, k) for n, b in builds.items() for k in (FEW, MANY)}
    rows = []
    with torch.no_grad():
        for name in builds:
            calls[name, FEW](0), calls[name, FEW](0), calls[name, FEW](0)
        syncs = {name: count_syncs(calls[name, MANY]) for name in builds}
        measured = interleave(
            {f"{name} {k}": c for (name, k), c in calls.items()},
            device=device,
            budget=options.budget,
            rounds=options.rounds,
            label=f"loop {batch}x{size}",
        )
        for name in builds:
            few, many = (measured[f"{name} {k}"].median for k in (FEW, MANY))
            rows.append(
                {
                    "suite": "loop",
                    "method": name,
                    "batch": batch,
                    "size": size,
                    "seconds_an_iteration": (many - few) / (MANY - FEW),
                    "solve_s": many,
                    "iterations": MANY,
                    "syncs": syncs[name],
                }
            )
        for name, seconds in bare(g, x0, u).items():
            rows.append(
                {
                    "suite": "loop",
                    "method": name,
                    "batch": batch,
                    "size": size,
                    "seconds_an_iteration": seconds,
                }
            )
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


def bare(g: Callable[..., torch.Tensor], x0: torch.Tensor, u: torch.Tensor) -> dict[str, float]:
    """Seconds an iteration of g and the steps as nodes of a graph, and of a WHILE body alone."""
    from fpi_cuda import _build

    found = {}
    for solver in (fpi_cuda.Picard(), fpi_cuda.Anderson(history=HISTORY)):
        x = x0.clone()
        progress = Progress(x, Limits(0.0, 0.0, 0.0, 2**30, 2**30))
        step = solver.start(native, progress, x)

        def iterate(x: torch.Tensor = x, step: Any = step) -> None:
            step(x, g(x, u))

        graph = torch.cuda.CUDAGraph()
        iterate()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(MANY):
                iterate()
        seconds = [timed(graph.replay, str(x0.device)) for _ in range(12)][2:]
        found[f"{type(solver).__name__}, nodes of a graph"] = statistics.median(seconds) / MANY

    tally = torch.tensor([1, 0, 0], dtype=torch.int32, device=x0.device)
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
    stream = torch.cuda.current_stream(x0.device).cuda_stream
    seconds = [timed(lambda: loop.launch(stream), str(x0.device)) for _ in range(12)][2:]
    if int(tally[2]) != many:
        raise RuntimeError(f"loop: the WHILE node made {int(tally[2])} iterations, not {many}")
    found["WHILE body of one tiny kernel"] = statistics.median(seconds) / many
    return found


# --- import: how long the library keeps a program from starting -------------------------------

IMPORT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import fpi_cuda
print(middle - start, time.perf_counter() - middle)
"""


def importing(options: Options) -> list[Row]:
    """Seconds that `import fpi_cuda` adds after `import torch`, in fresh processes."""
    torch_s, ours_s = [], []
    for _ in tqdm(range(max(5, options.rounds[0])), desc="import"):
        command = [sys.executable, "-c", IMPORT]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        a, b = map(float, done.stdout.split())
        torch_s.append(a)
        ours_s.append(b)
    row = {"suite": "import", "method": "import fpi_cuda", "torch_s": Times(tuple(torch_s)).median}
    return [row | Times(tuple(ours_s)).row()]


# --- the list ---------------------------------------------------------------------------------

SUITES: dict[str, Callable[[Options], list[Row]]] = {
    "solve": solve,
    "dense": dense,
    "denoise": denoise,
    "convolutions": lambda options: convolutions.rows(options.device, options.budget),
    "overhead": overhead,
    "scale": scale,
    "kernels": kernels,
    "loop": loop,
    "import": importing,
}


def quick(options: Options) -> list[Row]:
    """Every suite, short: few repeats, nothing compiled, the peers at a size or two."""
    without = (*options.without, *(m.name for m in methods.all_methods() if m.slow))
    short = replace(
        options, budget=options.budget / 10, rounds=(3, 15), instances=2, without=without
    )
    rows = kernels(short) + scale(short)
    for size in options.sizes:
        rows += solve(replace(short, sizes=(size,), families=("ours", "plain")))
    rows += overhead(replace(short, sizes=(options.sizes[0], options.sizes[-1])))
    rows += importing(replace(short, rounds=(5, 5)))
    for size in options.peers_at:
        rows += solve(replace(short, sizes=(size,), families=("ours", "torchdeq")))
    return rows


def full(options: Options) -> list[Row]:
    """Every suite but those of convolutions, for the committed JSON."""
    chosen = (suite for name, suite in SUITES.items() if name not in ("denoise", "convolutions"))
    return [row for suite in chosen for row in suite(options)]


PRESETS: dict[str, Callable[[Options], list[Row]]] = {"quick": quick, "full": full}
