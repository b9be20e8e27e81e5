"""bridge: torchdeq's solvers and ours under its registry, on nets of the kinds of its zoo."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fpi_cuda

from ..clock import interleave
from ..judge import relative_error
from ..records import Row
from .cell import Cell, Options, mode

TOL = 1e-4  # relative, forward and backward
CAP = 200  # iterations
METHODS = {
    "torchdeq fixed point": "fixed_point_iter",
    "torchdeq Anderson": "anderson",
    "bridge Picard": "fpi_picard",
    "bridge Anderson": "fpi_anderson",
}
DIRECT = "fixed_point, Anderson"


class Net(nn.Module):
    """A step z ↦ f(z, u) of tuples of tensors, and u; a solve starts at zeros like u."""

    activation = staticmethod(torch.relu)
    u: list[Tensor]

    def linear(self, *z: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def forward(self, z: Sequence[Tensor], u: Sequence[Tensor]) -> tuple[Tensor, ...]:
        parts = zip(self.linear(*z), u, strict=True)
        return tuple(self.activation(y + part) for y, part in parts)

    def contract(self, norm: float) -> None:
        """Scale the weights so that the linear part has about this norm."""
        v = [torch.randn_like(u) for u in self.u]
        for _ in range(50):
            out, pull = torch.func.vjp(self.linear, *v)
            v = pull(out)
            squared = torch.cat([part.flatten() for part in v]).norm()
            v = [part / squared for part in v]
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(norm / squared.sqrt())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.u = [fn(u) for u in self.u]
        return super()._apply(fn, recurse)


class Representation(Net):
    """An implicit representation of an image: a sample a pixel, sines."""

    activation = staticmethod(torch.sin)

    def __init__(self, side: int = 64, width: int = 64) -> None:
        super().__init__()
        axis = torch.linspace(-1, 1, side)
        at = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
        self.u = [30 * at @ torch.randn(2, width)]
        self.w = nn.Parameter(torch.randn(width, width))

    def linear(self, *z: Tensor) -> tuple[Tensor, ...]:
        return (z[0] @ self.w,)


class MultiScale(Net):
    """Convolutions at two resolutions, each of which gets the other's."""

    def __init__(self, batch: int = 8, side: int = 32, channels: tuple[int, int] = (24, 48)) -> None:
        super().__init__()
        a, b = channels
        self.u = [torch.randn(batch, a, side, side), torch.randn(batch, b, side // 2, side // 2)]
        shapes = ((a, a, 3), (a, b, 1), (b, b, 3), (b, a, 3))
        self.w = nn.ParameterList(torch.randn(o, i, k, k) / (i * k * k) ** 0.5 for o, i, k in shapes)

    def linear(self, *z: Tensor) -> tuple[Tensor, ...]:
        fine, coarse = z
        stay_fine, up, stay_coarse, down = self.w
        raised = F.interpolate(F.conv2d(coarse, up), scale_factor=2.0)
        lowered = F.conv2d(fine, down, stride=2, padding=1)
        return (
            F.conv2d(fine, stay_fine, padding=1) + raised,
            F.conv2d(coarse, stay_coarse, padding=1) + lowered,
        )


class Graph(Net):
    """Chains whose first nodes alone know something: [features, nodes], whose rows depend."""

    activation = staticmethod(torch.tanh)

    def __init__(self, chains: int = 20, length: int = 100, features: int = 64) -> None:
        super().__init__()
        nodes = torch.arange(chains * length)
        left = nodes[nodes % length < length - 1]
        edges = torch.stack((torch.cat((nodes, left, left + 1)), torch.cat((nodes, left + 1, left))))
        degree = torch.bincount(edges[0]).to(torch.get_default_dtype())
        weights = degree[edges].prod(0).rsqrt()
        self.a = torch.sparse_coo_tensor(edges, weights, (len(nodes),) * 2, check_invariants=True)
        self.a = self.a.coalesce()
        self.u = [torch.randn(features, len(nodes)) * (nodes % length == 0)]
        self.w = nn.Parameter(torch.randn(features, features))

    def linear(self, *z: Tensor) -> tuple[Tensor, ...]:
        return (self.w @ torch.sparse.mm(self.a, z[0].T).T,)  # A is symmetric

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.a = fn(self.a)
        return super()._apply(fn, recurse)


NETS: dict[str, tuple[Callable[..., Net], dict[str, Any]]] = {
    "representation": (Representation, {"side": 4, "width": 8}),
    "multi-scale": (MultiScale, {"batch": 2, "side": 8, "channels": (3, 4)}),
    "graph": (Graph, {"chains": 2, "length": 8, "features": 5}),
}


def net(kind: str, dtype: torch.dtype, device: str = "cpu", *, tiny: bool = False) -> Net:
    make, small = NETS[kind]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        f = make(**(small if tiny else {})).to(device, torch.float64)
        f.contract(0.9)
    return f.to(dtype)


def by_torchdeq(f: Net, solver: str, tol: float = TOL, cap: int = CAP, **more: Any) -> list[Tensor]:
    """The state, attached, by torchdeq with the solver of that name."""
    from torchdeq import get_deq

    options: dict[str, Any] = {"f_solver": solver, "b_solver": solver, "ift": True}
    for which in "fb":
        options |= {f"{which}_tol": tol, f"{which}_max_iter": cap, f"{which}_stop_mode": "rel"}
    deq, z = get_deq(**options | more), [torch.zeros_like(u) for u in f.u]
    if len(z) == 1:
        return [deq(lambda z: f((z,), f.u)[0], z[0])[0][-1]]
    return list(deq(lambda *z: f(z, f.u), z)[0][-1])


def direct(f: Net, tol: float = TOL, cap: int = CAP, **more: Any) -> list[Tensor]:
    """The same without torchdeq."""
    solution = fpi_cuda.fixed_point(
        lambda z, *u: f(z, u),
        tuple(torch.zeros_like(u) for u in f.u),
        *f.u,
        tolerance=fpi_cuda.Tolerance(tol, 0.0),
        adjoint=fpi_cuda.ImplicitAdjoint(tolerance=fpi_cuda.Tolerance(tol)),
        max_iterations=cap,
        **more,
    )
    return list(solution.x)


def gradient(f: Net, z: Sequence[Tensor]) -> list[Tensor]:
    """Of a loss that weights all values differently."""
    total = torch.stack([(part * torch.cos(torch.arange(part.numel(), device=part.device, dtype=part.dtype)).view_as(part)).sum() for part in z]).sum()
    return list(torch.autograd.grad(total, list(f.parameters())))
