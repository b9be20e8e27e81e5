"""A solve in a program of torch.export: for inference, and without this package's Python."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import attribute, forward_level, transforming, tree_flatten, tree_unflatten
from .._torch_graphs import fake_mode, fake_world, real_tensors, unrecorded
from ..arguments import Arguments
from ..backends import native
from ..drivers import whole
from ..forms import DenseForm, form_of
from ..modules import tensors_reached
from ..options import Options
from ..record import ITERATION, Limits, Progress, Record
from ..solution import Solution
from ..solve.limits import of_numbers, own_limits
from ..solve.maps import pair
from ..solve.problem import Context
from ..state import check_inputs, state_of
from .loop import iterate
from .trace import traced, without_gradient

__all__ = ["solve", "traced_last"]

STRICT = (
    "fixed_point: torch.export with strict=True, which reads Python, takes a FixedPointLayer but "
    "not fixed_point(...); write torch.export.export(model, inputs, strict=False), its default"
)


def solve(
    g: Callable[..., Any],
    x0: Any,
    inputs: Sequence[Any],
    params: Sequence[Tensor],
    options: Options,
    keywords: Mapping[str, Any] | None = None,
) -> Solution:
    """What `entry.enter` does, while torch.export traces it; what it returns has no gradient.

    Raises:
        ValueError, TypeError, RuntimeError: the solve can't be part of a program; the message says
            why, and what to do.
    """
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(STRICT)
    options.check()
    _refuse(options)
    state = state_of(x0, options.norm_weights)
    packed = state.packed
    context = Context.here(packed.device.type)
    with torch.no_grad(), context.full_precision():
        arguments = None if keywords is None else Arguments(inputs, keywords)
        inputs = inputs if arguments is None else arguments.inputs
        check_inputs(g, inputs, params, packed)
        shared = [*params, *(() if arguments is None else arguments.shared)]
        tensors = [without_gradient(t) for t in (*inputs, *shared)]
        n, m = len(inputs), len(inputs) + len(shared)

        def called(x: Tensor, *tensors: Tensor) -> Any:
            z, theta = tensors[:n], tensors[n:m]
            if arguments is None:
                return g(state.unpack(x), *z, *theta)
            return arguments.put(g, theta)(state.unpack(x), *z)

        def value(x: Tensor, *tensors: Tensor) -> Tensor:
            gx = called(x, *tensors)
            return state.pack(pair(gx)[0] if options.has_aux else gx)

        start, limits = without_gradient(packed), _limits(packed, options, context)
        plain = not shared and arguments is None and not options.has_aux and not state.structure
        # G may ask a captured tensor for a size that no argument has: so it becomes one too.
        sized = [t for t in tensors_reached(g) if any(type(n) is not int for n in t.shape)]
        tensors += map(without_gradient, sized)
        form = None
        plain = plain and context.autocast_dtype is None and not torch.onnx.is_in_onnx_export()
        if plain and options.per_sample is not False:
            form = _form(g, start, inputs, options)
        if form is not None:
            x, record = _whole(form, start, options.solver, limits)
        else:
            x, record = iterate(value, start, tensors, options, limits, context)
        aux = None
        if options.has_aux:
            aux = _aux(lambda *given: pair(called(*given))[1], x, tensors, context)
            record.evaluations = record.evaluations + 1
        return Solution(state.unpack(x), record, aux)


def traced_last(traced: Solution | None, last: Solution | None) -> Solution | None:
    """What `layer.last` is: what this export traced, or the eager one where it traced none yet.

    Args:
        traced: what an export left, this one or one before.
        last: the eager one.
    """
    if traced is None or torch.compiler.is_dynamo_compiling():
        return last if traced is None else traced
    # Each export has a mode of its own.
    return traced if fake_mode(traced.record.progress.counters) is fake_world() else last


def _form(g: Any, x: Tensor, inputs: Sequence[Tensor], options: Options) -> DenseForm | None:
    """G as dense layers that the kernel takes, without gradients."""
    if attribute(g, "form_dim") != 2 or x.dim() != 2:
        return None
    form = form_of(g, "form", x, *inputs)
    if not isinstance(form, DenseForm) or isinstance(form.residual, Tensor):
        return None
    with unrecorded(), real_tensors():  # a device is asked, which knows no tensor without values
        like = torch.empty(1, form.weight.shape[0], dtype=x.dtype, device=x.device)
        if whole.refusal(form, like, options.backend, options.solver) is not None:
            return None
    named: Any = {k: without_gradient(t) for k, t in vars(form).items() if isinstance(t, Tensor)}
    return dataclasses.replace(form, **named)


def _whole(form: DenseForm, x0: Tensor, solver: Any, limits: Limits) -> tuple[Tensor, Record]:
    """The solve as one call of the native operator."""
    x0 = x0.contiguous()
    progress = Progress(x0, limits)
    history, beta, ridge, restart, every = solver.mixing(x0.dtype)
    tf32 = native.tf32_wanted(x0) and whole.tf32_allowed(limits)
    native.dense_solve(progress, x0, form, beta, history, ridge, restart, tf32, every=every)
    calls: Any = progress.tally[ITERATION]  # a tensor, of the program
    path = "native, whole, exported"
    record = Record(progress, x0.shape[:1], solver.contraction, path, failed=-1, evaluations=calls)
    return progress.result(), record


def _aux(g: Callable[..., Any], x: Tensor, tensors: Sequence[Tensor], context: Context) -> Any:
    """What g returns beside x̂ there."""
    found: list[Any] = []

    def leaves(*given: Tensor) -> list[Tensor]:
        with context.autocast():
            values, spec = tree_flatten(g(*given))
        found[:] = [[_MADE if isinstance(v, Tensor) else v for v in values], spec]
        return [v for v in values if isinstance(v, Tensor)]

    made = iter(traced(leaves, (x,), tensors)(x))
    values, spec = found
    return tree_unflatten([next(made) if v is _MADE else v for v in values], spec)


_MADE = object()  # where a tensor goes


def _limits(x: Tensor, options: Options, context: Context) -> Limits:
    """The stop rule; tensors in it are not looked at, and sizes of dimensions may be unknown."""
    dtype, patience = context.precision(x.dtype), options.solver.patience
    (rtol, atol), most = options.tolerance.resolve(dtype), options.max_iterations
    size, sizes = math.prod(x.shape[1:]), options.sizes
    known = not isinstance(size, torch.SymInt)
    if known and not options.tolerance.own and sizes is None and not isinstance(most, Tensor):
        return of_numbers(rtol, atol, size, dtype, patience, most)
    if sizes is None:
        sizes = torch.full(x.shape[:1], size, dtype=torch.float64, device=x.device)
    if isinstance(most, Tensor) and most.dim() == 0:
        most = most.expand(x.shape[0])
    root, one = sizes.to(x.device, torch.float64).sqrt(), options.per_sample is False
    given = (rtol, atol), most, root, patience, x, x.shape[:1], dtype
    own = own_limits(*given, coupled=one)
    return Limits(0.0, 0.0, 0.0, patience, 2**30, own, precision=dtype)


def _refuse(options: Options) -> None:
    """Raise where a program can't do what the options say."""
    said = {
        "trace": (options.trace, "a program keeps no trace: export with trace=False"),
        "callback": (
            options.callback is not None,
            "a program can't call Python: export with callback=None",
        ),
        "on_failure": (
            options.on_failure == "raise",
            "a program can't raise an error that depends on values: export with "
            'on_failure="return", and return layer.last.status from the module',
        ),
        "driver": (
            options.driver == "graph",
            'a program decides for itself how it iterates: export with driver="auto"',
        ),
        "backend": (
            options.backend == "triton",
            "a program is made of torch's operators, and of the native one for dense steps: export "
            'with backend="auto"',
        ),
        "solver": (
            not hasattr(options.solver, "mixing"),
            "a program has Picard and Anderson alone: export with one of them",
        ),
    }
    for name, (is_asked, why) in said.items():
        if is_asked:
            got = getattr(options, name)
            raise ValueError(f"fixed_point: {name}={got!r} can't be exported: {why}")
    if forward_level() or transforming():
        raise RuntimeError(
            "fixed_point: a program is for inference, so torch.export takes no solve under "
            "torch.func or forward mode; take derivatives outside of the exported module"
        )
