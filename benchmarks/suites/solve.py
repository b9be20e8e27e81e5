"""solve: whole solves, forward. training: with the backward. peers: beside other libraries."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from .. import problems
from ..clock import timed
from ..methods import COMPACTED, PEERS, Method, Runner
from ..problems import Problem
from ..records import Row
from .cell import Cell, Options, Size, brief, contest, examine, head, mode

BACKWARD = {
    "solve": (False,),
    "training": (True,),
    "peers": (False, True),
    "denoise": (False, True),
}


def places(suite: str, options: Options) -> list[tuple[str, Size]]:
    """The problems of a suite: the dense ones at all sizes, the others where they are at home."""
    kinds = options.kinds or problems.DENSE + (() if suite == "peers" else tuple(problems.ALSO))
    found = []
    for kind in kinds:
        sizes = problems.SIZES if kind in problems.DENSE else (problems.at(kind),)
        found += [(kind, size) for size in options.sizes_or(sizes)]
    return found


def cells(suite: str, options: Options) -> Iterator[Cell]:
    modes = BACKWARD[suite][-1:] if options.quick else BACKWARD[suite]
    for kind, (batch, size) in places(suite, options):
        for backward in modes:
            yield Cell(
                f"{suite}/{kind}-{batch}x{size}-{options.dtype}-{mode(backward)}",
                functools.partial(cell, suite, options, kind, (batch, size), backward),
            )


def cell(suite: str, options: Options, kind: str, size: Size, backward: bool) -> list[Row]:
    problem = options.make(kind, *size)
    if suite == "peers":
        return beside_peers(problem, options, backward=backward)
    methods = options.methods("ours", "plain", "replaced")
    if suite == "solve":  # as the plain loop, forward
        methods = [method for method in methods if method.name != "unrolled"]
    rows = contest(suite, problem, methods, options, backward=backward)
    for row in rows:
        if row["method"] == COMPACTED and "evaluations" in row and not options.tiny:
            problems.check_spread(problem, row["evaluations"], row["iterations_mean"])
    return rows


def solve(options: Options) -> Iterator[Cell]:
    return cells("solve", options)


def training(options: Options) -> Iterator[Cell]:
    return cells("training", options)


def peers(options: Options) -> Iterator[Cell]:
    return cells("peers", options)


def denoise(options: Options) -> Iterator[Cell]:
    """The denoising net, by those methods that have a chance: its iterations are dear."""
    for backward in BACKWARD["denoise"]:
        name = f"denoise/denoise-{options.dtype}-{mode(backward)}"
        yield Cell(name, functools.partial(denoise_cell, options, backward))


def denoise_cell(options: Options, backward: bool) -> list[Row]:
    out = ("Picard", "plain loop", "plain loop, compacted, compiled", "plain Anderson")
    out += ("compat layer", "unrolled", "old layer, pure Python")
    home = options.either(problems.DENOISE, (4, 16 * 4 * 4))
    batch, size = options.sizes[0] if options.sizes else home
    problem = options.make("denoise", batch, size, instances=1)
    methods = options.methods("ours", "plain", *PEERS)
    methods = [method for method in methods if method.name not in out]
    return contest("denoise", problem, methods, options, backward=backward)


# --- peers: at their defaults and at the best of a committed grid -----------------------------

SCREENED = 3  # timed calls of a setting before the best one is chosen


def beside_peers(problem: Problem, options: Options, *, backward: bool) -> list[Row]:
    entries = options.methods(*PEERS, grid=not options.quick)
    mine = options.methods("ours", "plain", "replaced")
    chosen: list[Method] = []
    screened: list[Row] = []
    runners: dict[str, Runner] = {}
    for family in PEERS:
        of_family = [method for method in entries if method.family == family]
        chosen += [method for method in of_family if method.default]
        seconds: dict[str, float] = {}
        for method in of_family:
            if method.default or method.reason(problem):
                continue
            row, runner = screen(method, problem, backward=backward)
            screened.append(row)
            if runner is not None and row["refused"] is None:
                seconds[method.name] = row["screened_s"]
                runners[method.name] = runner
        if seconds:
            best = min(seconds, key=seconds.__getitem__)
            chosen += [method for method in of_family if method.name == best]
        for name in seconds:
            if name not in {method.name for method in chosen}:
                del runners[name]
    rows = contest("peers", problem, [*mine, *chosen], options, backward=backward, runners=runners)
    for row in rows:
        if row["family"] in PEERS and row["method"] in runners:
            row["best_of_grid"] = True
    return rows + screened


def screen(method: Method, problem: Problem, *, backward: bool) -> tuple[Row, Runner | None]:
    """A setting's correctness and a rough time."""
    row = head("grid", problem, method, backward=backward)
    try:
        runner = method.build(problem)
        row |= examine(runner, backward=backward)
        call = runner.call(backward=backward)
        times = [timed(functools.partial(call, i), str(problem.device)) for i in range(SCREENED)]
        row["compile_s"] = row["compile_s"] or max(0.0, row["first_s"] - min(times))
    except Exception as error:  # a setting that its library does not support
        return row | {"skipped": brief(error)}, None
    return row | {"screened_s": min(times)}, runner
