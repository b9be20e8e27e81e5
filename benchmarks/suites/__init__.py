"""The suites, by the names of the command line: each yields the cells that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from .. import problems
from ..methods import FAMILIES
from . import (
    bridge,
    convergence,
    convolutions,
    dense,
    dropin,
    failing,
    importing,
    kernels,
    memory,
    overhead,
    scale,
    scaling,
    solve,
    whole,
)
from .cell import Cell, Options

__all__ = ["ABOUT", "SUITES", "Cell", "Options"]

Suite = Callable[[Options], Iterable[Cell]]


def quick(options: Options) -> Iterator[Cell]:
    """Every claim, short: few repeats, nothing compiled, the peers at one size."""
    short = replace(options, budget=options.budget / 10, rounds=(3, 15), instances=2, quick=True)
    dense_only = replace(short, kinds=options.kinds or problems.DENSE)
    mine = replace(
        dense_only,
        families=tuple({"ours", "plain"} & set(options.families or ("ours", "plain"))),
        without=(*options.without, "compat layer"),
    )
    yield from kernels.cells(short)
    yield from scale.cells(short)
    yield from solve.solve(mine)
    yield from solve.training(mine)
    at_one = options.sizes_or(problems.SIZES)[:1]
    yield from overhead.overhead(replace(short, sizes=at_one))
    yield from solve.peers(replace(dense_only, sizes=at_one, families=options.families))
    allowed = tuple({"ours", "plain", "replaced"} & set(options.families or FAMILIES))
    yield from memory.cells(replace(short, families=allowed))
    yield from failing.cells(short)
    yield from importing.cells(short)


def full(options: Options) -> Iterator[Cell]:
    """Everything: what the committed JSON is made by."""
    for name, suite in SUITES.items():
        if name not in ("quick", "full"):
            yield from suite(options)


SUITES: dict[str, Suite] = {
    "quick": quick,
    "full": full,
    "kernels": kernels.cells,
    "solve": solve.solve,
    "training": solve.training,
    "memory": memory.cells,
    "peers": solve.peers,
    "dense": dense.cells,
    "whole": whole.cells,
    "convolutions": convolutions.cells,
    "denoise": solve.denoise,
    "dropin": dropin.cells,
    "scaling": scaling.cells,
    "convergence": convergence.cells,
    "failing": failing.cells,
    "overhead": overhead.overhead,
    "loop": overhead.loop,
    "scale": scale.cells,
    "import": importing.cells,
    "bridge": bridge.cells,
}

ABOUT = {
    "quick": "every claim, short: about 2.5 minutes on 2 cores",
    "full": "all of the suites below, for the committed JSON",
    "kernels": "step kernels against a copy, roofs of the machine",
    "solve": "whole solves, forward: ours and plain loops",
    "training": "the same with the backward: loss and gradients, and deep unrolling",
    "memory": "peak memory against iterations, and states that the library holds",
    "peers": "beside torchdeq, jaxopt and optimistix, at defaults and at the best of a grid",
    "dense": "steps of dense layers solved whole: the Bibtex shape, products, refill",
    "whole": "whole solves of dense layers against plain loops as CUDA graphs, in three precisions",
    "convolutions": "on a CUDA device: an iteration of a net beside cuDNN, both as CUDA graphs",
    "denoise": "a net of two convolutions, 32 images of mixed noise",
    "dropin": "training steps of the old layer's demonstration, by it and by what takes its place",
    "scaling": "time against B, N, spread of difficulty, iterations",
    "convergence": "residual against evaluations, time against the residual reached",
    "failing": "a batch on half of which the map expands",
    "overhead": "time outside g, at equal evaluations",
    "loop": "on a CUDA device: what an iteration costs beside g and the kernels, and syncs",
    "scale": "the state's and the loss's scale do not matter",
    "import": "import fpi_cuda, after import torch",
    "bridge": "our solvers under torchdeq's registry, on nets of the kinds of its zoo",
}
