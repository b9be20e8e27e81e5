"""The autograd node of a fixed point, closed under differentiation in both modes.

x̂ = g(x̂, z; θ) is one node (paper eq. 4). Its backward solves c = (∂g/∂x)ᵀ c + v (eq. 9), which is
another such node: the fixed point of the affine map c ↦ P(h)(c) + v with x̂, v, z, θ as explicit
inputs (eq. 10); then ∂h/∂z and ∂h/∂θ at c by P (eq. 11). Its rule for tangents solves
t = (∂g/∂x) t + (∂g/∂z) dz, which is such a node too, the last term by P. So every order is right,
and every mixture of modes. g is linearised once a solve; only products with that are iterated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _torch, _torch_graphs
from ..captures import followed, note_captures, refuse_captures
from ..derivatives import differentiated, needs_gradients, over_legacy_batch, tangents_by
from ..drivers import graph
from ..modules import reached
from ..state import refuse_freed
from .closure import Redirected
from .failed import Gradients, masked, of_kept, pull, pulled_back
from .linear import Backward, direction_of
from .maps import LinearMap, check_output, users
from .problem import Problem, Report
from .route import solve
from .rows import standing
from .tangent import tangent_of_kept

__all__ = ["attach", "gradients", "solved"]


class _Call:
    """What a node is given beside tensors, as one object: torch.func would walk into tuples.

    Args:
        problem: what is solved.
        report: where its record goes.
        given: x̂ and what is kept, where that is known; None: solve.
    """

    def __init__(
        self,
        problem: Problem,
        report: Report,
        given: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        self.problem, self.report, self.given = problem, report, given


def attach(problem: Problem, x0: Tensor, tensors: Sequence[Tensor], report: Report) -> Tensor:
    """The problem solved from x0; x̂ attached to the tensors, and to g's closure tensors once."""
    x, keep = solved(problem, x0, tensors, report)
    if not report.closure:
        return x
    # First derivatives for the closure tensors: the gradient at g(x̂) is c itself (eq. 11).
    y = _attachable(problem, x.detach(), keep, [t.detach() for t in tensors])
    # Another tensor than the one g saw: its graph saves that one, and the node's output would then
    # hold itself.
    call = _Call(problem, report, (x.detach(), keep))
    return FixedPoint.apply(call, x0, y, *tensors)[0]  # type: ignore[no-untyped-call, no-any-return]


def solved(
    problem: Problem, x0: Tensor, tensors: Sequence[Tensor], report: Report
) -> tuple[Tensor, Tensor | None]:
    """x̂, attached to the tensors but not to g's closure tensors; the samples that are kept."""
    if followed():
        map, said = problem.map, problem.advice
        if any(t.is_inference() for t in tensors):  # parameters of a model that was made there
            with _torch.no_inference():
                tensors = [_torch.normal(t) for t in tensors]

        def refuse(*given: Tensor) -> None:
            refuse_captures(f"{problem.name}: g", map, given, said, users(map))

        try:
            x, keep = FixedPoint.apply(_Call(problem, report), x0, None, *tensors)  # type: ignore[no-untyped-call]
        except Exception as error:  # of a captured tensor that vmap maps they do not name it
            refuse(x0, *tensors)
            note_captures(error, f"{problem.name}: g", said, users(map))
            raise
        refuse(x, *tensors)
    elif problem.context.grad_enabled and any(t.requires_grad for t in tensors):
        x, keep = FixedPoint.apply(_Call(problem, report), x0, None, *tensors)  # type: ignore[no-untyped-call]
    else:  # no node where nothing asks for one
        start = x0.detach() if x0.requires_grad else x0
        x, keep, _ = solve(direction_of(problem, start, tensors), report)
    return x, keep


def _attachable(problem: Problem, x: Tensor, keep: Tensor | None, tensors: list[Tensor]) -> Tensor:
    """G(x), of which only the closure tensors have a gradient; kept samples stand in for others."""
    if keep is not None and bool(keep.all()):
        keep = None
    map, x, tensors = standing(problem, x, keep, tensors)
    n = map.n_inputs
    with problem.context.autocast():
        return check_output(map.bind(tensors[n:])(x, *tensors[:n]), x)


