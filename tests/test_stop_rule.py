"""The stop rule at its edges: each comparison, each number in it, and which end goes before which.

Samples of one value, whose norms are exact: what they leave and what g returns is scripted.
"""

import math

import pytest
import torch
from test_primitives import device, every_backend, poisoned  # noqa: F401

from fpi_cuda.record import ITERATIONS, STATUS, Limits, Progress, accumulate_dtype
from fpi_cuda.solution import Status

CONVERGED, MOST, STALLED, DIVERGED, NONFINITE = Status
MORE = 1 + 2**-12  # a little more than 1, that changes no other rounding


def limits(rtol=0.0, offset=0.0, rounding=0.0, patience=99, most=9):
    return Limits(rtol, offset, rounding, patience, most)


# Limits; and for samples their floor, the residuals and values of their iterations, of which the
# last goes on, and how and when they end. One number: residual and value, as at x = 0. "fell" is
# 0.5 % below 64, to the last bit, and "nearly" the next number above it.
GROUPS = {
    "the threshold": (
        limits(0.25, 0.5, most=2),
        [
            (0, [(1.5, 4)], CONVERGED, 1),
            (0, [(1.5 * MORE, 4)], MOST, 2),
            (2, [(1.5, 4)], CONVERGED, 1),  # a floor below the value is none
            (2, [(1.5 * MORE, 4)], MOST, 2),
            (8, [(2.5, 4)], CONVERGED, 1),
            (8, [(2.5 * MORE, 4)], MOST, 2),
        ],
    ),
    "growth": (
        limits(),
        [
            (0, [1, 10001], DIVERGED, 6),
            (0, [1, 10000], MOST, 9),
            (0, [1, 1, 1, 1, 1, 10001], DIVERGED, 6),  # from the last fall, however long ago
            (0, [2, 1, 10001], DIVERGED, 7),
            (0, [1, 1, 1, 1, 1, 1, 0.5, 10001], MOST, 9),
        ],
    ),
    "the rounding level": (
        limits(rounding=0.125, patience=3),
        [
            (0, [(1, 8)], STALLED, 4),
            (0, [(MORE, 8)], MOST, 9),
            (64, [(MORE, 8)], MOST, 9),  # it is the value's alone
        ],
    ),
    "a fall": (
        limits(rounding=1.0, patience=3),
        [
            (0, [64, "fell"], STALLED, 5),
            (0, [64, "nearly"], STALLED, 4),
            (0, [64, 63.8, 63.6], STALLED, 6),  # in steps that are none by themselves
            (0, [64, 32, 40, 31], STALLED, 7),
        ],
    ),
    "growth or rest": (limits(rounding=1.0, patience=5), [(0, [1] * 5 + [20000], DIVERGED, 6)]),
    "growth or the end": (limits(most=6), [(0, [1, 20000], DIVERGED, 6)]),
    "rest or the end": (limits(rounding=1.0, patience=3, most=4), [(0, [1], STALLED, 4)]),
    "converged after all": (
        limits(rtol=0.25, rounding=1.0, patience=5, most=6),
        [
            (0, [1] * 5 + [(20000, 80000)], CONVERGED, 6),
            (0, [1] * 5 + [(1, 4)], CONVERGED, 6),
        ],
    ),
    "not finite": (
        limits(rtol=0.25, offset=4.0, most=1),  # where an infinite value's threshold is infinite
        [
            (0, [5], CONVERGED, 1),
            (0, [math.inf], NONFINITE, 1),
            (0, [math.nan], NONFINITE, 1),
        ],
    ),
}


def numbers(entry, dtype):
    if isinstance(entry, str):
        fell = 64 * torch.tensor(0.995, dtype=dtype)
        entry = fell if entry == "fell" else fell.nextafter(fell.new_tensor(64.0))
    return entry if isinstance(entry, tuple) else (entry, entry)


def follow(backend, solver, group, dtype):
    """How and when the samples of a group end, and how they should."""
    of, samples = GROUPS[group]
    b = len(samples)
    floor = torch.tensor([s[0] for s in samples], dtype=accumulate_dtype(dtype))
    x = torch.zeros(b, 1, dtype=dtype)
    p = Progress(x, of, floor if bool(floor.any()) else None)
    window = [poisoned(b, 3, 1, dtype=dtype), poisoned(b, 3, 1, dtype=dtype)]
    window.append(poisoned(b, 3, 3, dtype=p.dtype))
    for k in range(of.max_iterations):
        now = [numbers(script[min(k, len(script) - 1)], dtype) for _, script, *_ in samples]
        residual, value = torch.tensor(now, dtype=dtype).mT.contiguous()[:, :, None].unbind()
        x.copy_(torch.where(residual == value, 0, value - residual))
        if solver == "picard":
            backend.picard_step(p, x, value, 1.0)
        else:
            backend.anderson_step(p, x, value, 1.0, 1e-3, 1e9, *window)
    status, made = p.counters[:, STATUS] - 1, p.counters[:, ITERATIONS]
    found = list(zip(status.tolist(), made.tolist(), strict=True))
    return found, [tuple(s[2:]) for s in samples]


@every_backend
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_samples_end_where_the_rule_says(backend, solver, group, dtype):
    found, expected = follow(backend, solver, group, dtype)
    assert found == expected
