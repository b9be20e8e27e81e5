"""The bound on processor time, and which warnings are errors, by small suites of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import budget
import pytest

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent / "pyproject.toml"

BUSY = """
import subprocess, sys, time
SPIN = "import time\\nwhile time.process_time() < 0.6: pass"

def test_idle():
    time.sleep(1.5)

def test_dear():
    exec(SPIN.replace("0.6", str(time.process_time() + 0.6)))

def test_child():
    subprocess.run([sys.executable, "-c", SPIN], check=True)
"""


def run(folder, *options, **files):
    """Runs pytest on files in a folder, with the project's settings: exit code and output."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", PROJECT]
    done = subprocess.run(
        [*map(str, command), "--rootdir", str(folder), *options, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
    )
    return done.returncode, done.stdout + done.stderr


def test_over_the_budget_a_green_run_fails_and_names_what_cost_most(tmp_path):
    code, output = run(tmp_path, "-p", "budget", "--processor-budget", "0.1", test_busy=BUSY)
    assert code == pytest.ExitCode.TESTS_FAILED, output
    (line,) = (line for line in output.splitlines() if "OVER ITS BUDGET" in line)
    for name in ("test_dear", "test_child"):
        seconds = float(line.partition(f"::{name} ")[2].partition(" s")[0])
        assert seconds > 0.5, line
    assert float(line.partition("::test_idle ")[2].partition(" s")[0]) < 0.5, line


def test_ci_shares_1500_seconds_among_all_tests():
    shares = re.findall(r"test\S* BUDGET=(\d+)$", (HERE.parent / ".ci" / "run").read_text(), re.M)
    assert len(shares) == 2 and sum(map(int, shares)) == 1500


def test_a_slower_processor_may_take_longer_and_a_faster_one_no_less():
    assert budget.allowed(1350, 2 * budget.REFERENCE) == 2700
    assert budget.allowed(1350, budget.REFERENCE / 2) == 1350


def test_time_asleep_is_not_counted(tmp_path):
    options = ("-p", "budget", "--processor-budget", "1", "-k", "idle")
    code, output = run(tmp_path, *options, test_busy=BUSY)
    assert code == pytest.ExitCode.OK, output
    assert "OVER" not in output


OTHER = """
import warnings
warnings.warn("this module will go", DeprecationWarning)
warnings.warn("this module will go", FutureWarning)

def old(category):
    warnings.warn("old() will go", category, stacklevel=2)
"""
CALLER = """
import other

def call(category):
    other.old(category)
"""
TEST = """
import warnings
import pytest, test_caller, fpi_cuda_caller, benchmarks_caller, experiments_caller, other_caller

KINDS = [DeprecationWarning, PendingDeprecationWarning, FutureWarning]

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "caller", [test_caller, fpi_cuda_caller, benchmarks_caller, experiments_caller]
)
def test_ours(caller, kind):
    caller.call(kind)

@pytest.mark.parametrize("kind", KINDS)
def test_another_packages(kind):
    other_caller.call(kind)

@pytest.mark.parametrize("kind", [UserWarning, RuntimeWarning, ResourceWarning])
def test_serious(kind):
    warnings.warn("so", kind)
"""


def test_deprecations_are_errors_where_our_code_causes_them_and_other_warnings_anywhere(tmp_path):
    """Those of another package's import are its own affair, and must not end the collection."""
    ours = ("test_caller", "fpi_cuda_caller", "benchmarks_caller", "experiments_caller")
    callers = (*ours, "other_caller")
    code, output = run(
        tmp_path, "-rA", **{"other": OTHER, "test_it": TEST}, **dict.fromkeys(callers, CALLER)
    )
    assert code == pytest.ExitCode.TESTS_FAILED, output
    assert "15 failed, 3 passed" in output, output
    for name in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        assert f"PASSED test_it.py::test_another_packages[{name}]" in output, output
