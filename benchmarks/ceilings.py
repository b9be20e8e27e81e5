"""What the machine itself can do at this moment."""

from __future__ import annotations

from typing import Any

import torch

from .clock import Times, interleave


def copy(device: str, nbytes: int, budget: float = 0.3) -> tuple[float, Times]:
    """Bytes/s, read and written, of a copy whose source and target take nbytes together."""
    source = torch.randn(nbytes // 8, device=device)
    target = torch.empty_like(source)
    repeats = max(1, (64 << 20) // nbytes)

    def call(_: int) -> None:
        for _ in range(repeats):
            target.copy_(source)

    times = interleave({"copy": call}, device=device, rounds=(5, 21), budget=budget)["copy"]
    seconds = times.over(repeats)
    return 2 * source.nbytes / seconds.median, seconds


def product(
    device: str, dtype: torch.dtype, budget: float = 2.0, *, tiny: bool = False
) -> tuple[float, Times]:
    """FLOP/s of a product of large square matrices."""
    side = 64 if tiny else 8192 if device.startswith("cuda") else 2048
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    a, b = torch.randn(2, side, side, **kind)
    out = torch.empty_like(a)
    calls = {"mm": lambda _: torch.mm(a, b, out=out)}
    seconds = interleave(calls, device=device, rounds=(5, 21), budget=budget)["mm"]
    return 2 * side**3 / seconds.median, seconds
