"""Loads the native libraries and tells how they were built."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fpi_cuda._torch import TRANSFORMS_KEY, with_cpu_kernel
from fpi_cuda._version import __version__

try:
    import fpi_cuda._C as _C  # noqa: PLR0402 (`from` would hide the reason of a failure)
except ImportError as error:
    raise ImportError(
        f"fpi_cuda's native library could not be loaded: {error}. If it was never built, or not "
        f"for this Python and torch {torch.__version__} (2.11 or newer is needed), build it with "
        "`pip install --no-build-isolation .` in the source folder."
    ) from error


def _load_cuda() -> tuple[Any, str | None]:
    """Load the CUDA operators.

    Returns:
        The library or None, and why it is not there.
    """
    built: dict[str, Any] = _C.build_info()
    if not built["cuda_built"]:
        return None, str(built["cuda_not_built_because"])
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} has no CUDA"
    try:
        return importlib.import_module("fpi_cuda._cuda"), None
    except ImportError as error:
        return None, f"fpi_cuda._cuda could not be loaded: {error}"


def _refuse_transforms() -> torch.library.Library:
    """Make every operator raise when a torch.func transform meets it.

    Without this, grad and jvp of an operator that has no rule are zero, silently. A call from the
    forward of an autograd.Function is below the transforms and so not affected.
    """
    library = torch.library.Library("fpi_cuda", "IMPL")
    for operator in with_cpu_kernel("fpi_cuda"):

        def refuse(*_: object, operator: str = operator) -> None:
            raise RuntimeError(
                f"{operator}: internal operator, not differentiable and without rule for "
                "torch.func; call fpi_cuda.fixed_point"
            )

        library.impl(operator, refuse, TRANSFORMS_KEY)
    return library


cuda, _cuda_missing = _load_cuda()
take_raised, INTERRUPTED = _C.take_raised, _C.INTERRUPTED  # of calls that a signal ended
_library = _refuse_transforms()  # an operator's registration ends with its library object


def build_info() -> dict[str, Any]:
    """Say how the native code was built and what of it runs here.

    Returns:
        A dict: `version`; `torch_built` and `torch_running`; `compiler`, `cxx_flags`, `build_type`;
        `cpu_capability` (in use), `cpu_capabilities_built` and `cpu_capabilities_available`;
        `cuda_built`, `cuda_loaded`, `cuda_missing` (the reason, or None), `cuda_archs` and `nvcc`;
        `libraries`, the paths of those that define operators, for torch.ops.load_library.

    Example:
        >>> info = build_info()
        >>> info["cpu_capability"] in info["cpu_capabilities_built"]
        True
    """
    built: dict[str, Any] = _C.build_info()
    del built["cuda_not_built_because"]
    return {
        "version": __version__,
        "torch_running": torch.__version__,
        **built,
        "cuda_loaded": _cuda_missing is None,
        "cuda_missing": _cuda_missing,
        "libraries": [file for m in (_C, cuda) if (file := getattr(m, "__file__", None))],
    }
