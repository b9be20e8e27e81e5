"""What the tests share: tolerances by dtype, problems with known answers, slow and sure oracles."""

import json

import torch
from torch import nn

from fpi_cuda import Anderson, ImplicitAdjoint, Picard, Tolerance

SOLVERS = {"picard": Picard(), "anderson": Anderson()}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# A solve to about ten times the rounding level of float64, forward and backward.
TIGHT = Tolerance(1e-13, 1e-14)
TIGHT_ADJOINT = ImplicitAdjoint(tolerance=Tolerance(1e-13))

# (rtol, atol) of one expression evaluated in another order.
ROUNDED = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (2e-5, 1e-6),
    torch.float16: (4e-3, 1e-3),
    torch.bfloat16: (3e-2, 1e-2),
}


def assert_close(actual, expected, table=ROUNDED, dtype=None):
    """Compare with a float64 oracle, at the table's tolerance for the dtype of `actual`."""
    rtol, atol = table[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def assert_solved(actual, expected, batch_dims=1, factor=6):
    """Compare a solve at the dtype's default tolerance, or its gradient, with a float64 oracle.

    By the norm of each sample, as the stop rule does. The error of x is rate/(1 - rate) times the
    residual, the gradient's the adjoint's own plus what the error of x causes: for maps with a rate
    up to 0.6, six times the tolerance bounds both.
    """
    assert actual.shape == expected.shape
    rtol, atol = Tolerance().resolve(actual.dtype)
    rows = len(actual) if batch_dims else 1
    width = actual.numel() // max(rows, 1)
    a, e = (t.detach().double().reshape(rows, width) for t in (actual, expected))
    norm = torch.linalg.vector_norm
    allowed = factor * (atol * a.shape[1] ** 0.5 + rtol * norm(e, dim=1))
    error = norm(a - e, dim=1)
    assert (error <= allowed).all(), f"errors {error.tolist()}, allowed {allowed.tolist()}"


def contraction(n, k, seed=0, dtype=torch.float64):
    """An [n, n] matrix with spectral norm k."""
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (a * (k / torch.linalg.matrix_norm(a, 2))).to(dtype)


def linear(x, z, a):
    """g of the linear problem: row-wise A x + z. A is shared."""
    return x @ a.mT + z


def linear_solution(z, a):
    """Its fixed point, (I - A)^-1 z, by a dense solve."""
    eye = torch.eye(len(a), dtype=a.dtype)
    return torch.linalg.solve(eye - a, z.mT).mT


def row_tanh(x, z, w):
    """A g whose every row is summed in a fixed order: exactly the same in any batch."""
    total = torch.zeros_like(x)
    for j in range(x.shape[1]):
        total = total + x[:, j : j + 1] * w[:, j]
    return torch.tanh(total + z)


def unroll(g, x, *tensors, steps):
    """The differentiable loop."""
    for _ in range(steps):
        x = g(x, *tensors)
    return x


class Net(nn.Module):
    """A small FPI_NN map, a contraction for the weights it starts with."""

    def __init__(self, n=3, d=2, hidden=3, dtype=torch.float64, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.a = nn.Linear(n, hidden, dtype=dtype)
            self.b = nn.Linear(d, hidden, bias=False, dtype=dtype)
            self.c = nn.Linear(hidden, n, dtype=dtype)
        with torch.no_grad():
            for layer in (self.a, self.c):
                norm = torch.linalg.matrix_norm(layer.weight.double(), 2)
                layer.weight.mul_((0.7 / norm).to(dtype))

    def forward(self, x, z):
        return self.c(torch.tanh(self.a(x) + self.b(z)))


class Energy(nn.Module):
    """A strongly convex FPI_GD energy: 0.5 |x - P a|^2 + sum softplus(W x + b)."""

    def __init__(self, n=3, d=2, hidden=2, dtype=torch.float64, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.w = nn.Linear(n, hidden, dtype=dtype)
            self.p = nn.Linear(d, n, bias=False, dtype=dtype)

    def forward(self, x, a):
        fit = 0.5 * (x - self.p(a)).square().sum(1)
        return fit + nn.functional.softplus(self.w(x)).sum(1)


class Counter:
    """Wraps a callable and counts its calls."""

    def __init__(self, f):
        self.f = f
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        return self.f(*args)


def write_results(path, facts, rows):
    """A benchmark's file as the harness writes it."""
    rows = [r | {"index": i} for i, r in enumerate(rows)]
    entries = [
        {
            "extra_info": {key: value for key, value in r.items() if key != "samples"},
            "stats": {"data": r["samples"]},
        }
        for r in rows
        if "samples" in r
    ]
    untimed = [r for r in rows if "samples" not in r]
    path.write_text(json.dumps({"facts": facts, "benchmarks": entries, "untimed": untimed}))
    return path
