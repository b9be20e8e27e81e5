"""Which solves are of one kind: what can be seen of g, cheaply enough for every solve.

A kind is g's code with the types of what it captures, so that a lambda made anew in each call is of
one kind. In detail it is also the modules in g, their modes and plain values, and the shape of the
batch. No object is held: classes, code and modules by weak references, tensors by their shapes.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from itertools import islice
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .. import _torch
from ..drivers.kind import reads

__all__ = ["Look"]

DEPTH = 4  # to which what g captures is followed
MOST = 1000  # objects that are looked at
ITEMS = 64  # of a container or an object
LONG = 64  # of a string, above which its hash stands for it

_PLAIN = frozenset({bool, int, float, complex, type(None)})
_PYTHON_CLASS = 1 << 9  # among a class's flags: its objects may have attributes


class Look:
    """One look at g.

    Attributes:
        kind: its code and types.
        details: the kind, and modules and values with it.
    """

    def __init__(self, g: Any, *details: Any) -> None:
        self.kind: list[Any] = []
        self.details: list[Any] = list(details)
        self._left = MOST
        self._at(g, DEPTH)

    def _at(self, o: Any, depth: int) -> None:
        of = type(o)
        self._left -= 1
        if of in _PLAIN:
            self.details.append(o)
        elif of is str:
            self.details.append(o if len(o) < LONG else hash(o))
        elif of is FunctionType:
            self._is(weakref.ref(o.__code__))
            if depth:
                self._all(_read_by(o), depth - 1)
        elif isinstance(o, nn.Module):
            self._is(_ref(of))
            self._module(o)
        elif isinstance(o, Tensor):
            self.details.append(o.shape)
        else:
            self._is(_ref(of))
            if depth:
                self._all(_parts(o, of), depth - 1)

    def _is(self, code_or_type: Any) -> None:
        self.kind.append(code_or_type)
        self.details.append(code_or_type)

    def _all(self, parts: Iterable[Any], depth: int) -> None:
        for part in parts:
            if self._left <= 0:
                return
            self._at(part, depth)

    def _module(self, root: nn.Module) -> None:
        self.details.append(_ref(root))
        stack, met = [root], {id(root)}
        while stack and len(met) < MOST:
            m = stack.pop()
            self.details.extend([v for v in m.__dict__.values() if type(v) in _PLAIN])
            for child in _torch.children(m).values():
                if child is not None and id(child) not in met:
                    met.add(id(child))
                    stack.append(child)
                    self.details.append(id(child))


def _read_by(f: FunctionType) -> list[Any]:
    """What a function reads: its closure, its defaults, and global modules and functions."""
    found = [*map(_content, f.__closure__ or ()), *(f.__defaults__ or ())]
    found.extend((f.__kwdefaults__ or {}).values())
    for name in reads(f.__code__).globals:
        value = f.__globals__.get(name)
        if type(value) is FunctionType or isinstance(value, nn.Module):
            found.append(value)
    return found


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _parts(o: Any, of: type) -> Iterable[Any]:
    if of is MethodType:
        return o.__func__, o.__self__
    if of is functools.partial:
        return o.func, *o.args, *o.keywords.values()
    if of in (tuple, list):
        return list(o[:ITEMS])
    if of is not dict:
        o = getattr(o, "__dict__", None) if of.__flags__ & _PYTHON_CLASS else None
    return list(islice(o.values(), ITEMS)) if type(o) is dict else ()


def _ref(o: Any) -> Any:
    """What stands for a class or a module without keeping it."""
    try:
        ref = weakref.ref(o)
        hash(ref)
    except TypeError:
        return id(o)
    return ref
