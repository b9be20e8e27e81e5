"""Where a solve comes in: what the user gave, checked and said as a problem."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import drivers
from .._torch import attribute, transforming
from .._torch_graphs import fake_mode, fake_world, odd
from ..arguments import Arguments, numbers
from ..captures import followed
from ..options import Options
from ..record import Record
from ..solution import FixedPointError, Solution, State
from ..state import State as PackedState
from ..state import check_inputs, refuse_jit, state_of
from .again import Again
from .independence import samples_of
from .maps import UserMap
from .meta import refuse_meta, shapes
from .problem import Context, Problem, Report
from .recorded import recorded


class _Shown:
    """A callback for one solve: a node keeps it, to which what the callback holds may lead."""

    def __init__(self, callback: Callable[..., Any]) -> None:
        self.callback: Callable[..., Any] | None = callback

    def __call__(self, *shown: Any) -> None:
        if self.callback is not None:  # else torch.func.linearize runs the solve again, after it
            self.callback(*shown)


class Posed(NamedTuple):
    """A solve as it was asked for, checked: all that is known before anything is iterated."""

    problem: Problem
    map: UserMap
    state: PackedState
    inputs: Sequence[Any]
    params: Sequence[Tensor]  # those that g gets whole, too
    again: Callable[[State], Again | None]  # g once more, at a solution

    def solution(
        self, x: Tensor, record: Record, aux: Any = None, checkpoints: Sequence[Tensor] = ()
    ) -> Solution:
        """What the user gets."""
        unpack = self.state.unpack
        solution = Solution(unpack(x), record, aux, tuple(map(unpack, checkpoints)))
        solution._again = self.again(solution.x)
        return solution


def pose(
    g: Callable[..., Any],
    x0: Any,
    inputs: Sequence[Any],
    params: Sequence[Tensor],
    options: Options,
    keywords: Mapping[str, Any] | None = None,
    *,
    together: bool = False,
) -> Posed | Solution:
    """What `enter` is to solve; where there are shapes and no values, its solution.

    The options are checked.
    """
    state = state_of(x0, options.norm_weights)
    packed = state.packed
    arguments, given, modules = None, g, {}
    if keywords is not None:
        modules = {k: v for k, v in keywords.items() if isinstance(v, nn.Module)}
        if modules and callable(g):  # their tensors and modes are g's own
            g = functools.partial(g, **modules)
            keywords = {k: v for k, v in keywords.items() if k not in modules}
        arguments = Arguments(inputs, keywords)
        inputs, together = arguments.inputs, together or arguments.of_samples(packed.shape[0])
    check_inputs(g, inputs, params, packed)
    if arguments is not None:
        params = (*params, *arguments.shared)
        arguments.release()
    ways = state.pack, state.unpack
    map = UserMap(g, len(inputs), len(params), *ways, arguments, options.has_aux)
    if packed.is_meta or fake_world(packed, *inputs, *params) is not None:
        return shapes(map.taking(g, params), state, inputs, params, options)
    if options.driver == "graph":
        drivers.check(options.driver, packed.device)
    if params:
        together = together or any(numbers(t) for t in params)
    certified, weighted = attribute(g, "certified_lipschitz"), options.norm_weights is not None
    problem = Problem(
        map=map,
        options=options,
        drivers=drivers.ORDER[options.driver],
        context=Context.here(packed.device.type),
        unpack=state.unpack,
        samples=samples_of(options.per_sample, map, packed, together),
        # A certificate is of the plain norm.
        lipschitz=None if certified is None or weighted else float(certified()),
        structure=state.structure,
    )

    def again(x: State) -> Again | None:
        if transforming():  # its tensors end with it
            return None
        return Again(given, modules, map, arguments, inputs, params, x, problem.context)

    return Posed(problem, map, state, inputs, params, again)


def enter(
    g: Callable[..., Any],
    x0: Any,
    inputs: Sequence[Any],
    params: Sequence[Tensor],
    options: Options,
    keywords: Mapping[str, Any] | None = None,
    *,
    together: bool = False,
) -> Solution:
    """Solve x̂ = g(x̂, *inputs, *params, **keywords); see `fixed_point`.

    Args:
        g: see there.
        x0: see there.
        inputs: see there.
        params: see there.
        options: see there.
        keywords: not None: the inputs may be other than tensors too. The tensors in them, and in
            the keywords, count as params, behind those.
        together: g can't be given a part of the batch: finished samples are frozen, and stay in it.
    """
    refuse_jit("fixed_point")
    options.check()
    if options.checkpoints and followed():
        raise RuntimeError(
            "fixed_point: checkpoints are attached by plain autograd, so there are none under a "
            "torch.func transform or forward mode; leave them out there, or write a loss on them "
            "for torch.autograd"
        )
    shown = None
    if options.callback is not None:
        shown = _Shown(options.callback)
        options = options._replace(callback=shown)
    posed = pose(g, x0, inputs, params, options, keywords, together=together)
    if isinstance(posed, Solution):
        return posed
    problem, map, report = posed.problem, posed.map, Report()
    own = map.own
    if strange := odd(own):
        if fake_mode(*strange) is not None:
            g = map.taking(map.g, posed.params)
            return shapes(g, posed.state, posed.inputs, posed.params, options, own)
        assert map.binding is not None
        refuse_meta(map.binding.unfilled())
    try:
        tensors = (*posed.inputs, *posed.params, *own)
        x = options.adjoint.attach(problem, posed.state.packed, tensors, report)
        keep = report.keep
        closure = report.closure
        points = [
            recorded(problem, at, keep, tensors, 1, closure=closure) for at in report.checkpoints
        ]
        report.checkpoints = ()
    except FixedPointError as error:
        solution = error.solution
        if solution.record is report.record:  # not one of a solve within g
            solution._again = posed.again(solution.x)
        raise
    finally:
        if shown is not None:
            shown.callback = None
    aux = map.settle(x, posed.inputs, posed.params, options.driver == "graph", own)
    assert report.record is not None
    report.record.evaluations += options.has_aux + len(points)
    return posed.solution(x, report.record, aux, points)
