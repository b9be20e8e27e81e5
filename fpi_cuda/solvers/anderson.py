"""Anderson acceleration, type II, one small least-squares problem a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._check import check_beta, check_whole
from ..backends.scratch import Scratch
from ..options import MOST
from ..record import Progress
from .picard import Mixing, Picard, Update

_RIDGE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Anderson:
    """Mixes the last iterates so that their combined residual is least (paper section 3.1).

    x ← Σ αᵢ (xᵢ + β rᵢ) with Σ αᵢ = 1 minimising ‖Σ αᵢ rᵢ‖₂, per sample. The weights come from the
    Gram matrix of successive residual differences by Cholesky, with a ridge relative to its trace:
    iteration counts do not depend on the scale of the state.

    Args:
        history: iterates in the window, the current one included; 1 is Picard.
        beta: weight of the new value, in (0, 2).
        ridge: regulariser relative to the trace; None: by g's dtype (float64 1e-12, float32 1e-6,
            float16 1e-4, bfloat16 1e-3).
        restart: a residual this many times the best one restarts the sample's window.
        every: iterations to a mixture. Between two mixtures the steps are plain ones, x ← x + β r,
            as long as each residual is below .999 of the last, and their iterates join the window
            too (alternating Anderson-Richardson; Suryanarayana et al. 2019, Pratapa et al. 2016).
            3 takes fewer evaluations than 1 where g's Jacobian is nearly symmetric, and a third of
            the mixing work (docs/solvers.md). Where a plain step lets the residual grow, the next
            2 `history` iterations all mix.

    Where Jacobians have eigenvalues below −1, even mixtures may grow: where a sample's residual has
    not fallen by 0.5 % in 10 iterations, is 3 times its best and g expands by half in each of the
    last five, its β is halved, at most twice.

    Raises:
        ValueError: history or every < 1, beta outside (0, 2), ridge negative or restart <= 1.
    """

    history: int = 5
    beta: float = 1.0
    ridge: float | None = None
    restart: float = 10.0
    every: int = 1
    _starts_plain: ClassVar[bool] = False

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_beta(owner, self.beta)
        check_whole(owner, "history", self.history, advice="; 5 is a good start, 1 is Picard")
        check_whole(owner, "every", self.every, advice="; 1 mixes in each iteration")
        if self.ridge is not None and not 0 <= self.ridge < 1:
            raise ValueError(
                f"{owner}: ridge must lie in [0, 1) (got {self.ridge!r}); it is relative to the "
                "Gram matrix's trace"
            )
        if not self.restart > 1:
            raise ValueError(f"{owner}: restart must be > 1 (got {self.restart!r})")
        if self.every > MOST:
            raise ValueError(
                f"{owner}: every must be at most {MOST} (got {self.every!r}); so large a number "
                "mixes only where the residual does not fall"
            )

    @property
    def patience(self) -> int:
        """Iterations without progress before a sample at the rounding level counts as stalled."""
        return max(10, 2 * self.history)

    def ridge_for(self, dtype: torch.dtype) -> float:
        """The ridge that holds where g computes in this dtype."""
        return _RIDGE[dtype] if self.ridge is None else self.ridge

    def mixing(self, dtype: torch.dtype) -> Mixing:
        """What the kernels take where g computes in this dtype."""
        return Mixing(
            self.history,
            self.beta,
            self.ridge_for(dtype),
            self.restart,
            self.every,
            self._starts_plain,
        )

    def start(self, backend: Any, progress: Progress, x: Tensor) -> Update:
        """The update `(x, gx) -> None` that moves x [R, N] in place; owns the window."""
        if self.history == 1:
            return Picard(self.beta).start(backend, progress, x)
        b, n = x.shape
        m = self.history
        _, beta, ridge, restart, every, starts_plain = self.mixing(progress.precision)
        # Rings by sample, not by row: compaction moves no history.
        scratch = Scratch(x)
        values = scratch.empty((b, m, n), x.dtype, x.device)
        residuals = scratch.empty((b, m, n), x.dtype, x.device)
        gram = scratch.empty((b, m, m), progress.dtype, x.device)
        of = beta, ridge, restart, values, residuals, gram, every, starts_plain

        def update(x: Tensor, gx: Tensor) -> None:
            backend.anderson_step(progress, x, gx, *of)

        update.scratch = scratch  # type: ignore[attr-defined]  # back to the pool with the update
        return update

    def contraction(self, ring: Tensor, iterations: Tensor) -> Tensor:
        """[B]: the largest secant ratio ‖Δg‖/‖Δx‖ of the last iterates; NaN where there is none.

        The largest, because Anderson's iterates do not turn to where g contracts least.
        """
        if self.history == 1:
            return Picard(self.beta).contraction(ring, iterations)
        known = (ring > 0) & ring.isfinite()
        return torch.where(known.any(1), torch.where(known, ring, 0).amax(1).sqrt(), torch.nan)
