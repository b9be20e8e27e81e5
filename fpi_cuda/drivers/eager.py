"""The eager driver: the host launches every iteration and learns late that it was the last.

On the CPU a step is done when its call returns, and the tally is read at once. On CUDA each step's
tally is copied into pinned memory behind an event, and the host goes on with the newest copy that
has arrived: the queue of the device never drains. What it launches too much changes nothing, since
finished samples are frozen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..solvers.iterate import read_now

__all__ = ["LAG", "LateRead", "Slot", "reader", "refuse_capture"]

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


def reader(x: Tensor, max_iterations: int) -> Callable[[Tensor], tuple[int, int, int]]:
    """How the loop reads the tally of a solve for a state like x, [B, ...]."""
    if x.device.type != "cuda":
        return read_now
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
