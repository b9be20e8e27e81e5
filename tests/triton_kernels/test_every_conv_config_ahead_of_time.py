"""What a config can be asked for beyond test_conv_kernels_ahead_of_time.py: minutes of compiling.

The file is also the list of jobs that the compiling processes do; see ahead_of_time.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ahead_of_time import MOST_SHARED, in_own_processes
from test_conv_kernels_ahead_of_time import SHAPES, STEPS, WIDE, Case, check

from fpi_cuda.backends.triton.configs import PRECISIONS, Shape

# Taps packed or not, channels that fill no block, the widest that are fused, kernels of one pixel
# to the largest, and layers one at a time.
OTHERS = [
    Shape((1, 16, 1), (3, 3)),
    Shape((3, 20, 3), (5, 3)),
    Shape((4, 64, 4), (7, 1)),
    Shape((12, 40, 12), (3, 3)),
    Shape((64, 64, 64), (3, 3)),
    Shape((16, 32, 32, 16), (3, 3, 3)),
    Shape((3, 48, 20, 3), (3, 1, 5)),
    Shape((2, 64, 64, 2), (3, 3, 3)),
    Shape((64, 64, 64, 64), (1, 3, 1)),
    Shape((70, 128, 64, 70), (3, 7, 3)),
]
KINDS = (
    ("forward without norms", "relu"),
    *(("forward", name) for name in ("softplus", "gelu")),  # the longest
    ("adjoint", "numbers"),
    ("u everywhere", "tanh"),
)
KINDS_OF = [p for p in PRECISIONS if p != "float16"]  # as bfloat16
CASES = [
    *(Case(shape, p, arch) for arch in MOST_SHARED for p in KINDS_OF for shape in OTHERS),
    *(Case(shape, p, 90, KINDS) for p in KINDS_OF for shape in (*SHAPES, WIDE)),
]


def jobs():
    for case in CASES:
        yield str(case), case.job


@pytest.mark.slow
def test_no_kernel_spills_and_as_many_blocks_fit_as_are_planned():
    compiled = in_own_processes(Path(__file__))
    assert {f.job for f in compiled if f.kernel in STEPS} == {str(case) for case in CASES}
    check(compiled, spilled=168)  # of layers whose widths are no multiple of 8
