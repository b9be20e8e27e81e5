"""Weights held below a norm: the parametrisations of `spectral_normalize`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .convolution import ROUNDING, convolution_bound, power

# Power iterations before training, and in a training call.
WARM_UP, ITERATIONS = 100, 10


class _Held(nn.Module):
    """A weight scaled down to a norm of at most share."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def norm(self, weight: Tensor) -> Tensor:
        """The norm, certified."""
        return certified_norm(weight)

    def forward(self, weight: Tensor) -> Tensor:
        # The kink, where the gradient jumps, is at the share in every dtype.
        norm = self.norm(weight)
        excess = norm / self.share
        factor = torch.where(excess > 1, excess.clamp_min(1).reciprocal(), 1)
        return self.scaled(weight, norm.detach(), factor)

    def scaled(self, weight: Tensor, norm: Tensor, factor: Tensor) -> Tensor:
        """The weight of that norm times a factor: 1, or what brings it down to the share."""
        room = _rounding(weight.detach(), norm, self.share)
        certain = _times(weight, torch.where(factor < 1, factor / (1 + room), 1))
        info = torch.finfo(weight.dtype)
        if info.bits > 16:
            return certain
        # The room that is certain costs percents here, and hardly ever are they needed.
        near = _times(weight, torch.where(factor < 1, factor * (1 - info.eps / 2), 1))
        return torch.where(certified_norm(near.detach()) <= self.share, near, certain)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to the weight becomes the raw one."""
        return weight

    def extra_repr(self) -> str:
        """The share."""
        return f"share={self.share:.3g}"


class _Estimated(_Held):
    """The same by power iteration, from a vector that moves once a training call."""

    v: Tensor

    def __init__(self, share: float, weight: Tensor, size: tuple[int, int] | None) -> None:
        super().__init__(share)
        shape = (weight.shape[1], *(size or ()))
        v = torch.randn(shape, dtype=weight.dtype, device=weight.device)
        self.register_buffer("v", power(weight, v, WARM_UP)[1].to(weight.dtype))

    def scaled(self, weight: Tensor, norm: Tensor, factor: Tensor) -> Tensor:
        """No room for rounding: an estimate leaves more open."""
        return _times(weight, factor)

    def norm(self, weight: Tensor) -> Tensor:
        """The estimate, never above the norm."""
        norm, v = power(weight, self.v, ITERATIONS if self.training else 0)
        if self.training:
            self.v.copy_(v)
        return norm


def certified_norm(weight: Tensor) -> Tensor:
    """‖W‖₂ of a matrix [O, I], or the bound of a convolution [O, I, k, k]; in float64."""
    weight = weight.double()
    if weight.dim() == 4:
        return convolution_bound(weight)
    norm: Tensor = torch.linalg.matrix_norm(weight, 2) * (1 + ROUNDING)
    return norm


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """The weight times a scalar, rounded once to its dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * factor.to(wide)).to(weight.dtype)


def _rounding(weight: Tensor, norm: Tensor, share: float) -> Tensor:
    """The part of its norm, at most, that a weight scaled to the share may gain by rounding.

    Entries are rounded twice, below the least normal number by that number's roundings. The errors
    E have ‖E‖₂ ≤ ‖E‖_F in a matrix, and √(kk′) ‖E‖_F in a convolution, whose symbol sums as many
    terms; a few percent more where the grid of its frequencies is coarse.
    """
    info, taps = torch.finfo(weight.dtype), weight.shape[2:].numel()
    entries = torch.linalg.vector_norm(weight.double()) / norm.clamp_min(share)
    least = math.sqrt(weight.numel()) * info.tiny / share
    room: Tensor = info.eps * (4 + 1.1 * math.sqrt(taps) * (entries + least))
    return room
