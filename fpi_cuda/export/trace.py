"""A function of tensors as a plain graph, traced while torch.export traces what is around it.

A loop's body may not take gradients, read modules or run what Dynamo does not understand. So it is
traced here first, on the export's own tensors: what is left are torch's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .. import _torch_graphs
from .._torch import storage_id

__all__ = ["Body", "traced", "without_gradient"]

TRAINING = (
    "fixed_point: an exported g must not write to a tensor that it did not make (modules in "
    "training mode do, as BatchNorm to its running mean); call model.eval() before the export, and "
    "write x * 2, not x.mul_(2)"
)
RANDOM = (
    "fixed_point: an exported g must not draw random numbers (got {}), since a fixed point needs "
    "the same g in every iteration; call model.eval() before the export, which stops dropout, or "
    "draw the numbers outside of g and pass them as an input"
)
CONTROL = (
    "fixed_point: torch.export runs g once, on tensors without values, so g may not branch on "
    "values, convert them to numbers or give them to other libraries; write torch.where or "
    "torch.cond"
)


class Body:
    """A traced function f(*carry) as carry ↦ graph(*carry, *fixed).

    Attributes:
        graph: operators alone.
        fixed: the tensors that it takes beside, which no iteration changes: those that f was given
            or captures, and all that it computes of them alone, once.
    """

    def __init__(self, graph: Callable[..., Any], fixed: Sequence[Tensor]) -> None:
        self.graph, self.fixed = graph, fixed

    def __call__(self, *carry: Tensor) -> Any:
        """F's value."""
        return self.graph(*carry, *self.fixed)


def traced(f: Callable[..., Any], carry: Sequence[Tensor], given: Sequence[Tensor]) -> Body:
    """F, called as f(*carry, *given), as a function of what an iteration changes, the carry.

    Raises:
        RuntimeError: f writes to what it is given or captures, or draws random numbers.
    """
    # The same tensor twice would become one argument.
    with _torch_graphs.unrecorded():
        examples = [t.clone() for t in (*carry, *given)]
        try:
            graph = _torch_graphs.make_fx(f)(*examples)
        except RuntimeError as error:
            error.add_note(CONTROL)
            raise
        captured = _lift(graph)
        if any(_written(node) for node in graph.graph.nodes):
            pure = torch.func.functionalize(graph)
            graph = _torch_graphs.make_fx(pure)(*examples, *map(torch.clone, captured))
    graph.graph.eliminate_dead_code()
    _check(graph)
    return _divided(graph, len(carry), (*given, *map(without_gradient, captured)))


def without_gradient(t: Tensor) -> Tensor:
    """The same values, by which a program has no derivative, whatever is made of it.

    torch.no_grad() and detach() are lost in `run_decompositions`, and a loop in a program that is
    given what needs gradients has wrong ones.
    """
    if torch.onnx.is_in_onnx_export():  # where nothing has one, and bits can't be viewed so
        return t.detach()
    if t.is_complex():
        return torch.view_as_complex(without_gradient(torch.view_as_real(t.resolve_conj())))
    if not t.is_floating_point():
        return t
    return t.view(_BITS[t.dtype.itemsize]).view(t.dtype)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _lift(graph: fx.GraphModule) -> list[Tensor]:
    """Make the tensors that the graph captures its last arguments."""
    nodes, seen, captured = graph.graph, {}, []  # type: ignore[var-annotated]
    last = [n for n in nodes.nodes if n.op == "placeholder"][-1]
    for node in list(nodes.nodes):
        value = getattr(graph, node.target, None) if node.op == "get_attr" else None
        if not isinstance(value, Tensor):
            continue
        if id(value) not in seen:
            with nodes.inserting_after(last):
                last = seen[id(value)] = nodes.placeholder(f"captured_{len(captured)}")
            last.meta.update(node.meta)
            last.meta["val"] = value
            captured.append(value)
        node.replace_all_uses_with(seen[id(value)])
        nodes.erase_node(node)
    graph.recompile()
    return captured


def _written(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _check(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if _written(node):
            raise RuntimeError(TRAINING)
        if _draws(node):
            raise RuntimeError(RANDOM.format(node.target))


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers. Attention is tagged so, without dropout too."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dropout_p" not in names:
        return True
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return bool(given.get("dropout_p", 0.0) != 0)


def _divided(graph: fx.GraphModule, n_carry: int, given: Sequence[Tensor]) -> Body:
    """The graph in two: what depends on the carry, and what is computed once, here and now."""
    nodes = list(graph.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(placeholders[n_carry:], given, strict=True))
    inner = fx.Graph()
    copies = {n: inner.placeholder(n.name) for n in placeholders[:n_carry]}
    moving = set(placeholders[:n_carry])
    body: list[fx.Node] = []
    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr" or moving.intersection(node.all_input_nodes):
            moving.add(node)
            body.append(node)
            continue
        # Once, here: torch.export records it.
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)
        if not _tensors(values[node]) or _is_view(node):  # made again where they are used
            body.append(node)
    fixed: list[Tensor] = []
    output = nodes[-1]
    wanted: set[fx.Node] = set()  # what the body needs, from its end
    for node in [output, *reversed(body)]:
        if node is output or node in wanted or node in moving:
            wanted.update(node.all_input_nodes)
    inside = set(body) & (wanted | moving)
    for node in nodes:
        if node in wanted and node not in inside and node not in copies:
            copies[node] = inner.placeholder(f"fixed_{len(fixed)}")
            fixed.append(_apart(values[node], fixed))
    for node in body:
        if node in inside:
            copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.output(fx.node.map_arg(output.args[0], copies.__getitem__))
    return Body(fx.GraphModule(graph, inner), fixed)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info for r in schema.returns)


def _apart(t: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The tensor, or a copy where it lies in the memory of another: a loop takes no two views."""
    return t.clone() if storage_id(t) in map(storage_id, others) else t


def _tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_tensors, value))
    return isinstance(value, Tensor)
