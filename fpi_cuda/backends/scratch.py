"""CPU memory kept between solves.

The first touch of fresh memory costs about as much as ten later passes over it, and an Anderson
window is the largest thing a solve allocates. CUDA's caching allocator does this by itself.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

LIMIT = 256 * 2**20  # bytes kept in all; larger tensors are allocated anew each time

_kept: deque[Tensor] = deque()  # oldest first; its methods are atomic


class Scratch:
    """Uninitialised tensors that return to the pool with this object."""

    def __init__(self) -> None:
        self._mine: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with undefined values: a kept one of just this kind, or a new one."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        found = None
        for t in tuple(_kept):
            if t.shape == shape and t.dtype == dtype:
                try:
                    _kept.remove(t)
                except ValueError:  # another thread took it
                    continue
                found = t
                break
        if found is None:
            found = torch.empty(shape, dtype=dtype)
        self._mine.append(found)
        return found

    def __del__(self) -> None:
        _kept.extend(t for t in self._mine if t.nbytes <= LIMIT)
        while sum(t.nbytes for t in tuple(_kept)) > LIMIT:
            _kept.popleft()


def release() -> None:
    """Give the kept memory back."""
    _kept.clear()
