"""Trees of tensors: tuples, lists, dicts and dataclasses, nested, and what torch's pytree knows.

torch's own walk is asked only for types that were registered with it: a dataclass that was not is a
leaf to it, and dicts with their keys in another order are others.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ._torch import tree_flatten, tree_unflatten

__all__ = ["Mismatch", "Node", "Tree", "build", "flatten", "leaves_like", "paths", "signature"]


class Node(NamedTuple):
    """Where a tree branches.

    Attributes:
        kind: the type of the value there.
        names: of the parts, as one writes them behind the value: "[0]", "['u']", ".a".
        take: another value's parts in the same order; None: it has not these parts.
        make: a value from its parts.
        context: what else tells the value from others of its kind.
        parts: a node for each part that branches again, None for a leaf.
    """

    kind: type
    names: Sequence[str]
    take: Callable[[Any], Sequence[Any] | None]
    make: Callable[[Sequence[Any]], Any]
    context: Hashable = None
    parts: tuple[Node | None, ...] = ()

    def __str__(self) -> str:
        kind = self.kind.__name__
        if self.kind not in (tuple, list):
            return f"a {kind} of {', '.join(self.names) or 'nothing'}"
        what = " tensors" if not any(self.parts) else ""
        return f"a {kind} of {len(self.names)}{what}"


Tree = Node | None  # None: one leaf


class Mismatch(Exception):
    """A value has not the structure of a tree.

    Attributes:
        place: where.
        node: what must be there.
        got: what is there, in words.
    """

    def __init__(self, place: str, node: Node, value: Any) -> None:
        got = type(value).__name__
        if isinstance(value, Mapping):
            got = f"{got} of {', '.join(f'[{key!r}]' for key in value) or 'nothing'}"
        elif isinstance(value, (tuple, list)) and len(value) != len(node.names):
            got = f"{len(value)} items"
        self.place, self.node, self.got = place, node, got
        super().__init__(place)


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor."""
    return isinstance(value, Tensor)


def flatten(value: Any, leaf: Callable[[Any], bool] = is_tensor) -> tuple[list[Any], Tree]:
    """The leaves of a value, and its structure, which holds none of them.

    Args:
        value: any.
        leaf: what is a leaf whatever its type; else all that has no parts is one.
    """
    leaves: list[Any] = []
    return leaves, _walk(value, leaf, leaves)


# No function within another calls itself here: such a circle would hold the tensors for long.


def _walk(value: Any, leaf: Callable[[Any], bool], leaves: list[Any]) -> Tree:
    node = None if leaf(value) else _node(value)
    if node is None:
        leaves.append(value)
        return None
    parts = node.take(value)
    assert parts is not None
    return node._replace(parts=tuple([_walk(part, leaf, leaves) for part in parts]))


def leaves_like(tree: Tree, value: Any, place: str = "") -> list[Any]:
    """The leaves of a value that has a tree's structure, in the tree's order.

    Tuples and lists stand for each other and for named tuples, and mappings for dicts.

    Raises:
        Mismatch: it has another structure.
    """
    if tree is None:
        return [value]
    parts = tree.take(value)
    if parts is None:
        raise Mismatch(place, tree, value)
    leaves: list[Any] = []
    for name, part, v in zip(tree.names, tree.parts, parts, strict=True):
        if part is None:
            leaves.append(v)
        else:
            leaves += leaves_like(part, v, place + name)
    return leaves


def build(tree: Tree, leaves: Iterable[Any]) -> Any:
    """A value of this structure with these leaves."""
    return _build(tree, iter(leaves))


def _build(tree: Tree, rest: Iterator[Any]) -> Any:
    if tree is None:
        return next(rest)
    return tree.make([_build(part, rest) for part in tree.parts])


def paths(tree: Tree, place: str = "") -> list[str]:
    """Where each leaf is, as one writes it behind the value; "" for a value that is a leaf."""
    if tree is None:
        return [place]
    pairs = zip(tree.names, tree.parts, strict=True)
    return [path for name, part in pairs for path in paths(part, place + name)]


def signature(tree: Tree) -> Hashable:
    """What tells a structure from others."""
    if tree is None:
        return None
    return tree.kind, tree.context, tuple(tree.names), tuple(map(signature, tree.parts))


def _node(value: Any) -> Node | None:
    """The value as a node whose parts are not known yet; None: it has no parts."""
    kind = type(value)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return _named(kind)
    if kind in (tuple, list):
        return _sequence(kind, len(value))
    if kind in (dict, OrderedDict):
        return _dict(kind, tuple(value))
    node = _registered(value)
    if node is None and dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    if node is None and isinstance(value, (tuple, list)):
        return _sequence(tuple if isinstance(value, tuple) else list, len(value))
    return node


def _sequence(kind: type, n: int) -> Node:
    def take(v: Any) -> Sequence[Any] | None:
        return v if isinstance(v, (tuple, list)) and len(v) == n else None

    return Node(kind, [f"[{i}]" for i in range(n)], take, kind)


def _named(kind: Any) -> Node:
    names, n = kind._fields, len(kind._fields)

    def take(v: Any) -> Sequence[Any] | None:
        same = isinstance(v, (tuple, list)) and len(v) == n
        return v if same and getattr(v, "_fields", names) == names else None

    return Node(kind, [f".{name}" for name in names], take, kind._make)


def _dict(kind: Any, keys: tuple[Any, ...]) -> Node:
    def take(v: Any) -> Sequence[Any] | None:
        same = isinstance(v, Mapping) and len(v) == len(keys) and all(key in v for key in keys)
        return [v[key] for key in keys] if same else None

    def make(parts: Sequence[Any]) -> Any:
        return kind(zip(keys, parts, strict=True))

    return Node(kind, [f"[{key!r}]" for key in keys], take, make)


def _dataclass(kind: Any) -> Node:
    fields = _fields(kind)

    def take(v: Any) -> Sequence[Any] | None:
        return [getattr(v, field) for field in fields] if type(v) is kind else None

    def make(parts: Sequence[Any]) -> Any:
        try:
            return kind(**dict(zip(fields, parts, strict=True)))
        except TypeError as error:
            error.add_note(
                f"A state's {kind.__name__} is made anew by its fields, as keywords. Let __init__ "
                "take these alone, or register the class with torch's pytree."
            )
            raise

    return Node(kind, [f".{field}" for field in fields], take, make)


def _fields(of: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(of) if field.init]


def _registered(value: Any) -> Node | None:
    """A node of a type that was registered with torch's pytree; None where it was not."""
    parts, spec = _opened(value)
    if len(parts) == 1 and parts[0] is value:
        return None

    def take(v: Any) -> Sequence[Any] | None:
        parts, other = _opened(v)
        return parts if other == spec else None

    names = [f"[{i}]" for i in range(len(parts))]
    if dataclasses.is_dataclass(value) and len(_fields(value)) == len(parts):
        names = [f".{field}" for field in _fields(value)]
    return Node(type(value), names, take, lambda parts: tree_unflatten(parts, spec), str(spec))


def _opened(value: Any) -> tuple[list[Any], Any]:
    """Its parts and torch's account of it, by one level; of a leaf, itself."""
    root = [value]
    found: tuple[list[Any], Any] = tree_flatten(value, is_leaf=lambda v: v is not root[0])
    root.clear()  # torch's walk is a circle, and holds what is_leaf does
    return found
