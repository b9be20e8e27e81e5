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

__all__ = ["carries_tangent", "followed", "refuse_captures"]


def followed() -> bool:
    """Whether a derivative of a tensor that nobody passed may be asked for."""
    return _torch.transforming() or _torch.forward_mode()


def carries_tangent(t: Tensor) -> bool:
    """Whether forward mode follows the tensor, outside torch.func."""
    return _torch.forward_mode() and forward_ad.unpack_dual(t).tangent is not None


def refuse_captures(
    owner: str, f: Callable[..., Tensor], tensors: Sequence[Tensor], advice: str
) -> None:
    """Raise where f's value depends on a tensor that is followed and no argument.

    Args:
        owner: who raises, and the name of f.
        f: what is called, once.
        tensors: its arguments, with whatever levels are around them.
        advice: what to do with such a tensor.

    Raises:
        RuntimeError: it does.
    """
    plain = [_torch.stripped(t, lambda t, dim: t.select(dim, 0)).detach() for t in tensors]
    try:
        y = f(*plain)
    except Exception as error:
        error.add_note(
            f"{owner} was called once more, to see whether it captures a tensor that torch.func or "
            "forward mode follows."
        )
        raise
    if isinstance(y, Tensor) and (_torch.wrapped(y) or y.requires_grad or _torch.forward_mode()):
        _Witness.apply(y, owner, advice, _torch.transforming())  # type: ignore[no-untyped-call]


class _Witness(Function):
    """Raises, with a reason, at every level that follows its argument."""

    @staticmethod
    def forward(y: Tensor, owner: str, advice: str, transformed: bool) -> Tensor:
        return y.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.owner, ctx.advice, transformed = inputs
        # Outside torch.func autograd reaches captured tensors; see `node.attach`.
        if transformed and ctx.needs_input_grad[0]:
            raise _refusal(ctx.owner, ctx.advice, "that needs gradients under torch.func")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        what = "that carries a tangent (torch.func.jvp, jacfwd, forward_ad)"
        raise _refusal(ctx.owner, ctx.advice, what)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, y: Tensor, owner: str, advice: str, transformed: bool
    ) -> tuple[Tensor, None]:
        raise _refusal(owner, advice, "that torch.vmap maps")


_torch.bind_no_defaults(_Witness)


def _refusal(owner: str, advice: str, what: str) -> RuntimeError:
    return RuntimeError(f"{owner} captures a tensor {what}: that would be lost; {advice}")
