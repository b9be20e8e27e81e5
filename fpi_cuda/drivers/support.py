"""What a driver is: who takes a solve to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..record import Record

__all__ = ["Driver", "Solved", "Support"]


class Solved(NamedTuple):
    """What a driver leaves."""

    x: Tensor
    record: Record | None  # None: nothing is said of samples, and none is masked
    outputs: Sequence[Tensor | None] | None = None  # those of the direction, where it made them
    checkpoints: Sequence[Tensor] = ()  # the iterates that were asked for


class Support(NamedTuple):
    """Whether a driver takes a solve."""

    run: Callable[[Any, str], Solved] | None = None  # given what `support` was given
    reason: str = ""  # why not, for the record; "": nobody would ask

    @property
    def supported(self) -> bool:
        """Whether it does."""
        return self.run is not None


class Driver(Protocol):
    """One of those that a problem names, in order."""

    def support(self, direction: Any, because: str) -> Support:
        """Look at a solve, in either direction; because: why those before don't take it."""
