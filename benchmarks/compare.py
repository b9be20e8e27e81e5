"""Did we become slower? Two result files, and only ratios that each took within one run.

A time of ours is divided by that of a plain loop that ran in the same round: what slows a machine
down for both cancels, and two machines may be compared where a regression is not theirs alone.
The loop is the fastest of the old file that the new one has too. Compared is the median of the
rounds' log ratios, new less old, by the statistics of `changes`.

All intervals hold together with 95 % (Bonferroni, over the cells), so that an unchanged library is
called worse in less than one comparison in twenty, however many cells it has. That costs power; so
the mean change of each method over its cells is judged too, as a family of its own, with the cells
as the sample, which sees what is small but everywhere.

    python -m benchmarks.compare OLD.json NEW.json [--margin 0.05]

Exit code: 0, 1 where something is worse or no longer right, 2 where there is nothing to compare.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import records
from .changes import (
    BETWEEN,
    FEWEST_PAIRS,
    Between,
    Cell,
    Change,
    between_runs,
    change,
    student,
    timed,
)
from .records import Row

Result = tuple[Mapping[str, Any], Sequence[Row]]

MARGIN = 0.05  # changes up to this are nobody's business
CONFIDENCE = 0.95  # of all intervals of a family together
FEWEST_CELLS = 4  # of a method, for a mean over its cells
RESAMPLES = 2000

# What makes two rows of two files the same measurement. Suites that vary one thing more than the
# sizes say which.
CELL = ("suite", "problem", "batch", "size", "mode", "dtype", "axis", "value", "curve", "rtol")
# Facts of the machine and the build that explain a change which is not the library's.
MACHINE = ("device", "device_name", "cpu", "cores", "threads", "versions", "build")

BAD = ("refused", "worse")  # verdicts that fail a run
ORDER = (
    *BAD,
    "missing",
    "evaluations",
    "right again",
    "better",
    "same",
    "too few pairs",
    "new",
    "control",
)


@dataclass(frozen=True)
class Finding:
    """What became of one method in one cell, or in all of them."""

    verdict: str  # one of ORDER
    where: str
    method: str
    against: str = ""  # the plain loop that both files divide by
    ratio: float | None = None  # time / that loop's: new over old
    low: float | None = None  # of the interval that holds for all cells at once
    high: float | None = None
    pairs: tuple[int, int] | None = None  # rounds in which both were timed: old, new
    note: str = ""

    @property
    def bad(self) -> bool:
        return self.verdict in BAD


def compare(
    old: Path | Result, new: Path | Result, *, margin: float = MARGIN, resamples: int = RESAMPLES
) -> list[Finding]:
    """The findings, the worst first.

    Args:
        old: a result file, or its facts and rows.
        new: the same.
        margin: a change is flagged where its whole interval is beyond 1 + margin, or 1 / that.
        resamples: of the bootstrap.
    """
    if not 0 <= margin < math.inf:
        raise ValueError(f"compare: margin must be at least 0, as 0.05 for 5 % (got {margin})")
    before, after = cells(loaded(old)[1]), cells(loaded(new)[1])
    found: list[Finding] = []
    changes: list[Change] = []
    controls: list[Change] = []
    for cell, was in before.items():
        now = after.get(cell, {})
        for method, row in was.items():
            if row.get("family") == "ours":
                found += told(cell, row, now.get(method))
            if timed(row) and timed(now.get(method)):
                if row.get("family") == "ours":
                    changes.append(change(cell, method, was, now, resamples))
                elif row.get("family") == "plain":
                    controls.append(change(cell, method, was, now, resamples))
    for cell, now in after.items():
        for method, row in now.items():
            known = method in before.get(cell, {})
            if row.get("family") == "ours" and timed(row) and not known:
                found.append(Finding("new", where(cell), method, note="not in the old file"))
    between = between_runs(controls)
    found += judged(changes, margin, between) + over_cells(changes, margin, BETWEEN)
    if between.count:
        note = (
            f"a deviation between runs, from {between.count} ratios of plain loops to one another"
        )
        spread = math.exp(math.sqrt(between.variance))
        found.append(Finding("control", "all cells", "plain loops", ratio=spread, note=note))
    return sorted(found, key=lambda f: (ORDER.index(f.verdict), -abs(math.log(f.ratio or 1.0))))


def loaded(result: Path | Result) -> Result:
    return records.load(result) if isinstance(result, Path) else result


def cells(rows: Iterable[Row]) -> dict[Cell, dict[str, Row]]:
    """By cell, the rows of its methods. A file that has one twice (quick, then solve): the first.

    Only cells with a plain loop: elsewhere there is nothing that both machines have in common.
    """
    found: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        if "method" in row and row.get("family") and row.get("suite") not in (None, "grid"):
            cell = tuple(row.get(key) for key in CELL)
            found.setdefault(cell, {}).setdefault(row["method"], row)
    return {
        cell: methods
        for cell, methods in found.items()
        if any(row["family"] == "plain" for row in methods.values())
    }


def where(cell: Cell) -> str:
    at = dict(zip(CELL, cell, strict=True))
    parts = [str(at["suite"])]
    if at["axis"] is not None:
        parts.append(f"{at['axis']} {at['value']:g}")
    parts += [str(at["problem"]), f"{at['batch']}x{at['size']}"]
    parts += [str(at[key]) for key in ("mode", "dtype") if at[key] is not None]
    if at["rtol"] is not None:
        parts.append(f"rtol {at['rtol']:g}")
    return " ".join(parts)


def told(cell: Cell, was: Row, now: Row | None) -> list[Finding]:
    """What changed that is no matter of chance."""
    at, method = where(cell), was["method"]
    if now is None:
        if not timed(was):
            return []
        return [Finding("missing", at, method, note="not in the new file, or no plain loop is")]
    if now.get("refused") and not was.get("refused"):
        return [Finding("refused", at, method, note=str(now["refused"]))]
    if timed(was) and not timed(now):
        return [Finding("missing", at, method, note=str(now.get("skipped") or "no times"))]
    found = []
    if was.get("refused") and not now.get("refused") and "skipped" not in now:
        found.append(Finding("right again", at, method, note=f"was: {was['refused']}"))
    a, b = was.get("evaluations"), now.get("evaluations")
    if a is not None and b is not None and a != b:
        found.append(Finding("evaluations", at, method, note=f"{a} before, {b} now"))
    return found


def verdict(low: float, high: float, margin: float) -> str:
    """low, high: of the logarithm."""
    limit = math.log1p(margin)
    return "worse" if low > limit else "better" if high < -limit else "same"


def judged(changes: Sequence[Change], margin: float, between: Between) -> list[Finding]:
    """Each cell's change, with intervals that hold for all of them at once."""
    sure = [c for c in changes if c.enough]
    found = [
        Finding("too few pairs", where(c.cell), c.method, pairs=c.pairs, note=few(c))
        for c in changes
        if not c.enough
    ]
    for c in sure:
        tail = (1 - CONFIDENCE) / 2 / len(sure)
        variance = c.error**2 + between.variance
        spread = c.error**4 / c.freedom + between.variance**2 / between.freedom
        freedom = variance**2 / spread if spread > 0 else c.freedom
        # Rounded so that cells may share a quantile.
        half = math.sqrt(variance) * student(tail, math.floor(freedom * 10) / 10)
        found.append(
            Finding(
                verdict(c.value - half, c.value + half, margin),
                where(c.cell),
                c.method,
                c.against,
                math.exp(c.value),
                math.exp(c.value - half),
                math.exp(min(c.value + half, 700.0)),
                c.pairs,
            )
        )
    return found


