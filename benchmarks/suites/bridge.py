"""bridge: torchdeq's solvers and ours under its registry, on nets of the kinds of its zoo."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
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
RIVALS = {"torchdeq fixed point": "fixed_point_iter", "torchdeq Anderson": "anderson"}
OURS = {"bridge Picard": "fpi_picard", "bridge Anderson": "fpi_anderson"}
DIRECT = "fixed_point Anderson, without torchdeq"


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

    def __init__(
        self, batch: int = 8, side: int = 32, channels: tuple[int, int] = (24, 48)
    ) -> None:
        super().__init__()
        a, b = channels
        self.u = [torch.randn(batch, a, side, side), torch.randn(batch, b, side // 2, side // 2)]
        shapes = ((a, a, 3), (a, b, 1), (b, b, 3), (b, a, 3))
        self.w = nn.ParameterList(
            torch.randn(o, i, k, k) / (i * k * k) ** 0.5 for o, i, k in shapes
        )

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
        edges = torch.stack(
            (torch.cat((nodes, left, left + 1)), torch.cat((nodes, left + 1, left)))
        )
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


# What makes each, the norm of its linear part (the activations shrink more), and a tiny one.
NETS: dict[str, tuple[Callable[..., Net], float, dict[str, Any]]] = {
    "representation": (Representation, 1.6, {"side": 4, "width": 8}),
    "multi-scale": (MultiScale, 3.0, {"batch": 2, "side": 8, "channels": (3, 4)}),
    "graph": (Graph, 1.6, {"chains": 2, "length": 8, "features": 5}),
}


def net(kind: str, dtype: torch.dtype, device: str = "cpu", *, tiny: bool = False) -> Net:
    make, norm, small = NETS[kind]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        f = make(**small) if tiny else make()
        f.double().contract(0.9 if tiny else norm)
    return f.to(device, dtype)


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


def gradient(f: Net, z: Sequence[Tensor]) -> Tensor:
    """Of all weights, for a loss in which all values count differently."""
    flat = torch.cat([part.flatten() for part in z])
    loss = flat @ torch.arange(len(flat), device=flat.device).to(flat.dtype).cos()
    return torch.cat([d.flatten() for d in torch.autograd.grad(loss, list(f.parameters()))])


def residual(f: Net, z: Sequence[Tensor]) -> float:
    """The worst sample's, relative."""
    with torch.no_grad():
        z, value = (torch.cat([t.flatten(1) for t in parts], 1) for parts in (z, f(z, f.u)))
        worst = (torch.linalg.norm(value - z, dim=1) / torch.linalg.norm(value, dim=1)).max()
    return float(worst)


def cells(options: Options) -> Iterator[Cell]:
    for kind in NETS:
        yield Cell(f"bridge/{kind}-{options.dtype}", functools.partial(rows_of, options, kind))


def rows_of(options: Options, kind: str) -> list[Row]:
    head = {"suite": "bridge", "problem": kind, "dtype": options.dtype, "device": options.device}
    if importlib.util.find_spec("torchdeq") is None:
        return [head | {"method": DIRECT, "skipped": "torchdeq is not installed"}]
    importlib.import_module("fpi_cuda.bridges.torchdeq")
    make = functools.partial(net, kind, device=options.device, tiny=options.tiny)
    f, exact = make(getattr(torch, options.dtype)), make(torch.float64)
    truth = gradient(exact, by_torchdeq(exact, "fixed_point_iter", 1e-11, 5000))
    runs = {
        name: functools.partial(by_torchdeq, f, solver) for name, solver in (RIVALS | OURS).items()
    } | {DIRECT: functools.partial(direct, f)}
    rows = []
    for name, run in runs.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that rows of a graph depend, said once
            for _ in range(5):  # whether samples depend is looked at in these, by some calls more
                run()
            seen: list[int] = []
            with f.register_forward_hook(lambda *_, seen=seen: seen.append(1)):
                z = run()
        found = {
            "evaluations": len(seen),
            "worst_residual": residual(exact, [part.detach().double() for part in z]),
            "gradient_error": relative_error(gradient(f, z).double(), truth),
        }
        found["refused"] = None if found["worst_residual"] <= 2 * TOL else "residual"
        family = "torchdeq" if name in RIVALS else "ours"
        rows += [
            head | {"method": name, "family": family, "mode": mode(backward)} | found
            for backward in (False, True)
        ]
    for backward in (False, True):
        some = [row for row in rows if row["mode"] == mode(backward)]
        calls = {
            name: functools.partial(once, f, run, backward=backward) for name, run in runs.items()
        }
        times = interleave(
            calls,
            device=options.device,
            budget=options.budget,
            rounds=options.turns(*options.rounds),
            label=f"{kind} {mode(backward)}",
        )
        median = {name: times[name].median for name in calls}
        for row in some:
            name = row["method"]
            namesake = list(RIVALS)["Anderson" in name]
            row.update(times[name].row())
            row["of_namesake"] = median[namesake] / median[name]
            row["of_fastest"] = min(median[rival] for rival in RIVALS) / median[name]
    return sorted(rows, key=lambda row: len(row["mode"]))


def once(f: Net, run: Callable[[], list[Tensor]], i: int, *, backward: bool) -> Any:
    if backward:
        return gradient(f, run())
    with torch.no_grad():
        return run()