class FixedPoint(Function):
    """x̂ of a problem as one node; see `forward` for its inputs."""

    @staticmethod
    def forward(
        call: _Call, x0: Tensor, attached: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x̂, and the samples whose gradient is kept.

        Args:
            call: what is solved.
            x0: where to start.
            attached: g(x̂) attached to g's closure tensors, or None.
            tensors: those of the map.
        """
        problem = call.problem
        if _torch_graphs.recording():
            assert attached is None
            again = functools.partial(FixedPoint.apply, _Call(problem, call.report))
            return _torch_graphs.as_one_call(lambda x0, *t: again(x0, None, *t), x0, *tensors)  # type: ignore[no-any-return]
        if call.given is None:
            plain = [t.detach() for t in tensors]
            start = x0.detach()
            if isinstance(problem.map, LinearMap) and _torch.graphless():  # it makes a graph
                with _torch.no_inference():
                    x, keep, _ = solve(direction_of(problem, start, plain), call.report)
            else:
                x, keep, _ = solve(direction_of(problem, start, plain), call.report)
        else:
            x, keep = call.given
            call.given = None  # the node keeps the call, and x is about to keep the node
        if keep is None:
            keep = torch.ones(x.shape[: problem.batch_dims], dtype=torch.bool, device=x.device)
        return x.data, keep  # no view, which could not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, _, attached, *tensors = inputs
        x, keep = output
        ctx.closure, ctx.redirected = attached is not None, None
        ctx.mark_non_differentiable(keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, keep, *tensors)
        if _torch.forward_level():
            ctx.save_for_forward(x, keep, *tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, _: Any) -> tuple[Any, ...]:
        if not _torch.graphless():
            return _torch_graphs.apart(FixedPoint.gradients, ctx, v, ctx.saved_tensors)  # type: ignore[no-any-return]
        with _torch.no_inference():
            saved = list(map(_torch.normal, ctx.saved_tensors))
            return FixedPoint.gradients(ctx, v if v is None else _torch.normal(v), saved)

    @staticmethod
    def gradients(ctx: Any, v: Tensor | None, saved: Sequence[Tensor]) -> tuple[Any, ...]:
        """What backward gives, outside inference mode."""
        problem: Problem = ctx.call.problem
        x, keep, *tensors = saved
        out: list[Tensor | None] = [None] * len(tensors)
        if v is None:
            return (*_NOTHING, None, *out)
        if _torch.legacy_batched(v):  # autograd.grad(is_grads_batched=True)
            over = one_by_one if ctx.closure else over_legacy_batch
            batched = over(lambda v: FixedPoint.gradients(ctx, v, saved), v)
            if ctx.redirected is not None:  # to the gradients of one cotangent
                ctx.redirected.end()
            return batched
        refuse_freed(problem.name, "a tensor of the backward", v, x, *tensors)
        need = [i for i in range(len(tensors)) if ctx.needs_input_grad[FIRST + i]]
        if ctx.closure and differentiated((v, x, *tensors)):
            raise _captured(problem)
        report = Report(ctx.call.report)
        found = gradients(problem, report, x, keep, v, tensors, need)
        if report.masked:  # a graph can't tell the host that a derivative is infinite where v = 0
            others = [d for d in problem.drivers if d is not graph]
            ctx.call.problem = problem._replace(drivers=others)
        if ctx.closure:
            _redirect(ctx, problem, x, keep, tensors, found)
        for i, grad in zip(need, found.of, strict=True):
            out[i] = grad
        return (*_NOTHING, found.c if ctx.closure else None, *out)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        call: _Call = ctx.call
        if torch.is_grad_enabled() and call.report.closure:  # which the tangent would not reach
            raise _captured(call.problem)

        def rule(d: Sequence[Tensor], moved: Sequence[int], saved: list[Tensor]) -> Any:
            x, keep, *tensors = saved
            if not moved:  # but x0, on which x̂ does not depend
                return (torch.zeros_like(x),)
            problem, report = call.problem, Report(call.report, tangent=True)
            refuse_freed(problem.name, "a tensor of the tangent", x, *tensors, *d)

            def tangent(
                problem: Problem, x: Tensor, r: Tensor, tensors: Sequence[Tensor]
            ) -> Tensor:
                t, kept = _linear(problem, report, x, r, tensors, transpose=False)
                return masked(t, kept) if report.masked else t

            with problem.context.full_precision():
                return (tangent_of_kept(problem, keep, x, tensors, moved, d, tangent),)

        try:
            return tangents_by(rule, tangents[FIRST:], ctx.saved_tensors)[0], None
        except RuntimeError as error:
            if "is not implemented" in str(error):
                error.add_note(_TWICE)
            raise

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, call: _Call, x0: Tensor, attached: Any, *tensors: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        assert attached is None  # captured tensors that need gradients are refused before

        def whole(t: Tensor, d: int | None) -> Tensor:
            return t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)

        dims = list(in_dims[FIRST:])
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
        for i in range(call.problem.map.n_states):  # part of the state: a slice of its own each
            moved[i], dims[i] = whole(tensors[i], dims[i]), 0
        batch = call.problem.mapped([None if d is None else 0 for d in dims])
        start = whole(x0, in_dims[1])
        out = FixedPoint.apply(_Call(batch, call.report), start, None, *moved)  # type: ignore[no-untyped-call]
        return out, (0, 0)


_TWICE = (
    "fpi_cuda takes tangents by reverse mode twice, so g needs second derivatives in reverse mode. "
    "(Fused attention has none: run within torch.nn.attention.sdpa_kernel(SDPBackend.MATH).)"
)
FIRST = 3  # tensors of the map follow so many inputs of the node
_NOTHING = (None,) * (FIRST - 1)  # the gradients of those before `attached`


_torch.bind_no_defaults(FixedPoint)


def one_by_one(backward: Callable[[Tensor], tuple[Any, ...]], v: Tensor) -> tuple[Any, ...]:
    """A backward of each cotangent of `is_grads_batched` alone: autograd's own graph, unmapped."""
    level = _torch.legacy_level()
    rows = [backward(row) for row in _torch.legacy_unbatched(v, level)]
    return tuple(
        None if parts[0] is None else _torch.legacy_rebatched(torch.stack(parts), level)
        for parts in zip(*rows, strict=True)
    )


def _redirect(
    ctx: Any,
    problem: Problem,
    x: Tensor,
    keep: Tensor,
    tensors: Sequence[Tensor],
    found: Gradients,
) -> None:
    """Where an adjoint failed, let the closure tensors have what the other samples give."""
    if ctx.redirected is not None:
        ctx.redirected.end()
        ctx.redirected = None
    if found.keep is None or found.c is None:
        return
    keep = keep & found.keep
    if bool(keep.all()):
        return
    with torch.enable_grad():
        y = _attachable(problem, x.detach(), keep, [t.detach() for t in tensors])
    attached = ctx.next_functions[1][0]  # after x0's
    ctx.redirected = Redirected(attached, y, found.c if bool(keep.any()) else None)


def gradients(
    problem: Problem,
    report: Report,
    x: Tensor,
    keep: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    need: Sequence[int],
) -> Gradients:
    """What a node's backward gives the tensors at these positions; none by what is not kept."""

    def follow(
        problem: Problem, x: Tensor, v: Tensor, tensors: Sequence[Tensor], _: Tensor | None
    ) -> Gradients:
        with problem.context.full_precision():
            # A tangent's adjoint is by g's own linearisation: that of J t would differentiate J.
            tangent = isinstance(problem.map, LinearMap) and not problem.map.transpose
            if tangent or differentiated((v, x, *tensors)):
                return _higher(problem, report, x, v, tensors, need)
            adjoint = problem.options.adjoint.transposed(problem)
            if isinstance(problem.map, LinearMap):  # whose gradients are had from its own graph
                adjoint = adjoint._replace(map=LinearMap(problem.map, transpose=True))
            _, kept, (c, *grads) = solve(Backward(adjoint, x, v, tensors, need), report)
            if problem.options.memory is not None:
                problem.options.memory.keep_adjoint(v, c, report.record)
            return Gradients(grads, c, kept)

    return of_kept(problem, keep, x, v, tensors, need, follow)


def _higher(
    problem: Problem,
    report: Report,
    x: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    need: Sequence[int],
) -> Gradients:
    """The gradients as nodes of the same two kinds: differentiable again."""
    c, keep = _linear(problem, report, x, v, tensors, transpose=True)
    if not need:
        return Gradients(())
    if not report.masked:  # known where vmap hides who is kept
        return Gradients(pull(problem, x, c, tensors, need))
    return Gradients(pulled_back(problem, keep, x, c, tensors, need))


def _linear(
    problem: Problem,
    report: Report,
    x: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    *,
    transpose: bool,
) -> tuple[Tensor, Tensor]:
    """The fixed point of u ↦ M u + v, and the samples that are kept; M = ∂g/∂x, or its transpose.

    By a node. Of a linear problem M is that of the problem that it is the derivative of: solves do
    not nest.
    """
    linear = problem.options.adjoint.transposed(problem)
    options = linear.options._replace(memory=None)  # which is of the first adjoint alone
    linear = linear._replace(map=problem.map.linear(transpose), options=options)
    if not transpose:
        linear = linear._replace(name="tangent")
    at, of_g = problem.map.around(x, tensors)
    try:
        return FixedPoint.apply(_Call(linear, report), v, None, at, v, *of_g)  # type: ignore[no-untyped-call,no-any-return]
    except Exception as error:
        note_captures(error, f"{problem.name}: g", problem.advice, users(problem.map))
        raise


def _captured(problem: Problem) -> RuntimeError:
    names = reached(users(problem.map), needs_gradients)
    return RuntimeError(
        f"fixed_point: g captures a tensor that needs gradients{names}, so only first derivatives "
        "exist, in reverse mode; pass it in `inputs` (per sample) or `params` (shared) and take it "
        "as an argument of g"
    )
