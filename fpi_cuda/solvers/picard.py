"""Picard iteration: x ← x + β (g(x) − x)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._check import check_beta
from ..backends.scratch import Scratch
from ..record import TRAIL, Progress

Update = Callable[[Tensor, Tensor], None]

SMALL = 2**16  # bytes of a state whose trail is no worse allocated than fetched from the pool


class Mixing(NamedTuple):
    """What the kernels are told of a solver."""

    history: int = 1
    beta: float = 1.0
    ridge: float = 0.0
    restart: float = 0.0
    every: int = 1


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
        """What the kernels take where g computes in this dtype."""
        return Mixing(beta=self.beta)

    def start(self, backend: Any, progress: Progress, x: Tensor) -> Update:
        """The update `(x, gx) -> None` that moves x [R, N] in place; owns the trail."""
        b, n = x.shape
        if x.nbytes <= SMALL:
            scratch, trail = None, x.new_empty(b, TRAIL, n)
        else:
            scratch = Scratch(x)
            trail = scratch.empty((b, TRAIL, n), x.dtype, x.device)

        def update(x: Tensor, gx: Tensor) -> None:
            backend.picard_step(progress, x, gx, self.beta, trail)

        update.scratch = scratch  # type: ignore[attr-defined]  # back to the pool with the update
        return update

    def contraction(self, ring: Tensor, iterations: Tensor) -> Tensor:
        """[B]: the geometric mean of the last secant ratios ‖Δg‖/‖Δx‖; NaN where there is none.

        Args:
            ring: [B, RING], the squares of ratios, 0 where there is none. Of a damped solve there
                are two at most, measured where it ended.
            iterations: [B].
        """
        del iterations
        known = (ring > 0) & ring.isfinite()
        logs = torch.where(known, ring, 1.0).log().sum(1)
        return (logs / (2 * known.sum(1))).exp()
