"""The autograd node of a fixed point, closed under differentiation.

x̂ = g(x̂, z; θ) is one node (paper eq. 4). Its backward solves c = (∂g/∂x)ᵀ c + v (eq. 9), which is
another such node: the fixed point of the affine map c ↦ P(h)(c) + v with x̂, v, z, θ as explicit
inputs (eq. 10); then ∂h/∂z and ∂h/∂θ at c by P (eq. 11). So every order is right. Where no
higher order is asked for, g is linearised once and only its vector-Jacobian product is iterated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _torch
from ..operators import over_legacy_batch, partial_bound
from .direction import Backward, direction_of, masked, stand_in
from .maps import Map, check_output
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
    transformed, must = _torch.transforming(), f"{problem.name}: g must take every tensor that"
    if transformed and _closure_is_transformed(problem.map, x0, tensors):
        raise RuntimeError(
            f"{must} torch.func transforms as an argument (it captures one); {problem.advice}"
        )
    if (
        transformed
        or _torch.forward_mode()
        or (problem.context.grad_enabled and any(t.requires_grad for t in tensors))
    ):
        x, keep = FixedPoint.apply(_Call(problem, report), x0, None, *tensors)  # type: ignore[no-untyped-call]
    else:  # no node where nothing asks for one
        x, keep, _ = solve(direction_of(problem, x0.detach(), tensors), report)
    if not report.closure:
        return x  # type: ignore[no-any-return]
    if transformed:
        raise RuntimeError(
            f"{must} needs gradients as an argument under torch.func (it captures one); "
            f"{problem.advice}"
        )
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
        return x, keep

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
            return over_legacy_batch(lambda v: FixedPoint.backward(ctx, v, None), v)
        need = [i for i in range(len(tensors)) if ctx.needs_input_grad[FIRST + i]]
        higher = torch.is_grad_enabled() or _torch.transforming()
        if ctx.closure and higher:
            raise RuntimeError(
                "fixed_point: g captures a tensor that needs gradients, so only first derivatives "
                "exist; pass it in `inputs` (per sample) or `params` (shared) and take it as an "
                "argument of g"
            )
        if _torch.transforming() or not bool(keep.all()):
            if not _torch.transforming() and not bool(keep.any()):
                zeros = [torch.zeros_like(t) if i in need else None for i, t in enumerate(tensors)]
                return (*_NOTHING, torch.zeros_like(x) if ctx.closure else None, *zeros)
            v = masked(v, keep)
            if problem.batch_dims == 1:
                n = problem.map.n_inputs
                x, *tensors[:n] = stand_in(keep, (x, *tensors[:n]))
        c: Tensor | None = None
        with problem.context.full_precision():
            adjoint = problem.options.adjoint.transposed(problem)
            report = Report(ctx.call.report)
            grads: Sequence[Tensor | None]
            if higher:
                grads = _higher(problem, adjoint, report, x, v, tensors, need)
            else:
                backward = Backward(adjoint, x, v, tensors, need)
                c, *grads = solve(backward, report)[2]
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
        if attached is not None:
            raise RuntimeError(
                "fixed_point: under torch.vmap g must take every tensor that needs gradients as an "
                "argument; pass it in `inputs` or `params`"
            )

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


def _closure_is_transformed(map: Map, x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether g's value depends on a closure tensor that a torch.func transform tracks."""
    plain = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (x, *tensors)]
    try:
        y = map(*plain)
    except Exception:
        return False
    while _torch.wrapped(y):
        if _torch.mapped(y) or y.requires_grad:
            return True
        y = _torch.unwrapped(y)
    return False
