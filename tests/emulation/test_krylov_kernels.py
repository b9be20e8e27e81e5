"""The bodies of BiCGSTAB's CUDA kernels on the host, beside the oracle; see test_kernels."""

from __future__ import annotations

import pytest
import torch
from helpers_bicgstab import check_steps
from machine import FORWARD, RANDOM, REVERSE, Machine, assert_each_is_needed
from test_kernels import BLOCK_ROW, PLANS, WARP_ROW, length
from test_primitives import DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = [
    *(("sanitized", FORWARD, dtype) for dtype in DTYPES),
    ("sanitized", REVERSE, torch.float32),
    ("sanitized", RANDOM, torch.float16),
    ("races", RANDOM, torch.float32),
]
# Rows, and their length: bytes, and values more. Several parts, whole packs; and odd ones.
ROWS = [(3, 0, 11), (5, 0, 33), (6, WARP_ROW, 0), (2, BLOCK_ROW, 1), (3, 3 * BLOCK_ROW, 16)]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run[0]}-{run[1]}-{run[2]}")
def run(request):
    build, order, dtype = request.param
    machine = Machine(build, order, seed=1)
    yield machine, dtype
    machine.close()


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_steps_match_the_oracle(run, rows):
    machine, dtype = run
    check_steps(machine, dtype, (rows[0], length(dtype, *rows[1:])))


@pytest.mark.parametrize("n", PLANS.values(), ids=PLANS)
def test_rows_follow_their_index(run, n):
    machine, dtype = run
    check_steps(machine, dtype, (6, n), index=[4, 1, 5, 0, 2], most=4)


def scenarios():
    """Small runs that come to every barrier and fence together."""

    def run(n, factor=1.0):
        return lambda machine: check_steps(machine, torch.float32, (4, n), 5, factor=factor)

    for n in (37, 257, 8197):
        yield run(n)
        yield run(n, 1e-20)


# What may be missing, alone, for the reasons that test_kernels gives for Picard's step.
REDUNDANT = {
    "rows.cuh: device_fence(); #2 < bicgstab_step.cuh": "what the last block reads of the others",
    "rows.cuh: device_fence(); #3": "counts, in their order",
    "rows.cuh: device_fence(); #4": "counts, read by the last",
}


def test_every_barrier_and_fence_is_needed(start):
    def concerns(chain):
        return "bicgstab_step.cuh" in chain

    machine = start("races", RANDOM, 5)
    assert_each_is_needed(machine, scenarios(), REDUNDANT, at_least=12, concerns=concerns)
