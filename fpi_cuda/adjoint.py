"""How a fixed point is differentiated: by the implicit function theorem (paper eq. 6-11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .options import ByValue, Solver, Tolerance, check_parts
from .solve import node
from .solve.limits import check_values
from .solve.problem import Problem, Report

__all__ = ["ImplicitAdjoint"]

_TOLERANCE = Tolerance()


@dataclass(frozen=True, eq=False)
class ImplicitAdjoint(ByValue):
    """How the backward fixed-point iteration is solved (paper eq. 9), and that of a tangent.

    Args:
        solver: None: the forward's. `BiCGSTAB()` takes fewer products where ∂g/∂x is slow and far
            from symmetric, and needs no contraction (docs/adjoint.md).
        tolerance: None: the default rtol of `Tolerance`, under the autocast of the forward solve,
            wherever the backward runs. The test is ‖r‖ ≤ rtol·max(‖c‖, ‖v‖), so
            the scale of the loss does not matter; an atol is added only where it is given.
        max_iterations: None: the forward's. It and the tolerances may be tensors [B].
        failed: "mask" gives samples that ended DIVERGED or NONFINITE a zero gradient; "use" lets
            their gradient through as it is.

    Raises:
        ValueError: an option is out of range.
        TypeError: an option has the wrong type.
    """

    solver: Solver | None = None
    tolerance: Tolerance | None = None
    max_iterations: int | Tensor | None = None
    failed: str = "mask"

    def __post_init__(self) -> None:
        check_parts("ImplicitAdjoint", self.solver, self.tolerance, self.max_iterations, own=False)
        if self.failed not in ("mask", "use"):
            raise ValueError(
                f'ImplicitAdjoint: failed must be "mask" or "use" (got {self.failed!r})'
            )

    def attach(
        self, problem: Problem, x0: Tensor, tensors: Sequence[Tensor], report: Report
    ) -> Tensor:
        """The problem solved from x0, x̂ attached to the tensors by one node of any order."""
        if self.tolerance is not None or self.max_iterations is not None:  # not at the backward
            check_values("ImplicitAdjoint", self.tolerance, self.max_iterations, x0.shape[0])
        return node.attach(problem, x0, tensors, report)

    def transposed(self, problem: Problem) -> Problem:
        """The adjoint of a problem: c = (∂g/∂x)ᵀ c + v."""
        options, most = problem.options, self.max_iterations
        if most is None:
            most = options.max_iterations
        return problem._replace(
            map=problem.map.linear(transpose=True),
            options=options._replace(
                solver=self.solver or options.solver,
                tolerance=self.tolerance or _TOLERANCE,
                max_iterations=most,
                trace=False,
                callback=None,
            ),
            unpack=lambda c: c,
            name="adjoint",
            lipschitz=None,
        )
