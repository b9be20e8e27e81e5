"""Steps of g that plain autograd records, from where a solve ended."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch import of_vmap
from ..derivatives import differentiable
from .failed import every, like
from .maps import check_output
from .problem import Problem
from .rows import standing

__all__ = ["recorded"]


def recorded(
    problem: Problem,
    x: Tensor,
    keep: Tensor | None,
    tensors: Sequence[Tensor],
    steps: int,
    damping: float = 1.0,
    *,
    closure: bool = False,
) -> Tensor:
    """x after steps x ← damping · g(x) + (1 − damping) · x, attached by them to the tensors.

    Args:
        problem: what was solved.
        x: where the steps begin, [B, ...]; a constant.
        keep: bool [B]: the samples that make them. The others stay at x and have zero gradients,
            whatever they hold: in g a kept one stands in for them. None: all.
        tensors: the map's.
        steps: how many, 1 or more.
        damping: see above.
        closure: whether g has closure tensors that need gradients.
    """
    begin = x = x.detach()
    if keep is not None:
        if of_vmap(keep):  # no host can look: where none is kept, nothing is to be differentiated
            alive = keep.any()
            tensors = [torch.where(alive, t, t.detach()) for t in tensors]
        elif every(keep):
            keep = None
        elif every(~keep):
            return _cut_off(x, tensors, closure and problem.context.grad_enabled)
    map, x, tensors = standing(problem, x, keep, tensors)
    n = map.n_inputs
    with problem.context.autocast():
        g = map.bind(tensors[n:])
        for _ in range(steps):
            gx = check_output(g(x, *tensors[:n]), x)
            x = gx if damping == 1 else damping * gx + (1 - damping) * x
    return x if keep is None else torch.where(like(keep, x), x, begin)


def _cut_off(x: Tensor, tensors: Sequence[Tensor], closure: bool) -> Tensor:
    """x, attached to the tensors all the same, by gradients of zero; to closure tensors by none."""
    never = torch.zeros((), dtype=torch.bool, device=x.device)
    for t in tensors:
        if differentiable(t):
            nothing = torch.where(never, t, 0).sum()
            x = x + (nothing.real if nothing.is_complex() else nothing).to(x)
    if closure and not x.requires_grad:  # a loss on it has no gradient, and its backward no error
        x = x.requires_grad_()
    return x
