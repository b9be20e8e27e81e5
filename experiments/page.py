"""docs/experiments.md: its results are made from the committed JSON."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import sources
from benchmarks.sources import ROOT
from benchmarks.tables import Table, markdown_table

from . import pictures
from .solves import mean

PAGE = ROOT / "docs" / "experiments.md"
RESULTS = ROOT / "experiments" / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

Content = dict[str, Any]


def committed() -> list[Path]:
    return sorted(RESULTS.glob("*/*.json"))


def prefix(path: Path) -> str:
    """Of a result's figures: its device and its task."""
    return f"{path.parent.name}-{path.stem}"


def publish(found: Sequence[Path], path: Path) -> list[str]:
    """Copy a study's pictures to the page's, under the names of a result; their names."""
    folder = PAGE.parent / "plots"
    folder.mkdir(exist_ok=True)
    for picture in found:
        shutil.copyfile(picture, folder / f"{prefix(path)}-{picture.name}")
    return [picture.name for picture in found]


def summary(result: Content) -> Content:
    """A run as it is committed: a list a figure of the epochs, the last epoch's solves whole."""
    log = result["log"]
    epochs = {
        name: [entry[name] for entry in log]
        for name, value in log[0].items()
        if not isinstance(value, dict) and name != "epoch"
    }
    if "iterations" in log[0]:
        epochs["iterations"] = [mean(entry["iterations"]) for entry in log]
    solves = {name: value for name, value in log[-1].items() if isinstance(value, dict)}
    kept = {name: value for name, value in result.items() if name not in ("log", "sources")}
    return kept | {"epochs": epochs, "solves": solves}


def sources_of(results: Sequence[Content]) -> list[dict[str, str]]:
    """What the runs were trained with, each once; of older runs only the commit is known."""
    found = []
    for result in results:
        unknown = {"commit": result.get("commit", "unknown"), "library": "", "harness": ""}
        measured = result.get("sources", unknown)
        if measured not in found:
            found.append(measured)
    return found


def spread(values: Sequence[float], form: str = ".2f") -> str:
    if len(values) < 2:
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form.lstrip('+')}}"


def form(values: Sequence[float]) -> str:
    """Two digits after the point; three for small figures."""
    return ".2f" if statistics.mean(values) >= 2 else ".3f"