def few(c: Change) -> str:
    if not max(c.pairs):
        return "no plain loop was timed with it in both files"
    return f"at least {FEWEST_PAIRS} rounds are needed in each file: raise --budget"


def over_cells(changes: Sequence[Change], margin: float, between: float) -> list[Finding]:
    """Each method's mean change, with its cells as the sample.

    between: a deviation that all cells of a run may share.
    """
    by_method: dict[str, list[float]] = {}
    for c in changes:
        if c.enough:
            by_method.setdefault(c.method, []).append(c.value)
    means = {m: v for m, v in by_method.items() if len(v) >= FEWEST_CELLS}
    found = []
    for method, values in means.items():
        mean, k = float(np.mean(values)), len(values)
        tail = (1 - CONFIDENCE) / 2 / len(means)
        error = math.hypot(float(np.std(values, ddof=1)) / math.sqrt(k), between)
        half = error * student(tail, k - 1.0)
        found.append(
            Finding(
                verdict(mean - half, mean + half, margin),
                f"mean of {k} cells",
                method,
                "its loops",
                math.exp(mean),
                math.exp(mean - half),
                math.exp(min(mean + half, 700.0)),
            )
        )
    return found


# --- text ------------------------------------------------------------------------------------


def warnings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """How the machines or their software differ."""
    found = []
    for key in MACHINE:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for name in sorted({*a, *b}):
                if a.get(name) != b.get(name) and name != "fpi_cuda":
                    found.append(f"{key}: {name} was {a.get(name)}, is {b.get(name)}")
        elif a != b:
            found.append(f"{key} was {a}, is {b}")
    a, b = ({s["harness"] for s in facts.get("sources", ())} for facts in (old, new))
    if a and b and a != b:
        found.append("the harness was another")
    return found


