"""The tensors of the modules that g calls, taken out and put back in, without touching the modules.

`torch.func.functional_call` swaps the tensors of the shared module for the length of the call, so
other threads see them. Here a structural clone (new containers, the same leaves) gets the tensors
for good: private to one solve, and free of the swap's cost in every iteration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from .. import _torch
from .clones import COPIES, clone, freeze_parametrizations
from .names import leads_to, reached, tensors_reached
from .search import Found, find, is_object, keeps_all_in_dict, unwraps
from .shards import sharded, shards, whole

__all__ = ["Binding", "keeps_all_in_dict", "leads_to", "reached", "tensors_reached"]

_LAZY = frozenset({nn.UninitializedParameter, nn.UninitializedBuffer})


class Binding:
    """g around the modules that it calls, callable with any tensors in the place of theirs.

    g is a module, or something that leads to some: see `find`.

    Attributes:
        g: the user's; after `close` one like it, around modules that are nobody else's.
        params: the modules' parameters, in a fixed order, each once, as they were found.
        buffers: their buffers likewise.
        objects: the modules, and the objects that lead to some.
    """

    def __init__(self, g: Any, found: Found) -> None:
        self.g, self._found = g, found
        # What has attributes of its own.
        self.objects = [
            v
            for v, plain in found.values()
            if plain or (is_object(v) and not (isinstance(v, nn.Module) and unwraps(v)))
        ]
        modules = [m for m in self.objects if isinstance(m, nn.Module)]
        self._index: dict[int, int] = {}
        self._sharded = sharded(modules)
        self.reshard()
        self._shards = shards(self._sharded)
        self._lazy = False  # whether its first call makes a parameter
        self.params = self._each(map(_torch.parameters, modules))
        self.buffers = self._each(map(_torch.buffers, modules))
        self._training = bool(self.buffers) and any(
            m.training for m in modules if _torch.buffers(m)
        )
        self._closed = False
        # Attributes of the clones, then what lists and dicts they hold, and the values at first.
        self._watched: list[tuple[dict[str, Any], list[int]]] = []
        self._containers: list[tuple[Any, list[int]]] = []
        self._first: dict[int, Any] = {}  # what such a list or dict held at the start
        self._moving: list[Tensor] = []  # buffers of what was bound last

    @staticmethod
    def of(g: Any) -> Binding | None:
        """The binding of g; None where no module is found in it."""
        found = find(g)
        binding = Binding(g, found) if found else None
        return None if binding is None or binding._lazy else binding

    @property
    def sharded(self) -> bool:
        """Whether processes hold parts of its parameters."""
        return bool(self._sharded)

    def unfilled(self) -> list[Tensor]:
        """The tensors of modules that no call may give others first, as offloading's hooks do."""
        if _torch.any_global_hook():
            return []
        modules = [m for m in self.objects if isinstance(m, nn.Module)]
        hooks = [m for m in modules if _torch.pre_hooks(m) or "forward" in vars(m)]
        inside = {id(m) for around in hooks for m in around.modules()}
        bare = [m for m in modules if id(m) not in inside]
        held = [
            t for m in bare for of in (_torch.parameters, _torch.buffers) for t in of(m).values()
        ]
        return [t for t in held if t is not None]

    @property
    def moved(self) -> Sequence[Tensor]:
        """The buffers of what was bound last, as its calls left them."""
        return self._moving

    def places(self) -> tuple[list[tuple[nn.Module, str]], list[tuple[nn.Module, str]]]:
        """The module and the name of each of `params`, and of each of `buffers`."""
        modules = [m for m in self.objects if isinstance(m, nn.Module)]

        def of(tensors: Sequence[Tensor], held: Callable[[Any], Any]) -> list[Any]:
            at: dict[int, tuple[nn.Module, str]] = {}
            for m in modules:
                for name, t in held(m).items():
                    at.setdefault(id(t), (m, name))
            return [at[id(t)] for t in tensors]

        return of(self.params, _torch.parameters), of(self.buffers, _torch.buffers)

    def held(self) -> list[list[tuple[str, int | None]]]:
        """What each module holds: under which names which of `params` and `buffers`."""
        index = self._index
        modules = [m for m in self.objects if isinstance(m, nn.Module)]
        return [
            [(name, index.get(id(t))) for name, t in held(m).items()]
            for m in modules
            for held in (_torch.parameters, _torch.buffers)
        ]

    def _each(self, of_modules: Iterable[dict[str, Tensor | None]]) -> list[Tensor]:
        index, each = self._index, []
        for tensors in of_modules:
            for t in tensors.values():
                if t is not None and id(t) not in index:
                    index[id(t)] = len(index)
                    each.append(t)
                    self._lazy |= type(t) in _LAZY
        return each

    def own(self) -> list[Tensor]:
        """The tensors that `bind` takes: the parameters, whole, then a copy of each buffer.

        The copies are attached to the buffers, and stay what they are where the buffers move.
        """
        params = self.params
        if self._shards:
            params = [whole(p) if id(p) in self._shards else p for p in params]
        return [*params, *(b.clone() for b in self.buffers)]

    def reshard(self) -> None:
        """Leave modules that FSDP shards with each process's part of their parameters."""
        for m in self._sharded:
            m.reshard()  # type: ignore[operator]

    def bind(self, tensors: Sequence[Tensor], watch: bool = True) -> Callable[..., Any]:
        """g with these tensors; parametrisations are evaluated here, once.

        What its calls do to buffers is done to copies, so each bind starts from the same state.
        watch: whether `left` is to tell of its calls; until `close`.
        """
        n, index = len(self.params), self._index
        buffers = _copies(tensors[n:]) if self.buffers else []
        own = [*tensors[:n], *buffers]
        memo: dict[int, Any] = {}
        bound: Callable[..., Any] = clone(self.g, self._found, memo)
        clones = [memo[id(value)] for value in self.objects]
        modules = [m for m in clones if isinstance(m, nn.Module)]
        for m in modules:
            for of_m in (_torch.parameters(m), _torch.buffers(m)):
                for name, t in of_m.items():
                    if t is not None:
                        of_m[name] = own[index[id(t)]]
        for m in modules:
            freeze_parametrizations(m)
            _torch.renew_flat_weights(m)
        if not self._closed:
            self._moving = buffers
            watched = [value.__dict__ for value in clones] if watch else []
            if buffers:
                watched += map(_torch.buffers, modules)
            self._watched = [(own, list(map(id, own.values()))) for own in watched]
        held = memo.get(COPIES)
        if held:
            self._restore(held)
            if watch and not self._closed:
                self._containers = [(v, _items(v)) for v in held.values()]
        return bound

    def _restore(self, held: dict[int, Any]) -> None:
        """Give lists and dicts what they held at the start of the solve."""
        for key, v in held.items():
            if key not in self._first:
                self._first[key] = copy.copy(v)
            elif key not in self._found:  # those that lead to modules hold the clones of now
                v.clear()
                (v.update if isinstance(v, dict) else v.extend)(self._first[key])

    @property
    def left(self) -> str:
        """What the calls of what was bound last left behind: "attributes", "buffers" or ""."""
        for own, before in self._watched:
            if before != list(map(id, own.values())):
                return "attributes"
        if any(before != _items(v) for v, before in self._containers):
            return "attributes"
        # Not every write is counted (batch norm's is not): modules in training are taken to write.
        return "buffers" if self._training or any(map(_written, self._moving)) else ""

    @property
    def attached(self) -> bool:
        """Whether those calls left a tensor that needs gradients among the attributes."""
        values = [v for own, ids in self._watched for v in own.values() if id(v) not in ids]
        values += [v for v, _ in self._containers]
        leaves = _torch.tree_leaves(values)
        return any(isinstance(t, Tensor) and t.requires_grad for t in leaves)

    def close(self, keep: bool = True) -> None:
        """Watch no more; keep: what is bound from now on has the modules' modes of now."""
        self._closed = True
        if not keep:  # a clone that leads to itself ends here: it holds copies of the buffers
            for own, _ in self._watched:
                own.clear()
        self._watched, self._containers, self._moving = [], [], []
        if keep:
            memo: dict[int, Any] = {}
            self.g = clone(self.g, self._found, memo)
            self.objects = [memo[id(value)] for value in self.objects]
            held = memo.get(COPIES, {})
            if held:
                self._restore(held)
                self._first = {id(v): self._first[key] for key, v in held.items()}
            # What a solve before left there would make this one's node hold that one's.
            for own in (*map(vars, self.objects), *held.values(), *self._first.values()):
                named = own.items() if isinstance(own, dict) else enumerate(own)
                for name, v in [(n, v) for n, v in named if type(v) is Tensor and _attached(v)]:
                    own[name] = v.detach()
            # What torch.compile wrapped stands in the memo before its wrapper, as the same clone.
            again = [(key, new) for key, new in reversed(memo.items()) if key in self._found]
            self._found = {id(new): (new, self._found[key][1]) for key, new in again}

    def begin(self) -> None:
        """Leave on g's own modules the tensors that the first of all calls made and kept.

        A mask, say, that is drawn where there is none yet: not another one in the next call.
        """
        for value, (own, _) in zip(self.objects, self._watched, strict=False):
            before = vars(value)
            for name, v in own.items():
                if type(v) is Tensor and before.get(name) is None:
                    before[name] = v.detach()

    def move(self, but: Collection[int] = ()) -> None:
        """Leave the same on g's own modules, detached, as the calls did on what was bound last.

        but: positions of buffers that are not written to.
        """
        with torch.no_grad():
            pairs = zip(self.buffers, self._moving, strict=False)
            for mine, moved in [pair for i, pair in enumerate(pairs) if i not in but]:
                # Counted as the write was: batch norm's are not, so they spoil no backward.
                (mine if _written(moved) else mine.data).copy_(moved)
            values = [*self.objects, *(m for m in self.objects if isinstance(m, nn.Module))]
            for value, (own, ids) in zip(values, self._watched, strict=False):
                for (name, v), before in zip_longest(list(own.items()), ids):
                    if id(v) != before:
                        plain = _torch.tree_map(_detached, v)
                        if isinstance(value, nn.Module):
                            setattr(value, name, plain)
                        else:  # which may forbid it, and do it by itself
                            vars(value)[name] = plain


def _items(v: Any) -> list[int]:
    """A list's or dict's values, by their ids."""
    return list(map(id, v.values() if isinstance(v, dict) else v))


def _attached(t: Tensor) -> bool:
    return not _torch.wrapped(t) and t.grad_fn is not None


def _copies(buffers: Sequence[Tensor]) -> list[Tensor]:
    if torch.is_inference_mode_enabled():  # whose tensors count no writes
        with torch.inference_mode(False):
            return [b.clone() for b in buffers]
    return [b.clone() for b in buffers]


def _written(b: Tensor) -> bool:
    return _torch.version(b) > 0  # type: ignore[no-any-return]


def _detached(v: Any) -> Any:
    return v.detach() if isinstance(v, Tensor) else v