def table(rows: Sequence[dict[str, str]]) -> Table:
    """Of rows whose columns may differ."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [columns, *([row.get(name, "") for name in columns] for row in rows)]


def results_table(content: Content) -> Table:
    """A row a method: the test score over seeds, and what it cost."""
    rows = []
    for method, runs in pictures.by_method(content).items():
        figures, epochs = [run["test"] for run in runs], [run["epochs"] for run in runs]
        row = {"method": method, "seeds": str(len(runs)), "parameters": str(runs[0]["parameters"])}
        for name in [name for name in figures[0] if all(name in f for f in figures)]:
            values = [f[name] for f in figures]
            row[name] = f"{sum(values):.0f}" if name == "failed" else spread(values, form(values))
        row["epochs"] = spread([len(e["loss"]) for e in epochs], ".0f")
        if "steps" in epochs[0]:
            row["steps"] = spread([sum(e["steps"]) for e in epochs], ".0f")
            row["s"] = spread([sum(e["seconds"]) for e in epochs], ".0f")
        row["s an epoch"] = spread([statistics.median(e["seconds"]) for e in epochs])
        rows.append(row)
    return table(rows)


def pairs_table(content: Content) -> Table:
    """A row a pair of methods: the first less the second, seed by seed."""
    found, rows = pictures.by_method(content), []
    for pair in content.get("pairs", ()):
        if not all(method in found for method in pair):
            continue
        a, b = ({run["settings"]["seed"]: run["test"] for run in found[m]} for m in pair)
        seeds = sorted(a.keys() & b.keys())
        row = {"method": pair[0], "minus": pair[1], "seeds": str(len(seeds))}
        both = [figures[seed] for figures in (a, b) for seed in seeds]
        for name in [name for name in both[0] if all(name in f for f in both)] if both else []:
            less = [a[seed][name] - b[seed][name] for seed in seeds]
            row[name] = spread(less, "+" + form([a[seed][name] for seed in seeds]))
        rows.append(row)
    return table(rows)


def solves_table(content: Content) -> Table:
    """A row a method that solves: iterations and failures of the last epoch, over all seeds."""
    rows = []
    for method, runs in pictures.by_method(content).items():
        solves = [run["solves"] for run in runs]
        if "iterations" not in solves[0]:
            continue
        samples = sum(sum(s["iterations"].values()) for s in solves)
        backward = [s["backward_iterations"] for s in solves if s["backward_iterations"]]
        rows.append(
            {
                "method": method,
                "iterations, mean": spread([mean(s["iterations"]) for s in solves], ".1f"),
                "most": str(max(int(k) for s in solves for k in s["iterations"])),
                "backward, mean": spread([mean(b) for b in backward], ".1f") if backward else "",
                "not converged": f"{sum(r['epochs']['failed'][-1] for r in runs)} of {samples}",
                "backward not converged": str(
                    sum(r["epochs"]["failed_backward"][-1] for r in runs)
                ),
            }
        )
    return table(rows)


def tuned_table(tried: Sequence[dict[str, Any]], score: str) -> Table:
    return table(
        [
            {k: str(v) for k, v in row["settings"].items()}
            | {f"{score}, validation": f"{row[score]:.2f}"}
            for row in tried
        ]
    )


def sections(content: Content, path: Path) -> Iterator[str]:
    facts = content["facts"]
    yield f"## {path.stem}, on {facts['device_name']}"
    trained = sorted({run["commit"] for run in content["runs"] if run.get("commit")})
    yield (
        f"`{facts['command']}` at commit `{facts['commit']}`, {facts['timestamp']}, "
        f"{facts['threads']} threads, torch {facts['versions']['torch']}. Mean ± standard "
        "deviation over the seeds."
        + (f" Trained at {', '.join(f'`{commit}`' for commit in trained)}." if trained else "")
        + sources.said(path, facts)
    )
    yield markdown_table(results_table(content))
    compared = pairs_table(content)
    if len(compared) > 1:
        yield "The same seeds, one method's figures less another's:"
        yield markdown_table(compared)
    solved = solves_table(content)
    if len(solved) > 1:
        yield "Solves of the last epoch of training:"
        yield markdown_table(solved)
    for picture in pictures.names(content):
        yield f"![{picture}](plots/{prefix(path)}-{picture}.svg)"
    for picture in content.get("pictures", ()):
        yield f"![{Path(picture).stem}](plots/{prefix(path)}-{picture})"
    for title, rows in content.get("tables", {}).items():
        yield f"### {title}"
        yield markdown_table(table(rows))
    for method, tried in content["tuned"].items():
        score = next(k for k in tried[0] if k not in ("settings", "seeds"))
        yield f"### {method}: what was tried, seeds: {tried[0]['seeds']}, chosen on validation"
        yield markdown_table(tuned_table(tried, score))


def results() -> str:
    """The part of the page that is made from the committed JSON."""
    parts = []
    for path in committed():
        content = json.loads(path.read_text())
        parts += sections(content, path)
    return "\n\n".join(parts) or "No results are committed yet."


def rebuild(path: Path | None = None, *, draw: bool = True) -> bool:
    """Rewrite the page's results and its figures.

    Returns:
        Whether the page changed.
    """
    target = path or PAGE
    old = target.read_text()
    before, rest = old.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n\n{results()}\n\n{END}{after}"
    target.write_text(new)
    if draw:
        for file in committed():
            content = json.loads(file.read_text())
            pictures.draw(content, target.parent / "plots", prefix(file))
    return new != old
