"""Iterations and time of training steps with `layer.warm` and without, as a table.

    python -m benchmarks.warm [--epochs 30] [--rate 3e-4]

A classifier on made data: a `DenseStep` of 128 values, a linear head, cross entropy, Adam; 512
samples, whole or in minibatches of 64 that hold the same samples in every epoch. ‖W‖ is set back
after each step, outside of its time: else the solves of an overfitting net cease to converge. All
layers see the same data from the same weights, and take each step in turn. The first epoch, in
which every start is cold, is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fpi_cuda import Anderson, DenseStep, FixedPointLayer, Picard
from fpi_cuda.options import Solver

SAMPLES, INPUTS, STATES, CLASSES, MINIBATCH = 512, 32, 128, 10, 64
# Norms of W: 0.8 is a fresh step's, 1.2 a harder one.
NORMS = (0.8, 1.2)


@dataclass
class Run:
    """A classifier in training, and what its steps cost."""

    layer: FixedPointLayer
    norm: float
    rate: float
    keyed: bool
    counts: list[tuple[float, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        self.head = nn.Linear(STATES, CLASSES)
        tensors = [*self.layer.parameters(), *self.head.parameters()]
        self.scale()
        self.optimizer = torch.optim.Adam(tensors, self.rate)

    def scale(self) -> None:
        weight = self.layer.g.state_weight.detach()
        weight *= self.norm / torch.linalg.matrix_norm(weight, 2)

    def step(self, i: int, z: Tensor, labels: Tensor, counted: bool) -> None:
        before = time.perf_counter()
        x = self.layer(z, key=i if self.keyed else None)
        loss = nn.functional.cross_entropy(self.head(x), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        seconds, last = time.perf_counter() - before, self.layer.last
        assert last is not None
        assert last.adjoint is not None
        if not (last.converged.all() and last.adjoint.converged.all()):
            raise SystemExit("a solve did not converge: these numbers would say nothing")
        self.scale()
        self.loss = loss.item()
        if counted:
            solves = last.iterations, last.adjoint.iterations
            self.counts.append((solves[0].double().mean().item(), solves[1].double().mean().item()))
            self.seconds.append(seconds)


def runs(norm: float, solver: Solver, rate: float, batch: int, epochs: int) -> dict[str, Run]:
    made = torch.Generator().manual_seed(0)
    z = torch.randn(SAMPLES, INPUTS, generator=made)
    labels = (z @ torch.randn(INPUTS, CLASSES, generator=made)).argmax(1)
    found = {}
    ways = {"cold": (False, False), "warm": (True, True)}
    if batch < SAMPLES:
        ways = {"cold": (False, False), "warm, key=": (True, True), "warm, no key": (True, False)}
    for name, (warm, keyed) in ways.items():
        torch.manual_seed(1)
        step = DenseStep(STATES, INPUTS)
        found[name] = Run(FixedPointLayer(step, solver=solver, warm=warm), norm, rate, keyed)
    for epoch in range(epochs):
        for i in range(SAMPLES // batch):
            rows = slice(i * batch, (i + 1) * batch)
            for run in found.values():
                run.step(i, z[rows], labels[rows], epoch > 0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.warm", description="Training steps with warm starts."
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rate", type=float, default=3e-4, help="of Adam")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| ‖W‖ | solver | batch | start | iterations forward | backward | ms a step | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for norm in NORMS:
        for solver in (Anderson(), Picard()):
            for batch in (SAMPLES, MINIBATCH):
                for start, run in runs(norm, solver, given.rate, batch, given.epochs).items():
                    forward, backward = map(statistics.mean, zip(*run.counts, strict=True))
                    print(
                        f"| {norm} | {type(solver).__name__} | {batch} | {start} | {forward:.1f} | "
                        f"{backward:.1f} | {1e3 * statistics.median(run.seconds):.2f} | "
                        f"{run.loss:.4f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
