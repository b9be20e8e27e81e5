"""What ptxas said of the CUDA kernels, in the reports that `make cuda-compile` leaves."""

import re
import subprocess
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


ROWS = {
    "float64": "double, false",
    "float32": "float, false",
    "tf32": "float, true",
    "bfloat16": "c10::BFloat16, true",
    "float16": "c10::Half, true",
}
COLUMNS = ("PicardStep<{}>", "AndersonStep<{}, 1>", "AndersonStep<{}, 4>")


def test_the_page_of_floors_has_the_registers():
    registers = {}
    for name in ("dense_solve", "dense_map"):
        report = REPORTS / f"{name}.cu.o.report"
        if not report.exists():
            pytest.skip("no report: `make cuda-compile` makes it")
        kernels = [match.groupdict() for match in KERNEL.finditer(report.read_text())]
        names = "\n".join(kernel["name"] for kernel in kernels)
        plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
        for kernel, called in zip(kernels, plain.stdout.splitlines(), strict=True):
            body = called[called.index("run<") + 4 : called.rindex(">(")].replace("fpi::cuda::", "")
            registers[body.strip(), kernel["arch"]] = kernel["registers"]
    lines = (ROOT / "docs/floors.md").read_text().splitlines()
    for row, arguments in ROWS.items():
        bodies = [
            *(f"DenseSolve<{arguments}, {c.format(arguments.split(',')[0])} >" for c in COLUMNS),
            f"DenseMap<{arguments}>",
        ]
        cells = (" / ".join(registers[b, arch] for arch in ("sm_80", "sm_90")) for b in bodies)
        assert f"| {row} | {' | '.join(cells)} |" in lines
