"""What the solves of an epoch took: iterations, residuals, failures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from fpi_cuda import FixedPointLayer


@runtime_checkable
class Counted(Protocol):
    """A layer of another library that tells what its last solve took."""

    def counted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Iterations, residuals and whether it converged, [B] each."""


@dataclass
class Solves:
    """Counts over samples: of iterations, of residuals by powers of ten, of failures."""

    iterations: Counter[int] = field(default_factory=Counter)
    backward: Counter[int] = field(default_factory=Counter)
    residuals: Counter[int] = field(default_factory=Counter)  # ⌊log₁₀⌋
    failed: int = 0
    failed_backward: int = 0

    def add(self, model: nn.Module) -> None:
        """Of the last solve of each layer in the model."""
        for layer in layers(model):
            if isinstance(layer, FixedPointLayer):
                last = layer.last
                assert last is not None
                self._add(last.iterations, last.residual_norm, last.converged)
                if last.adjoint is not None:
                    self.backward.update(last.adjoint.iterations.flatten().tolist())
                    self.failed_backward += int((~last.adjoint.converged).sum())
            else:
                self._add(*layer.counted())

    def _add(self, iterations: Tensor, residuals: Tensor, converged: Tensor) -> None:
        self.iterations.update(iterations.flatten().tolist())
        powers = (math.floor(math.log10(r)) for r in residuals.flatten().tolist() if 0 < r < 1e30)
        self.residuals.update(powers)
        self.failed += int((~converged).sum())

    def __add__(self, other: Solves) -> Solves:
        return Solves(
            self.iterations + other.iterations,
            self.backward + other.backward,
            self.residuals + other.residuals,
            self.failed + other.failed,
            self.failed_backward + other.failed_backward,
        )

    def row(self) -> dict[str, Any]:
        """Of a log; empty where nothing was solved."""
        if not self.iterations:
            return {}
        return {
            "iterations": histogram(self.iterations),
            "backward_iterations": histogram(self.backward),
            "residuals": histogram(self.residuals),
            "failed": self.failed,
            "failed_backward": self.failed_backward,
        }

    def figures(self) -> dict[str, float]:
        """Of a test: mean iterations and failures; empty where nothing was solved."""
        if not self.iterations:
            return {}
        counts = histogram(self.iterations)
        return {"iterations": mean(counts), "failed": float(self.failed)}


def layers(model: nn.Module) -> Iterator[Any]:
    """The layers in the model that have solved something."""
    for module in model.modules():
        ours = isinstance(module, FixedPointLayer) and module.last is not None
        if ours or isinstance(module, Counted):
            yield module


def histogram(counts: Counter[int]) -> dict[str, int]:
    return {str(value): counts[value] for value in sorted(counts)}


def mean(counts: dict[str, int]) -> float:
    total = sum(counts.values())
    return sum(int(value) * n for value, n in counts.items()) / total if total else math.nan
