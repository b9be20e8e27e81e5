"""A recorder of the graph driver that needs no device: a tape of operators, repeated by Python.

As a CUDA graph does, it repeats them on the very same tensors: Python runs at capture only, values
and addresses are those of the capture.
"""

import weakref
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fpi_cuda.drivers import graph


class Tape(TorchDispatchMode):
    """The operators of one capture, and their repetition on the very same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if tensor(t)}
        new = [t for t in tree_leaves(out) if tensor(t)]
        fresh = [t.untyped_storage()._cdata not in given for t in new]
        plain = tree_map(lambda t: t.detach() if tensor(t) else t, (args, kwargs))
        self.calls.append((func, *plain, [t.detach() for t in new], fresh))
        return out

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, outs, fresh in self.calls:
                again = [t for t in tree_leaves(func(*args, **kwargs)) if tensor(t)]
                for old, new, own in zip(outs, again, fresh, strict=True):
                    if own:
                        old.copy_(new)


def tensor(t):
    return isinstance(t, torch.Tensor)


class TapeRecorder:
    made: ClassVar[list] = []
    unroll, note = 1, ""

    def __init__(self, device):
        self.device, self.tapes, self.launches = device, [], 0
        TapeRecorder.made.append(weakref.ref(self))

    def random_state(self):
        return torch.get_rng_state()

    def restore_random_state(self, state):
        torch.set_rng_state(state)

    def warm_up(self, run):
        run()

    def record(self, run):
        tape = Tape()
        with tape:
            run()
        self.tapes.append(tape)

    def loop(self, tally, max_iterations):
        before, body, *after = self.tapes

        def launch():
            self.launches += 1
            before.replay()
            while True:  # the condition starts as 1
                body.replay()
                if not (tally[0] > 0 and tally[2] < max_iterations):
                    break
            for tape in after:
                tape.replay()

        return launch


@pytest.fixture(name="tape")
def tape_fixture(monkeypatch, whole_batch):
    monkeypatch.setitem(graph.RECORDERS, "cpu", TapeRecorder)
    TapeRecorder.made.clear()
    return TapeRecorder


def captures():
    return len(TapeRecorder.made)


def problem(b=5, n=3, seed=0):
    return torch.randn(b, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
