"""Flow as a picture, by Middlebury's wheel of colours (Baker et al., IJCV 2011)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .files import known

# From each colour to the next around the wheel, and in how many steps; 55 in all.
RED, YELLOW, GREEN, CYAN, BLUE, MAGENTA = (
    (1.0, 0.0, 0.0),
    (1.0, 1.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, 1.0, 1.0),
    (0.0, 0.0, 1.0),
    (1.0, 0.0, 1.0),
)
ARCS = (
    (RED, YELLOW, 15),
    (YELLOW, GREEN, 6),
    (GREEN, CYAN, 4),
    (CYAN, BLUE, 11),
    (BLUE, MAGENTA, 13),
    (MAGENTA, RED, 6),
)


def wheel() -> Tensor:
    """The 55 colours [55, 3], of 0 to 1."""
    arcs = []
    for start, end, steps in ARCS:
        way = torch.arange(steps, dtype=torch.float64)[:, None] / steps
        arcs.append(torch.lerp(torch.tensor(start).double(), torch.tensor(end).double(), way))
    return torch.cat(arcs)


def colours(flow: Tensor, largest: float | None = None) -> Tensor:
    """A flow [2, H, W] as a picture [H, W, 3], uint8.

    The hue is the direction (right: red, down: yellow, left: light blue, up: violet), the
    saturation the length over `largest`: no motion is white, what is longer than `largest` is
    darker, and unknown flow is black.

    Args:
        flow: in pixels, as files.read_flo returns it.
        largest: the length with the full colour; the longest known one where None.

    Raises:
        ValueError: another shape, or `largest` is not above 0.
    """
    if flow.dim() != 3 or len(flow) != 2:
        raise ValueError(f"colours: a flow must be [2, H, W] (got {list(flow.shape)})")
    if largest is not None and not largest > 0:
        raise ValueError(f"colours: largest must be above 0 (got {largest})")
    there = known(flow)
    u, v = torch.where(there, flow, 0).double().cpu()
    length = torch.hypot(u, v)
    if largest is None:
        largest = float(length.max()) or 1.0
    length = (length / largest)[..., None]
    table = wheel()
    place = (torch.atan2(-v, -u) / math.pi + 1) / 2 * (len(table) - 1)
    step = place.floor().long()
    hue = torch.lerp(table[step], table[(step + 1) % len(table)], (place - step)[..., None])
    shown = torch.where(length <= 1, 1 - length * (1 - hue), 0.75 * hue)
    return (255 * shown * there.cpu()[..., None]).floor().to(torch.uint8)
