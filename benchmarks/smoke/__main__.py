"""`python -m benchmarks.smoke PART ...`: checks on a CUDA device, a line each.

The exit code is the number of failed checks, at most 100; 101: there is no device; 2: a part that
is unknown (its line tells it from two failed checks).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from . import check
from .parts import PARTS

MOST_FAILED = 100
NO_DEVICE = 101
UNKNOWN = 2
ALL = "all"


def missing() -> str | None:
    """What a CUDA device or this build lacks, and what to do; or None."""
    if torch.version.cuda is None and not stands_in():
        return (
            f"torch {torch.__version__} has no CUDA; install a torch with CUDA, or try the parts "
            "without a device: python -m benchmarks.stand_in benchmarks.smoke all"
        )
    if not torch.cuda.is_available():
        return (
            "torch finds no CUDA device; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or try the "
            "parts without a device: python -m benchmarks.stand_in benchmarks.smoke all"
        )
    return None


def stands_in() -> bool:
    found = sys.modules.get("benchmarks.stand_in")
    return found is not None and found.installed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smoke",
        description="Checks on a CUDA device against float64, a line each.",
        epilog=f"Exit code: the number of failed checks, at most {MOST_FAILED}; {NO_DEVICE}: no "
        f"device; {UNKNOWN}: an unknown part. "
        + "; ".join(f"{n}: {p.__doc__}" for n, p in PARTS.items()),
    )
    parser.add_argument("part", nargs="*", help=f"{', '.join(PARTS)}; {ALL}: each of them")
    parser.add_argument("--list", action="store_true", help="the names of the parts, one a line")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(PARTS))
        return 0
    names = list(PARTS) if given.part == [ALL] else given.part
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        got = f"got {', '.join(unknown)}" if unknown else "none was given"
        print(f"smoke: a part must be one of {', '.join(PARTS)} ({got})", file=sys.stderr)
        return UNKNOWN
    if given.device == "cuda" and (reason := missing()):
        print(f"smoke: {reason}", file=sys.stderr)
        return NO_DEVICE
    place = check.Place(given.device, tiny=given.device == "cpu" or stands_in())
    # Of float64's references; parts run beside one another, and threads that wait for a core spin.
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    failed = 0
    for name in names:
        torch.manual_seed(0)
        start = time.perf_counter()
        failed += check.run(name, PARTS[name], place)
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return min(failed, MOST_FAILED)


if __name__ == "__main__":
    sys.exit(main())
