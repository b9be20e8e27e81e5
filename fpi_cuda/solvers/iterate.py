"""The loop: one for every solver, backend and direction (forward and adjoint)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from ..layout import Layout
from ..record import STATUS, Limits, Progress
from ..solution import Record, Status

# Leaving samples out costs more than one iteration of them, up to about this many values (measured
# with dense layers of 128 and 159 on 2 cores).
WORTHWHILE = 2**17


class Evaluation(Protocol):
    """What the loop iterates: x ↦ g(x) on the rows it holds."""

    compact_below: float  # leave finished samples out when active/rows falls below this; 0: never
    masks: bool  # it leaves them out by itself
    steps: Any  # the backend whose step operators read what it leaves; None: any backend's serve

    def watch(self, progress: Progress, /) -> None:
        """Called once, before the first call, with the record of the solve."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """g(x), shaped like x."""

    def select(self, positions: Tensor, x: Tensor, /) -> Evaluation | None:
        """The same for these rows only; None where g does not treat samples independently.

        x is the next iterate of all rows, for checking that.
        """


def read_now(tally: Tensor) -> tuple[int, int, int]:
    """Rows active, samples failed, and the rows that count for compaction: those active.

    A reader that is late says the first two of the newest step it knows of, and the third of a
    step a fixed number before the last, so that it does not depend on timing.
    """
    active, failed, _ = tally.tolist()
    return active, failed, active


def iterate(
    evaluate: Evaluation,
    x0: Tensor,
    batch_dims: int,
    solver: Any,
    backend: Any,
    limits: Limits,
    *,
    floor: Tensor | None = None,
    skip: Tensor | None = None,
    read: Callable[[Tensor], tuple[int, int, int]] = read_now,
    driver: str = "eager",
) -> tuple[Tensor, Record]:
    """Iterate every sample to its own end.

    Args:
        evaluate: calls g.
        x0: [*batch, *sample]; not written to.
        batch_dims: number of leading batch dimensions.
        solver: the hyper-parameters.
        backend: the module with the step operators.
        limits: the stop rule.
        floor: [B], see `Progress`.
        skip: bool [B]: samples that are left at x0 as converged, without an iteration.
        read: see `read_now`.
        driver: its name, for the record.

    Returns:
        The state shaped like x0, and the record with tensors shaped like the batch.
    """
    batch = x0.shape[:batch_dims]
    layout = Layout(x0, batch_dims)
    x = layout.rows(x0).clone()  # the solver's own buffer, updated in place
    progress = Progress(x, limits, floor)
    active, failed = len(x), 0
    if skip is not None:
        progress.counters[:, STATUS].masked_fill_(skip, Status.CONVERGED + 1)
        progress.out.copy_(x)
        active -= int(skip.sum())
    rest = before = active  # what decides on compaction: a count that no timing changes
    evaluate.watch(progress)
    rows = "masked" if evaluate.masks else "whole batch"
    now = read is read_now
    step = None
    rows_shape = tuple(batch)
    state = layout.state(x, rows_shape)
    while active:
        # Where most of the active samples ended at once, the others are about to: what is left out
        # would be left out of one iteration.
        rush = 2 * rest < before and (len(x) - rest) * layout.n < WORTHWHILE
        if rest <= evaluate.compact_below * len(x) and not rush:
            keep = progress.active_rows() if now else progress.first_rows(rest)
            smaller = evaluate.select(keep, state)
            if smaller is None:
                evaluate.compact_below = 0.0
            else:
                evaluate, rows = smaller, "compacted"
                progress.narrow(keep)
                x = x.index_select(0, keep)
                rows_shape = (len(x),)
                state = layout.state(x, rows_shape)
        gx = evaluate(state)
        if step is None:
            if not (layout.plain and gx.is_contiguous()):
                # The layout that g itself returns costs no copy in any later iteration.
                wanted = Layout(gx, len(rows_shape))
                x = wanted.rows(state)
                progress.out = wanted.rows(layout.state(progress.out, batch))
                layout, state = wanted, wanted.state(x, rows_shape)
            step = solver.start(backend, progress, progress.out)
        step(x, layout.rows(gx))
        before = rest
        active, failed, rest = read(progress.tally)
    record = Record(
        progress=progress,
        batch=batch,
        rate=solver.contraction,
        path=f"{backend.NAME}, {driver}, {rows}",
        failed=failed,
    )
    out = layout.state(progress.out, batch)
    progress.norms = None
    del progress.out  # the record outlives the solve; the state belongs to the caller
    return out, record
