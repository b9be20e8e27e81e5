"""What a solve returns: the state, and for every sample what happened to it."""

from __future__ import annotations

import enum
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .record import ITERATIONS, RESIDUAL, RING_START, STATUS, Progress

__all__ = ["FixedPointError", "FixedPointWarning", "Record", "Solution", "Status", "Tolerance"]

State = Tensor | tuple[Tensor, ...]


class Status(enum.IntEnum):
    """How the iteration of one sample ended; `message` says what to try."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    STALLED = 2
    DIVERGED = 3
    NONFINITE = 4

    @property
    def message(self) -> str:
        """One sentence: what happened, and what to try."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "the residual met the tolerance.",
    Status.MAX_ITERATIONS: (
        "the residual was above the tolerance after max_iterations; raise max_iterations, use "
        "Anderson, damp a rotation or a 2-cycle with beta < 1, or make g a contraction."
    ),
    Status.STALLED: (
        "the residual stopped falling at the rounding level of the dtype; loosen rtol or solve in "
        "a wider dtype."
    ),
    Status.DIVERGED: (
        "the residual grew steadily; g is no contraction there: scale its weights down, damp with "
        "beta < 1, or start nearer."
    ),
    Status.NONFINITE: (
        "g returned NaN or Inf, or the input held one; look at this sample's x0 and inputs, or "
        "lower the scale of g."
    ),
}

# Gradients of these samples are masked by default: their state means nothing.
MASKED = (Status.DIVERGED, Status.NONFINITE)

_RTOL = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_ATOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Tolerance:
    """When a sample has converged: ‖g(x) − x‖₂ ≤ atol·√N + rtol·‖g(x)‖₂.

    Args:
        rtol: relative tolerance; None takes the state dtype's default (float64 1e-6, float32 1e-4,
            float16 2e-3, bfloat16 1e-2).
        atol: absolute tolerance for each value; None likewise (1e-12, 1e-6, 1e-3, 1e-3), so that a
            fixed point at zero converges. The adjoint takes 0 by default: a gradient has no scale.

    `Tolerance(0, 0)` asks for `max_iterations` iterations (fewer only where a residual is exactly
    zero); such a solve never fails for want of convergence.

    Raises:
        ValueError: a tolerance is negative or not finite.
    """

    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < math.inf):
                raise ValueError(
                    f"Tolerance: {name} must be a finite number >= 0 (got {value!r}); None takes "
                    "the default of the state's dtype"
                )

    def resolve(self, dtype: torch.dtype, *, adjoint: bool = False) -> tuple[float, float]:
        """The (rtol, atol) that hold for a state of this dtype."""
        rtol = _RTOL[dtype] if self.rtol is None else self.rtol
        default_atol = 0.0 if adjoint else _ATOL[dtype]
        return rtol, default_atol if self.atol is None else self.atol


class FixedPointWarning(UserWarning):
    """Some samples did not converge."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside this package and torch that led here."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=level)


_OURS = tuple(str(Path(file).parent) for file in (__file__, str(torch.__file__)))


class FixedPointError(RuntimeError):
    """Some samples did not converge and `on_failure="raise"`; `solution` holds the whole record."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


