"""Triton is optional, to the tests too: their own folders are not taken for it."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# torch._dynamo, which torch.func needs, imports triton where it finds one.
NESTED = "test_derivatives.py::test_scalar_map_has_three_right_derivatives_by_nested_func_grad"


def test_what_needs_torch_dynamo_passes_where_triton_is_not_installed():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "without_triton"]
    command += ["-p", "no:cacheprovider", f"{NESTED}[reference-picard]", "triton_kernels"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
