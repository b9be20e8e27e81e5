"""The rivals: this library, loops in plain torch, torchdeq. All see the same opaque g.

A method is called as solve(g, x0, u, s, W) and returns x̂, attached to autograd where gradients are
on. The plain loops are written to be beaten honestly: nothing in them is slow on purpose.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fpi_cuda

from . import problems
from .problems import Rule

Step = Callable[..., Tensor]
Solve = Callable[..., Tensor]  # solve(g, x0, u, s, W) -> x̂

HISTORY = 5  # Anderson's window, ours and the plain loop's
COMPACT = (0.8, 0.5)  # the plain loops' `below`, forward and adjoint; 0.6-0.95 differ by 10 %
RIDGE = 1e-6  # relative to the trace, as the library has it for float32


@dataclass(frozen=True)
class Method:
    name: str
    family: str  # "ours", "plain" or the peer's name
    build: Callable[[Rule], Solve]
    missing: str | None = None  # why it can't run here
    slow: bool = False  # the quick suite leaves it out


# --- this library ----------------------------------------------------------------------------


def options_for(solver: Any, rule: Rule) -> dict[str, Any]:
    return dict(
        solver=solver,
        tolerance=fpi_cuda.Tolerance(rule.rtol, rule.atol),
        adjoint=fpi_cuda.ImplicitAdjoint(tolerance=fpi_cuda.Tolerance(rule.adjoint_rtol)),
        max_iterations=rule.max_iterations,
        on_failure="return",  # the harness judges by the true residual
    )


def ours(solver: Any, **more: Any) -> Callable[[Rule], Solve]:
    def build(rule: Rule) -> Solve:
        options = options_for(solver, rule) | more

        def solve(g: Step, x0: Tensor, u: Tensor, s: Tensor, weight: Tensor) -> Tensor:
            return fpi_cuda.fixed_point(g, x0, u, s, params=(weight,), **options).x

        return solve

    return build


class Whole:
    """The same problem told to the library as a step of dense layers, so that it is solved whole.

    As solve(g, ...), but g is not called: the module stands for it.
    """

    def __init__(self, solver: Any, rule: Rule) -> None:
        self.options = options_for(solver, rule)
        self.steps: dict[torch.Size, Any] = {}
        self.last: fpi_cuda.Solution | None = None

    def __call__(self, g: Step, x0: Tensor, u: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        if weight.shape not in self.steps:
            self.steps[weight.shape] = structured(*weight.shape).to(weight.device)
        step = self.steps[weight.shape]
        owner = getattr(step, "energy", step)
        owner._parameters["state_weight"] = weight  # this very tensor, which may need a gradient
        gain = (s,) if bool((s != 1).any()) else ()
        self.last = fpi_cuda.fixed_point(step, x0, u, *gain, **self.options)
        if not self.last.path.startswith("native, whole"):
            raise RuntimeError(f"a whole solve was to be measured (got {self.last.path})")
        return self.last.x


def structured(rows: int, columns: int) -> torch.nn.Module:
    """`problems.g` as a module, for a weight of this shape."""
    if rows == columns:
        return fpi_cuda.DenseStep(columns, None, bias=False)
    energy = fpi_cuda.DenseEnergy(columns, None, rows, bias=False, curvature=problems.CURVATURE)
    return fpi_cuda.GradientStep(energy, problems.STEP_SIZE)


class Convolutions:
    """The denoising net told to the library as a `ConvStep`; as `Whole`."""

    def __init__(self, solver: Any, rule: Rule) -> None:
        self.options = options_for(solver, rule)
        self.step = fpi_cuda.ConvStep(problems.CHANNELS, 1, hidden=(problems.WIDTH,))
        self.last: fpi_cuda.Solution | None = None

    def __call__(self, g: Step, x0: Tensor, z: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        first, bias, second, last = problems.layers(weight)
        of_x, of_z = first.split([problems.CHANNELS, 1], 1)
        # These very tensors, which may need gradients.
        self.step._parameters["input_weight"] = of_z
        for layer, w, b in zip(self.step.layers, (of_x, second), (bias, last), strict=True):
            layer._parameters.update(weight=w, bias=b)
        side = math.isqrt(z.shape[1])
        x0, z = problems.image(x0, side), problems.image(z, side)
        self.last = fpi_cuda.fixed_point(self.step, x0, z, **self.options)
        return problems.flat(self.last.x)


# --- plain torch -----------------------------------------------------------------------------


def rows(keep: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.index_select(0, keep) for t in tensors)


class Forward:
    """x ↦ g(x, u, s, W), on the rows it holds."""

    floor = None

    def __init__(self, g: Step, u: Tensor, s: Tensor, weight: Tensor) -> None:
        self.g, self.u, self.s, self.weight = g, u, s, weight

    def __call__(self, x: Tensor) -> Tensor:
        return self.g(x, self.u, self.s, self.weight)

    def rows(self, keep: Tensor) -> Forward:
        return Forward(self.g, *rows(keep, self.u, self.s), self.weight)


class Adjoint:
    """c ↦ (∂g/∂x)ᵀ c + v, linearised once at x; anew, on the rows kept, after compaction."""

    def __init__(self, g: Step, x: Tensor, v: Tensor, u: Tensor, s: Tensor, weight: Tensor) -> None:
        self.g, self.v, self.inputs = g, v, (u, s, weight)
        self.floor = torch.linalg.vector_norm(v, dim=1)
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            self.y = g(self.x, u, s, weight)

    def __call__(self, c: Tensor) -> Tensor:
        return torch.autograd.grad(self.y, self.x, c, retain_graph=True)[0].add_(self.v)

    def rows(self, keep: Tensor) -> Adjoint:
        u, s, weight = (t.detach() for t in self.inputs)
        x, v, u, s = rows(keep, self.x.detach(), self.v, u, s)
        return Adjoint(self.g, x, v, u, s, weight)


def finished(r: Tensor, y: Tensor, rtol: float, offset: float, floor: Tensor | None) -> Tensor:
    size = torch.linalg.vector_norm(y, dim=1)
    if floor is not None:
        size = torch.maximum(size, floor)
    return torch.linalg.vector_norm(r, dim=1) <= offset + rtol * size


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
    out, index = None, None
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
            keep = active.nonzero().squeeze(1)
            if out is None:
                out, index = y, keep  # the finished rows are in their places already
            else:
                out[index] = y
                index = index[keep]
            (y,), f = rows(keep, y), f.rows(keep)
        x = y
    if out is None:
        return y
    out[index] = y
    return out


def anderson(f: Any, x: Tensor, rtol: float, offset: float, limit: int, below: float) -> Tensor:
    """Anderson (type II) per sample: differences in a ring, one Gram row a step, Cholesky.

    With `below` > 0 finished samples are left out as above.
    """
    out = index = last_y = last_r = None
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
            keep = active.nonzero().squeeze(1)
            if out is None:
                out, index = y.clone(), keep
            else:
                out[index] = y
                index = index[keep]
            (y, r, dy, dr, gram), f = rows(keep, y, r, dy, dr, gram), f.rows(keep)
        x, last_y, last_r = y, y, r
        if k > 0:
            system = gram[:, :n, :n]
            ridge = RIDGE * system.diagonal(dim1=1, dim2=2).sum(1)
            factor, _ = torch.linalg.cholesky_ex(system + ridge[:, None, None] * eye[:n, :n])
            gamma = torch.cholesky_solve(torch.bmm(dr[:, :n], r[:, :, None]), factor)
            gamma = gamma.nan_to_num_(0, 0, 0)
            x = torch.baddbmm(y[:, None], gamma.mT, dy[:, :n], alpha=-1).squeeze(1)
    if out is None:
        return y
    out[index] = y
    return out


seldom = functools.partial(picard_compacted, every=3)


def picard_compiled(
    f: Any, x: Tensor, rtol: float, offset: float, limit: int, below: float
) -> Tensor:
    """The compacted loop with g and the test compiled into one; forward only."""
    if isinstance(f, Adjoint):
        return seldom(f, x, rtol, offset, limit, below)
    # A g that counts its calls runs as it is: the algorithm is the same.
    step = compiled_step() if f.g is problems.g else tested_step
    out, index = None, None
    for _ in range(limit):
        y, active, left = step(f.g, x, f.u, f.s, f.weight, rtol, offset)
        left = int(left)
        if left == 0:
            break
        if left <= below * len(active):
            keep = active.nonzero().squeeze(1)
            if out is None:
                out, index = y, keep
            else:
                out[index] = y
                index = index[keep]
            (y,), f = rows(keep, y), f.rows(keep)
        x = y
    if out is None:
        return y
    out[index] = y
    return out


def tested_step(
    g: Step, x: Tensor, u: Tensor, s: Tensor, weight: Tensor, rtol: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = g(x, u, s, weight)
    active = ~finished(y - x, y, rtol, offset, None)
    return y, active, active.sum()


@functools.cache
def compiled_step() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(tested_step, dynamic=True)


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
        weight: Tensor,
    ) -> Tensor:
        offset = rule.atol * math.sqrt(x0.shape[1])
        x = loop(Forward(g, u, s, weight), x0, rule.rtol, offset, rule.max_iterations, below[0])
        ctx.rest = loop, below[1], rule, g
        ctx.save_for_backward(x, u, s, weight)
        return x

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        loop, below, rule, g = ctx.rest
        x, u, s, weight = ctx.saved_tensors
        u, weight = u.detach().requires_grad_(), weight.detach().requires_grad_()
        f = Adjoint(g, x, v, u, s, weight)
        c = loop(f, v, rule.adjoint_rtol, 0.0, rule.max_iterations, below)
        du, dweight = torch.autograd.grad(f.y, (u, weight), c)
        return None, None, None, None, None, du, None, dweight


def plain(
    loop: Callable[..., Tensor], below: tuple[float, float] = (0.0, 0.0)
) -> Callable[[Rule], Solve]:
    """below: active/rows under which a loop compacts, forward and adjoint."""

    def build(rule: Rule) -> Solve:
        def solve(g: Step, *tensors: Tensor) -> Tensor:
            return PlainLayer.apply(loop, below, rule, g, *tensors)

        return solve

    return build


# --- torchdeq --------------------------------------------------------------------------------


def torchdeq(solver: str, **solver_options: Any) -> Callable[[Rule], Solve]:
    """Implicit differentiation on, relative 2-norm test: not its defaults (PhantomGrad, absolute).

    Its test has no absolute part; `f_stop_mode`, not `stop_mode`: it takes unknown names silently.
    """

    def build(rule: Rule) -> Solve:
        from torchdeq import get_deq

        deq = get_deq(
            f_solver=solver,
            b_solver=solver,
            f_max_iter=rule.max_iterations,
            b_max_iter=rule.max_iterations,
            f_tol=rule.rtol,
            b_tol=rule.adjoint_rtol,
            f_stop_mode="rel",
            b_stop_mode="rel",
            ift=True,
        )

        def solve(g: Step, x0: Tensor, u: Tensor, s: Tensor, weight: Tensor) -> Tensor:
            deq.train(torch.is_grad_enabled())
            out, _ = deq(lambda x: g(x, u, s, weight), x0, solver_kwargs=dict(solver_options))
            return out[-1]

        return solve

    return build


def absent(package: str) -> str | None:
    found = importlib.util.find_spec(package) is not None
    return None if found else f"{package} is not installed (pip install -r requirements/peers.txt)"


# --- all of them -----------------------------------------------------------------------------


PLAIN = "plain loop"
COMPACTED = "plain loop, compacted"
COMPILED = "plain loop, compacted, compiled"
WHOLE = ("Picard, whole", "Anderson, whole")
CONVOLUTIONS = ("Picard, ConvStep", "Anderson, ConvStep")
SAME_TASK = (PLAIN, COMPACTED, COMPILED)  # as our Picard: tested in every iteration


def all_methods() -> list[Method]:
    no_torchdeq = absent("torchdeq")
    peers = [
        Method(f"torchdeq {name}", "torchdeq", torchdeq(solver), no_torchdeq, slow)
        for name, solver, slow in (
            ("fixed point", "fixed_point_iter", False),
            ("Anderson", "anderson", False),
            ("Broyden", "broyden", True),  # takes seconds a backward on the hard problem
        )
    ]
    return [
        Method("Picard", "ours", ours(fpi_cuda.Picard())),
        Method("Anderson", "ours", ours(fpi_cuda.Anderson(history=HISTORY))),
        Method(WHOLE[0], "ours", functools.partial(Whole, fpi_cuda.Picard())),
        Method(WHOLE[1], "ours", functools.partial(Whole, fpi_cuda.Anderson(history=HISTORY))),
        Method(CONVOLUTIONS[0], "ours", functools.partial(Convolutions, fpi_cuda.Picard())),
        Method(
            CONVOLUTIONS[1],
            "ours",
            functools.partial(Convolutions, fpi_cuda.Anderson(history=HISTORY)),
        ),
        Method(PLAIN, "plain", plain(picard)),
        Method(COMPACTED, "plain", plain(picard_compacted, COMPACT)),
        Method("plain loop, compacted, test every 3rd", "plain", plain(seldom, COMPACT)),
        Method(COMPILED, "plain", plain(picard_compiled, COMPACT), slow=True),
        Method("plain Anderson", "plain", plain(anderson)),
        Method("plain Anderson, compacted", "plain", plain(anderson, COMPACT)),
        *peers,
    ]
