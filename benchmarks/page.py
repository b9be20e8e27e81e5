"""docs/benchmarks.md and its tables, a page a result file: made from the committed JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import sources, targets
from .methods import HISTORY
from .records import Row, load
from .sources import ROOT
from .suites.kernels import working_set
from .tables import markdown_table, reasons, sections, verdict_table

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("full", "solve", "peers", "dense", "whole", "nets", "scaling", "kernels", "conv")
NAMES += ("convolutions", "loop", "dropin", "dropin-bibtex", "bridge")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def committed() -> list[Path]:
    """The result files of this harness, over all devices, in the order of the page."""
    return [
        path
        for folder in sorted(RESULTS.iterdir())
        for name in NAMES
        if (path := folder / f"{name}.json").exists()
    ]


def run(path: Path, facts: Mapping[str, Any]) -> str:
    """How a file was made, and whether the library has changed since."""
    threads = facts["threads"]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    return (
        f"`{facts['command']}` at commit `{facts['commit']}`, {facts['timestamp']}, "
        f"{threads} thread{'s' if threads != 1 else ''}, "
        f"{facts['build']['cpu_capability']} kernels; {versions}; load average at the start "
        f"{facts['load_average'][0]:.1f}.{sources.said(path, facts)}"
    )


def device(paths: Sequence[Path]) -> str:
    """A section: the runs on one device, with links to their tables, and their targets."""
    runs, rows, name = [], [], ""
    for path in paths:
        facts, found = load(path)
        rows += found
        name = facts["device_name"]
        suites = ", ".join(dict.fromkeys(row["suite"] for row in found))
        runs.append(f"- [{suites}]({own_page(path).relative_to(PAGE.parent)}): {run(path, facts)}")
    found = targets.verdicts(rows)
    parts = [f"## {name}", "\n".join(runs), *stale(rows)]
    if found:
        parts += ["### Targets", markdown_table(verdict_table(found))]
        parts += ["### Why these targets", markdown_table(reasons(found))]
    return "\n\n".join(parts)


def own_page(path: Path) -> Path:
    """Of a result file's tables."""
    return PAGE.with_suffix("") / path.parent.name / f"{path.stem}.md"


def tables(path: Path) -> str:
    """That page."""
    facts, rows = load(path)
    found = sections(rows)
    names = [f"- [{name}](#{anchor(name)})" for name, _ in found]
    parts = [f"## {name}\n\n{markdown_table(content)}" for name, content in found]
    head = [f"# {path.stem}: {facts['device_name']}", run(path, facts)]
    why = "What the columns mean and how it was measured: [benchmarks](../../benchmarks.md)."
    return "\n\n".join([*head, why, "\n".join(names), *stale(rows), *parts]) + "\n"


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


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


def pages(page: Path = PAGE) -> dict[Path, str]:
    """What each page should hold."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    whole = f"{before}{BEGIN}\n\n{results()}\n\n{END}{after}"
    return {page: whole} | {own_page(path): tables(path) for path in committed()}


def rebuild() -> bool:
    """Rewrite the results' pages.

    Returns:
        Whether anything changed.
    """
    changed = False
    for page, text in pages().items():
        changed |= not page.exists() or page.read_text() != text
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)
    return changed
