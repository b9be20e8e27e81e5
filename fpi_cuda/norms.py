"""Norms of rows whatever their scale: no square over- or underflows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["row_norms"]

# Between these a float64 norm is right as it is: what underflowed is far below its last bit.
_LEAST, _MOST = 2.0**-450, 2.0**450
_EXPONENT = 0x7FF0000000000000  # the bits of a float64 that hold it


def row_norms(rows: Tensor, look: bool = True) -> Tensor:
    """[B] in float64: the norm of each row, [B, N] of any floating dtype; no wait for a device.

    Rows times a power of two have, to the bit, their norms times that where nothing is subnormal.

    Args:
        rows: what to measure.
        look: whether the host may look at values, where that costs less than to scale them: not
            under torch.vmap, nor while a graph is captured.
    """
    wide = torch.float64
    safe = rows.dtype != wide or not rows.numel()
    if safe or (look and rows.device.type == "cpu"):
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=wide)
        if safe or torch.equal(norms.clamp(_LEAST, _MOST), norms):
            return norms
    largest: Tensor = torch.linalg.vector_norm(rows.detach(), float("inf"), dim=1)
    power = (largest.view(torch.int64) & _EXPONENT).view(wide)  # of two; 0 where it is subnormal
    power = power.clamp(torch.finfo(wide).tiny, 2.0**1023)  # NaN and Inf are left to the rows
    return torch.linalg.vector_norm(rows / power[:, None], dim=1) * power  # type: ignore[no-any-return]
