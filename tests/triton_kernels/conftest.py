"""Where there is no GPU, triton's interpreter runs the kernels of this folder's tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import HERE, INTERPRETED

if not HERE:
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETED:
    from interpreted import interpreter
else:
    with torch.device("cuda"):  # torch lists its constructors now, before any is patched
        torch.empty(0)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The device that the tests' tensors are made on: the GPU, or the CPU under the interpreter."""
    if not INTERPRETED:
        with torch.device("cuda"):
            yield "cuda"
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(interpreter, "_patch_lang", _PatchOnce(interpreter._patch_lang))
    with np.errstate(all="ignore"):  # a kernel computes with NaN and Inf where it has to
        yield "cpu"


@pytest.fixture(params=["whole", "cut"])
def plan(request, monkeypatch):
    """How rows lie over programs: as they do, or beyond 64 in parts of two short blocks.

    Of these the last part's second block may be empty.
    """
    from fpi_cuda.backends.triton import anderson, picard, rows

    def cut(n, dtype):
        chunks = 1 if n <= 64 else 2
        return rows.Plan(32, chunks, max(1, -(-n // (32 * chunks))), 1)

    if request.param == "cut":
        for module in (rows, picard, anderson):
            monkeypatch.setattr(module, "plan_of", cut)
    return request.param


class _PatchOnce:
    """Replaces triton.language by the interpreter's functions once a launch.

    The interpreter does it again for each call of a device function; that is most of its time.
    """

    def __init__(self, patch):
        self.patch = patch
        self.patched = set()

    def __call__(self, fn):
        language = (interpreter.tl, interpreter.tl.core)
        modules = {m for m in language if any(v is m for v in fn.__globals__.values())}
        if modules <= self.patched:
            return None
        scope = self.patch(fn)
        if not self.patched:  # a launch: its scope is the one that is restored
            restore = scope.restore
            scope.restore = lambda: (self.patched.clear(), restore())
        self.patched |= modules
        return scope
