"""g once more at a solution, by what its solve was given, none of which this keeps alive."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import held, version
from ..arguments import Arguments
from ..norms import row_norms
from ..record import accumulate_dtype
from ..solution import State
from ..tree import flatten
from .maps import UserMap, check_output
from .problem import Context

__all__ = ["Again"]

_KEEP = (
    "a solution keeps neither g nor its tensors alive. Hold on to them until it was asked for, or "
    "compute it from g"
)
_ASK = "ask for it before: once it was, it is kept"
_PLAIN = (type(None), bool, int, float, complex, str, bytes)

Reference = Callable[[], Any]


class Again:
    """‖g(x̂) − x̂‖₂ of every sample, when it is asked for; see `Solution.residual_at_x`.

    g, its modules' tensors and all that it was given are referenced weakly (but for numbers, lists,
    and objects that no weak reference can be made of), with the counts of writes to them: it is the
    g of the solve that is called, or an error says what is missing or has changed. Buffers are
    those that the solve left.

    Args:
        g: the user's.
        modules: those that the call gave by name, which are part of g.
        map: the solve's, settled.
        arguments: what the call gave g beside tensors by position, if anything.
        inputs: tensors.
        params: tensors, those of the arguments too.
        x: the solution.
        context: where the solve was called.

    Attributes:
        value: what was found, [B]; None before.
    """

    value: Tensor | None

    def __init__(
        self,
        g: Any,
        modules: Mapping[str, nn.Module],
        map: UserMap,
        arguments: Arguments | None,
        inputs: Sequence[Tensor],
        params: Sequence[Tensor],
        x: State,
        context: Context,
    ) -> None:
        self.value = None
        self._g = _weak(g)
        self._modules = {name: _weak(m) for name, m in modules.items()}
        self._arguments, self._has_aux = arguments, map.has_aux
        if arguments is not None:
            self._arguments = copy.copy(arguments)
            self._arguments.plain = [_weak(v) for v in arguments.plain]
        self._n, self._context = len(inputs), context
        self._pack, self._unpack = map.pack, map.unpack
        given = (*inputs, *params)
        self._given, self._given_then = [weakref.ref(t) for t in given], _writes(given)
        self._x_then = _writes(_parts(x))
        self._own: list[Reference] | None = None
        binding = map.binding
        if binding is not None:
            own = binding.params + binding.buffers
            self._own, self._own_then = [weakref.ref(t) for t in own], _writes(own)
            self._modes = _modes(binding.objects)

    def __call__(self, x: State) -> Tensor:
        """[B], at x.

        Raises:
            RuntimeError: g or a tensor is gone, or has changed since the solve.
        """
        if _writes(_parts(x)) != self._x_then:
            raise _error(f"x was written to since the solve; {_ASK}")
        g = self._found("g", self._g)
        if self._modules:
            of_call = {name: self._found(name, m) for name, m in self._modules.items()}
            g = functools.partial(g, **of_call)
        given = [self._found(self._name(i), t) for i, t in enumerate(self._given)]
        for i, (now, then) in enumerate(zip(_writes(given), self._given_then, strict=True)):
            if now != then:
                raise _error(f"{self._name(i)} was written to since the solve; {_ASK}")
        arguments = self._arguments
        if arguments is not None:
            arguments = copy.copy(arguments)
            arguments.plain = [self._found("an argument of g", v) for v in arguments.plain]
        inputs, params = given[: self._n], given[self._n :]
        ways = self._pack, self._unpack
        map = UserMap(g, len(inputs), len(params), *ways, arguments, self._has_aux)
        self._check_own(map)
        context, packed = self._context, self._pack(x).detach()
        with torch.no_grad(), context.full_precision(), context.autocast():
            tensors = [t.detach() for t in (*inputs, *params, *map.own)]
            bound = map.bind(tensors[self._n :])
            gx = check_output(bound(packed, *tensors[: self._n]), packed)
            if map.binding is not None:
                map.binding.reshard()
            shape, dtype = (len(packed), packed.shape[1:].numel()), accumulate_dtype(packed.dtype)
            return row_norms((gx.to(dtype) - packed.to(dtype)).reshape(shape)).to(dtype)

    def _check_own(self, map: UserMap) -> None:
        """Raise unless g's modules are those of the solve, with the same tensors in them."""
        if self._own is None:  # none, or one that made its parameters in its first call
            return
        binding = map.binding
        own = [] if binding is None else binding.params + binding.buffers
        same = binding is not None and _modes(binding.objects) == self._modes
        if not same or _ids(own) != _ids([t() for t in self._own]):
            raise _error(f"g has other modules, modes or tensors than in the solve; {_ASK}")
        if _writes(own) != self._own_then:
            raise _error(
                "a parameter or buffer of g's modules was written to since the solve (by an "
                f"optimizer?); {_ASK}"
            )

    def _name(self, i: int) -> str:
        return f"inputs[{i}]" if i < self._n else f"params[{i - self._n}]"

    def _found(self, name: str, reference: Any) -> Any:
        value = reference()
        if value is None and isinstance(reference, weakref.ref):
            raise _error(f"{name} is gone: {_KEEP}")
        return held(value) if isinstance(value, Tensor) else value

    def __reduce__(self) -> Any:
        """Of a copy the value stays, if there is one: it may be in another process."""
        return _copied, (self.value,)


def _copied(value: Tensor | None) -> Again | None:
    if value is None:
        return None
    again = Again.__new__(Again)
    again.value = value
    return again


def _ids(tensors: Sequence[Any]) -> list[int]:
    return [id(t) for t in tensors]


def _error(what: str) -> RuntimeError:
    return RuntimeError(f"Solution.residual_at_x evaluates g once more at x, but {what}")


def _weak(v: Any) -> Reference:
    if not isinstance(v, _PLAIN):
        try:
            return weakref.WeakMethod(v) if isinstance(v, MethodType) else weakref.ref(v)
        except TypeError:
            pass
    return lambda: v


def _writes(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to; 0 where nobody counts."""
    try:
        return list(map(version, tensors))
    except RuntimeError:
        return [0 if t.is_inference() else version(t) for t in tensors]


def _modes(objects: Sequence[Any]) -> list[bool]:
    return [m.training for m in objects if isinstance(m, nn.Module)]


def _parts(x: State) -> Sequence[Tensor]:
    return (x,) if isinstance(x, Tensor) else flatten(x)[0]
