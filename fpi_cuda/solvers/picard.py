"""Picard iteration: x ← x + β (g(x) − x)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..backends import reference
from ..backends.progress import Progress
from ._check import check_beta

Step = Callable[[Tensor, Tensor, int], None]


@dataclass(frozen=True)
class Picard:
    """Plain fixed-point iteration (paper eq. 3), damped where β ≠ 1.

    Converges wherever g is a contraction; β < 1 also tames rotations and 2-cycles.

    Args:
        beta: weight of the new value, in (0, 2); 1 is undamped.

    Raises:
        ValueError: beta is outside (0, 2).
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        check_beta("Picard", self.beta)

    @property
    def patience(self) -> int:
        """Iterations without progress before a sample at the rounding level counts as stalled."""
        return 10

    def start(self, backend: Any, progress: Progress, x: Tensor) -> Step:
        """The step `(x, gx, k) -> None` that moves x [R, N] in place."""
        del x

        def step(x: Tensor, gx: Tensor, k: int) -> None:
            backend.picard_step(progress, x, gx, k, self.beta)

        return step

    def contraction(self, progress: Progress) -> Tensor:
        """[B]: rate from residual ratios."""
        return reference.contraction(progress, picard_beta=self.beta)
