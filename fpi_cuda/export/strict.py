"""torch.export with strict=True, where Dynamo reads the model's Python: it need not read a solve.

A layer's call is one function of tensors to it, which runs as it does with strict=False. Imported
while exporting only: it loads the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..modules import Binding
from ..record import NEVER, Progress, Record
from ..solution import Solution
from ..solve.problem import Context

__all__ = ["call", "keep"]

LAYERS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()

TENSORS = (
    "FixedPointLayer: torch.export with strict=True takes a layer's call with tensors by position "
    "and as x0 alone, a state that is one tensor, and no aux; write "
    "torch.export.export(model, inputs, strict=False)"
)


CAPTURED = (
    "FixedPointLayer: torch.export with strict=True takes the parameters and buffers of the "
    "layer's own modules, and its g leads to others; make g a module that owns them, or write "
    "torch.export.export(model, inputs, strict=False)"
)


def keep(layer: nn.Module) -> int:
    """What `call` finds the layer by.

    Raises:
        TypeError: g leads to parameters or buffers that are not the layer's.
    """
    binding = Binding.of(layer.g)
    own = set(map(id, (*layer.parameters(), *layer.buffers())))
    if binding is not None and not own.issuperset(map(id, (*binding.params, *binding.buffers))):
        raise TypeError(CAPTURED)
    LAYERS[id(layer)] = layer
    return id(layer)


def call(
    key: int,
    tensors: Sequence[Tensor],
    inputs: Sequence[Any],
    x0: Tensor | None,
    rate: Callable[..., Any],
    one: bool,
) -> Solution:
    """The layer's solution, where its parameters and buffers are these tensors.

    Args:
        key: what `keep` gave.
        tensors: the layer's parameters, then its buffers.
        inputs: tensors [B, ...].
        x0: where to start, or None.
        rate: the solver's contraction.
        one: whether the batch is one system.
    """
    given = [*inputs] if x0 is None else [*inputs, x0]
    # The compiler tells what holds where the layer is called; in the graph nothing does.
    device = given[0].device.type
    context = Context.here(device)
    given = [*given, *tensors]
    out = _in_graph(key, len(inputs), x0 is not None, context.autocast_dtype, *given)
    x, counters, scalars, evaluations = out
    progress = Progress.__new__(Progress)
    progress.counters, progress.scalars, progress.limits = counters, scalars, NEVER
    progress.precision, progress.dtype = context.precision(x.dtype), scalars.dtype
    record = Record(progress, x.shape[:1], rate, "exported", failed=-1, evaluations=evaluations)
    if one:
        record.system = x.shape[0]
    return Solution(x, record)


def _in_graph(
    key: int, n: int, starts: bool, autocast: torch.dtype | None, *tensors: Tensor
) -> tuple[Tensor, ...]:
    layer: Any = LAYERS[key]
    names = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
    m = n + starts
    own = dict(zip(names, tensors[m:], strict=True))
    options = {"x0": tensors[n]} if starts else {}
    context = Context(torch.is_grad_enabled(), autocast, tensors[0].device.type)
    with context.full_precision() if autocast is None else context.autocast():
        x = torch.func.functional_call(layer, own, tensors[:n], options)
    if not isinstance(x, Tensor):
        raise TypeError(TENSORS)
    record = layer.last.record
    evaluations = torch.as_tensor(record.evaluations)
    return x, record.progress.counters, record.progress.scalars, evaluations


torch.compiler.allow_in_graph(_in_graph)
