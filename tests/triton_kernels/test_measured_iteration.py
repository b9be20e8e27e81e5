"""The measurement of one iteration of a net, on a tiny one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.suites import convolutions
from fpi_cuda.backends.triton import conv


def rows(device):
    return convolutions.rows_of(device, 1e-3, 3, (5,), 2, 5, "float32", tf32=False)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_an_iteration_is_measured_with_none_and_with_half_finished(device):
    found = rows(device)
    assert {row["finished"] for row in found} == {0, 1}
    ours = [row for row in found if row["method"] == "ours, Triton step"]
    assert all(row["median_s"] > 0 and row["error"] < 1e-6 for row in ours)
    assert any(row["method"].startswith("cuDNN") for row in found)


def test_what_is_wrong_gets_no_time(monkeypatch, device):
    plain = conv.Chain.__call__

    def wrong(chain, x, out, *rest):
        plain(chain, x, out, *rest)
        out[0, 0, 0, 0] += 1

    monkeypatch.setattr(conv.Chain, "__call__", wrong)
    found = rows(device)
    assert {row["method"] for row in found} == {"cuDNN, compiled"}
    assert all("off by" in row["refused"] for row in found)
