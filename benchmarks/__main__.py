"""`python -m benchmarks quick`: see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fpi_cuda import backends

from . import compare, devices, page, problems, records, suites, tables
from .machine import facts
from .methods import FAMILIES, all_methods
from .records import Row
from .session import Harness, failures
from .suites import ABOUT, SUITES, Options
from .suites.cell import precision

REHEARSAL = "a rehearsal with tiny sizes and few calls; says nothing of speed"


def size(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"a size is written BxN, as 256x128 (got {text!r})")
    batch, n = map(int, text.split("x"))
    return batch, n


def folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder of data sets (got {text!r})")
    return path


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    names = [*ABOUT, "report"]
    about = "; ".join(f"{name}: {text}" for name, text in ABOUT.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Benchmarks whose every row is judged in float64 before it is timed.",
        epilog=f"{about}; report: rebuild docs/benchmarks.md from the committed JSON",
    )
    add = parser.add_argument
    add("suite", nargs="*", choices=[*names, []], help=", ".join(names))
    add("--list", action="store_true", help="suites, methods, and the cells of the suites named")
    add("--json", type=Path, metavar="FILE", help="where to write rows and facts")
    add("--compare", type=Path, metavar="OLD.json", help="flag what became slower than plain loops")
    add("--backend", default="auto", choices=backends.NAMES, help="of this library")
    add(
        "--device",
        default=devices.DEFAULT,
        help="cpu, cuda or cuda:N; default auto: CUDA where torch and this build can use it",
    )
    add(
        "--tiny",
        action="store_true",
        help="a rehearsal: one tiny size of each cell, few calls; says nothing of speed",
    )
    add(
        "--dtype",
        default="float32",
        choices=("float32", "float64", "bfloat16", "float16"),
        help="of all tensors; tolerances are looser where a dtype needs it",
    )
    add("--data", type=folder, metavar="DIR", help="real images and word counts, see the docs")
    add("--sizes", nargs="+", type=size, metavar="BxN", help="instead of the suite's own")
    add("--kinds", nargs="+", choices=list(problems.KINDS), help="of problems")
    add("--families", nargs="+", choices=FAMILIES, help="of methods")
    add("--without", nargs="+", default=(), metavar="METHOD", help="methods to leave out")
    add("--threads", type=int, help="torch's threads; default: torch's own")
    add("--budget", type=float, default=2.0, metavar="SECONDS", help="timed calls of one variant")
    add("-k", dest="select", metavar="EXPRESSION", help="cells to run, as pytest selects")
    options = parser.parse_args(arguments)
    if not options.suite and not options.list:
        parser.error(f"name a suite: {', '.join(names)}")
    try:
        options.device, options.about = devices.resolve(options.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    if options.json and (options.json.is_dir() or not writable(options.json)):
        parser.error(f"--json: must be a file that can be written (got {options.json})")
    if options.compare:
        try:
            records.load(options.compare)  # before the run, not after it
        except (OSError, ValueError) as error:
            parser.error(f"--compare: {error}")
    known = {method.name for method in all_methods(grid=True)}
    for name in options.without:
        if name not in known:
            parser.error(f"--without: no method is called {name!r}; see --list")
    return options


def writable(path: Path) -> bool:
    """Whether results can be saved there, which is asked before the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path.parent, os.W_OK)


def show_list(cells: Sequence[suites.Cell]) -> None:
    for name, about in ABOUT.items():
        print(f"{name:12}{about}")
    print()
    for method in all_methods(grid=True):
        note = f" ({method.missing})" if method.missing else ""
        print(f"{method.family:12}{method.name}{'' if method.default else ' [grid]'}{note}")
    for cell in cells:
        print(f"cell        {cell.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    options = Options(
        device=given.device,
        backend=given.backend,
        dtype=given.dtype,
        data=given.data,
        sizes=tuple(given.sizes) if given.sizes else None,
        kinds=tuple(given.kinds) if given.kinds else None,
        families=tuple(given.families) if given.families else None,
        without=tuple(given.without),
        budget=min(given.budget, 1e-3) if given.tiny else given.budget,
        tiny=given.tiny,
    )
    named = [name for name in given.suite if name != "report"]
    cells = [cell for name in named for cell in SUITES[name](options)]
    if given.list:
        show_list(cells)
        return 0
    code = 0
    if named:
        print(given.about)
        about = facts(given.device) | ({"tiny": REHEARSAL} if given.tiny else {})
        if given.tiny:
            print(f"--tiny: {REHEARSAL}")
        harness = Harness(cells, about, given.json)
        # On CUDA torch's convolutions are tf32 by default: then a rival would not meet the rule.
        with precision(given.dtype):
            code = harness.run(*(["-k", given.select] if given.select else []))
        code = finish(harness, given) or code
    if "report" in given.suite:
        print(f"{page.PAGE.name}:", "changed" if page.rebuild() else "up to date")
    return code


def finish(harness: Harness, given: argparse.Namespace) -> int:
    rows: list[Row] = harness.rows
    print(tables.render(rows))
    if given.json:
        print(f"\nwritten: {given.json}")
    wrong = failures(rows)
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    if given.compare:
        return compare.show(given.compare, harness.facts, rows) or int(bool(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
