"""The compiled step operators (csrc/), one Python wrapper each.

Same signatures and meaning as in `reference`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _build
from .._torch import has_kernel
from ..forms import ACTIVATIONS, DenseForm
from ..record import Progress, accumulate_dtype

NAME = "native"
# By device type: csrc/cpu/kernels/anderson_step.h, csrc/cuda/plan.h.
MAX_HISTORY = {"cpu": 64, "cuda": 32}

# Bytes of weights above which a loop of library products is as fast. A CPU then reads them from
# memory in each iteration whoever multiplies, and packing costs more than it brings (measured);
# on CUDA each block streams for itself what its shared memory does not hold (on paper).
MOST_WEIGHTS = {"cpu": 32 * 2**20, "cuda": 512 * 2**10}

CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # csrc/math/activation.h

_ops = torch.ops.fpi_cuda
_picard_step = _ops._picard_step.default
_anderson_step = _ops._anderson_step.default
_bicgstab_step = _ops._bicgstab_step.default
_dense_map = _ops._dense_map.default
_dense_solve = _ops._dense_solve.default


@cache
def devices() -> tuple[str, ...]:
    """Device types that every step operator has a kernel for."""
    return tuple(
        d for d in ("cpu", "cuda") if _has(d, "_picard_step") and _has(d, "_anderson_step")
    )


def missing(device: torch.device) -> str | None:
    """Why the step operators don't run on this device here, or None."""
    if device.type not in devices():
        return (
            f"this build has no kernels for device {device} (it has them for "
            f"{', '.join(devices())})"
        )
    return _too_old(device.index) if device.type == "cuda" else None


@cache
def _too_old(index: int | None) -> str | None:
    built: list[str] = _build.build_info()["cuda_archs"]
    found = torch.cuda.get_device_capability(index)
    if any(_runs(arch, *found) for arch in built):
        return None
    name = ".".join(map(str, found))
    return (
        f"this build's CUDA kernels are for compute capability {', '.join(built)}, and the device "
        f"has {name}; rebuild with TORCH_CUDA_ARCH_LIST={name} (8.0 is the least that is tested)"
    )


def _runs(arch: str, major: int, minor: int) -> bool:
    """Whether code for arch, as "80" or "90+PTX", runs on a device of this compute capability."""
    number, _, ptx = arch.partition("+")
    own = number.rstrip("af")
    least = int(own[:-1]), int(own[-1])
    if number.endswith("a"):  # features of this one alone
        return (major, minor) == least
    later = bool(ptx) and number == own  # code with a family's features stays in the family
    return (major == least[0] and minor >= least[1]) or (later and (major, minor) >= least)


def has(device_type: str, operator: str) -> bool:
    """Whether this build has the step operator of this name there."""
    return _has(device_type, f"_{operator}")


@cache
def dense_devices() -> tuple[str, ...]:
    """Device types that dense steps are solved whole on."""
    return tuple(d for d in ("cpu", "cuda") if _has(d, "_dense_solve"))


def _has(device: str, operator: str) -> bool:
    return has_kernel(f"fpi_cuda::{operator}", device)


def picard_step(
    p: Progress, x: Tensor, gx: Tensor, beta: float, trail: Tensor | None = None
) -> None:
    """See `reference.picard_step`."""
    given = p.out, p.counters, p.scalars, p.tally, p.index, p.bounds
    _picard_step(x, gx, *given, *p.limits.values, beta, trail)


def anderson_step(
    p: Progress, x: Tensor, gx: Tensor, *weights_and_window: Any, **more: Any
) -> None:
    """See `reference.anderson_step`; refreshes the rows of gram that are new since a mixture."""
    given = p.out, p.counters, p.scalars, p.tally, p.index, p.bounds
    _anderson_step(x, gx, *given, *p.limits.values, *weights_and_window, **more)


def bicgstab_step(p: Progress, x: Tensor, gx: Tensor, *memory: Tensor) -> None:
    """See `reference.bicgstab_step`."""
    given = p.out, p.counters, p.scalars, p.tally, p.index, p.bounds
    _bicgstab_step(x, gx, *given, *p.limits.values, 1.0, *memory)


