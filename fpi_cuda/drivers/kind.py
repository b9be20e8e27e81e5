"""What two solves must agree in to be served by one captured graph.

A graph has built in all that g read in Python when it was captured. So the kind of a solve holds
every value that g can read, as far as that can be followed: numbers, strings, containers, modules,
functions with their closures, defaults and the globals that they name. An object of another class
may change in ways that nothing here sees: a g that reads one is refused.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import logging
import numbers
import sys
from collections import deque
from collections.abc import Sequence
from types import (
    BuiltinFunctionType,
    CodeType,
    EllipsisType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    NoneType,
    WrapperDescriptorType,
)
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
    return _Look().value(g, "g")


def precision() -> tuple[Any, ...]:
    """Torch's switches that choose kernels."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )


# Code and names: to change them is to change the program. (A logger computes nothing.)
_CONSTANT = (
    *(bool, int, str, bytes, range, enum.Enum, NoneType, EllipsisType, CodeType, logging.Logger),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(MethodDescriptorType, WrapperDescriptorType, GetSetDescriptorType, MemberDescriptorType),
)
_MOST = frozenset({bool, int, str, NoneType})  # a look-up each, which is faster
# Classes of objects that are code too, by the modules that define them.
_OPERATORS = frozenset({"torch._ops", "torch._library.custom_ops", "triton.runtime.jit", "typing"})
_FUNCTIONS = (FunctionType, MethodType, functools.partial)
_LIBRARIES = frozenset({"torch", "numpy", "fpi_cuda", *sys.stdlib_module_names} - {"__main__"})
_OF_ANY_MODULE = frozenset(nn.Module().__dict__)
_CALLED = ("forward", "__call__", "backward", "setup_context")  # without being named


@functools.lru_cache(maxsize=4096)
def _of_library(module_name: Any) -> bool:
    return isinstance(module_name, str) and module_name.partition(".")[0] in _LIBRARIES


class _Reads(NamedTuple):
    """Names that a function's code looks up."""

    globals: frozenset[str]
    attributes: frozenset[str]
    imports: frozenset[str]


@functools.lru_cache(maxsize=4096)
def _reads(code: CodeType) -> _Reads:
    found: dict[str, set[str]] = {"GLOBAL": set(), "ATTRIBUTE": set(), "IMPORT": set()}
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            found["GLOBAL"].add(instruction.argval)
        elif name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
            found["ATTRIBUTE"].add(instruction.argval)
        elif name == "IMPORT_NAME":
            found["IMPORT"].add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for names, more in zip(found.values(), _reads(inner), strict=True):
                names.update(more)
    return _Reads(*map(frozenset, found.values()))


