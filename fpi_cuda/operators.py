"""The paper's operators P and H (section 3.3), differentiable to any order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _torch, _torch_graphs
from .captures import followed, refuse_captures
from .derivatives import (
    Scalar,
    closes_over,
    differentiable,
    differentiated,
    dot,
    free,
    gradients,
    needs_gradients,
    over_legacy_batch,
    tangents_by,
    total,
)
from .modules import Binding, reached

__all__ = ["inner_product", "partial"]


def partial(r: Scalar, *s: Tensor, which: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """P(s; r): the partial derivatives ∂r(s)/∂s, each argument taken as independent.

    Computed on an independent graph, so it does not matter how the arguments depend on each other
    outside. The result is attached to the graph of s, and P is its own derivative: differentiate it
    as often as you like. r is called once, whatever the order, outside torch.func's transforms.
    By a complex argument a + ib the derivative is ∂r/∂a + i ∂r/∂b, as in all of torch.

    Args:
        r: a function of s that returns a real scalar. A module's own parameters are found and
            treated as further arguments (their derivatives flow; `which` does not count them).
        s: tensors of any shape.
        which: positions in s to differentiate by; None: every floating or complex tensor.

    Returns:
        One tensor a position, shaped like that argument; zeros where r does not depend on it.

    Raises:
        TypeError: an argument is no tensor, or a position names one neither floating nor complex.
        ValueError: r returns no real scalar, or captures a tensor that needs gradients.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> (d,) = partial(lambda x, y: x * y, x, x * x, which=(0,))  # ∂/∂x alone: y
        >>> float(d)
        9.0
    """
    for i, t in enumerate(s):
        if not isinstance(t, Tensor):
            raise TypeError(f"partial: s[{i}] must be a tensor (got {type(t).__name__})")
    if which is None:
        which = tuple(i for i, t in enumerate(s) if differentiable(t))
    for i in which:
        if not differentiable(s[i]):
            raise TypeError(
                f"partial: s[{i}] must be floating or complex to be differentiated (got "
                f"{s[i].dtype}); convert it, or leave its position out of `which`"
            )
    if not differentiated(s):
        return _value(r, which, s)
    binding, n, bound = Binding.of(r), len(s), r
    if binding is not None:
        s = (*s, *binding.own())

        def bound(*q: Tensor) -> Tensor:
            return binding.bind(q[n:])(*q[:n])  # type: ignore[no-any-return]

        bound.__wrapped__ = r  # type: ignore[attr-defined]  # where names are looked for

    if followed():
        refuse_captures(
            "partial: r (the energy of a GradientStep)",
            bound,
            s,
            "pass it in s (to a step: in `inputs`), or make r an nn.Module that owns it",
            r,
        )
    out = partial_bound(bound, which, *s)
    if binding is not None:
        if not _torch.transforming():
            binding.move()  # what r's one call did to its buffers and attributes
        binding.close()
    return out


def inner_product(v: Sequence[Tensor], u: Callable[..., Sequence[Tensor]]) -> Scalar:
    """H(v; u): the function s ↦ Σᵢ Re ⟨vᵢ, u(s)ᵢ⟩.

    Of complex tensors ⟨v, u⟩ is the sum of conj(v) u: P of H is then the derivative that torch's
    autograd gives where v comes in.

    Args:
        v: tensors shaped like the outputs of u.
        u: a function that returns a sequence of tensors.

    Returns:
        A scalar-valued function of u's arguments, ready for `partial`.
    """
    v = tuple(v)

    def eta(*s: Tensor) -> Tensor:
        out = u(*s)
        if len(out) != len(v):
            raise ValueError(
                f"inner_product: u must return {len(v)} tensors, as many as v (got {len(out)})"
            )
        return total(dot(a, b) for a, b in zip(v, out, strict=True))

    return eta


def _value(r: Scalar, which: Sequence[int], s: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """P where nothing is to be differentiated again: no graph outlives the call."""
    if not _torch.graphless():
        return _by_graph(r, which, s)
    try:
        with _torch.no_inference():
            return _by_graph(r, which, s)
    except RuntimeError:
        # A graph can't save what r holds of inference mode (a model that was made there), but
        # torch.func's can. It is no first choice: it takes no older autograd.Function.
        def scalar(*q: Tensor) -> Tensor:
            tape = _Tape(False, [*q], r(*q))
            _check_scalar(tape, r)
            assert tape.y is not None
            return tape.y

        return torch.func.grad(scalar, tuple(which))(*s) if which else ()


def _by_graph(r: Scalar, which: Sequence[int], s: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.enable_grad(), _torch.unhooked():
        q = [free(t) if i in which else _torch.normal(t.detach()) for i, t in enumerate(s)]
        tape = _Tape(False, q, r(*q))
        _check_scalar(tape, r)
    assert tape.y is not None
    wanted = [q[i] for i in which]
    if not tape.y.requires_grad or not wanted:
        return tuple(torch.zeros_like(t) for t in wanted)
    grads = torch.autograd.grad(tape.y, wanted, allow_unused=True)
    return tuple(
        torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)
    )


def partial_bound(r: Scalar, which: Sequence[int], *s: Tensor) -> tuple[Tensor, ...]:
    """`partial` for an r whose every tensor is in s, without its checks of s."""
    tape = _Tape(keep=torch.is_grad_enabled() and not _linear_in(r, which))
    out = _Partial.apply(r, tuple(which), tape, *s)  # type: ignore[no-untyped-call]
    if _torch.transforming():  # it knows nothing of the levels around, and may outlive them
        tape.drop()
    return out  # type: ignore[no-any-return]


def along(
    r: Scalar, left: Sequence[int], d: Sequence[Tensor], right: Sequence[int], s: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """∂/∂s[right] of Σ Re ⟨d, ∂r(s)/∂s[left]⟩, by P: the derivative of P along d.

    The Hessian of a real r is symmetric, so it is both what P gives tangents d of s[left], for
    which = right, and what its backward gives for which = left and gradients d.
    """
    n = len(d)
    return partial_bound(_weighted(r, left), tuple(n + i for i in right), *d, *s)


def _weighted(r: Scalar, left: Sequence[int]) -> Scalar:
    """Σ Re ⟨d, ∂r(s)/∂s[left]⟩ as a function of d and s."""
    n = len(left)

    def eta(*q: Tensor) -> Tensor:
        return total(dot(a, b) for a, b in zip(q[:n], gradients(r, left, q[n:]), strict=True))

    kept = [group for group in getattr(r, "linear", ()) if not set(group) & set(left)]
    groups = [range(n), *[[n + i for i in group] for group in kept]]
    return linear_in(taking(eta, [n + i for i in (*left, *getattr(r, "taken", ()))]), groups)


def taking(r: Scalar, positions: Sequence[int]) -> Scalar:
    """R, which itself takes derivatives by its arguments at these positions."""
    r.taken = tuple(positions)  # type: ignore[attr-defined]
    return r


def linear_in(r: Scalar, groups: Sequence[Sequence[int]]) -> Scalar:
    """R, which is linear in its arguments at the positions of each group, taken together.

    Its derivative by them needs no second one to be differentiated itself: torch's formulas for
    third derivatives are wrong for some norms (layer_norm, and batch_norm in training).
    """
    r.linear = groups  # type: ignore[attr-defined]
    return r


def _linear_in(r: Scalar, which: Sequence[int]) -> Sequence[int]:
    """The group of positions that holds these, in which r is linear; empty: there is none."""
    groups = getattr(r, "linear", ())
    return next((group for group in groups if set(which) <= set(group)), ())


class _Tape:
    """The independent graph of one P: its leaves, and r's value on them or what r gave rise to."""

    def __init__(self, keep: bool, leaves: list[Tensor] | None = None, y: Tensor | None = None):
        self.keep = keep
        self.leaves = leaves
        self.y = y
        self.outputs: list[Tensor | None] = []

    def drop(self) -> None:
        """Whoever needs it makes another."""
        self.leaves = self.y = None
        self.outputs = []


