"""What ptxas said of the CUDA kernels, in the reports that `make cuda-compile` leaves."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build/cuda-compile/CMakeFiles/cuda_objects.dir/csrc/cuda"
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'\n"
    r".*\n\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*Used (?P<registers>\d+) registers"
)


@pytest.mark.parametrize(
    "source", [path.name for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
)
def test_no_kernel_spills(source):
    report = REPORTS / f"{source}.o.report"
    if not report.exists():
        pytest.skip("no report: `make cuda-compile` makes it")
    kernels = [match.groupdict() for match in KERNEL.finditer(report.read_text())]
    assert {k["arch"] for k in kernels} >= {"sm_80", "sm_90", "sm_90a"}
    spilling = [k for k in kernels if k["stack"] != "0" or k["stores"] != "0" or k["loads"] != "0"]
    assert spilling == []
