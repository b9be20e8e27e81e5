"""The step operators' old place; `rows`, `picard` and `anderson` have them now."""

from __future__ import annotations

import warnings
from typing import Any

from . import anderson, picard, rows

_PLACES = {name: place for place in (rows, picard, anderson) for name in place.__all__}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(_PLACES[name], name)
    place = f"{_PLACES[name].__name__}.{name}"
    warnings.warn(f"{__name__}.{name} is now {place}", DeprecationWarning, stacklevel=2)
    return found
