"""Who runs the step operators between two calls of g.

`reference` is plain torch and the oracle of all others; `native` is the compiled operators, which
run on the devices that this build has kernels for; `triton` needs a GPU and no compiler.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ..options import BACKENDS as NAMES
from . import native, reference, triton

__all__ = ["NAMES", "available", "choose", "operator"]


def available() -> dict[str, tuple[str, ...]]:
    """The backends of this build, each with the device types it runs on."""
    return {"reference": ("any",), "native": native.devices(), "triton": triton.devices()}


def choose(name: str, x: Tensor) -> ModuleType:
    """The backend for a state like x.

    `auto` is the fastest that runs there: native, on CUDA else triton, else reference.

    Raises:
        RuntimeError: the backend asked for does not run on x's device here.
    """
    if name == "reference":
        return reference
    device = x.device.type
    lacking = native.missing(x.device)
    if name == "native" and lacking is not None:
        advice = 'use backend="auto" or "reference"'
        if device == "cuda":
            advice += (
                ", or rebuild where nvcc and a torch with CUDA are, in the source folder: "
                "FPI_CUDA_BUILD=cuda pip install --no-build-isolation --no-deps --force-reinstall ."
            )
        raise RuntimeError(f'backend "native" can\'t be used: {lacking}; {advice}')
    if name == "triton":
        reason = triton.missing(device)
        if reason is not None:
            raise RuntimeError(
                f'backend "triton" does not run on device {x.device} here: {reason}; '
                'use backend="auto", "native" or "reference"'
            )
        return triton
    if lacking is None:
        return native
    return triton if device == "cuda" and triton.missing(device) is None else reference


def operator(backend: Any, name: str, x: Tensor) -> Any:
    """A step operator that not every backend has, for a state like x.

    The backend's own; else the native one where this build has it there, else the reference's.
    """
    if hasattr(backend, name):
        return getattr(backend, name)
    native_too = native.missing(x.device) is None and native.has(x.device.type, name)
    return getattr(native if native_too else reference, name)
