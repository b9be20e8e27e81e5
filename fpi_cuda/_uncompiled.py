"""What torch.compile leaves out of its graph. Imported when needed: it loads the compiler."""

from collections.abc import Callable
from typing import Any

import torch

_WHY = (
    "fpi_cuda leaves the graph here. A FixedPointLayer is part of it; not so fixed_point, "
    "layer.last, solution.residual_at_x, and a layer within torch.func's transforms, whose g "
    "captures a tensor that needs gradients or has parameters that fully_shard spreads, that is "
    "given something else than tensors, numbers and strings, or that reads an attribute, an option "
    "or a tensor to which the compiled function has written before; docs/compile.md says what to do"
)


def _call(f: Callable[..., Any], *arguments: Any) -> Any:
    return f(*arguments)


call = torch.compiler.disable(_call, reason=_WHY)
