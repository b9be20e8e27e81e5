"""Any solver where the samples of a batch are one system: they stop, fail and move together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..options import Solver
from ..record import (
    ACTIVE,
    ACTIVE_ROWS,
    BOUNDS,
    FAILED,
    GAIN,
    NEVER,
    OWN_MAX_ITERATIONS,
    OWN_OFFSET,
    OWN_PATIENCE,
    OWN_ROUNDING,
    REFERENCE,
    REFERENCE_ITERATION,
    RETREATS,
    STATUS,
    Progress,
)
from ..status import Status
from .picard import Update

_CONVERGED = Status.CONVERGED + 1


@dataclass(frozen=True)
class Coupled:
    """A solver whose systems are so many samples each: x, [S · samples, N], holds S of them.

    Each sample is judged by the stop rule on its own norms, by Picard's operator on a copy of x; a
    system ends where all of its samples do in the same iteration, and no sample is frozen before.
    It also ends where it holds NaN or Inf, or where its residual as a whole has grown steadily.
    (One sample's may well grow: it is zero until what the others know has arrived.) The solver
    moves a system as if it were one sample, so Anderson has one set of weights for all. Where a
    solver evaluates directions (BiCGSTAB), the iterate and g that its recursion has are judged
    instead; where all samples would end there, it evaluates that iterate next.

    Args:
        solver: the algorithm.
        samples: of one system.
    """

    solver: Solver
    samples: int

    @property
    def history(self) -> int:
        """The solver's."""
        return self.solver.history

    @property
    def patience(self) -> int:
        """The solver's."""
        return self.solver.patience

    def contraction(self, ring: Tensor, iterations: Tensor) -> Tensor:
        """[B]: the rate of its system, for every sample."""
        return self.solver.contraction(ring, iterations)

    def start(self, backend: Any, progress: Progress, x: Tensor) -> Update:
        """The update `(x, gx) -> None` that moves x [R, N] in place."""
        samples, n = self.samples, x.shape[1]
        systems = x.shape[0] // samples
        whole = (systems, samples * n)
        joint = Progress(x.view(whole), NEVER)
        joint.out, joint.precision = progress.out.view(whole), progress.precision
        # Limits of its own: a threshold that every residual meets once its samples all end.
        most = progress.limits.max_iterations
        joint.bounds = joint.scalars.new_zeros(systems, BOUNDS)
        joint.bounds[:, OWN_PATIENCE] = NEVER.patience
        joint.bounds[:, OWN_ROUNDING] = NEVER.rounding
        joint.bounds[:, OWN_MAX_ITERATIONS] = most if most <= 2**24 else 2**30
        threshold = joint.bounds[:, OWN_OFFSET]
        move = self.solver.start(backend, joint, joint.out)
        iterate = getattr(move, "iterate", None)  # of a solver that evaluates directions, too
        judged = torch.empty_like(x)
        status = progress.counters[:, STATUS].view(systems, samples)
        since = progress.counters[:, REFERENCE_ITERATION].view(systems, samples)
        retreats = progress.counters[:, RETREATS].view(systems, samples)
        norms = progress.scalars[:, :GAIN].view(systems, samples, -1)
        measured = progress.scalars[:, GAIN:].view(systems, samples, -1)
        reference = progress.scalars[:, REFERENCE]
        joint_status = joint.counters[:, STATUS]
        joint_since = joint.counters[:, REFERENCE_ITERATION, None]
        joint_retreats = joint.counters[:, RETREATS, None]
        joint_measured = joint.scalars[:, None, GAIN:]

        def update(x: Tensor, gx: Tensor) -> None:
            at, value = x, gx
            if iterate is not None:
                at, value = (t.view_as(x) for t in iterate(x.view(whole), gx.view(whole)))
            judged.copy_(at)
            before = norms.clone()
            backend.picard_step(progress, judged, value, 1.0)
            least, most = torch.aminmax(status, dim=1)
            threshold.copy_(torch.where(least > ACTIVE, math.inf, NEVER.offset))
            move(x.view(whole), gx.view(whole))
            ended = torch.where(joint_status == _CONVERGED, most, joint_status)
            status.copy_(ended[:, None])
            joint_status.copy_(ended)
            # Where it went back, the norms are those of the iterate to which it did.
            norms.copy_(torch.where((retreats != joint_retreats)[..., None], before, norms))
            retreats.copy_(joint_retreats)
            # What counts as growth or as progress, the system says.
            since.copy_(joint_since)
            reference.fill_(math.nan)
            measured.copy_(joint_measured)
            progress.tally[ACTIVE_ROWS] = (ended == ACTIVE).sum() * samples
            progress.tally[FAILED] = (ended > _CONVERGED).sum() * samples

        return update
