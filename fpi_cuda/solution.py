"""What a solve returns, and how it says that samples failed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ._torch import stripped, transforming
from .options import Tolerance
from .record import Account, Record, Status

__all__ = ["FixedPointError", "FixedPointWarning", "Record", "Solution", "Status", "Tolerance"]

State = Tensor | tuple[Tensor, ...]


def each(f: Callable[[Tensor], Tensor], x: State) -> State:
    """The function of every tensor of a state, in the same type of tuple."""
    if isinstance(x, Tensor):
        return f(x)
    return getattr(type(x), "_make", tuple)(f(part) for part in x)


class FixedPointWarning(UserWarning):
    """Some samples did not converge."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside this package and torch that led here."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=level)


_OURS = tuple(str(Path(file).parent) for file in (__file__, str(torch.__file__)))


class FixedPointError(RuntimeError):
    """Some samples did not converge and `on_failure="raise"`; `solution` holds the whole record."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


@dataclass(eq=False, repr=False)
class Solution(Account):
    """The fixed point and the per-sample record of the solve that found it.

    Attributes:
        x: the fixed point x̂ = g(x, ·) of the last iterate, shaped like x0, attached to autograd.
            Where the status is NONFINITE: the last finite iterate.
        status: int8 [B], members of `Status`.
        iterations: int32 [B].
        residual_norm: [B], ‖g(x) − x‖₂ of the iterate whose g is returned.
        contraction, error_estimate: [B]; see `docs/math.md`. `error_bound`: [B] or None.
        evaluations: calls of g, those included by which "auto" looks at how samples depend, and two
            by which a solve that did not converge sees whether g is random.
        path: which backend and driver ran, and why.
        adjoint: the record of the last backward solve, or None before one.

    Under `torch.vmap` the record's tensors are plain and carry the mapped dimension first.
    """

    x: State
    record: Record

    def __repr__(self) -> str:
        parts = (self.x,) if isinstance(self.x, Tensor) else self.x
        of = ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in parts)
        return f"Solution(x {of}; {self.record.summary()})"

    @property
    def evaluations(self) -> int:
        """Calls of g."""
        return self.record.evaluations

    @property
    def path(self) -> str:
        """Which backend and driver ran."""
        return self.record.path

    @property
    def adjoint(self) -> Record | None:
        """The record of the last backward solve."""
        return self.record.adjoint

    def detach(self) -> Solution:
        """The same with x cut from the graph: keeps no graph alive."""
        return Solution(each(Tensor.detach, self.x), self.record)


def kept(solution: Solution) -> Solution:
    """The same for a layer to keep: detached, without the wrappers of torch.func.

    Those end with their transform. Mapped dimensions come first, as in the record.
    """
    kept = solution.detach()
    if not torch.compiler.is_compiling() and transforming():
        kept.x = each(lambda t: stripped(t, lambda t, dim: t.movedim(dim, 0)), kept.x)
    return kept
