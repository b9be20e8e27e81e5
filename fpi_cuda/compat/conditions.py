"""When the old layer's loop stops, and what of it a stop for each sample can take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ..options import MOST, Tolerance

__all__ = ["NO_LIMIT", "Condition", "Tensors", "Terms", "default_term_cond", "read"]

Tensors = tuple[Tensor, ...]
Condition = Callable[[int, Tensors, Tensors], bool]

NO_LIMIT = 10_000  # evaluations of g where a condition that is read sets no limit
_COUNTS = (1, 2, 3, 10, 100, 10_000)  # at which a condition is read


def default_term_cond(
    cnt: int,
    x: Sequence[Tensor],
    px: Sequence[Tensor],
    threshold: float = 1e-10,
    epsilon: float = 1e-30,
    normalized: bool = True,
    display: int = 0,
    minIter: int = 0,
    maxIter: int = 0,
) -> bool:
    """Whether to keep going: ‖x₀ − px₀‖² / (‖px₀‖² + epsilon) > threshold, first tensors whole.

    The norms are squared and over the batch: the relative change allowed is √threshold.

    Args:
        cnt: 1 at the first comparison, which is after the second evaluation of g.
        x: the newest state; only its first tensor counts.
        px: the state before it.
        threshold: bound on the squared change.
        epsilon: keeps the quotient finite where px is zero.
        normalized: False compares ‖x₀ − px₀‖² with the threshold itself.
        display: print the change at every display-th count; 0: never.
        minIter: keep going while the count is not above this.
        maxIter: stop at this count, after maxIter + 1 evaluations of g; 0: no limit.

    Returns:
        True to keep going; False where the change is NaN.
    """
    if isinstance(x, _Probe):
        terms = Terms(float(threshold), float(epsilon), bool(normalized), float(maxIter))
        return x.noted(cnt, px, terms)
    with torch.no_grad():
        change = _squared_change(x[0], px[0], epsilon, normalized)
    if display and cnt % display == 0:
        print(f"iteration {cnt}: squared change {change:.3e}")
    if math.isnan(change) or 0 < maxIter <= cnt:
        return False
    return cnt <= minIter or change > threshold


def _squared_change(new: Tensor, old: Tensor, epsilon: float, normalized: bool) -> float:
    """By norms in the state's dtype, as they were; scaled and wider where one overflows there.

    Likewise where one underflows, unless epsilon hides it, as the default does.
    """
    change, size = float(vector_norm(new - old)), float(vector_norm(old)) if normalized else 0.0
    unit = 1.0
    low = normalized and epsilon < _HIDES and min(change, size) < _least(new.dtype)
    if low or not math.isfinite(change + size):
        new, old = new.double(), old.double()
        unit = _largest(new, old) or 1.0
        if not math.isfinite(unit):
            return math.nan
        new, old = new / unit, old / unit
        moved = new - old
        scale = _largest(moved) or 1.0  # next to the state it may be as small as a float goes
        change, size = float(vector_norm(moved / scale)) * scale, float(vector_norm(old))
    if not normalized:
        return change * unit * change * unit
    size = size * size + epsilon / unit / unit
    return change * change / size if size else math.inf if change else 0.0


_HIDES = 1e-30  # an epsilon beside which squares that underflow in float32 are nothing


def _least(dtype: torch.dtype) -> float:
    """Norms above lost nothing to squares that underflow: in float32, or float64."""
    return 1e-145 if dtype == torch.float64 else 1e-15


def _largest(*tensors: Tensor) -> float:
    """The magnitude of the largest entry of all; 0 where there is none."""
    return max((float(t.abs().amax()) for t in tensors if t.numel()), default=0.0)


class Terms(NamedTuple):
    """What `default_term_cond` was asked to stop by."""

    threshold: float
    epsilon: float
    normalized: bool
    max_iter: float

    def tolerance(self, values: int) -> Tolerance:
        """For each sample, so that a batch of so many values meets the condition when all do."""
        limit = math.sqrt(self.threshold)
        if not self.normalized:
            return Tolerance(0, limit / math.sqrt(values))
        return Tolerance(limit, limit * math.sqrt(self.epsilon / values))

    @property
    def max_iterations(self) -> int:
        """Evaluations of g."""
        if not self.max_iter > 0:
            return NO_LIMIT
        return min(math.ceil(min(self.max_iter, MOST)) + 1, MOST)


def read(name: str, cond: Any) -> Terms:
    """What a condition that hands on to `default_term_cond` stops by.

    It is called with an object in place of x that `default_term_cond` knows, and which notes what
    else it was given. The condition is that one if it returns the very object that it got back,
    whatever the count, and whether that object counts as true or as false.

    Raises:
        ValueError: it can't be read.
    """
    found = set()
    for probe in (_Probe(count, true) for count in _COUNTS for true in (True, False)):
        try:
            value = cond(probe.count, probe, probe.before)
        except Exception as error:
            what = f"it raised {type(error).__name__} where it was called without a state"
            raise _unreadable(name, cond, what) from error
        if value is not probe.answer:
            what = f"at count {probe.count} its value is not what default_term_cond says"
            raise _unreadable(name, cond, what)
        found.add(probe.terms)
    if len(found) > 1:
        raise _unreadable(name, cond, "what it gives default_term_cond changes from call to call")
    (terms,) = found
    assert terms is not None
    if not (0 <= terms.threshold < math.inf and 0 <= terms.epsilon < math.inf):
        raise ValueError(
            f"compat: with accelerate=True the threshold and the epsilon of {name} must be finite "
            f"numbers >= 0 (got {terms.threshold} and {terms.epsilon})"
        )
    return terms


def _unreadable(name: str, cond: Any, what: str) -> ValueError:
    return ValueError(
        f"compat: accelerate=True stops each sample by itself, at a tolerance that it reads from "
        f"{name}; this one can't be read: {what} (got {cond!r}). Give default_term_cond, "
        "functools.partial(default_term_cond, threshold=...) or a function that returns "
        "default_term_cond(count, x, px, ...) as it is; or leave accelerate out; or use "
        "fpi_cuda.fixed_point with Tolerance(...)"
    )


class _Answer:
    """Stands for a condition's True or False."""

    def __init__(self, true: bool) -> None:
        self.true = true

    def __bool__(self) -> bool:
        return self.true


class _Probe:
    """In place of x in a condition; before: in place of px."""

    def __init__(self, count: int, true: bool) -> None:
        self.count, self.answer, self.before = count, _Answer(true), object()
        self.terms: Terms | None = None

    def noted(self, cnt: int, px: object, terms: Terms) -> object:
        """What `default_term_cond` returns for this: the answer, unless it was given other things.

        Called twice with different terms, it gives no answer either.
        """
        known = self.terms is None or self.terms == terms
        if cnt != self.count or px is not self.before or not known:
            return object()
        self.terms = terms
        return self.answer
