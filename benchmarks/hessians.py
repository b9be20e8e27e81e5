"""Calls of g, solves and time of Hessians of a loss on a fixed point, by every pair of modes.

    python -m benchmarks.hessians [--sizes 64 256]

x̂ = tanh(x̂ Wᵀ + z) of one sample with N values, float64; the loss is Σ sin x̂, its Hessian is by z,
[N, N]. Beside it the product of that Hessian with one vector. Every way is checked against the
Hessian in closed form before it is timed, and takes turns with the others; times are medians of
processor time on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vjp

from fpi_cuda import Anderson, ImplicitAdjoint, Tolerance, fixed_point
from fpi_cuda.solve import node

TIGHT = Tolerance(rtol=1e-10, atol=1e-12)
NORM = 0.8


class Problem:
    """A loss of z on a fixed point, and how often it calls g and solves."""

    def __init__(self, n: int) -> None:
        g = torch.Generator().manual_seed(n)
        w = torch.randn(n, n, dtype=torch.float64, generator=g)
        self.w = w * (NORM / torch.linalg.matrix_norm(w, 2))
        self.z = torch.randn(1, n, dtype=torch.float64, generator=g)
        self.v = torch.randn(1, n, dtype=torch.float64, generator=g)
        self.calls = self.solves = 0

    def g(self, x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x @ w.mT + z)

    def loss(self, z: Tensor) -> Tensor:
        return self.solved(z).sin().sum()

    def solved(self, z: Tensor) -> Tensor:
        adjoint = ImplicitAdjoint(tolerance=TIGHT)
        options: dict[str, Any] = {"solver": Anderson(), "tolerance": TIGHT, "adjoint": adjoint}
        x = torch.zeros_like(self.z)
        found = fixed_point(self.g, x, z, params=(self.w,), per_sample=True, **options)
        return found.x  # type: ignore[no-any-return]

    def closed(self) -> Tensor:
        """The Hessian, [N, N], with s = tanh′ and J = s ∘ W at x̂, and (1 − J) x′ = diag(s)."""
        with torch.no_grad():
            x = self.solved(self.z)[0]
        s, eye = 1 - x * x, torch.eye(len(x), dtype=x.dtype)
        inverse = torch.linalg.inv(eye - s[:, None] * self.w)
        first = inverse * s  # ∂x̂/∂z
        c = inverse.mT @ x.cos()  # ∂ loss at g
        before = self.w @ first + eye  # ∂ of tanh's argument by z
        second = before.mT @ ((c * -2 * x * s)[:, None] * before)
        return second - first.mT @ (x.sin()[:, None] * first)

    def counted(self, of: Callable[[], Tensor]) -> tuple[Tensor, int, int]:
        """Its value, calls of g and solves."""
        solve, self.calls, self.solves = node.solve, 0, 0

        def counting(*arguments: Any) -> Any:
            self.solves += 1
            return solve(*arguments)

        node.solve = counting
        try:
            return of(), self.calls, self.solves
        finally:
            node.solve = solve


def by_autograd(loss: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> Tensor:
    """H v by backward twice."""
    z = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(z), z, create_graph=True)
    return torch.autograd.grad(first, z, v)[0]


HESSIANS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "forward over reverse (`hessian`)": lambda loss: jacfwd(jacrev(loss)),
    "reverse over reverse": lambda loss: jacrev(jacrev(loss)),
}
PRODUCTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "H v, forward over reverse": lambda loss, z, v: jvp(grad(loss), (z,), (v,))[1],
    "H v, reverse over reverse": lambda loss, z, v: vjp(grad(loss), z)[1](v)[0],
    "H v, reverse over forward": lambda loss, z, v: grad(lambda z: jvp(loss, (z,), (v,))[1])(z),
    "H v, backward twice": by_autograd,
}


def rows(n: int, seconds: float) -> list[str]:
    """Lines of a table for states of n values."""
    p = Problem(n)
    closed = p.closed()
    ways: dict[str, Callable[[], Tensor]] = {"the solve alone": lambda: p.solved(p.z)}
    for name, way in HESSIANS.items():
        ways[name] = lambda way=way: way(p.loss)(p.z)  # type: ignore[misc]
    for name, product in PRODUCTS.items():
        ways[name] = lambda product=product: product(p.loss, p.z, p.v)  # type: ignore[misc]
    counts, times = {}, {name: list[float]() for name in ways}
    for name, way in ways.items():
        value, calls, solves = p.counted(way)
        counts[name] = calls, solves
        if name == "the solve alone":
            continue
        true = closed if name in HESSIANS else closed @ p.v[0]
        error = float((value.reshape(true.shape) - true).abs().max() / true.abs().max())
        if not error < 1e-8:
            raise AssertionError(f"{name} at N = {n} is off by {error:.1e}")
    end = time.process_time() + seconds
    while time.process_time() < end or len(times["the solve alone"]) < 5:
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(time.process_time() - start)
    return [
        f"| {n} | {name} | {counts[name][0]} | {counts[name][1]} "
        f"| {1e3 * statistics.median(taken):.2f} |"
        for name, taken in times.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each size")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| N | what | calls of g | solves | ms |\n|---|---|---|---|---|")
    for n in given.sizes:
        print(*rows(n, given.seconds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
