"""The record of a solve, one row a sample: what the step operators write, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from .status import MASKED, MIXED, Status

# In counters[:, STATUS]: 0 while a sample iterates, then its Status + 1; csrc/math/progress.h.
ACTIVE = 0

# Columns of `counters`, int32 [B, 8]; csrc/math/progress.h has the same: of the window or trail how
# many iterates it holds, and the slot of the newest; how often a mixture was taken back; plain
# steps since the last mixture; how often β was halved.
STATUS, ITERATIONS, REFERENCE_ITERATION, WINDOW, HEAD, RETREATS, PLAIN, HALVINGS = range(8)
COUNTERS = 8
# Entries of `tally`, int32 [3]: rows still active; samples that ended otherwise than converged, so
# far; iterations made. The last so that a device needs no host to count them.
ACTIVE_ROWS, FAILED, ITERATION = range(3)
# Columns of `scalars` in the accumulate dtype; csrc/math/progress.h has the same: the last residual
# norm; the one at the last fall by 0.5 %; the last ‖g(x)‖; the square of the largest gain ‖Δg‖/‖Δr‖
# seen, 0: none; a ring of squares of secant ratios ‖Δg‖/‖Δx‖, 0: none.
RESIDUAL, REFERENCE, VALUE, GAIN, RING_START = range(5)
RING = 5
SCALARS = RING_START + RING
# Columns of `bounds`, [B] or [B, 6]; csrc/math/progress.h has the same: the least norm that rtol
# multiplies; where there are more, a sample's own limits instead of the solve's.
FLOOR, OWN_RTOL, OWN_OFFSET, OWN_PATIENCE, OWN_MAX_ITERATIONS, OWN_ROUNDING = range(6)
BOUNDS = 6

# DIVERGED: the residual is GROWTH times the reference, which is at least GROWTH_ITERATIONS old.
GROWTH, GROWTH_ITERATIONS = 1e4, 5
NOISE = 2  # residual differences below this many roundings of g(x) say nothing of g
LEAST_GAIN = 2.0**-100  # of a square: 0 says that nothing is known
TRAIL = 2  # iterates that Picard keeps for its end,
NEAR_END = 4  # when the residual comes near so many times the threshold
MAX_RETREATS = 3  # mixtures that a sample takes back; then it takes plain steps
# Between two mixtures plain steps go on while each residual is below so many times the last.
GOES_ON = 0.999
# β is halved, at most MAX_HALVINGS times, where the residual is WORSE times the reference, which is
# at least SLOW_ITERATIONS old.
WORSE, SLOW_ITERATIONS, MAX_HALVINGS = 3, 10, 2
# A residual this much below the reference counts as progress. Slow contractions must not look
# stalled: in ten iterations one of rate 0.9995 falls this far.
FALL = 0.995


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Limits:
    """When a sample stops; see `Tolerance` and `Status`.

    own: [B, 5] in the accumulate dtype, or None: each sample's own rtol, offset, patience,
    max_iterations and rounding. Those of the solve are then the least rtol and the most iterations
    of any.
    precision: the dtype that g's values are rounded to; None: the state's.
    spread: by what factor its roundings may exceed the level below which a sample is stalled.
    """

    rtol: float
    offset: float  # atol·√N
    rounding: float  # STALLED only below rounding·‖g(x)‖
    patience: int  # STALLED after this many iterations without a fall by 0.5 %
    max_iterations: int
    own: Tensor | None = field(default=None, compare=False)
    precision: torch.dtype | None = None
    spread: float | Tensor = field(default=1.0, compare=False)

    @property
    def thresholds(self) -> tuple[float | Tensor, float | Tensor]:
        """Rtol and offset: a number for all samples, or [B]."""
        return (self.rtol, self.offset) if self.own is None else (self.own[:, 0], self.own[:, 1])

    @property
    def roundings(self) -> float | Tensor:
        """Of ‖g(x)‖: 16 u √N, a number for all samples or [B]; N of its own `sizes`."""
        return self.spread * (self.rounding if self.own is None else self.own[:, 4])

    @property
    def counted(self) -> bool | Tensor:
        """Whether samples run a fixed count, for all of them or [B]."""
        rtol, offset = self.thresholds
        return (rtol == 0) & (offset == 0)

    @cached_property
    def values(self) -> tuple[float, float, float, int, int]:
        """In the order in which the kernels take them."""
        return self.rtol, self.offset, self.rounding, self.patience, self.max_iterations


# For a solve that is ended from outside: no finite residual reaches it, except that one which grows
# without end is DIVERGED.
NEVER = Limits(rtol=0.0, offset=-1.0, rounding=-1.0, patience=2**30, max_iterations=2**30)


class Progress:
    """Per-sample state of one solve, shared by all backends. A zeroed record is a fresh one.

    Args:
        x: where to start, [B, N], contiguous.
        limits: the stop rule.
        floor: [B] in the accumulate dtype: the threshold is offset + rtol·max(‖g(x)‖, floor); the
            adjoint passes ‖v‖. None: zero.
        skip: bool [B]: samples that are left at x as converged, without an iteration.
    """

    def __init__(
        self,
        x: Tensor,
        limits: Limits,
        floor: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        b, device = x.shape[0], x.device
        self.limits = limits
        self.dtype = accumulate_dtype(x.dtype)
        self.precision = limits.precision or x.dtype  # that g's values are rounded to
        self.counters = torch.zeros(b, COUNTERS, dtype=torch.int32, device=device)
        self.scalars = torch.zeros(b, SCALARS, dtype=self.dtype, device=device)
        self.bounds = floor  # what the step operators are told of each sample
        if limits.own is not None:
            first = limits.own.new_zeros(b) if floor is None else floor
            self.bounds = torch.cat([first[:, None], limits.own], 1)
        self.out = torch.empty_like(x)  # [B, N]: written when a sample finishes
        self.index: Tensor | None = None  # [R]: the sample that each row holds; None: its own
        # [B, tiles, 2]: sums of squares of g(x) − x and g(x) that the evaluation left, or None.
        self.norms: Tensor | None = None
        self.tally = torch.zeros(3, dtype=torch.int32, device=device)
        if skip is not None:
            self.skip(skip, x)

    def skip(self, samples: Tensor, x: Tensor) -> None:
        """Leave samples, bool [B], at x as converged; no wait for the device."""
        self.counters[:, STATUS].masked_fill_(samples, Status.CONVERGED + 1)
        self.out.copy_(x)

    @property
    def floor(self) -> Tensor | None:
        """[B], a view of the bounds; None: zero."""
        bounds = self.bounds
        return bounds if bounds is None or bounds.dim() == 1 else bounds[:, FLOOR]

    @property
    def own(self) -> Tensor | None:
        """[B, 5], a view of the bounds: the samples' own limits; None: they have none."""
        bounds = self.bounds
        return None if bounds is None or bounds.dim() == 1 else bounds[:, OWN_RTOL:]

    def result(self) -> Tensor:
        """The state, once: the record outlives the solve, and the state belongs to the caller."""
        out = self.out
        del self.out
        self.norms = None
        return out

    @property
    def samples(self) -> Tensor:
        """[R]: the sample that each row of x holds."""
        if self.index is None:
            return torch.arange(len(self.counters), device=self.counters.device)
        return self.index

    def _active(self) -> Tensor:
        """[R]: whether the sample that a row holds still iterates."""
        status = self.counters[:, STATUS]
        return (status if self.index is None else status.index_select(0, self.index)) == ACTIVE

    def active_rows(self) -> Tensor:
        """Positions of the rows whose samples still iterate, ascending."""
        return self._active().nonzero().reshape(-1)

    def first_rows(self, count: int) -> Tensor:
        """That many positions, those of active rows first: where the host knows no exact number.

        Ascending among the active, and no wait for the device; count is at least their number.
        """
        return self._active().argsort(descending=True, stable=True)[:count]

    def narrow(self, positions: Tensor) -> None:
        """From now on the rows are those at these positions."""
        self.index = positions if self.index is None else self.index.index_select(0, positions)


