"""Tensors that a function captures where torch.func or forward mode follows them.

A node shows the levels around it its arguments alone: what its function captures looks plain in
there, and its derivative would be lost in silence. So the function is called once more outside the
node, where those levels see it, at values that it took before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function, forward_ad

from . import _torch
from .modules import reached

__all__ = ["carries_tangent", "followed", "note_captures", "primals", "refuse_captures"]


def followed() -> bool:
    """Whether a derivative of a tensor that nobody passed may be asked for."""
    return _torch.transforming() or _torch.forward_mode()


def carries_tangent(t: Tensor) -> bool:
    """Whether forward mode follows the tensor, outside torch.func."""
    return _torch.forward_mode() and forward_ad.unpack_dual(t).tangent is not None


def primals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without the tangents of the level that is at work."""
    return [forward_ad.unpack_dual(t).primal for t in tensors]


def refuse_captures(
    owner: str, f: Callable[..., Tensor], tensors: Sequence[Tensor], advice: str, g: Any
) -> None:
    """Raise where f's value depends on a tensor that is followed and no argument.

    Args:
        owner: who raises, and the name of f.
        f: what is called, once.
        tensors: its arguments, with whatever levels are around them.
        advice: what to do with such a tensor.
        g: the user's function behind f, where the tensor's name is looked for.

    Raises:
        RuntimeError: it does.
    """
    plain = [_torch.stripped(t, _one_slice).detach() for t in tensors]
    try:
        y = f(*plain)
    except Exception as error:
        error.add_note(
            f"{owner} was called once more, to see whether it captures a tensor that torch.func or "
            "forward mode follows."
        )
        raise
    if isinstance(y, Tensor) and (_torch.wrapped(y) or y.requires_grad or _torch.forward_mode()):
        _Witness.apply(y, _Who(owner, advice, g), _torch.transforming())  # type: ignore[no-untyped-call]


def _one_slice(t: Tensor, dim: int) -> Tensor:
    shape = t.shape[:dim] + t.shape[dim + 1 :]
    return t.select(dim, 0) if t.shape[dim] else t.new_zeros(shape)


def note_captures(error: Exception, owner: str, advice: str, g: Any) -> None:
    """Name in the error's notes what g captures that a transform wraps, if anything.

    Of what is no part of g's value (its aux) nothing would be lost; but in a node it can't be read.
    """
    names = reached(g, _torch.wrapped)
    if names and names not in "".join(getattr(error, "__notes__", ())):
        error.add_note(f"{owner} captures a tensor that torch.func follows{names}: {advice}")


class _Who:
    """Whose function captures a tensor. No tuple: torch.func would walk into it."""

    def __init__(self, owner: str, advice: str, g: Any) -> None:
        self.owner, self.advice, self.g = owner, advice, g

    def refusal(self, what: str) -> RuntimeError:
        names = reached(self.g, _is_followed)
        return RuntimeError(
            f"{self.owner} captures a tensor {what}{names}: that would be lost; {self.advice}"
        )


def _is_followed(t: Tensor) -> bool:
    return _torch.wrapped(t) or t.requires_grad or carries_tangent(t)


class _Witness(Function):
    """Raises, with a reason, at every level that follows its argument."""

    @staticmethod
    def forward(y: Tensor, who: _Who, transformed: bool) -> Tensor:
        return y.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.who, transformed = inputs
        # Outside torch.func autograd reaches captured tensors; see `node.attach`.
        if transformed and ctx.needs_input_grad[0]:
            raise ctx.who.refusal("that needs gradients under torch.func")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with _torch.following():  # by which the tensor's name is found
            what = "that carries a tangent (torch.func.jvp, jacfwd, forward_ad)"
            raise ctx.who.refusal(what)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, y: Tensor, who: _Who, transformed: bool
    ) -> tuple[Tensor, None]:
        raise who.refusal("that torch.vmap maps")


_torch.bind_no_defaults(_Witness)
