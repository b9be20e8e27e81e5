"""What gradients that cost less leave of the exact one: cosine and relative error.

    python -m benchmarks.cheap [--size 64] [--batch 16] [--seeds 5]

x̂ = φ(x̂ Wᵀ + z) for a batch of samples, float64, φ linear or tanh, W of normal numbers, general or
symmetric, scaled so that the spectral radius of ∂g/∂x at x̂ is the rate (of tanh the largest of a
sample). z is made from x̂, which is therefore exact, and the solve starts there. The loss is a
random linear function of x̂, the gradient is by W, the exact one comes from a dense solve; products
are those with (∂g/∂x)ᵀ. Medians over seeds. The bias is the arithmetic's and not the device's,
which is named all the same.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpi_cuda import (
    Anderson,
    ImplicitAdjoint,
    Neumann,
    OneStep,
    Phantom,
    Tolerance,
    Truncated,
    Unrolled,
    fixed_point,
)

from .machine import cpu_name

RATES = 0.5, 0.9, 0.99
KINDS = "general, linear", "general, tanh", "symmetric, linear", "symmetric, tanh"
# Products of recorded steps: the first of them has none.
METHODS: dict[str, tuple[Any, int | None]] = {
    "OneStep()": (OneStep(), None),
    "Neumann(5)": (Neumann(5), None),
    "Unrolled(6)": (Unrolled(6), 5),
    "Phantom(5, 0.5)": (Phantom(5, 0.5), 4),
    "Truncated(5)": (Truncated(5), None),
    "Truncated(10)": (Truncated(10), None),
    "Neumann(10)": (Neumann(10), None),
    "Neumann(20)": (Neumann(20), None),
    "Phantom(20, 0.9)": (Phantom(20, 0.9), 19),
    "Truncated(20)": (Truncated(20), None),
    "ImplicitAdjoint(rtol 1e-2)": (ImplicitAdjoint(tolerance=Tolerance(1e-2)), None),
    "ImplicitAdjoint()": (ImplicitAdjoint(), None),
}


class Problem:
    """A map with its exact fixed points, and a linear loss on them."""

    def __init__(self, kind: str, rate: float, n: int, b: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        w = torch.randn(n, n, dtype=torch.float64, generator=g)
        x = 1.6 * torch.rand(b, n, dtype=torch.float64, generator=g) - 0.8
        self.v = torch.randn(b, n, dtype=torch.float64, generator=g)
        if kind.startswith("symmetric"):
            w = w + w.mT
        self.tanh = kind.endswith("tanh")
        slope = 1 - x * x if self.tanh else torch.ones_like(x)
        radius = torch.linalg.eigvals(slope[:, :, None] * w).abs().amax()
        self.w, self.x = w * (rate / radius), x
        self.z = (torch.atanh(x) if self.tanh else x) - x @ self.w.mT
        jacobians = slope[:, :, None] * self.w
        eye = torch.eye(n, dtype=torch.float64)
        c = torch.linalg.solve(eye - jacobians.mT, self.v[:, :, None])[:, :, 0]
        self.exact = (slope * c).mT @ x

    def g(self, x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        y = x @ w.mT + z
        return torch.tanh(y) if self.tanh else y

    def gradient(self, adjoint: Any) -> tuple[Tensor, float | None]:
        """By W; and products a sample, where an adjoint was solved."""
        w = self.w.clone().requires_grad_()
        s = fixed_point(
            self.g,
            *(self.x, self.z),
            params=(w,),
            solver=Anderson(),
            adjoint=adjoint,
            per_sample=True,
            on_failure="return",
        )
        (found,) = torch.autograd.grad(s.x, w, self.v)
        return found, None if s.adjoint is None else float(s.adjoint.iterations.double().mean())


class Bias(NamedTuple):
    """Of one gradient."""

    products: float
    cosine: float
    error: float


def bias(p: Problem, adjoint: Any, products: int | None) -> Bias:
    found, counted = p.gradient(adjoint)
    exact = p.exact
    cosine = float((found * exact).sum() / (found.norm() * exact.norm()))
    error = float((found - exact).norm() / exact.norm())
    made = products if counted is None else counted
    assert made is not None
    return Bias(made, cosine, error)


def rows(rate: float, make: Callable[[str, int], Problem], seeds: int) -> list[str]:
    """Lines of a table."""
    problems = {kind: [make(kind, seed) for seed in range(seeds)] for kind in KINDS}
    lines = []
    for name, (adjoint, products) in METHODS.items():
        cells, counts = [], []
        for kind in KINDS:
            of = [bias(p, adjoint, products) for p in problems[kind]]
            made, cosine, error = (statistics.median(c) for c in zip(*of, strict=True))
            counts.append(round(made))
            cells.append(f"{cosine:.4f} / {error:.1e}")
        least, most = min(counts), max(counts)
        made_by = f"{least}" if least == most else f"{least} to {most}"
        lines.append(f"| {name} | {made_by} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print a table for each rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{cpu_name()}, torch {torch.__version__}")
    for rate in RATES:

        def make(kind: str, seed: int, rate: float = rate) -> Problem:
            return Problem(kind, rate, given.size, given.batch, seed)

        print(f"\nrate {rate}, cosine / relative error\n")
        print("| | products | " + " | ".join(KINDS) + " |\n" + "|---" * (2 + len(KINDS)) + "|")
        print(*rows(rate, make, given.seeds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
