"""Times divided by times: only of one cell, and only where both did the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .judge import incomparable

Row = Mapping[str, Any]
CONTESTS = ("solve", "training", "peers", "dense", "whole", "denoise", "scaling", "convergence")


def cells(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of whole solves that were timed in turns, by cell."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["suite"] in CONTESTS and ("refused" in row or "skipped" in row):
            found.setdefault(row["cell"], []).append(row)
    return found


def timed_rows(rows: Iterable[Row], **where: str) -> list[Row]:
    """Those that have a time, of the family or method asked for; fastest first."""
    found = [
        row
        for row in rows
        if "median_s" in row and all(row[key] == value for key, value in where.items())
    ]
    return sorted(found, key=lambda row: row["median_s"])


@dataclass(frozen=True)
class Ratio:
    """time / time of the rival, or why there is none."""

    value: float | None
    against: str
    note: str = ""  # why there is no ratio, or which faster rivals were left out


def compare(row: Row, rival: Row) -> Ratio:
    """The row's time over the rival's.

    A rival that is more exact did more: the ratio is then shown only where it is against us.
    """
    if row["refused"] or rival["refused"]:
        return Ratio(None, rival["method"], incomparable(row, rival) or "")
    why = incomparable(row, rival)
    value = row["median_s"] / rival["median_s"]
    if why is None:
        return Ratio(value, rival["method"])
    return Ratio(value if value > 1 else None, rival["method"], f"{rival['method']}: {why}")


def against_plain(row: Row, rows: Sequence[Row]) -> Ratio:
    """The row's time over that of the fastest plain loop that it may be compared with."""
    left_out = []
    for rival in timed_rows(rows, family="plain"):
        ratio = compare(row, rival)
        if ratio.value is not None:
            notes = [ratio.note] if ratio.note else []
            return Ratio(ratio.value, ratio.against, "; ".join(notes + left_out))
        left_out.append(f"not against {ratio.note}")
    return Ratio(None, "no plain loop", "; ".join(left_out) or "no plain loop was timed")


def against(row: Row, rows: Sequence[Row], method: str) -> Ratio:
    """The row's time over that of one rival."""
    rival = next((r for r in rows if r["method"] == method), None)
    if rival is None or "skipped" in rival:
        return Ratio(None, method, rival["skipped"] if rival else "not run")
    return compare(row, rival)
