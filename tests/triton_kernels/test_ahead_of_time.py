"""Every step kernel compiled for sm_80 and sm_90 without a device: what it takes, and how often.

The file is also the list of jobs that the compiling processes do; see ahead_of_time.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ahead_of_time import MOST_SHARED, compiled_launches, in_own_processes

from fpi_cuda.record import TRAIL, Limits, Progress, accumulate_dtype

DTYPES = ("float64", "float32", "float16", "bfloat16")
HISTORY = 5
KERNELS = {
    *("_picard_row", "_picard_parts", "_picard_decide", "_picard_move"),
    *("_anderson_row", "_anderson_parts", "_anderson_decide", "_anderson_move"),
}
COUNTED = "for any batch"

# Bytes of a thread, the most of the ptxas of Triton 3.6 to 3.8: a few numbers that they set aside
# to keep a kernel to a step of registers, and with that one more program of it on a multiprocessor.
# All others have none.
SET_ASIDE = {
    ("float64 sm_80", "_anderson_row"): 8,
    ("float64 sm_80", "_picard_row"): 16,
    ("float64 sm_80", "_anderson_decide"): 24,
    ("float64 sm_90", "_anderson_row"): 72,
    ("float64 sm_90", "_picard_row"): 16,
    ("float64 sm_90", "_anderson_decide"): 32,
    ("float32 sm_80", "_anderson_row"): 16,
    ("float32 sm_80", "_picard_decide"): 8,
    ("float32 sm_80", "_anderson_decide"): 40,
    ("float32 sm_90", "_anderson_row"): 8,
    ("float32 sm_90", "_picard_row"): 8,
    ("float32 sm_90", "_anderson_decide"): 40,
    ("float16 sm_80", "_anderson_decide"): 40,
    ("float16 sm_90", "_anderson_row"): 8,
    ("float16 sm_90", "_anderson_decide"): 32,
    ("bfloat16 sm_80", "_anderson_row"): 8,
    ("bfloat16 sm_80", "_anderson_decide"): 48,
    ("bfloat16 sm_90", "_anderson_decide"): 32,
}


def launch(n, dtype, beta, rows=2, samples=None, max_iterations=10, own=False):
    """The launches of every operator, of rows that are samples or an index of them.

    own: whether each sample has limits of its own.
    """
    from fpi_cuda.backends import triton

    b = samples or rows
    limits = Limits(1e-2, 0.0, 0.0, 10, max_iterations)
    if own:
        limits = replace(limits, own=torch.zeros(b, 5, dtype=accumulate_dtype(dtype)))
    p = Progress(torch.empty(b, n, dtype=dtype), limits)
    if samples:
        p.narrow(torch.arange(rows))
    x, gx = torch.zeros(rows, n, dtype=dtype), torch.zeros(rows, n, dtype=dtype)
    memory = [torch.zeros(b, HISTORY, n, dtype=dtype), torch.zeros(b, HISTORY, n, dtype=dtype)]
    gram = torch.zeros(b, HISTORY, HISTORY, dtype=p.dtype)
    trail = torch.zeros(b, TRAIL, n, dtype=dtype)
    triton.picard_step(p, x, gx, beta, trail)
    triton.anderson_step(p, x, gx, beta, 1e-3, 10.0, *memory, gram)


def every_kernel(dtype, arch):
    """The widest row that one program takes, and a long one, damped and not."""
    with compiled_launches(arch) as launches:
        for n in (1024 if dtype == torch.float64 else 2048, 40000):
            for beta in (1.0, 0.6):
                # Of these float64's registers are the scarce ones.
                launch(n, dtype, beta, own=beta != 1.0 and dtype == torch.float64)
    return launches


def any_batch():
    """Batches of 1 to 1024 samples, compacted or not, and other limits: each compilation once."""
    with compiled_launches(90) as launches:
        for n in (256, 8192):
            for rows, samples in ((1, None), (2, 7), (16, 1024), (33, 64), (1024, None)):
                launch(n, torch.float32, 1.0, rows, samples, max_iterations=rows)
    return list({id(facts): facts for facts in launches}.values())


def jobs():
    for dtype in DTYPES:
        for arch in MOST_SHARED:
            yield f"{dtype} sm_{arch}", partial(every_kernel, getattr(torch, dtype), arch)
    yield COUNTED, any_batch


@pytest.fixture(scope="module")
def facts():
    return in_own_processes(Path(__file__))


@pytest.mark.parametrize("arch", list(MOST_SHARED))
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_spills_or_takes_more_shared_memory_than_there_is(facts, dtype, arch):
    ours = [f for f in facts if f.job == f"{dtype} sm_{arch}"]
    assert {f.kernel for f in ours} == KERNELS
    assert {f.arch for f in ours} == {arch}
    assert [f for f in ours if f.stack > SET_ASIDE.get((f.job, f.kernel), 0)] == []
    assert [f for f in ours if f.shared > MOST_SHARED[arch]] == []


def test_nothing_is_compiled_anew_for_another_batch(facts):
    times = Counter(f.kernel for f in facts if f.job == COUNTED)
    assert times == dict.fromkeys(KERNELS, 1)
