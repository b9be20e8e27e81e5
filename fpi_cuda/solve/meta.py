"""A solve on the meta device, where there are shapes and no values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..options import Options
from ..record import NEVER, Progress, Record
from ..solution import Solution
from ..state import State
from .maps import check_output, pair

PATH = "meta: shapes only, g called once"


def shapes(
    g: Callable[..., Any], state: State, inputs: Sequence[Tensor], options: Options
) -> Solution:
    """What a solve returns, from one call of g; gradients have their shapes too."""
    x0 = state.packed.detach()
    value, aux = g(state.unpack(x0), *inputs), None
    if options.has_aux:
        value, aux = pair(value)
    x = check_output(state.pack(value), x0)
    progress = Progress(x0.flatten(1) if x0.dim() > 1 else x0[:, None], NEVER)
    rate = options.solver.contraction
    record = Record(progress, x0.shape[:1], rate, PATH, failed=0, evaluations=1)
    return Solution(state.unpack(x), record, aux)