def dense_refusal(form: DenseForm, x0: Tensor, history: int) -> str | None:
    """Why `dense_solve` does not take this form, of right shapes, or None."""
    hidden = form.hidden_weight
    values = form.weight.numel() + (0 if hidden is None else hidden.numel())
    if x0.device.type == "cpu":
        if values * accumulate_dtype(x0.dtype).itemsize > MOST_WEIGHTS["cpu"]:
            return "weights beyond any cache, where the library's products are as fast"
    else:
        if values * x0.dtype.itemsize > MOST_WEIGHTS["cuda"]:
            return "weights that each block would have to read in each iteration"
        h = -1 if hidden is None else len(hidden)
        if history > MAX_HISTORY["cuda"] or not _ops._dense_fits(x0, h, history):
            return "more than shared memory holds"
    return None


def tf32_wanted(x: Tensor, switch: Any = torch.backends.cuda.matmul) -> bool:
    """Whether torch is set to round to tf32 the operands of what the switch is for, like x's."""
    if x.device.type != "cuda" or x.dtype != torch.float32:
        return False
    own: str = switch.fp32_precision
    return (getattr(torch.backends, "fp32_precision", own) if own == "none" else own) == "tf32"


def dense_solve(
    p: Progress,
    x0: Tensor,
    form: DenseForm,
    beta: float,
    history: int,
    ridge: float,
    restart: float,
    tf32: bool = False,
    slots: int = 0,
    every: int = 1,
    starts_plain: bool = False,
) -> None:
    """Iterate every active sample of x0, [B, N], to its end; its result is in p.out.

    Args:
        p: the per-sample record; updated, its tally too.
        x0: contiguous; only read.
        form: the step; plain tensors, α a number.
        beta: as the step operators take it.
        history: iterates in the window; 1: Picard.
        ridge: as `anderson_step` takes it.
        restart: likewise.
        tf32: whether products may round their operands to tf32 (CUDA, float32).
        slots: rows that a thread or block iterates at a time; 0: as fits the machine.
        every: as `anderson_step` takes it.
        starts_plain: likewise.
    """
    weight, hidden_weight = form.weight, form.hidden_weight
    if x0.device.type != "cpu":  # whose kernels pack any strides
        weight, hidden_weight = weight.contiguous(), _dense(hidden_weight)
    _interruptible(
        _dense_solve, x0, p.out, p.counters, p.scalars, p.tally, p.bounds, *p.limits.values,
        beta, ridge, restart, history,
        weight, _dense(form.u), CODES[form.activation], float(form.residual),
        _dense(_scale(form, x0)), hidden_weight, _dense(form.hidden_u),
        CODES[form.hidden_activation], _dense(form.hidden_scale), _dense(form.output_scale),
        tf32, slots, every, starts_plain,
    )  # fmt: skip


def _interruptible(operator: Any, *arguments: Any) -> None:
    """Call an operator that runs the handlers of signals; raise what a handler raised."""
    try:
        operator(*arguments)
        return
    except RuntimeError as error:
        if _build.INTERRUPTED not in str(error):
            raise
    raised = _build.take_raised()
    assert raised is not None
    try:
        raise raised  # not in the block above, which would give it a context
    finally:
        del raised  # its traceback holds this frame


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _scale(form: DenseForm, x: Tensor) -> Tensor | None:
    if form.gain is None:
        return form.scale
    return form.gain.expand_as(x) if form.scale is None else form.gain * form.scale


def dense_map(x: Tensor, weight: Tensor, u: Tensor | None) -> Tensor:
    """X Wᵀ + u, [B, N], with `dense_solve`'s order of sums: x [B, K], weight [N, K], u [N]."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    weight = weight if x.device.type == "cpu" else weight.contiguous()
    _interruptible(_dense_map, x.contiguous(), weight, u, out, tf32_wanted(x))
    return out
