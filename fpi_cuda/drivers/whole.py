"""The whole driver: a step of dense layers solved by one kernel, samples refilled as they end.

There is no loop here and no call of g: `_dense_solve` (csrc/*/dense_solve.*) iterates every sample
to its own end, with the stop rule, the record and the solvers of the other drivers.
"""

from __future__ import annotations

from torch import Tensor

from ..backends import native
from ..forms import DenseForm
from ..record import FAILED, ITERATION, STATUS, Limits, Progress
from ..solution import Record, Status
from ..solvers import Anderson, Solver
from . import eager

__all__ = ["refusal", "solve", "tf32_allowed"]

TF32_RTOL = 2e-3  # the least rtol that is left to tf32; others are solved in float32


def tf32_allowed(limits: Limits) -> bool:
    """Whether tf32 is exact enough: it rounds at 4.9e-4, and residuals much below would be that."""
    return limits.rtol >= TF32_RTOL


def refusal(form: DenseForm, x0: Tensor, backend: str, solver: Solver) -> str | None:
    """Why the kernel does not take this solve, or None."""
    if backend not in ("auto", "native"):
        return f'backend "{backend}" has no whole solve'
    if x0.device.type not in native.dense_devices():
        return f"this build has no whole solve for {x0.device.type}"
    lacking = native.missing(x0.device)
    if lacking is not None:
        return lacking
    if any(t.device != x0.device for t in form.tensors):
        return "tensors on several devices"
    if any(t.dtype != x0.dtype for t in form.tensors if t.dim() > 0):
        return "tensors of several dtypes"
    return native.dense_refusal(form, x0, solver.history)


def solve(
    form: DenseForm,
    x0: Tensor,
    solver: Solver,
    limits: Limits,
    floor: Tensor | None = None,
    skip: Tensor | None = None,
    slots: int = 0,
) -> tuple[Tensor, Record]:
    """Iterate every sample of x0, [B, N], to its own end.

    Args:
        form: what to iterate; plain tensors.
        x0: where to start; not written to.
        solver: as `iterate` takes it.
        limits: likewise.
        floor: [B], see `Progress`.
        skip: bool [B]: samples that are left at x0 as converged, without an iteration.
        slots: rows that a thread or block iterates at a time; 0: as fits the machine.
    """
    if x0.device.type == "cuda":
        eager.refuse_capture()
    x0 = x0.contiguous()
    progress = Progress(x0, limits, floor)
    if skip is not None:
        progress.counters[:, STATUS].masked_fill_(skip, Status.CONVERGED + 1)
        progress.out.copy_(x0)
    ridge, restart = 0.0, 0.0
    if isinstance(solver, Anderson):
        ridge, restart = solver.ridge_for(x0.dtype), solver.restart
    tf32 = native.tf32_wanted(x0) and tf32_allowed(limits)
    native.dense_solve(progress, x0, form, solver.beta, solver.history, ridge, restart, tf32, slots)
    tally = progress.tally.tolist()
    out = progress.out
    del progress.out  # the record outlives the solve; the state belongs to the caller
    record = Record(
        progress=progress,
        batch=x0.shape[:1],
        rate=solver.contraction,
        path=f"{native.NAME}, whole{', tf32' if tf32 else ''}",
        failed=tally[FAILED],
        evaluations=tally[ITERATION],
    )
    return out, record
