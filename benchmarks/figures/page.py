"""A figure's page: its letters, how a method looks, axes; what it says of rows."""

from __future__ import annotations

import math
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..records import Row

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
