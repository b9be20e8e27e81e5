"""g, its linearisation and g mapped by torch.vmap, each with every tensor explicit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import attribute, transforming
from .._torch_graphs import fake_mode
from ..arguments import Arguments
from ..captures import followed
from ..derivatives import free, pulled, vjp
from ..forms import Form, form_of
from ..modules import Binding
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
        taken: which of the tensors it takes derivatives by itself.
    """

    n_inputs: int
    n_states = 0
    form_dim = 0
    g: Any = None
    taken: Sequence[int] = ()

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """The map with its shared tensors put in."""
        raise NotImplementedError

    def mapped(self, dims: Sequence[int | None]) -> Map:
        """torch.vmap of the map over a new first dimension of x and of the tensors that have it."""
        return VmappedMap(self, dims)

    def linear(self, transpose: bool) -> LinearMap:
        """Its linearisation, or the transpose of that."""
        return LinearMap(self, transpose)

    def around(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Where its linearisation is taken, and with which tensors, for a fixed point x of it."""
        return x, tensors

    def paired(self, c: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        """⟨c, the map at x⟩."""
        return torch.sum(c * self(x, *tensors))

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
        has_aux: whether g returns (x, aux), of which the map is the first.
    """

    def __init__(
        self,
        g: Callable[..., Any],
        n_inputs: int,
        n_params: int,
        pack: Callable[[Any], Tensor],
        unpack: Callable[[Tensor], Any],
        arguments: Arguments | None = None,
        has_aux: bool = False,
    ) -> None:
        self.g, self.arguments, self.has_aux = g, arguments, has_aux
        self.n_inputs, self.n_params = n_inputs, n_params
        self.pack, self.unpack = pack, unpack
        self.binding = Binding.of(g)
        self.left: str | None = None  # see `Binding.left`; None: not known yet
        self.form_dim = 0 if has_aux else attribute(g, "form_dim") or 0

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
        self,
        x: Tensor,
        inputs: Sequence[Any],
        params: Sequence[Any],
        captured: bool,
        own: Sequence[Tensor] = (),
    ) -> Any:
        """Call g at the solution x, where a call leaves something on its modules, or for aux.

        All calls before were made on copies: buffers move once a solve, and attributes that g sets
        (a router's loss) are those of the solution, attached to it.

        Args:
            x: the solution.
            inputs: as the user gave them.
            params: likewise.
            captured: whether the graph driver was asked for.
            own: `self.own` of this solve, for aux.

        Returns:
            Aux, attached to x and the tensors; None without has_aux.
        """
        binding, aux = self.binding, None
        if binding is None and not self.has_aux:
            return None

        def at(g: Callable[..., Any], x: Tensor) -> Any:
            return self.taking(g, params)(self.unpack(x), *inputs)

        if binding is None:
            return pair(at(self.g, x))[1]
        transformed = transforming()
        left = "" if transformed else binding.left if self.left is None else self.left
        attributes = left == "attributes"
        if attributes:
            binding.begin()
        elif self.has_aux:  # on copies, so that no buffer is attached
            aux = pair(at(binding.bind(own), x))[1]
            if left:
                binding.move()
            left = ""
            binding.reshard()
        # Else no derivative will bind again.
        binding.close(keep=x.requires_grad or followed())
        if left:
            with contextlib.nullcontext() if attributes else torch.no_grad():
                value = at(self.g, x if attributes else x.detach())
            if self.has_aux:
                aux = pair(value)[1]
            binding.reshard()
        if attributes and x.requires_grad and not captured:
            # g's modules hold now what leads to the node, which must not lead to them: Python's
            # collector does not see through it. (Captured graphs are found by the user's g.)
            self.g = binding.g
        return aux

    def form(self, x: Tensor, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> Form | None:
        """g as layers that the library knows, if that is all it is; x is what g would get."""
        if self.binding is None or self.n_params:
            return None
        return form_of(self.binding.bind(params, watch=False), "form", x, *inputs)

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """g with the user's params appended, and its modules' tensors put in."""
        n, pack, unpack = self.n_params, self.pack, self.unpack
        g = self.taking(self.binding.bind(params[n:]) if self.binding else self.g, params[:n])
        if self.has_aux:
            g = _without_aux(g)
        if pack is same:
            return g

        def bound(x: Tensor, *inputs: Tensor) -> Tensor:
            parts = unpack(x)
            gx: Any = None
            try:
                gx = g(parts, *inputs)
                return pack(gx)
            except (TypeError, AttributeError) as error:
                if _as_pair(gx) and not isinstance(gx[0], Tensor):
                    error.add_note(f"fixed_point: {_PAIR}")
                    raise
                if isinstance(parts, tuple):
                    error.add_note(
                        f"fixed_point gives g the state as one tuple of {len(parts)} tensors, like "
                        "x0; where g takes them one by one, write lambda x, *z: g(*x, *z)"
                    )
                elif not isinstance(parts, Tensor):
                    error.add_note(f"fixed_point gives g a {type(parts).__name__} like x0")
                raise

        return bound


class LinearMap(Map):
    """u ↦ M u + v with M = ∂g/∂x at x, or its transpose. Inputs: x, v, then g's.

    Its fixed point is the tangent of g's for v = (∂g/∂z) dz; transposed, it is the adjoint for the
    gradient v that comes in (paper eq. 10).
    """

    n_states = 2
    taken = (0,)

    def __init__(self, inner: Map, transpose: bool) -> None:
        self.inner, self.transpose = inner, transpose
        self.n_inputs = 2 + inner.n_inputs

    def mapped(self, dims: Sequence[int | None]) -> Map:
        """Of the map that it linearises, linearised."""
        return LinearMap(VmappedMap(self.inner, dims[2:]), self.transpose)

    def linear(self, transpose: bool) -> LinearMap:
        """M is its own derivative."""
        return LinearMap(self.inner, self.transpose != transpose)

    def around(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """See `Map`."""
        return tensors[0], tensors[2:]

    def paired(self, c: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        """⟨c, M u + v⟩ at u = x as ⟨Mᵀ c, u⟩ + ⟨c, v⟩: Mᵀ takes one derivative, M two."""
        if self.transpose:
            return super().paired(c, x, *tensors)
        at, v, *of_g = tensors
        mc = self.linear(True)(c, at, torch.zeros_like(v), *of_g)
        return torch.sum(mc * x) + torch.sum(c * v)

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """The affine map at these params."""
        g, transpose = self.inner.bind(params), self.transpose

        def bound(u: Tensor, x: Tensor, v: Tensor, *inputs: Tensor) -> Tensor:
            if transforming():
                pull = torch.func.vjp(lambda q: g(q, *inputs), x)[1]
                if transpose:
                    return pull(u)[0] + v  # type: ignore[no-any-return]
                push = torch.func.vjp(lambda w: pull(w)[0], torch.zeros_like(u))[1]
                return push(u)[0] + v  # type: ignore[no-any-return]
            # x belongs to an independent graph here, as everything does inside a node's forward.
            graph = torch.is_grad_enabled()
            with torch.set_grad_enabled(True):
                leaf = x if x.requires_grad else free(x)
                y = g(leaf, *inputs)
                mu = vjp(*(y, leaf) if transpose else pulled(y, leaf), u, create_graph=graph)
            return mu + v

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


_PAIR = "where g returns (x, aux), pass has_aux=True"


def _as_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def pair(value: Any) -> tuple[Any, Any]:
    """What g returned as (x, aux).

    Raises:
        TypeError: it is no pair.
    """
    if not _as_pair(value):
        got = f"{len(value)} items" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(
            f"fixed_point: with has_aux=True g must return a tuple of two, (x, aux) (got {got})"
        )
    return value[0], value[1]


def _without_aux(g: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: pair(g(*given))[0]


def check_output(gx: Any, x: Tensor) -> Tensor:
    """g's value, or an error that says what it must be."""
    if not isinstance(gx, Tensor):
        advice = f"; {_PAIR}" if _as_pair(gx) else ""
        raise TypeError(
            f"fixed_point: g must return a tensor like x (got {type(gx).__name__}){advice}"
        )
    if gx.shape != x.shape:
        raise ValueError(
            f"fixed_point: g must return the shape of x, {tuple(x.shape)} (got {tuple(gx.shape)}); "
            "where g broadcasts, give x0 the full shape"
        )
    if gx.device != x.device:
        raise ValueError(
            f"fixed_point: g must return a tensor on x's device, {x.device} (got {gx.device})"
        )
    if type(gx) is not Tensor and fake_mode(gx) is not None and fake_mode(x) is None:
        raise ValueError(
            "fixed_point: g must return values (got a fake tensor, which has none, for an x that "
            "has them); give g's tensors values, or take x0 and the inputs from the same "
            "FakeTensorMode, for shapes alone"
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
