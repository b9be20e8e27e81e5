"""Structural clones: new objects around the same tensors and values."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .. import _torch, _torch_graphs
from .search import OF_ANY_MODULE, Found, global_names, unwraps

__all__ = ["clone", "freeze_parametrizations"]

Memo = dict[int, Any]  # clones by the ids of what they are of
COPIES = 0  # under which a memo has those of lists and dicts alone
WRITTEN_TO = frozenset({list, dict})
LONGEST = 1000  # of those that are copied


def clone(value: Any, found: Found, memo: Memo) -> Any:
    """The value with clones in the place of what was found in it."""
    key = id(value)
    if key not in found:
        return value
    if key in memo:
        return memo[key]
    if isinstance(value, nn.Module):
        return _module(value, found, memo)

    def again(part: Any) -> Any:
        return clone(part, found, memo)

    new: Any
    if isinstance(value, CellType):
        new = memo[key] = CellType()
        new.cell_contents = again(value.cell_contents)
    elif isinstance(value, FunctionType):
        if _torch_graphs.compiled_function(value):
            new = again(_torch_graphs.before_compile(value))
        else:
            closure = tuple(_cell(c, found, memo) for c in value.__closure__ or ())
            if key in memo:  # a function that calls itself
                return memo[key]
            new = memo[key] = _function(value, closure or None, found, memo)
            new.__defaults__ = value.__defaults__ and tuple(map(again, value.__defaults__))
            if value.__kwdefaults__:
                new.__kwdefaults__ = {n: again(v) for n, v in value.__kwdefaults__.items()}
    elif isinstance(value, MethodType):
        new = MethodType(again(value.__func__), again(value.__self__))
    elif isinstance(value, functools.partial):
        keywords = {n: again(v) for n, v in value.keywords.items()}
        new = functools.partial(again(value.func), *map(again, value.args), **keywords)
    elif isinstance(value, tuple):
        new = tuple.__new__(type(value), map(again, value))
    elif isinstance(value, list):
        new = _copied(value, memo)
        _replace(new, found, memo)
    elif isinstance(value, (dict, WeakKeyDictionary)):
        new = _copied(value, memo)
        new.clear()
        new.update((again(k), again(v)) for k, v in value.items())
    elif isinstance(value, (set, frozenset)):
        new = type(value)(map(again, value))
    else:
        new = memo[key] = object.__new__(type(value))
        new.__dict__.update(vars(value))
        _own_containers(vars(new), found, memo)
        _replace(vars(new), found, memo)
    memo[key] = new
    return new


def _own_containers(own: dict[str, Any], found: Found, memo: Memo) -> None:
    """Copies of the lists and dicts among the attributes of a clone.

    g may keep there what it makes of its tensors: each bind's are others.
    """
    for name, v in own.items():
        written_to = type(v) in WRITTEN_TO and name not in OF_ANY_MODULE
        if written_to and len(v) <= LONGEST and id(v) not in found:
            own[name] = _copied(v, memo)


def _cell(cell: CellType, found: Found, memo: Memo) -> CellType:
    """Likewise what a function closes over."""
    if id(cell) in found:
        return clone(cell, found, memo)  # type: ignore[no-any-return]
    try:
        v = cell.cell_contents
    except ValueError:  # not assigned yet
        return cell
    if type(v) in WRITTEN_TO and len(v) <= LONGEST and id(cell) not in memo:
        memo[id(cell)] = CellType(_copied(v, memo))
    return memo.get(id(cell), cell)  # type: ignore[no-any-return]


def _copied(v: Any, memo: Memo) -> Any:
    if id(v) not in memo:
        memo[id(v)] = copy.copy(v)
        if type(v) in WRITTEN_TO:
            memo.setdefault(COPIES, {})[id(v)] = memo[id(v)]
    return memo[id(v)]


def _module(m: nn.Module, found: Found, memo: Memo) -> nn.Module:
    if unwraps(m):
        memo[id(m)] = unwrapped = clone(_torch_graphs.within_compiled(m), found, memo)
        return unwrapped  # type: ignore[no-any-return]
    new: nn.Module = object.__new__(type(m))
    memo[id(m)] = new
    own = new.__dict__
    own.update(m.__dict__)
    if type(m).__basicsize__ != nn.Module.__basicsize__:
        for name in _slots(type(m)):
            if hasattr(m, name):
                setattr(new, name, getattr(m, name))
    for name in (_torch.PARAMETERS, _torch.BUFFERS):
        own[name] = own[name].copy()
    if own[_torch.CHILDREN]:
        own[_torch.CHILDREN] = own[_torch.CHILDREN].copy()
        _replace(own[_torch.CHILDREN], found, memo)
    if own[_torch.PRE_HOOKS]:
        for name in _torch.FORWARD_HOOKS:
            hooks = own[name].items()
            own[name] = OrderedDict((k, f) for k, f in hooks if not _torch.of_fsdp(f))
    if not found[id(m)][1]:
        for name in _torch.FORWARD_HOOKS:
            own[name] = own[name].copy()
            _replace(own[name], found, memo)
        _own_containers(own, found, memo)
        _replace(own, found, memo)
    return new


def _slots(cls: type) -> list[str]:
    given = [vars(c).get("__slots__", ()) for c in cls.__mro__]
    return [n for one in given for n in ((one,) if isinstance(one, str) else one)]


def _function(
    f: FunctionType, closure: tuple[CellType, ...] | None, found: Found, memo: Memo
) -> FunctionType:
    scope, names = f.__globals__, global_names(f.__code__)
    held = [name for name in names if id(scope.get(name)) in found]
    new = FunctionType(f.__code__, _Globals(scope) if held else scope, f.__name__, None, closure)
    new.__qualname__ = f.__qualname__
    new.__dict__.update(vars(f))
    memo[id(f)] = new
    for name in names if held else ():
        v: Any = scope.get(name)
        if name in held or isinstance(v, ModuleType):  # Python's own: found faster
            new.__globals__[name] = clone(v, found, memo)
        elif type(v) in WRITTEN_TO and len(v) <= LONGEST:
            new.__globals__[name] = _copied(v, memo)
    return new


# What Python's own code asks a function's globals for.
_OF_A_FILE = (
    *("__name__", "__builtins__", "__package__", "__spec__", "__path__", "__file__"),
    "__warningregistry__",
)


class _Globals(dict[str, Any]):
    """Globals of which some are others; the rest is looked up where it is, which may change."""

    def __init__(self, others: dict[str, Any]) -> None:
        others.setdefault("__warningregistry__", {})
        super().__init__({n: others[n] for n in _OF_A_FILE if n in others})
        self._others = others

    def __missing__(self, name: str) -> Any:
        return self._others[name]


def _replace(items: Any, found: Found, memo: Memo) -> None:
    for at, v in items.items() if isinstance(items, dict) else enumerate(items):
        if id(v) in found:
            items[at] = clone(v, found, memo)


def freeze_parametrizations(module: nn.Module) -> None:
    """Replace computed tensors (spectral norm, weight norm) by their value, differentiably."""
    if "parametrizations" in _torch.children(module):
        names = list(module.parametrizations.keys())  # type: ignore[operator, union-attr]
        values = {name: getattr(module, name) for name in names}
        module.__class__ = type(module).__bases__[0]  # the class before it was parametrised
        del _torch.children(module)["parametrizations"]
        _torch.parameters(module).update(values)
    for key, hook in list(_torch.pre_hooks(module).items()):
        if _torch.computes_weight(hook):
            hook(module, ())
            del _torch.pre_hooks(module)[key]
