"""dropin: training the old layer's demonstration, by it and by what takes its place."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import fpi_cuda
from fpi_cuda import compat

from ..clock import Times, timed
from ..judge import relative_error
from ..methods import replaced
from ..problems.labels import Energy, Feedback, Shape, batches
from ..records import Row
from .cell import Cell, Options

OLD, COMPAT, ACCELERATED, LAYER = (
    "old layer, pure Python",
    "compat layer",
    "compat layer, accelerate=True",
    "FixedPointLayer",
)
FAMILY = {OLD: "replaced", COMPAT: "ours", ACCELERATED: "ours", LAYER: "ours"}
TINY = Shape(batch=8, features=40, labels=8, words=6, topic=4)
LEARNING_RATE = 1e-3
MOST = 200  # the library's default


@dataclass(frozen=True)
class Demonstration:
    """A net of the old layer's demonstration and the condition of both its loops."""

    net: type[nn.Module]
    hidden: int
    condition: dict[str, Any]
    max_iter: int
    steps: int
    alike: tuple[str, ...]  # whose first gradient must be the old layer's


DEMONSTRATIONS = {
    "FPI_NN": Demonstration(
        Feedback, 600, {"threshold": 1e-8}, 4000, 24, (COMPAT, ACCELERATED, LAYER)
    ),
    # Where all of its units are off the energy is flat: any point there is a solution.
    "FPI_GD": Demonstration(
        Energy, 512, {"threshold": 1e-4, "normalized": False}, 10_000, 3, (COMPAT,)
    ),
}


def cells(options: Options) -> Iterator[Cell]:
    for name in DEMONSTRATIONS:
        yield Cell(f"dropin/{name}", functools.partial(rows, options, name))


class Step(nn.Module):
    """The net as a step x ← g(x, z): itself, or a step of length 1 down its energy by autograd."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if isinstance(self.net, Feedback):
            return self.net(x, z)
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.net(leaf, z).sum()
            (slope,) = torch.autograd.grad(energy, leaf, create_graph=x.requires_grad)
        return x - slope


class OfTuples(nn.Module):
    """The same as one writes it for the old layer: tuples, and P for the gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any, y: Any) -> tuple[Tensor]:
        if isinstance(self.net, Feedback):
            return (self.net(x[0], y[0]),)
        (slope,) = compat.partial(
            lambda x, y: self.net(x[0], y[0]).sum(), x, y, tuple(self.net.parameters())
        )
        return (x[0] - slope,)


