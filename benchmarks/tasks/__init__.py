"""Forwards to `experiments`, which was called so, for one release."""

import sys
from pathlib import Path

print("benchmarks.tasks has moved: use `python -m experiments`", file=sys.stderr)
__path__ = [str(Path(__file__).resolve().parents[2] / "experiments")]
