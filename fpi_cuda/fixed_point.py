"""`fixed_point`: the function behind the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ._torch_graphs import apart, exporting
from .adjoint import ImplicitAdjoint
from .options import Adjoint, Options, Solver, Tolerance
from .solution import Solution, State
from .solve.entry import enter
from .solvers import Anderson, named

__all__ = ["fixed_point"]


def fixed_point(
    g: Callable[..., Any],
    x0: State,
    *inputs: Tensor,
    params: Sequence[Tensor] = (),
    solver: Solver | str = Anderson(),  # noqa: B008 - frozen
    adjoint: Adjoint = ImplicitAdjoint(),  # noqa: B008
    tolerance: Tolerance = Tolerance(),  # noqa: B008
    max_iterations: int | Tensor = 200,
    backend: str = "auto",
    on_failure: str = "warn",
    per_sample: bool | str = "auto",
    driver: str = "auto",
    trace: bool = False,
    callback: Callable[[int, Any, Tensor], Any] | None = None,
    has_aux: bool = False,
    sizes: Tensor | None = None,
    norm_weights: Any = None,
    checkpoints: Sequence[int] = (),
) -> Solution:
    """Solve x̂ = g(x̂, *inputs, *params) for every sample; differentiable to any order.

    The derivative is implicit (paper eq. 6-11): memory does not grow with the iterations. Reverse
    and forward mode mix as you like (torch.autograd, forward_ad, torch.func); g needs formulas for
    reverse mode only. A tangent costs one more solve, as a gradient does. Derivatives are by
    `inputs`, `params`, and parameters and buffers of the modules that g calls; never by x0, on
    which the fixed point does not depend.

    Those modules are g itself or found through what it closes over, defaults, globals that it
    reads, bound methods, functools.partial, containers and attributes; not among the globals of
    classes, in iterators, or behind torch.jit, FullyShardedDataParallel and classes written in C.
    They keep the modes of this call until its last backward, their buffers move once a call, and
    attributes that forward sets are those of the solution, attached to it (neither under a
    torch.func transform). Parameters that `fully_shard` spreads over processes are gathered once a
    call. torch.compile around g is taken off: compile what is around the layer (docs/compile.md; a
    layer is part of the compiled graph, this function leaves it). torch.export takes a solve for
    inference (docs/deploy.md).

    Under torch.autocast g runs as it does anywhere, forward and, wherever the backward is called,
    in every derivative; the solver's own arithmetic and x stay in x0's dtype. Default tolerances
    are then those of autocast's dtype. A `torch.amp.GradScaler` sees NaN or Inf wherever a gradient
    can't be finite (docs/math.md, mixed precision).

    Args:
        g: a callable or module g(x, *inputs, *params) that returns x's shape, dtype and device.
            It must not write to x (a write raises, but for one through x.data or NumPy, which
            nobody sees), and must give the same value for the same arguments (freeze dropout). x is
            the solver's own buffer: clone it to keep it.
        x0: where to start, [B, ...], floating or complex; or a tuple, list, dict, dataclass or what
            torch's pytree knows besides, nested, of such tensors of one precision, with one norm
            over all of them per sample. g takes and returns the same structure (a dict's keys in
            any order, a plain tuple for a named one; of a list x0, a tuple). A complex number
            counts as two real ones: norms are of |·|, gradients follow torch's convention,
            Anderson's weights are real.
        inputs: what g depends on per sample, z: tensors with first dimension B.
        params: tensors that the batch shares, θ.
        solver: `Picard(...)`, `Anderson(...)`, or `Auto(...)`, for which "auto" stands.
        adjoint: how the derivative is had: `ImplicitAdjoint(...)` exactly, `OneStep()`,
            `Neumann(k)`, `Truncated(k)`, `Unrolled(k)` and `Phantom(k, damping)` for less
            (docs/gradients.md).
        tolerance: when a sample has converged; its numbers may be tensors [B], one a sample.
        max_iterations: evaluations of g that a sample may take: a whole number, or a tensor [B] of
            them up to 2^24, on any device. A batch that is one system may take the most of any.
        backend: "auto", "native", "triton" or "reference".
        on_failure: "warn" with counts, "raise" a `FixedPointError` that carries the solution (from
            backward too), or "return" in silence.
        per_sample: whether g treats samples independently. True: finished ones are frozen and left
            out of the batch given to it. False: the batch is one system, which stops, is mixed and
            fails as a whole (docs/coupled.md). "auto" takes them for independent, looks after the
            first solves and then seldom whether that is true, and if not solves again.
        driver: who decides that the iteration goes on. "eager": the host, which launches every
            iteration. "graph" (CUDA): the device; g and the step are captured once and repeated
            without the host, forward and backward, on the whole batch. g's Python code does not
            run again until a tensor's place, a shape, an option, or a Python value that g reads
            changes. What can't be captured, or reads objects that can't be looked into, runs
            eagerly, with a warning. "whole": one kernel, for a g of dense layers (`DenseStep`,
            and `GradientStep` of a `DenseEnergy`), that iterates every sample to its own end.
            "auto": whole where that is possible, else eager.
        trace: True keeps every sample's residual norm by iteration, `Solution.trace`; the solve is
            eager.
        callback: called as callback(iteration, x, residual_norm) after each iteration of the
            forward solve, which is eager then. iteration counts from 1. x is like x0, a detached
            copy: of a sample that iterates what g was evaluated at, so that residual_norm, [B], is
            ‖g(x) − x‖₂ there; of one that ended before, its solution, and the residual_norm of its
            end. (Where Anderson takes a mixture x back, residual_norm is of the iterate before.)
            It runs without gradients and autocast; what it returns is ignored, what it raises
            comes out as it is. Nothing waits for a device, where it is called up to twice more
            after the last sample's end. Mapped dimensions of torch.vmap come first. Where
            per_sample="auto" solves again as one system, iteration begins at 1 again.
        has_aux: g returns (x, aux), aux of any kind. The iteration drops it; after it g is called
            once at x̂ (`evaluations` counts that), and the aux of this call is `Solution.aux`. Plain
            autograd attaches it to x̂, so to all that x̂ depends on, and to the tensors that g
            reads, captured ones too: a loss on aux has its first derivatives. At a sample that
            failed, aux is what g gives at the x returned. Its gradient through x̂ is masked;
            through g's own call it is not, as in any module: choose by torch.where what the loss
            takes, and see that aux is finite for the others' sake (0 · NaN in a shared tensor).
        sizes: of a ragged batch that is padded: how many entries of each sample are valid, those of
            all tensors of x0 together, complex ones twice; a tensor [B] of whole numbers, on any
            device, which the slices of torch.vmap share. The others are zero in x0, in g's values,
            and in the loss's gradient. A padded sample then stops, forward and backward, as it
            would without its padding: atol and the rounding level count its own entries. (Of one
            system, each sample is judged so.) None: all entries are.
        norm_weights: a number w_i > 0 for each tensor of x0, in its structure: all norms are of
            ‖x‖² = Σ w_i ‖x_i‖², those of the stop rule, of Anderson's fit and of the record (the
            adjoint's have 1/w_i, as gradients do). The solver works with √w_i x_i: atol is of these
            values, and float16 must hold them; powers of 4 round nothing. None: 1 each.
        checkpoints: iterations, whole numbers that rise, as (4, 8): for a loss on the way to x̂, the
            fixed-point correction of Bai et al. (2022). `Solution.checkpoints` has g(x_k) for each,
            where x_k is the iterate after k iterations, of a sample that ended before its solution.
            This call of g at a constant x_k is recorded by plain autograd, as by `Unrolled(1)`, so
            they are attached to all that g reads, whatever `adjoint` is; `evaluations` counts it.
            Samples that end DIVERGED or NONFINITE have the iterate itself, and zero gradients, if
            the adjoint masks them. The solve is eager. Not under torch.func transforms and forward
            mode, nor in an exported program.

    Returns:
        A `Solution`; its x is shaped like x0 and attached to autograd.

    Raises:
        TypeError, ValueError: an argument is not as said above; the message says which and what
            to do.
        FixedPointError: `on_failure="raise"` and a sample did not converge.
    """
    chosen: Solver = named(solver)
    options = Options(
        *(chosen, adjoint, tolerance, max_iterations, backend, on_failure, per_sample, driver),
        *(trace, callback, has_aux, norm_weights, sizes),
        checkpoints=checkpoints,
    )
    # A loop whose length depends on the data is no part of a compiled graph.
    return apart(solve, g, x0, inputs, params, options)  # type: ignore[no-any-return]


def solve(
    g: Callable[..., Any],
    x0: State,
    inputs: Sequence[Any],
    params: Sequence[Tensor],
    options: Options,
    keywords: Mapping[str, Any] | None = None,
) -> Solution:
    """What `fixed_point` does; for `keywords` see `enter`."""
    if exporting():
        from .export import solve as exported

        return exported(g, x0, inputs, params, options, keywords)
    return enter(g, x0, inputs, params, options, keywords)
