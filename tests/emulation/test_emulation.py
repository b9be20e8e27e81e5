"""What the emulation finds out, on bodies that are right but for one fault."""

from __future__ import annotations

import pytest
import torch
from machine import FORWARD, RANDOM, REVERSE, EmulationError, Machine, places

ORDERS = [(FORWARD, 0), (REVERSE, 0), (RANDOM, 1), (RANDOM, 2)]
SKIPS_BARRIER, TWO_BARRIERS, SKIPS_SHUFFLE, OVERRUN, UNWRITTEN, STALE_READ = range(6)
SKIPS_MATRICES, PARTS_BEFORE_MATRICES, JOINS_BEFORE_MATRICES = range(6, 9)


@pytest.fixture(params=["sanitized", "races"])
def build(request):
    return request.param


def total(machine: Machine, count: int = 1000, blocks: int = 7) -> float:
    values = torch.arange(count, dtype=torch.float32)  # whole numbers: any order gives the sum
    arrays = {
        "values": values,
        "partials": torch.full((blocks,), torch.nan),
        "arrivals": torch.zeros(1, dtype=torch.int32),
        "total": torch.full((1,), torch.nan),
    }
    machine.call("sum", arrays, count=count, blocks=blocks)
    assert arrays["arrivals"] == 0
    return float(arrays["total"])


def test_every_order_gives_the_sum(build, start):
    for order, seed in ORDERS:
        for alive in (1, 3, 7):
            assert total(start(build, order, seed, alive)) == 999 * 1000 / 2


def test_lanes_exchange(build, start):
    values = torch.randn(64)
    for order, seed in ORDERS:
        arrays = {"values": values, "reversed": torch.full((64,), torch.nan)}
        start(build, order, seed).call("reversed", arrays)
        assert torch.equal(arrays["reversed"], values.view(2, 32).flip(1).reshape(-1))


@pytest.mark.parametrize(
    ("fault", "build_name", "message"),
    [
        (SKIPS_BARRIER, "sanitized", "ended"),
        (TWO_BARRIERS, "sanitized", "selftest.cpp.*others at .*selftest.cpp"),
        (SKIPS_SHUFFLE, "sanitized", "stuck: 31 lanes of a warp wait at .*selftest.cpp"),
        (OVERRUN, "sanitized", "heap-buffer-overflow"),
        (UNWRITTEN, "races", "nobody wrote shared memory.*read by .* at .*selftest.cpp"),
        (STALE_READ, "races", "race in shared_by_blocks.*write by .*selftest.cpp.*read by"),
        (SKIPS_MATRICES, "sanitized", "others at .*selftest.cpp|stuck: 31 lanes"),
        (PARTS_BEFORE_MATRICES, "races", "came by different ways, .* to .*selftest.cpp"),
    ],
)
def test_faults_are_told(fault, build_name, message, start):
    for order, seed in ORDERS:
        shared = {"shared_by_blocks": torch.zeros(4, dtype=torch.int32)}
        with pytest.raises(EmulationError, match=message):
            start(build_name, order, seed).call("faulty", shared, fault=fault)


def test_a_barrier_joins_lanes_for_a_warps_instruction(build, start):
    for order, seed in ORDERS:
        shared = {"shared_by_blocks": torch.zeros(4, dtype=torch.int32)}
        start(build, order, seed).call("faulty", shared, fault=JOINS_BEFORE_MATRICES)


def test_every_deleted_barrier_and_fence_of_the_sum_is_caught(start):
    machine = start("races")
    total(machine)
    calls = places("races", list(machine.reached))
    assert len(calls) == 6, "two barriers for each of two sums, one between, and a fence"
    for codes in calls.values():
        machine.deleted = codes
        with pytest.raises(EmulationError, match=r"race|nobody wrote"):
            total(machine)
