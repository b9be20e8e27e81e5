"""How a fixed point is differentiated: exactly, or for less.

`implicit`: by the autograd node, whose linear solves take as much as they are told. `unrolled`: by
steps of g that plain autograd follows.
"""

from .implicit import ImplicitAdjoint, Neumann, OneStep, Truncated
from .unrolled import Phantom, Unrolled

__all__ = ["ImplicitAdjoint", "Neumann", "OneStep", "Phantom", "Truncated", "Unrolled"]
