"""Steps g(x, z): the paper's two forms, and layers of which the solver knows what they compute."""

from .conv import ConvStep
from .dense import DenseEnergy, DenseStep
from .paper import GradientStep, NeuralStep

__all__ = ["ConvStep", "DenseEnergy", "DenseStep", "GradientStep", "NeuralStep"]
