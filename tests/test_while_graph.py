"""The loop that a device ends itself, without the driver above it."""

from __future__ import annotations

import pytest
import torch

from fpi_cuda import _build
from fpi_cuda.drivers.capture import no_while_node

on_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or no_while_node(torch.device("cuda", 0)) is not None,
    reason="needs a CUDA device, its driver of 12.4 or newer, and a build with CUDA",
)


class Loop:
    """Adds 1 to `total` five times, by a WHILE node."""

    def __init__(self):
        self.total = torch.zeros(1, device="cuda")
        self.tally = torch.tensor([1, 0, 0], dtype=torch.int32, device="cuda")
        self.total.add_(1), self.tally[2:].add_(1), self.tally[2:].zero_()  # nothing loads later
        torch.cuda.synchronize()
        self.graphs = [torch.cuda.CUDAGraph(keep_graph=True) for _ in range(2)]
        with torch.cuda.graph(self.graphs[0]):
            self.tally[2:].zero_()
            self.total.zero_()
        with torch.cuda.graph(self.graphs[1]):
            self.tally[2:].add_(1)
            self.total.add_(1)

    def made(self):
        before, body = (graph.raw_cuda_graph() for graph in self.graphs)
        return _build.cuda.WhileGraph(before, body, 0, self.tally.data_ptr(), 5)

    def run(self, loop):
        loop.launch(torch.cuda.current_stream().cuda_stream)
        return float(self.total)


@on_cuda
@pytest.mark.cuda
def test_a_loop_on_cuda_runs_as_often_as_it_is_launched():
    loop = Loop()
    made = loop.made()
    assert [loop.run(made) for _ in range(3)] == [5.0] * 3


@on_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_a_loop_on_cuda_may_end_and_begin_during_a_capture(mode):
    """As when Python's collector finds one there. The capture goes on, and what was made works."""
    loop = Loop()
    dying = loop.made()
    assert loop.run(dying) == 5
    x = torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        x.add_(1)
        del dying
        born = loop.made()
        x.add_(1)
    graph.replay()
    assert x.tolist() == [2.0] * 3
    assert loop.run(born) == 5
