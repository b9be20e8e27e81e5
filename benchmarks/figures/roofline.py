"""Step kernels beside what the machine's copies and products reached."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..records import Row
from .page import (
    INK,
    Page,
    Picture,
    described,
    fit,
    look,
    positive,
    shape,
    timed,
)


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
