"""Which modules g can be seen to call, and what leads to them.

The search goes through functions (what they close over, their defaults, the globals that they read,
what torch.compile wrapped), bound methods, functools.partial, lists, tuples and dicts, hooks,
attributes of modules, and objects of plain Python classes that code holds or that can be called.
Where code only looks up attributes of an object, as in `lambda x: self.net(x)`, those are what
counts of it.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence, Set
from itertools import pairwise
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple
from weakref import CallableProxyType, ProxyType, WeakKeyDictionary

from torch import Tensor, nn

from .. import _torch, _torch_graphs

__all__ = [
    "OF_ANY_MODULE",
    "Found",
    "find",
    "global_names",
    "is_object",
    "keeps_all_in_dict",
    "unwraps",
]


# What was found, by ids: a module or what leads to one, and whether it is a module that leads to
# others by its children alone.
Found = dict[int, tuple[Any, bool]]

_LEAVES = frozenset({type(None), bool, int, float, str, Tensor, nn.Parameter})
OF_ANY_MODULE = frozenset(nn.Module().__dict__)
_FIRST, *_, _LAST = nn.Module().__dict__
_OWN = len(OF_ANY_MODULE)
_CODE = frozenset({ModuleType, BuiltinFunctionType, type})
_ROOM = 3  # of so many containers and objects within one another, from code on, each is looked into
_MOST_ITEMS = 64  # of such a container: data has more
_DEEPEST = 60  # what leads to what leads to what ...
_CONTAINERS = frozenset(
    {list, tuple, set, frozenset, dict, OrderedDict, defaultdict, WeakKeyDictionary}
)
_FINDS_OWN = nn.Module.__getattr__
_LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL")
_PROXIES = (ProxyType, CallableProxyType)  # isinstance sees through them
_Part = tuple[Any, int, Set[str] | None]  # a value, the room in it, the names that count of it


def find(g: Any) -> Found:
    """The modules that g calls, and all that leads to them."""
    if not isinstance(g, nn.Module):
        values = type(g) is not FunctionType and _holds_values(g)
        if values or not _inside(g, _ROOM, None):
            return {}
    state = _State({}, {}, set())
    _visit(g, 0, _ROOM, None, state)
    found, holders, _ = state
    held = {key for key, (v, plain) in found.items() if plain or isinstance(v, nn.Module)}
    if len(held) == len(found):
        return found
    stack = list(held)
    while stack:
        for holder in holders.get(stack.pop(), ()):
            if holder not in held:
                held.add(holder)
                stack.append(holder)
    return {key: kept for key, kept in found.items() if key in held}


def _holds_values(g: Any) -> bool:
    """Whether g is an object of numbers, strings and tensors alone: seen without a search."""
    kept = keeps_all_in_dict(type(g))
    return kept and all(type(v) in _LEAVES for v in vars(g).values())


def unwraps(m: nn.Module) -> bool:
    """Whether m is torch.compile's wrapper and no more: what it wraps may be a known layer."""
    return _torch_graphs.compiled_module(m) and not _torch.hooked(m, _torch.FORWARD_HOOKS)


