"""What pytest collects: a test a cell. See session.py, which makes the cells."""

from __future__ import annotations

from typing import Any

import pytest


def bench(cell: Any, harness: Any, request: pytest.FixtureRequest) -> None:
    rows = cell.run()
    wrong = harness.take(cell, rows, request.config)
    assert not wrong, "; ".join(wrong)
