"""What the compiler traces of a layer's call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import BUFFERS, CHILDREN, PARAMETERS
from ..solve.maps import pair
from ..solve.problem import Context
from ..tree import build, flatten
from .given import Unknown, another, registered, taken
from .operators import solve

__all__ = ["call"]


def call(layer: Any, x0: Any, cold: bool, given: dict[str, Any]) -> Any:
    """The layer's output by one operator of the graph; None: it can't be one.

    Args:
        layer: a `FixedPointLayer` that has a plan.
        x0: where to start.
        cold: whether that is the layer's own start.
        given: what else `FixedPointLayer.forward` takes, by name.
    """
    plan = layer._plan
    leaves, tree = flatten(x0)
    if not plan.whole or not (cold or tree is None) or leaves[0].is_meta:
        return None
    tensors: list[Tensor] = []
    whole: list[int] = []
    real: list[Tensor] = []
    try:
        spec = taken(given, tensors, whole, real)
    except Unknown:
        return None
    for m in plan.modules:  # with other tensors, or other kinds of modules, it is another graph
        for kind in (PARAMETERS, BUFFERS, CHILDREN):
            for part in getattr(m, kind).values():
                isinstance(part, Tensor)
    own: list[Tensor] = [getattr(m, PARAMETERS)[name] for m, name in plan.params]
    moving, at = [], []
    for m, name in plan.buffers:
        buffer = getattr(m, BUFFERS)[name]
        if m.training and not layer.has_aux:  # in which modules move theirs, once a solve
            moving.append(buffer)
            at.append(len(own))
        own.append(buffer.clone())  # the adjoint needs what it was
    autocast = Context.here(leaves[0].device.type).autocast_dtype
    number, grad = registered(spec), torch.is_grad_enabled()
    out = solve(
        *(leaves, tensors, own, plan.handle, whole, real, at, number, another(), cold, grad),
        autocast,
    )
    n = len(leaves)
    with torch.no_grad():
        for buffer, moved in zip(moving, out[n + 1 :], strict=True):
            buffer.data.copy_(moved)  # not counted as a write: most stay what they are
    x = build(tree, out[:n])
    if not layer.has_aux:
        return x
    # The call at the solution is part of the graph itself, with all that it leaves on modules.
    value = layer.g(x, *given["inputs"], *given["params"], **given["keywords"])
    return x, pair(value)[1]