class Account:
    """What a record says of every sample, under its own name and its solution's: [B] tensors."""

    # Times gain times residual is the error estimate, but for rounding: fitted once to a zoo of
    # maps, so that it covers the error in 99 of 100 (docs/math.md).
    _factor: ClassVar[float] = 2.6
    record: Record

    @property
    def status(self) -> Tensor:
        """Int8 [B], members of Status."""
        return (self.record.progress.counters[:, STATUS] - 1).to(torch.int8).view(self.record.batch)

    @property
    def iterations(self) -> Tensor:
        """Int32 [B], evaluations of g that this sample took part in while active."""
        return self.record.progress.counters[:, ITERATIONS].reshape(self.record.batch)

    @property
    def residual_norm(self) -> Tensor:
        """[B], ‖g(x) − x‖₂ of the iterate that passed the test."""
        return self.record.progress.scalars[:, RESIDUAL].reshape(self.record.batch)

    @property
    def contraction(self) -> Tensor:
        """[B], measured rate of g; NaN where only one iteration was made, or rounding hides it."""
        record = self.record
        ring, counters = record.progress.scalars[:, RING_START:], record.progress.counters
        return record.rate(ring, counters[:, ITERATIONS]).view(record.batch)

    @property
    def converged(self) -> Tensor:
        """Bool [B]: which samples met the tolerance."""
        return self.status == Status.CONVERGED

    @property
    def repelling(self) -> Tensor:
        """Bool [B]: CONVERGED, though the measured contraction is ≥ 1.

        g expands there: x0 lay at or near a fixed point that repels, or Anderson found one. The
        iteration x ← g(x) may leave it for another, and its gradient is of this one all the same.
        """
        return self.converged & (self.contraction >= 1)

    @property
    def retreats(self) -> Tensor:
        """Int32 [B], mixtures of Anderson that were taken back because g was not finite there."""
        return self.record.progress.counters[:, RETREATS].reshape(self.record.batch)

    @property
    def error_estimate(self) -> Tensor:
        """[B], an estimate of ‖x − x̂‖₂, no bound: 2.6 times the measured gain times the residual.

        And what rounding g's value may leave of an error, u ‖g(x)‖ (1 + gain). docs/math.md says
        how often it is too small. Inf where nothing could be measured (one iteration, differences
        at the rounding level) or there is nothing to be near to (DIVERGED, NONFINITE); 0 where x0
        gave no residual.
        """
        record, scalars = self.record, self.record.progress.scalars
        gain, residual = scalars[:, GAIN].sqrt(), record.measured_residual
        roundoff = torch.finfo(record.computed or record.progress.precision).eps / 2
        rounding = roundoff * scalars[:, VALUE] * (1 + gain)
        nothing = torch.where(residual == 0, residual, math.inf)
        estimate = torch.where(gain > 0, self._factor * gain * residual + rounding, nothing)
        lost = torch.zeros_like(gain, dtype=torch.bool)
        for status in MASKED:
            lost |= record.progress.counters[:, STATUS] == status + 1
        return torch.where(lost, math.inf, estimate).view(record.batch)

    @property
    def error_bound(self) -> Tensor | None:
        """A bound of ‖x − x̂‖₂, [B], where the step certifies a Lipschitz constant k < 1, else None.

        (k·residual + ε)/(1 − k), with ε = 16 u √N (‖g(x)‖ + t) for the rounding of one evaluation
        of g, u the unit roundoff of what g computes in and t its least normal number, N the state's
        entries or the sample's `sizes`.
        Under autocast x̂ is that of g with its weights rounded so.
        """
        record, k = self.record, self.record.lipschitz
        if k is None or not 0 <= k < 1:
            return None
        progress, scalars = record.progress, record.progress.scalars
        least = torch.finfo(record.computed or progress.precision).tiny
        rounding = progress.limits.roundings * (scalars[:, VALUE] + least)
        if record.computed not in (None, progress.precision):  # weights rounded, their sums not
            eps = [torch.finfo(d).eps for d in (record.computed, progress.precision)]
            rounding = rounding * (eps[0] / eps[1])
        return ((k * scalars[:, RESIDUAL] + rounding) / (1 - k)).view(record.batch)


