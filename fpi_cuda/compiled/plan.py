"""Where the tensors of a layer's g are: the compiler makes inputs of its graph of them."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

from torch import nn

from ..derivatives import needs_gradients
from ..modules import Binding, reached

__all__ = ["Plan", "plan_for", "plan_of"]

_numbers = itertools.count(1)
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


class Plan:
    """What a graph knows of a layer: its handle, and where to find the tensors of g's modules.

    The layer keeps it, and it the layer not: a handle lives as long as its layer, and copies and
    pickles of a layer have none before they are compiled themselves.

    Attributes:
        handle: the number by which an operator finds the layer.
        whole: whether g's tensors are all known, so that an operator can be given them.
        params: the module and name of each parameter, in the order of `Binding.own`; then
            buffers likewise.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.handle = weakref.ref(layer), next(_numbers)
        g: Any = layer.g
        binding = Binding.of(g)
        self.objects = [] if binding is None else binding.objects
        self.params, self.buffers = ([], []) if binding is None else binding.places()
        made = binding is not None or not isinstance(g, nn.Module)  # else its first call makes some
        spread = binding is not None and binding.sharded
        # A captured tensor has its gradient from g's own graph, which an operator has none of.
        self.whole = made and not spread and not reached(g, needs_gradients)
        _plans[self.handle] = self

    def stands(self, binding: Binding | None) -> bool:
        """Whether g calls the modules that it called when the plan was made."""
        now = [] if binding is None else binding.objects
        return [*map(id, now)] == [*map(id, self.objects)]


def plan_for(layer: nn.Module, last: Plan | None) -> Plan:
    """The layer's plan of now: the last one where it stands."""
    if last is not None and last.stands(Binding.of(layer.g)):
        return last
    return Plan(layer)


def plan_of(handle: int) -> tuple[Plan, Any]:
    """The plan of a handle, and its layer.

    Raises:
        RuntimeError: the layer is gone.
    """
    plan = _plans.get(handle)
    layer = None if plan is None else plan.layer()
    if plan is None or layer is None:
        raise RuntimeError(
            "FixedPointLayer: a compiled graph needs the layer that it was compiled with, which is "
            "gone; keep the module, and compile again"
        )
    return plan, layer
