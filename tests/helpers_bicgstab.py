"""Matrices with known trouble, and gradients of linear maps beside dense float64 solves."""

import torch

from fpi_cuda import BiCGSTAB, ImplicitAdjoint, Picard, Tolerance, fixed_point


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_eigenvalues(values, seed=0):
    """A symmetric matrix."""
    q, _ = torch.linalg.qr(random(len(values), len(values), seed=seed))
    return q * values @ q.mT


def triangular(n, rate, above=0.3, seed=0):
    """Far from normal: eigenvalues on the diagonal, up to the rate; entries above it."""
    values = torch.linspace(-rate, rate, n, dtype=torch.float64)
    a = torch.diag(values) + above * torch.triu(random(n, n, seed=seed), 1) / n**0.5
    q, _ = torch.linalg.qr(random(n, n, seed=seed + 1))
    return q @ a @ q.mT


def skew(n, norm, seed=0):
    a = random(n, n, seed=seed)
    a = a - a.mT
    return a * (norm / torch.linalg.matrix_norm(a, 2))


def rotation(n, by, scale=1.2):
    """Scaled rotations of planes, by angles around this."""
    angles = by + torch.linspace(0, 0.5, n // 2, dtype=torch.float64)
    c, s = scale * angles.cos(), scale * angles.sin()
    return torch.block_diag(*(torch.stack((c, s, -s, c), 1).view(-1, 2, 2)))


def line(low, high, n):
    return torch.linspace(low, high, n, dtype=torch.float64)


HARD = {
    "symmetric .99": with_eigenvalues(line(-0.99, 0.99, 40)),
    "symmetric .999": with_eigenvalues(line(-0.999, 0.999, 40)),
    "positive .999": with_eigenvalues(line(0, 0.999, 40)),
    "non-normal .99": triangular(40, 0.99),
    "non-normal .999": triangular(40, 0.999),
    "skew 5": skew(40, 5.0),
    "rotation 1.2": rotation(40, 0.6),
    "rotation 5": rotation(40, 0.3, 5.0),
    "indefinite": with_eigenvalues(line(-3, 3, 30)),
    "below -1": with_eigenvalues(line(-8, 0.5, 40)),
}


def exact(a, v):
    """(1 - Aᵀ)⁻¹ v, row by row, in float64; a: one matrix, or one a sample."""
    eye = torch.eye(a.shape[-1], dtype=torch.float64)
    return torch.linalg.solve(eye - a.double().mT, v.double()[..., None])[..., 0]


def adjoint(a, v, backend="auto", solver=None, most=400, tolerance=None, **options):
    """What the adjoint of x ↦ A x + z gives for v, and its record; a: [N, N] or [B, N, N]."""
    z = torch.zeros_like(v).requires_grad_()

    def g(x, z, *a):
        return (a[0] @ x[..., None])[..., 0] + z

    shared = a.dim() == 2
    inputs, params = ((z,), (a,)) if shared else ((z, a), ())
    solution = fixed_point(
        g,
        torch.zeros_like(v),
        *inputs,
        params=params,
        solver=Picard(),
        tolerance=Tolerance(0, 0),
        max_iterations=1,
        adjoint=ImplicitAdjoint(solver or BiCGSTAB(), tolerance, most),
        backend=backend,
        **{"on_failure": "return", "per_sample": True} | options,
    )
    (c,) = torch.autograd.grad(solution.x, z, v)
    return c, solution.adjoint


def error(c, expected):
    """[B], relative."""
    norm = torch.linalg.vector_norm
    return norm(c.double() - expected, dim=1) / norm(expected, dim=1)


def residual(a, c, v):
    """[B]: ‖Aᵀ c + v − c‖ in float64."""
    mc = (a.double().mT @ c.double()[..., None])[..., 0]
    return torch.linalg.vector_norm(mc + v.double() - c.double(), dim=1)
