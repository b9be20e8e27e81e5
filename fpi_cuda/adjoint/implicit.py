"""Gradients by the implicit function theorem (paper eq. 6-11), solved to the end or cut short.

x̂ is one node: nothing of the forward is recorded, and memory does not grow with iterations. What
follows is c = (∂g/∂x)ᵀ c + v, then (∂g/∂θ)ᵀ c; the classes say how far the first is iterated.

Of those that cut it short, second derivatives and tangents are the implicit ones with every linear
solve in them cut likewise: of x̂′ = S ∂g/∂θ and x̂″ = S (…), where S stands for (1 − ∂g/∂x)⁻¹, each S
is the approximate one. So they tend to the exact ones as k grows. They are no derivatives of the
approximate gradient, which are those of no function of x̂; `Unrolled` has such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._check import check_beta, check_whole
from ..drivers import none
from ..options import ByValue, Solver, Tolerance, check_failed, check_parts
from ..solve import node
from ..solve.limits import check_values
from ..solve.problem import Problem, Report
from ..solvers import Picard, named

__all__ = ["ImplicitAdjoint", "Neumann", "OneStep", "Truncated"]

_TOLERANCE = Tolerance()
# Solver, tolerance and max_iterations, each None where it is the forward's or the default.
Solves = tuple[Solver | None, Tolerance | None, int | Tensor | None]


class _ByNode(ByValue):
    """An adjoint whose `attach` is the node's; what differs are the options of its linear solves.

    Attributes:
        by_node: that it is so, by which a compiled graph knows what it can be made of.
        cut: whether a solve that has not converged is no failure.
        cold: whether it starts at v whatever a layer keeps from the call before.
    """

    by_node: ClassVar[bool] = True
    cut: ClassVar[bool] = False
    cold: ClassVar[bool] = False
    failed: str

    def _solves(self) -> Solves:
        """The options of its linear solves."""
        raise NotImplementedError

    def attach(
        self, problem: Problem, x0: Tensor, tensors: Sequence[Tensor], report: Report
    ) -> Tensor:
        """The problem solved from x0, x̂ attached to the tensors by one node of any order."""
        _, tolerance, most = self._solves()
        if tolerance is not None or most is not None:  # not at the backward
            check_values(type(self).__name__, tolerance, most, x0.shape[0])
        return node.attach(problem, x0, tensors, report)

    def transposed(self, problem: Problem) -> Problem:
        """The adjoint of a problem: c = (∂g/∂x)ᵀ c + v."""
        options = problem.options
        solver, tolerance, most = self._solves()
        if most is None:
            most = options.max_iterations
        one = not isinstance(most, Tensor) or most.dim() == 0
        nothing = one and int(most) == 0
        return problem._replace(
            map=problem.map.linear(transpose=True),
            options=options._replace(
                solver=solver or options.solver,
                tolerance=tolerance or _TOLERANCE,
                max_iterations=most,
                trace=False,
                callback=None,
                checkpoints=(),
                memory=None if self.cold or nothing else options.memory,
            ),
            drivers=(none,) if nothing else problem.drivers,
            unpack=lambda c: c,
            name="adjoint",
            lipschitz=None,
            cut=self.cut,
        )


@dataclass(frozen=True, eq=False)
class ImplicitAdjoint(_ByNode):
    """The exact gradient: how the backward iteration is solved (paper eq. 9), and a tangent's.

    Args:
        solver: None: the forward's; "auto": `Auto()`. `BiCGSTAB()` takes fewer products where ∂g/∂x
            is slow and far from symmetric, and needs no contraction (docs/adjoint.md).
        tolerance: None: the default rtol of `Tolerance`, under the autocast of the forward solve,
            wherever the backward runs. The test is ‖r‖ ≤ rtol·max(‖c‖, ‖v‖), so
            the scale of the loss does not matter; an atol is added only where it is given.
        max_iterations: None: the forward's. It and the tolerances may be tensors [B]. 0: none is
            made, c = v, as by `OneStep` (of a tensor [B] each is 1 or more).
        failed: "mask" gives samples that ended DIVERGED or NONFINITE a zero gradient; "use" lets
            their gradient through as it is.

    Raises:
        ValueError: an option is out of range.
        TypeError: an option has the wrong type.
    """

    solver: Solver | str | None = None
    tolerance: Tolerance | None = None
    max_iterations: int | Tensor | None = None
    failed: str = "mask"

    def __post_init__(self) -> None:
        check_parts("ImplicitAdjoint", *self._solves(), own=False)
        check_failed("ImplicitAdjoint", self.failed)

    def _solves(self) -> Solves:
        return named(self.solver), self.tolerance, self.max_iterations


@dataclass(frozen=True, eq=False)
class OneStep(_ByNode):
    """Jacobian-free backpropagation (Fung et al. 2022): c = v, one product with ∂g/∂θ.

    The gradient of one g(x̂) at a constant x̂, as if ∂g/∂x were 0: no product with that, one call of
    g. `solution.adjoint` counts 0 iterations, and nothing warns. A direction of descent where
    ‖∂g/∂x‖ is small enough; docs/gradients.md has its bias. Second derivatives and tangents are the
    implicit ones with every (1 − ∂g/∂x)⁻¹ replaced by 1.

    Args:
        failed: as in `ImplicitAdjoint`.

    Raises:
        ValueError: failed is neither "mask" nor "use".
    """

    failed: str = "mask"
    cold: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_failed("OneStep", self.failed)

    def _solves(self) -> Solves:
        return None, None, 0


@dataclass(frozen=True, eq=False)
class Neumann(_ByNode):
    """The Neumann series of the adjoint by k products: c = Σ_{i=0}^{k} (Jᵀ)ⁱ v, J = ∂g/∂x at x̂.

    g is linearised at x̂ once. At an exact x̂ and damping 1 this is the gradient of k + 1 recorded
    steps, `Unrolled(k + 1)`, without their memory. With a damping λ it is c = v + Jᵀ u, where u is
    what k − 1 steps u ← λ (Jᵀ u + v) + (1 − λ) u make of v: with M = λ Jᵀ + (1 − λ),
    u = (λ Σ_{i=0}^{k−2} Mⁱ + M^{k−1}) v. That converges where eigenvalues of J below −1, or far
    from the real axis, let the plain series grow. A sample whose series grows without end
    (DIVERGED) is a failure, as in `ImplicitAdjoint`; to be short of convergence is none. Second
    derivatives and tangents are the implicit ones with every (1 − ∂g/∂x)⁻¹ replaced by this
    polynomial.

    Args:
        k: products with ∂g/∂xᵀ, 0 or more; 0 is `OneStep`.
        damping: λ, in (0, 2).
        failed: as in `ImplicitAdjoint`.

    Raises:
        ValueError: an argument is out of range.
    """

    k: int
    damping: float = 1.0
    failed: str = "mask"
    cold: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole("Neumann", "k", self.k, least=0)
        check_beta("Neumann", self.damping, "damping")
        check_failed("Neumann", self.failed)

    def _solves(self) -> Solves:
        return Picard(self.damping), Tolerance(0, 0), self.k


@dataclass(frozen=True, eq=False)
class Truncated(_ByNode):
    """The adjoint iteration ended after k products at most, which is no failure.

    By Anderson, the default, it is nearer to the exact gradient than `Neumann` at the same cost: of
    a symmetric ∂g/∂x from five products on, of others from some twenty (docs/gradients.md). A layer
    with `warm` goes on from the last call's adjoint. Second derivatives and tangents are the
    implicit ones with every linear solve cut so.

    Args:
        k: products with ∂g/∂xᵀ, 0 or more; 0 is `OneStep`.
        solver: None: the forward's; "auto": `Auto()`.
        tolerance: at which it stops earlier; None: as in `ImplicitAdjoint`. `Tolerance(0, 0)`
            always takes k.
        failed: as in `ImplicitAdjoint`.

    Raises:
        ValueError: an option is out of range.
        TypeError: an option has the wrong type.
    """

    k: int
    solver: Solver | str | None = None
    tolerance: Tolerance | None = None
    failed: str = "mask"
    cut: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole("Truncated", "k", self.k, least=0)
        check_parts("Truncated", *self._solves(), own=False)
        check_failed("Truncated", self.failed)

    def _solves(self) -> Solves:
        return named(self.solver), self.tolerance, self.k
