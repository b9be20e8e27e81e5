"""One algorithm a file, as a frozen record of its hyper-parameters (`options.Solver`)."""

from typing import Any

from ..options import Solver
from .anderson import Anderson
from .auto import Auto
from .bicgstab import BiCGSTAB
from .picard import Mixing, Picard

__all__ = ["Anderson", "Auto", "BiCGSTAB", "Mixing", "Picard", "Solver", "named"]


def named(solver: Any) -> Any:
    """The solver itself, or the one of that name: "auto" is `Auto()`."""
    return Auto() if isinstance(solver, str) and solver == "auto" else solver
