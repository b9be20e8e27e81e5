"""The record that every backend's step operators read and write, one row a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVE = -1  # in COUNTERS[STATUS] while a sample still iterates; csrc/math/stop.h has the same

# Columns of `counters`, int32 [B, 5]; csrc/math/stop.h has the same.
STATUS, ITERATIONS, REFERENCE_ITERATION, WINDOW, HEAD = range(5)
# Columns of `scalars`, [B, 2 + RING] in the accumulate dtype; csrc/math/stop.h has the same.
RESIDUAL, REFERENCE, RING_START = 0, 1, 2
RING = 5  # residuals (Picard) or secant ratios (Anderson) behind the contraction estimate

# DIVERGED: the residual is GROWTH times the best one, which is at least GROWTH_ITERATIONS old.
GROWTH, GROWTH_ITERATIONS = 1e4, 5
FALL = 0.9  # a residual this much below the reference counts as progress


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Limits:
    """When a sample stops; see `Tolerance` and `Status`."""

    rtol: float
    offset: float  # atol·√N
    rounding: float  # STALLED only below rounding·‖g(x)‖
    patience: int  # STALLED after this many iterations without a fall by 10 %
    max_iterations: int


class Progress:
    """Per-sample state of one solve, shared by all backends.

    Args:
        x: iterates, [B, N], contiguous; only its shape, dtype and device are used.
        limits: the stop rule.
        floor: [B] in the accumulate dtype: the threshold is offset + rtol·max(‖g(x)‖, floor); the
            adjoint passes ‖v‖. None: zero.
    """

    def __init__(self, x: Tensor, limits: Limits, floor: Tensor | None = None) -> None:
        b = x.shape[0]
        self.limits = limits
        self.dtype = accumulate_dtype(x.dtype)
        self.counters = torch.zeros(b, 5, dtype=torch.int32, device=x.device)
        self.counters[:, STATUS] = ACTIVE
        self.scalars = torch.full((b, 2 + RING), math.nan, dtype=self.dtype, device=x.device)
        self.scalars[:, REFERENCE] = math.inf
        self.floor = torch.zeros(b, dtype=self.dtype, device=x.device) if floor is None else floor
        self.out = torch.empty_like(x)  # [B, N]: written when a sample finishes
        self.index = torch.arange(b, device=x.device)  # [R]: the sample that each row of x holds
        self.active = torch.zeros(1, dtype=torch.int32, device=x.device)  # count, after a step

    def active_rows(self) -> Tensor:
        """Positions in `index` whose samples are still active, ascending."""
        status = self.counters[:, STATUS]
        return (status.index_select(0, self.index) == ACTIVE).nonzero().reshape(-1)
