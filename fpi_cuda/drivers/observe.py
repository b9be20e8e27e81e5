"""What a forward solve shows of itself while it runs: `trace`, `callback`, `checkpoints`.

They need the host's loop, so a solve that is observed is the eager driver's; its adjoint is not
observed. None waits for the device. What is shown is read from the record, so it is the same for
every backend and solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from ..record import ACTIVE, RESIDUAL, STATUS, Progress, Record

__all__ = ["MOST_KEPT", "WHY", "Observer", "asked", "observer"]

MOST_KEPT = 1024  # iterations of a trace; then every second one goes, and so on

WHY = "only the host's loop shows its iterations"  # why other drivers don't take the solve

Update = Callable[[Tensor, Tensor], None]


def asked(direction: Any) -> str:
    """Which options make the solve an observed one, for the record; "": none."""
    options = direction.problem.options
    asks = options.trace, options.callback is not None, len(options.checkpoints) > 0
    if not any(asks) or direction.linear:
        return ""
    names = "trace", "callback", "checkpoints"
    return " and ".join(name for name, asked in zip(names, asks, strict=True) if asked)


def observer(direction: Any) -> Observer | None:
    """Of one solve; None where nothing is asked for, which costs the loop nothing."""
    if not asked(direction):
        return None
    problem = direction.problem
    options = problem.options
    return Observer(options.trace, options.callback, problem.state, options.checkpoints)


class Observer:
    """Stands around the update of one solve.

    Args:
        trace: whether residuals are kept.
        callback: called after each update; see `fixed_point`.
        unpack: from [*batch, *sample] to the user's state.
        checkpoints: after which updates the iterates are kept.

    Attributes:
        checkpoints: those iterates, [*batch, *sample]: of a sample that had ended its solution.
    """

    def __init__(
        self,
        trace: bool,
        callback: Callable[..., Any] | None,
        unpack: Callable[[Tensor], Any],
        checkpoints: Sequence[int] = (),
    ) -> None:
        self._trace, self._callback, self._unpack = trace, callback, unpack
        self._wanted = checkpoints
        self.checkpoints: list[Tensor] = []
        self._iteration, self._stride = 0, 1
        self._at: list[int] = []  # the iterations that are kept
        self._residuals: list[Tensor] = []  # [B] each

    def around(
        self, update: Update, progress: Progress, layout: Layout, batch: torch.Size
    ) -> Update:
        """The same update, observed."""
        callback, residual = self._callback, progress.scalars[:, RESIDUAL]

        def observed(x: Tensor, gx: Tensor) -> None:
            self._iteration += 1
            before = None if callback is None else _state(x, progress)
            update(x, gx)
            if self._trace:
                self._keep(residual)
            if self._iteration in self._wanted:
                self.checkpoints.append(layout.state(_state(x, progress), batch))
            if callback is not None and before is not None:
                shown = self._unpack(layout.state(before, batch))
                callback(self._iteration, shown, residual.reshape(batch).clone())

        return observed

    def _keep(self, residual: Tensor) -> None:
        if (self._iteration - 1) % self._stride:
            return
        if len(self._at) == MOST_KEPT:
            self._stride *= 2
            del self._at[1::2], self._residuals[1::2]
            if (self._iteration - 1) % self._stride:  # of an odd number that is kept
                return
        self._at.append(self._iteration)
        self._residuals.append(residual.clone())

    def leave(self, record: Record, x: Tensor) -> None:
        """Put the trace into the record: [T, *batch], NaN where a sample had ended before.

        x is the solution, at which checkpoints stand that the solve did not come to.
        """
        self.checkpoints += [x] * (len(self._wanted) - len(self.checkpoints))
        if not self._trace:
            return
        counts, residual = record.iterations, record.residual_norm
        # Nobody iterates longer; on a device the host may have launched more.
        longest = int(counts.max()) if counts.numel() else 0
        n = sum(k <= longest for k in self._at)
        at = torch.tensor(self._at[:n], dtype=torch.int32, device=residual.device)
        record.trace_iterations = at
        rows = torch.stack(self._residuals[:n]) if n else residual.new_empty(0, counts.numel())
        kept = rows.view(n, *record.batch)
        ended = at.view(n, *(1,) * counts.dim()) > counts
        record.trace = kept.masked_fill(ended, torch.nan)
        self._residuals.clear()


def _state(x: Tensor, progress: Progress) -> Tensor:
    """A copy of all samples, [B, N], in their order: those that have ended, at their solution."""
    ended = (progress.counters[:, STATUS] != ACTIVE)[:, None]
    index, out = progress.index, progress.out
    return torch.where(ended, out, x if index is None else out.index_copy(0, index, x))
