"""The run, on pytest and pytest-benchmark: a test a cell, an entry a timed row, their JSON.

pytest-benchmark times variants one after another; here those of a cell are timed in turns, by
`clock.interleave`, and handed to it as samples. So its JSON, `pytest-benchmark compare` and its
plugins work on the results, and pytest selects (-k), goes on after a cell that fails, and sets the
exit code.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytest_benchmark.stats import Metadata

from . import records
from .records import Row
from .suites import Cell

BENCH = Path(__file__).with_name("bench.py")


class Harness:
    """The plugin: cells in, rows out."""

    def __init__(self, cells: Iterable[Cell], facts: dict[str, Any], json: Path | None) -> None:
        self.cells, self.facts, self.json = list(cells), facts, json
        self.rows: list[Row] = []

    def run(self, *arguments: str) -> int:
        """pytest's exit code. arguments: more of pytest's."""
        given = [str(BENCH), "-c", str(BENCH.with_name("pytest.ini")), "--rootdir"]
        given += [
            str(BENCH.parent),
            "-q",
            "-s",
            "--disable-warnings",
            "-p",
            "no:cacheprovider",
            "--benchmark-quiet",
        ]
        return int(pytest.main([*given, *arguments], plugins=[self]))

    # --- pytest's hooks -----------------------------------------------------------------------

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "cell" in metafunc.fixturenames:
            metafunc.parametrize("cell", self.cells, ids=[cell.name for cell in self.cells])

    @pytest.fixture
    def harness(self) -> Harness:
        return self

    def take(self, cell: Cell, rows: list[Row], config: pytest.Config) -> list[str]:
        """Keep a cell's rows.

        Returns:
            What of ours is wrong in them.
        """
        session = config._benchmarksession  # type: ignore[attr-defined]
        for row in rows:
            row.update(cell=cell.name, index=len(self.rows))
            self.rows.append(row)
            if "samples" in row:
                session.benchmarks.append(entry(cell, row))
        if self.json is not None:
            self.save(config, self.json)  # after every cell: a run that is killed keeps its rows
        return failures(rows)

    def save(self, config: pytest.Config, path: Path) -> None:
        benchmarks = config._benchmarksession.benchmarks  # type: ignore[attr-defined]
        hook = config.hook
        content = hook.pytest_benchmark_generate_json(
            config=config,
            benchmarks=benchmarks,
            include_data=True,
            machine_info={"slug": self.facts["slug"], "cpu": self.facts["cpu"]},
            commit_info={"id": self.facts["commit"]},
        )
        untimed = [row for row in self.rows if "samples" not in row]
        records.save(path, {"facts": self.facts} | content | {"untimed": untimed})


def entry(cell: Cell, row: Row) -> Metadata:
    """A row as pytest-benchmark keeps one; its samples are the entry's, the rest `extra_info`."""
    name = f"{cell.name}::{row['method']}"
    extra = {key: value for key, value in row.items() if key != "samples"}
    fixture = SimpleNamespace(
        name=name,
        fullname=name,
        group=cell.name,
        param=None,
        params=None,
        extra_info=extra,
        cprofile_stats=None,
        has_error=False,
    )
    made = Metadata(fixture, 1, {"disable_gc": True, "warmup": True})
    for seconds in row["samples"]:
        made.update(seconds)
    return made


def failures(rows: Iterable[Row]) -> list[str]:
    """What of ours is wrong, and what raised that may not; times are no failures.

    Nor is what a rival gets wrong.
    """
    return [
        f"{row['cell']} {row['method']}: {row['refused']}"
        for row in rows
        if row.get("refused") and (row.get("family", "ours") == "ours" or row.get("crashed"))
    ]
