"""What a call of a layer is given, as flat tensors and a constant that says where they belong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import Tolerance

__all__ = ["Unknown", "another", "registered", "taken", "together"]

# The first of a pair says what the second is.
_TENSOR, _WHOLE, _REAL, _VALUE, _TUPLE, _LIST, _DICT, _TOLERANCE = range(8)
_VALUES = (type(None), bool, str)

_known: dict[Any, int] = {}
_specs: list[Any] = []
_calls = itertools.count()


class Unknown(Exception):
    """A value that an operator can't be given."""


def taken(
    value: Any, tensors: list[Tensor], whole: list[int], real: list[Tensor]
) -> tuple[int, Any]:
    """Append the tensors in a value and its numbers to the lists; say what it is made of.

    Numbers are apart, so that another one need not be another graph. The compiler traces this: it
    holds to plain loops.

    Raises:
        Unknown: there is something else in it.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return _TENSOR, len(tensors) - 1
    if isinstance(value, _VALUES):
        return _VALUE, value
    if isinstance(value, (int, torch.SymInt)) and -(2**63) <= value < 2**63:
        whole.append(value)  # type: ignore[arg-type]
        return _WHOLE, len(whole) - 1
    if isinstance(value, (float, torch.SymFloat)):
        # As a tensor, by a product: of all ways this one has no number in the graph.
        real.append(torch.ones((), dtype=torch.float64, device="cpu") * value)  # type: ignore[operator]
        return _REAL, len(real) - 1
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        kind = _TUPLE if type(value) is tuple else _LIST
        return kind, tuple([taken(v, tensors, whole, real) for v in value])
    if isinstance(value, dict) and type(value) is dict:
        parts = []
        for k, v in value.items():
            if not isinstance(k, str):
                raise Unknown
            parts.append((k, taken(v, tensors, whole, real)))
        return _DICT, tuple(parts)
    if isinstance(value, Tolerance) and type(value) is Tolerance:
        return _TOLERANCE, taken((value.rtol, value.atol), tensors, whole, real)
    raise Unknown


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def registered(spec: Any) -> int:
    """The number of what `taken` returned, for `together`."""
    number = _known.get(spec)
    if number is None:
        number = _known[spec] = len(_specs)
        _specs.append(spec)
    return number


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def another() -> int:
    """Another number for each call in a graph.

    The compiler makes one of two equal calls of an operator: g may be random, or change by itself.
    """
    return next(_calls)


def together(
    number: int, tensors: Sequence[Tensor], whole: Sequence[int], real: Sequence[Tensor]
) -> Any:
    """The value that `taken` took apart, with these tensors and numbers in it."""
    return _together(_specs[number], tensors, whole, real)


def _together(
    spec: tuple[int, Any], tensors: Sequence[Tensor], whole: Sequence[int], real: Sequence[Tensor]
) -> Any:
    kind, of = spec
    if kind == _TENSOR:
        return tensors[of]
    if kind == _WHOLE:
        return whole[of]
    if kind == _REAL:
        return real[of].item()
    if kind == _VALUE:
        return of
    if kind == _DICT:
        return {k: _together(v, tensors, whole, real) for k, v in of}
    if kind == _TOLERANCE:
        return Tolerance(*_together(of, tensors, whole, real))
    make: Callable[..., Any] = tuple if kind == _TUPLE else list
    return make(_together(v, tensors, whole, real) for v in of)
