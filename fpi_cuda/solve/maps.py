"""g, its transposed linearisation and g mapped by torch.vmap, each with every tensor explicit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import attribute, transforming
from ..arguments import Arguments
from ..forms import Form, form_of
from ..modules import Binding
from ..operators import free, vjp
from ..state import same

Bound = Callable[..., Tensor]


class Map:
    """A map x ↦ g(x, *inputs, *params) of the state.

    `bind(params)` does what depends on the shared tensors alone, once, and returns f(x, *inputs).

    Attributes:
        n_inputs: how many tensors come before the shared ones.
        n_states: how many of those are shaped like the state, and so are mapped wherever it is.
        form_dim: dimensions of the states for which the map may have a form; 0: it never has one.
        g: the user's, for a map that is no more than that; else None.
    """

    n_inputs: int
    n_states = 0
    form_dim = 0
    g: Any = None

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """The map with its shared tensors put in."""
        raise NotImplementedError

    def mapped(self, dims: Sequence[int | None]) -> Map:
        """torch.vmap of the map over a new first dimension of x and of the tensors that have it."""
        return VmappedMap(self, dims)

    def __call__(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The map at x; tensors are the inputs, then the params."""
        n = self.n_inputs
        return self.bind(tensors[n:])(x, *tensors[:n])


