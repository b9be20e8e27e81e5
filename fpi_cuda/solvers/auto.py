"""Picard where that is enough, else Anderson: each sample's residuals choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .anderson import Anderson

__all__ = ["Auto"]


@dataclass(frozen=True)
class Auto(Anderson):
    """Plain steps where they are enough, else mixtures as often as they pay; what "auto" means.

    Each sample starts with plain steps. From its second iteration on it goes on so while three more
    of them would do, if its residual falls as it did last: ‖r_k‖ (‖r_k‖ / ‖r_{k−1}‖)³ ≤ the
    threshold of its tolerance. Else it turns to `Anderson` with these arguments, for good, with an
    empty window.

    A batch that is one system turns to Anderson in its second iteration.

    Args:
        history: as of `Anderson`. 10 takes a sixth fewer evaluations than 5 in slow solves, one to
            three more in short ones, and twice the memory.
        beta: weight of the new value, in (0, 2).
        ridge: as of `Anderson`.
        restart: likewise.
        every: likewise; by default 3.

    Raises:
        ValueError: an argument is out of its range.
    """

    every: int = 3
    _starts_plain: ClassVar[bool] = True
