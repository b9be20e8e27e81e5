"""Where the tensors of a layer's g are: the compiler makes inputs of its graph of them."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .. import _torch_graphs
from ..derivatives import needs_gradients
from ..modules import Binding, leads_to, reached

__all__ = ["Plan", "plan", "plan_each", "plan_of", "waits"]

_numbers = itertools.count(1)
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


class Plan:
    """What a graph knows of a layer: its handle, and where to find the tensors of g's modules.

    The layer keeps it, and it the layer not: a handle lives as long as its layer, and copies and
    pickles of a layer have none before they are compiled themselves.

    Attributes:
        handle: int64 [], the number by which an operator finds the layer: a tensor, so that a graph
            serves all layers that are alike.
        whole: whether g's tensors are all known, so that an operator can be given them.
        params: the module and name of each parameter, in the order of `Binding.own`; then
            buffers likewise.
    """

    def __init__(self, layer: nn.Module) -> None:
        number = next(_numbers)
        with torch.inference_mode(False):
            self.layer, self.handle = weakref.ref(layer), torch.tensor(number, device="cpu")
        g: Any = layer.g
        binding = Binding.of(g)
        self.objects = [] if binding is None else binding.objects
        self.modules = [m for m in self.objects if isinstance(m, nn.Module)]
        self.params, self.buffers = ([], []) if binding is None else binding.places()
        self._held = [] if binding is None else binding.held()
        self.look(g, binding)
        _plans[number] = self

    def look(self, g: Any, binding: Binding | None) -> None:
        """See whether g's tensors are all known now."""
        made = binding is not None or not isinstance(g, nn.Module)  # else its first call makes some
        spread = binding is not None and binding.sharded
        # A captured tensor has its gradient from g's own graph, which an operator has none of.
        self.whole = made and not spread and not reached(g, needs_gradients)

    def stands(self, binding: Binding | None) -> bool:
        """Whether g calls the modules of the plan, and they hold as many tensors, shared alike."""
        now = [] if binding is None else binding.objects
        if [*map(id, now)] != [*map(id, self.objects)]:
            return False
        return self._held == ([] if binding is None else binding.held())


def plan(layer: Any) -> None:
    """Plan a layer anew if its plan does not stand."""
    last, binding = layer._plan, Binding.of(layer.g)
    if last is None or not last.stands(binding):
        layer._plan = Plan(layer)
    else:
        last.look(layer.g, binding)


def plan_each(layers: Iterable[Any]) -> None:
    """Plan layers that no graph has yet, so that one of a layer like them serves them too."""
    for layer in layers:
        if layer is not None:
            with contextlib.suppress(Exception):  # its own call raises it
                plan(layer)


def waits(layer: Any) -> bool:
    """Whether the graph that is made now has yet to write to something that the layer reads.

    To an attribute of g or an option, say: it does so when it ends, after the operator has run.
    """
    written = _torch_graphs.unwritten()
    return written is None or (bool(written) and leads_to(layer, written))


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