@functools.lru_cache(maxsize=4096)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The globals that code reads, with the code in it; none where it sets globals too."""
    names: dict[str, None] = {}
    for this in dis.get_instructions(code):
        if this.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return ()
        if this.opname == "LOAD_GLOBAL":
            names[this.argval] = None
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names.update(dict.fromkeys(global_names(inner)))
    return tuple(names)


class _State(NamedTuple):
    found: Found
    holders: dict[int, list[int]]  # what leads to it and is no module
    whole: set[int]  # looked through, and not only for some names


def _visit(
    value: Any, holder: int, room: int, names: Set[str] | None, state: _State, depth: int = 0
) -> None:
    found, holders, whole = state
    key = id(value)
    if holder:
        holders.setdefault(key, []).append(holder)
    if key in whole or depth > _DEEPEST or type(value) in _PROXIES:
        return
    if isinstance(value, nn.Module):
        if names is None and _runs_elsewhere(value):
            return
        parts = _beside_children(value) if names is None else _named(value, names)
        found[key] = value, names is None and not parts
        if names is None:
            whole.add(key)
            for child in _torch.children(value).values():
                if child is not None:
                    _visit(child, 0, _ROOM, None, state, depth + 1)
        key = 0  # a module is found whatever it leads to
    else:
        inside = _inside(value, room, names)
        if inside is None:
            return
        parts = inside
        found[key] = value, False
        if names is None:
            whole.add(key)
    for part, left, its_names in parts:
        if type(part) not in _LEAVES:
            _visit(part, key, left, its_names, state, depth + 1)


def _beside_children(m: nn.Module) -> list[_Part]:
    own = m.__dict__
    parts: list[_Part] = [
        (v, _ROOM - 1, None)
        for _, v in _attributes(m)
        # Sizes (of a kernel, of what is normalised) make up most of the tuples.
        if not (type(v) in _LEAVES or (type(v) is tuple and _LEAVES.issuperset(map(type, v))))
    ]
    for kind in _torch.FORWARD_HOOKS:
        if own[kind]:
            hooks = own[kind].values()
            parts += [(hook, _ROOM, None) for hook in hooks if not _torch.of_fsdp(hook)]
    return parts


def _attributes(m: nn.Module) -> list[tuple[str, Any]]:
    """A module's attributes but those that any module has, which come first in its dict."""
    items = list(m.__dict__.items())  # another thread may set one
    if len(items) >= _OWN and items[_OWN - 1][0] == _LAST and items[0][0] == _FIRST:
        return items[_OWN:]
    return [(name, v) for name, v in items if name not in OF_ANY_MODULE]


def _named(value: Any, names: Set[str]) -> list[_Part]:
    own = vars(value)
    children = _torch.children(value) if isinstance(value, nn.Module) else {}
    return [(children.get(n, own.get(n)), _ROOM, None) for n in sorted(names)]


def _inside(value: Any, room: int, names: Set[str] | None) -> list[_Part] | None:
    """What is looked at in a value that is no module; None: it is not looked into."""
    parts: list[_Part]
    if isinstance(value, FunctionType):
        if _torch_graphs.compiled_function(value):
            return [(_torch_graphs.before_compile(value), _ROOM, None)]
        parts = [(v, _ROOM, None) for v in value.__defaults__ or ()]
        if value.__kwdefaults__:
            parts += [(v, _ROOM, None) for v in value.__kwdefaults__.values()]
        if value.__closure__:
            code = value.__code__
            for name, cell in zip(code.co_freevars, value.__closure__, strict=True):
                contents = _contents(cell)
                if type(contents) not in _LEAVES:
                    parts.append((cell, _ROOM, _counting(code, name, contents)))
        if value.__code__.co_names and (read := global_names(value.__code__)):
            scope = value.__globals__
            if not _of_library(scope.get("__name__")):
                parts += _globals(value.__code__, read, scope)
        return parts
    if isinstance(value, CellType):
        return [(_contents(value), _ROOM, names)]
    if isinstance(value, MethodType):
        f, owner, counting = value.__func__, value.__self__, None
        if isinstance(f, FunctionType) and f.__code__.co_argcount:
            counting = _counting(f.__code__, f.__code__.co_varnames[0], owner)
        return [(f, _ROOM, None), (owner, _ROOM, counting)]
    if isinstance(value, functools.partial):
        return [(v, _ROOM, None) for v in (value.func, *value.args, *value.keywords.values())]
    if is_container(value):
        if not room or len(value) > _MOST_ITEMS:
            return None
        items = [v for v in value if isinstance(v, nn.Module)] if hasattr(value, "keys") else value
        items = [*items, *(value.values() if hasattr(value, "keys") else ())]
        return [(v, room - 1, None) for v in items]
    cls = type(value)
    if not room or not keeps_all_in_dict(cls) or _keeps_to_itself(cls):
        return None
    call = cls.__call__ if callable(value) else None
    if names is None and isinstance(call, FunctionType) and call.__code__.co_argcount:
        names = _counting(call.__code__, call.__code__.co_varnames[0], value)
    if names is not None:
        return _named(value, names)
    if room == _ROOM or call:
        return [(v, _ROOM - 1, None) for v in list(vars(value).values())]
    return None


