"""The whole driver: a step of dense layers solved by one kernel, samples refilled as they end.

There is no loop here and no call of g: `_dense_solve` (csrc/*/dense_solve.*) iterates every sample
to its own end, with the stop rule, the record and the solvers of the other drivers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import native
from ..forms import DenseForm
from ..options import Solver
from ..record import FAILED, ITERATION, Limits, Progress, Record
from ..solution import warn
from . import eager, observe
from .support import Solved, Support

__all__ = ["refusal", "solve", "support", "tf32_allowed"]

TF32_RTOL = 2e-3  # the least rtol that is left to tf32; others are solved in float32


def tf32_allowed(limits: Limits) -> bool:
    """Whether tf32 is exact enough for every sample: it rounds at 4.9e-4.

    Residuals much below would be that.
    """
    return limits.rtol >= TF32_RTOL


def support(direction: Any, because: str) -> Support:
    """Takes a form of dense layers; says why not where the user asked for this driver."""
    problem, x0 = direction.problem, direction.start
    options = problem.options
    insisted = options.driver == "whole"
    # Known without a form, which takes g's weights to make.
    if not insisted and (direction.map.form_dim != 2 or x0.dim() != 2):
        return _NOT_DENSE
    form = direction.form
    lacking: str | None
    if watched := observe.asked(direction):
        lacking = f"{watched}: {observe.WHY}"
    elif direction.coupled:
        lacking = "the batch is one system (per_sample=False)"
    elif isinstance(form, DenseForm):
        lacking = refusal(form, x0, options.backend, options.solver)
    else:
        lacking = "g is not of dense layers alone"
    if lacking is None:
        return Support(_solve)
    if insisted and not direction.higher:
        warn(f'{problem.name}: driver="whole" is not possible: {lacking}', UserWarning)
    return Support(reason=f"not whole: {lacking}" if isinstance(form, DenseForm) else "")


_NOT_DENSE = Support()


def _solve(direction: Any, because: str) -> Solved:
    direction.measure()
    options, form, limits = direction.problem.options, direction.form, direction.limits
    if form.products is not None:
        limits = direction.limits_where(direction.start.dtype)
    given = form, direction.start, options.solver, limits
    return Solved(*solve(*given, direction.floor, direction.skip))


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
    if form.products is None and any(t.dtype != x0.dtype for t in form.tensors if t.dim() > 0):
        return "tensors of several dtypes"
    if not hasattr(solver, "mixing"):
        return f"the kernel has no {type(solver).__name__}"
    return native.dense_refusal(form, x0, solver.history)


def solve(
    form: DenseForm,
    x0: Tensor,
    solver: Any,
    limits: Limits,
    floor: Tensor | None = None,
    skip: Tensor | None = None,
    slots: int = 0,
) -> tuple[Tensor, Record]:
    """Iterate every sample of x0, [B, N], to its own end.

    Args:
        form: what to iterate; plain tensors. Where products are rounded, the weights are, and no
            iterate is.
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
    progress = Progress(x0, limits, floor, skip)
    history, beta, ridge, restart, every = solver.mixing(progress.precision)
    tf32 = native.tf32_wanted(x0)
    if form.products is not None:  # autocast asks for less than tf32, which rounds no such weight
        tf32 |= (x0.device.type, x0.dtype) == ("cuda", torch.float32)
        form = form.widened(x0.dtype)
    tf32 = tf32 and tf32_allowed(limits)
    native.dense_solve(progress, x0, form, beta, history, ridge, restart, tf32, slots, every)
    tally = progress.tally.tolist()
    record = Record(
        progress=progress,
        batch=x0.shape[:1],
        rate=solver.contraction,
        path=f"{native.NAME}, whole{', tf32' if tf32 else ''}",
        failed=tally[FAILED],
        evaluations=tally[ITERATION],
    )
    return progress.result(), record
