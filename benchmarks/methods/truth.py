"""The right answers to a problem, which judge all methods and tell jax its tolerance."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problems import Instance, Problem, Rule
from . import plain
from .runner import gradients


@dataclass(frozen=True)
class Exact:
    """The answer in float64, to 1e-12, by a plain loop that shares no code with the library."""

    x: Tensor
    du: Tensor
    dweights: tuple[Tensor, ...]


@functools.lru_cache(maxsize=2)
def truth(problem: Problem) -> tuple[Exact, ...]:
    return tuple(exact(problem, instance) for instance in problem.instances)


def exact(problem: Problem, instance: Instance) -> Exact:
    rule = Rule(rtol=1e-12, atol=0.0, adjoint_rtol=1e-12, max_iterations=40_000)
    # Where iterations are dear or many Anderson needs fewer.
    dear = problem.kind in ("denoise", "stiff", "linear")
    solve = plain.plain(plain.anderson if dear else plain.picard_compacted, (0.8, 0.5))(rule)
    x, du, *dweights = gradients(solve, problem.g, instance.to(torch.float64))
    return Exact(x, du, tuple(dweights))
