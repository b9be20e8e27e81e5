"""Matrices with known trouble, and gradients of linear maps beside dense float64 solves."""

import math

import torch

from fpi_cuda import BiCGSTAB, ImplicitAdjoint, Picard, Status, Tolerance, fixed_point
from fpi_cuda.backends import krylov, reference
from fpi_cuda.record import STATUS, WINDOW, Limits, Progress, accumulate_dtype


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


def memory_of(b, n, dtype):
    """What the operator keeps, with NaN where nothing was written."""
    acc = accumulate_dtype(dtype)
    return (
        torch.full((b, krylov.STATES, n), math.nan, dtype=dtype),
        torch.full((b, krylov.VECTORS, n), math.nan, dtype=acc),
        torch.full((b, krylov.NUMBERS), math.nan, dtype=acc),
    )


ROUNDED = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_steps(backend, dtype, shape, most=8, index=None, factor=1.0):
    """Every step of a solve beside the oracle's, in float64, from the same state.

    Row 0 is tiny; g of row 1 is infinite at a direction, of row 2 at an iterate, if they are there.
    """
    b, n = shape
    samples = index or list(range(b))
    w, v = 0.6 * random(n).clamp(-1, 1), factor * random(len(samples), n, seed=1)
    v[0] *= 1e-3 if dtype == torch.float16 else 1e-30
    limits = Limits(rtol=1e-9, offset=0.0, rounding=0.0, patience=10**6, max_iterations=most)
    x = v.to(dtype)
    p, mine = Progress(x.new_zeros(b, n), limits), memory_of(b, n, dtype)
    if index is not None:
        p.narrow(torch.tensor(index))
    for k in range(most + 1):
        gx = (x.double() * w + 0.3 * x.double().roll(1, 1) + v).to(dtype)
        if k == 3 and len(gx) > 1:
            gx[1, -1] = math.inf
        if k == most - 1 and len(gx) > 2:
            gx[2, 0] = math.nan
        q, y = Progress(p.out.double(), limits), x.double().clone()
        q.index, q.precision = p.index, p.precision
        for name in ("counters", "scalars", "tally", "out"):
            getattr(q, name).copy_(getattr(p, name))
        oracles = [t.double().clone() for t in mine]
        backend.bicgstab_step(p, x, gx, *mine)
        reference.bicgstab_step(q, y, gx.double(), *oracles)
        assert torch.equal(p.counters, q.counters), (k, p.counters, q.counters)
        assert torch.equal(p.tally, q.tally)
        assert x.isfinite().all()
        size = torch.linalg.vector_norm(y, dim=1).clamp(min=1e-37)
        off = torch.linalg.vector_norm(x.double() - y, dim=1)
        assert (off <= ROUNDED[dtype] * size).all(), (k, off / size)
        torch.testing.assert_close(
            p.scalars.double(),
            q.scalars.double(),
            rtol=ROUNDED[dtype],
            atol=ROUNDED[dtype],
            equal_nan=True,
        )
        # What nobody reads any more may differ.
        goes = (p.counters[:, WINDOW] != krylov.ITERATE) & (p.counters[:, STATUS] == 0)
        for kept, oracle in zip(mine[:2], oracles[:2], strict=True):
            t, other = kept[goes].double(), oracle[goes]
            there = other.isfinite()
            assert torch.equal(there, t.isfinite())
            t, other = (torch.where(there, s, 0) for s in (t, other))
            unit = other.abs().amax(2, keepdim=True).clamp(min=1)
            assert ((t - other).abs() <= 20 * ROUNDED[dtype] * unit).all(), k
    ended = p.counters[samples, STATUS]
    codes = (1 + Status.MAX_ITERATIONS, 1 + Status.NONFINITE, 1 + Status.CONVERGED)
    assert set(ended.tolist()) <= set(codes)
    assert torch.equal(p.out[samples], x)
