"""What is known of whether g treats the samples of a batch independently, for each kind of g."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..forms import structured
from ..norms import row_norms
from ..solution import warn
from .kinds import look
from .maps import UserMap

__all__ = ["Samples", "agree", "samples_of"]


class Samples:
    """The samples of the batches that one kind of g is given.

    Attributes:
        coupled: whether they depend on each other, so that the batch is one system.
        compactable: whether finished ones may be left out of it; None: not known yet.
        suspect: whether something has happened that is to be looked into after the solve.
        certain: whether nothing is to be looked at.
        probes: how often samples were given other neighbours, to see whether they matter.
        solves: how many there were.
    """

    def __init__(
        self, *, coupled: bool = False, compactable: bool | None = None, certain: bool = False
    ) -> None:
        self.coupled, self.compactable = coupled, compactable
        self.certain, self.suspect = certain, False
        self.probes = self.solves = 0

    def due(self) -> bool:
        """Whether a solve is one of those that are looked at; counts it.

        The first four, those whose number is a power of two, then every 61st: what comes to depend
        later is seen after 60 more solves at most.
        """
        n = self.solves
        self.solves = n + 1
        return n < 4 or n % PERIOD == 0 or n & (n - 1) == 0

    def learn(
        self, part: Callable[[Tensor], Tensor], whole: Tensor, dtype: torch.dtype | None
    ) -> bool:
        """Whether g may be given fewer samples: compare its values on some with those on all.

        Args:
            part: g on the samples at these positions.
            whole: g on all, [B, ...].
            dtype: autocast's: g's products have the rounding of that, whatever the state's.
        """
        # Backwards, and without the first: a g that takes as many rows of a tensor that it captures
        # would be right on the first ones. Then without the last: the first may be the only sample
        # to which it matters.
        n, same = len(whole), True
        for at in (torch.arange(i + n - 2, i - 1, -1, device=whole.device) for i in (1, 0)):
            try:
                values = part(at), whole.index_select(0, at)
                same = same and bool(agree(*values, dtype or whole.dtype, 4).all())
            except Exception:
                same = False
        self.compactable, self.suspect = same, not same
        return same

    def tell(self, coupled: bool = False, linear: bool = False) -> None:
        """What was found by looking."""
        suspect, self.suspect = self.suspect, False
        if coupled:
            self.coupled = True
            again = "Its derivative, but not its state," if linear else "It"
            warn(
                "fpi_cuda: the samples of this batch depend on each other through g (batch norm or "
                f"attention across it, a graph whose nodes are the samples?). {again} was solved "
                "once more as one system, as later batches will be: one stop for all, and no "
                "sample frozen before. Pass per_sample=False to say so in advance.",
                UserWarning,
            )
        elif suspect:
            warn(
                "fpi_cuda: g can't be given a part of the batch (does it capture a tensor with the "
                "batch dimension?), so finished samples are frozen but stay in the batch given to "
                "it. Pass such tensors as inputs.",
                UserWarning,
            )


class _Kind:
    """One kind of g: what is known for each of the details that it was met with."""

    def __init__(self) -> None:
        self.met = 0
        self.details: dict[Any, Samples] = {}
        self.later = Samples()  # of details beyond the first ones

    def new(self, details: Any) -> Samples:
        """For details not met before.

        Where they change all the time, they are either all coupled, or all looked at as one.
        """
        self.met += 1
        if len(self.details) >= DETAILS:
            oldest = next(iter(self.details))
            del self.details[oldest]
            _known.pop(oldest, None)
        samples = Samples()
        if self.met > FIRST:
            coupled = [other.coupled for other in self.details.values()]
            samples = Samples(coupled=all(coupled)) if True in coupled else self.later
        _known[details] = self.details[details] = samples
        return samples


PERIOD = 61  # a prime: else a loop of as many steps would always be looked at in the same one
KINDS, DETAILS = 256, 64  # and details of a kind, that are kept; the oldest goes first
FIRST = 16  # details of a kind that are each looked at from their first solve on
INDEPENDENT = Samples(compactable=True, certain=True)
TOGETHER = Samples(compactable=False, certain=True)  # independent, but g takes the whole batch only
COUPLED = Samples(coupled=True, certain=True)

_known: dict[Any, Samples] = {}  # by kind and details
_kinds: dict[Any, _Kind] = {}
_lock = threading.Lock()


def samples_of(setting: bool | str, map: UserMap, x0: Tensor, together: bool = False) -> Samples:
    """What is known of the samples of x0, [B, ...].

    Args:
        setting: `fixed_point`'s per_sample.
        map: the map.
        x0: where the solve starts.
        together: whether g can't be given a part of the batch, whatever it makes of it.
    """
    if setting is False:
        return COUPLED
    b, values = x0.size(0), x0.numel()
    if setting is True or b < 2 or not values or structured(map.g):
        return TOGETHER if together else INDEPENDENT
    found: list[Any] = [b.bit_length(), values // b, x0.dtype]
    given = map.g if map.arguments is None else (map.g, map.arguments.plain)
    kind = look(given, map.binding.objects if map.binding else (), found)
    kind.append(together)
    found.append(together)
    details = tuple(found)
    known = _known.get(details)
    if known is None:
        with _lock:
            known = _kind(tuple(kind)).new(details)
    if together:
        known.compactable = False
    return known


def _kind(kind: Any) -> _Kind:
    if len(_kinds) >= KINDS and kind not in _kinds:
        for details in _kinds.pop(next(iter(_kinds))).details:
            _known.pop(details, None)
    return _kinds.setdefault(kind, _Kind())


def agree(part: Tensor, whole: Tensor, dtype: torch.dtype, roundings: int) -> Tensor:
    """Bool [B]: which rows of g's values are the same but for the rounding of a dtype.

    roundings: how many eps of it a half type may differ by. A library's GEMM or convolution has
    other last bits in another batch. Rows that hold NaN or Inf say nothing, and count as the same.
    """
    eps = max(torch.finfo(part.dtype).eps, torch.finfo(dtype).eps)
    slack = (roundings if eps > 1e-5 else 256) * eps
    part, whole = (t.reshape(len(t), -1) for t in (part, whole))
    return ~(row_norms(part - whole) > slack * row_norms(whole))
