"""CPU memory that is kept between solves."""

import contextlib

import torch

from fpi_cuda import fixed_point
from fpi_cuda.backends import scratch
from fpi_cuda.backends.scratch import Scratch


def test_memory_given_back_while_some_is_taken_is_not_in_two_places(monkeypatch):
    kind = ((2, 3), torch.float32, torch.device("cpu"))
    other = Scratch()
    other.empty(*kind)

    class Meanwhile(dict):
        def __getitem__(self, key):
            nonlocal other
            kept = super().__getitem__(key)
            other = None  # gives its tensor back between the look and the pop
            return kept

    first, second = Scratch(), Scratch()
    seeded = torch.empty(2, 3)
    monkeypatch.setattr(scratch, "_kept", Meanwhile({kind[:2]: [seeded]}))
    taken = [s.empty(*kind).data_ptr() for s in (first, second, first)]
    assert len(set(taken)) == 3


def test_a_solve_on_fake_tensors_leaves_none_of_them_for_the_next(backend):
    """torch.export runs a layer on tensors without memory before it gives up."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def g(x):
        return 0.5 * x.tanh() + 1

    shape = (7, 13)  # of no other test: the first solve of a shape makes its memory
    with contextlib.suppress(Exception), FakeTensorMode():
        fixed_point(g, torch.zeros(shape), backend=backend)
    solution = fixed_point(g, torch.zeros(shape), backend=backend, on_failure="raise")
    torch.testing.assert_close(solution.x, g(solution.x), atol=1e-3, rtol=0)


def test_memory_of_a_window_lies_where_the_state_does():
    x0 = torch.zeros(7, 17)
    with torch.device("meta"):
        found = Scratch(x0).empty((7, 5, 17), torch.float32, x0.device)
    assert found.device.type == "cpu"
