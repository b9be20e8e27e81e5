"""What a layer keeps between calls, so that a solve starts where one like it ended."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ._check import check_whole
from ._torch_graphs import valueless
from .captures import followed
from .norms import row_norms
from .record import Record, accumulate_dtype
from .solution import Solution, State, each
from .status import Status
from .tree import flatten, signature

__all__ = ["Slot", "Warm", "check_key"]

CAPACITY = 64


def check_key(key: Any) -> None:
    """Raise unless the key names a slot."""
    if isinstance(key, Tensor):
        raise TypeError(
            "FixedPointLayer: key must be hashable and no tensor, since it names the slot of "
            f"layer.warm (got {type(key).__name__}); write key=int(i), and let g take its own "
            "tensor under another name"
        )
    try:
        hash(key)
    except TypeError:
        raise TypeError(
            "FixedPointLayer: key must be hashable, since it names the slot of layer.warm (got "
            f"{type(key).__name__}); write key=tuple(...) or an index"
        ) from None


class Slot:
    """What is kept of the solves under one key: plain tensors, no graph.

    Attributes:
        like: structure, shapes, dtype and device of the state.
        x: where the next forward solve starts, zero for samples that failed; None: unknown.
        c: of the last adjoint (u, w, whether the batch was one system): v and c − v, both
            divided by ‖v‖, zero for samples that failed; None: unknown.
    """

    def __init__(self, like: Any) -> None:
        self.like = like
        self.x: State | None = None
        self.c: tuple[Tensor, Tensor, bool] | None = None

    def keep(self, solution: Solution) -> None:
        """The forward solve's x̂; its x is detached, and written to by nobody."""
        if any(map(valueless, flatten(solution.x)[0])):  # by fake inputs alone
            return
        fine = _fine(solution.record)
        if fine is None:
            self.x = solution.x
            return
        for part in flatten(solution.x)[0]:
            fine = fine & part.reshape(len(part), part[:1].numel()).isfinite().all(1)

        def kept(part: Tensor) -> Tensor:
            return torch.where(fine.view(-1, *(1,) * (part.dim() - 1)), part, 0)

        self.x = each(kept, solution.x)

    def adjoint_start(self, v: Tensor, system: bool) -> Tensor:
        """Where the adjoint of v, [B, ...], starts: at v, where nothing is known.

        The adjoint is linear in v: of v = a v' + d with the last v' and c', a c' + d is as near as
        v is to the solution where v' is unknown, but for d alone. a makes d least, so no change of
        the loss's scale matters, and v = 0 starts at its solution, 0.

        Args:
            v: the gradient that comes in.
            system: whether the batch is one system, of one a.
        """
        if self.c is None:
            return v
        u, w, was = self.c
        if was != system or (u.shape, u.dtype, u.device) != (v.shape, v.dtype, v.device):
            return v
        v_rows, u_rows, w_rows = (_rows(t, system) for t in (v, u, w))
        a = (v_rows * u_rows).sum(1, keepdim=True)
        return torch.addcmul(v_rows, a, w_rows).to(v.dtype).view(v.shape)

    def keep_adjoint(self, v: Tensor, c: Tensor, record: Record | None) -> None:
        """C, the adjoint of v, both [B, ...], of a first derivative."""
        self.c = None
        if record is None:
            return
        system = record.system > 1
        v_rows, c_rows = _rows(v, system), _rows(c, system)
        fine = _fine(record)
        if fine is not None:  # always, where v or c is not finite
            fine = fine.all() if system else fine[:, None]
            fine = fine & c_rows.isfinite().all(1, keepdim=True)
            v_rows, c_rows = (torch.where(fine, t, 0) for t in (v_rows, c_rows))
        norms = row_norms(v_rows).to(v_rows.dtype)[:, None]
        scale = torch.where(norms > torch.finfo(norms.dtype).tiny, 1 / norms, 0)
        u, w = ((t * scale).to(v.dtype).view(v.shape) for t in (v_rows, c_rows - v_rows))
        self.c = u, w, system


class Warm:
    """What a layer keeps between calls, a slot a key; `FixedPointLayer` says how it is used.

    Args:
        capacity: slots kept; beyond that the least recently used one goes. Each holds three
            tensors of the state's shape. May be set later.

    Attributes:
        hits, misses: calls without x0 that found a start, and that found none. Keys taken in turn,
            more of them than the capacity, find none: each goes before it comes again.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        check_whole("FixedPointLayer", "warm", capacity)
        self.capacity, self.hits, self.misses = capacity, 0, 0
        self._slots: OrderedDict[Hashable, Slot] = OrderedDict()
        self._lock = threading.Lock()  # of the slots' order; a slot itself is replaced by parts

    def clear(self) -> None:
        """Forget all slots and counts: the next calls start cold."""
        with self._lock:
            self._slots.clear()
            self.hits = self.misses = 0

    def begin(self, x0: State, key: Hashable, given: bool) -> tuple[State, Slot | None]:
        """Where a call starts, and what is to keep its solution.

        Args:
            x0: the cold start, or the caller's.
            key: None: the state's shape.
            given: whether it is the caller's, which stays.

        Returns:
            The start; and the slot, None where a transform or forward mode follows the tensors,
            which end with it, and where they have no values.
        """
        if followed() or any(map(valueless, flatten(x0)[0])):
            return x0, None
        slot = self._slot(_like(x0), key)
        x, slot.x = slot.x, None  # a solve that raises leaves none
        if given:
            return x0, slot
        if x is None:
            self.misses += 1
            return x0, slot
        self.hits += 1
        return x, slot

    def _slot(self, like: Any, key: Hashable) -> Slot:
        name = like if key is None else (key,)
        with self._lock:
            slot = self._slots.get(name)
            if slot is None or slot.like != like:
                slot = self._slots[name] = Slot(like)
            self._slots.move_to_end(name)
            while len(self._slots) > self.capacity:
                self._slots.popitem(last=False)
        return slot

    def __repr__(self) -> str:
        return (
            f"Warm({len(self._slots)} of {self.capacity} slots, {self.hits} hits, "
            f"{self.misses} misses)"
        )

    def __reduce__(self) -> Any:
        """A copy starts empty: it may be in another process, on other data."""
        return Warm, (self.capacity,)


def _like(x0: Any) -> Any:
    parts, tree = flatten(x0)
    return signature(tree), *(tuple(getattr(t, n, None) for n in _WHICH) for t in parts)


_WHICH = ("shape", "dtype", "device")


def _rows(t: Tensor, system: bool) -> Tensor:
    """[B, N], of one system [1, B · N], in the accumulate dtype."""
    b = 1 if system else len(t)
    return t.reshape(b, t.numel() // b if b else t[:1].numel()).to(accumulate_dtype(t.dtype))


def _fine(record: Record) -> Tensor | None:
    """Bool [B]: the samples worth to start from; None: all.

    One that ran out of iterations is where it did not run away: else it would run on in each call.
    """
    if not record.failed:
        return None
    status, rate = record.status.reshape(-1), record.contraction.reshape(-1)
    short = (status == Status.MAX_ITERATIONS) & ~(rate >= 1)
    return (status == Status.CONVERGED) | (status == Status.STALLED) | short
