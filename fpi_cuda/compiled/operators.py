"""The two operators by which a compiled graph solves, and what they leave for each other.

torch calls an operator's kernel below autograd, where nothing that runs has a gradient: a kernel
here goes back above it first, since the adjoint is made of g's own derivatives.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _torch
from .._torch_graphs import odd
from ..solution import kept
from ..solve.entry import Posed, pose
from ..solve.linear import direction_of
from ..solve.node import gradients
from ..solve.problem import Context, Problem, Report
from ..solve.route import solve as route
from ..start import tree_of
from ..state import State
from ..tree import build, flatten
from .given import together
from .plan import plan_of

__all__ = ["solve"]


class _Kept(bytearray):
    """What the adjoint of one solve needs beside tensors of the graph, held by a tensor's storage.

    So it lives exactly as long as the graph's saved tensors do. Its bytes are its number.
    """

    problem: Problem
    state: State
    report: Report
    x: Tensor  # the solver's
    keep: Tensor | None
    order: Sequence[int]  # which of the operator's tensors the map's are

    @property
    def ticket(self) -> Tensor:
        """Int64 [1]; its storage holds this object."""
        return torch.frombuffer(self, dtype=torch.int64)


_numbers = itertools.count()
_all_kept: weakref.WeakValueDictionary[int, _Kept] = weakref.WeakValueDictionary()


def _new() -> _Kept:
    number = next(_numbers)
    made = _Kept(number.to_bytes(8, "little"))
    _all_kept[number] = made
    return made


def _of(ticket: Tensor) -> _Kept:
    made = _all_kept.get(int(ticket))
    if made is None:
        raise RuntimeError(
            "FixedPointLayer: in a compiled graph the backward needs the very tensors that the "
            "forward saved, and hooks on saved tensors gave copies; let the hooks return int64 "
            "tensors of shape [1] on the CPU as they are"
        )
    return made


def _solved(
    x0: Sequence[Tensor],
    given: Sequence[Tensor],
    own: Sequence[Tensor],
    handle: Tensor,
    whole: Sequence[int],
    real: Sequence[Tensor],
    moving: Sequence[int],
    spec: int,
    place: int,
    cold: bool,
    grad: bool,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """Solve for a layer; the output is attached where autograd is on.

    Args:
        x0: the leaves of the start.
        given: the tensors of the call.
        own: those of g's modules.
        handle: the layer's.
        whole: the whole numbers of the call.
        real: its other numbers, float64 [] on the CPU.
        moving: positions in `own` of buffers to return as the solve leaves them.
        spec: of what the call was given.
        place: tells equal calls in a graph apart.
        cold: whether the start is the layer's own.
        grad: whether the graph was traced with gradients on.
        autocast: the dtype under which it was traced; None: without autocast.

    Returns:
        The leaves of x̂; a ticket for the adjoint; the buffers asked for.
    """
    plan, layer = plan_of(int(handle))
    device = x0[0].device.type
    attached = torch.is_grad_enabled()
    call = together(spec, given, whole, real)
    with torch.set_grad_enabled(grad), Context(grad, autocast, device).autocast():
        start = build(tree_of(layer, call["inputs"]) if cold else None, [t.detach() for t in x0])
        start, options, slot, keywords = layer._prepared(start, cold, **call)
        options.check()
        if grad and not getattr(options.adjoint, "by_node", False):
            layer._plan = None
            raise RuntimeError(
                "FixedPointLayer: a compiled graph has the adjoint as an operator, and "
                f"{type(options.adjoint).__name__}, which the layer was given after it was "
                "compiled, is none; call again, which leaves the graph there"
            )
        posed = pose(layer.g, start, call["inputs"], call["params"], options, keywords)
        assert isinstance(posed, Posed)
        binding = posed.map.binding
        if not plan.stands(binding):
            layer._plan = None  # by which the graph is known to be another one's
            raise RuntimeError(
                "FixedPointLayer: a compiled graph needs the modules that g called when it was "
                "compiled, with as many parameters and buffers, the same ones shared (g has others "
                "now); call again, which compiles again"
            )
        tensors = [*posed.inputs, *posed.params, *own]
        problem, report, keep = posed.problem, Report(), None
        if attached:
            x = options.adjoint.attach(problem, posed.state.packed, tensors, report)
        else:
            plain = [t.detach() for t in tensors]
            x, keep, _ = route(direction_of(problem, posed.state.packed, plain), report)
        if report.closure:
            layer._plan = None
            raise RuntimeError(
                "FixedPointLayer: in a compiled graph g must not capture a tensor that needs "
                "gradients, which would be lost; pass it in the layer's inputs or params, or make "
                "it a parameter of a module that g calls"
            )
        moved = _settled(posed, x, own, grad, moving)
        assert report.record is not None
        report.record.evaluations += options.has_aux
        solution = posed.solution(x, report.record)
        last = layer.__dict__["_last"] = kept(solution)
        if slot is not None:
            slot.keep(last)
        ticket = torch.zeros(1, dtype=torch.int64)
        if grad and not attached:
            at = {id(t): i for i, t in reversed(list(enumerate([*given, *own])))}
            made = _new()
            made.order = [at[id(t)] for t in tensors]
            made.problem, made.state, made.report = problem, posed.state, report
            made.x, made.keep, ticket = x, keep, made.ticket
    # Laid out as the start is, as the compiler was told; and nobody else's.
    leaves = [torch.empty_like(t).copy_(p) for t, p in zip(x0, flatten(solution.x)[0], strict=True)]
    n = 0 if binding is None else len(binding.params)
    return [*leaves, ticket, *(moved[i - n].clone() for i in moving)]


def _settled(
    posed: Posed, x: Tensor, own: Sequence[Tensor], grad: bool, moving: Sequence[int]
) -> Sequence[Tensor]:
    """The buffers as the solve leaves them; see `UserMap.settle`.

    The graph itself writes to those in moving, and to all with has_aux: it may have put others in
    their place (`torch.func.functional_call`).
    """
    map, binding = posed.map, posed.map.binding
    if binding is None:
        return ()
    n = len(binding.params)
    left = "" if map.has_aux else binding.left  # then the graph has that call itself
    buffers = own[n:]
    if left:
        with torch.set_grad_enabled(grad and left == "attributes"):
            leaves = [_torch.normal(t) for t in own[:n]]
            if grad:  # also where no autograd follows them here
                leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in leaves]
            g = map.taking(binding.bind([*leaves, *buffers]), posed.params)
            g(map.unpack(x.detach()), *posed.inputs)
        if left == "attributes" and grad and binding.attached:
            raise RuntimeError(
                "FixedPointLayer: in a compiled graph g must not leave a tensor that needs "
                "gradients on a module (a router's loss), which would be lost; return it from g "
                "with has_aux=True"
            )
        binding.move(frozenset(i - n for i in moving))
        buffers = binding.moved
    binding.close(keep=grad)
    return buffers


def _adjoint(
    v: Sequence[Tensor | None], tensors: Sequence[Tensor], ticket: Tensor, need: Sequence[int]
) -> list[Tensor]:
    """The gradients of a solve.

    Args:
        v: those of the loss by the leaves of x̂; None: zero.
        tensors: what the solve was given, then its own.
        ticket: what the solve returned.
        need: positions of the tensors whose gradients are wanted.

    Returns:
        A gradient for each of those.
    """
    made = _of(ticket)
    x, keep = made.x, made.keep
    plain = [t.detach() for t in tensors]
    if keep is None:
        keep = torch.ones(x.shape[:1], dtype=torch.bool, device=x.device)
    wanted = [i for i, of in enumerate(made.order) if of in need]
    with torch.no_grad(), _torch.unhooked():
        found = gradients(
            *(made.problem, Report(made.report), x, keep, _packed(made.state, x, v)),
            *([plain[i] for i in made.order], wanted),
        )
    sums: dict[int, Tensor] = {}
    for i, grad in zip(wanted, found.of, strict=True):
        if grad is not None:
            of = made.order[i]
            sums[of] = sums[of] + grad if of in sums else grad
    # What an operator returns shares no memory: of f(x) + z₁ + z₂ both gradients are c.
    taken = {_place(t) for t in (*v, *tensors) if t is not None}
    out = []
    for i in need:
        grad = sums.get(i)
        grad = torch.zeros_like(plain[i]) if grad is None else grad
        if _place(grad) in taken or grad.stride() != plain[i].stride():
            grad = torch.empty_like(plain[i]).copy_(grad)
        taken.add(_place(grad))
        out.append(grad)
    return out


def _place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _packed(state: State, x: Tensor, v: Sequence[Tensor | None]) -> Tensor:
    """The gradient by the solver's one tensor, of those by the leaves of the user's state."""
    if not state.structure:
        return torch.zeros_like(x) if v[0] is None else v[0].detach()
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        parts, _ = flatten(state.unpack(leaf))
    there = [(p, d.detach()) for p, d in zip(parts, v, strict=True) if d is not None]
    if not there:
        return torch.zeros_like(x)
    outputs, weights = zip(*there, strict=True)
    (packed,) = torch.autograd.grad(outputs, leaf, weights)
    return packed


class _Traced(Function):
    """The solve in a graph that is being made, with its adjoint as the other operator."""

    @staticmethod
    def forward(ctx: Any, n: tuple[int, int, int], rest: Sequence[Any], *tensors: Tensor) -> Any:
        parts = _parts(tensors, n)
        with _torch.below_autograd():
            out = solve(*parts, *rest)
        ctx.n = n
        ctx.save_for_backward(*parts[1], *parts[2], out[n[0]])
        ctx.mark_non_differentiable(*out[n[0] :])
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *v: Tensor | None) -> tuple[Any, ...]:
        start, *_ = ctx.n
        *tensors, ticket = ctx.saved_tensors
        need = [i for i, needs in enumerate(ctx.needs_input_grad[2 + start :]) if needs]
        out: list[Tensor | None] = [None] * len(tensors)
        for i, grad in zip(need, _adjoint_of(list(v[:start]), tensors, ticket, need), strict=True):
            out[i] = grad
        return (None, None, *[None] * start, *out)


class _Once(Function):
    """The adjoint, which has no derivative in a graph."""

    @staticmethod
    def forward(ctx: Any, n: int, ticket: Tensor, need: Sequence[int], *tensors: Any) -> Any:
        with _torch.below_autograd():
            return tuple(_adjoint_of(list(tensors[:n]), list(tensors[n:]), ticket, need))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "FixedPointLayer: a compiled graph has first derivatives of a layer only (a second one "
            "was asked for); take it of the layer outside of torch.compile, whose derivatives are "
            "of every order"
        )


def _parts(tensors: Sequence[Tensor], n: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(tensors)
    return [[next(rest) for _ in range(k)] for k in n]


def _solve_at(x0: list[Tensor], given: list[Tensor], own: list[Tensor], *rest: Any) -> Any:
    """With real tensors, the solve; while a graph is made, a part of it."""
    if not odd(x0[:1]):
        return _solved(x0, given, own, *rest)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *own)):
        n = len(x0), len(given), len(own)
        return list(_Traced.apply(n, rest, *x0, *given, *own))  # type: ignore[no-untyped-call]
    with _torch.below_autograd():
        return solve(x0, given, own, *rest)


def _adjoint_at(v: list[Tensor | None], tensors: list[Tensor], ticket: Tensor, need: Any) -> Any:
    if not odd([ticket]):
        return _adjoint(v, tensors, ticket, need)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*v, *tensors)):
        return list(_Once.apply(len(v), ticket, need, *v, *tensors))  # type: ignore[no-untyped-call]
    with _torch.below_autograd():
        return _adjoint_of(v, tensors, ticket, need)


def _above(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel where torch calls it below autograd: what a solve makes graphs of is above."""

    def run(*arguments: Any) -> Any:
        if torch.is_inference_mode_enabled():
            return kernel(*arguments)
        with _torch.no_inference():
            return kernel(*arguments)

    return run


