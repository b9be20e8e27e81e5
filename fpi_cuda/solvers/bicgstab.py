"""BiCGSTAB for the linear problems of derivatives: two products an iteration, few vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import backends
from ..backends import krylov
from ..backends.scratch import Scratch
from ..record import WINDOW, Progress


@dataclass(frozen=True)
class BiCGSTAB:
    """Solves an adjoint or a tangent, u = M u + v, as linear equations (van der Vorst 1992).

    For `ImplicitAdjoint(solver=BiCGSTAB())` alone: a forward solve is not linear. Where M is slow
    (a rate of .99 and more) and far from symmetric it takes fewer products than Anderson, and it
    needs no contraction (but 1 − M must not be exactly skew-symmetric: Anderson serves there); on
    easy problems Anderson takes as few (docs/adjoint.md has both). It
    keeps six vectors a sample: two in the state's dtype, four in the accumulate dtype (float32 for
    half types, in which a recursion would lose the digits that its products still have).

    `iterations` counts products M y. Only some of them are of iterates; `residual_norm` and status
    are always of one that was evaluated. What breaks down begins anew, alone, from its solution so
    far. docs/math.md has the formulas, and what `contraction` and `error_estimate` are here.
    """

    history: ClassVar[int] = 2  # the last judged iterate, and the one evaluated
    patience: ClassVar[int] = 10  # products without progress, at the rounding level: stalled
    linear: ClassVar[bool] = True  # no solver of a forward problem

    def start(self, backend: Any, progress: Progress, x: Tensor) -> Any:
        """The update `(x, gx) -> None` that moves x [R, N] in place; owns the vectors."""
        b, n = x.shape
        step = backends.operator(backend, "bicgstab_step", x)
        scratch = Scratch(x)
        base = scratch.empty((b, krylov.STATES, n), x.dtype, x.device)
        vectors = scratch.empty((b, krylov.VECTORS, n), progress.dtype, x.device)
        numbers = scratch.empty((b, krylov.NUMBERS), progress.dtype, x.device)

        def update(x: Tensor, gx: Tensor) -> None:
            step(progress, x, gx, base, vectors, numbers)

        def iterate(x: Tensor, gx: Tensor) -> tuple[Tensor, Tensor]:
            window = progress.counters[:, WINDOW]
            return krylov.iterate(window, x, gx, base, vectors, numbers)

        update.scratch = scratch  # type: ignore[attr-defined]  # back to the pool with the update
        update.iterate = iterate  # type: ignore[attr-defined]  # for a batch that is one system
        return update

    def contraction(self, ring: Tensor, iterations: Tensor) -> Tensor:
        """[B]: the largest ‖M y‖/‖y‖ of the last directions; NaN where there was none."""
        del iterations
        known = (ring > 0) & ring.isfinite()
        return torch.where(known.any(1), torch.where(known, ring, 0).amax(1).sqrt(), torch.nan)
