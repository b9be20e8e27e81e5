"""The activations that forms name, and their slopes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "SLOPES", "slope_of", "steepest"]


def _identity(x: Tensor) -> Tensor:
    return x


# In the order of csrc/math/activation.h.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "gelu": F.gelu,
}


# The range of φ′, rounded outwards.
SLOPES = {
    "identity": (1.0, 1.0),
    "tanh": (0.0, 1.0),
    "relu": (0.0, 1.0),
    "sigmoid": (0.0, 0.25),
    "softplus": (0.0, 1.0),
    "gelu": (-0.129, 1.129),
}


def steepest(activation: str) -> float:
    """max |φ′|."""
    return max(abs(slope) for slope in SLOPES[activation])


def slope_of(activation: str, value: Tensor, at: Tensor) -> Tensor | None:
    """φ′ there; None: 1 everywhere."""
    if activation == "identity":
        return None
    (slope,) = torch.autograd.grad(value, at, torch.ones_like(value), retain_graph=True)
    return slope
