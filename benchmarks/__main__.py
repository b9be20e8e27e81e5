"""`python -m benchmarks quick`: see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

from . import methods, problems, report, suites
from .measure import facts

ABOUT = {
    "quick": "every suite, short: under 2.5 minutes on 2 cores",
    "full": "every suite but denoise and convolutions, for the committed JSON",
    "solve": "whole solves, forward and with the backward, ours and the rivals'",
    "dense": "steps of dense layers solved whole: the Bibtex shape, products, refill",
    "denoise": "a net of two convolutions, 32 images of mixed noise",
    "convolutions": "on a CUDA device: one iteration of a net beside compiled cuDNN",
    "overhead": "time outside g, Anderson, at equal evaluations",
    "scale": "the state's and the loss's scale do not matter",
    "kernels": "the step kernels' bandwidth against a copy",
    "loop": "on a CUDA device: what an iteration costs beside g and the kernels",
    "import": "import fpi_cuda, after import torch",
    "report": "rebuild docs/benchmarks.md from benchmarks/results/*/full.json",
}


def size(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"a size is written BxN, as 256x128 (got {text!r})")
    batch, n = map(int, text.split("x"))
    return batch, n


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("suite", nargs="*", choices=[*ABOUT, []], help="; ".join(ABOUT))
    parser.add_argument(
        "--list", action="store_true", help="suites and methods, and which are here"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write rows and facts")
    parser.add_argument("--sizes", nargs="+", type=size, default=problems.SIZES, metavar="BxN")
    parser.add_argument(
        "--peers-at",
        nargs="*",
        type=size,
        default=((256, 128),),
        metavar="BxN",
        help="sizes at which `quick` runs torchdeq",
    )
    parser.add_argument("--kinds", nargs="+", choices=problems.KINDS, default=problems.DENSE)
    parser.add_argument(
        "--families", nargs="+", default=(), metavar="FAMILY", help="ours plain torchdeq"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's own")
    parser.add_argument(
        "--budget", type=float, default=3.5, metavar="SECONDS", help="timed calls of one variant"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        choices=[m.name for m in methods.all_methods()],
        default=(),
        metavar="METHOD",
        help="methods to leave out: see --list",
    )
    options = parser.parse_args(arguments)
    if not options.suite and not options.list:
        parser.error(f"name a suite: {', '.join(ABOUT)}")
    return options


def show_list() -> None:
    for name, about in ABOUT.items():
        print(f"{name:10}{about}")
    print()
    for method in methods.all_methods():
        print(f"{method.family:10}{method.name}", f"({method.missing})" if method.missing else "")


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    if given.list:
        show_list()
        return 0
    if given.threads:
        torch.set_num_threads(given.threads)
    options = suites.Options(
        device=given.device,
        sizes=tuple(given.sizes),
        kinds=tuple(given.kinds),
        families=tuple(given.families),
        budget=given.budget,
        without=tuple(given.without),
        peers_at=tuple(given.peers_at),
    )
    known = facts(given.device)
    rows: list[suites.Row] = []
    for name in given.suite:
        if name == "report":
            print(f"{report.PAGE.name}:", "changed" if report.rebuild() else "up to date")
        else:
            rows += (suites.SUITES | suites.PRESETS)[name](options)
    if not rows:
        return 0
    print(report.render(rows, report.text_table, "\n"))
    for row in rows:
        if row["suite"] == "import":
            print(
                f"\nimport fpi_cuda: {row['median_s']:.3f} s after torch's {row['torch_s']:.2f} s"
            )
    if given.json:
        report.save(given.json, known, rows)
        print(f"\nwritten: {given.json}")
    wrong = report.failures(rows)
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
