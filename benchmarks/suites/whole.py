"""whole: dense layers solved whole, against plain loops as CUDA graphs, in three precisions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..methods import CAPTURED, COMPACTED, GRAPHED, PLAIN, SOLVERS, WHOLE, plain
from ..problems import rule_of
from ..records import Row
from .cell import Cell, Options, Size, contest, precision

SIZES: tuple[Size, ...] = ((256, 128), (2112, 256), (4096, 256))
PRECISIONS = ("float32", "tf32", "bfloat16")
METHODS = (*WHOLE, *SOLVERS, PLAIN, COMPACTED, GRAPHED, CAPTURED)


def cells(options: Options) -> Iterator[Cell]:
    """Both sides by the same switches; tf32 and CUDA graphs on a CUDA device only."""
    for name in PRECISIONS:
        if name == "tf32" and not options.is_cuda:
            continue
        for kind in options.kinds or ("hard",):
            for size in options.sizes_or(SIZES):
                run = functools.partial(rows, options, kind, size, name)
                yield Cell(f"whole/{kind}-{size[0]}x{size[1]}-{name}", run)


def rows(options: Options, kind: str, size: Size, name: str) -> list[Row]:
    dtype = "float32" if name == "tf32" else name
    problem = replace(options, dtype=dtype).make(kind, *size)
    if name == "tf32":  # which keeps as many digits as float16
        problem = replace(problem, rule=rule_of(problem.rule, torch.float16))
    methods = [m for m in options.methods("ours", "plain") if m.name in METHODS]
    with precision(name):
        plain.forget()  # what was compiled or captured for other sizes or switches
        return contest("whole", problem, methods, options, backward=False, dtype=name)
