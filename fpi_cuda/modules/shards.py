"""Modules whose parameters `torch.distributed.fsdp.fully_shard` spreads over processes.

FSDP gathers a module's parameters around each of its calls. In a solve each process stops by its
own samples, after another number of calls, and would wait for the others for ever. So here the
parameters are gathered once a solve, in front of its node, and FSDP's hooks are left out of the
clones; the gradients go back once, averaged over the processes, as FSDP does it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from .. import _torch

__all__ = ["sharded", "shards", "whole"]


def sharded(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of which fully_shard was called; their clones have none of its hooks."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import
    if fsdp is None:
        return []
    found = [m for m in modules if isinstance(m, fsdp.FSDPModule)]
    return [m for m in found if any(map(_torch.of_fsdp, _torch.pre_hooks(m).values()))]


def shards(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the parameters of such modules, of which each process holds a part."""
    return {id(p) for m in modules for p in m.parameters() if hasattr(p, "full_tensor")}


def whole(shard: Any) -> Tensor:
    """A parameter gathered from all processes."""
    return _Whole.apply(shard)  # type: ignore[no-any-return,no-untyped-call]


class _Whole(Function):
    """A sharded tensor as a plain one; each process goes on with its own samples."""

    @staticmethod
    def forward(shard: Any) -> Tensor:
        return shard.detach().to(shard.device_mesh.device_type).full_tensor()  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        (shard,) = inputs
        ctx.place = shard.device, shard.device_mesh, shard.placements

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return _Mean.apply(v, *ctx.place)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: Any, shard: Any) -> tuple[Tensor, None]:
        return whole(shard), None  # parameters are the module's own: nobody maps them


class _Mean(Function):
    """The mean of each process's plain tensor, sharded."""

    @staticmethod
    def forward(v: Tensor, device: Any, mesh: Any, placements: Any) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        total = DTensor.from_local(v.detach(), mesh, [Partial()] * mesh.ndim, run_check=False)
        return (total.redistribute(placements=placements) / mesh.size()).to(device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, u: Any) -> Any:
        return whole(u), None, None, None
