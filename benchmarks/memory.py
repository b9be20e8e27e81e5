"""Peak memory of a call: what allocators hold beyond what lived before it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
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
    held = top = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    return top


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
