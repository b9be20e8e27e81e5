"""What the backward takes from the forward and what not, and samples that fail in it alone."""

import pytest
import torch
from helpers import contraction
from torch.autograd import grad

from fpi_cuda import Anderson, ImplicitAdjoint, Picard, Status, Tolerance, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")

orders = pytest.mark.parametrize("create_graph", [False, True], ids=["first order", "any order"])


@orders
@pytest.mark.parametrize("tolerance", [Tolerance(0.5, 1.0), Tolerance(1e-6), Tolerance(0, 0)])
def test_the_forwards_tolerance_is_not_the_gradients(backend, dtype, tolerance, create_graph):
    z = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    s = fixed_point(
        lambda x, z: 0.5 * torch.sin(x) + z,
        torch.zeros_like(z),
        z,
        tolerance=tolerance,
        backend=backend,
        per_sample=True,
        max_iterations=60,
        on_failure="return",
    )
    grad(s.x.sum(), z, create_graph=create_graph)
    default, _ = Tolerance().resolve(dtype)
    limits = s.adjoint.progress.limits
    assert (limits.rtol, limits.offset) == (default, 0)


@orders
@pytest.mark.parametrize("solver", [Picard(0.6), Anderson(2), Anderson(5, beta=0.5)])
def test_the_forwards_solver_is_the_gradients_with_all_its_numbers(backend, solver, create_graph):
    w = contraction(12, 0.95)

    def backward(adjoint):
        z = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 12).requires_grad_()
        s = fixed_point(
            lambda x, z, w: torch.tanh(x @ w) + z,
            torch.zeros_like(z),
            z,
            params=(w,),
            solver=solver,
            adjoint=adjoint,
            tolerance=Tolerance(1e-9),
            backend=backend,
            per_sample=True,
        )
        (found,) = grad(s.x.sin().sum(), z, create_graph=create_graph)
        return s.adjoint.iterations.tolist(), found

    count, found = backward(ImplicitAdjoint())
    expected, gradient = backward(ImplicitAdjoint(solver=solver))
    assert count == expected
    assert torch.equal(found, gradient)
    plain, _ = backward(ImplicitAdjoint(solver=type(solver)()))
    assert plain != count


@orders
def test_a_sample_that_fails_in_the_backward_alone_has_no_gradient(backend, create_graph):
    """All are at their fixed point, 0; there the second expands, the third has no derivative."""
    slope, at = torch.tensor([[0.5], [20.0], [0.5]]), torch.tensor([[1.0], [1.0], [0.0]])
    w = torch.tensor(0.25, requires_grad=True)

    def solve(failed):
        z = torch.full((3, 1), -0.25, requires_grad=True)
        s = fixed_point(
            lambda x, z, slope, at, w: (
                slope * torch.tanh(x) + 0.2 * (torch.sqrt(x + at) - torch.sqrt(at)) + (z + w)
            ),
            torch.zeros_like(z),
            z,
            slope,
            at,
            params=(w,),
            solver=Picard(),
            backend=backend,
            per_sample=True,
            on_failure="return",
            adjoint=ImplicitAdjoint(failed=failed),
        )
        assert s.converged.all()
        found = grad(s.x.sum(), (z, w), create_graph=create_graph)
        assert s.adjoint.status.tolist() == [0, Status.DIVERGED, Status.NONFINITE]
        return [t.detach() for t in found]

    for_z, for_w = solve("mask")
    torch.testing.assert_close(for_z[0], torch.tensor([2.5]), rtol=1e-3, atol=0)
    assert for_z[1:].tolist() == [[0], [0]]
    assert for_w == for_z[0]
    for_z, _ = solve("use")
    assert for_z[1].abs() > 1e3
