"""Time and memory against one number, residuals against evaluations, time against residuals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..records import Row
from .page import (
    FAINT,
    LABEL,
    Page,
    Picture,
    absent,
    by_method,
    curve,
    described,
    file_name,
    fit,
    grouped,
    label_ends,
    label_room,
    measured_ticks,
    number,
    positive,
    quartiles,
    shape,
    sizes,
    styled,
    timed,
)

AXES = {
    "batch": "batch B",
    "size": "size N",
    "spread": "factor of the slowest sample (spaced by its distance to 1)",
    "iterations": "iterations",
}


def scaling(facts: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[Picture]:
    """Time against one number, a figure each."""
    mine = [r for r in rows if r.get("suite") == "scaling" and positive(r.get("value"))]
    for key, group in grouped(mine, "axis", "problem", "mode", "dtype").items():
        lines = {name: rs for name, rs in by_method(filter(timed, group)).items() if rs}
        if lines:
            yield Picture(file_name("scaling", *key), scaling_figure(facts, group, lines))


def scaling_figure(
    facts: Mapping[str, Any], rows: Sequence[Row], lines: Mapping[str, list[Row]]
) -> Figure:
    first = rows[0]
    axis, mode, dtype = first.get("axis"), first.get("mode"), first.get("dtype")
    values = {row["value"] for row in rows}
    # Factors below 1 say most by how near they are to it.
    spread = axis == "spread" and max(values) < 1

    def place(row: Row) -> float:
        return 1 - row["value"] if spread else row["value"]

    page = Page(
        facts,
        f"Time against {'the spread of difficulty' if axis == 'spread' else axis}",
        described(first.get("problem"), sizes(first, without=axis), mode, dtype)
        + ": medians with a band of quartiles, lower is better",
        absent(rows, lambda row: f"{row['value']:g}"),
        body=max(3.9, LABEL * len(lines)),
        right=label_room(lines),
    )
    ax, ends, heights = page.axes(), {}, list[float]()
    for name, group in lines.items():
        points = sorted(group, key=place, reverse=spread)
        style = styled(points)
        x, y = [place(row) for row in points], [row["median_s"] * 1e3 for row in points]
        low, high = zip(*(quartiles(row) for row in points), strict=True)
        low, high = [1e3 * v for v in low], [1e3 * v for v in high]
        curve(ax, x, y, style)
        ax.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)
        ends[name] = (x[-1], y[-1], style)
        heights += [*low, *high]
    fit(ax, "x", [place(row) for row in rows], 0.03)
    fit(ax, "y", heights)
    measured_ticks(ax.xaxis, map(place, rows), {place(row): f"{row['value']:g}" for row in rows})
    if spread:
        ax.invert_xaxis()
    ax.set(xlabel=AXES.get(str(axis), str(axis)), ylabel="time, ms")
    label_ends(page, ax, ends)
    return page.figure


# --- memory ----------------------------------------------------------------------------------


def memory(facts: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[Picture]:
    """Peak bytes against iterations."""
    mine = [
        row
        for row in rows
        if row.get("suite") == "memory"
        and "method" in row
        and positive(row.get("iterations"))
        and positive(row.get("peak_bytes"))
    ]
    keys = ("problem", "batch", "size", "mode", "dtype")
    for key, group in grouped(mine, *keys).items():
        if len({row["iterations"] for row in group}) < 2:
            continue  # nothing to see against iterations
        whole = [
            r for r in rows if r.get("suite") == "memory" and tuple(r.get(k) for k in keys) == key
        ]
        problem, batch, size, mode, dtype = key
        name = file_name("memory", problem, shape(batch, size), mode, dtype)
        yield Picture(name, memory_figure(facts, group, absent(whole)))


def memory_figure(facts: Mapping[str, Any], rows: Sequence[Row], caption: str) -> Figure:
    first, lines = rows[0], by_method(rows)
    page = Page(
        facts,
        "Peak memory against iterations",
        described(first.get("problem"), sizes(first), first.get("mode"), first.get("dtype"))
        + ": solves made to take so many iterations",
        caption,
        body=max(3.9, LABEL * len(lines)),
        right=label_room(lines),
    )
    ax, ends, heights = page.axes(), {}, list[float]()
    for name, group in lines.items():
        points, style = sorted(group, key=lambda row: row["iterations"]), styled(group)
        x = [row["iterations"] for row in points]
        y = [row["peak_bytes"] / 2**20 for row in points]
        curve(ax, x, y, style)
        ends[name] = (x[-1], y[-1], style)
        heights += y
    state = first.get("state_bytes")
    if positive(state):
        heights.append(state / 2**20)
        ax.axhline(state / 2**20, color=FAINT, linewidth=1, linestyle=":")
        ax.annotate(
            "one state of B x N",
            (0, state / 2**20),
            (4, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8.5,
            color=FAINT,
        )
    fit(ax, "x", [row["iterations"] for row in rows], 0.03)
    fit(ax, "y", heights)
    measured_ticks(ax.xaxis, (row["iterations"] for row in rows), {})
    ax.set(xlabel="iterations", ylabel="peak memory, MiB")
    label_ends(page, ax, ends)
    return page.figure


# --- convergence -----------------------------------------------------------------------------


def history(facts: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[Picture]:
    """The residual after each evaluation."""
    mine = [
        row
        for row in rows
        if row.get("suite") == "convergence"
        and "method" in row
        and isinstance(row.get("residuals"), list)
        and any(map(positive, row["residuals"]))
    ]
    for key, group in grouped(mine, "problem", "batch", "size", "dtype").items():
        problem, batch, size, dtype = key
        name = file_name("convergence", problem, shape(batch, size), dtype)
        yield Picture(name, history_figure(facts, group))


def history_figure(facts: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    first, lines = rows[0], by_method(rows)
    tolerance = first.get("rtol")
    page = Page(
        facts,
        "Residual against evaluations of g",
        described(first.get("problem"), sizes(first), first.get("dtype"))
        + ": the worst sample's ‖g(x) − x‖ / ‖g(x)‖, at every x that g was given",
        "A line ends where its method stopped; where one leaves finished samples out, it shows the "
        "worst of those still running. Evaluations are not time: see work and precision.",
        body=max(3.9, LABEL * len(lines)),
        right=label_room(lines),
    )
    ax, ends, heights, longest = page.axes(), {}, list[float](), 1
    for name, group in lines.items():
        values = [v if positive(v) else math.nan for v in group[0]["residuals"]]
        style = styled(group)
        curve(ax, range(1, len(values) + 1), values, style, markevery=max(1, len(values) // 8))
        last = max(i for i, v in enumerate(values) if positive(v))
        ends[name] = (last + 1, values[last], style)
        heights += filter(positive, values)
        longest = max(longest, len(values))
    if positive(tolerance):
        heights.append(tolerance)
        ax.axhline(tolerance, color=FAINT, linewidth=1, linestyle=":")
        ax.annotate(
            f"relative tolerance {number(tolerance)}",
            (0, tolerance),
            (4, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8.5,
            color=FAINT,
        )
    ax.set_xlim(0, longest * 1.02)
    fit(ax, "y", heights)
    ax.set(xlabel="evaluations of g", ylabel="relative residual")
    label_ends(page, ax, ends)
    return page.figure


def work_precision(facts: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[Picture]:
    """Time against the residual that it bought."""
    mine = [
        row
        for row in rows
        if row.get("suite") == "convergence" and "residuals" not in row and "rtol" in row
    ]
    for key, group in grouped(mine, "problem", "batch", "size", "mode", "dtype").items():
        points = [row for row in group if timed(row) and positive(row.get("worst_residual"))]
        if points:
            problem, batch, size, mode, dtype = key
            name = file_name("work-precision", problem, shape(batch, size), mode, dtype)
            yield Picture(name, work_precision_figure(facts, group, points))


def work_precision_figure(
    facts: Mapping[str, Any], rows: Sequence[Row], points: Sequence[Row]
) -> Figure:
    first, lines = rows[0], by_method(points)
    asked = sorted({row["rtol"] for row in points}, reverse=True)
    page = Page(
        facts,
        "Time against the residual reached",
        described(first.get("problem"), sizes(first), first.get("mode"), first.get("dtype"))
        + ": medians and quartiles; lower and further right is better",
        f"A point for each tolerance asked: {', '.join(map(number, asked))}. The residual is the "
        f"worst sample's, recomputed in float64 at the x returned.\n"
        f"{absent(rows, lambda row: number(row['rtol']))}",
        body=max(3.9, LABEL * len(lines)),
        right=label_room(lines),
    )
    ax, ends, heights = page.axes(), {}, list[float]()
    for name, group in lines.items():
        ordered, style = sorted(group, key=lambda row: -row["rtol"]), styled(group)
        x, y = [r["worst_residual"] for r in ordered], [r["median_s"] * 1e3 for r in ordered]
        curve(ax, x, y, style)
        for a, row in zip(x, ordered, strict=True):
            low, high = (1e3 * v for v in quartiles(row))
            ax.plot([a, a], [low, high], color=style.colour, linewidth=1, zorder=2)
            heights += [low, high]
        ends[name] = (x[-1], y[-1], style)
        heights += y
    fit(ax, "x", [row["worst_residual"] for row in points], 0.05)
    ax.invert_xaxis()
    fit(ax, "y", heights)
    ax.set(xlabel="worst relative residual reached (more exact →)", ylabel="time, ms")
    label_ends(page, ax, ends)
    return page.figure
