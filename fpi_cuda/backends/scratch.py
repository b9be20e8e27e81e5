"""CPU memory kept between solves.

The first touch of fresh memory costs about as much as ten later passes over it, and an Anderson
window is the largest thing a solve allocates. CUDA's caching allocator does this by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LIMIT = 256 * 2**20  # bytes kept in all; larger tensors are allocated anew each time

# By shape and dtype, least recently used kind first. Without a lock, because a collection may run
# `__del__` in the thread that holds it. Whatever runs between two lines, no tensor is in two
# places: a list is popped from and appended to, each at once, and never copied; one that another
# thread replaced is freed with what it holds.
_kept: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}


class Scratch:
    """Uninitialised tensors that return to the pool with this object.

    Args:
        like: the state that they serve. Where it is of another class (a fake tensor without memory,
            as torch.export runs), none comes from the pool, and none goes there.
    """

    _mine: Sequence[Tensor] = ()

    def __init__(self, like: Tensor | None = None) -> None:
        self._keeps = like is None or type(like) is Tensor

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with undefined values: a kept one of just this kind, or a new one."""
        if device.type != "cpu" or not self._keeps:
            return torch.empty(shape, dtype=dtype, device=device)
        try:
            t = _kept[shape, dtype].pop()
        except (KeyError, IndexError):
            with torch.inference_mode(False):  # the pool serves later solves of any mode
                t = torch.empty(shape, dtype=dtype, device=device)
        if type(t) is Tensor:
            self._mine = [*self._mine, t]
        return t

    def __del__(self) -> None:
        for t in self._mine:
            kind = (tuple(t.shape), t.dtype)
            kept = _kept.pop(kind, [])
            kept.append(t)
            _kept[kind] = kept  # now the most recently used
        total = sum(t.nbytes for kept in list(_kept.values()) for t in kept)
        for kind in list(_kept):
            if total <= LIMIT:
                break
            total -= sum(t.nbytes for t in _kept.pop(kind, []))


def release() -> None:
    """Give the kept memory back."""
    _kept.clear()
