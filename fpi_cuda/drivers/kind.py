"""What two solves must agree in to be served by one captured graph.

A graph has built in all that g read in Python when it was captured. So the kind of a solve holds
every value that g can read, as far as that can be followed: numbers, strings, containers, modules,
objects of plain Python classes, functions with their closures, defaults and the globals that they
name. Of classes and Python modules it holds what any of this code names. An object that keeps
something where Python can't see it, an iterator or a lock, may change unnoticed: a g that reads one
is refused.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import logging
import numbers
import os
import re
import sys
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence, Set
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _torch, _torch_graphs
from ..modules import keeps_all_in_dict

__all__ = ["Unseen", "owner_of", "precision", "python_values"]


class Unseen(Exception):
    """g reads what may change without being seen here; the text says what, and what to do."""


def owner_of(g: Any) -> Any:
    """The object with which graphs of g live and die."""
    return g.__self__ if isinstance(g, MethodType) else g


def python_values(g: Any) -> Any:
    """All values that g can read in Python, as one that hashes and compares.

    Raises:
        Unseen: one of them is an object that can't be looked into.
    """
    look = _Look()
    try:
        return look.everything(g)
    except Unseen:
        raise
    except RecursionError:
        raise Unseen(f"{look.place()} is nested too deeply to be looked into; {INSTEAD}") from None
    except Exception as error:  # of the user's own __iter__, say
        reason = f"{type(error).__name__} while the graph driver looked for values that may change"
        raise Unseen(f"{look.place()} raised {reason}; {INSTEAD}") from error


def precision() -> tuple[Any, ...]:
    """Torch's switches that choose kernels."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    matmul = cuda.matmul
    return (
        getattr(torch.backends, "fp32_precision", None),  # where those below are "none"
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        cuda.preferred_blas_library(),
        cuda.preferred_linalg_library(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
        torch.backends.mha.get_fastpath_enabled(),
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )


INSTEAD = (
    "give g its values as numbers, strings or tensors (arguments, or attributes of a module), or "
    'use driver="eager"'
)


class _Two(NamedTuple):
    a: int


MOST_VALUES = 50_000  # that are looked at, once a solve

# Code and names: to change them is to change the program. (A logger computes nothing.)
_CONSTANT = (
    *(range, type(...), type(NotImplemented), CodeType, re.Pattern, PurePath, logging.Logger),
    *(types.GenericAlias, types.UnionType, types.MethodDescriptorType, types.WrapperDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.ClassMethodDescriptorType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(_torch_graphs.ScriptFunction, type(_Two.a)),
)
_EXACT = frozenset({bool, int, bytes, type(None)})
_BASES = (int, float, complex, str, bytes)  # of classes that add attributes to a number or a string
# Classes of objects that are code too, by the modules that define them.
_OPERATORS = _torch.OPERATOR_MODULES | {"triton.runtime.jit", "typing"}
_LIBRARIES = frozenset({"torch", "numpy", "einops", "fpi_cuda"})  # beside Python's own
_OF_ANY_MODULE = frozenset(nn.Module().__dict__)
_CALLED = ("forward", "backward", "setup_context", "__getattr__")  # without being named
_MAKING = frozenset({"__init__", "__new__", "__post_init__"})  # called where a class is
_NOT_CALLED = _MAKING | {
    *("__repr__", "__str__", "__del__", "__init_subclass__", "__set_name__", "__class_getitem__"),
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__"),
    *("__annotate__", "__annotate_func__"),
}
_ENVIRONMENT = frozenset({"environ", "getenv"})
# With these a name need not stand in the code, nor what is read in memory.
_BLIND = frozenset({"eval", "exec", "globals", "open", "__import__", "import_module"})


@functools.lru_cache(maxsize=4096)
def _of_library(module_name: Any) -> bool:
    top = module_name.partition(".")[0] if isinstance(module_name, str) else "__main__"
    if top in _LIBRARIES:
        return True
    file = getattr(sys.modules.get(top), "__file__", None) or ""  # a user's may be called the same
    own = not file or file.startswith(os.path.dirname(os.__file__))
    return own and top in sys.stdlib_module_names and top != "__main__"


class _Reads(NamedTuple):
    """Names that a function's code looks up."""

    globals: frozenset[str]
    attributes: frozenset[str]  # also those in strings, for getattr
    imports: frozenset[str]


@functools.lru_cache(maxsize=4096)
def _reads(code: CodeType) -> _Reads:
    found: dict[str, set[str]] = {"GLOBAL": set(), "ATTRIBUTE": set(), "IMPORT": set()}
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            found["GLOBAL"].add(instruction.argval)
        elif name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
            found["ATTRIBUTE"].add(instruction.argval)
        elif name == "IMPORT_NAME":
            found["IMPORT"].add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            for names, more in zip(found.values(), _reads(constant), strict=True):
                names.update(more)
        else:
            texts = constant if isinstance(constant, tuple) else (constant,)
            found["ATTRIBUTE"].update(t for t in texts if isinstance(t, str) and t.isidentifier())
    return _Reads(*map(frozenset, found.values()))


class _Look:
    """One look at everything that can be reached, each object once."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[int, Any]] = {}  # and kept, so that no id serves two objects
        self._path: list[Any] = []  # to the value that is being looked at
        self._names = set(_CALLED)  # attributes that any code which was met may look up
        self._owners: dict[int, tuple[Any, set[str]]] = {}  # classes and Python modules, what of it
        self._members: list[Any] = []  # what was found there
        self._left = MOST_VALUES

    def everything(self, g: Any) -> Any:
        """What g can read."""
        found, before = (
            (self._at("g", g), self._at("a hook of all modules", _torch.global_hooks())),
            (0, 0),
        )
        while before != (now := (len(self._owners), len(self._names))):
            before = now
            for owner, _ in list(self._owners.values()):
                self._look_up(owner, self._names)
        return found, tuple(self._members)

    def place(self) -> str:
        """Where the value is that is being looked at, for the user."""
        place = ""
        for at in self._path:
            step = at
            if not isinstance(at, str):
                (key,) = at
                step = f"[{key!r:.40}]" if isinstance(key, (int, str)) else "[...]"
            place = place + step if step[:1] in (".", "[", "'", "") else step
        return place if len(place) < 100 else place[:50] + " ... " + place[-40:]

    def _at(self, at: Any, value: Any) -> Any:
        """What is found there: at an attribute, a key (in a tuple), or a place of its own."""
        self._path.append(at)
        found = self._value(value)
        self._path.pop()
        return found

    def _value(self, value: Any) -> Any:
        cls = type(value)
        self._left -= 1
        if self._left < 0:
            raise Unseen(
                f"g can read more than {MOST_VALUES} Python values, and to compare them would take "
                f"each solve too long ({self.place()} is one of them); keep tables in tensors"
            )
        if cls is str:
            self._names.add(value)
            return cls, value
        if cls in _EXACT:
            return cls, value
        if cls is float:
            return cls, repr(value)  # tells -0.0 from 0.0, and NaN equals NaN
        if isinstance(value, nn.Module):
            index, met = self._meet(value)
            return ("met before", index) if met else self._module(value)
        if isinstance(value, _CONSTANT):
            return cls, value
        if isinstance(value, type):
            self._class(value)
            for owner in value.__mro__:
                self._look_up(owner, _MAKING)
            return "class", weakref.ref(value)
        if isinstance(value, ModuleType):
            if not _of_library(value.__name__):
                self._owners.setdefault(id(value), (value, set()))
            return "Python module", value.__name__
        if isinstance(value, functools.cached_property):
            value = value.func  # and not its lock
        index, met = self._meet(value)
        if met:
            return "met before", index
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if cls.__module__ in _OPERATORS:
            return "operator", value
        parts = self._parts(value)
        own = getattr(value, "__dict__", None)
        if parts is None and own is not None and keeps_all_in_dict(cls):
            parts = []
        if parts is None:
            raise Unseen(
                f"{self.place()} is an object of class {cls.__name__}, and a graph would not see "
                f"it change; {INSTEAD}"
            )
        self._class(cls)
        if own:
            parts = [*parts, *(("." + name, v) for name, v in own.items() if name[:2] != "__")]
        return weakref.ref(cls), *[self._at(at, part) for at, part in parts]

    def _meet(self, value: Any) -> tuple[int, bool]:
        new = len(self._met)
        index = self._met.setdefault(id(value), (new, value))[0]
        return index, index < new

    @staticmethod
    def _tensor(t: Tensor) -> Any:
        """One on a device that is not an argument is looked for in the capture, and refused."""
        if t.device.type != "cpu" or (t.dim() and isinstance(t, nn.Parameter)):
            return "tensor"
        if t.numel() <= 64:  # Python may read it, by tolist()
            return "values", t.dtype, t.shape, repr(t.detach().tolist())
        return "tensor on the host", t.data_ptr(), _torch.version(t)

    @staticmethod
    def _parts(value: Any) -> Sequence[tuple[Any, Any]] | None:
        """What a value consists of beside its attributes, and where; None: it can't be told."""
        if isinstance(value, (tuple, list, deque)):
            return [((i,), v) for i, v in enumerate(value)]
        if isinstance(value, (dict, types.MappingProxyType)):
            made = [("'s factory", value.default_factory)] if isinstance(value, defaultdict) else []
            return [*made, *(((k,), v) for k, v in value.items()), ("'s keys", tuple(value))]
        if isinstance(value, (set, frozenset)):
            return [("'s values", tuple(sorted(value, key=repr)))]
        if isinstance(value, enum.Enum):
            return [("", value._name_), (".value", value._value_)]
        for base in _BASES:
            if isinstance(value, base):
                return [("", base.__repr__(value))]
        if isinstance(value, numbers.Number):
            return [("", repr(value))]
        if isinstance(value, slice):
            return [("", value.start), ("", value.stop), ("", value.step)]
        if isinstance(value, MethodType):
            return [("", value.__func__), ("'s object", value.__self__)]
        if isinstance(value, functools.partial):
            return [("", value.func), ("'s arguments", value.args), ("'s", value.keywords)]
        if isinstance(value, functools._lru_cache_wrapper):
            # It may keep what it was when another value stood where it looks, until it is cleared.
            return [("", value.__wrapped__), ("'s size", value.cache_info().currsize > 0)]
        if isinstance(value, (staticmethod, classmethod)):
            return [("", value.__func__)]
        if isinstance(value, property):
            return [("", value.fget)]
        if isinstance(value, weakref.ref):
            return [("", value())]
        if isinstance(value, BuiltinFunctionType):
            owner = value.__self__  # None or a module: a function; else a method of that object
            own = () if owner is None or isinstance(owner, (ModuleType, type)) else owner
            return [("", f"{value.__module__}.{value.__qualname__}"), ("'s object", own)]
        if dataclasses.is_dataclass(value):
            return [("." + f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        bare = type(value) is object  # says something by its identity alone
        return [] if bare or isinstance(value, types.SimpleNamespace) else None

    def _compiled(self, by: str) -> Unseen:
        return Unseen(
            f"{self.place()} was made by {by}, and what it reads can't be looked into; use what it "
            'was made from, or driver="eager"'
        )

    def _module(self, m: nn.Module) -> Any:
        if isinstance(m, _torch_graphs.ScriptModule):
            raise self._compiled("torch.jit")
        self._class(type(m))
        own = vars(m)
        found: list[Any] = [weakref.ref(type(m)), m.training]  # a method may close over m
        for tensors in (_torch.parameters(m), _torch.buffers(m)):  # their values come by themselves
            found += [(name, None if t is None else self._meet(t)) for name, t in tensors.items()]
        found += [(name, self._at("." + name, child)) for name, child in _torch.children(m).items()]
        for kept in _torch.HOOKS:
            if hooks := own.get(kept):
                place = f"a hook of {self.place()}"
                found.append((kept, *((k, self._at(place, hook)) for k, hook in hooks.items())))
        found += [
            (name, self._at("." + name, value))
            for name, value in own.items()
            if name not in _OF_ANY_MODULE
        ]
        return tuple(found)

    def _class(self, cls: type) -> None:
        """Everything that its objects find in it, once a name of it is looked up."""
        if self._meet(cls)[1]:
            return
        if type(cls).__hash__ is not type.__hash__:
            raise Unseen(f"{self.place()} is of a class with a hash of its own; {INSTEAD}")
        for c in (*cls.__mro__, *type.mro(type(cls))):
            if id(c) not in self._owners and not _of_library(c.__module__):
                self._owners[id(c)] = c, set()
                self._look_up(c, {n for n in vars(c) if n[:2] == "__" and n not in _NOT_CALLED})

    def _look_up(self, owner: Any, names: Set[str]) -> None:
        """Members of a class or Python module that code names, unless a library's."""
        if id(owner) not in self._owners:
            return
        members, done = vars(owner), self._owners[id(owner)][1]
        for name in sorted(members.keys() & names - done):
            done.add(name)
            if name[:2] != "__" or callable(members[name]):
                found = self._at(f"{owner.__name__}.{name}", members[name])
                self._members.append((owner.__name__, name, found))

    def _function(self, f: FunctionType) -> Any:
        if _torch_graphs.compiled_function(f):
            raise self._compiled("torch.compile")
        of_library = _of_library(f.__globals__.get("__name__"))
        if of_library and not f.__closure__:
            return "library", f
        reads = _reads(f.__code__)
        scope = {} if of_library else f.__globals__
        if not of_library:
            self._names |= reads.attributes
            called = reads.globals - scope.keys() | {"import_module"} & (
                reads.globals | reads.attributes
            )
            for name in sorted(_BLIND & called):
                raise Unseen(f"{f.__name__} calls {name}(), which may read anything; {INSTEAD}")
        found: list[Any] = [f.__code__]
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            try:
                contents = cell.cell_contents
            except ValueError:  # not assigned yet
                found.append("empty")
            else:
                found.append(self._at(name, contents))
        defaults = f.__defaults__, f.__kwdefaults__, vars(f)
        found += [self._at(f"a default of {f.__name__}", given) for given in defaults if given]
        for name in sorted(reads.globals & scope.keys()):
            found.append(self._at(f"the global {name}", scope[name]))
        if not _ENVIRONMENT.isdisjoint(reads.globals | reads.attributes):
            found.append(self._at("the environment", dict(os.environ)))
        for name in self._imported(reads.imports, scope):
            found.append(self._at(f"the import {name}", sys.modules[name]))
        return tuple(found)

    @staticmethod
    def _imported(names: Set[str], scope: dict[str, Any]) -> list[str]:
        """Python modules that these names may mean, if they are relative ones too."""
        package = (scope.get("__package__") or "").split(".") if names else []
        bases = [".".join(package[:n]) for n in range(len(package) + 1)]
        whole = {".".join(filter(None, (base, name))) for base in bases for name in names}
        return sorted(whole & sys.modules.keys())
