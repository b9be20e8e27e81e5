"""The compiled step operators (csrc/), one Python wrapper each.

Same signatures and meaning as in `reference`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .. import _build  # noqa: F401 - loads the library
from .progress import Progress

NAME = "native"
# By device type: csrc/cpu/kernels/anderson_step.h, csrc/cuda/plan.h.
MAX_HISTORY = {"cpu": 64, "cuda": 32}

_ops = torch.ops.fpi_cuda
_picard_step = _ops._picard_step.default
_anderson_step = _ops._anderson_step.default


@cache
def devices() -> tuple[str, ...]:
    """Device types that every step operator has a kernel for."""
    steps = ("fpi_cuda::_picard_step", "fpi_cuda::_anderson_step")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(d for d in ("cpu", "cuda") if all(has_kernel(step, d.upper()) for step in steps))


def damped_update(x: Tensor, gx: Tensor, beta: float) -> None:
    """x ← x + β (g(x) − x), in place."""
    _ops._damped_update(x, gx, beta)


def picard_step(p: Progress, x: Tensor, gx: Tensor, beta: float) -> None:
    """See `reference.picard_step`."""
    lim = p.limits
    _picard_step(
        x,
        gx,
        p.out,
        p.counters,
        p.scalars,
        p.tally,
        p.index,
        p.floor,
        lim.rtol,
        lim.offset,
        lim.rounding,
        lim.patience,
        lim.max_iterations,
        beta,
    )


def anderson_step(
    p: Progress,
    x: Tensor,
    gx: Tensor,
    beta: float,
    ridge: float,
    restart: float,
    values: Tensor,
    residuals: Tensor,
    gram: Tensor,
) -> None:
    """See `reference.anderson_step`; refreshes one row of gram."""
    lim = p.limits
    _anderson_step(
        x,
        gx,
        p.out,
        p.counters,
        p.scalars,
        p.tally,
        p.index,
        p.floor,
        lim.rtol,
        lim.offset,
        lim.rounding,
        lim.patience,
        lim.max_iterations,
        beta,
        ridge,
        restart,
        values,
        residuals,
        gram,
    )
