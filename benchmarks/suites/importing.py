"""import: how long the library keeps a program from starting."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from tqdm import tqdm

from ..clock import Times
from ..records import Row
from ..sources import ROOT
from .cell import Cell, Options

IMPORT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import fpi_cuda
print(middle - start, time.perf_counter() - middle)
"""


def cells(options: Options) -> Iterator[Cell]:
    yield Cell("import", lambda: import_rows(options.either(3 if options.quick else 5, 1)))


def import_rows(repeats: int) -> list[Row]:
    """Seconds that `import fpi_cuda` adds after `import torch`, in fresh processes."""
    torch_s, ours_s = [], []
    for _ in tqdm(range(repeats), desc="import", leave=False):
        command = [sys.executable, "-c", IMPORT]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        a, b = map(float, done.stdout.split())
        torch_s.append(a)
        ours_s.append(b)
    row = {"suite": "import", "method": "import fpi_cuda", "torch_s": Times(tuple(torch_s)).median}
    return [row | Times(tuple(ours_s)).row()]
