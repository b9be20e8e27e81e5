"""docs/benchmarks.md: its results are made from the committed JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from . import sources
from .methods import HISTORY
from .records import Row, load
from .sources import ROOT
from .suites.kernels import working_set
from .tables import markdown_table, render

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("full", "solve", "peers", "dense", "whole", "nets", "scaling", "kernels", "conv")
NAMES += ("convolutions", "loop")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def committed() -> list[Path]:
    """The result files of this harness, over all devices, in the order of the page."""
    return [
        path
        for folder in sorted(RESULTS.iterdir())
        for name in NAMES
        if (path := folder / f"{name}.json").exists()
    ]


def device(paths: Sequence[Path]) -> str:
    """A section: the runs on one device, their targets, all tables."""
    runs, rows, name = [], [], ""
    for path in paths:
        facts, found = load(path)
        rows += found
        name, threads = facts["device_name"], facts["threads"]
        versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
        runs.append(
            f"- `{facts['command']}` at commit `{facts['commit']}`, {facts['timestamp']}, "
            f"{threads} thread{'s' if threads != 1 else ''}, "
            f"{facts['build']['cpu_capability']} kernels; {versions}; load average at the start "
            f"{facts['load_average'][0]:.1f}.{sources.said(path, facts)}"
        )
    tables = render(rows, markdown_table, "### ", targets_first=True)
    return "\n\n".join([f"## {name}", "\n".join(runs), *stale(rows), tables])


def stale(rows: Sequence[Row]) -> list[str]:
    """What the harness would measure otherwise today."""
    notes = []
    for row in rows:
        if row["suite"] != "kernels":
            continue
        dtype = getattr(torch, row["dtype"])
        state = row["batch"] * row["size"] * dtype.itemsize
        now = working_set(row["method"], state, HISTORY)
        if row["working_set"] != now:
            notes.append(
                f"*{row['method']}, {row['dtype']}: the copy beside it went through "
                f"{row['working_set'] / 2**20:.0f} MiB, and calls of the step go in turn through "
                f"{now / 2**20:.0f}; since then the copy does so too; it was not measured again.*"
            )
    return notes


def results() -> str:
    """The part of the page that is made from the committed JSON."""
    folders = dict.fromkeys(path.parent for path in committed())
    parts = (device([p for p in committed() if p.parent == folder]) for folder in folders)
    return "\n\n".join(parts) or "No results are committed yet."


def rebuild(page: Path = PAGE) -> bool:
    """Rewrite the page's results.

    Returns:
        Whether anything changed.
    """
    old = page.read_text()
    before, rest = old.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n\n{results()}\n\n{END}{after}"
    page.write_text(new)
    return new != old
