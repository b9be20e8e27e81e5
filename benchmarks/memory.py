"""Peak memory of a call: what allocators hold beyond what lived before it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from fpi_cuda.backends import scratch


def peak(call: Callable[[], Any], device: str) -> int:
    """Bytes, of torch's allocator; results of the call count, inputs do not.

    On the CPU from the profiler's record of every allocation: exact, and the same in every run. The
    native kernels' scratch comes from the same allocator, and what the library keeps of it between
    solves is given back first, so that it counts.
    """
    gc.collect()
    scratch.release()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # The profiler tells of frees of what an earlier profile saw allocated, too: none of this call.
    held, top, live = 0, 0, dict[int, int]()
    for pointer, size in changes(profiler):
        if size > 0:
            live[pointer] = size
            held += size
            top = max(top, held)
        else:
            held -= live.pop(pointer, 0)
    return top


def changes(profiler: profile) -> list[tuple[int, int]]:
    """Address and bytes of every allocation and, negative, of every free, in order."""
    found = []
    nodes = list(profiler.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        if node.tag == _EventType.Allocation:
            fields = node.extra_fields
            found.append((node.start_time_ns, fields.ptr, fields.alloc_size))
        nodes += node.children
    return [(pointer, size) for _, pointer, size in sorted(found, key=lambda event: event[0])]


@contextmanager
def quiet() -> Iterator[None]:
    """The profiler writes lines of its own to the process's standard error."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
