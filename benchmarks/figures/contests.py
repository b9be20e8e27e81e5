"""The times of a contest beside its fastest plain loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..records import Row
from .page import (
    FAINT,
    INK,
    WIDTH,
    Page,
    Picture,
    absent,
    by_method,
    described,
    file_name,
    grouped,
    logarithmic,
    look,
    positive,
    quartiles,
    shape,
    sizes,
    timed,
)

CONTESTS = ("solve", "training", "peers", "dense", "denoise")
WORSE = 2.0  # residuals and gradient errors beyond this many times the rival's: it did less
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
