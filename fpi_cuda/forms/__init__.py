"""What a structured step tells the solver of itself: a map with all else than x put in."""

from __future__ import annotations

from typing import Any

from .._torch import hooked
from .activations import ACTIVATIONS
from .conv import ConvForm
from .dense import DenseForm

__all__ = ["ACTIVATIONS", "ConvForm", "DenseForm", "Form", "form_of"]

Form = DenseForm | ConvForm


def structured(g: Any) -> bool:
    """Whether g is layers that the library knows."""
    return getattr(g, "form_dim", 0) > 0


def form_of(module: Any, method: str, *arguments: Any) -> Form | None:
    """What the module's `method` makes of itself, or None where it does more than that says.

    The class whose forward runs must be the one that has the method, and no hook stand around it.
    """
    kinds = type(module).__mro__
    owner = next((kind for kind in kinds if method in vars(kind)), None)
    if owner is not next((kind for kind in kinds if "forward" in vars(kind)), object):
        return None
    if "forward" in vars(module):  # of this instance alone
        return None
    if hooked(module):
        return None
    form: Form | None = getattr(module, method)(*arguments)
    return form
