"""`fixed_point`: the function behind the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, drivers
from .adjoint import (
    FixedPoint,
    ImplicitAdjoint,
    Problem,
    Report,
    check_max_iterations,
)
from .evaluation import UserStep, check_output
from .modules import has_stateful_buffers
from .operators import transforming
from .solution import Solution, State, Tolerance
from .solvers import Anderson, Picard, Solver

__all__ = ["check_options", "fixed_point"]


def fixed_point(
    g: Callable[..., Any],
    x0: State,
    *inputs: Tensor,
    params: Sequence[Tensor] = (),
    solver: Solver = Anderson(),  # noqa: B008 - frozen
    adjoint: ImplicitAdjoint = ImplicitAdjoint(),  # noqa: B008
    tolerance: Tolerance = Tolerance(),  # noqa: B008
    max_iterations: int = 200,
    backend: str = "auto",
    on_failure: str = "warn",
    per_sample: bool | str = "auto",
    driver: str = "auto",
) -> Solution:
    """Solve x̂ = g(x̂, *inputs, *params) for every sample; differentiable to any order.

    The derivative is implicit (paper eq. 6-11): memory does not grow with the iterations. It flows
    to `inputs`, to `params` and, where g is a module, to its parameters; never to x0, on which the
    fixed point does not depend.

    Args:
        g: a callable or module g(x, *inputs, *params) that returns x's shape, dtype and device.
            It must not write to x, and must give the same value for the same arguments (freeze
            dropout). x is the solver's own buffer: clone it to keep it.
        x0: where to start, [B, ...], floating; or a tuple of such tensors, of one dtype, with one
            norm over all of them per sample (g then takes and returns tuples).
        inputs: what g depends on per sample, z: tensors with first dimension B.
        params: tensors that the batch shares, θ.
        solver: `Picard(...)` or `Anderson(...)`.
        adjoint: how the backward iteration is solved.
        tolerance: when a sample has converged.
        max_iterations: evaluations of g that a sample may take.
        backend: "auto", "native", "triton" or "reference".
        on_failure: "warn" with counts, "raise" a `FixedPointError` that carries the solution (from
            backward too), or "return" in silence.
        per_sample: whether g treats samples independently, so that finished ones may be left out
            of the batch given to it. "auto" finds out the first time it matters.
        driver: who decides that the iteration goes on. "eager": the host, which launches every
            iteration. "graph" (CUDA): the device; g and the step are captured once and repeated
            without the host, forward and backward, on the whole batch. g's Python code does not
            run again until a tensor's place, a shape, an option, or a Python value that g reads
            changes. What can't be captured, or reads objects that can't be looked into, runs
            eagerly, with a warning. "whole": one kernel, for a g of dense layers (`DenseStep`,
            and `GradientStep` of a `DenseEnergy`), that iterates every sample to its own end.
            "auto": whole where that is possible, else eager.

    Returns:
        A `Solution`; its x is shaped like x0 and attached to autograd.

    Raises:
        TypeError, ValueError: an argument is not as said above; the message says which and what
            to do.
        FixedPointError: `on_failure="raise"` and a sample did not converge.
    """
    if torch.compiler.is_compiling():
        # A loop whose length depends on the data: one graph break, and the solve runs as it is.
        from ._uncompiled import fixed_point as uncompiled

        return uncompiled(  # type: ignore[no-any-return]
            g,
            x0,
            *inputs,
            params=params,
            solver=solver,
            adjoint=adjoint,
            tolerance=tolerance,
            max_iterations=max_iterations,
            backend=backend,
            on_failure=on_failure,
            per_sample=per_sample,
            driver=driver,
        )
    check_options(
        solver, adjoint, tolerance, max_iterations, backend, on_failure, per_sample, driver
    )
    packed, pack, unpack = _state(x0)
    if driver != "auto":
        drivers.check(driver, packed.device)
    _check_inputs(g, inputs, params, packed)
    step = UserStep(g, len(inputs), len(params), pack, unpack)
    own = step.binding.params if step.binding else []
    device_type = packed.device.type
    autocast = torch.is_autocast_enabled(device_type)
    certified = getattr(g, "certified_lipschitz", None)
    report = Report()
    problem = Problem(
        step=step,
        solver=solver,
        tolerance=tolerance,
        max_iterations=max_iterations,
        adjoint=adjoint,
        backend=backend,
        on_failure=on_failure,
        per_sample=per_sample,
        report=report,
        unpack=unpack,
        lipschitz=None if certified is None else float(certified()),
        grad_enabled=torch.is_grad_enabled(),
        autocast_dtype=torch.get_autocast_dtype(device_type) if autocast else None,
        device_type=device_type,
        driver=driver,
        parts=tuple(tuple(part.shape[1:]) for part in x0) if isinstance(x0, (tuple, list)) else (),
    )
    tensors = (*inputs, *params, *own)
    if transforming() and captures_transformed(step, packed, tensors):
        raise RuntimeError(
            "fixed_point: g must take every tensor that torch.func transforms as an argument (it "
            "captures one); pass it in `inputs` (per sample) or `params` (shared)"
        )
    keep: Tensor | None
    if (
        transforming()
        or forward_ad._current_level >= 0
        or (problem.grad_enabled and any(t.requires_grad for t in tensors))
    ):
        x, keep = FixedPoint.apply(problem, packed, None, *tensors)  # type: ignore[no-untyped-call]
    else:
        x, keep = problem.solve(packed.detach(), tensors)  # no node where nothing asks for one
    if problem.captured:
        x = attach_captured(problem, x.detach(), keep, packed, tensors)
    if has_stateful_buffers(g) and not transforming():
        # The solve ran on a snapshot: running statistics move once a call, at the solution.
        with torch.no_grad():
            g(unpack(x.detach()), *inputs, *params)
    assert report.record is not None
    return Solution(unpack(x), report.record)


def check_options(
    solver: Any,
    adjoint: Any,
    tolerance: Any,
    max_iterations: Any,
    backend: Any,
    on_failure: Any,
    per_sample: Any,
    driver: Any,
) -> None:
    """Raise unless every option of `fixed_point` is in its range."""
    if not isinstance(solver, (Picard, Anderson)):
        raise TypeError(
            f"fixed_point: solver must be Picard(...) or Anderson(...) (got {solver!r})"
        )
    if not isinstance(adjoint, ImplicitAdjoint):
        raise TypeError(f"fixed_point: adjoint must be an ImplicitAdjoint (got {adjoint!r})")
    if not isinstance(tolerance, Tolerance):
        raise TypeError(
            f"fixed_point: tolerance must be a Tolerance (got {tolerance!r}); write "
            "Tolerance(rtol=1e-4)"
        )
    check_max_iterations("fixed_point", max_iterations)
    for name, value, allowed in (
        ("backend", backend, backends.NAMES),
        ("on_failure", on_failure, ("warn", "raise", "return")),
        ("per_sample", per_sample, ("auto", True, False)),
        ("driver", driver, drivers.NAMES),
    ):
        if value not in allowed:
            raise ValueError(f"fixed_point: {name} must be one of {allowed} (got {value!r})")


def _state(x0: Any) -> tuple[Tensor, Callable[[Any], Tensor], Callable[[Tensor], Any]]:
    """The state as one tensor, and the way there and back."""
    if not isinstance(x0, (tuple, list)):
        _check_part("x0", x0)
        return x0, lambda x: x, lambda x: x
    parts = tuple(x0)
    if not parts:
        raise ValueError("fixed_point: x0 must hold at least one tensor (got an empty tuple)")
    for i, part in enumerate(parts):
        name = f"x0[{i}]"
        _check_part(name, part)
        for what in ("dtype", "device"):
            if getattr(part, what) != getattr(parts[0], what):
                raise ValueError(
                    f"fixed_point: {name} must have the {what} of x0[0], "
                    f"{getattr(parts[0], what)} (got {getattr(part, what)})"
                )
        if part.shape[0] != parts[0].shape[0]:
            raise ValueError(
                f"fixed_point: {name} must have the batch size of x0[0], {parts[0].shape[0]} "
                f"(got {part.shape[0]})"
            )
    shapes = [part.shape[1:] for part in parts]
    sizes = [shape.numel() for shape in shapes]

    def pack(x: Any) -> Tensor:
        if not isinstance(x, (tuple, list)) or len(x) != len(shapes):
            got = f"{len(x)} items" if isinstance(x, (tuple, list)) else type(x).__name__
            raise TypeError(
                f"fixed_point: g must return a tuple of {len(shapes)} tensors like x0 (got {got})"
            )
        for i, (part, shape) in enumerate(zip(x, shapes, strict=True)):
            if not isinstance(part, Tensor):
                raise TypeError(
                    f"fixed_point: g must return tensors (got {type(part).__name__} at {i})"
                )
            if part.shape[1:] != shape:
                raise ValueError(
                    f"fixed_point: g must return shape [B, {', '.join(map(str, shape))}] at {i} "
                    f"(got {tuple(part.shape)})"
                )
        return torch.cat([part.reshape(part.shape[0], part.shape[1:].numel()) for part in x], 1)

    def unpack(x: Tensor) -> tuple[Tensor, ...]:
        rows = x.shape[0]
        return tuple(
            part.reshape(rows, *shape)
            for part, shape in zip(x.split(sizes, 1), shapes, strict=True)
        )

    return pack(parts), pack, unpack


def _check_part(name: str, part: Any) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"fixed_point: {name} must be a tensor (got {type(part).__name__})")
    if part.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"fixed_point: {name} must be float64, float32, float16 or bfloat16 (got "
            f"{part.dtype}); write x0.float()"
        )
    if part.dim() == 0:
        raise ValueError(
            f"fixed_point: {name} must have a batch dimension first (got a scalar); write "
            "x0.reshape(1, 1)"
        )


def _check_inputs(g: Any, inputs: Sequence[Any], params: Sequence[Any], x: Tensor) -> None:
    if not callable(g):
        raise TypeError(f"fixed_point: g must be callable (got {type(g).__name__})")
    if not isinstance(params, (tuple, list)):
        raise TypeError(
            "fixed_point: params must be a tuple or list of tensors (got "
            f"{type(params).__name__}); write params=(w,)"
        )
    device = x.device
    for name, group in (("inputs", inputs), ("params", params)):
        for i, t in enumerate(group):
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"fixed_point: {name}[{i}] must be a tensor (got {type(t).__name__}); bind "
                    "other values to g with functools.partial"
                )
            if t.device != device and not (t.dim() == 0 and group is params):
                raise ValueError(
                    f"fixed_point: {name}[{i}] must be on x0's device, {device} (got {t.device}); "
                    f"write {name}[{i}].to(x0.device)"
                )
    b = x.shape[0]
    for i, t in enumerate(inputs):
        if t.dim() == 0 or t.shape[0] != b:
            raise ValueError(
                f"fixed_point: inputs[{i}] must have the batch size {b} as first dimension (got "
                f"shape {tuple(t.shape)}); a tensor that the batch shares goes into params=(...)"
            )


def captures_transformed(step: UserStep, x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether g's value depends on a tensor that a torch.func transform tracks and g captured."""
    plain = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (x, *tensors)]
    try:
        y = step(*plain)
    except Exception:
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(y):
        if torch._C._functorch.is_batchedtensor(y) or y.requires_grad:
            return True
        y = torch._C._functorch.get_unwrapped(y)
    return False


def attach_captured(
    problem: Problem, x: Tensor, keep: Tensor | None, x0: Tensor, tensors: Sequence[Tensor]
) -> Tensor:
    """First derivatives for tensors that g captured: the gradient at g(x̂) is c itself (eq. 11)."""
    n = problem.step.n_inputs
    plain = [t.detach() for t in tensors]
    at, inputs = x, plain[:n]
    # As in the node's backward: a good row stands in for a failed one.
    if keep is not None and not bool(keep.all()):
        rows = torch.arange(len(keep), device=keep.device)
        rows = torch.where(keep, rows, keep.to(torch.uint8).argmax())
        at, *inputs = (t.index_select(0, rows) for t in (x, *inputs))
    with problem.autocast():
        y = check_output(problem.step.bind(plain[n:])(at, *inputs), x)
    # Another tensor than the one g saw: its graph saves that one, and the node's output would then
    # hold itself.
    problem.given = (x.detach(), keep)
    attached, _ = FixedPoint.apply(problem, x0, y, *tensors)  # type: ignore[no-untyped-call]
    problem.given = None
    return attached  # type: ignore[no-any-return]
