"""Evaluations of g and products of its adjoint, a sample in the mean, by every solver.

    python -m benchmarks.evaluations [--problems hard trained] [--repeat 3]

On the problems of the suites, on nets that are trained for it here, and on linear maps of known
rates. A cell is "evaluations/products", with the samples that failed after an "!"; beside it, with
--repeat, the processor time of a solve forward and backward over that of the first solver, medians
of turns. Every gradient is that of the same rule, so cells differ by what the solver does alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpi_cuda import Anderson, ImplicitAdjoint, Picard, Tolerance, fixed_point

from .problems import SIZES, at, make
from .problems.labels import Feedback, Shape, batches

SOLVERS: dict[str, Any] = {
    "Picard": Picard(),
    "5": Anderson(5),
    "5, every 3": Anderson(5, every=3),
    "10": Anderson(10),
    "10, every 3": Anderson(10, every=3),
}


class Case(NamedTuple):
    """A map, and what it is solved for."""

    name: str
    g: Callable[..., Tensor]
    x0: Tensor
    inputs: tuple[Tensor, ...]
    params: tuple[Tensor, ...]
    loss: Tensor
    tolerance: Tolerance
    adjoint: Tolerance
    most: int = 200


def of_suites() -> Iterator[Case]:
    """The problems of the suites, in float32."""
    kinds = [(kind, size) for kind in ("easy", "hard") for size in SIZES]
    kinds += [(kind, at(kind)) for kind in ("two-layer", "energy", "conv", "denoise", "stiff")]
    for kind, size in kinds:
        p = make(kind, *size, instances=1)
        i, rule = p.instances[0], p.rule
        tolerances = Tolerance(rule.rtol, rule.atol), Tolerance(rule.adjoint_rtol)
        given = (i.u, i.s), i.weights, i.loss, *tolerances, rule.max_iterations
        yield Case(p.name, p.g, i.x0, *given)


class Attention(nn.Module):
    """A block of a transformer, its weights shared by all depths: [B, T, D] with z added."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The next x."""
        q, k, v = (t.unflatten(2, (self.heads, -1)).mT for t in self.qkv(x + z).chunk(3, 2))
        y = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT.flatten(2, 3)
        x = self.norms[0](x + self.out(y[..., : x.shape[1], :].reshape(x.shape)))
        return self.norms[1](x + self.down(F.gelu(self.up(x))) + z)  # type: ignore[no-any-return]


class Graph(nn.Module):
    """Messages between the nodes of a graph: [B, V, D], neighbours the same for all."""

    def __init__(self, nodes: int = 40, width: int = 16) -> None:
        super().__init__()
        near = (torch.rand(nodes, nodes) < 4 / nodes).float() + torch.eye(nodes)
        near = torch.maximum(near, near.T)
        degree = near.sum(1).rsqrt()
        self.register_buffer("near", degree[:, None] * near * degree)
        self.message = nn.Linear(width, width)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The next x."""
        return torch.tanh(self.near @ self.message(x) + z)


class Denoiser(nn.Module):
    """Two convolutions on [x, z], [B, 8, 16, 16] and [B, 1, 16, 16], and half of x."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(9, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The next x."""
        return 0.5 * x + self.second(torch.relu(self.first(torch.cat([x, z], 1))))  # type: ignore[no-any-return]


