"""Maps of dense layers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from .problem import Instance, Problem, Random, Rule, need, spectral_norm

HIDDEN = 200  # terms of the energy
CURVATURE, STEP_SIZE, ENERGY_NORM = 1.0, 2 / 11, 3.0  # λ, γ and ‖W‖₂: a rate of at most 9/11
LABELS = 159  # of the Bibtex data


def one_layer(x: Tensor, u: Tensor, s: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(s * (x @ weight.T) + u)


def two_layers(x: Tensor, u: Tensor, s: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.tanh(x @ first.T + u) @ second.T


def descent(x: Tensor, u: Tensor, s: Tensor, weight: Tensor) -> Tensor:
    """A gradient step on λ/2 ‖x‖² + Σ log cosh(W x + u), a convex energy (the paper's FPI_GD)."""
    slope = torch.tanh(x @ weight.T + u) @ weight
    return (1 - STEP_SIZE * CURVATURE) * x - STEP_SIZE * slope


def affine(x: Tensor, u: Tensor, s: Tensor, weight: Tensor) -> Tensor:
    return s * (x @ weight.T) + u


def inputs(
    random: Random, batch: int, size: int, width: int, count: int, data: Path | None
) -> list[Tensor]:
    """u = z Uᵀ + b: z Gaussian, or the word counts of Bibtex where its labels are the state."""
    if data is None or size != LABELS:
        into = random.normal(width, size) / math.sqrt(size)
        bias = random.normal(width)
        return [random.normal(batch, size) @ into.T + bias for _ in range(count)]
    import numpy as np

    words = torch.from_numpy(np.load(need(data, "multilabel", "bibtex_test.npz"))["X"]).float()
    into = random.normal(width, words.shape[1]) / math.sqrt(float(words.sum(1).mean()))
    rows = torch.arange(count * batch).reshape(count, batch) % len(words)
    return [words[r] @ into.T for r in rows]


def problem(
    kind: str,
    g: object,
    random: Random,
    us: list[Tensor],
    weights: tuple[Tensor, ...],
    size: int,
    spread: Tensor | None = None,
    rule: Rule | None = None,
) -> Problem:
    batch = len(us[0])
    made = []
    for u in us:
        s = torch.ones(batch) if spread is None else random.shuffled(spread)
        loss = random.normal(batch, size)
        made.append(Instance(torch.zeros(batch, size), u, s[:, None], weights, loss))
    return Problem(kind, g, batch, size, tuple(made), rule or Rule())  # type: ignore[arg-type]


def symmetric(random: Random, size: int, norm: float) -> Tensor:
    weight = random.normal(size, size)
    weight = (weight + weight.T) / 2
    return weight * (norm / spectral_norm(weight))


def easy(
    generator: torch.Generator, batch: int, size: int, count: int, data: Path | None
) -> Problem:
    """W Gaussian with ‖W‖₂ = 0.9 (spectral radius about 0.45), s = 1: 9-12 iterations for all."""
    random = Random(generator)
    weight = random.normal(size, size)
    weight *= 0.9 / spectral_norm(weight)
    us = inputs(random, batch, size, size, count, data)
    return problem("easy", one_layer, random, us, (weight,), size)


def hard(
    generator: torch.Generator,
    batch: int,
    size: int,
    count: int,
    data: Path | None,
    fastest: float = 0.1,
    slowest: float = 0.99,
) -> Problem:
    """W symmetric with ‖W‖₂ = 0.99, u small, s log-spaced from `fastest` to `slowest`, shuffled.

    By default a few samples take 80-200 iterations, the mean is 13-18.
    """
    random = Random(generator)
    weight = symmetric(random, size, 0.99)
    us = [0.05 * u for u in inputs(random, batch, size, size, count, data)]
    spread = torch.logspace(math.log10(fastest), math.log10(slowest), batch)
    return problem("hard", one_layer, random, us, (weight,), size, spread)


def two_layer(
    generator: torch.Generator, batch: int, size: int, count: int, data: Path | None
) -> Problem:
    """x ← tanh(x W₁ᵀ + u) W₂ᵀ with W₂ near W₁ᵀ, both of norm √0.95: a rate near 0.6."""
    random = Random(generator)
    width = 2 * size
    first = random.normal(width, size)
    second = first.T + 0.3 * random.normal(size, width)
    weights = tuple(w * (math.sqrt(0.95) / spectral_norm(w)) for w in (first, second))
    us = [0.5 * u for u in inputs(random, batch, size, width, count, data)]
    return problem("two-layer", two_layers, random, us, weights, size)


def energy(
    generator: torch.Generator, batch: int, size: int, count: int, data: Path | None
) -> Problem:
    """W Gaussian [200, N], 3 in norm, u of unit scale: about 40 iterations."""
    random = Random(generator)
    weight = random.normal(HIDDEN, size)
    weight *= ENERGY_NORM / spectral_norm(weight)
    us = inputs(random, batch, size, HIDDEN, count, data)
    return problem("energy", descent, random, us, (weight,), size)


def linear(
    generator: torch.Generator, batch: int, size: int, count: int, data: Path | None
) -> Problem:
    """Jacobi's iteration x ← D⁻¹(b − (A − D) x) on a diagonally dominant A: ‖W‖_∞ = 0.95."""
    random = Random(generator)
    off = random.normal(size, size).abs()  # of one sign: the rate is then near the bound
    off.fill_diagonal_(0)
    diagonal = off.sum(1) / 0.95
    us = [u / diagonal.mean() for u in inputs(random, batch, size, size, count, data)]
    return problem("linear", affine, random, us, (off / diagonal[:, None],), size)


def stiff(
    generator: torch.Generator,
    batch: int,
    size: int,
    count: int,
    data: Path | None,
    rho: float = 0.999,
) -> Problem:
    """Affine, W symmetric with spectral radius ρ, eigenvalues down from it as 1 − λ grows evenly.

    The error is the residual over 1 − ρ at worst: the tolerance is tighter than elsewhere, as tight
    as float32 allows.
    """
    random = Random(generator)
    basis, _ = torch.linalg.qr(random.normal(size, size))
    values = torch.linspace(-0.5, 0.9, size)
    values[-3:] = torch.tensor([0.97, 0.99, rho])
    weight = (basis * values) @ basis.T
    us = inputs(random, batch, size, size, count, data)
    rule = Rule(2e-5, 0.0, 2e-5, max_iterations=20_000, gradient_error=5e-2)
    return problem("stiff", affine, random, us, ((weight + weight.T) / 2,), size, rule=rule)


def expanding(
    generator: torch.Generator, batch: int, size: int, count: int, data: Path | None
) -> Problem:
    """Affine with ‖W‖₂ = 1: every second sample has s = 0.5, the others 1.5 and grow for ever."""
    random = Random(generator)
    weight = symmetric(random, size, 1.0)
    us = inputs(random, batch, size, size, count, data)
    made = problem("expanding", affine, random, us, (weight,), size)
    for instance in made.instances:
        instance.s[0::2], instance.s[1::2] = 0.5, 1.5
    return made
