"""CPU memory that is kept between solves."""

import torch

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
