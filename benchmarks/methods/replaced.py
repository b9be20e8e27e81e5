"""What people have before they install anything: the paper's pure-Python layer, and unrolling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..problems import Rule, Step
from .ours import layer_of
from .runner import Solve

Tensors = tuple[Tensor, ...]


class Iteration(torch.autograd.Function):
    """x ← f(x) until the condition says stop; the backward is the same loop on the adjoint map.

    The old layer's semantics, written from their description: one stop decision for the batch, two
    evaluations at least, after which the condition is asked with the count 1, the condition of the
    backward asked in the same way. First order only: it is timed, not used.
    """

    @staticmethod
    def forward(ctx: Any, g: Step, conditions: tuple[Any, Any], x: Tensor, *rest: Tensor) -> Tensor:
        ctx.g, ctx.backward_cond = g, conditions[1]
        x = iterate(lambda x: g(x, *rest), x, conditions[0])
        ctx.save_for_backward(x, *rest)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        x, *rest = (t.detach().requires_grad_() for t in ctx.saved_tensors)

        def adjoint(c: Tensor) -> Tensor:
            with torch.enable_grad():  # g's value anew in every iteration, as that layer does
                y = ctx.g(x, *rest)
            return torch.autograd.grad(y, x, c)[0] + v

        c = iterate(adjoint, v, ctx.backward_cond)
        with torch.enable_grad():
            y = ctx.g(x, *rest)
        wanted = [t for t, need in zip(rest, ctx.needs_input_grad[3:], strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, c))
        slots = [next(found) if need else None for need in ctx.needs_input_grad[3:]]
        return None, None, None, *slots


def iterate(f: Callable[[Tensor], Tensor], x: Tensor, condition: Any) -> Tensor:
    old, new, count = x, f(x), 0
    while True:
        old, new, count = new, f(new), count + 1
        if not condition(count, (new,), (old,)):
            return new


def fixed_point_iteration(
    y: Tensors,
    x0: Tensors,
    g: Callable[[Tensors, Tensors], Tensors],
    forward_cond: Any,
    backward_cond: Any,
) -> Tensors:
    def f(x: Tensor, *rest: Tensor) -> Tensor:
        return g((x,), rest)[0]

    return (Iteration.apply(f, (forward_cond, backward_cond), *x0, *y),)


def term_cond(
    cnt: int, x: Tensors, px: Tensors, threshold: float, epsilon: float, maxIter: int
) -> bool:
    """Keep going: ‖x₀ − px₀‖² > threshold·(‖px₀‖² + epsilon), over the batch."""
    change, size = ((x[0] - px[0]) ** 2).sum(), (px[0] ** 2).sum()
    return cnt < maxIter and bool(change / (size + epsilon) > threshold)


def old_layer(rule: Rule) -> Solve:
    return layer_of(fixed_point_iteration, term_cond, rule)


def unrolled(rule: Rule) -> Solve:
    """The loop itself on autograd's tape: every iterate is kept for the backward."""

    def solve(g: Step, x0: Tensor, u: Tensor, s: Tensor, *weights: Tensor) -> Tensor:
        x, offset = x0, rule.atol * x0.shape[1] ** 0.5
        for _ in range(rule.max_iterations):
            y = g(x, u, s, *weights)
            with torch.no_grad():
                r = torch.linalg.vector_norm(y - x, dim=1)
                done = (r <= offset + rule.rtol * torch.linalg.vector_norm(y, dim=1)).all()
            x = y
            if done:
                break
        return x

    return solve
