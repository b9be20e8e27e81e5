"""What a problem is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[..., Tensor]  # g(x, u, s, *weights)


@dataclass(frozen=True)
class Rule:
    """A sample has converged when ‖g(x) − x‖₂ ≤ atol·√N + rtol·‖g(x)‖₂; the adjoint has no atol."""

    rtol: float = 1e-4
    atol: float = 1e-6
    adjoint_rtol: float = 1e-4
    max_iterations: int = 200
    gradient_error: float = 1e-2  # what a gradient may be off by: 1e-4 over 1 − k of the slowest


def rule_of(rule: Rule, dtype: torch.dtype) -> Rule:
    """The rule as a dtype can keep it: some roundings of a value at least."""
    least = {torch.bfloat16: 3e-2, torch.float16: 5e-3}.get(dtype)
    if least is None:
        return rule
    tolerances = {name: max(getattr(rule, name), least) for name in ("rtol", "adjoint_rtol")}
    return replace(rule, **tolerances, gradient_error=min(1.0, 30 * least))


@dataclass(frozen=True)
class Instance:
    x0: Tensor  # [B, N], zero
    u: Tensor  # [B, K]: what g takes of z
    s: Tensor  # [B, 1]
    weights: tuple[Tensor, ...]
    loss: Tensor  # [B, N]: the loss is Σ loss·x̂

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.x0, self.u, self.s, *self.weights

    def to(self, *args: torch.device | torch.dtype | str) -> Instance:
        names = ("x0", "u", "s", "loss")
        moved = {name: getattr(self, name).to(*args) for name in names}
        return replace(self, **moved, weights=tuple(w.to(*args) for w in self.weights))


@dataclass(frozen=True)
class Problem:
    kind: str
    g: Step
    batch: int
    size: int
    instances: tuple[Instance, ...]
    rule: Rule = Rule()

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch}x{self.size}"

    @property
    def dtype(self) -> torch.dtype:
        return self.instances[0].x0.dtype

    @property
    def device(self) -> torch.device:
        return self.instances[0].x0.device

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Problem:
        moved = tuple(i.to(device).to(dtype) for i in self.instances)
        return replace(self, instances=moved, rule=rule_of(self.rule, dtype))


Make = Callable[..., Problem]  # make(random, batch, size, instances, data, **more)


class Random:
    """Gaussian tensors, and W with a spectral norm as wanted."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def shuffled(self, t: Tensor) -> Tensor:
        return t[torch.randperm(len(t), generator=self.generator)]


EXACT_NORM = 1024  # rows: above, a dense solver takes too long


def spectral_norm(weight: Tensor) -> float:
    """‖W‖₂: to rounding where one side is at most EXACT_NORM, else within 1e-4 of it."""
    if min(weight.shape) > EXACT_NORM:
        return lanczos_norm(weight)
    w = weight.double()
    return math.sqrt(float(torch.linalg.eigvalsh(w @ w.T)[-1]))  # a tenth of an SVD's time


def lanczos_norm(weight: Tensor, accuracy: float = 1e-4, most: int = 200) -> float:
    """‖W‖₂ by Lanczos on W Wᵀ from a fixed start, every vector kept orthogonal to all before it.

    Ends where ‖W Wᵀ y − λ y‖ ≤ accuracy·λ of its largest Ritz pair: an eigenvalue is then that near
    to λ, and the norm, its root, nearer still. Products are taken in W's own dtype.

    Raises:
        RuntimeError: it is not that near after `most` products.
    """
    rows = len(weight)
    kind = {"dtype": torch.float64, "device": weight.device}
    start = torch.randn(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    basis = torch.zeros(min(most, rows) + 1, rows, **kind)  # type: ignore[arg-type]
    basis[0] = start.to(weight.device) / start.norm()
    diagonal, beside = [], []
    for k in range(len(basis) - 1):
        w = (weight @ (weight.T @ basis[k].to(weight.dtype))).double()
        diagonal.append(float(w @ basis[k]))
        for _ in range(2):  # once is not enough
            w -= basis[: k + 1].T @ (basis[: k + 1] @ w)
        beside.append(float(w.norm()))
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        off = torch.tensor(beside[:-1], dtype=torch.float64)
        tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        largest, left = float(values[-1]), beside[-1] * abs(float(vectors[-1, -1]))
        if left <= accuracy * largest:
            return math.sqrt(largest)
        basis[k + 1] = w / beside[-1]
    raise RuntimeError(
        f"spectral_norm: {len(basis) - 1} products must bring the norm of a matrix of shape "
        f"{tuple(weight.shape)} within {accuracy:g} (got {left / largest:.1e}); allow more of them"
    )


def need(data: Path, *parts: str) -> Path:
    path = data.joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(
            f"make: --data must be a folder that holds {'/'.join(parts)} (got {data})"
        )
    return path
