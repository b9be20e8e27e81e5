"""The eager driver: the host launches every iteration and learns late that it was the last.

On the CPU a step is done when its call returns, and the tally is read at once. On CUDA each step's
tally is copied into pinned memory behind an event, and the host goes on with the newest copy that
has arrived: the queue of the device never drains. What it launches too much changes nothing, since
finished samples are frozen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import backends
from ..layout import Layout
from ..record import Limits, Progress, Record
from .observe import Observer, observer
from .support import Solved, Support

__all__ = [
    "LAG",
    "Evaluation",
    "LateRead",
    "ReadNow",
    "Slot",
    "iterate",
    "reader",
    "refuse_capture",
    "support",
]


def support(direction: Any, because: str) -> Support:
    """The loop takes every solve."""
    return _ALL


def _solve(direction: Any, because: str) -> Solved:
    options, evaluate = direction.problem.options, direction.evaluation()
    because = direction.refused or because
    if direction.linear:
        direction.measure()
    start = direction.start
    watching = observer(direction)
    x, record = iterate(
        evaluate,
        start,
        direction.problem.batch_dims,
        direction.solver,
        evaluate.steps or backends.choose(options.backend, start),
        direction.limits,
        floor=direction.floor,
        skip=direction.skip,
        read=reader(start, direction.limits.max_iterations),
        driver=f"eager ({because})" if because else "eager",
        rows=direction.rows(evaluate),
        observe=watching,
    )
    record.evaluations = direction.seen.calls
    if watching is None:
        return Solved(x, record)
    watching.leave(record, x)
    return Solved(x, record, checkpoints=watching.checkpoints)


_ALL = Support(_solve)


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

    def part(self, positions: Tensor, /) -> Evaluation:
        """The same for the samples at these positions, whoever they are."""

    def select(self, positions: Tensor, x: Tensor, /) -> Evaluation | None:
        """The same for these rows only; None where g does not treat samples independently.

        x is the next iterate of all rows, for checking that.
        """


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
    read: Reader | None = None,
    driver: str = "eager",
    rows: str = "whole batch",
    observe: Observer | None = None,
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
        read: None: at once.
        driver: its name, for the record.
        rows: what is iterated, for the record; where samples are left out, it says so.
        observe: who is shown every update.

    Returns:
        The state shaped like x0, and the record with tensors shaped like the batch.
    """
    batch = x0.shape[:batch_dims]
    layout = Layout(x0, batch_dims)
    x = layout.rows(x0).clone()  # the solver's own buffer, updated in place
    progress = Progress(x, limits, floor, skip)
    held, failed = x.shape[0], 0
    active = held if skip is None else held - int(skip.sum())
    rest = before = active  # what decides on compaction: a count that no timing changes
    evaluate.watch(progress)
    read = read or ReadNow()
    below = evaluate.compact_below
    update = None
    rows_shape = tuple(batch)
    flat = x0.dim() == 2 and batch_dims == 1  # x itself has the state's shape
    state = x if flat else layout.state(x, rows_shape)
    while active:
        # Where most of the active samples ended at once, the others are about to: what is left out
        # would be left out of one iteration.
        if rest <= below * held and (2 * rest >= before or (held - rest) * layout.n >= WORTHWHILE):
            keep = progress.first_rows(rest) if read.late else progress.active_rows()
            smaller = evaluate.select(keep, state)
            below = 0.0 if smaller is None else smaller.compact_below
            if smaller is not None:
                evaluate, rows = smaller, "compacted"
                progress.narrow(keep)
                x = x.index_select(0, keep)
                held = x.shape[0]
                rows_shape = (held,)
                state = x if flat else layout.state(x, rows_shape)
        gx = evaluate(state)
        if update is None:
            if not (layout.plain and gx.is_contiguous()):
                # The layout that g itself returns costs no copy in any later iteration.
                wanted = Layout(gx, len(rows_shape))
                x = wanted.rows(state)
                progress.out = wanted.rows(layout.state(progress.out, batch))
                layout, state = wanted, wanted.state(x, rows_shape)
            update = solver.start(backend, progress, progress.out)
            if observe is not None:
                update = observe.around(update, progress, layout, batch)
        update(x, layout.rows(gx))
        before = rest
        active, failed, rest = read(progress.tally)
    record = Record(
        progress=progress,
        batch=batch,
        rate=solver.contraction,
        path=f"{backend.NAME}, {driver}, {rows}",
        failed=failed,
    )
    return layout.state(progress.result(), batch), record


