"""What is known of whether g treats the samples of a batch independently.

Found out once for each kind of g. A kind is g's code with the types of what it captures, so that a
lambda made anew in each call is of one kind, and in detail the modules in it, their modes and plain
values, and the batch's shape.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..forms import structured
from ..solution import warn

__all__ = ["Samples", "agree", "samples_of"]


class Samples:
    """The samples of the batches that one kind of g is given.

    Attributes:
        coupled: whether they depend on each other, so that the batch is one system.
        compactable: whether finished ones may be left out of it; None: not known yet.
        suspect: whether something has happened that is to be looked into after the solve.
        probed: whether g was once given other neighbours, to see whether they matter.
        solves: how many there were, forward and backward.
    """

    def __init__(
        self, *, coupled: bool = False, compactable: bool | None = None, certain: bool = False
    ) -> None:
        self.coupled, self.compactable = coupled, compactable
        self.suspect = self.probed = False
        self._certain = certain
        self.solves = [0, 0]

    def due(self, adjoint: bool, failed: bool) -> bool:
        """Whether a solve that has ended is to be looked at; counts it.

        The first four of each direction, those whose number is a power of two, then every 64th:
        what comes to depend later is seen after 63 more solves at most. And all with failures.
        """
        if self._certain or self.coupled:
            return False
        n = self.solves[adjoint]
        self.solves[adjoint] = n + 1
        seldom = n < 4 or n % PERIOD == 0 or n & (n - 1) == 0
        return seldom or self.suspect or failed

    def learn(self, part: Callable[[], Tensor], whole: Tensor, dtype: torch.dtype | None) -> bool:
        """Compare g on the compacted rows with those rows of g on the whole batch.

        dtype is autocast's: g's products have the rounding of that, whatever the state's.
        """
        try:
            rows = part()
        except Exception:
            self.compactable = False
        else:
            self.compactable = bool(agree(rows, whole, dtype).all())
        self.suspect = not self.compactable
        return self.compactable

    def tell(self, coupled: bool, random: bool) -> None:
        """What was found by looking."""
        suspect, self.suspect = self.suspect, False
        if random:
            warn(
                "fpi_cuda: g gives other values for the same arguments (dropout, noise?), so it "
                "has no fixed point. Call g.eval(), or draw once a solve and pass it as an input.",
                UserWarning,
            )
        elif coupled:
            self.coupled = True
            warn(
                "fpi_cuda: the samples of this batch depend on each other through g (batch norm or "
                "attention across it, or a graph whose nodes are the samples?). It was solved once "
                "more as one system, as later ones will be: one stop for all, and no sample frozen "
                "before. Pass per_sample=False to say so in advance.",
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
        self.solves = [0, 0]  # of all details beyond the first ones
        self.details: dict[Any, Samples] = {}

    def new(self, details: Any) -> Samples:
        """For details not met before; where they change all the time, few are looked at first."""
        self.met += 1
        samples = Samples()
        if len(self.details) >= DETAILS:
            oldest = next(iter(self.details))
            del self.details[oldest]
            _known.pop(oldest, None)
        if self.met > DETAILS:
            samples.coupled = all(other.coupled for other in self.details.values())
            samples.solves = self.solves
        _known[details] = self.details[details] = samples
        return samples


PERIOD = 64
DEPTH = 4  # to which what g captures is followed
KINDS, DETAILS = 256, 64  # and details of a kind, that are kept; the oldest goes first
INDEPENDENT = Samples(compactable=True, certain=True)
COUPLED = Samples(coupled=True, certain=True)

_known: dict[Any, Samples] = {}  # by kind and details
_kinds: dict[Any, _Kind] = {}
_lock = threading.Lock()


def samples_of(setting: bool | str, g: Any, x0: Tensor) -> Samples:
    """What is known of the samples of x0, [B, ...]; setting: `fixed_point`'s per_sample."""
    if setting is False:
        return COUPLED
    shape = x0.shape
    if setting is True or shape[0] < 2 or 0 in shape or structured(g):
        return INDEPENDENT
    parts: list[Any] = [shape[0].bit_length(), shape[1:], x0.dtype]
    _look(g, parts, parts, DEPTH)
    details = tuple(parts)
    known = _known.get(details)
    if known is None:
        with _lock:
            known = _kind_of(g).new(details)
    return known


def _kind_of(g: Any) -> _Kind:
    kind: list[Any] = []
    _look(g, kind, [], DEPTH)
    if len(_kinds) >= KINDS and tuple(kind) not in _kinds:
        for details in _kinds.pop(next(iter(_kinds))).details:
            _known.pop(details, None)
    return _kinds.setdefault(tuple(kind), _Kind())


_PLAIN = frozenset({bool, int, float, str, type(None)})


def _look(o: Any, kind: list[Any], details: list[Any], depth: int) -> None:
    """Add what o is: its code and types to kind, values and modules to details."""
    of = type(o)
    if of in _PLAIN:
        details.append(o)
        return
    parts: Sequence[Any] = ()
    if of is FunctionType:
        kind.append(o.__code__)
        if o.__closure__ or o.__defaults__:
            parts = (*(o.__defaults__ or ()), *map(_content, o.__closure__ or ()))
    elif isinstance(o, nn.Module):
        kind.append(of)
        details.append(id(o))
        for m in o.modules():
            details.extend([v for v in vars(m).values() if type(v) in _PLAIN])
    else:
        kind.append(of)
        parts = _parts(o, of)
        if depth == DEPTH and not parts:  # g itself, an object that can be called
            details.append(id(o))
    if depth:
        for part in parts:
            _look(part, kind, details, depth - 1)


def _parts(o: Any, of: type) -> Sequence[Any]:
    if of is MethodType:
        return o.__func__, o.__self__
    if of is functools.partial:
        return o.func, *o.args, *o.keywords.values()
    return o[:16] if of in (tuple, list) else ()


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def agree(part: Tensor, whole: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Bool [B]: which rows of g's values are the same but for a library's rounding.

    dtype is autocast's, or None. A library's GEMM or convolution has other last bits in another
    batch. Rows that hold NaN or Inf say nothing, and count as the same.
    """
    eps = max(torch.finfo(part.dtype).eps, torch.finfo(dtype or part.dtype).eps)
    slack = (16 if eps > 1e-5 else 256) * eps
    part, whole = (t.reshape(len(t), -1) for t in (part, whole))
    return ~(norm_of(part - whole) > slack * norm_of(whole))


def norm_of(rows: Tensor) -> Tensor:
    """[B] in float64: the norm of each row, [B, N]; no square over- or underflows."""
    if rows.dtype != torch.float64:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)  # type: ignore[no-any-return]
    largest = rows.abs().amax(1)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    norm: Tensor = torch.linalg.vector_norm(rows / unit[:, None], dim=1) * unit
    return norm