class UserMap(Map):
    """The user's g, checked at every call.

    Args:
        g: a callable g(x, *inputs, *params).
        n_inputs, n_params: how many of each the user passed; those of g's modules follow.
        pack, unpack: between the user's state (a tree of tensors) and the solver's one tensor.
        arguments: how g takes its arguments, where those are not tensors by position alone; the
            tensors that it gets whole are the last of the n_params.
    """

    def __init__(
        self,
        g: Callable[..., Any],
        n_inputs: int,
        n_params: int,
        pack: Callable[[Any], Tensor],
        unpack: Callable[[Tensor], Any],
        arguments: Arguments | None = None,
    ) -> None:
        self.g, self.arguments = g, arguments
        self.n_inputs, self.n_params = n_inputs, n_params
        self.pack, self.unpack = pack, unpack
        self.binding = Binding.of(g)
        self.left: str | None = None  # see `Binding.left`; None: not known yet
        self.form_dim = attribute(g, "form_dim") or 0

    @property
    def own(self) -> Sequence[Tensor]:
        """The tensors of the modules that g calls: parameters, then copies of the buffers."""
        return self.binding.own() if self.binding else ()

    @property
    def n_buffers(self) -> int:
        """How many of those are buffers."""
        return len(self.binding.buffers) if self.binding else 0

    @property
    def values(self) -> Any:
        """All that is read in Python where the map is called."""
        return self.g if self.arguments is None else (self.g, self.arguments.values)

    def taking(self, g: Callable[..., Any], shared: Sequence[Tensor]) -> Callable[..., Any]:
        """f(x, *inputs) by g with the shared tensors that the user passed; x as the user's."""
        if self.arguments is not None:
            return self.arguments.put(g, shared)
        return (lambda x, *inputs: g(x, *inputs, *shared)) if shared else g

    def settle(
        self, x: Tensor, inputs: Sequence[Any], params: Sequence[Any], captured: bool
    ) -> None:
        """Call g itself at the solution x, where a call leaves something on its modules.

        All calls before were made on copies: buffers move once a solve, and attributes that g sets
        (a router's loss) are those of the solution, attached to it. captured: whether the graph
        driver was asked for.
        """
        binding = self.binding
        if binding is None:
            return
        transformed = transforming()
        left = "" if transformed else binding.left if self.left is None else self.left
        attributes = left == "attributes"
        if attributes:
            binding.begin()
        binding.close(keep=transformed or x.requires_grad)  # else no derivative will bind again
        if left:
            with contextlib.nullcontext() if attributes else torch.no_grad():
                g = self.taking(self.g, params)
                g(self.unpack(x if attributes else x.detach()), *inputs)
            binding.reshard()
        if attributes and x.requires_grad and not captured:
            # g's modules hold now what leads to the node, which must not lead to them: Python's
            # collector does not see through it. (Captured graphs are found by the user's g.)
            self.g = binding.g

    def form(self, x: Tensor, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> Form | None:
        """g as layers that the library knows, if that is all it is; x is what g would get."""
        if self.binding is None or self.n_params:
            return None
        return form_of(self.binding.bind(params, watch=False), "form", x, *inputs)

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """g with the user's params appended, and its modules' tensors put in."""
        n, pack, unpack = self.n_params, self.pack, self.unpack
        g = self.taking(self.binding.bind(params[n:]) if self.binding else self.g, params[:n])
        if pack is same:
            return g

        def bound(x: Tensor, *inputs: Tensor) -> Tensor:
            parts = unpack(x)
            try:
                return pack(g(parts, *inputs))
            except (TypeError, AttributeError) as error:
                if isinstance(parts, tuple):
                    error.add_note(
                        f"fixed_point gives g the state as one tuple of {len(parts)} tensors, like "
                        "x0; where g takes them one by one, write lambda x, *z: g(*x, *z)"
                    )
                raise

        return bound


class TransposedMap(Map):
    """c ↦ (∂g/∂x)ᵀ c + v at x: the backward layer's map (paper eq. 10). Inputs: x, v, then g's."""

    n_states = 2

    def __init__(self, inner: Map) -> None:
        self.inner = inner
        self.n_inputs = 2 + inner.n_inputs

    def mapped(self, dims: Sequence[int | None]) -> Map:
        """Of the map that it transposes, transposed."""
        return TransposedMap(VmappedMap(self.inner, dims[2:]))

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """The affine map at these params."""
        g = self.inner.bind(params)

        def bound(c: Tensor, x: Tensor, v: Tensor, *inputs: Tensor) -> Tensor:
            if transforming():
                return torch.func.vjp(lambda q: g(q, *inputs), x)[1](c)[0] + v  # type: ignore[no-any-return]
            # x belongs to an independent graph here, as everything does inside a node's forward.
            graph = torch.is_grad_enabled()
            with torch.set_grad_enabled(True):
                leaf = x if x.requires_grad else free(x)
                y = g(leaf, *inputs)
                jc = vjp(y, leaf, c, create_graph=graph)
            return jc + v

        return bound


class VmappedMap(Map):
    """torch.vmap of a map; see `Map.mapped`."""

    def __init__(self, inner: Map, dims: Sequence[int | None]) -> None:
        self.inner, self.dims = inner, tuple(dims)
        self.n_inputs = inner.n_inputs

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """The mapped map at these params."""
        mapped = torch.vmap(self.inner, in_dims=(0, *self.dims))

        def bound(x: Tensor, *inputs: Tensor) -> Tensor:
            return mapped(x, *inputs, *params)

        return bound


def users(map: Any) -> Any:
    """What of a map is the user's: g, and what it is given beside tensors."""
    while not isinstance(map, UserMap):
        map = map.inner
    return map.g if map.arguments is None else map.arguments.around(map.g)


def check_output(gx: Any, x: Tensor) -> Tensor:
    """g's value, or an error that says what it must be."""
    if not isinstance(gx, Tensor):
        raise TypeError(f"fixed_point: g must return a tensor like x (got {type(gx).__name__})")
    if gx.shape != x.shape:
        raise ValueError(
            f"fixed_point: g must return the shape of x, {tuple(x.shape)} (got {tuple(gx.shape)}); "
            "where g broadcasts, give x0 the full shape"
        )
    if gx.device != x.device:
        raise ValueError(
            f"fixed_point: g must return a tensor on x's device, {x.device} (got {gx.device})"
        )
    if gx.dtype != x.dtype:
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        if autocast and gx.is_floating_point():
            return gx.to(x.dtype)
        advice = "convert x0, the inputs or the parameters to one dtype"
        if gx.is_complex():
            advice = "take its real part, or start from a complex state, x0 + 0j"
        raise TypeError(
            f"fixed_point: g must return x's dtype, {x.dtype} (got {gx.dtype}); {advice}"
        )
    return gx