@dataclass(eq=False, repr=False)
class Record(Account):
    """Per-sample account of one solve. Tensors have the batch's shape, [B]; the trace [T, B]."""

    progress: Progress
    batch: torch.Size
    rate: Callable[[Tensor, Tensor], Tensor]  # the solver's contraction
    path: str  # which backend and driver ran
    failed: int  # samples that did not converge; -1: a program's, unknown
    # Calls of g with any number of rows, those of the per_sample probe too; in a program a tensor.
    evaluations: Any = 0
    lipschitz: float | None = None  # certified by the step, for error_bound
    adjoint: Record | None = None  # the backward solve's own record, filled by each backward
    tangent: Record | None = None  # likewise, of forward mode
    valued: bool = True  # False: shapes alone are known
    computed: torch.dtype | None = None  # what g computes in; None: what its values are rounded to
    system: int = 1  # samples that are solved as one system
    mixes: bool = False  # whether g is called at mixtures of iterates, too
    trace: Tensor | None = None  # of an observed solve; and of which iterations, [T]
    trace_iterations: Tensor | None = None

    @property
    def record(self) -> Record:  # type: ignore[override]
        """Itself."""
        return self

    @property
    def measured_residual(self) -> Tensor:
        """[B], what the gain multiplies: the residual; of one system at least its mean square.

        There a sample's error comes from the others' residuals too.
        """
        residual = self.progress.scalars[:, RESIDUAL]
        unknown = isinstance(self.system, torch.SymInt)  # in a program, which serves any batch
        if not unknown and (self.system == 1 or not len(residual)):
            return residual
        systems = residual.view(-1, self.system)
        unit = systems.amax(1, keepdim=True).clamp(min=torch.finfo(residual.dtype).tiny)
        mean = unit * (systems / unit).square().mean(1, keepdim=True).sqrt()
        return torch.maximum(systems, mean).view(-1)

    def count(self, status: Status) -> int:
        """How many samples ended with this status."""
        return int((self.status == status).sum())

    @property
    def wanting(self) -> Tensor:
        """Bool [B]: which samples failed; to end at a fixed count is none."""
        status, counted = self.status.reshape(-1), self.progress.limits.counted
        short = (status == Status.MAX_ITERATIONS) & counted
        return ((status != Status.CONVERGED) & ~short).view(self.batch)

    def failures(self, advice: bool = True, nonfinite: str = "") -> str:
        """A sentence per status of samples that failed, with counts and the first ones; or ''.

        Samples of `Tolerance(0, 0)` that made all their iterations did what was asked.

        advice: whether to say what each means and what to try.
        nonfinite: what NONFINITE means, if not what its message says.
        """
        parts = []
        flat = torch.where(self.wanting, self.status, Status.CONVERGED).reshape(-1)
        for status in Status:
            if status is Status.CONVERGED:
                continue
            samples = (flat == status).nonzero().reshape(-1)
            if len(samples):
                shown = ", ".join(str(int(i)) for i in samples[:8])
                more = ", ..." if len(samples) > 8 else ""
                own = nonfinite if status is Status.NONFINITE else ""
                message = own or status.message
                parts.append(
                    f"{len(samples)} of {flat.numel()} samples {status.name} "
                    f"(samples {shown}{more}){': ' + message if advice else '.'}"
                )
                mixed = advice and self.mixes and status is Status.NONFINITE
                if mixed and bool((self.iterations.reshape(-1)[samples] > 2).any()):
                    n = int(self.retreats.reshape(-1)[samples].sum())
                    parts.append(MIXED.format(f"{n} times" if n != 1 else "once"))
        return " ".join(parts)

    def summary(self) -> str:
        """A line: samples by status, iterations, the largest residual, who solved it."""
        if not self.valued:
            return self.path
        status = self.status.reshape(-1).tolist()
        by_status = ", ".join(f"{status.count(s)} {s.name}" for s in Status if s in status)
        parts = [f"{len(status)} samples" + (f": {by_status}" if status else "")]
        if status:
            counts, residual = self.iterations, self.residual_norm
            least, most = int(counts.min()), int(counts.max())
            parts.append(f"{least} to {most} iterations" if least < most else f"{most} iterations")
            if len(finite := residual[residual.isfinite()]):
                parts.append(f"residual_norm at most {float(finite.max()):.3g}")
            repelling = int(self.repelling.sum())
            if repelling:
                parts.append(f"{repelling} at fixed points that may repel (contraction >= 1)")
        return "; ".join((*parts, self.path))

    def __repr__(self) -> str:
        return f"Record({self.summary()})"
