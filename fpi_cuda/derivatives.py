"""What derivatives are made of, in either mode and wherever they are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch
from .captures import carries_tangent, primals

__all__: list[str] = []

Scalar = Callable[..., Tensor]


def differentiated(tensors: Sequence[Tensor]) -> bool:
    """Whether what is made of the tensors now may be differentiated, in either mode."""
    if torch.is_grad_enabled() or _torch.transforming():
        return True
    return _torch.forward_mode() and any(carries_tangent(t) for t in tensors)


def tangents_by(
    rule: Callable[[Sequence[Tensor], Sequence[int], list[Tensor]], tuple[Tensor, ...]],
    tangents: Sequence[Tensor | None],
    saved: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """What a Function's rule makes of the tangents of its tensors, whatever follows it.

    Args:
        rule: of the tangents that there are, their positions, and the saved tensors.
        tangents: one a tensor, None where it does not move.
        saved: they carry the tangents of the level at work, which are taken off.
    """
    with _torch.no_inference(), _torch.following():
        moved = [i for i, t in enumerate(tangents) if t is not None]
        given: list[Any] = [_torch.normal(t) for t in tangents if t is not None]
        plain = primals(list(map(_torch.normal, saved)))
        if any(map(_torch.legacy_batched, given)):
            return over_legacy_batch(lambda *d: rule(d, moved, plain), *given)
        return rule(given, moved, plain)


def gradients(r: Scalar, which: Sequence[int], s: Sequence[Tensor]) -> Sequence[Tensor]:
    """∂r(s)/∂s[which], differentiable again wherever this runs; where gradients are on."""
    if _torch.transforming():
        return torch.func.grad(r, argnums=tuple(which))(*s)  # type: ignore[no-any-return]
    # Not torch.func: autograd.Functions in r may be such as it does not take.
    y, wanted = r(*s), [s[i] for i in which]  # variables: see `taking`
    if not y.requires_grad:
        return [torch.zeros_like(t) for t in wanted]
    found = torch.autograd.grad(y, wanted, create_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def vjp(y: Tensor, x: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    """(∂y/∂x)ᵀ v, zero where y does not depend on x; the graph of y stays."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    (out,) = torch.autograd.grad(
        y, x, v, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(x) if out is None else out


def pulled(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """w ↦ (∂y/∂x)ᵀ w as a graph, and the w in it: its `vjp` by w is ∂y/∂x.

    So g needs formulas for reverse mode only.
    """
    w = torch.zeros_like(y, requires_grad=True)
    return vjp(y, x, w, create_graph=True), w


def over_legacy_batch(backward: Callable[..., tuple[Any, ...]], *v: Tensor) -> tuple[Any, ...]:
    """Run a backward under torch.func.vmap, which has batching rules for everything in it."""
    level = _torch.legacy_level()
    whole = [_torch.legacy_unbatched(t, level) if _torch.legacy_batched(t) else t for t in v]
    dims = tuple(0 if _torch.legacy_batched(t) else None for t in v)
    found: list[int] = []

    def one(*v: Tensor) -> tuple[Tensor, ...]:
        grads = backward(*v)
        found[:] = [i for i, g in enumerate(grads) if g is not None]
        found.append(len(grads))
        return tuple(grads[i] for i in found[:-1])

    mapped = torch.func.vmap(one, in_dims=dims)(*whole)
    out: list[Any] = [None] * found[-1]
    for i, g in zip(found, mapped, strict=False):
        out[i] = _torch.legacy_rebatched(g, level)
    return tuple(out)


def differentiable(t: Tensor) -> bool:
    """Whether there are derivatives by tensors of its dtype."""
    return t.is_floating_point() or t.is_complex()


def needs_gradients(t: Tensor) -> bool:
    """Whether autograd follows it."""
    return t.requires_grad


def free(t: Tensor) -> Tensor:
    """The tensor as a variable of an independent graph; where gradients are on."""
    t = _torch.normal(t.detach())
    return for_modules([t.requires_grad_()])[0] if differentiable(t) else t


def for_modules(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors as modules may see them: no leaves where there are hooks of all modules.

    torch.utils.module_tracker, which FlopCounterMode uses, sets hooks on what modules are given;
    and autograd.grad by a leaf refuses those that stand there.
    """
    if not _torch.any_global_hook():
        return tensors
    return [t.expand_as(t) if t.requires_grad else t for t in tensors]  # the layout stays


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Re ⟨a, b⟩: what autograd's gradients are by, complex ones too."""
    if a.is_complex() or b.is_complex():
        return torch.sum((a.conj() * b).real)
    return torch.sum(a * b)


def total(terms: Any) -> Tensor:
    """Their sum; there is one."""
    whole: Tensor | None = None
    for term in terms:
        whole = term if whole is None else whole + term
    assert whole is not None
    return whole


def closes_over(y: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether y's graph reaches a leaf that is not among `leaves`, or views of such (`free`)."""
    known = {id(t) for t in leaves}
    stack, seen = [y.grad_fn], {t.grad_fn for t in leaves}
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            return True
        stack.extend(edge[0] for edge in node.next_functions)
    return y.grad_fn is None and y.requires_grad and id(y) not in known
