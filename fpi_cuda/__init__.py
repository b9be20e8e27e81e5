"""Differentiable fixed-point-iteration layers: x̂ = g(x̂, z; θ), with derivatives of every order."""

from . import _moved, backends, compat, contraction, operators
from ._build import build_info
from ._version import __version__
from .adjoint import ImplicitAdjoint, Neumann, OneStep, Phantom, Truncated, Unrolled
from .fixed_point import fixed_point
from .layer import FixedPointLayer
from .solution import (
    FixedPointError,
    FixedPointWarning,
    Solution,
    Status,
    Tolerance,
)
from .solvers import Anderson, Auto, BiCGSTAB, Picard
from .steps import ConvStep, DenseEnergy, DenseStep, GradientStep, NeuralStep

__all__ = [
    "Anderson",
    "Auto",
    "BiCGSTAB",
    "ConvStep",
    "DenseEnergy",
    "DenseStep",
    "FixedPointError",
    "FixedPointLayer",
    "FixedPointWarning",
    "GradientStep",
    "ImplicitAdjoint",
    "Neumann",
    "NeuralStep",
    "OneStep",
    "Phantom",
    "Picard",
    "Solution",
    "Status",
    "Tolerance",
    "Truncated",
    "Unrolled",
    "__version__",
    "backends",
    "build_info",
    "compat",
    "contraction",
    "fixed_point",
    "operators",
]

_moved.hand_on()