class _Look:
    """One look at everything that can be reached, each object once."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[int, Any]] = {}  # and kept, so that no id serves two objects
        self._members: set[tuple[int, str]] = set()  # of classes and Python modules, looked at

    def value(self, value: Any, where: str, names: frozenset[str] = frozenset()) -> Any:
        """What is found at a place; names: attributes that the code which reads it looks up."""
        if type(value) in _MOST or isinstance(value, _CONSTANT):
            return type(value), value
        if isinstance(value, numbers.Number):
            return type(value), repr(value)  # tells -0.0 from 0.0, and NaN equals NaN
        if isinstance(value, type):
            return self._class(value, names | {"__init__"})
        if isinstance(value, ModuleType):
            return self._python_module(value, names)
        if id(value) in self._met:
            return "met before", self._met[id(value)][0]
        self._met[id(value)] = len(self._met), value
        if isinstance(value, Tensor):
            # One on a device that is not an argument is looked for in the capture, and refused.
            on_host = value.dim() == 0 and value.device.type == "cpu"
            return ("scalar", value.dtype, repr(value.item())) if on_host else "tensor"
        if isinstance(value, nn.Module):
            return self._modules(value, where)
        if isinstance(value, FunctionType):
            return self._function(value)
        parts = self._parts(value)
        if parts is not None:
            return type(value), *(self.value(p, f"{where}{at}", names) for at, p in parts)
        if type(value).__module__ in _OPERATORS:
            return "operator", value
        raise Unseen(
            f"{where} is an object of class {type(value).__name__}, and a graph would not see it "
            "change; give g its values as numbers, strings or tensors (arguments, or attributes "
            "of a module)"
        )

    @staticmethod
    def _parts(value: Any) -> Sequence[tuple[str, Any]] | None:
        """What a value consists of, and where; None: it can't be told."""
        if isinstance(value, (tuple, list, deque)):
            return [(f"[{i}]", v) for i, v in enumerate(value)]
        if isinstance(value, (dict, MappingProxyType)):
            return [(f"[{k!r}]", v) for k, v in value.items()] + [("'s keys", tuple(value))]
        if isinstance(value, (set, frozenset)):
            return [("'s values", tuple(sorted(value, key=repr)))]
        if isinstance(value, slice):
            return [("", value.start), ("", value.stop), ("", value.step)]
        if isinstance(value, MethodType):
            return [("", value.__func__), ("'s object", value.__self__)]
        if isinstance(value, functools.partial):
            return [("", value.func), ("'s", value.args), ("'s", value.keywords)]
        if isinstance(value, functools._lru_cache_wrapper):
            return [("", value.__wrapped__)]
        if isinstance(value, BuiltinFunctionType):
            owner = value.__self__  # None or a module: a function; else a method of that object
            own = () if owner is None or isinstance(owner, (ModuleType, type)) else owner
            return [("", value.__qualname__), ("'s object", own)]
        settings: Any = getattr(type(value), "__dataclass_params__", None)
        if settings is not None and settings.frozen:
            return [(f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
        return None

    def _modules(self, root: nn.Module, where: str) -> Any:
        found: list[Any] = []
        for path, m in root.named_modules():
            at = f"{where}.{path}" if path else where
            if isinstance(m, torch.jit.ScriptModule):
                raise Unseen(f"{at} is a torch.jit module, whose attributes can't be looked into")
            found += [self._class(type(m), frozenset()), m.training, tuple(m._modules)]
            for hooks in (m._forward_pre_hooks, m._forward_hooks):
                found.append(tuple(hooks))
                found += [
                    self.value(hook, f"a hook of {at}")
                    for hook in hooks.values()
                    if not _of_library(type(hook).__module__) or isinstance(hook, _FUNCTIONS)
                ]
            library = _of_library(type(m).__module__)
            found += [
                (name, self.value(value, f"{at}.{name}"))
                for name, value in vars(m).items()
                # What torch's modules keep for themselves does not change what they compute.
                if name not in _OF_ANY_MODULE and not (library and name.startswith("_"))
            ]
        return tuple(found)

    def _class(self, cls: type, names: frozenset[str]) -> Any:
        """What code reads from a class: what it names, and what these functions name in turn."""
        found: list[Any] = [cls]
        owners = [c for c in cls.__mro__ if not _of_library(c.__module__)]
        todo = [*_CALLED, *names] if owners else []
        while todo:
            name = todo.pop()
            if (id(cls), name) in self._members:
                continue
            self._members.add((id(cls), name))
            member = next((vars(c)[name] for c in owners if name in vars(c)), None)
            if isinstance(member, (staticmethod, classmethod)):
                member = member.__func__
            elif isinstance(member, property):
                member = member.fget
            elif isinstance(member, functools.cached_property):
                member = member.func
            found.append((name, self.value(member, f"{cls.__name__}.{name}", names)))
            if isinstance(member, FunctionType) and name != "__init__":
                todo += sorted(_reads(member.__code__).attributes)
        return tuple(found)

    def _function(self, f: FunctionType) -> Any:
        of_library = _of_library(f.__globals__.get("__name__"))
        if of_library and not f.__closure__:
            return "library", f
        reads = _reads(f.__code__)
        found: list[Any] = [f.__code__]
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            try:
                contents = cell.cell_contents
            except ValueError:  # not assigned yet
                found.append("empty")
            else:
                found.append(self.value(contents, name, reads.attributes))
        found.append(self.value((f.__defaults__, f.__kwdefaults__), f"a default of {f.__name__}"))
        scope = {} if of_library else f.__globals__
        for name in sorted(reads.globals & scope.keys()):
            found.append(self.value(scope[name], f"the global {name}", reads.attributes))
        for name in sorted(reads.imports & sys.modules.keys()):
            found.append(self._python_module(sys.modules[name], reads.attributes))
        return tuple(found)

    def _python_module(self, module: ModuleType, names: frozenset[str]) -> Any:
        found: list[Any] = [module.__name__]
        for name in () if _of_library(module.__name__) else sorted(names & vars(module).keys()):
            if (id(module), name) not in self._members:
                self._members.add((id(module), name))
                where = f"{module.__name__}.{name}"
                found.append((name, self.value(vars(module)[name], where, names)))
        return tuple(found)
