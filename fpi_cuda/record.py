"""The record that every backend's step operators read and write, one row a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# In counters[:, STATUS]: 0 while a sample iterates, then its Status + 1; csrc/math/progress.h.
ACTIVE = 0

# Columns of `counters`, int32 [B, 5]; csrc/math/progress.h has the same.
STATUS, ITERATIONS, REFERENCE_ITERATION, WINDOW, HEAD = range(5)
# Entries of `tally`, int32 [3]: rows still active; samples that ended otherwise than converged, so
# far; iterations made. The last so that a device needs no host to count them.
ACTIVE_ROWS, FAILED, ITERATION = range(3)
# Columns of `scalars`, [B, 2 + RING] in the accumulate dtype; csrc/math/progress.h has the same.
RESIDUAL, REFERENCE, RING_START = 0, 1, 2
RING = 5  # residuals (Picard) or secant ratios (Anderson) behind the contraction estimate

# DIVERGED: the residual is GROWTH times the reference, which is at least GROWTH_ITERATIONS old.
GROWTH, GROWTH_ITERATIONS = 1e4, 5
NOISE = 2  # Anderson needs residual differences above this many roundings of g(x)
# A residual this much below the reference counts as progress. Slow contractions must not look
# stalled: in ten iterations one of rate 0.9995 falls this far.
FALL = 0.995


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Limits:
    """When a sample stops; see `Tolerance` and `Status`."""

    rtol: float
    offset: float  # atol·√N
    rounding: float  # STALLED only below rounding·‖g(x)‖
    patience: int  # STALLED after this many iterations without a fall by 0.5 %
    max_iterations: int


class Progress:
    """Per-sample state of one solve, shared by all backends. A zeroed record is a fresh one.

    Args:
        x: iterates, [B, N], contiguous; only its shape, dtype and device are used.
        limits: the stop rule.
        floor: [B] in the accumulate dtype: the threshold is offset + rtol·max(‖g(x)‖, floor); the
            adjoint passes ‖v‖. None: zero.
    """

    def __init__(self, x: Tensor, limits: Limits, floor: Tensor | None = None) -> None:
        b, device = x.shape[0], x.device
        self.limits = limits
        self.dtype = accumulate_dtype(x.dtype)
        self.counters = torch.zeros(b, 5, dtype=torch.int32, device=device)
        self.scalars = torch.zeros(b, 2 + RING, dtype=self.dtype, device=device)
        self.floor = floor
        self.out = torch.empty_like(x)  # [B, N]: written when a sample finishes
        self.index: Tensor | None = None  # [R]: the sample that each row holds; None: its own
        # [B, tiles, 2]: sums of squares of g(x) − x and g(x) that the evaluation left, or None.
        self.norms: Tensor | None = None
        self.tally = torch.zeros(3, dtype=torch.int32, device=device)

    @property
    def samples(self) -> Tensor:
        """[R]: the sample that each row of x holds."""
        if self.index is None:
            return torch.arange(len(self.counters), device=self.counters.device)
        return self.index

    def active_rows(self) -> Tensor:
        """Positions of the rows whose samples still iterate, ascending."""
        status = self.counters[:, STATUS]
        if self.index is not None:
            status = status.index_select(0, self.index)
        return (status == ACTIVE).nonzero().reshape(-1)

    def first_rows(self, count: int) -> Tensor:
        """That many positions, those of active rows first: where the host knows no exact number.

        Ascending among the active, and no wait for the device; count is at least their number.
        """
        status = self.counters[:, STATUS]
        if self.index is not None:
            status = status.index_select(0, self.index)
        return (status != ACTIVE).argsort(stable=True)[:count]

    def narrow(self, positions: Tensor) -> None:
        """From now on the rows are those at these positions."""
        self.index = positions if self.index is None else self.index.index_select(0, positions)
