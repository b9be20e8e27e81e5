"""Figures of result files, made from their JSON alone: nothing is timed, torch is not needed.

    python -m benchmarks.plot RESULT.json [...] [--out DIR]

A figure is made where its rows are: scaling, memory, roofline, convergence, work and precision,
and every contest's times beside its fastest plain loop. Each is written as SVG and PNG; the same
JSON gives the same bytes. What was refused or skipped has no point, and the caption names it. A
method looks the same in all figures: the colour is the family's (ours: the solver's), the marker
tells apart who shares one.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from . import records
from .records import Row

WIDTH = 8.0  # inches: 800 pixels at 100 dpi, for which the letters are sized
INK, FAINT = "#222222", "#6b6b6b"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "fpi_cuda",
}
CONTESTS = ("solve", "training", "peers", "dense", "denoise")
WORSE = 2.0  # residuals and gradient errors beyond this many times the rival's: it did less

# --- what a method looks like -----------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = {
    "plain": "#000000",
    "unrolled": "#E69F00",
    "replaced": "#E69F00",
    "torchdeq": "#009E73",
    "jaxopt": "#CC79A7",
    "optimistix": "#56B4E9",
}
SOLVERS = {"Picard": "#0072B2", "Anderson": "#D55E00"}  # of ours
OURS, OTHER = "#0072B2", "#8a8a8a"
MARKERS = "osD^vPX<>hp"
# Where the name's checksum would give two of one colour the same marker.
KNOWN = {
    "plain loop": "o",
    "plain loop, compacted": "s",
    "plain loop, compacted, test every 3rd": "D",
    "plain loop, compacted, compiled": "P",
    "plain Anderson": "^",
    "plain Anderson, compacted": "v",
    "unrolled": "o",
    "old layer, pure Python": "X",
    "compat layer": "*",
}
KINDS = {"whole": "s", "ConvStep": "D"}  # of ours: after the solver's name


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    dashes: str
    ours: bool

    @property
    def width(self) -> float:
        return 2.8 if self.ours else 1.1


def look(method: str, family: str) -> Look:
    """Told by the names alone, so that it is the same in every figure and file."""
    marker = KNOWN.get(method) or MARKERS[zlib.crc32(method.encode()) % len(MARKERS)]
    if family == "ours":
        solver, _, kind = method.partition(", ")
        colour = SOLVERS.get(solver.removesuffix(" step"), OURS)
        marker = KINDS.get(kind, KNOWN.get(method, "o"))
        return Look(colour, marker, "--" if kind in KINDS else "-", True)
    dashes = "--" if family == "plain" and "Anderson" in method else "-"
    return Look(COLOURS.get(family, OTHER), marker, dashes, False)


# --- rows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A figure and the name of its files."""

    name: str
    figure: Figure


def positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def timed(row: Row) -> bool:
    return positive(row.get("median_s")) and not row.get("refused") and "method" in row


def quartiles(row: Row) -> tuple[float, float]:
    m = row["median_s"]
    low, high = row.get("q1_s", m), row.get("q3_s", m)
    return (low, high) if positive(low) and positive(high) else (m, m)


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """In the order of their first rows."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    return {name: group for (name,), group in grouped(rows, "method").items()}


def absent(rows: Iterable[Row], at: Callable[[Row], str] | None = None) -> str:
    """Who has no point, where and why."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        kind = "refused" if row.get("refused") else "skipped"
        reason = row.get("refused") or row.get("skipped")
        if reason and "method" in row:
            short = textwrap.shorten(f"{kind}: {reason}", 90, placeholder=" …")
            where = places.setdefault((row["method"], short), [])
            if at is not None and at(row) not in where:
                where.append(at(row))
    if not places:
        return ""
    told = (
        f"{method}{' at ' + ', '.join(where) if where else ''} ({reason})"
        for (method, reason), where in places.items()
    )
    return f"No point: {'; '.join(told)}."


def sizes(row: Row, *, without: str | None = None) -> str:
    """B and N, but for the one that varies."""
    names = {"batch": "B", "size": "N"}
    parts = [f"{n} = {row[k]}" for k, n in names.items() if row.get(k) and k != without]
    return ", ".join(parts)


