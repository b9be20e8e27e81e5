"""Loops in plain torch, written to be beaten honestly: nothing in them is slow on purpose.

Implicit differentiation as ours; batch norms a sample, finished samples left out where it says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..clock import captured
from ..problems import Rule, Step
from .ours import HISTORY
from .runner import Build, Counting, Solve

COMPACT = (0.8, 0.5)  # `below`, forward and adjoint; 0.6-0.95 differ by 10 %
RIDGE = 1e-6  # relative to the trace, as the library has it for float32


def rows(keep: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.index_select(0, keep) for t in tensors)


class Forward:
    """x ↦ g(x, u, s, *weights), on the rows it holds."""

    floor = None

    def __init__(self, g: Step, u: Tensor, s: Tensor, *weights: Tensor) -> None:
        self.g, self.u, self.s, self.weights = g, u, s, weights

    def __call__(self, x: Tensor) -> Tensor:
        return self.g(x, self.u, self.s, *self.weights)

    def rows(self, keep: Tensor) -> Forward:
        return Forward(self.g, *rows(keep, self.u, self.s), *self.weights)


class Adjoint:
    """c ↦ (∂g/∂x)ᵀ c + v, linearised once at x; anew, on the rows kept, after compaction."""

    def __init__(
        self, g: Step, x: Tensor, v: Tensor, u: Tensor, s: Tensor, *weights: Tensor
    ) -> None:
        self.g, self.v, self.inputs = g, v, (u, s, *weights)
        self.floor = torch.linalg.vector_norm(v, dim=1)
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            self.y = g(self.x, u, s, *weights)

    def __call__(self, c: Tensor) -> Tensor:
        return torch.autograd.grad(self.y, self.x, c, retain_graph=True)[0].add_(self.v)

    def rows(self, keep: Tensor) -> Adjoint:
        u, s, *weights = (t.detach() for t in self.inputs)
        x, v, u, s = rows(keep, self.x.detach(), self.v, u, s)
        return Adjoint(self.g, x, v, u, s, *weights)


def finished(r: Tensor, y: Tensor, rtol: float, offset: float, floor: Tensor | None) -> Tensor:
    size = torch.linalg.vector_norm(y, dim=1)
    if floor is not None:
        size = torch.maximum(size, floor)
    return torch.linalg.vector_norm(r, dim=1) <= offset + rtol * size


class Places:
    """Where the rows that are left of a batch belong."""

    out: Tensor | None = None
    index: Tensor | None = None

    def leave(self, y: Tensor, active: Tensor) -> Tensor:
        """Put y's rows into their places.

        Returns:
            Those of them that go on.
        """
        keep = active.nonzero().squeeze(1)
        if self.out is None or self.index is None:
            self.out, self.index = y, keep  # the finished rows are in their places already
        else:
            self.out[self.index] = y
            self.index = self.index[keep]
        return keep

    def whole(self, y: Tensor) -> Tensor:
        """The batch, y its last rows."""
        if self.out is None or self.index is None:
            return y
        self.out[self.index] = y
        return self.out


def picard(f: Any, x: Tensor, rtol: float, offset: float, limit: int, _: float) -> Tensor:
    """The ten lines that everybody writes."""
    for k in range(limit):
        y = f(x)
        r = y - x if k == 0 else x.sub_(y)  # x is ours to overwrite after the first step
        if finished(r, y, rtol, offset, f.floor).all():
            break
        x = y
    return y


def picard_compacted(
    f: Any,
    x: Tensor,
    rtol: float,
    offset: float,
    limit: int,
    below: float,
    every: int = 1,
) -> Tensor:
    """The same, leaving finished samples out once fewer than `below` of the rows are active.

    The test is made in every `every`-th iteration: its passes over x cost as much as a cheap g.
    """
    places = Places()
    for k in range(limit):
        y = f(x)
        if (k + 1) % every:
            x = y
            continue
        r = y - x if k == 0 else x.sub_(y)
        active = ~finished(r, y, rtol, offset, f.floor)
        left = int(active.sum())
        if left == 0:
            break
        if left <= below * len(active):
            keep = places.leave(y, active)
            (y,), f = rows(keep, y), f.rows(keep)
        x = y
    return places.whole(y)


def anderson(f: Any, x: Tensor, rtol: float, offset: float, limit: int, below: float) -> Tensor:
    """Anderson (type II) per sample: differences in a ring, one Gram row a step, Cholesky.

    With `below` > 0 finished samples are left out as above.
    """
    places, last_y, last_r = Places(), None, None
    m = HISTORY - 1
    dy, dr = (x.new_empty(len(x), m, x.shape[1]) for _ in range(2))
    gram, eye = x.new_empty(len(x), m, m), torch.eye(m, dtype=x.dtype, device=x.device)
    for k in range(limit):
        y = f(x)
        r = y - x
        active = ~finished(r, y, rtol, offset, f.floor)
        left = int(active.sum())
        if left == 0:
            break
        if k > 0:
            j, n = (k - 1) % m, min(k, m)
            torch.sub(y, last_y, out=dy[:, j])
            torch.sub(r, last_r, out=dr[:, j])
            row = torch.bmm(dr[:, :n], dr[:, j, :, None]).squeeze(2)
            gram[:, j, :n], gram[:, :n, j] = row, row
        if 0 < left <= below * len(active):
            keep = places.leave(y, active)
            (y, r, dy, dr, gram), f = rows(keep, y, r, dy, dr, gram), f.rows(keep)
        x, last_y, last_r = y, y, r
        if k > 0:
            system = gram[:, :n, :n]
            ridge = RIDGE * system.diagonal(dim1=1, dim2=2).sum(1)
            factor, _ = torch.linalg.cholesky_ex(system + ridge[:, None, None] * eye[:n, :n])
            gamma = torch.cholesky_solve(torch.bmm(dr[:, :n], r[:, :, None]), factor)
            gamma = gamma.nan_to_num_(0, 0, 0)
            x = torch.baddbmm(y[:, None], gamma.mT, dy[:, :n], alpha=-1).squeeze(1)
    return places.whole(y)


seldom = functools.partial(picard_compacted, every=3)


def picard_compiled(
    f: Any, x: Tensor, rtol: float, offset: float, limit: int, below: float
) -> Tensor:
    """The compacted loop with g and the test compiled into one; forward only."""
    if isinstance(f, Adjoint):
        return seldom(f, x, rtol, offset, limit, below)
    # A g that counts its calls runs as it is: the algorithm is the same.
    step = tested_step if isinstance(f.g, Counting) else compiled_step(f.g)
    places = Places()
    for _ in range(limit):
        y, active, left = step(f.g, rtol, offset, x, f.u, f.s, *f.weights)
        left = int(left)
        if left == 0:
            break
        if left <= below * len(active):
            keep = places.leave(y, active)
            (y,), f = rows(keep, y), f.rows(keep)
        x = y
    return places.whole(y)


def picard_graphed(f: Any, x: Tensor, rtol: float, offset: float, limit: int, _: float) -> Tensor:
    """The loop without compaction, g and the test compiled into one CUDA graph; forward only."""
    if isinstance(f, Adjoint):
        return picard(f, x, rtol, offset, limit, 0.0)
    step = tested_step if isinstance(f.g, Counting) else compiled_step(f.g, graph=True)
    for _k in range(limit):
        torch.compiler.cudagraph_mark_step_begin()
        y, _active, left = step(f.g, rtol, offset, x, f.u, f.s, *f.weights)
        x = y.clone()  # the graph writes over its value
        if not int(left):
            break
    return x


def tested_step(
    g: Step, rtol: float, offset: float, x: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    y = g(x, *rest)
    active = ~finished(y - x, y, rtol, offset, None)
    return y, active, active.sum()


@functools.cache
def compiled_step(g: Step, graph: bool = False) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """One a map: a graph of one must not be looked up among those of others."""

    def step(g: Step, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return tested_step(g, *rest)

    if graph:  # one a size too: symbolic sizes would be slower
        return torch.compile(step, mode="reduce-overhead", dynamic=False)
    return torch.compile(step, dynamic=True)


AT_ONCE = 4  # iterations in a graph that is captured by hand


def picard_captured(f: Any, x: Tensor, rtol: float, offset: float, limit: int, _: float) -> Tensor:
    """The loop without compaction as a CUDA graph of several iterations; forward only.

    The last of them is tested, so that the host waits once a launch.
    """
    if isinstance(f, Adjoint):
        return picard(f, x, rtol, offset, limit, 0.0)
    rest = (f.u, f.s, *f.weights)
    if isinstance(f.g, Counting):
        block = Block(f.g, rtol, offset, x, *rest)
        launch: Callable[[], Any] = block
    else:
        block, launch = captured_block(f.g, rtol, offset, x, *rest)
        block.take(x, *rest)
    for _k in range(0, limit, AT_ONCE):
        launch()
        if not int(block.left):
            break
    return block.x.clone()


class Block:
    """Some iterations on tensors of its own."""

    def __init__(self, g: Step, rtol: float, offset: float, x: Tensor, *rest: Tensor) -> None:
        self.g, self.rtol, self.offset = g, rtol, offset
        self.x, *self.rest = (t.clone() for t in (x, *rest))
        self.left = torch.ones((), dtype=torch.int64, device=x.device)

    def take(self, *given: Tensor) -> None:
        torch._foreach_copy_([self.x, *self.rest], list(given))

    def __call__(self) -> None:
        x = self.x
        for _ in range(AT_ONCE - 1):
            x = self.g(x, *self.rest)
        y, _, left = tested_step(self.g, self.rtol, self.offset, x, *self.rest)
        self.x.copy_(y)
        self.left.copy_(left)


blocks: dict[Any, tuple[Block, Callable[[], Any]]] = {}


def captured_block(
    g: Step, rtol: float, offset: float, *given: Tensor
) -> tuple[Block, Callable[[], Any]]:
    key = (g, rtol, offset, *((t.shape, t.dtype) for t in given))
    if key not in blocks:
        block = Block(g, rtol, offset, *given)
        blocks[key] = block, captured(block, str(given[0].device))
    return blocks[key]


def forget() -> None:
    """Let go of what was compiled or captured: for other sizes, or under other switches."""
    torch.compiler.reset()
    compiled_step.cache_clear()
    blocks.clear()


class PlainLayer(torch.autograd.Function):
    """Implicit differentiation in plain torch: one linearisation, its VJP iterated by the loop."""

    @staticmethod
    def forward(
        ctx: Any,
        loop: Callable[..., Tensor],
        below: tuple[float, float],
        rule: Rule,
        g: Step,
        x0: Tensor,
        u: Tensor,
        s: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        offset = rule.atol * math.sqrt(x0.shape[1])
        x = loop(Forward(g, u, s, *weights), x0, rule.rtol, offset, rule.max_iterations, below[0])
        ctx.rest = loop, below[1], rule, g
        ctx.save_for_backward(x, u, s, *weights)
        return x

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        loop, below, rule, g = ctx.rest
        x, u, s, *weights = ctx.saved_tensors
        leaves = [t.detach().requires_grad_() for t in (u, *weights)]
        f = Adjoint(g, x, v, leaves[0], s, *leaves[1:])
        c = loop(f, v, rule.adjoint_rtol, 0.0, rule.max_iterations, below)
        du, *dweights = torch.autograd.grad(f.y, leaves, c)
        return None, None, None, None, None, du, None, *dweights


def plain(loop: Callable[..., Tensor], below: tuple[float, float] = (0.0, 0.0)) -> Build:
    """below: active/rows under which a loop compacts, forward and adjoint."""

    def build(rule: Rule) -> Solve:
        def solve(g: Step, *tensors: Tensor) -> Tensor:
            return PlainLayer.apply(loop, below, rule, g, *tensors)

        return solve

    return build