class _Partial(Function):
    """∂r(s)/∂s[which] on an independent graph; its backward is made of itself."""

    @staticmethod
    def forward(r: Scalar, which: tuple[int, ...], tape: _Tape, *s: Tensor) -> tuple[Tensor, ...]:
        if _torch_graphs.recording():
            return _torch_graphs.as_one_call(functools.partial(partial_bound, r, which), *s)  # type: ignore[no-any-return]
        with _torch.no_inference(), torch.enable_grad(), _torch.unhooked():
            if tape.leaves is None:
                # No more than what derivatives are taken by: what g writes to (running statistics)
                # can't have one.
                by = {*which, *getattr(r, "taken", ())}
                tape.leaves = [
                    free(t) if t.requires_grad or i in by else _torch.normal(t.detach())
                    for i, t in enumerate(s)
                ]
                tape.y = r(*tape.leaves)
                _check_scalar(tape, r)
            y, q = tape.y, tape.leaves
            assert y is not None
            wanted = [q[i] for i in which]
            if y.requires_grad and wanted:
                tape.outputs = list(
                    torch.autograd.grad(
                        y, wanted, allow_unused=True, create_graph=tape.keep, retain_graph=tape.keep
                    )
                )
            else:
                tape.outputs = [None] * len(wanted)
        out = tuple(
            torch.zeros_like(s[i]) if g is None else g.detach()
            for i, g in zip(which, tape.outputs, strict=True)
        )
        if not tape.keep:
            tape.drop()
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.r, ctx.which, ctx.tape, *s = inputs
        ctx.save_for_backward(*s)
        if _torch.forward_level():
            ctx.save_for_forward(*s)
        ctx.set_materialize_grads(False)  # zeros would be taken for what moves

    @staticmethod
    def backward(ctx: Any, *came: Tensor | None) -> tuple[Any, ...]:
        if not _torch.graphless():
            return _Partial.gradients(ctx, ctx.saved_tensors, came)
        with _torch.no_inference():
            saved = list(map(_torch.normal, ctx.saved_tensors))
            there = [d if d is None else _torch.normal(d) for d in came]
            return _Partial.gradients(ctx, saved, there)

    @staticmethod
    def gradients(ctx: Any, s: Sequence[Tensor], came: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """What backward gives, outside inference mode."""
        at = [k for k, d in enumerate(came) if d is not None]
        delta: list[Any] = [came[k] for k in at]
        if any(map(_torch.legacy_batched, delta)):

            def batched(*delta: Tensor) -> tuple[Any, ...]:
                found = dict(zip(at, delta, strict=True))
                return _Partial.gradients(ctx, s, list(map(found.get, range(len(came)))))

            return over_legacy_batch(batched, *delta)
        r, tape, which = ctx.r, ctx.tape, [ctx.which[k] for k in at]
        n = len(delta)
        need = [i for i in range(len(s)) if n and ctx.needs_input_grad[3 + i]]
        out: list[Tensor | None] = [None] * len(s)
        if not need:
            return (None, None, None, *out)

        grads: Sequence[Tensor | None]
        group = _linear_in(r, which)
        if group:  # Σ ⟨δ, ∂r/∂s⟩ is r at δ: one derivative less
            put = dict(zip(which, delta, strict=True))
            there = [put.get(i, torch.zeros_like(t)) if i in group else t for i, t in enumerate(s)]
            need = [i for i in need if i not in group]
            grads = partial_bound(r, need, *there)
        elif _torch.transforming() or tape.leaves is None:
            grads = along(r, which, delta, need, s)
        elif not differentiated((*delta, *s)):
            grads = _through(tape, at, delta, need)
        else:
            with torch.enable_grad():
                leaves = [free(d) for d in delta]
                terms = [
                    dot(d, g)
                    for d, g in zip(leaves, [tape.outputs[k] for k in at], strict=True)
                    if g is not None and g.requires_grad
                ]
                y = total(terms) if terms else torch.real(delta[0].new_zeros(()))
            again = _Tape(True, [*leaves, *tape.leaves], y)
            positions = tuple(n + i for i in need)
            eta = _weighted(r, which)
            grads = _Partial.apply(eta, positions, again, *delta, *s)  # type: ignore[no-untyped-call]
        for i, g in zip(need, grads, strict=True):
            out[i] = g
        return (None, None, None, *out)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        def rule(d: Sequence[Tensor], moved: Sequence[int], s: Sequence[Tensor]) -> Any:
            return along(ctx.r, moved, d, ctx.which, s)

        return tangents_by(rule, tangents[3:], ctx.saved_tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, r: Scalar, which: tuple[int, ...], tape: _Tape, *s: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        # Each slice has a derivative of its own, by what the slices share too.
        dims = [0 if d is not None or i in which else None for i, d in enumerate(in_dims[3:])]
        given = list(s)
        for i, d in enumerate(in_dims[3:]):
            if d is not None:
                given[i] = s[i].movedim(d, 0)
            elif i in which:
                given[i] = s[i].expand(info.batch_size, *s[i].shape)

        def slices(*q: Tensor) -> Tensor:
            return torch.vmap(r, in_dims=tuple(dims))(*q).sum()

        return partial_bound(slices, which, *given), (0,) * len(which)


_torch.bind_no_defaults(_Partial)


def _through(
    tape: _Tape, at: Sequence[int], delta: Sequence[Tensor], need: Sequence[int]
) -> list[Tensor | None]:
    """The vector-Jacobian product of P's values `at` through its own graph: no call of r."""
    assert tape.leaves is not None
    found = zip([tape.outputs[k] for k in at], delta, strict=True)
    pairs = [(g, d) for g, d in found if g is not None and g.requires_grad]
    if not pairs:
        return [None] * len(need)
    outputs, weights = zip(*pairs, strict=True)
    wanted = [tape.leaves[i] for i in need]
    return list(torch.autograd.grad(outputs, wanted, weights, allow_unused=True, retain_graph=True))


def _check_scalar(tape: _Tape, r: Any) -> None:
    y, leaves = tape.y, tape.leaves
    if not isinstance(y, Tensor) or y.numel() != 1:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"partial: r must return a scalar tensor (got {got}); sum it over the batch"
        )
    if y.is_complex():
        raise ValueError(
            f"partial: r must return a real scalar (got {y.dtype}); take .real, or .abs() ** 2"
        )
    assert leaves is not None
    if tape.keep and closes_over(y, leaves):
        names = reached(getattr(r, "__wrapped__", r), needs_gradients)
        raise ValueError(
            "partial: r must take every tensor that needs gradients as an argument, and captures "
            f"one{names}; pass it in s, or make r an nn.Module that owns it"
        )
    tape.y = y.reshape(())
