"""Solves on the small stacks that threads of other libraries have."""

import threading

import pytest
import torch

from fpi_cuda import Anderson, DenseStep, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("history", [5, 13, 64])
def test_anderson_needs_no_large_stack(history):
    """128 KiB, forward and backward; a system of 63 differences alone would take twice that."""
    step = DenseStep(16, 4).double()
    z = torch.randn(30, 4, dtype=torch.float64)
    x0 = torch.zeros(30, 16, dtype=torch.float64)
    converged = []

    def solve():
        for driver in ("whole", "eager"):
            leaf = z.clone().requires_grad_()
            s = fixed_point(step, x0, leaf, solver=Anderson(history), driver=driver)
            s.x.sum().backward()
            converged.append(bool(s.converged.all() and s.adjoint.converged.all()))

    solve()  # what is imported or built once is
    before = threading.stack_size(128 * 1024)
    try:
        thread = threading.Thread(target=solve)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert converged == [True] * 4