def shape(batch: Any, size: Any) -> str | None:
    return f"{batch}x{size}" if batch and size else None


def described(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def file_name(*parts: Any) -> str:
    text = "-".join(str(part) for part in parts if part is not None)
    return re.sub(r"[^a-z0-9.]+", "-", text.lower().replace("+", "-")).strip("-")


# --- the page --------------------------------------------------------------------------------


class Page:
    """A figure with a title, a caption and a footer, laid out in inches from its edges."""

    LINE = 0.155  # inches of a line of the caption

    def __init__(
        self,
        facts: Mapping[str, Any],
        title: str,
        about: str,
        caption: str = "",
        *,
        body: float = 4.0,
        left: float = 0.85,
        right: float = 0.3,
        below: float = 0.72,
    ) -> None:
        head = textwrap.wrap(about, 112)
        small = [line for part in caption.split("\n") for line in textwrap.wrap(part, 124)]
        foot = [line for part in footer(facts) for line in textwrap.wrap(part, 136)]
        self.left, self.right, self.body = left, right, body
        self.top = 0.5 + 0.18 * len(head)
        self.bottom = below + self.LINE * (len(small) + len(foot)) + (0.1 if small else 0.0)
        self.height = self.top + body + self.bottom
        self.figure = Figure(figsize=(WIDTH, self.height))
        self.write(0.12, self.height - 0.28, title, size=12, weight="bold")
        for i, line in enumerate(head):
            self.write(0.12, self.height - 0.5 - 0.18 * i, line, size=9.5, color=FAINT)
        y = 0.08 + self.LINE * (len(foot) - 1)
        for i, line in enumerate(foot):
            self.write(0.12, y - self.LINE * i, line, size=7.5, color=FAINT)
        y += 0.1 + self.LINE * len(small)
        for i, line in enumerate(small):
            self.write(0.12, y - self.LINE * i, line, size=8)

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / WIDTH, y / self.height, text, va="baseline", parse_math=False, **style)

    def axes(
        self,
        x: float = 0.0,
        y: float = 0.0,
        width: float | None = None,
        height: float | None = None,
    ) -> Axes:
        """x, y: inches from the body's left and top."""
        width = WIDTH - self.left - self.right if width is None else width
        height = self.body if height is None else height
        bottom = self.bottom + self.body - y - height
        return self.figure.add_axes(
            (
                (self.left + x) / WIDTH,
                bottom / self.height,
                width / WIDTH,
                height / self.height,
            )
        )


def footer(facts: Mapping[str, Any]) -> list[str]:
    """Where the numbers come from."""
    threads = facts.get("threads")
    versions = facts.get("versions")
    torch = versions.get("torch") if isinstance(versions, Mapping) else None
    parts = [
        facts.get("device_name") or "unknown device",
        f"{threads} thread{'s' if threads != 1 else ''}" if threads else None,
        f"commit {facts.get('commit') or 'unknown'}",
        f"torch {torch}" if torch else None,
        facts.get("timestamp"),
    ]
    return [described(*parts), str(facts.get("command") or "unknown command")]


def number(value: float, _: object = None) -> str:
    """As one would write it: 0.02, 500, 10⁻⁵."""
    if value <= 0 or 1e-3 <= value < 1e5:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = value / 10**exponent
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if abs(factor - 1) < 1e-6 else f"{factor:g}·{power}"


def logarithmic(axis: Axis, low: float, high: float) -> None:
    """Few ticks, with numbers as people write them, also over less than a decade."""
    decades = math.log10(high / low)
    steps = (1.0,) if decades > 3.5 else (1.0, 3.0) if decades > 1.7 else (1.0, 2.0, 5.0)
    if decades < 0.5:
        steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(number))


def fit(ax: Axes, which: str, values: Sequence[float], pad: float = 0.07) -> None:
    """A logarithmic axis around these values."""
    low, high = min(values), max(values)
    if high / low < 1.5:  # one value, or nearly: noise shall not fill the axis
        middle = math.sqrt(low * high)
        low, high = min(low, middle / 1.3), max(high, middle * 1.3)
    room = (high / low) ** pad
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    (ax.set_xlim if which == "x" else ax.set_ylim)(low / room, high * room)
    logarithmic(axis, low, high)


