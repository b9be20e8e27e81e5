"""What constructors demand of their arguments."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def check_whole(owner: str, name: str, value: Any, least: int = 1, advice: str = "") -> None:
    """Raise unless value is a whole number >= least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{owner}: {name} must be a whole number >= {least} (got {value!r}){advice}"
        )


def check_sizes(owner: str, **sizes: int | None) -> None:
    """Raise unless each is a whole number >= 1."""
    for name, size in sizes.items():
        check_whole(owner, name, size)


def check_activation(owner: str, name: str, activation: str, allowed: tuple[str, ...]) -> None:
    """Raise unless it is one of those allowed."""
    if activation not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {allowed} (got {activation!r})")


def check_residual(owner: str, residual: float) -> None:
    """Raise unless it is a finite number: of a tensor the gradient would be lost."""
    if not isinstance(residual, Real) or not math.isfinite(residual):
        raise ValueError(f"{owner}: residual must be a finite number (got {residual!r})")


def check_beta(owner: str, beta: float, name: str = "beta") -> None:
    """Raise unless 0 < beta < 2."""
    if not 0 < beta < 2:
        raise ValueError(
            f"{owner}: {name} must lie in (0, 2) (got {beta!r}); 1 takes g(x) whole, less damps"
        )
