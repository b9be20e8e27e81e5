"""Who decides that a solve goes on.

The host (eager), the device by itself (graph), or one kernel that knows g (whole).
"""

from __future__ import annotations

import torch

from . import eager, graph, whole

__all__ = ["NAMES", "check", "eager", "graph", "whole"]

NAMES = ("auto", "eager", "graph", "whole")


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
