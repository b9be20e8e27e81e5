"""The rivals: this library, loops in plain torch, what they replace, and other libraries."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..problems import Problem
from . import ours, plain, replaced
from .ours import FEWER, HISTORY, SOLVERS
from .runner import Build, NotForThis, Runner, Solver, gradients

__all__ = ["HISTORY", "Method", "NotForThis", "Runner", "Solver", "all_methods", "gradients"]

PLAIN = "plain loop"
COMPACTED = "plain loop, compacted"
COMPILED = "plain loop, compacted, compiled"
GRAPHED = "plain loop, compiled, CUDA graph"
CAPTURED = f"plain loop, CUDA graph of {plain.AT_ONCE} iterations"
SAME_TASK = (PLAIN, COMPACTED, COMPILED, GRAPHED)  # as our Picard: tested in every iteration
WHOLE = ("Picard, whole", "Anderson, whole")
CONVOLUTIONS = ("Picard, ConvStep", "Anderson, ConvStep")
PEERS = ("torchdeq", "jaxopt", "optimistix")
FAMILIES = ("ours", "plain", "replaced", *PEERS)


@dataclass(frozen=True)
class Method:
    name: str
    family: str  # one of FAMILIES
    build: Callable[[Problem], Runner]
    missing: str | None = None  # why it can't run here
    kinds: tuple[str, ...] | None = None  # of problems; None: all
    device: str | None = None  # "cuda": on no other; None: on any
    slow: bool = False  # the quick suite leaves it out
    default: bool = True  # not of a grid alone

    def suits(self, problem: Problem) -> bool:
        """Whether it is for this problem and where it lies."""
        return (self.kinds is None or problem.kind in self.kinds) and (
            self.device is None or problem.device.type == self.device
        )

    def reason(self, problem: Problem) -> str | None:
        """Why it can't solve this problem here, or None."""
        return self.missing if self.suits(problem) else "not for this problem"


def absent(package: str) -> str | None:
    found = importlib.util.find_spec(package) is not None
    return None if found else f"{package} is not installed (pip install -r requirements/peers.txt)"


def torch_method(name: str, family: str, build: Build, **more: Any) -> Method:
    return Method(name, family, functools.partial(Solver, build=build), **more)


DENSE_KINDS = ("easy", "hard", "two-layer", "energy", "linear", "stiff")


def of_this_library(backend: str) -> list[Method]:
    solvers = {**SOLVERS, **FEWER}
    found = [torch_method(n, "ours", ours.opaque(s, backend)) for n, s in solvers.items()]
    native = backend in ("auto", "native")  # no other solves whole
    for name, solver in zip(WHOLE, SOLVERS.values(), strict=True) if native else ():
        build = functools.partial(ours.Whole, solver=solver, backend=backend)
        found.append(Method(name, "ours", build, kinds=DENSE_KINDS))
    for name, solver in zip(CONVOLUTIONS, SOLVERS.values(), strict=True):
        build = functools.partial(ours.Convolutions, solver=solver, backend=backend)
        found.append(Method(name, "ours", build, kinds=("denoise",)))
    return found


def plain_loops() -> list[Method]:
    below = plain.COMPACT
    return [
        torch_method(PLAIN, "plain", plain.plain(plain.picard)),
        torch_method(COMPACTED, "plain", plain.plain(plain.picard_compacted, below)),
        torch_method(f"{COMPACTED}, test every 3rd", "plain", plain.plain(plain.seldom, below)),
        torch_method(COMPILED, "plain", plain.plain(plain.picard_compiled, below), slow=True),
        torch_method(GRAPHED, "plain", plain.plain(plain.picard_graphed), device="cuda"),
        torch_method(CAPTURED, "plain", plain.plain(plain.picard_captured), device="cuda"),
        torch_method("plain Anderson", "plain", plain.plain(plain.anderson)),
        torch_method("plain Anderson, compacted", "plain", plain.plain(plain.anderson, below)),
    ]


def what_they_replace() -> list[Method]:
    return [
        torch_method("compat layer", "ours", ours.drop_in),
        torch_method("old layer, pure Python", "replaced", replaced.old_layer),
        torch_method("unrolled", "replaced", replaced.unrolled),
    ]


def peers(*, grid: bool) -> list[Method]:
    """Other libraries: at their defaults, and with `grid` at each setting that is committed."""
    from . import jax, torchdeq

    found = []
    for module in (torchdeq, jax):
        for entries, default in ((module.DEFAULTS, True), (module.GRID, False)):
            if default or grid:
                found += [
                    Method(name, family, build, absent(family), kinds, default=default)
                    for name, family, build, kinds in entries
                ]
    return found


def all_methods(backend: str = "auto", *, grid: bool = False) -> list[Method]:
    return [
        *of_this_library(backend),
        *plain_loops(),
        *what_they_replace(),
        *peers(grid=grid),
    ]
