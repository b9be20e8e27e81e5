"""Modules that moved: their old import paths work for one release, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
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
        frame = sys._getframe()  # up to the line that asks, past the machinery of imports
        while frame.f_back and _passes_on(frame):
            frame = frame.f_back
        warnings.warn_explicit(
            f"{old} is {new} now; the old name will go",
            DeprecationWarning,
            frame.f_code.co_filename,
            frame.f_lineno,
            module=frame.f_globals.get("__name__"),
            registry=frame.f_globals.setdefault("__warningregistry__", {}),
        )
        sys.modules[old] = importlib.import_module(new)


def _passes_on(frame: FrameType) -> bool:
    return frame.f_code.co_filename == __file__ or "importlib" in frame.f_code.co_filename


def hand_on() -> None:
    """Let moved modules be found by old paths, and as members of packages by old names."""
    sys.meta_path.append(_Finder)
    for package in {old.rpartition(".")[0] for old in MOVED}:

        def member(name: str, package: str = package) -> Any:
            if (path := f"{package}.{name}") in MOVED:
                return importlib.import_module(path)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")

        sys.modules[package].__getattr__ = member  # type: ignore[method-assign]