@dataclass(eq=False)
class Record:
    """Per-sample account of one solve. Every tensor has the batch's shape, [B]."""

    progress: Progress
    batch: torch.Size
    rate: Callable[[Tensor, Tensor], Tensor]  # the solver's contraction
    path: str  # which backend and driver ran
    failed: int  # samples that did not converge
    evaluations: int = 0  # calls of g with any number of rows, those of the per_sample probe too
    lipschitz: float | None = None  # certified by the step, for error_bound
    adjoint: Record | None = None  # the backward solve's own record, filled by each backward

    @property
    def status(self) -> Tensor:
        """Int8 [B], members of Status."""
        return (self.progress.counters[:, STATUS] - 1).to(torch.int8).view(self.batch)

    @property
    def iterations(self) -> Tensor:
        """Int32 [B], evaluations of g that this sample took part in while active."""
        return self.progress.counters[:, ITERATIONS].reshape(self.batch)

    @property
    def residual_norm(self) -> Tensor:
        """[B], ‖g(x) − x‖₂ of the iterate that passed the test."""
        return self.progress.scalars[:, RESIDUAL].reshape(self.batch)

    @property
    def contraction(self) -> Tensor:
        """[B], measured rate; NaN where only one iteration was made."""
        ring = self.progress.scalars[:, RING_START:]
        return self.rate(ring, self.progress.counters[:, ITERATIONS]).view(self.batch)

    @property
    def converged(self) -> Tensor:
        """Bool [B]: which samples met the tolerance."""
        return self.status == Status.CONVERGED

    @property
    def error_estimate(self) -> Tensor:
        """ρ̂/(1−ρ̂)·residual [B]: an estimate of ‖x − x̂‖₂, not a bound. Inf where ρ̂ ≥ 1."""
        rate = self.contraction
        return torch.where(rate < 1, rate / (1 - rate), math.inf) * self.residual_norm

    @property
    def error_bound(self) -> Tensor | None:
        """k/(1−k)·residual [B] where the step certifies a Lipschitz constant k < 1, else None."""
        k = self.lipschitz
        return None if k is None or not 0 <= k < 1 else k / (1 - k) * self.residual_norm

    def count(self, status: Status) -> int:
        """How many samples ended with this status."""
        return int((self.status == status).sum())

    def failures(self) -> str:
        """A sentence per status other than CONVERGED, with counts and the first samples; or ''."""
        parts = []
        flat = self.status.reshape(-1)
        for status in Status:
            if status is Status.CONVERGED:
                continue
            samples = (flat == status).nonzero().reshape(-1)
            if len(samples):
                shown = ", ".join(str(int(i)) for i in samples[:8])
                more = ", ..." if len(samples) > 8 else ""
                parts.append(
                    f"{len(samples)} of {flat.numel()} samples {status.name} "
                    f"(samples {shown}{more}): {status.message}"
                )
        return " ".join(parts)


@dataclass(eq=False)
class Solution:
    """The fixed point and the per-sample record of the solve that found it.

    Attributes:
        x: the fixed point x̂ = g(x, ·) of the last iterate, shaped like x0, attached to autograd.
            Where the status is NONFINITE: the last finite iterate.
        status: int8 [B], members of `Status`.
        iterations: int32 [B].
        residual_norm: [B], ‖g(x) − x‖₂ of the iterate whose g is returned.
        contraction, error_estimate: [B]; see `docs/math.md`. `error_bound`: [B] or None.
        evaluations: calls of g.
        path: which backend and driver ran, and why.
        adjoint: the record of the last backward solve, or None before one.

    Under `torch.vmap` the record's tensors are plain and carry the mapped dimension first.
    """

    x: State
    record: Record

    @property
    def status(self) -> Tensor:
        """Int8 [B], members of `Status`."""
        return self.record.status

    @property
    def iterations(self) -> Tensor:
        """Int32 [B], evaluations each sample took."""
        return self.record.iterations

    @property
    def residual_norm(self) -> Tensor:
        """[B], ‖g(x) − x‖₂ of the iterate whose g is returned."""
        return self.record.residual_norm

    @property
    def contraction(self) -> Tensor:
        """[B], measured contraction rate; NaN after a single iteration."""
        return self.record.contraction

    @property
    def error_estimate(self) -> Tensor:
        """[B], ρ̂/(1−ρ̂)·residual: an estimate, not a bound."""
        return self.record.error_estimate

    @property
    def error_bound(self) -> Tensor | None:
        """[B] where the step certifies a Lipschitz constant below 1, else None."""
        return self.record.error_bound

    @property
    def evaluations(self) -> int:
        """Calls of g."""
        return self.record.evaluations

    @property
    def converged(self) -> Tensor:
        """Bool [B]."""
        return self.record.converged

    @property
    def path(self) -> str:
        """Which backend and driver ran."""
        return self.record.path

    @property
    def adjoint(self) -> Record | None:
        """The record of the last backward solve."""
        return self.record.adjoint

    def detach(self) -> Solution:
        """The same with x cut from the graph: keeps no graph alive."""
        x = tuple(t.detach() for t in self.x) if isinstance(self.x, tuple) else self.x.detach()
        return Solution(x, self.record)