class Reader(Protocol):
    """How the loop learns of the tally."""

    late: bool  # whether what it says may be old

    def __call__(self, tally: Tensor, /) -> tuple[int, int, int]:
        """Rows active and samples failed as far as is known, and rows that count for compaction.

        The last are those of a step a fixed number before this one, whatever has arrived: bits must
        not depend on timing.
        """


class ReadNow:
    """Reads the tally at once: what holds after this step."""

    late = False

    def __call__(self, tally: Tensor) -> tuple[int, int, int]:
        """Rows active, samples failed, rows active."""
        active, failed, _ = tally.tolist()
        return active, failed, active


# Iterations that the host may be ahead of what it knows. One keeps the device busy wherever an
# iteration lasts longer there than its launches here; one more absorbs the host's hiccups.
LAG = 2


class Slot(Protocol):
    """Room for one copy of the tally on its way to the host."""

    def take(self, tally: Tensor, /) -> None:
        """Start the copy."""

    def ready(self) -> bool:
        """Whether it has arrived."""

    def wait(self) -> None:
        """Return once it has."""

    def values(self) -> list[int]:
        """What has arrived."""


class PinnedSlot:
    """A copy into pinned memory, and the event after it."""

    def __init__(self) -> None:
        self._values = torch.empty(3, dtype=torch.int32, pin_memory=True)
        self._event = torch.cuda.Event()

    def take(self, tally: Tensor) -> None:
        """Start the copy on the current stream of the tally's device."""
        self._values.copy_(tally, non_blocking=True)
        self._event.record(torch.cuda.current_stream(tally.device))

    def ready(self) -> bool:
        """Whether the event has passed."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Until the event has passed; other threads may run meanwhile."""
        self._event.synchronize()

    def values(self) -> list[int]:
        """The copy."""
        return self._values.tolist()


class LateRead:
    """Reads the tally at most `len(slots) - 1` iterations late, without emptying the queue.

    What has arrived early may end the loop: to iterate on would change nothing. It decides nothing
    else, since a compaction changes the bits of a library's products, and those must not depend on
    timing: the third of the numbers returned is of the step exactly so many iterations ago.

    Args:
        slots: one more than the iterations the host may be ahead.
        rows: what is known before anything has arrived: this many are active.
        max_iterations: after so many reads nothing can follow, so the last waits for its own copy.
    """

    late = True

    def __init__(self, slots: Sequence[Slot], rows: int, max_iterations: int) -> None:
        self._free = list(slots)
        self._ahead = len(slots) - 1
        self._under_way: deque[Slot] = deque()
        self._known = [rows, 0, 0]
        self._counts = deque([rows] * self._ahead)  # active rows by step, not yet given out
        self._left = max_iterations

    def __call__(self, tally: Tensor) -> tuple[int, int, int]:
        """Rows active and samples failed as far as is known, and rows active `ahead` steps ago."""
        slot = self._free.pop()
        slot.take(tally)
        self._under_way.append(slot)
        self._left -= 1
        ahead = self._ahead if self._left > 0 else 0
        while self._under_way:
            oldest = self._under_way[0]
            if len(self._under_way) > ahead:
                oldest.wait()  # the steps after it are still in the device's queue
            elif not oldest.ready():
                break
            self._known = oldest.values()
            self._counts.append(self._known[0])
            self._free.append(self._under_way.popleft())
        return self._known[0], self._known[1], self._counts.popleft()


def reader(x: Tensor, max_iterations: int) -> Reader:
    """How the loop reads the tally of a solve for a state like x, [B, ...]."""
    if x.device.type != "cuda":
        return ReadNow()
    refuse_capture()
    with torch.inference_mode(False):
        slots = [PinnedSlot() for _ in range(LAG + 1)]
    return LateRead(slots, x.shape[0], max_iterations)


def refuse_capture() -> None:
    """Raise where the user captures a CUDA graph: a solve's length depends on its data.

    Raises:
        RuntimeError: the current stream is capturing.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fixed_point can't be captured into a CUDA graph: how often it iterates depends on the "
            "data, and a graph with a loop can't be part of another. Call it outside the capture; "
            'driver="graph" makes its own'
        )
