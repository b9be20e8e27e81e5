"""A module's tensors taken out and put back in, without touching the module.

`torch.func.functional_call` swaps the tensors of the shared module for the length of the call, so
other threads see them. Here a structural clone (new containers, the same leaves) gets the tensors
for good: private to one solve, and free of the swap's cost in every iteration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import _torch

__all__ = ["Binding", "bindable", "has_stateful_buffers"]


def bindable(g: Any) -> bool:
    """Whether g's own tensors can be taken out: a module of plain Python, and so all in it."""
    return (
        isinstance(g, nn.Module)
        and not _torch.compiled_module(g)  # it calls the module it closed over
        and not any(isinstance(m, _torch.ScriptModule) for m in g.modules())
    )


def has_stateful_buffers(g: Any) -> bool:
    """Whether a training call of g may move a buffer (batch norm, spectral norm)."""
    return isinstance(g, nn.Module) and any(
        m.training and any(b is not None for b in _torch.buffers(m).values()) for m in g.modules()
    )


class Binding:
    """A snapshot of a module's structure and buffers, callable with any parameters.

    Attributes:
        params: the module's parameters, in a fixed order, each once, as they were found.

    Buffers are cloned, and cloned again for every `bind`: whatever a call does to them (running
    statistics, power iterations) is forgotten, so each bind starts from the same snapshot.
    """

    def __init__(self, module: nn.Module) -> None:
        self._template = _clone(module, {})
        self._template_buffers()
        self._index: dict[int, int] = {}
        self.params: list[Tensor] = []
        for m in module.modules():
            for p in _torch.parameters(m).values():
                if p is not None and id(p) not in self._index:
                    self._index[id(p)] = len(self.params)
                    self.params.append(p)

    def _template_buffers(self) -> None:
        _map_buffers(self._template, lambda b: b.detach().clone())

    @property
    def buffers(self) -> list[Tensor]:
        """The snapshot's buffers, in a fixed order, each once."""
        found: list[Tensor] = []

        def note(b: Tensor) -> Tensor:
            found.append(b)
            return b

        _map_buffers(self._template, note)
        return found

    def around(self, buffers: Sequence[Tensor]) -> Binding:
        """The same structure around these buffers, which are not cloned."""
        other = copy.copy(self)
        other._template = _clone(self._template, {})
        following = iter(buffers)
        _map_buffers(other._template, lambda _: next(following))
        return other

    def bind(self, params: Sequence[Tensor]) -> Callable[..., Any]:
        """The module with these parameters; parametrisations are evaluated here, once."""
        clone = _clone(self._template, {})
        _map_buffers(clone, lambda b: b.clone())
        for m in clone.modules():
            for name, p in _torch.parameters(m).items():
                if p is not None:
                    _torch.parameters(m)[name] = params[self._index[id(p)]]
        for m in list(clone.modules()):
            _freeze_parametrizations(m)
            _torch.renew_flat_weights(m)
        return clone


def _clone(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """New module objects and containers around the same tensors and attributes."""
    if id(module) in memo:
        return memo[id(module)]
    clone = object.__new__(type(module))
    memo[id(module)] = clone
    clone.__dict__.update(module.__dict__)
    for name in (_torch.PARAMETERS, _torch.BUFFERS, _torch.PRE_HOOKS):
        clone.__dict__[name] = module.__dict__[name].copy()
    clone.__dict__[_torch.CHILDREN] = {
        name: None if child is None else _clone(child, memo)
        for name, child in _torch.children(module).items()
    }
    return clone


def _map_buffers(module: nn.Module, f: Callable[[Tensor], Tensor]) -> None:
    memo: dict[int, Tensor] = {}
    for m in module.modules():
        for name, b in _torch.buffers(m).items():
            if b is not None:
                if id(b) not in memo:
                    memo[id(b)] = f(b)
                _torch.buffers(m)[name] = memo[id(b)]


def _freeze_parametrizations(module: nn.Module) -> None:
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
