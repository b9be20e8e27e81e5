"""What the constructors of steps demand of their arguments."""

from __future__ import annotations

import math
from numbers import Real


def check_sizes(owner: str, **sizes: int | None) -> None:
    """Raise unless each is a whole number >= 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{owner}: {name} must be a whole number >= 1 (got {size!r})")


def check_activation(owner: str, name: str, activation: str, allowed: tuple[str, ...]) -> None:
    """Raise unless it is one of those allowed."""
    if activation not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {allowed} (got {activation!r})")


def check_residual(owner: str, residual: float) -> None:
    """Raise unless it is a finite number: of a tensor the gradient would be lost."""
    if not isinstance(residual, Real) or not math.isfinite(residual):
        raise ValueError(f"{owner}: residual must be a finite number (got {residual!r})")
