"""A zoo of maps with known fixed points, by which error estimates are measured.

A cell is a kind of map and a solver; its samples have rates from .1 to .99. docs/math.md states in
how many the estimate covers the true error, and by how much it is too large.
"""

import math

import torch

from fpi_cuda import Anderson, FixedPointWarning, Picard, fixed_point

KINDS = ("symmetric", "positive", "general", "skew", "rotations", "nonlinear")
RATES = (0.1, 0.5, 0.9, 0.99)
SOLVERS = {"picard": Picard(), "damped": Picard(0.5), "anderson": Anderson()}
SOAK_RATES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
SOAK_SOLVERS = {**SOLVERS, "anderson10": Anderson(10)}


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


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore", FixedPointWarning)
    rows = table()
    for *cell, cases, share, median in rows:
        print(*(f"{str(part).removeprefix('torch.'):10}" for part in cell), end="")
        print(f"{cases:5} {share:7.2%} {median:5.2f}")
    cases = sum(row[4] for row in rows)
    print(f"{cases} cases, {sum(row[4] * row[5] for row in rows) / cases:.2%} covered")
