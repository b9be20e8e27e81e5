"""The gradient of closure tensors where the adjoint of a sample failed.

They hang on one g(x̂) that was attached when the solve ended, before anybody knew. Its backward
would put zero times an infinite derivative into their gradients, so it is told to give those of
another g(x̂), in which a good sample stands in for the failed one.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

__all__ = ["Redirected"]

Edge = tuple[Any, int]  # an autograd node, and which of its inputs


class Redirected:
    """The backward of an attached value gives, once, what the backward of another one gives.

    Args:
        attached: the autograd node of the value.
        y: the other value: g of the same tensors.
        c: y's cotangent; None: all gradients are zero.
    """

    def __init__(self, attached: Any, y: Tensor, c: Tensor | None) -> None:
        of_attached, of_y = _behind(attached), _behind(y.grad_fn)
        shared = of_attached & of_y  # nodes that were there before either: those of the tensors
        self._found: dict[Edge, Tensor] = {}
        self._handles = []
        if c is not None:
            into = _into(shared, of_y)
            for node, places in into.items():
                node.register_hook(lambda grads, _, at=places: self._collect(at, grads))
            edges = {edge for places in into.values() for _, edge in places}
            inputs = [GradientEdge(*edge) for edge in edges]  # not leaves: nothing accumulates
            if inputs:
                torch.autograd.grad(y, inputs, c, allow_unused=True)
        for node, places in _into(shared, of_attached).items():
            hook = node.register_hook(lambda grads, _, at=places: self._replaced(at, grads))
            self._handles.append(hook)

    def end(self) -> None:
        """From now on the backward is its own again."""
        while self._handles:
            self._handles.pop().remove()

    def _collect(self, places: list[tuple[int, Edge]], grads: Any) -> None:
        for i, edge in places:
            if grads[i] is not None:
                before = self._found.get(edge)
                self._found[edge] = grads[i] if before is None else before + grads[i]

    def _replaced(self, places: list[tuple[int, Edge]], grads: Any) -> tuple[Tensor | None, ...]:
        """A node's gradients: the whole of a tensor's at the first place that leads to it."""
        out = list(grads)
        for i, edge in places:
            if out[i] is not None:  # else nobody wants it
                whole = self._found.pop(edge, None)
                out[i] = torch.zeros_like(out[i]) if whole is None else whole
        return tuple(out)


def _behind(node: Any) -> set[Any]:
    """A node and all that its gradient flows to."""
    found: set[Any] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack.extend(there for there, _ in node.next_functions)
    return found


def _into(shared: set[Any], nodes: set[Any]) -> dict[Any, list[tuple[int, Edge]]]:
    """The nodes that are not shared, with those of their gradients that flow to some that are."""
    found = defaultdict(list)
    for node in nodes - shared:
        for i, edge in enumerate(node.next_functions):
            if edge[0] in shared:
                found[node].append((i, edge))
    return found
