"""Which solves are of one kind: what can be seen of g, cheaply enough for every solve.

A kind is g's code with the types of what it captures, so that a lambda made anew in each call is of
one kind. In detail it is also the modules in g, their modes and plain values, and the shape of the
batch. No object is held: classes, code and modules by weak references, tensors by their shapes.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from itertools import islice
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

__all__ = ["look"]

DEPTH = 4  # to which what g captures is followed
MOST = 1000  # details beside those of modules
ITEMS = 8  # of a container, which is not looked into if it has more: a log that grows, say
ATTRIBUTES = 64  # of an object
LONG = 64  # of a string, above which its hash stands for it

_PLAIN = frozenset({bool, int, float, complex, type(None)})
_PYTHON_CLASS = 1 << 9  # among a class's flags: its objects may have attributes


def look(g: Any, objects: Sequence[Any], details: list[Any]) -> list[Any]:
    """The kind of g, its code and types; and with modules and values added to details.

    objects: the modules that g calls, and what leads to some; see `Binding`.
    """
    kind: list[Any] = []
    _at(g, kind, details, DEPTH)
    if objects:
        details.append(_ref(objects[0]))
        details.extend(map(id, objects))
        details.extend([v for o in objects for v in o.__dict__.values() if type(v) in _PLAIN])
    return kind


def _at(o: Any, kind: list[Any], details: list[Any], depth: int) -> None:
    of = type(o)
    if of in _PLAIN:
        details.append(o)
        return
    if of is Tensor:
        details.append(o.shape)
        return
    if of is str:
        details.append(o if len(o) < LONG else hash(o))
        return
    code_or_type = weakref.ref(o.__code__) if of is FunctionType else _ref(of)
    kind.append(code_or_type)
    details.append(code_or_type)
    for part in _parts(o, of) if depth else ():
        if len(details) < MOST:
            _at(part, kind, details, depth - 1)


def _parts(o: Any, of: type) -> Iterable[Any]:
    """What o holds, as far as it may be g's to read."""
    if of is FunctionType:
        if not (o.__closure__ or o.__defaults__ or o.__kwdefaults__):
            return ()
        given = *(o.__defaults__ or ()), *(o.__kwdefaults__ or {}).values()
        return *map(_content, o.__closure__ or ()), *given
    if of is MethodType:
        return o.__func__, o.__self__
    if of is functools.partial:
        return o.func, *o.args, *o.keywords.values()
    if of in (tuple, list, dict):
        values = o.values() if of is dict else o
        return tuple(values) if len(o) <= ITEMS else ()
    if issubclass(of, (nn.Module, Tensor)) or not of.__flags__ & _PYTHON_CLASS:
        return ()
    own = getattr(o, "__dict__", None)
    return tuple(islice(own.values(), ATTRIBUTES)) if type(own) is dict else ()


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _ref(o: Any) -> Any:
    """What stands for a class or a module without keeping it."""
    try:
        ref = weakref.ref(o)
        hash(ref)
    except TypeError:
        return id(o)
    return ref
