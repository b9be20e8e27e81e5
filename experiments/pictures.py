"""Figures of an experiment, made from its JSON alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.figures.page import COLOURS, STYLE, Look, Page, Picture, label_ends, label_room
from benchmarks.plot import save

Content = Mapping[str, Any]
Log = Mapping[str, Sequence[float]]  # a figure's values by epoch
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
assert set(COLOURS.values()) <= {*PALETTE}


def by_method(content: Content) -> dict[str, list[dict[str, Any]]]:
    """Runs by method, in the order of their seeds; methods as the task groups them, or by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(content["runs"], key=lambda run: run["settings"]["seed"]):
        found.setdefault(run["settings"]["method"], []).append(run)
    grouped = [method for group in content.get("groups", {}).values() for method in group]
    return {method: found[method] for method in [*grouped, *sorted(found)] if method in found}


def parts(content: Content) -> dict[str, Content]:
    """The content of each group that has runs; "" where there are no groups."""
    if not content.get("groups"):
        return {"": content}
    found = {}
    for group, methods in content["groups"].items():
        runs = [run for run in content["runs"] if run["settings"]["method"] in methods]
        if runs:
            found[group] = {**content, "runs": runs, "groups": {}}
    return found


def looks(methods: Sequence[str]) -> dict[str, Look]:
    return {
        method: Look(PALETTE[i % len(PALETTE)], "o", "-", method in ("FPI_NN", "FPI_GD"))
        for i, method in enumerate(methods)
    }


def epochs(content: Content, name: str, title: str) -> Figure:
    """A figure of each epoch's log: the mean over the seeds that reached it, and their range.

    Against seconds of training where that is what ends a run.
    """
    groups = by_method(content)
    timed = any(run["settings"].get("seconds") for run in content["runs"])
    about = f"mean over the seeds{'' if timed else ' still running'}; the band is their range"
    page = Page(content["facts"], title, about, right=label_room(groups))
    ax, ends, late = page.axes(), {}, list[float]()
    for (method, runs), style in zip(groups.items(), looks(list(groups)).values(), strict=True):
        x, columns = (by_time if timed else by_epoch)([run["epochs"] for run in runs], name)
        means = [*map(mean, columns)]
        ax.plot(x, means, color=style.colour, linewidth=1.4)
        late += means[len(means) // 4 :]
        ax.fill_between(
            x, [*map(min, columns)], [*map(max, columns)], color=style.colour, alpha=0.12, lw=0
        )
        ends[method] = (x[-1], means[-1], style)
    ax.set(xlabel="seconds of training" if timed else "epoch", ylabel=name)
    margin = 0.15 * (max(late) - min(late))
    ax.set_xlim(0 if timed else 1, None)
    ax.set_ylim(min(late) - margin, max(late) + margin)  # the first epochs would flatten the rest
    label_ends(page, ax, ends)
    return page.figure


def by_epoch(logs: Sequence[Log], name: str) -> tuple[list[float], list[list[float]]]:
    """The epochs from 1, and at each the figures of the runs that reached it."""
    rows = [log[name] for log in logs]
    columns = [[row[i] for row in rows if i < len(row)] for i in range(max(map(len, rows)))]
    return [float(i) for i in range(1, len(columns) + 1)], columns


def by_time(logs: Sequence[Log], name: str) -> tuple[list[float], list[list[float]]]:
    """Mean seconds at equal parts of the runs' times, and the figures there, interpolated."""
    ends = [np.cumsum(log["seconds"]) for log in logs]
    count = min(map(len, ends))
    parts = np.arange(1, count + 1) / count
    rows = [np.interp(parts * end[-1], end, log[name]) for end, log in zip(ends, logs, strict=True)]
    x = parts * mean(float(end[-1]) for end in ends)
    return x.tolist(), np.stack(rows, 1).tolist()


def solves(content: Content) -> Figure:
    """Iterations and residuals of the last epoch's solves."""
    groups = {m: runs for m, runs in by_method(content).items() if solved(runs)}
    about = "share of the samples of the last epoch of training, all seeds; forward and backward"
    page = Page(content["facts"], "Iterations and residuals", about, body=3.2)
    colours = looks(list(by_method(content)))
    for i, (key, label) in enumerate(
        (
            ("iterations", "iterations, forward"),
            ("backward_iterations", "iterations, backward"),
            ("residuals", "residual, power of ten"),
        )
    ):
        ax = page.axes(x=2.45 * i, width=2.0)
        for method, runs in groups.items():
            bars(ax, runs, key, method, colours[method])
        ax.set(xlabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if i == 0:
            ax.set(ylabel="share of samples")
            ax.legend(fontsize=7, frameon=False)
    return page.figure


def bars(ax: Axes, runs: Sequence[Mapping[str, Any]], key: str, method: str, style: Look) -> None:
    total: Counter[int] = Counter()
    for run in runs:
        total.update({int(k): n for k, n in run["solves"].get(key, {}).items()})
    if total:
        values = sorted(total)
        shares = [total[v] / sum(total.values()) for v in values]
        ax.plot(values, shares, "o-", color=style.colour, markersize=3, linewidth=1.2, label=method)


def solved(runs: Sequence[Mapping[str, Any]]) -> bool:
    return all("iterations" in run["solves"] for run in runs)


def score(content: Content) -> str:
    return next(iter(content["runs"][0]["best"]["validation"]))


def figures(content: Content) -> dict[str, Callable[[], Figure]]:
    found: dict[str, Callable[[], Figure]] = {}
    for group, part in parts(content).items():
        end, title = (f"-{group}", f"{content['task']} {group}") if group else ("", content["task"])
        curves = {
            "loss": ("loss", "loss of training"),
            "score": (score(part), f"{score(part)} on the validation part"),
            **{picture: (name, name) for picture, name in content.get("curves", {}).items()},
        }
        for picture, (name, what) in curves.items():
            found[f"{picture}{end}"] = partial(epochs, part, name, f"{title}: {what}")
        if any(solved(runs) for runs in by_method(part).values()):
            found[f"solves{end}"] = partial(solves, part)
    return found


def names(content: Content) -> list[str]:
    return list(figures(content))


def draw(content: Content, folder: Path, prefix: str) -> list[Path]:
    with matplotlib.rc_context(STYLE):
        drawn = [Picture(name, make()) for name, make in figures(content).items()]
    return [path for picture in drawn for path in save(picture, folder, prefix)]
