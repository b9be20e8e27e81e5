"""A solve where there are shapes and no values: on the meta device, and of fake tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._torch import stripped
from .._torch_graphs import fake_mode, fake_world, recording
from ..captures import carries_tangent, primals
from ..options import Options
from ..record import NEVER, Progress, Record
from ..solution import Solution
from ..state import State
from .maps import check_output, pair

__all__ = ["refuse_meta", "shapes"]

META = "meta: shapes only, g called once"
FAKE = "fake: shapes only, g called once"
_NOTE = (
    "fixed_point: x0 has no values, on the meta device or as a fake tensor, and g was called once "
    "for the shapes: it must not look at values, and takes tensors of the same kind alone"
)


def shapes(
    g: Callable[..., Any],
    state: State,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    options: Options,
    own: Sequence[Tensor] = (),
) -> Solution:
    """What a solve returns, from one call of g(x, *inputs); gradients have their shapes too.

    Args:
        g: f(x, *inputs), with the params put in.
        state: where to start; it may have values.
        inputs: see `fixed_point`.
        params: see there.
        options: see there.
        own: tensors of g's modules, where one of them is fake.

    Raises:
        ValueError: a tensor is fake and another is not, where their mode mixes none.
        RuntimeError: a graph is being recorded, which would hold this one call for the solve.
    """
    if recording():
        raise RuntimeError(
            "fixed_point: a solve without values, on the meta device or of fake tensors, can't be "
            "recorded as a graph, since it is one call of g; give the recorder real tensors, as "
            "torch.func.linearize does, or torch.compile what calls the layer"
        )
    x0 = state.packed.detach()
    mode = None if x0.is_meta else fake_world(x0, *inputs, *params, *own)
    if mode is not None:
        x0 = x0 if fake_mode(x0) is not None else mode.from_tensor(x0)
        _check_fake(mode, (*inputs, *params))
    if carries_tangent(x0):  # on which the fixed point does not depend
        (x0,) = primals([x0])
    _check_own(options, x0.shape[0])
    with contextlib.nullcontext() if mode is None else mode:
        try:
            value, aux = g(state.unpack(x0), *inputs), None
            if options.has_aux:
                value, aux = pair(value)
            x = check_output(state.pack(value), x0)
        except Exception as error:
            error.add_note(_NOTE)
            raise
        whole = stripped(x.detach(), lambda t, dim: t.movedim(dim, 0))  # vmap's dimensions first
        batch = whole.shape[: whole.dim() - x.dim() + 1]
        rows = math.prod(batch)  # which, unlike numel(), leaves a symbolic size open
        record = Record(
            Progress(whole.reshape(rows, math.prod(x.shape[1:])), NEVER),
            batch,
            options.solver.contraction,
            META if mode is None else FAKE,
            failed=0,
            evaluations=1,
            valued=False,
        )
        record.progress.result()
        points = tuple(state.unpack(x) for _ in options.checkpoints)
        return Solution(state.unpack(x), record, aux, points)


def refuse_meta(tensors: Sequence[Tensor]) -> None:
    """Raise where tensors of g's modules have no values, for an x0 that has them.

    Raises:
        ValueError: one is on the meta device.
    """
    for t in tensors:
        if t.is_meta:
            raise ValueError(
                "fixed_point: parameters and buffers of g must have values where x0 has (got one "
                f"of shape {tuple(t.shape)} on the meta device); fill them first (to_empty, "
                "load_state_dict), or give x0 and inputs on the meta device, for shapes alone"
            )


def _check_fake(mode: Any, tensors: Sequence[Tensor]) -> None:
    for t in tensors:
        if not mode.allow_non_fake_inputs and fake_mode(t) is None:
            raise ValueError(
                "fixed_point: inputs and params must all be fake where one of them, x0 or a "
                "parameter of g is, or where a FakeTensorMode is on (got shape "
                f"{tuple(t.shape)} with values); write mode.from_tensor(t), or "
                "FakeTensorMode(allow_non_fake_inputs=True)"
            )


def _check_own(options: Options, b: int) -> None:
    """Raise where what is said of each sample is not said of each."""
    own = {
        "tolerance.rtol": options.tolerance.rtol,
        "tolerance.atol": options.tolerance.atol,
        "max_iterations": options.max_iterations,
        "sizes": options.sizes,
    }
    for name, t in own.items():
        if isinstance(t, Tensor) and t.dim() and t.shape != (b,):
            raise ValueError(
                f"fixed_point: {name} must have one value for each of the {b} samples of x0, "
                f"shape [{b}] (got shape {list(t.shape)})"
            )
