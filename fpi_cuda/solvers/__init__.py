"""One algorithm a file, as a frozen record of its hyper-parameters (`options.Solver`)."""

from ..options import Solver
from .anderson import Anderson
from .auto import Auto
from .picard import Mixing, Picard

__all__ = ["Anderson", "Auto", "Mixing", "Picard", "Solver"]
