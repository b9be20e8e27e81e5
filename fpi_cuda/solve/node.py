"""The autograd node of a fixed point, closed under differentiation.

x̂ = g(x̂, z; θ) is one node (paper eq. 4). Its backward solves c = (∂g/∂x)ᵀ c + v (eq. 9), which is
another such node: the fixed point of the affine map c ↦ P(h)(c) + v with x̂, v, z, θ as explicit
inputs (eq. 10); then ∂h/∂z and ∂h/∂θ at c by P (eq. 11). So every order is right. Where no
higher order is asked for, g is linearised once and only its vector-Jacobian product is iterated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _torch
from ..captures import carries_tangent, followed, refuse_captures
from ..modules import reached
from ..operators import needs_gradients, over_legacy_batch, partial_bound
from ..state import refuse_freed
from .direction import Backward, direction_of, masked, stand_in
from .maps import Map, TransposedMap, VmappedMap, check_output, users
from .problem import Problem, Report
from .route import solve

__all__ = ["attach"]


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
    if followed():
        map, said = problem.map, problem.advice

        def refuse(*given: Tensor) -> None:
            refuse_captures(f"{problem.name}: g", map, given, said, users(map))

        try:
            x, keep = FixedPoint.apply(_Call(problem, report), x0, None, *tensors)  # type: ignore[no-untyped-call]
        except Exception:  # a captured tensor that vmap maps makes errors that do not name it
            refuse(x0, *tensors)
            raise
        refuse(x, *tensors)
    elif problem.context.grad_enabled and any(t.requires_grad for t in tensors):
        x, keep = FixedPoint.apply(_Call(problem, report), x0, None, *tensors)  # type: ignore[no-untyped-call]
    else:  # no node where nothing asks for one
        start = x0.detach() if x0.requires_grad else x0
        x, keep, _ = solve(direction_of(problem, start, tensors), report)
    if not report.closure:
        return x  # type: ignore[no-any-return]
    # First derivatives for the closure tensors: the gradient at g(x̂) is c itself (eq. 11).
    plain, n = [t.detach() for t in tensors], problem.map.n_inputs
    at, inputs = x.detach(), plain[:n]
    if keep is not None and not bool(keep.all()):
        at, *inputs = stand_in(keep, (at, *inputs))
    with problem.context.autocast():
        y = check_output(problem.map.bind(plain[n:])(at, *inputs), at)
    # Another tensor than the one g saw: its graph saves that one, and the node's output would then
    # hold itself.
    call = _Call(problem, report, (x.detach(), keep))
    return FixedPoint.apply(call, x0, y, *tensors)[0]  # type: ignore[no-untyped-call, no-any-return]


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
        if call.given is None:
            plain = [t.detach() for t in tensors]
            x, keep, _ = solve(direction_of(problem, x0.detach(), plain), call.report)
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
        ctx.closure = attached is not None
        ctx.mark_non_differentiable(keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, keep, *tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, _: Any) -> tuple[Any, ...]:
        problem: Problem = ctx.call.problem
        x, keep, *tensors = ctx.saved_tensors
        out: list[Tensor | None] = [None] * len(tensors)
        if v is None:
            return (*_NOTHING, None, *out)
        if _torch.legacy_batched(v):  # autograd.grad(is_grads_batched=True)
            over = one_by_one if ctx.closure else over_legacy_batch
            return over(lambda v: FixedPoint.backward(ctx, v, None), v)
        if carries_tangent(v):
            return FixedPoint.jvp(ctx)  # type: ignore[no-any-return]
        refuse_freed(problem.name, "a tensor of the backward", v, x, *tensors)
        need = [i for i in range(len(tensors)) if ctx.needs_input_grad[FIRST + i]]
        if ctx.closure and (torch.is_grad_enabled() or _torch.transforming()):
            names = reached(users(problem.map), needs_gradients)
            raise RuntimeError(
                f"fixed_point: g captures a tensor that needs gradients{names}, so only first "
                "derivatives exist; pass it in `inputs` (per sample) or `params` (shared) and take "
                "it as an argument of g"
            )
        report = Report(ctx.call.report)
        c, grads = _gradients(problem, report, x, keep, v, tensors, need)
        for i, grad in zip(need, grads, strict=True):
            out[i] = grad
        return (*_NOTHING, c if ctx.closure else None, *out)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "fpi_cuda.fixed_point has no forward-mode derivative yet; use reverse mode "
            "(torch.func.grad, vjp, jacrev)"
        )

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


def _gradients(
    problem: Problem,
    report: Report,
    x: Tensor,
    keep: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    need: Sequence[int],
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """C, and what a node's backward gives the tensors at these positions.

    Samples that are not kept have none, of any order: they are replaced by one that is kept, and
    where there is none the value and every derivative are cut off.
    """
    alive: Tensor | None = None
    unknown = _torch.of_vmap(keep)  # no host can look
    if unknown or not bool(keep.all()):
        if not unknown and not bool(keep.any()):
            return torch.zeros_like(x), [torch.zeros_like(tensors[i]) for i in need]
        if problem.batch_dims > 1:  # samples of one slice stand in for its own alone
            return None, _by_slices(problem, report, x, keep, v, tensors, need)
        if unknown:
            alive = keep.any()
            x, *tensors = (torch.where(alive, t, t.detach()) for t in (x, *tensors))
        v, n = masked(v, keep), problem.map.n_inputs
        x, *tensors[:n] = stand_in(keep, (x, *tensors[:n]))  # type: ignore[index]
    adjoint = problem.options.adjoint.transposed(problem)
    with problem.context.full_precision():
        if not (torch.is_grad_enabled() or _torch.transforming()):
            c, *grads = solve(Backward(adjoint, x, v, tensors, need), report)[2]
            return c, grads
        higher = _higher(problem, adjoint, report, x, v, tensors, need)
    return None, higher if alive is None else [torch.where(alive, g, 0) for g in higher]


def _by_slices(
    problem: Problem,
    report: Report,
    x: Tensor,
    keep: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    need: Sequence[int],
) -> list[Tensor]:
    """`_gradients` of the problem that torch.vmap mapped, mapped."""
    map, dims = _unmapped(problem.map)
    one = problem._replace(map=map, batch_dims=problem.batch_dims - 1)

    def of_slice(x: Tensor, keep: Tensor, v: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_gradients(one, report, x, keep, v, list(tensors), need)[1])  # type: ignore[arg-type]

    grads = torch.vmap(of_slice, in_dims=(0, 0, 0, *dims))(x, keep, v, *tensors)
    return [g.sum(0) if dims[i] is None else g for i, g in zip(need, grads, strict=True)]


def _unmapped(map: Map) -> tuple[Map, Sequence[int | None]]:
    """What `Map.mapped` made the map of: the map before, and which of its tensors are mapped."""
    if isinstance(map, TransposedMap):
        inner, dims = _unmapped(map.inner)
        return TransposedMap(inner), (0, 0, *dims)
    assert isinstance(map, VmappedMap)
    return map.inner, map.dims


def _higher(
    problem: Problem,
    adjoint: Problem,
    report: Report,
    x: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    need: Sequence[int],
) -> Sequence[Tensor]:
    """The gradients as nodes of the same two kinds: differentiable again."""
    c, keep = FixedPoint.apply(_Call(adjoint, report), v, None, x, v, *tensors)  # type: ignore[no-untyped-call]
    c = masked(c, keep)
    if not need:
        return ()

    def h(x: Tensor, c: Tensor, *tensors: Tensor) -> Tensor:
        with problem.context.autocast():
            return torch.sum(c * problem.map(x, *tensors))

    return partial_bound(h, [2 + i for i in need], x, c, *tensors)