def _fake(
    x0: list[Tensor], given: Any, own: Any, handle: Any, whole: Any, real: Any, moving: Any, *_: Any
) -> list[Tensor]:
    ticket = torch.empty(1, dtype=torch.int64)
    return [*map(torch.empty_like, x0), ticket, *(torch.empty_like(own[i]) for i in moving)]


def _fake_adjoint(v: Any, tensors: list[Tensor], ticket: Tensor, need: Any) -> list[Tensor]:
    return [torch.empty_like(tensors[i]) for i in need]


_operators = torch.ops.fpi_cuda
_library = torch.library.Library("fpi_cuda", "FRAGMENT")
# A device can't record what a host decides.
_tags = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
_library.define(
    "_layer(Tensor[] x0, Tensor[] given, Tensor[] own, Tensor handle, SymInt[] whole, "
    "Tensor[] real, int[] moving, int spec, int place, bool cold, bool grad, "
    "ScalarType? autocast) -> Tensor[]",
    tags=_tags,
)
_library.define(
    "_layer_adjoint(Tensor?[] v, Tensor[] tensors, Tensor ticket, int[] need) -> Tensor[]",
    tags=_tags,
)
for _name, _at, _kernel, _shapes in (
    ("_layer", _solve_at, _solved, _fake),
    ("_layer_adjoint", _adjoint_at, _adjoint, _fake_adjoint),
):
    _library.impl(_name, _at, "Autograd")
    _library.impl(_name, _above(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fpi_cuda::{_name}", _shapes, lib=_library)
solve = _operators._layer.default
_adjoint_of = _operators._layer_adjoint.default
