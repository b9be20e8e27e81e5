"""A zoo of maps with known fixed points, by which error estimates are measured.

A cell is a kind of map and a solver; its samples have rates from .1 to .99. docs/math.md states in
how many the estimate covers the true error, and by how much it is too large.
"""

import math
import warnings

import torch

from fpi_cuda import Anderson, FixedPointWarning, Picard, Tolerance, fixed_point
from fpi_cuda.record import ACTIVE, ITERATIONS, STATUS, TRAIL, WINDOW

KINDS = ("symmetric", "positive", "general", "skew", "rotations", "nonlinear")
RATES = (0.1, 0.5, 0.9, 0.99)
SOLVERS = {
    "picard": Picard(),
    "damped": Picard(0.5),
    "anderson": Anderson(),
    "alternating": Anderson(every=3),
}
SOAK_RATES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
SOAK_SOLVERS = {
    **SOLVERS,
    "anderson10": Anderson(10),
    "alternating10": Anderson(10, every=3),
}


def matrices(kind, rate, b, n, generator):
    """[b, n, n] in float64, with that spectral radius."""
    a = torch.randn(b, n, n, dtype=torch.float64, generator=generator)
    if kind == "general":
        return a * (rate / torch.linalg.eigvals(a).abs().amax(1))[:, None, None]
    if kind == "skew":
        a = a - a.mT
        return a * (rate / torch.linalg.matrix_norm(a, 2))[:, None, None]
    q, _ = torch.linalg.qr(a)
    if kind == "rotations":  # of planes, by any angle
        angle = 2 * math.pi * torch.rand(b, n // 2, dtype=torch.float64, generator=generator)
        radius = torch.rand(b, n // 2, dtype=torch.float64, generator=generator)
        radius = radius * (rate / radius.amax(1))[:, None]
        first, second = (
            torch.diag_embed(radius * angle.cos()),
            torch.diag_embed(radius * angle.sin()),
        )
        planes = torch.cat((torch.cat((first, -second), 2), torch.cat((second, first), 2)), 1)
        return q @ planes @ q.mT
    spectrum = torch.rand(b, n, dtype=torch.float64, generator=generator)
    if kind != "positive":
        spectrum = 2 * spectrum - 1
    spectrum = spectrum * (rate / spectrum.abs().amax(1))[:, None]
    return q * spectrum[:, None] @ q.mT


def linear(x, z, w):
    return torch.einsum("bij,bj->bi", w, x) + z


def bent(x, z, w):
    return torch.tanh(linear(x, z, w))


def step_of(kind):
    return bent if kind == "nonlinear" else linear


def solution_of(kind, z, w):
    """x̂, [b, n], in float64."""
    z, w = z.double(), w.double()
    eye = torch.eye(z.shape[1], dtype=torch.float64)
    if kind != "nonlinear":
        return torch.linalg.solve(eye - w, z)
    x = torch.zeros_like(z)
    for _ in range(200):  # Newton's method
        value = bent(x, z, w)
        jacobian = (1 - value.square())[:, :, None] * w
        x = x + torch.linalg.solve(eye - jacobian, value - x)
    return x


def overestimates(kind, solver, dtype, backend, *, rates=RATES, b=15, n=16, seed=0, adjoint=False):
    """Estimate / true error of converged samples, [·]: below 1 where it does not cover it.

    adjoint: of the backward solve; the kind must be linear.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rate in rates:
        w = matrices(kind, rate, b, n, generator).to(dtype)
        z = torch.randn(b, n, dtype=torch.float64, generator=generator).to(dtype)
        leaf = z.clone().requires_grad_(adjoint)
        s = fixed_point(
            step_of(kind),
            torch.zeros_like(z),
            leaf,
            w,
            solver=solver,
            backend=backend,
            per_sample=True,
            max_iterations=8000,
            on_failure="return",
        )
        x, record, true = s.x, s, solution_of(kind, z, w)
        if adjoint:
            v = torch.randn(b, n, dtype=torch.float64, generator=generator).to(dtype)
            (x,) = torch.autograd.grad(s.x, leaf, v)
            record, true = s.adjoint, solution_of(kind, v, w.mT)
        error = torch.linalg.vector_norm(x.detach().double() - true, dim=1)
        found.append((record.error_estimate / error)[record.converged])
    return torch.cat(found)


def coverage(ratios):
    """Share that is covered, and the median over-estimate."""
    return (ratios >= 1).double().mean().item(), ratios.median().item()


def table(backend="native", b=100, rates=SOAK_RATES, solvers=SOAK_SOLVERS):
    """The measured coverage, a row a cell: kind, solver, dtype, direction, cases, share, median."""
    rows = []
    for kind in KINDS:
        for name, solver in solvers.items():
            for dtype in (torch.float64, torch.float32):
                for adjoint in (False, True):
                    if adjoint and kind == "nonlinear":
                        continue
                    ratios = overestimates(
                        kind, solver, dtype, backend, rates=rates, b=b, n=24, adjoint=adjoint
                    )
                    share, median = coverage(ratios)
                    direction = "adjoint" if adjoint else "forward"
                    rows.append((kind, name, dtype, direction, len(ratios), share, median))
    return rows


# --- what else docs/math.md and docs/design/iteration.md state ----------------------------------


def half_types():
    """By dtype and solver: share of estimates, covered ones among them, their median."""
    rates = tuple(rate for rate in SOAK_RATES if rate <= 0.95)
    solvers = {**SOAK_SOLVERS, "anderson2": Anderson(2)}
    for dtype in (torch.float16, torch.bfloat16):
        for name, solver in solvers.items():
            found = [
                overestimates(kind, solver, dtype, "native", rates=rates, b=100, n=24)
                for kind in KINDS
            ]
            ratios = torch.cat(found)
            finite = ratios[ratios.isfinite()]
            yield dtype, name, len(finite) / len(ratios), *coverage(finite)


def short_windows():
    """By history: covered, and the median, of float32."""
    for history in (2, 3):
        found = [
            overestimates(
                kind, Anderson(history), torch.float32, "native", rates=SOAK_RATES, b=100, n=24
            )
            for kind in KINDS
        ]
        yield history, *coverage(torch.cat(found))


def shifts():
    """Of x ↦ .9 times a cyclic shift + z, eigenvalues at all angles: covered, and the median."""
    z = torch.randn(200, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = 0.9 * torch.eye(24, dtype=torch.float64).roll(1, 0)
    right = solution_of("shift", z, shift.expand(len(z), -1, -1))
    for name, solver in (
        ("picard", Picard()),
        ("anderson3", Anderson(3)),
        ("anderson", Anderson()),
    ):
        s = fixed_point(
            lambda x, z: 0.9 * x.roll(1, 1) + z,
            torch.zeros_like(z),
            z,
            solver=solver,
            backend="native",
            per_sample=True,
            max_iterations=8000,
        )
        yield name, *coverage(s.error_estimate / torch.linalg.vector_norm(s.x - right, dim=1))


def slow_entry():
    """One of 1000 entries has the rate .99, the others .1; rtol = 1e-2: covered, and the least."""
    rates = torch.full((1000,), 0.1, dtype=torch.float64)
    rates[0] = 0.99
    z = torch.randn(100, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, solver in SOAK_SOLVERS.items():
        s = fixed_point(
            lambda x, z: rates * x + z,
            torch.zeros_like(z),
            z,
            solver=solver,
            tolerance=Tolerance(1e-2),
            backend="native",
            per_sample=True,
        )
        error = torch.linalg.vector_norm(s.x - z / (1 - rates), dim=1)
        ratios = s.error_estimate / error
        yield name, coverage(ratios)[0], ratios.min().item()


class Watched(Picard):
    """Counts the iterations of active samples, and in how many x was kept; and ends without two."""

    seen, kept, short = 0, 0, 0

    def start(self, backend, progress, x):
        move = super().start(backend, progress, x)
        counters = progress.counters

        def update(x, gx):
            active = counters[:, STATUS] == ACTIVE
            move(x, gx)
            ended = active & (counters[:, STATUS] != ACTIVE)
            length = counters[:, WINDOW]
            Watched.seen += int(active.sum())
            Watched.kept += int((active & ~ended & (length > 0)).sum())
            few = length < (counters[:, ITERATIONS] - 1).clamp(max=TRAIL)
            Watched.short += int((ended & few).sum())

        return update


def trails():
    """The share of iterations in which Picard keeps x, and ends that lack an iterate."""
    for kind in KINDS:
        for beta in (1.0, 0.5):
            for dtype in (torch.float64, torch.float32):
                overestimates(kind, Watched(beta), dtype, "native", rates=SOAK_RATES, b=20, n=24)
    return Watched.kept / Watched.seen, Watched.short


def main():
    rows = table()
    for *cell, cases, share, median in rows:
        print(*(f"{str(part).removeprefix('torch.'):10}" for part in cell), end="")
        print(f"{cases:5} {share:7.2%} {median:5.2f}")
    cases = sum(row[4] for row in rows)
    print(f"{cases} cases, {sum(row[4] * row[5] for row in rows) / cases:.2%} covered")
    print("half types: dtype, solver, with an estimate, of these covered, median")
    for dtype, name, some, share, median in half_types():
        print(f"{str(dtype)[6:]:10}{name:12}{some:8.2%}{share:8.2%} {median:5.2f}")
    print("short windows, float32: history, covered, median")
    for history, share, median in short_windows():
        print(f"{history:3}{share:8.2%} {median:5.2f}")
    print("cyclic shifts: solver, covered, median")
    for name, share, median in shifts():
        print(f"{name:12}{share:8.2%} {median:5.2f}")
    print("a slow entry: solver, covered, least estimate / error")
    for name, share, least in slow_entry():
        print(f"{name:12}{share:8.2%} {least:8.4f}")
    share, short = trails()
    print(f"trails: x kept in {share:.1%} of the iterations, {short} ends without two iterates")


if __name__ == "__main__":
    with warnings.catch_warnings(action="ignore", category=FixedPointWarning):
        main()
