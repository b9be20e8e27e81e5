"""Whether triton's interpreter runs the kernels here, and the kernels, imported to suit.

triton.jit reads TRITON_INTERPRET once, when a function is decorated, triton's own among them. So it
is set here, before anything else imports triton, and again while one of this folder's tests runs;
other tests and their processes see the environment that they were given.
"""

from __future__ import annotations

import os
from unittest import mock

import torch

from fpi_cuda import backends

HERE = backends.triton.missing("cuda") != backends.triton.NOT_INSTALLED
INTERPRETED = not torch.cuda.is_available()

if HERE:
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"} if INTERPRETED else {}):
        from triton.runtime import interpreter  # noqa: F401

        import fpi_cuda.backends.triton.anderson
        import fpi_cuda.backends.triton.conv
        import fpi_cuda.backends.triton.picard  # noqa: F401
