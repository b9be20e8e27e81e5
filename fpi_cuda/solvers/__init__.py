"""One algorithm a file; the loop that runs them stands once, in `iterate`."""

from .anderson import Anderson
from .picard import Picard

Solver = Picard | Anderson

__all__ = ["Anderson", "Picard", "Solver"]
