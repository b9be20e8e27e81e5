"""What torch.compile runs as it is. Imported while compiling only: it loads the compiler."""

from collections.abc import Callable
from typing import Any

import torch

from .solve.entry import enter


def _call(f: Callable[..., Any], *arguments: Any) -> Any:
    return f(*arguments)


call = torch.compiler.disable(_call)
uncompiled = torch.compiler.disable(enter)
