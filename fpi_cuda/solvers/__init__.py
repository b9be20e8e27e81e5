"""One algorithm a file, as a frozen record of its hyper-parameters (`options.Solver`)."""

from ..options import Solver
from .anderson import Anderson
from .bicgstab import BiCGSTAB
from .picard import Mixing, Picard

__all__ = ["Anderson", "BiCGSTAB", "Mixing", "Picard", "Solver"]
