"""Gradients of the last steps alone: recorded by plain autograd, the solve before them not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._check import check_beta, check_whole
from ..captures import followed
from ..options import ByValue, check_failed
from ..solve import node
from ..solve.problem import Problem, Report
from ..solve.recorded import recorded

__all__ = ["Phantom", "Unrolled"]


class _Recorded(ByValue):
    """An adjoint by steps x ← damping · g(x) + (1 − damping) · x from a constant x̂."""

    by_node: ClassVar[bool] = False
    failed: str

    def _steps(self) -> tuple[int, float]:
        """How many, and how much is taken of each."""
        raise NotImplementedError

    def attach(
        self, problem: Problem, x0: Tensor, tensors: Sequence[Tensor], report: Report
    ) -> Tensor:
        """The problem solved from x0, then the steps, attached to the tensors by autograd."""
        x, keep = node.solved(problem, x0, [t.detach() for t in tensors], report)
        asked = report.closure or any(t.requires_grad for t in tensors)
        if not (followed() or (problem.context.grad_enabled and asked)):
            return x
        assert report.record is not None
        steps, damping = self._steps()
        report.record.evaluations += steps
        return recorded(problem, x, keep, tensors, steps, damping, closure=report.closure)

    def transposed(self, problem: Problem) -> Problem:
        """There is none.

        Raises:
            RuntimeError: always.
        """
        name = type(self).__name__
        raise RuntimeError(
            f"{name}: recorded steps have no adjoint problem, since autograd itself follows them; "
            "where one is needed take OneStep, Neumann, Truncated or ImplicitAdjoint"
        )


@dataclass(frozen=True, eq=False)
class Unrolled(_Recorded):
    """The gradient of the last steps of g, made and recorded from the x̂ that the solve found.

    What is returned is x̂ after these steps, and its derivatives are those of what was computed, of
    every order, in both modes as far as g's own operations have them, at a constant x̂. Memory grows
    with the steps, and each costs a call of g and its backward. At an exact x̂ the gradient is
    `Neumann(last - 1)`'s. Where nothing asks for a derivative no step is made: x̂ is as
    `ImplicitAdjoint` leaves it. Nothing is solved backward, so `solution.adjoint` stays None, and
    tensors that g captures get their gradients. (A compiled layer leaves the graph.)

    Args:
        last: how many steps, 1 or more.
        failed: "mask": samples that ended DIVERGED or NONFINITE stay at the x that the solve left,
            with a zero gradient; "use": they make the steps too.

    Raises:
        ValueError: an argument is out of range.
    """

    last: int
    failed: str = "mask"

    def __post_init__(self) -> None:
        check_whole("Unrolled", "last", self.last)
        check_failed("Unrolled", self.failed)

    def _steps(self) -> tuple[int, float]:
        return self.last, 1.0


@dataclass(frozen=True, eq=False)
class Phantom(_Recorded):
    """The unrolled phantom gradient (Geng et al. 2021, eq. 6): `Unrolled` with damped steps.

    x ← λ g(x) + (1 − λ) x, k times, is returned and recorded: the gradient of torchdeq's `grad=k,
    tau=λ`. At an exact x̂ it is v ↦ (∂g/∂θ)ᵀ λ Σ_{i < k} Mⁱ v with M = λ ∂g/∂xᵀ + (1 − λ). All else
    is as in `Unrolled`.

    Args:
        k: how many steps, 1 or more.
        damping: λ, in (0, 2); 1 is `Unrolled`.
        failed: as in `Unrolled`.

    Raises:
        ValueError: an argument is out of range.
    """

    k: int
    damping: float
    failed: str = "mask"

    def __post_init__(self) -> None:
        check_whole("Phantom", "k", self.k)
        check_beta("Phantom", self.damping, "damping")
        check_failed("Phantom", self.failed)

    def _steps(self) -> tuple[int, float]:
        return self.k, self.damping
