"""Modules that moved: their old import paths work for one release, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "fpi_cuda.backends.progress": "fpi_cuda.record",
    "fpi_cuda.conv": "fpi_cuda.steps.conv",
    "fpi_cuda.dense": "fpi_cuda.steps.dense",
    "fpi_cuda.evaluation": "fpi_cuda.solve.evaluation",
    "fpi_cuda.solvers.iterate": "fpi_cuda.drivers.eager",
    "fpi_cuda.solvers.layout": "fpi_cuda.layout",
}


class _Finder:
    """Asked last, for names that nothing else finds. A pickle of a moved class is read so, too."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Finder) if name in MOVED else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType | None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} is {new} now; the old name will go", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


sys.meta_path.append(_Finder)
