"""Solves whose samples have tolerances and iteration limits of their own."""

import torch

from fpi_cuda import ImplicitAdjoint, Status, Tolerance, fixed_point

B, N = 6, 3
RTOL = torch.tensor([5e-1, 5e-2, 0.0, 0.0, 1e-2, 1e-1])
ATOL = torch.tensor([0.0, 0.0, 6e-2, 0.0, 0.0, 1e-2])
MOST = torch.tensor([60, 60, 60, 4, 3, 1])
CONVERGED, LIMIT = Status.CONVERGED, Status.MAX_ITERATIONS
ENDS = [CONVERGED, CONVERGED, CONVERGED, LIMIT, LIMIT, LIMIT]


def sine(x, z):
    """No product of torch's: a sample's bits are the same in any batch."""
    return 0.8 * torch.sin(x) + z


def inputs(dtype=torch.float64, b=B):
    z = 2 + torch.rand(b, N, generator=torch.Generator().manual_seed(3))
    return z.to(dtype).requires_grad_()


def solve(z, rtol=RTOL, atol=ATOL, most=MOST, g=sine, **options):
    """The same limits forward and backward."""
    own = {"tolerance": Tolerance(rtol, atol), "max_iterations": most}
    options = {"adjoint": ImplicitAdjoint(**own), "on_failure": "return", **options}
    return fixed_point(g, torch.zeros_like(z), z, **own, **options)


def account(s, z):
    """All that a solve gives, forward and backward."""
    (grad,) = torch.autograd.grad(s.x.sum(), z)
    of = [(r.status, r.iterations, r.residual_norm, r.contraction) for r in (s, s.adjoint)]
    return [s.x, grad, *of[0], *of[1]]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