def measured_ticks(axis: Axis, values: Iterable[float], names: Mapping[float, str]) -> None:
    """Ticks where something was measured, at most nine of them."""
    ticks = sorted(set(values))
    ticks = ticks[:: -(-len(ticks) // 9)]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: names.get(v) or number(v)))


def apart(wanted: Sequence[float], distance: float, top: float) -> list[float]:
    """The places nearest to those wanted that are `distance` apart, in [0, top] if they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # In z − i·distance it is a regression under order: neighbours that clash share their mean.
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([wanted[i] - rank * distance, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            mean, count = blocks.pop()
            before, many = blocks[-1]
            blocks[-1] = [(before * many + mean * count) / (many + count), many + count]
    places = [0.0] * len(wanted)
    ceiling = top - (len(wanted) - 1) * distance
    rank = 0
    for mean, count in blocks:
        for _ in range(int(count)):
            places[order[rank]] = max(0.0, min(mean, ceiling)) + rank * distance
            rank += 1
    return places


LABEL = 0.175  # inches between labels


def label_room(names: Iterable[str]) -> float:
    """Inches that these take right of the axes."""
    return min(3.6, 0.45 + 0.07 * max(map(len, names)))


def label_ends(page: Page, ax: Axes, ends: Mapping[str, tuple[float, float, Look]]) -> None:
    """Each line's name beside the axes, tied to its last point. The axes' limits must be set."""
    inverse = ax.transAxes.inverted()
    height = page.body
    points = [inverse.transform(ax.transData.transform((x, y))) for x, y, _ in ends.values()]
    places = apart([float(v) * height for _, v in points], LABEL, height)
    last = max(float(u) for u, _ in points)
    width = WIDTH - page.left - page.right
    for (name, (x, y, style)), (u, _), place in zip(ends.items(), points, places, strict=True):
        ax.annotate(
            name,
            (x, y),
            (1 + 0.3 / width, place / height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            fontweight="bold" if style.ours else "normal",
            annotation_clip=False,
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "color": style.colour,
                "linewidth": 0.8,
                "linestyle": "-" if u > last - 0.05 else ":",  # across other lines: no line itself
                "alpha": 0.8,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def curve(ax: Axes, x: Sequence[float], y: Sequence[float], style: Look, **more: Any) -> None:
    options: dict[str, Any] = {
        "color": style.colour,
        "marker": style.marker,
        "linestyle": style.dashes,
        "linewidth": style.width,
        "markersize": 6.5 if style.ours else 4.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
        # Thick below thin: where two coincide, both are seen.
        "zorder": 2 if style.ours else 3,
    }
    ax.plot(x, y, **options | more)


def styled(rows: Sequence[Row]) -> Look:
    return look(rows[0]["method"], rows[0].get("family", ""))


# --- scaling ---------------------------------------------------------------------------------

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


# --- roofline --------------------------------------------------------------------------------


def roofline(facts: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[Picture]:
    points = [
        row
        for row in rows
        if timed(row) and positive(row.get("bytes")) and positive(row.get("flops"))
    ]
    if points:
        yield Picture("roofline", roofline_figure(facts, points, rows))


@dataclass(frozen=True)
class Roofs:
    """What the machine did in the same run."""

    copies: Mapping[float, float]  # bytes/s by working set
    products: Mapping[str, float]  # FLOP/s by dtype

    def copy(self, row: Row) -> float | None:
        """The one that was timed in turns with the row, else that of the nearest working set."""
        if positive(row.get("copy_bytes_per_s")):
            return row["copy_bytes_per_s"]
        if not self.copies:
            return None
        own = row.get("working_set")
        if not positive(own):
            return self.copies[max(self.copies)]
        return self.copies[min(self.copies, key=lambda size: abs(math.log(size / own)))]

    def over(self, row: Row) -> float | None:
        """FLOP/s that this row could reach at most."""
        slope = self.copy(row)
        bounds = [] if slope is None else [slope * row["flops"] / row["bytes"]]
        flat = self.products.get(str(row.get("dtype")))
        return min([*bounds, *([flat] if flat else [])], default=None)


def roofs(rows: Iterable[Row]) -> Roofs:
    copies: dict[float, float] = {}
    products: dict[str, float] = {}
    for row in rows:
        if row.get("suite") == "ceilings" and positive(row.get("value")):
            if row.get("what") == "copy bytes/s":
                copies[float(row.get("working_set") or 0)] = row["value"]
            elif row.get("what") == "flop/s":
                products[str(row.get("dtype"))] = row["value"]
    return Roofs(copies, products)


def roofline_figure(facts: Mapping[str, Any], points: Sequence[Row], rows: Sequence[Row]) -> Figure:
    bound = roofs(rows)
    told = "" if bound.copies else "No copy was timed in this run. "
    told += "" if bound.products else "No product was timed in this run. "
    if bound.copies or bound.products:
        told += (
            "Roofs are what a copy and a square product reached in the same run. A point's roof "
            "is the lower of its dtype's product and the copy timed in turns with it, or else the "
            "copy of the nearest working set; over 100 %: the layout's bytes stayed in a cache."
        )
    key_lines = [point_text(i, row, bound) for i, row in enumerate(points, 1)]
    key_height = 0.19 * len(key_lines) + 0.1
    page = Page(
        facts,
        "Roofline",
        "achieved FLOP/s against arithmetic intensity (FLOP over bytes the layout must move)",
        told,
        body=3.7 + 0.6 + key_height,
        below=0.2,
    )
    ax = page.axes(height=3.7)
    x = [row["flops"] / row["bytes"] for row in points]
    y = [row["flops"] / row["median_s"] / 1e9 for row in points]
    left, right = min(x) / 3, max(x) * 3
    if bound.copies and bound.products:  # show where the roofs meet
        right = max(right, 2 * max(bound.products.values()) / max(bound.copies.values()))
    slopes = [value * v / 1e9 for value in bound.copies.values() for v in (min(x), max(x))]
    flats = [value / 1e9 for value in bound.products.values()]
    fit(ax, "x", [left, right], 0.0)
    fit(ax, "y", [*y, *slopes, *flats], 0.12)
    draw_roofs(ax, bound, left, right)
    for i, (a, b, row) in enumerate(zip(x, y, points, strict=True), 1):
        style = look(row["method"], row.get("family", "ours"))
        ax.plot(a, b, style.marker, color=style.colour, markersize=7, zorder=3)
        side = 8 if i % 2 else -8  # points of one intensity crowd
        ax.annotate(
            str(i),
            (a, b),
            (side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=9,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        )
    ax.set(xlabel="arithmetic intensity, FLOP / byte", ylabel="10⁹ FLOP/s")
    top = page.bottom + key_height - 0.15
    for i, line in enumerate(key_lines):
        page.write(page.left, top - 0.19 * i, line, size=9)
    return page.figure


def draw_roofs(ax: Axes, bound: Roofs, left: float, right: float) -> None:
    highest = max(bound.products.values(), default=math.inf)
    for rank, (_, value) in enumerate(sorted(bound.copies.items(), reverse=True)):
        end = min(right, highest / value)
        ax.plot(
            [left, end],
            [value * left / 1e9, value * end / 1e9],
            color=INK,
            linewidth=1.6 if rank == 0 else 0.7,
            linestyle="-" if rank == 0 else ":",
        )
    if bound.copies:
        sizes_told = sorted(bound.copies.items(), reverse=True)
        lines = ["copy, by working set (solid: the first)"]
        lines += [f"{size / 2**20:.4g} MiB: {value / 1e9:.3g} GB/s" for size, value in sizes_told]
        ax.text(
            0.985,
            0.03,
            "\n".join(lines),
            transform=ax.transAxes,
            ha="right",
            va="bottom",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )
    steepest = max(bound.copies.values(), default=math.inf)
    for dtype, value in bound.products.items():
        ax.plot([value / steepest or left, right], [value / 1e9] * 2, color=INK, linewidth=1.6)
        ax.annotate(
            f"product, {dtype}: {value / 1e9:.4g} GFLOP/s",
            (right, value / 1e9),
            (-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
        )


def point_text(i: int, row: Row, bound: Roofs) -> str:
    where, limit = shape(row.get("batch"), row.get("size")), bound.over(row)
    rate = row["flops"] / row["median_s"]
    reached = f"{rate / 1e9:.3g} GFLOP/s, {row['bytes'] / row['median_s'] / 1e9:.3g} GB/s"
    share = f", {rate / limit:.0%} of its roof" if limit else ""
    return f"{i}   {described(row['method'], where, row.get('dtype'))}: {reached}{share}"


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


# --- contests --------------------------------------------------------------------------------

BAR = 0.2  # inches a method


def contests(facts: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[Picture]:
    """Times over the fastest plain loop's: a figure a problem, a panel a size."""
    mine = [row for row in rows if row.get("suite") in CONTESTS and "method" in row]
    for key, group in grouped(mine, "suite", "problem", "mode", "dtype").items():
        panels = {
            key: cell for key, cell in grouped(group, "batch", "size").items() if reference(cell)
        }
        if panels:
            yield Picture(file_name(*key), contest_figure(facts, group, list(panels.values())))


def reference(rows: Iterable[Row]) -> Row | None:
    """The fastest plain loop."""
    loops = [row for row in rows if row.get("family") == "plain" and timed(row)]
    return min(loops, key=lambda row: row["median_s"], default=None)


def did_less(row: Row, rival: Row) -> bool:
    """Whether its answer is so much less exact that the times should not be compared."""
    pairs = ((row.get(k), rival.get(k)) for k in ("worst_residual", "gradient_error"))
    return any(positive(a) and positive(b) and a > WORSE * b for a, b in pairs)


def contest_figure(
    facts: Mapping[str, Any], rows: Sequence[Row], panels: Sequence[Sequence[Row]]
) -> Figure:
    first = rows[0]
    names = [
        name for name, rs in by_method(r for p in panels for r in p).items() if any(map(timed, rs))
    ]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    high = BAR * len(names) + 0.1
    step = high + 0.62
    left = min(3.3, 0.3 + 0.07 * max(map(len, names)))
    page = Page(
        facts,
        f"{str(first.get('suite')).capitalize()}: time beside the fastest plain loop",
        described(first.get("problem"), first.get("mode"), first.get("dtype"))
        + ": time over that of the fastest plain loop of the same run; left of 1 is faster",
        "Bars: ratio of medians. Whiskers: the method's quartiles over the loop's median. Hatched, "
        f"*: residual or gradient error over {WORSE:g} times the loop's, so it did less.\n"
        + absent(rows, lambda row: shape(row.get("batch"), row.get("size")) or "?"),
        body=step * lines - 0.62 + 0.25,
        left=left,
        right=0.2,
    )
    low, top = 1.0, 1.0
    for panel in panels:
        base = (reference(panel) or {})["median_s"]
        for row in filter(timed, panel):
            low = min(low, quartiles(row)[0] / base)
            top = max(top, quartiles(row)[1] / base)
    gap = 0.25
    width = (WIDTH - page.left - page.right - gap * (columns - 1)) / columns
    # Room for the numbers at the ends, where bars end there.
    part = 0.46 / width
    room = max(top / low, 1.5) ** (part / (1 - 2 * part))
    limits = (low / (room if low < 1 else room**0.2), top * room)
    for i, panel in enumerate(panels):
        column, line = i % columns, i // columns
        ax = page.axes(column * (width + gap), 0.25 + line * step, width, high)
        contest_panel(ax, panel, names, limits)
        ax.set_title(sizes(panel[0]), fontsize=9.5, loc="left", pad=4)
        if column:
            ax.tick_params(labelleft=False)
        if i + columns >= len(panels):
            ax.set_xlabel("time / fastest plain loop's", fontsize=9)
    return page.figure


def contest_panel(
    ax: Axes, rows: Sequence[Row], names: Sequence[str], limits: tuple[float, float]
) -> None:
    base = reference(rows)
    assert base is not None
    of = {name: group[0] for name, group in by_method(rows).items()}
    ax.set_xscale("log")
    ax.set_xlim(*limits)
    logarithmic(ax.xaxis, *limits)
    ax.axvline(1, color=INK, linewidth=1)
    for place, name in enumerate(names):
        row = of.get(name)
        if row is None:
            continue
        if not timed(row):
            text = "refused" if row.get("refused") else "skipped"
            ax.text(1.03, place, text, va="center", fontsize=7.5, color=FAINT, style="italic")
            continue
        style = look(name, row.get("family", ""))
        ratio = row["median_s"] / base["median_s"]
        low, high = (v / base["median_s"] for v in quartiles(row))
        less = did_less(row, base)
        ax.barh(
            place,
            ratio - 1,
            left=1,
            height=0.62,
            facecolor="white" if less else style.colour,
            edgecolor=style.colour,
            hatch="/////" if less else None,
            alpha=1.0 if style.ours else 0.55,
            linewidth=0.8,
        )
        ax.plot([low, high], [place, place], color=INK, linewidth=1.1, solid_capstyle="butt")
        faster = ratio < 1
        ax.annotate(
            (f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}") + ("*" if less else ""),
            (min(low, 1) if faster else max(high, 1), place),
            (-4 if faster else 4, 0),
            textcoords="offset points",
            ha="right" if faster else "left",
            va="center",
            fontsize=8,
            fontweight="bold" if style.ours else "normal",
        )
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    families = {name: row.get("family") for name, row in of.items()}
    for label in ax.get_yticklabels():
        label.set_parse_math(False)
        if families.get(label.get_text()) == "ours":
            label.set_fontweight("bold")


# --- the command -----------------------------------------------------------------------------

FIGURES = (contests, scaling, memory, roofline, history, work_precision)


def figures(facts: Mapping[str, Any], rows: Sequence[Row]) -> list[Picture]:
    """All that the rows allow."""
    found: dict[str, Picture] = {}
    with matplotlib.rc_context(STYLE):
        for picture in (p for make in FIGURES for p in make(facts, rows)):
            name, count = picture.name, 1
            while name in found:  # names that differ in their signs alone
                count += 1
                name = f"{picture.name}-{count}"
            found[name] = Picture(name, picture.figure)
    return list(found.values())


def save(picture: Picture, folder: Path, prefix: str) -> list[Path]:
    """As SVG, whose words stay words, and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prefix}-{picture.name}.{kind}" for kind in ("svg", "png")]
    with matplotlib.rc_context(STYLE):
        picture.figure.savefig(paths[0], format="svg", metadata={"Date": None})
        picture.figure.savefig(paths[1], format="png", dpi=200)
    return paths


def plot(path: Path, out: Path | None = None, prefix: str | None = None) -> list[Path]:
    """Write the figures of a result file.

    Args:
        path: the file.
        out: a folder; None: `plots` beside it.
        prefix: of the figures' names; None: the file's name.

    Returns:
        What was written.
    """
    found = pictures(path)
    folder = path.parent / "plots" if out is None else out
    return [p for picture in found for p in save(picture, folder, prefix or path.stem)]


def pictures(path: Path) -> list[Picture]:
    facts, rows = records.load(path)
    if not isinstance(facts, Mapping):
        raise ValueError(
            f"plot: {path} must have an object under 'facts' (got {type(facts).__name__}): "
            "make it anew by `python -m benchmarks SUITE --json FILE`"
        )
    found = figures(facts, rows)
    if not found:
        suites = sorted({str(row.get("suite")) for row in rows})
        raise ValueError(
            f"plot: {path} must have rows that can be drawn: times of a contest with a plain "
            f"loop, scaling, memory, kernels or convergence (got {len(rows)} rows, of "
            f"{', '.join(suites) or 'no suite'}): run one of these suites with --json {path.name}"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description="Figures of result files, as SVG and PNG."
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: plots, beside each file")
    given = parser.parse_args(arguments)
    try:
        for path, prefix in zip(given.results, prefixes(given.results), strict=True):
            for written in plot(path, given.out, prefix):
                print(written)
    except FileNotFoundError as error:
        print(
            f"plot: RESULT.json must be a file (got {error.filename}, which does not exist): "
            "make one by `python -m benchmarks SUITE --json FILE`",
            file=sys.stderr,
        )
        return 2
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def prefixes(paths: Sequence[Path]) -> list[str]:
    """Names that tell the files apart in one folder: full.json of two devices needs theirs."""
    short = [path.stem for path in paths]
    if len(set(short)) == len(short):
        return short
    return [f"{path.resolve().parent.name}-{path.stem}" for path in paths]


if __name__ == "__main__":
    sys.exit(main())
