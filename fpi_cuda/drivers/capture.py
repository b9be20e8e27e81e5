"""What turns callables into something that the device repeats: torch's capture, and a loop.

With the native library the loop is a conditional WHILE node, and the host launches once. Without it
the host replays the captured iterations, a few at a time, and reads late whether one is needed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from .. import _build
from .._torch import clear_cublas_workspaces, end_pool
from ..backends import native
from . import eager

__all__ = ["RECORDERS", "CudaRecorder", "Recorder"]


class Recorder(Protocol):
    """What turns callables into something the device repeats. Tests have one in plain Python."""

    unroll: int  # iterations that are recorded in a row, and repeated together
    note: str  # of how they are repeated, for the record of a solve

    def __init__(self, device: torch.device) -> None: ...

    def random_state(self) -> Tensor:
        """The state of the device's generator."""

    def restore_random_state(self, state: Tensor) -> None:
        """Put it back."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run outside any capture what is to be recorded."""

    def record(self, run: Callable[[], None]) -> None:
        """The next of: what comes before the loop, one iteration, what follows (if any)."""

    def loop(self, tally: Tensor, max_iterations: int) -> Callable[[], None]:
        """A launch of what was recorded; iterates at least while tally[0] > 0."""


UNROLL = 4  # iterations of a replay: the host needs as long for one as for four


@functools.cache
def no_while_node(device: torch.device) -> str | None:
    """Why this build or machine has no loops on the device, or None."""
    if _build.cuda is None:
        return "this build has no CUDA library"
    lacking = native.missing(device)
    if lacking is not None:
        return lacking
    version = _build.cuda.driver_version()
    if version < 12040:
        return f"the CUDA driver is for {version // 1000}.{version % 1000 // 10}, before 12.4"
    return None


class CudaRecorder:
    """torch's capture, and the WHILE node that torch has no binding for; without it, replays."""

    def __init__(self, device: torch.device) -> None:
        reason = no_while_node(device)
        self.unroll = 1 if reason is None else UNROLL
        self.note = "" if reason is None else f" (replayed {UNROLL} iterations at a time: {reason})"
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []  # they own the memory that the kernels use

    def random_state(self) -> Tensor:
        """Of the default generator: seed and offset."""
        return torch.cuda.get_rng_state(self.device)

    def restore_random_state(self, state: Tensor) -> None:
        """Put it back."""
        torch.cuda.set_rng_state(state, self.device)

    def warm_up(self, run: Callable[[], None]) -> None:
        """On a side stream, as torch demands before a capture."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                run()
        finally:  # what is freed after a failure may still be written to
            current.wait_stream(self.stream)

    def record(self, run: Callable[[], None]) -> None:
        """Capture on the side stream; leaves torch able to capture and to draw after a failure."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.stream(self.stream), _own_workspaces(), _no_collection():
            torch.cuda.synchronize(self.device)
            # Other threads may allocate meanwhile; only this one is held to what a capture allows.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                run()
                graph.capture_end()
            except BaseException:  # it is the one that tells, not what ending the capture says
                try:
                    graph.capture_end()
                except RuntimeError:
                    _BROKEN.append(graph)
                    self._recover()
                raise
        self.graphs.append(graph)

    def _recover(self) -> None:
        """A broken capture leaves torch's allocator and generator believing that it goes on."""
        end_pool(self.device.index, self.pool)
        graph = torch.cuda.CUDAGraph()  # one that ends well takes the generator out of it
        scrap = torch.zeros(1, device=self.device)
        torch.cuda.synchronize(self.device)
        graph.capture_begin(capture_error_mode="thread_local")
        scrap.zero_()
        graph.capture_end()

    def loop(self, tally: Tensor, max_iterations: int) -> Callable[[], None]:
        """One launch on the current stream, or replays on it."""
        launch = self._while_node if no_while_node(self.device) is None else self._replays
        with torch.cuda.device(self.device):
            run = launch(tally, max_iterations)

        def on_device() -> None:
            with torch.cuda.device(self.device):
                run()

        return on_device

    def _while_node(self, tally: Tensor, max_iterations: int) -> Callable[[], None]:
        handles = [graph.raw_cuda_graph() for graph in self.graphs]
        before, body, after = (*handles, 0)[:3]
        loop = _build.cuda.WhileGraph(before, body, after, tally.data_ptr(), max_iterations)
        return lambda: loop.launch(torch.cuda.current_stream(self.device).cuda_stream)

    def _replays(self, tally: Tensor, max_iterations: int) -> Callable[[], None]:
        before, body, *after = self.graphs
        most = -(-max_iterations // self.unroll)
        slots = [eager.PinnedSlot() for _ in range(eager.LAG + 1)]

        def run() -> None:
            before.replay()
            read = eager.LateRead(slots, 1, most)
            for _ in range(most):
                body.replay()
                if read(tally)[0] == 0:
                    break
            for graph in after:
                graph.replay()

        return run


# Captures that could not be ended. torch's allocators of device and of pinned memory may still ask
# one whether a stream belongs to it, and no binding takes it out of both, so none is ever freed.
_BROKEN: list[torch.cuda.CUDAGraph] = []


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No object that dies in a cycle may free what a capture forbids to free: a graph, say."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS takes its workspaces anew, from the graph's memory, and leaves them there."""
    clear_cublas_workspaces()
    try:
        yield
    finally:
        clear_cublas_workspaces()


# By device type: where there is a graph driver at all.
RECORDERS: dict[str, type[Recorder]] = {"cuda": CudaRecorder}
