"""`make matrix`, with a make that only says what the tests would."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# One torch whose tests fail, one whose environment can't be made, one that passes.
MAKE = """#!/bin/sh
case "$*" in
  *torch==1.0*) echo "2 failed, 7 passed, 1 skipped in 3.00s"; exit 2 ;;
  *torch==2.0*) echo "No matching distribution found"; exit 2 ;;
  *test-experiments*) echo "3 passed in 1s"; echo "9 passed in 3s, $PYTEST_ADDOPTS" ;;
esac
"""


def matrix(folder, torches):
    (folder / ".ci").mkdir(exist_ok=True)
    shutil.copy(ROOT / ".ci" / "matrix", folder / ".ci")
    (folder / "make").write_text(MAKE)
    (folder / "make").chmod(0o755)
    done = subprocess.run(
        [folder / ".ci" / "matrix"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"PATH": f"{folder}:{os.environ['PATH']}", "TORCHES": torches, "PYTEST_ADDOPTS": ""},
    )
    said = [line for line in done.stdout.splitlines() if not line.startswith("==")]
    return done.returncode, said


def test_one_line_each_and_a_failure_if_any_failed(tmp_path):
    assert matrix(tmp_path, "1.0 2.0 3.0") == (
        1,
        [
            "torch-1.0: 2 failed, 7 passed, 1 skipped in 3.00s (exit code 2)",
            "torch-2.0: No matching distribution found (exit code 2)",
            "torch-3.0: 3 passed in 1s;9 passed in 3s,  (exit code 0)",
            "without-triton: 3 passed in 1s;9 passed in 3s, -p without_triton (exit code 0)",
        ],
    )
    code, _ = matrix(tmp_path, "3.0")
    assert code == 0


def test_each_torch_that_it_names_has_its_constraints():
    for line in (ROOT / ".ci" / "matrix").read_text().splitlines():
        if line.startswith("for torch in"):
            for torch in line.partition(":-")[2].partition("}")[0].split():
                assert (ROOT / "requirements" / f"torch-{torch}.txt").exists()
