"""What a suite is made of, and how the methods of one problem are put beside one another."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import problems
from ..clock import interleave, timed
from ..judge import judge
from ..methods import PEERS, Method, NotForThis, Runner, all_methods
from ..problems import Problem
from ..records import Row

Size = tuple[int, int]
T = TypeVar("T")
TINY: Size = (64, 64)  # where "hard" can be solved; 64: an image of 8 × 8, too


@dataclass(frozen=True)
class Options:
    device: str = "cpu"
    backend: str = "auto"  # of this library
    dtype: str = "float32"
    data: Path | None = None
    sizes: tuple[Size, ...] | None = None  # None: the suite's own
    kinds: tuple[str, ...] | None = None
    families: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()  # methods to leave out
    budget: float = 2.0  # seconds of timed calls a variant
    rounds: tuple[int, int] = (5, 31)
    instances: int = problems.INSTANCES
    quick: bool = False
    tiny: bool = False  # a rehearsal: says nothing of speed

    def either(self, full: T, tiny: T) -> T:
        """A suite's own size or count, or what takes its place in a rehearsal."""
        return tiny if self.tiny else full

    def sizes_or(self, own: Sequence[Size]) -> tuple[Size, ...]:
        return self.sizes or self.either(tuple(own), (TINY,))

    def turns(self, least: int, most: int) -> tuple[int, int]:
        """Rounds of timed calls."""
        return self.either((least, most), (1, 2))

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def make(self, kind: str, batch: int, size: int, **more: Any) -> Problem:
        problem = problems.make(
            kind,
            batch,
            size,
            device=self.device,
            dtype=getattr(torch, self.dtype),
            data=self.data,
            **{"instances": self.instances} | more,
        )
        if self.tiny:  # a few iterations are enough to see that it runs
            problem = replace(problem, rule=problems.rule_of(problem.rule, torch.bfloat16))
        return problem

    def methods(self, *families: str, grid: bool = False) -> list[Method]:
        """Of those families that the suite wants and the command allows."""
        allowed = families if self.families is None else set(families) & set(self.families)
        return [
            method
            for method in all_methods(self.backend, grid=grid)
            if method.family in allowed
            and method.name not in self.without
            and not (self.quick and method.slow)
        ]


@dataclass(frozen=True)
class Cell:
    """A part of a suite that is run and may fail alone. What is timed in it was timed in turns."""

    name: str
    run: Callable[[], list[Row]]


def mode(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def head(suite: str, problem: Problem, method: Method, *, backward: bool) -> Row:
    """What a row says of the problem and the method."""
    return {
        "suite": suite,
        "problem": problem.kind,
        "batch": problem.batch,
        "size": problem.size,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": str(problem.device),
        "mode": mode(backward),
        "method": method.name,
        "family": method.family,
    }


def brief(error: Exception) -> str:
    """What a method raised, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def stopped(method: Method, error: Exception) -> Row:
    """What a row says of a method that raised.

    One that is not for this case is skipped, and so is a peer, which may fail in ways of its own;
    whatever else raises is wrong.
    """
    if isinstance(error, NotForThis):
        return {"skipped": str(error)}
    if method.family in PEERS:
        return {"skipped": brief(error)}
    traceback.print_exception(error)
    return {"refused": f"raised {brief(error)}", "crashed": True}


@contextmanager
def precision(name: str) -> Iterator[None]:
    """How products and convolutions of float32 are computed, by all methods: "tf32", else IEEE.

    By torch's older switches: its compiler reads these, and raises where only the newer are set.
    """
    convolutions = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), convolutions.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    convolutions.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        convolutions.allow_tf32 = before[1]


def contest(
    suite: str,
    problem: Problem,
    methods: Sequence[Method],
    options: Options,
    *,
    backward: bool,
    runners: dict[str, Runner] | None = None,
    **more: Any,
) -> list[Row]:
    """The rows of one problem: every method judged, then those that were right timed in turns.

    runners: of methods that are built already. more: what the rows shall hold besides.
    """
    rows, calls = [], {}
    for method in methods:
        if not method.suits(problem):
            continue
        row = head(suite, problem, method, backward=backward) | more
        rows.append(row)
        if method.missing:
            row["skipped"] = method.missing
            continue
        try:
            runner = (runners or {}).get(method.name) or method.build(problem)
            row |= examine(runner, backward=backward)
        except Exception as error:
            row |= stopped(method, error)
            continue
        if row["refused"] is None:
            calls[method.name] = runner.call(backward=backward)
    measured = interleave(
        calls,
        device=options.device,
        budget=options.budget,
        rounds=options.turns(*options.rounds),
        label=f"{problem.name} {mode(backward)}",
    )
    for row in rows:
        if row["method"] in measured and "skipped" not in row:
            row.update(measured[row["method"]].row())
            row["compile_s"] = row["compile_s"] or max(0.0, row["first_s"] - row["median_s"])
    return rows


def examine(runner: Runner, *, backward: bool) -> Row:
    """Everything about a method on a problem but its time."""
    call = runner.call(backward=backward)
    first = timed(lambda: call(0), str(runner.problem.device))
    evaluations, mean = runner.count()
    correct = judge(runner, backward=backward)
    return {
        "first_s": first,
        "compile_s": runner.compile_s,  # else what the first call takes beyond the others
        "evaluations": evaluations,
        "iterations_mean": mean,
        **correct.row(runner.problem.rule.gradient_error),
        "peak_bytes": runner.peak_bytes(backward=backward),
    }
