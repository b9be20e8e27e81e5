"""A grid of solves, recorded: what must not move while the code behind them does.

    PYTHONPATH=. python tests/replay.py record before.pt    # PYTHONPATH chooses the tree
    PYTHONPATH=/other/tree python tests/replay.py record after.pt
    python tests/replay.py compare before.pt after.pt       # exit code 1 if any bit differs

Only public names, so that the same files run against any tree. A case is a function that returns
what it found, by name; an exception and every warning are part of that.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import replay_cases  # noqa: F401 - its import makes the cases
import replay_compat  # noqa: F401
import replay_refusals  # noqa: F401
import torch
from replay_record import CASES, run

import fpi_cuda as fpi


def record(path, only=""):
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = {n: run(n, f) for n, f in CASES.items() if n.startswith("triton") == bool(only)}
    if not only:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "record", f"{folder}/triton.pt", "triton"]
            subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
            found |= torch.load(f"{folder}/triton.pt")
        print(f"{len(found)} cases of {Path(fpi.__file__).parent}, {sum(map(len, found.values()))} "
              f"values, in {time.perf_counter() - start:.0f} s")  # fmt: skip
    torch.save(found, path)


def bits(t):
    return torch.empty(t.shape, dtype=t.dtype).copy_(t).flatten().view(torch.uint8)


def difference(a, b):
    """What differs between two leaves; None: nothing, to the bit."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return None if repr(a) == repr(b) else f"{a!r} -> {b!r}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} -> {b.dtype} {tuple(b.shape)}"
    if bits(a).equal(bits(b)):
        return None
    a, b = a.double(), b.double()
    relative = ((a - b).abs() / torch.maximum(a.abs(), b.abs())).nan_to_num(0).max()
    places = "" if a.isfinite().equal(b.isfinite()) else ", and other places are not finite"
    return f"max relative difference {relative:.2g}{places}"


def compare(before, after):
    a, b = torch.load(before), torch.load(after)
    wrong, none = 0, {"the whole case": "not recorded"}
    for name in a | b:
        old, new = a.get(name, none), b.get(name, none)
        said = {k: difference(old.get(k, "nothing"), new.get(k, "nothing")) for k in old | new}
        lines = [f"{key}: {what}" for key, what in said.items() if what]
        if lines:
            wrong += 1
            print(name, *lines, sep="\n    ")
    print(f"{len(a | b)} cases: {wrong} differ" if wrong else f"{len(a)} cases: equal to the bit")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit({"record": record, "compare": compare}[sys.argv[1]](*sys.argv[2:]))
