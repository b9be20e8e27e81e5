"""Picard iteration: x ← x + β (g(x) − x)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._check import check_beta
from ..record import RING, Progress

Update = Callable[[Tensor, Tensor], None]


class Mixing(NamedTuple):
    """What the kernels are told of a solver."""

    history: int = 1
    beta: float = 1.0
    ridge: float = 0.0
    restart: float = 0.0


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
    history: ClassVar[int] = 1  # iterates it looks at

    def __post_init__(self) -> None:
        check_beta("Picard", self.beta)

    @property
    def patience(self) -> int:
        """Iterations without progress before a sample at the rounding level counts as stalled."""
        return 10

    def mixing(self, dtype: torch.dtype) -> Mixing:
        """What the kernels take for a state of this dtype."""
        return Mixing(beta=self.beta)

    def start(self, backend: Any, progress: Progress, x: Tensor) -> Update:
        """The update `(x, gx) -> None` that moves x [R, N] in place."""
        del x

        def update(x: Tensor, gx: Tensor) -> None:
            backend.picard_step(progress, x, gx, self.beta)

        return update

    def contraction(self, ring: Tensor, iterations: Tensor) -> Tensor:
        """[B]: the geometric mean of the last residual ratios, taken back from the damped map to g.

        Args:
            ring: [B, RING], the last residual norms, iteration k in column (k − 1) mod RING.
            iterations: [B].
        """
        last = iterations.long()
        span = (last - 1).clamp(min=0, max=RING - 1)
        rows = torch.arange(len(last), device=last.device)
        newest = ring[rows, (last - 1) % RING]
        oldest = ring[rows, (last - 1 - span) % RING]
        rate = (newest / oldest) ** (1 / span.to(ring.dtype))
        rate = (1 - (1 - rate) / self.beta).abs()
        return torch.where(span > 0, rate, torch.nan)
