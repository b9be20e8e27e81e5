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
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from . import records
from .figures.contests import contests
from .figures.curves import history, memory, scaling, work_precision
from .figures.page import STYLE, Picture
from .figures.roofline import roofline
from .records import Row

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