class Training:
    """A net trained by one method."""

    def __init__(self, method: str, kind: Demonstration, shape: Shape, options: Options) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = kind.net(shape, options.either(kind.hidden, 16))
        self.net = net.to(options.device, getattr(torch, options.dtype))
        self.step = Step(self.net)
        limit = options.either(kind.max_iter, 30)
        self.limit = MOST if method == LAYER else limit + 1  # evaluations of g
        self.start = torch.zeros(
            shape.batch, shape.labels, device=options.device, dtype=getattr(torch, options.dtype)
        )
        self.optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
        self.counts: dict[str, int] = {}
        self.layer: Any = None  # the layer whose record has the counts
        self.solve = getattr(self, METHODS[method])(kind.condition | {"maxIter": limit})
        self.losses: list[float] = []
        self.residuals: list[float] = []
        self.most = {"forward": [], "backward": []}  # type: dict[str, list[int]]
        self.seconds: list[float] = []
        self.gradient: Tensor | None = None  # the first

    def take(self, z: Tensor, labels: Tensor, device: str) -> None:
        """A step of training; what is noted of it is not timed."""
        z, labels = z.to(self.start), labels.to(self.start)
        kept: list[Tensor] = []

        def derive() -> None:
            self.optimizer.zero_grad()
            x = self.solve(z)
            loss = self.net.loss(x, labels)  # type: ignore[operator]
            loss.backward()
            kept.extend((x.detach(), loss.detach()))

        seconds = timed(derive, device)
        x, loss = kept
        residual = self.step(x, z).detach() - x
        self.residuals.append(float(residual.norm() / x.norm()))
        self.losses.append(float(loss))
        if self.layer is not None:
            last = self.layer.last
            self.counts = {"forward": last.iterations, "backward": last.adjoint.iterations}
        for way, found in self.most.items():
            found.append(int(torch.as_tensor(self.counts[way]).max()))
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten() for p in self.net.parameters()])
        self.seconds.append(seconds + timed(self.optimizer.step, device))

    def condition(self, way: str, given: dict[str, Any]) -> Callable[..., bool]:
        """The old layer's, which also notes how many evaluations there were."""

        def keep_going(count: int, x: Any, px: Any) -> bool:
            self.counts[way] = count + 1
            return compat.default_term_cond(count, x, px, **given)

        return keep_going

    def old(self, given: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        names, weights = zip(*self.step.named_parameters(), strict=True)
        conditions = [self.condition(way, given) for way in ("forward", "backward")]

        def g(x: Any, y: Any) -> tuple[Tensor]:
            z, *now = y
            return (functional_call(self.step, dict(zip(names, now, strict=True)), (x[0], z)),)

        def solve(z: Tensor) -> Tensor:
            y = (z, *weights)
            return replaced.fixed_point_iteration(y, (self.start,), g, *conditions)[0]

        return solve

    def compat(self, given: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        conditions = [self.condition(way, given) for way in ("forward", "backward")]
        layer = compat.FixedPointIteration(OfTuples(self.net), *conditions)
        return lambda z: layer((z,), (self.start,))[0]

    def accelerated(self, given: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        condition = functools.partial(compat.default_term_cond, **given)
        self.layer = compat.FixedPointIteration(
            OfTuples(self.net), condition, condition, accelerate=True
        )
        return lambda z: self.layer((z,), (self.start,))[0]

    def by_default(self, given: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        plain = isinstance(self.net, Feedback)
        self.layer = fpi_cuda.FixedPointLayer(
            self.net if plain else fpi_cuda.GradientStep(self.net, 1.0),
            state_shape=tuple(self.start.shape[1:]),
            max_iterations=MOST,
        )
        return self.layer


METHODS = {OLD: "old", COMPAT: "compat", ACCELERATED: "accelerated", LAYER: "by_default"}


def rows(options: Options, name: str) -> list[Row]:
    """A row a method: the nets start alike, and take the same batches in turns."""
    kind = DEMONSTRATIONS[name]
    shape, steps = options.either(Shape(), TINY), options.either(kind.steps, 3)
    wanted = [
        method
        for method, family in FAMILY.items()
        if method not in options.without
        and (options.families is None or family in options.families)
    ]
    trained = {method: Training(method, kind, shape, options) for method in wanted}
    data = None if options.tiny else options.data
    given = tqdm(batches(shape, steps, data), total=steps, desc=f"dropin {name}", leave=False)
    for i, (z, labels) in enumerate(given):
        for j in range(len(wanted)):
            trained[wanted[(i + j) % len(wanted)]].take(z, labels, options.device)
    head = {
        "suite": "dropin",
        "problem": name,
        "batch": shape.batch,
        "size": shape.labels,
        "dtype": options.dtype,
        "device": options.device,
        "data": "made" if data is None else "Bibtex",
        "steps": steps,
    }
    return [head | row(method, trained, kind) for method in wanted]


def row(method: str, trained: dict[str, Training], kind: Demonstration) -> Row:
    mine, old = trained[method], trained.get(OLD)
    difference, refused = None, None
    if old is not None and method != OLD:
        difference = relative_error(mine.gradient, old.gradient.double())
        if method in kind.alike and not difference <= 1e-2:
            refused = f"its first gradient is {difference:.1e} off the old layer's"
    if FAMILY[method] == "ours" and not all(map(math.isfinite, mine.losses)):
        refused = "its loss is not finite"
    times = Times(tuple(mine.seconds), tuple(range(len(mine.seconds))))
    return {
        "method": method,
        "family": FAMILY[method],
        "refused": refused,
        "gradient_difference": difference,
        "total_s": sum(mine.seconds),
        "of_old": None if old is None else Times(tuple(old.seconds)).median / times.median,
        "forward": mine.most["forward"],
        "backward": mine.most["backward"],
        "at_limit": sum(n >= mine.limit for n in mine.most["forward"]),
        "losses": mine.losses,
        "loss": mine.losses[-1],
        "residuals": mine.residuals,
        "worst_residual": max(mine.residuals),
        **times.row(),
    }
