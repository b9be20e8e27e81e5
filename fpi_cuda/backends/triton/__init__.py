"""The step operators in Triton: a GPU without nvcc is enough.

Same signatures and meaning as in `reference`. Kernels and triton itself are imported when an
operator is first asked for. Under TRITON_INTERPRET=1 triton's interpreter runs them on the CPU:
for tests, since it is slow.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

NAME = "triton"
NOT_INSTALLED = "triton is not installed (pip install triton)"

_OPERATORS = {"picard_step": "picard", "anderson_step": "anderson"}


def interpreted() -> bool:
    """Whether the environment asks for triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes", "y")


def missing(device_type: str) -> str | None:
    """Why the operators don't run on this type of device here, or None."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # a folder of that name is no triton
        return NOT_INSTALLED
    if device_type == "cpu":
        return None if interpreted() else "triton has kernels for CUDA only"
    if device_type != "cuda":
        return f"these kernels are not for {device_type}"
    if interpreted():
        return "TRITON_INTERPRET is set, so triton runs on the CPU"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def devices() -> tuple[str, ...]:
    """Device types that the operators run on here."""
    return tuple(device for device in ("cpu", "cuda") if missing(device) is None)


def __getattr__(name: str) -> Any:
    if name not in _OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = importlib.import_module(f"{__name__}.{_OPERATORS[name]}")
    return globals().setdefault(name, getattr(room, name))
