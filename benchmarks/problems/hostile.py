"""A map that is no contraction for half of the batch: solvers must fail well on it."""

from __future__ import annotations

from pathlib import Path

import torch

from .dense import affine, inputs, problem, symmetric
from .problem import Problem, Random, Rule


def expanding(
    generator: torch.Generator, batch: int, size: int, count: int, data: Path | None
) -> Problem:
    """Affine with ‖W‖₂ = 1: every second sample has s = 0.5, the others 1.5 and grow for ever."""
    random = Random(generator)
    weight = symmetric(random, size, 1.0)
    us = inputs(random, batch, size, size, count, data)
    made = problem("expanding", affine, random, us, (weight,), size, rule=Rule())
    for instance in made.instances:
        instance.s[0::2], instance.s[1::2] = 0.5, 1.5
    return made
