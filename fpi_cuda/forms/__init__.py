"""What a structured step tells the solver of itself: a map with all else than x put in."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .._torch import any_global_hook, hooked
from .activations import ACTIVATIONS
from .conv import ConvForm
from .dense import DenseForm

__all__ = ["ACTIVATIONS", "ConvForm", "DenseForm", "Form", "form_of", "structured"]

Form = DenseForm | ConvForm


def form_of(module: Any, method: str, *arguments: Any) -> Form | None:
    """What the module's `method` makes of itself, or None where it does more than that says."""
    if not _no_more_than(module, method):
        return None
    form: Form | None = getattr(module, method)(*arguments)
    return form


def structured(g: Any) -> bool:
    """Whether g is a step that `form_of` takes: its parts are looked at, no form is made."""
    method = "form"
    while _no_more_than(g, method):
        inner = getattr(type(g), "_form_of_part", None)
        if inner is None:
            return True
        name, method = inner
        g = getattr(g, name)
    return False


def _no_more_than(module: Any, method: str) -> bool:
    """Whether calling the module is what its `method` says.

    The class whose forward runs must be the one that has the method, and nothing stand around it.
    """
    kind: Any = type(module)
    return (
        hasattr(kind, method)
        and kind.__call__ is nn.Module.__call__  # of now: torch.export puts another there
        and _says_it(kind, method)
        and "forward" not in vars(module)  # of this instance alone
        and not hooked(module)
        and not any_global_hook()
    )


@functools.lru_cache(maxsize=256)
def _says_it(kind: Any, method: str) -> bool:
    owner = {
        next((k for k in kind.__mro__ if name in vars(k)), None) for name in (method, "forward")
    }
    return issubclass(kind, nn.Module) and len(owner) == 1