def _globals(code: CodeType, read: Sequence[str], scope: dict[str, Any]) -> Iterator[_Part]:
    for name in read:
        v = scope.get(name)
        # Of functions those that stand beside it: not what it imported.
        beside = not isinstance(v, FunctionType) or v.__globals__ is scope
        if type(v) not in _CODE and type(v) not in _LEAVES and beside:
            yield v, _ROOM, _counting(code, name, v)


def _runs_elsewhere(m: nn.Module) -> bool:
    """Whether a module does not compute with the tensors that it holds in Python.

    That is so of torch.jit's; and FullyShardedDataParallel gathers its parameters while it runs.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import
    return isinstance(m, _torch_graphs.ScriptModule) or (
        fsdp is not None and isinstance(m, fsdp.FullyShardedDataParallel)
    )


def _keeps_to_itself(cls: type) -> bool:
    """Whether objects of a class are never cloned: a library's, or such as act when they die."""
    return _of_library(cls.__module__) or hasattr(cls, "__del__")


def _of_library(module: Any) -> bool:
    top = module.partition(".")[0] if isinstance(module, str) else ""
    return top == "torch" or top in sys.stdlib_module_names


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


# It goes with the class, which may hold what was made of it.
_LOOKED_UP: WeakKeyDictionary[type, dict[tuple[CodeType, str], Set[str] | None]] = (
    WeakKeyDictionary()
)


def _counting(code: CodeType, name: str, value: Any) -> Set[str] | None:
    """The attributes of a value that count where code knows it by this name; None: all."""
    cls = type(value)
    if not is_object(value) or getattr(cls, "__getattr__", _FINDS_OWN) is not _FINDS_OWN:
        return None
    known = _LOOKED_UP.setdefault(cls, {})
    if (code, name) not in known:
        known[code, name] = _looked_up(code, name, cls)
    return known[code, name]


def _looked_up(code: CodeType, name: str, cls: type) -> Set[str] | None:
    """Attributes that code looks up of a variable that holds a cls; None: it does more with it."""
    found: set[str] = set()
    stack, done = [(code, name)], set()
    while stack:
        code, name = at = stack.pop()
        if at in done:
            continue
        done.add(at)
        for this, after in pairwise(dis.get_instructions(code)):
            of_variable = this.opcode in dis.haslocal or this.opcode in dis.hasfree
            if not of_variable and this.opname != "LOAD_GLOBAL":
                continue
            if this.argval != name and not (isinstance(this.argval, tuple) and name in this.argval):
                continue
            if this.opname in ("MAKE_CELL", "LOAD_CLOSURE"):  # for code within, which follows
                continue
            loads = this.argval == name and this.opname.startswith(_LOADS)
            if loads and after.opname == "STORE_ATTR":
                continue
            if not loads or after.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                return None
            attribute = after.argval
            found.add(attribute)
            member = next((vars(c)[attribute] for c in cls.__mro__ if attribute in vars(c)), None)
            if isinstance(member, property):
                member = member.fget
            if isinstance(member, FunctionType) and member.__code__.co_argcount:
                stack.append((member.__code__, member.__code__.co_varnames[0]))
            elif callable(member):
                return None
        stack += [
            (inner, name)
            for inner in code.co_consts
            if isinstance(inner, CodeType)
            and (name in inner.co_freevars or name in global_names(inner))
        ]
    return frozenset(found)


def is_container(value: Any) -> bool:
    """Whether it is a list, tuple, set or dict that can be made anew from its items."""
    return type(value) in _CONTAINERS or (isinstance(value, tuple) and hasattr(value, "_fields"))


def is_object(value: Any) -> bool:
    """Whether it is a module, or another object that is its attributes and no more."""
    return isinstance(value, nn.Module) or keeps_all_in_dict(type(value))


class _Plain:
    pass


def keeps_all_in_dict(cls: type) -> bool:
    """Whether a class statement made it, without slots, and no class written in C is a base."""
    made = bool(cls.__flags__ & 1 << 9)  # on the heap
    return made and _layout(cls) == _PLAIN


def _layout(cls: type) -> tuple[int, ...]:
    return cls.__basicsize__, cls.__itemsize__, cls.__dictoffset__, cls.__weakrefoffset__


_PLAIN = _layout(_Plain)
