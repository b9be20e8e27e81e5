"""Products that adjoints of linear maps take by solver, as a table.

    python -m benchmarks.adjoints [--size 256] [--samples 4] [--rtol 1e-6] [--dtype float64]

"n/k": n products in the mean over the samples that converged, k samples did not. The last column
has, of those that BiCGSTAB solved, the largest relative error, beside a dense solve in float64, and
of how many `error_estimate` is at least the error.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from fpi_cuda import Anderson, BiCGSTAB, ImplicitAdjoint, Picard, Tolerance, fixed_point
from fpi_cuda.options import Solver
from fpi_cuda.record import Record

from .machine import device_name

SOLVERS: dict[str, Solver] = {
    "Picard": Picard(),
    "Anderson(5)": Anderson(5),
    "(5, every=3)": Anderson(5, every=3),
    "Anderson(10)": Anderson(10),
    "(10, every=3)": Anderson(10, every=3),
    "BiCGSTAB": BiCGSTAB(),
}
RATES = (0.1, 0.5, 0.9, 0.99, 0.999)
# Norms, of skew ones; and the least and largest eigenvalue of indefinite ones.
SKEW, INDEFINITE = (0.5, 0.9, 2.0, 5.0), (-3.0, 3.1)


def matrices(n: int) -> dict[tuple[str, float], Tensor]:
    """Jacobians [n, n], float64, by family and rate."""
    made = torch.Generator().manual_seed(1)

    def random() -> Tensor:
        return torch.randn(n, n, dtype=torch.float64, generator=made)

    def symmetric(values: Tensor) -> Tensor:
        q = torch.linalg.qr(random())[0]
        return q * values @ q.mT

    def line(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, n, dtype=torch.float64)

    found = {}
    for rate in RATES:
        found["symmetric ±", rate] = symmetric(line(-rate, rate))
        found["symmetric +", rate] = symmetric(line(0, rate))
        near = 1 - torch.logspace(math.log10(1 - rate), 0, n, dtype=torch.float64)
        found["symmetric, log", rate] = symmetric(near)
        general = random()
        found["general", rate] = general * (rate / torch.linalg.eigvals(general).abs().max())
        q = torch.linalg.qr(random())[0]
        above = torch.diag(line(-rate, rate)) + 0.3 * random().triu(1) / n**0.5
        found["non-normal", rate] = q @ above @ q.mT
    for norm in SKEW:
        skew = random()
        skew = skew - skew.mT
        found["skew", norm] = skew * (norm / torch.linalg.matrix_norm(skew, 2))
    found["indefinite", INDEFINITE[1]] = symmetric(line(*INDEFINITE))
    return found


def adjoint(
    a: Tensor, v: Tensor, solver: Solver, rtol: float, most: int
) -> tuple[Tensor, Record | None]:
    """The adjoint c = Aᵀ c + v, [B, N], and its record."""
    z = torch.zeros_like(v, requires_grad=True)
    solution = fixed_point(
        lambda x, z, a: x @ a.mT + z,
        torch.zeros_like(v),
        z,
        params=(a,),
        solver=Picard(),
        tolerance=Tolerance(0, 0),
        max_iterations=1,
        adjoint=ImplicitAdjoint(solver, Tolerance(rtol), most),
        on_failure="return",
        per_sample=True,
    )
    (c,) = torch.autograd.grad(solution.x, z, v)
    return c, solution.adjoint


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adjoints", description="Products of adjoints by solver."
    )
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rtol", type=float, default=1e-6)
    parser.add_argument("--most", type=int, default=1000, help="products that a sample may take")
    parser.add_argument("--dtype", default="float64")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    print(f"torch {torch.__version__}, {device_name('cpu')}; N = {given.size}, {given.dtype},")
    print(f"rtol {given.rtol}, {given.samples} samples, at most {given.most} products\n")
    print(f"| Jacobian | rate | {' | '.join(SOLVERS)} | error, covered |")
    print("|---" * (len(SOLVERS) + 3) + "|")
    norm = torch.linalg.vector_norm
    made = torch.Generator().manual_seed(2)
    for (family, rate), wide in matrices(given.size).items():
        a = wide.to(dtype)
        v = torch.randn(given.samples, given.size, generator=made, dtype=torch.float64).to(dtype)
        exact = torch.linalg.solve(
            torch.eye(given.size) - a.double().mT, v.double()[..., None]
        ).squeeze(-1)
        cells, last = [], ""
        for solver in SOLVERS.values():
            c, record = adjoint(a, v, solver, given.rtol, given.most)
            assert record is not None
            done, counts = record.converged, record.iterations.double()
            failed = int((~done).sum())
            mean = f"{counts[done].mean():.0f}" if done.any() else "–"
            cells.append(f"{mean}/{failed}" if failed else mean)
            error = norm(c.double() - exact, dim=1)
            covered = int((record.error_estimate >= error)[done].sum())
            worst = max((error / norm(exact, dim=1))[done].tolist(), default=math.nan)
            last = f"{worst:.0e}, {covered} of {int(done.sum())}"
        print(f"| {family} | {rate} | {' | '.join(cells)} | {last} |", flush=True)


if __name__ == "__main__":
    main()
