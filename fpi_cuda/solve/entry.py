"""Where a solve comes in: what the user gave, checked and said as a problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import drivers
from .._torch import attribute
from ..options import Options
from ..solution import Solution
from ..state import check_inputs, state_of
from .independence import samples_of
from .maps import UserMap
from .meta import shapes
from .problem import Context, Problem, Report


def enter(
    g: Callable[..., Any],
    x0: Any,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    options: Options,
    *,
    together: bool = False,
) -> Solution:
    """Solve x̂ = g(x̂, *inputs, *params); see `fixed_point`.

    together: g can't be given a part of the batch: finished samples are frozen, and stay in it.
    """
    options.check()
    state = state_of(x0)
    packed = state.packed
    check_inputs(g, inputs, params, packed)
    if options.driver == "graph":
        drivers.check(options.driver, packed.device)
    if packed.is_meta:
        return shapes(g, state, (*inputs, *params), options)
    map = UserMap(g, len(inputs), len(params), state.pack, state.unpack)
    certified = attribute(g, "certified_lipschitz")
    problem = Problem(
        map=map,
        options=options,
        drivers=drivers.ORDER[options.driver],
        context=Context.here(packed.device.type),
        unpack=state.unpack,
        samples=samples_of(options.per_sample, map, packed, together),
        lipschitz=None if certified is None else float(certified()),
        tuple_state=state.tuple_state,
    )
    report = Report()
    x = options.adjoint.attach(problem, packed, (*inputs, *params, *map.own), report)
    map.settle(x, inputs, params, options.driver == "graph")
    assert report.record is not None
    return Solution(state.unpack(x), report.record)
