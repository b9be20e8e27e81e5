"""How a state of any shape lies in the [rows, N] matrix that the step operators work on."""

from __future__ import annotations

import torch
from torch import Tensor


def take(t: Tensor, positions: Tensor) -> Tensor:
    """The samples of t, [B, ...], at these positions, in t's own order of dimensions."""
    layout = Layout(t)
    if layout.plain:
        return t.index_select(0, positions)
    return layout.state(layout.rows(t).index_select(0, positions), positions.shape)


def joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """Tensors of one dtype as one, along dim: torch.cat refuses the half type not autocast's."""
    device = tensors[0].device.type
    if tensors[0].is_meta or not torch.is_autocast_enabled(device):
        return torch.cat(tensors, dim)
    with torch.autocast(device, enabled=False):
        return torch.cat(tensors, dim)


class Layout:
    """A per-sample order of dimensions, taken from a dense tensor's strides.

    A channels-last state stays channels-last through the solve: its rows are a view, never a copy.

    Args:
        like: a tensor of the state's shape, [*batch, *sample].
        batch_dims: how many leading dimensions count samples.
    """

    def __init__(self, like: Tensor, batch_dims: int = 1) -> None:
        self.sample = tuple(like.shape[batch_dims:])
        self.n = like.shape[batch_dims:].numel()
        self.plain = True
        self.order = order = list(range(len(self.sample)))
        if not like.is_contiguous():
            by_stride = sorted(order, key=lambda d: -like.stride(batch_dims + d))
            batch = range(batch_dims)
            if like.permute(*batch, *(batch_dims + d for d in by_stride)).is_contiguous():
                self.order, self.plain = by_stride, by_stride == order

    def rows(self, t: Tensor) -> Tensor:
        """t, [*batch, *sample], as a contiguous [R, N]: a view where t has this layout."""
        if t.dim() == 2 and t.shape[1] == self.n:
            return t.contiguous()
        lead = t.dim() - len(self.sample)
        if not self.plain:
            t = t.permute(*range(lead), *(lead + d for d in self.order))
        return t.contiguous().view(t.shape[:lead].numel(), self.n)

    def state(self, rows: Tensor, batch: torch.Size | tuple[int, ...]) -> Tensor:
        """A view of rows, [R, N], shaped [*batch, *sample]."""
        if self.plain:
            return rows.view(*batch, *self.sample)
        lead = len(batch)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        t = rows.view(*batch, *(self.sample[d] for d in self.order))
        return t.permute(*range(lead), *(lead + d for d in back))
