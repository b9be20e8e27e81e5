"""The measurement of one iteration of a net, on a tiny one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.suites import Options, convolutions
from fpi_cuda.backends.triton import conv


@torch.no_grad()
def rows(device):
    options = Options(device=device, budget=1e-3, tiny=True)
    return convolutions.rows_of(options, 3, (5,), 2, 5, "float32")


@pytest.fixture(autouse=True)
def uncaptured(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(convolutions, "captured", lambda call, device: call)


def test_an_iteration_is_measured_with_none_and_with_half_finished(device):
    found = rows(device)
    assert {row["finished"] for row in found} == {0, 1}
    ours = [row for row in found if row["family"] == "ours"]
    assert ours
    assert all(row["median_s"] > 0 and row["error"] < 1e-6 for row in ours)
    assert {row["method"] for row in found} >= set(convolutions.RIVALS)


def test_what_is_wrong_gets_no_time(monkeypatch, device):
    plain = conv.Chain.__call__

    def wrong(chain, x, out, *rest):
        plain(chain, x, out, *rest)
        out[0, 0, 0, 0] += 1

    monkeypatch.setattr(conv.Chain, "__call__", wrong)
    found = rows(device)
    ours = [row for row in found if row["family"] == "ours"]
    assert ours
    assert all("off by" in row["refused"] and "median_s" not in row for row in ours)
