"""torch.cuda in plain Python, for `benchmarks.stand_in`: streams, events, graphs, what it is asked.

A graph writes down the operators of its capture and repeats them on the very same tensors.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import itertools
import threading
import time
import types
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
local = threading.local()  # .capture: the graph that this thread captures; .stream: the current
state: dict[str, Any] = {"sync": "default", "allocated": 0}
tolist = torch.Tensor.tolist  # the real one


def is_tensor(t: Any) -> bool:
    return isinstance(t, torch.Tensor)


def wait(what: str) -> None:
    """The host waits for the device: not in a capture, and not unseen by the sync debug mode."""
    if (graph := getattr(local, "capture", None)) is not None:
        graph.broken = True
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
    if state["sync"] == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
    if state["sync"] == "warn":
        warnings.warn(f"called a synchronizing CUDA operation ({what})", stacklevel=2)


class Stream:
    numbers = itertools.count(1)

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device, self.cuda_stream = DEVICE, next(self.numbers)

    def wait_stream(self, other: Stream) -> None: ...
    def wait_event(self, event: Event) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        wait("Stream.synchronize")

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


DEFAULT = Stream()


class Event:
    """Has passed when it is asked for the second time, so that late reads are late."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.asked, self.at = 0, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.asked, self.at = 0, time.perf_counter()

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def synchronize(self) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * max(end.at - self.at, 1e-9)


@contextlib.contextmanager
def stream(wanted: Stream | None) -> Iterator[None]:
    before = current_stream()
    local.stream = wanted or before
    try:
        yield
    finally:
        local.stream = before


def current_stream(device: Any = None) -> Stream:
    return getattr(local, "stream", DEFAULT)


class CUDAGraph:
    """Operators as they were called, repeated on the very same tensors."""

    by_handle: ClassVar[dict[int, CUDAGraph]] = {}

    def __init__(self, keep_graph: bool = False) -> None:
        self.keep_graph, self.calls, self.broken = keep_graph, [], False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise RuntimeError(f"Unknown capture error mode {capture_error_mode}")
        if current_stream() is DEFAULT:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if getattr(local, "capture", None) is not None:
            raise RuntimeError("a capture is under way already")
        local.capture = self

    def write(self, call: tuple[Any, ...]) -> None:
        self.calls.append(call)

    def capture_end(self) -> None:
        local.capture = None
        if self.broken:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )

    def instantiate(self) -> None: ...

    def reset(self) -> None:
        self.calls.clear()

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def raw_cuda_graph(self) -> int:
        if not self.keep_graph:
            raise RuntimeError("You cannot access the raw cudaGraph_t without keep_graph=True")
        self.by_handle[id(self)] = self
        return id(self)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outs, fresh in self.calls:
            found = [t for t in tree_leaves(func(*args, **kwargs)) if is_tensor(t)]
            for old, new, own in zip(outs, found, fresh, strict=True):
                if own:
                    old.copy_(new)


@contextlib.contextmanager
def graph(
    cuda_graph: CUDAGraph,
    pool: Any = None,
    stream: Stream | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    with torch.cuda.stream(stream or Stream()):
        cuda_graph.capture_begin(pool, capture_error_mode)
        try:
            yield
        finally:
            cuda_graph.capture_end()


class WhileGraph:
    """`fpi_cuda._build.cuda.WhileGraph`: prepare, body while the tally says so, finish."""

    def __init__(
        self, prepare: int, body: int, finish: int, tally: int, max_iterations: int
    ) -> None:
        self.parts = [CUDAGraph.by_handle.get(handle) for handle in (prepare, body, finish)]
        if self.parts[0] is None or self.parts[1] is None:
            raise RuntimeError("WhileGraph: prepare and body must be graphs")
        # Of three integers at an address, which a tensor of the graphs has.
        self.tally, self.max_iterations = at_address(tally), max_iterations

    def launch(self, stream: int) -> None:
        prepare, body, finish = self.parts
        prepare.replay()
        while True:  # the condition starts as 1
            body.replay()
            active, _, iterations = tolist(self.tally)
            if not (active > 0 and iterations < self.max_iterations):
                break
        if finish is not None:
            finish.replay()


def at_address(address: int) -> torch.Tensor:
    import numpy

    memory = (ctypes.c_int32 * 3).from_address(address)
    return torch.from_numpy(numpy.frombuffer(memory, dtype=numpy.int32))


PROPERTIES = types.SimpleNamespace(
    name="stand-in",
    major=9,
    minor=0,
    multi_processor_count=2,
    total_memory=2**37,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    regs_per_multiprocessor=2**16,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


def cuda() -> dict[str, Any]:
    """The names of torch.cuda that are replaced."""

    def nothing(*_: Any, **__: Any) -> None: ...

    def set_sync_debug_mode(mode: int | str) -> None:
        state["sync"] = ("default", "warn", "error")[mode] if isinstance(mode, int) else mode

    def synchronize(device: Any = None) -> None:
        if getattr(local, "capture", None) is not None:
            wait("synchronize")

    def bytes_held(*_: Any) -> int:
        state["allocated"] += 2**20  # always some more, so that no ratio divides by zero
        return state["allocated"]

    return {
        "_lazy_init": nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": nothing,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "device": lambda *_: contextlib.nullcontext(),
        "device_of": lambda *_: contextlib.nullcontext(),
        "get_device_name": lambda *_: PROPERTIES.name,
        "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": lambda *_: PROPERTIES,
        "get_arch_list": lambda: ["sm_90"],
        "synchronize": synchronize,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": lambda: ("default", "warn", "error").index(state["sync"]),
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": current_stream,
        "default_stream": lambda *_: DEFAULT,
        "set_stream": lambda s: setattr(local, "stream", s),
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: getattr(local, "capture", None) is not None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda to, *_: torch.set_rng_state(to),
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "empty_cache": nothing,
        "memory_allocated": bytes_held,
        "memory_reserved": bytes_held,
        "max_memory_allocated": bytes_held,
        "max_memory_reserved": bytes_held,
        "reset_peak_memory_stats": nothing,
        "memory_stats": lambda *_: collections.defaultdict(int),
        "mem_get_info": lambda *_: (2**36, 2**37),
        "_sleep": nothing,
    }
