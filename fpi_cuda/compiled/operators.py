"""The two operators by which a compiled graph solves, and what they leave for each other.

torch calls an operator's kernel below autograd, where nothing that runs has a gradient: a kernel
here goes back above it first, since the adjoint is made of g's own derivatives.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from .. import _torch
from ..solution import kept
from ..solve.entry import Posed, pose
from ..solve.linear import direction_of
from ..solve.node import gradients
from ..solve.problem import Report
from ..solve.route import solve as route
from ..tree import build, flatten
from .given import together
from .plan import plan_of

__all__ = ["solve"]

_UNSAFE = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


class _Kept(bytearray):
    """What the adjoint of one solve needs beside tensors of the graph, held by a tensor's storage.

    So it lives exactly as long as the graph's saved tensors do. Its bytes are its number.
    """

    posed: Posed
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


@contextlib.contextmanager
def _above_autograd(grad: bool) -> Iterator[None]:
    inference = torch.is_inference_mode_enabled()
    above = contextlib.nullcontext() if inference else _torch.no_inference()
    with above, torch.set_grad_enabled(grad and not inference):
        yield


@torch.library.custom_op("fpi_cuda::_layer", mutates_args=(), tags=_UNSAFE)
def solve(
    x0: list[Tensor],
    given: list[Tensor],
    own: list[Tensor],
    whole: list[int],
    moving: list[int],
    handle: int,
    spec: int,
    cold: bool,
    grad: bool,
    autocast: Optional[torch.dtype],  # noqa: UP045 - as torch.library reads it
) -> list[Tensor]:
    """Solve for a layer.

    Args:
        x0: the leaves of the start.
        given: the tensors of the call.
        own: those of g's modules.
        whole: the whole numbers of the call.
        moving: positions in `own` of buffers to return as the solve leaves them.
        handle: the layer's.
        spec: of what the call was given.
        cold: whether the start is the layer's own.
        grad: whether the graph was traced with gradients on.
        autocast: the dtype under which it was traced; None: without autocast.

    Returns:
        The leaves of x̂; a ticket for the adjoint; the buffers asked for.
    """
    plan, layer = plan_of(handle)
    device = x0[0].device.type
    mode = torch.autocast(device, autocast, autocast is not None, cache_enabled=False)
    plain = [t.detach() for t in given]
    call = together(spec, plain, whole)
    with _above_autograd(grad), mode:
        start = build(layer._tree(call["inputs"]) if cold else None, [t.detach() for t in x0])
        start, options, slot, keywords = layer._prepared(start, cold, **call)
        options.check()
        posed = pose(layer.g, start, call["inputs"], call["params"], options, keywords)
        assert isinstance(posed, Posed)
        binding = posed.map.binding
        if not plan.stands(binding):
            raise RuntimeError(
                "FixedPointLayer: a compiled graph needs the modules that g called when it was "
                "compiled, and g calls others now; write torch.compiler.reset(), and the next call "
                "compiles again"
            )
        own = [t.detach() for t in own]
        tensors = [*posed.inputs, *posed.params, *own]
        report, problem = Report(), posed.problem
        x, keep, _ = route(direction_of(problem, posed.state.packed, tensors), report)
        if report.closure:
            raise RuntimeError(
                "FixedPointLayer: in a compiled graph g must not capture a tensor that needs "
                "gradients, which would be lost; pass it in the layer's inputs or params, or make "
                "it a parameter of a module that g calls"
            )
        moved = _settled(posed, x, own, grad)
        assert report.record is not None
        solution = posed.solution(x, report.record)
        layer.last = kept(solution)
        if slot is not None:
            slot.keep(layer.last)
        made = _new()
        if grad:
            at = {id(t): i for i, t in reversed(list(enumerate([*plain, *own])))}
            made.order = [at[id(t)] for t in tensors]
            made.posed, made.report, made.x, made.keep = posed, report, x, keep
    leaves = [torch.empty_like(t).copy_(p) for t, p in zip(x0, flatten(solution.x)[0], strict=True)]
    n = 0 if binding is None else len(binding.params)
    return [*leaves, made.ticket, *(moved[i - n].clone() for i in moving)]


def _settled(posed: Posed, x: Tensor, own: Sequence[Tensor], grad: bool) -> Sequence[Tensor]:
    """The buffers as the solve leaves them; see `UserMap.settle`."""
    map, binding = posed.map, posed.map.binding
    if binding is None:
        return ()
    left, n = binding.left, len(binding.params)
    buffers = own[n:]
    if left:
        with torch.set_grad_enabled(grad and left == "attributes"):
            leaves = [_torch.normal(t) for t in own[:n]]
            if grad:
                leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in leaves]
            g = map.taking(binding.bind([*leaves, *buffers]), posed.params)
            g(map.unpack(x.detach()), *posed.inputs)
        if left == "attributes" and grad and binding.attached:
            raise RuntimeError(
                "FixedPointLayer: in a compiled graph g must not leave a tensor that needs "
                "gradients on a module (a router's loss), which would be lost; return it from g "
                "with has_aux=True"
            )
        binding.move()
        buffers = binding.moved
    binding.close()
    return buffers


@solve.register_fake
def _(
    x0: list[Tensor],
    given: list[Tensor],
    own: list[Tensor],
    whole: list[int],
    moving: list[int],
    *_: Any,
) -> list[Tensor]:
    ticket = torch.empty(1, dtype=torch.int64)
    return [*map(torch.empty_like, x0), ticket, *(torch.empty_like(own[i]) for i in moving)]


@torch.library.custom_op("fpi_cuda::_layer_adjoint", mutates_args=(), tags=_UNSAFE)
def adjoint(
    v: list[Optional[Tensor]],  # noqa: UP045
    tensors: list[Tensor],
    ticket: Tensor,
    need: list[int],
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
    made = _all_kept[int(ticket)]
    posed, x = made.posed, made.x
    with _above_autograd(True), _torch.unhooked():
        plain = [t.detach() for t in tensors]
        packed = _packed(posed, x, v)
        keep = made.keep
        if keep is None:
            keep = torch.ones(x.shape[:1], dtype=torch.bool, device=x.device)
        wanted = [i for i, of in enumerate(made.order) if of in need]
        with torch.no_grad():
            found = gradients(
                *(posed.problem, made.report, x, keep, packed),
                *([plain[i] for i in made.order], wanted),
            )
        sums: dict[int, Tensor] = {}
        for i, grad in zip(wanted, found.of, strict=True):
            if grad is not None:
                of = made.order[i]
                sums[of] = sums[of] + grad if of in sums else grad
    return [sums[i].clone() if i in sums else torch.zeros_like(plain[i]) for i in need]


def _packed(posed: Posed, x: Tensor, v: Sequence[Tensor | None]) -> Tensor:
    """The gradient by the solver's one tensor, of those by the leaves of the user's state."""
    state = posed.state
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


@adjoint.register_fake
def _(
    v: list[Optional[Tensor]],  # noqa: UP045
    tensors: list[Tensor],
    ticket: Tensor,
    need: list[int],
) -> list[Tensor]:
    return [torch.empty_like(tensors[i]) for i in need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x0, given, own, whole, moving, *_ = inputs
    ctx.n = len(x0), len(given), len(own)
    ctx.numbers = [None] * len(whole), [None] * len(moving)  # which have no gradient
    ctx.save_for_backward(*given, *own, output[len(x0)])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    n, given, own = ctx.n
    *tensors, ticket = ctx.saved_tensors
    _, *needed = ctx.needs_input_grad[:3]
    need = [i for i, needs in enumerate([*needed[0], *needed[1]]) if needs]
    found = adjoint(list(grads[:n]), tensors, ticket, need)
    out: list[Tensor | None] = [None] * (given + own)
    for i, grad in zip(need, found, strict=True):
        out[i] = grad
    return [None] * n, out[:given], out[given:], *ctx.numbers, *(None,) * 5


solve.register_autograd(_backward, setup_context=_save)
