"""The recorder of CUDA graphs, with graphs that need no device: how a capture begins and ends."""

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch

from fpi_cuda.drivers import capture


class Graph:
    """A capture whose end may fail, and that tells whether cycles were collected meanwhile."""

    ends = True
    made: list = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, keep_graph=False):
        self.collected = None
        Graph.made.append(self)

    def capture_begin(self, pool=None, capture_error_mode="global"):
        self.collected = gc.isenabled()

    def capture_end(self):
        if not self.ends and len(Graph.made) == 1:  # the one after it serves to recover
            raise RuntimeError("capture invalidated")


@pytest.fixture
def recorder(monkeypatch):
    Graph.made.clear()
    monkeypatch.setattr(Graph, "ends", True)
    cuda = SimpleNamespace(CUDAGraph=Graph, synchronize=lambda _: None)
    cuda.stream = lambda _: contextlib.nullcontext()
    monkeypatch.setattr(torch, "cuda", cuda)
    forgotten = []
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        forget = lambda *a, name=name: forgotten.append(name)  # noqa: E731
        monkeypatch.setattr(torch._C, name, forget, raising=False)
    monkeypatch.setattr(capture, "_BROKEN", [])
    made = object.__new__(capture.CudaRecorder)
    made.device, made.stream, made.pool, made.graphs = torch.device("cpu", 0), None, (0, 0), []
    made.forgotten = forgotten
    return made


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, died):
        self.me, self.died = self, died

    def __del__(self):
        self.died.append(gc.isenabled())


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_during_a_capture(recorder, enabled):
    died = []
    Cycle(died)

    def run():
        assert died == [enabled], "garbage of before is gone before"
        Cycle(died)
        kept = [[] for _ in range(5000)]  # would wake the collector
        assert len(died) == 1, len(kept)

    try:
        if not enabled:
            gc.disable()
        recorder.record(run)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    gc.collect()
    assert len(died) == 2
    assert [g.collected for g in recorder.graphs] == [False]


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_fails_says_why_and_a_broken_one_is_kept(recorder, monkeypatch, ends):
    monkeypatch.setattr(Graph, "ends", ends)

    def run():
        raise ValueError("g is wrong")

    with pytest.raises(ValueError, match="g is wrong"):
        recorder.record(run)
    assert gc.isenabled()
    assert recorder.graphs == []
    # torch's allocators may ask a broken one later whether a stream is its own.
    assert ([] if ends else Graph.made[:1]) == capture._BROKEN
    assert ("_cuda_releasePool" in recorder.forgotten) is not ends
    assert len(Graph.made) == (1 if ends else 2), "a capture that ends well follows a broken one"


def test_a_warm_up_that_fails_is_waited_for(recorder):
    waits = []
    current = SimpleNamespace(wait_stream=lambda stream: waits.append(("current", stream)))
    recorder.stream = SimpleNamespace(wait_stream=lambda stream: waits.append(("side", stream)))
    torch.cuda.current_stream = lambda _: current

    def run():
        raise ValueError("g is wrong")

    with pytest.raises(ValueError, match="g is wrong"):
        recorder.warm_up(run)
    assert waits == [("side", current), ("current", recorder.stream)]


def test_torch_has_what_a_recorder_needs():
    """Private names of torch's, and `keep_graph`: on a build with CUDA."""
    if torch.version.cuda is None:
        pytest.skip("torch has no CUDA")
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        assert hasattr(torch._C, name), name
    assert {"raw_cuda_graph", "replay", "capture_begin"} <= set(dir(torch.cuda.CUDAGraph))
