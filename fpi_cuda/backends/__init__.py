"""Who runs the step operators between two calls of g.

`reference` is plain torch and the oracle of all others; `native` is the compiled operators, which
run on the devices that this build has kernels for.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import native, reference

__all__ = ["NAMES", "available", "choose"]

NAMES = ("auto", "reference", "native", "triton")


def available() -> dict[str, tuple[str, ...]]:
    """The backends of this build, each with the device types it runs on."""
    return {"reference": ("any",), "native": native.devices()}


def choose(name: str, x: Tensor) -> ModuleType:
    """The backend for a state like x.

    Raises:
        RuntimeError: the backend asked for does not run on x's device here.
    """
    if name == "reference":
        return reference
    here = x.device.type in native.devices()
    if name == "native" and not here:
        advice = 'use backend="auto" or "reference"'
        if x.device.type == "cuda":
            advice += (
                ", or rebuild where nvcc and a torch with CUDA are, in the source folder: "
                "FPI_CUDA_BUILD=cuda pip install --no-build-isolation --no-deps --force-reinstall ."
            )
        raise RuntimeError(
            f'backend "native" has no kernels for device {x.device} in this build (it has them for '
            f"{', '.join(native.devices())}); {advice}"
        )
    if name == "triton":
        raise RuntimeError(
            'backend "triton" is not in this version; use backend="auto", "native" or "reference"'
        )
    return native if here else reference