def render(
    found: Sequence[Finding], differences: Sequence[str] = (), margin: float = MARGIN
) -> str:
    """A line a finding, what is bad first, and what they sum up to."""
    lines = [f"WARNING: {text}" for text in differences]
    if differences:
        lines.append("Only ratios to the plain loop are compared, but these may move them too.")
    head = ["verdict", "where", "method", "new/old", "interval", "rounds", "divided by", "note"]
    table = [head, *(cells_of(f) for f in found)]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
    counts = {name: sum(f.verdict == name for f in found) for name in ORDER}
    summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    lines.append(
        f"{summary or 'nothing to compare'}. new/old: the ratio of our time to the plain loop's, "
        f"over what it was; its intervals hold for all cells with {CONFIDENCE:.0%} at once, and "
        f"for all means; worse or better: beyond {margin:.0%}. control: what the intervals allow "
        "for between runs of the same code."
    )
    return "\n".join(lines)


def cells_of(f: Finding) -> list[str]:
    interval = "" if f.low is None else f"{f.low:.2f}-{f.high:.2f}"
    name = f.verdict.upper() if f.bad else f.verdict
    ratio = "" if f.ratio is None else f"{f.ratio:.2f}"
    rounds = "" if f.pairs is None else f"{f.pairs[0]}, {f.pairs[1]}"
    return [name, f.where, f.method, ratio, interval, rounds, f.against, f.note]


def show(
    old: Path, facts: Mapping[str, Any], rows: Sequence[Row], *, margin: float = MARGIN
) -> int:
    """Print what changed since the old file.

    Returns:
        The exit code.
    """
    try:
        before = records.load(old)
        found = compare(before, (facts, rows), margin=margin)
    except (OSError, ValueError) as error:
        print(f"compare: {old} cannot be compared with: {error}", file=sys.stderr)
        return 2
    print(render(found, warnings(before[0], facts), margin))
    if not any(f.verdict not in ("missing", "new", "control") for f in found):
        print(
            f"compare: the files must have a cell of ours and a plain loop in common ({old} and "
            "the new rows have none): run the old command again, with --json",
            file=sys.stderr,
        )
        return 2
    return int(any(f.bad for f in found))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description="What became slower than plain loops."
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument(
        "--margin", type=float, default=MARGIN, help="change to let pass (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        facts, rows = records.load(given.new)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return show(given.old, facts, rows, margin=given.margin)


if __name__ == "__main__":
    sys.exit(main())
