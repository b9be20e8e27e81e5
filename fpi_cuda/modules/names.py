"""What a function can reach that it does not take as an argument, and under which names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Set
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .. import _torch
from .search import OF_ANY_MODULE, global_names, is_object

__all__ = ["leads_to", "reached", "tensors_reached"]

_DEPTH, _SHOWN, _ITEMS = 5, 3, 64


def reached(f: Any, wanted: Callable[[Tensor], bool]) -> str:
    """Such tensors, for a message: " (w of shape (3, 3))", or "" where none is found.

    Args:
        f: a function, method, partial, module or object.
        wanted: which tensors are meant.
    """
    found: dict[int, str] = {}
    for name, t in _tensors(f, "", _DEPTH, set()):
        if wanted(t) and len(found) < _SHOWN:
            found.setdefault(id(t), f"{name} of shape {tuple(t.shape)}")
    return f" ({' or '.join(found.values())})" if found else ""


def leads_to(f: Any, ids: Set[int]) -> bool:
    """Whether one of the objects with these ids is f or reached from it, a closure's cells too.

    Parameters and buffers are not.
    """
    stack, seen = [f], set()
    while stack:
        o = stack.pop()
        if id(o) in seen:
            continue
        seen.add(id(o))
        if id(o) in ids:
            return True
        if isinstance(o, Tensor):
            continue
        if is_object(o):
            stack += type(o).__mro__  # attributes of the class
        if isinstance(o, nn.Module):
            stack += [_torch.children(o), *(getattr(o, kind) for kind in _torch.FORWARD_HOOKS)]
        if isinstance(o, MethodType):
            stack.append(o.__func__)
        elif isinstance(o, FunctionType):
            stack += o.__closure__ or ()
        stack += [part for _, part in _parts(o)]
    return False


def tensors_reached(f: Any) -> list[Tensor]:
    """These tensors, each once."""
    return list({id(t): t for _, t in _tensors(f, "", _DEPTH, set())}.values())


def _tensors(o: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(o, Tensor):
        yield name, o
    elif depth and id(o) not in seen:
        seen.add(id(o))
        for part, value in _parts(o):
            dotted = f"{name}{part}" if part.startswith("[") or not name else f"{name}.{part}"
            yield from _tensors(value, dotted, depth - 1, seen)


def _parts(o: Any) -> Iterator[tuple[str, Any]]:
    """What an object leads to, and how that is written behind its own name."""
    if isinstance(o, FunctionType):
        code = o.__code__
        for name, cell in zip(code.co_freevars, o.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        names = code.co_varnames[: code.co_argcount]
        defaults = o.__defaults__ or ()
        yield from zip(names[len(names) - len(defaults) :], defaults, strict=True)
        yield from (o.__kwdefaults__ or {}).items()
        yield from ((n, o.__globals__[n]) for n in global_names(code) if n in o.__globals__)
    elif isinstance(o, MethodType):
        yield "self", o.__self__
        yield from _parts(o.__func__)
    elif isinstance(o, functools.partial):
        yield from _parts(o.func)
        yield from ((f"[{i}]", v) for i, v in enumerate(o.args))
        yield from o.keywords.items()
    elif isinstance(o, (list, tuple)):
        yield from ((f"[{i}]", v) for i, v in enumerate(o[:_ITEMS]))
    elif isinstance(o, dict):
        yield from ((f"[{k!r}]", v) for k, v in list(o.items())[:_ITEMS])
    elif isinstance(o, nn.Module):  # whose parameters and buffers are found without a name
        yield from ((n, v) for n, v in vars(o).items() if n not in OF_ANY_MODULE)
        yield from _torch.children(o).items()
    elif is_object(o):
        yield from vars(o).items()