def trained(steps: int = 60) -> Iterator[Case]:
    """Nets after some training through their fixed points."""
    torch.manual_seed(0)
    shape = Shape()
    words = [w for w, _ in batches(shape, steps, None)]
    labels = [y for _, y in batches(shape, steps, None)]
    coarse = [torch.randn(16, 1, 4, 4) for _ in range(steps)]
    clean = [F.interpolate(c, size=16, mode="bicubic") for c in coarse]
    noisy = [c + 0.5 * torch.randn_like(c) for c in clean]
    tokens = [torch.randn(16, 12, 32) for _ in range(steps)]
    nodes = [torch.randn(16, 40, 16) for _ in range(steps)]
    tasks: list[tuple[str, nn.Module, list[Tensor], list[Tensor], tuple[int, ...], Any]] = [
        ("labels", Feedback(shape, 300), words, labels, (shape.labels,), F.binary_cross_entropy),
        ("denoiser", Denoiser(), noisy, clean, (8, 16, 16), lambda x, y: F.mse_loss(x[:, :1], y)),
        ("attention", Attention(), tokens, [t.cumsum(1) for t in tokens], (12, 32), F.mse_loss),
        ("graph", Graph(), nodes, [n.roll(1, 1) for n in nodes], (40, 16), F.mse_loss),
    ]
    for name, net, inputs, targets, state, loss in tasks:
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for z, y in zip(inputs, targets, strict=True):
            x = fixed_point(net, torch.zeros(len(z), *state), z, on_failure="return").x
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
        z = inputs[0]
        x0 = torch.zeros(len(z), *state)
        frozen = net.eval().requires_grad_(False)
        given = (z,), (), torch.randn(len(z), *state), Tolerance(1e-4), Tolerance(1e-4)
        yield Case(f"trained {name}", frozen, x0, *given)


def linear(n: int = 256) -> Iterator[Case]:
    """Linear maps of a spectral radius, float64 to 1e-8."""
    for kind in ("symmetric", "general", "non-normal"):
        for rate in (0.5, 0.9, 0.99, 0.999):
            random = torch.Generator().manual_seed(0)
            a = torch.randn(n, n, dtype=torch.float64, generator=random)
            if kind == "symmetric":
                q, _ = torch.linalg.qr(a)
                spread = 2 * torch.rand(n, dtype=torch.float64, generator=random) - 1
                w = q * (spread * rate / spread.abs().max()) @ q.T
            elif kind == "general":
                w = a * (rate / torch.linalg.eigvals(a).abs().max())
            else:
                w = torch.triu(a, 1) / n**0.5 + rate * torch.diag(
                    2 * torch.rand(n, dtype=torch.float64, generator=random) - 1
                )
            z, loss = torch.randn(2, 4, n, dtype=torch.float64, generator=random)
            tight = Tolerance(1e-8)
            yield Case(
                f"{kind} {rate}", affine, torch.zeros_like(z), (z,), (w,), loss, tight, tight, 3000
            )


def affine(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """W x + z."""
    return x @ w.T + z


KINDS = {"suites": of_suites, "trained": trained, "linear": linear}


def solve(case: Case, solver: Any) -> tuple[float, float, int]:
    """Evaluations and products, means over samples, and samples that failed in either."""
    z = case.inputs[0].detach().requires_grad_()
    s = fixed_point(
        case.g,
        case.x0,
        z,
        *case.inputs[1:],
        params=case.params,
        solver=solver,
        adjoint=ImplicitAdjoint(tolerance=case.adjoint),
        tolerance=case.tolerance,
        max_iterations=case.most,
        on_failure="return",
        per_sample=True,
    )
    s.x.backward(case.loss)
    assert s.adjoint is not None
    failed = ~s.converged | ~s.adjoint.converged
    return (
        float(s.iterations.double().mean()),
        float(s.adjoint.iterations.double().mean()),
        int(failed.sum()),
    )


def row(case: Case, solvers: Sequence[str], repeat: int) -> str:
    """A line of the table."""
    cells, taken = [], {name: list[float]() for name in solvers}
    for name in solvers:
        forward, backward, failed = solve(case, SOLVERS[name])
        cells.append(f"{forward:.1f}/{backward:.1f}" + (f" !{failed}" if failed else ""))
    for _ in range(repeat):
        for name in solvers:
            start = time.process_time()
            solve(case, SOLVERS[name])
            taken[name].append(time.process_time() - start)
    if repeat:
        base = statistics.median(taken[solvers[0]])
        cells = [
            f"{cell} ({statistics.median(taken[name]) / base:.2f})"
            for cell, name in zip(cells, solvers, strict=True)
        ]
    return f"| {case.name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    parser.add_argument("--repeat", type=int, default=0, help="timed turns of every solver")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| problem | " + " | ".join(given.solvers) + " |")
    print("|---" * (1 + len(given.solvers)) + "|")
    for kind in given.problems:
        for case in KINDS[kind]():
            print(row(case, given.solvers, given.repeat), flush=True)


if __name__ == "__main__":
    main()
