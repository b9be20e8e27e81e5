"""Who decides that a solve goes on.

The host (eager), the device by itself (graph), or one kernel that knows g (whole). Each says of a
solve whether it takes it; `ORDER` is in which order they are asked, by the name the user gave.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..options import DRIVERS as NAMES
from . import eager, graph, none, whole
from .support import Driver, Solved, Support

__all__ = ["NAMES", "ORDER", "Driver", "Solved", "Support", "check", "eager", "graph", "none"]
__all__ += ["whole"]

ORDER: dict[str, Sequence[Driver]] = {
    "auto": (whole, eager),
    "eager": (eager,),
    "graph": (graph, eager),
    "whole": (whole, eager),
}


def check(name: str, device: torch.device) -> None:
    """Raise unless this driver exists for the device.

    Raises:
        ValueError: "graph" for a device that has no graphs.
    """
    if name == "graph" and device.type not in graph.RECORDERS:
        raise ValueError(
            f'fixed_point: driver "graph" needs a CUDA device (x0 is on {device}); use '
            'driver="auto", which is eager there'
        )
