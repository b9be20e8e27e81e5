"""The derivative of a fixed point: the layer's autograd node, closed under differentiation.

x̂ = g(x̂, z; θ) is one node (paper eq. 4). Its backward solves c = (∂g/∂x)ᵀ c + v (eq. 9), which is
another such node: the fixed point of the affine step c ↦ P(h)(c) + v with x̂, v, z, θ as explicit
inputs (eq. 10); then ∂h/∂z and ∂h/∂θ at c by P (eq. 11). So every order is right. Where no
higher order is asked for, g is linearised once and only its vector-Jacobian product is iterated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import Function

from . import backends
from .drivers import eager, graph, whole
from .evaluation import (
    Adjoint,
    AdjointStep,
    Forward,
    MappedStep,
    Masked,
    PerSample,
    Step,
    UserStep,
    convolutions,
)
from .forms import ConvForm, DenseForm, Form
from .operators import legacy_batched, over_legacy_batch, partial_bound, transforming
from .record import STATUS, Limits, Progress, accumulate_dtype
from .solution import (
    MASKED,
    FixedPointError,
    FixedPointWarning,
    Record,
    Solution,
    Tolerance,
    warn,
)
from .solvers import Anderson, Picard, Solver
from .solvers.iterate import Evaluation, iterate

__all__ = ["ImplicitAdjoint"]


@dataclass(frozen=True)
class ImplicitAdjoint:
    """How the backward fixed-point iteration is solved (paper eq. 9).

    Args:
        solver: None: the forward's.
        tolerance: None: the state dtype's default rtol. The test is ‖r‖ ≤ rtol·max(‖c‖, ‖v‖), so
            the scale of the loss does not matter; an atol is added only where it is given.
        max_iterations: None: the forward's.
        failed: "mask" gives samples that ended DIVERGED or NONFINITE a zero gradient; "use" lets
            their gradient through as it is.

    Raises:
        ValueError: an option is out of range.
        TypeError: an option has the wrong type.
    """

    solver: Solver | None = None
    tolerance: Tolerance | None = None
    max_iterations: int | None = None
    failed: str = "mask"

    def __post_init__(self) -> None:
        if self.solver is not None and not isinstance(self.solver, (Picard, Anderson)):
            raise TypeError(
                f"ImplicitAdjoint: solver must be Picard or Anderson (got {self.solver!r})"
            )
        if self.tolerance is not None and not isinstance(self.tolerance, Tolerance):
            raise TypeError(
                f"ImplicitAdjoint: tolerance must be a Tolerance (got {self.tolerance!r})"
            )
        if self.max_iterations is not None:
            check_max_iterations("ImplicitAdjoint", self.max_iterations)
        if self.failed not in ("mask", "use"):
            raise ValueError(
                f'ImplicitAdjoint: failed must be "mask" or "use" (got {self.failed!r})'
            )


def check_max_iterations(owner: str, value: Any) -> None:
    """Raise unless value is a whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}: max_iterations must be a whole number >= 1 (got {value!r})")


class Report:
    """Where a problem leaves the record of its last solve; an adjoint's goes into its parent's."""

    def __init__(self, parent: Report | None = None) -> None:
        self.parent = parent
        self.record: Record | None = None

    def __call__(self, record: Record) -> None:
        self.record = record
        if self.parent is not None and self.parent.record is not None:
            self.parent.record.adjoint = record


@dataclass
class Problem:
    """One solve: the step and everything that says how to iterate it."""

    step: Step
    solver: Solver
    tolerance: Tolerance
    max_iterations: int
    adjoint: ImplicitAdjoint
    backend: str
    on_failure: str
    per_sample: bool | str
    report: Report
    unpack: Callable[[Tensor], Any]
    batch_dims: int = 1
    linear: bool = False  # the step is an AdjointStep: solved by linearising what it transposes
    name: str = "fixed_point"
    lipschitz: float | None = None
    grad_enabled: bool = False
    autocast_dtype: torch.dtype | None = None
    device_type: str = "cpu"
    driver: str = "auto"
    parts: tuple[tuple[int, ...], ...] = ()  # shapes of a tuple state
    # Found out during the solve:
    captured: bool = False
    calls: int = 0
    given: tuple[Tensor, Tensor | None] | None = field(default=None, repr=False)
    eagerly_because: str = ""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast state g was called under, whatever it is now."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast_dtype, cache_enabled=False)

    def transposed(self) -> Problem:
        """The adjoint problem: c = (∂g/∂x)ᵀ c + v."""
        a = self.adjoint
        return dataclasses.replace(
            self,
            step=AdjointStep(self.step),
            solver=a.solver or self.solver,
            tolerance=a.tolerance or Tolerance(),
            max_iterations=a.max_iterations or self.max_iterations,
            report=Report(self.report),
            unpack=lambda c: c,
            linear=True,
            name="adjoint",
            lipschitz=None,
            captured=False,
            calls=0,
            given=None,
            eagerly_because="",
        )

    def mapped(self, dims: Sequence[int | None]) -> Problem:
        """The problem over one more batch dimension, where torch.vmap maps it."""
        if self.linear:
            assert isinstance(self.step, AdjointStep)
            step: Step = AdjointStep(MappedStep(self.step.inner, dims[2:]))
        else:
            step = MappedStep(self.step, dims)
        return dataclasses.replace(self, step=step, batch_dims=self.batch_dims + 1)

    def solve(self, x0: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The fixed point and the samples whose gradient is kept; all tensors plain.

        The samples are bool [*batch], or None: all of them.
        """
        self.calls = 0
        n = self.step.n_inputs
        inputs, params = tensors[:n], tensors[n:]
        with torch.no_grad(), self._full_precision():
            if self.linear:
                assert isinstance(self.step, AdjointStep)
                g = self.step.inner.bind(params)
                x, v = inputs[:2]
                linear = Adjoint(self, g, x, v, inputs[2:], self.independence())
                return self._iterate(linear, x0, v)
            may_capture = self.driver == "graph"
            # Only dense layers are solved whole; a graph makes the form of others itself.
            form = None
            if x0.dim() == 2 or not may_capture:
                form = self._detached_form(x0, inputs, params)
            if self._takes_whole(form, x0):
                return self._solve_whole(form, x0, None)
            if may_capture:
                solved = self._solve_captured(x0, inputs, params)
                if solved is not None:
                    return solved
                form = form or self._detached_form(x0, inputs, params)
            return self._iterate(self.evaluation(form, x0, inputs, params), x0, None)

    def _detached_form(
        self, x: Tensor, inputs: Sequence[Tensor], params: Sequence[Tensor]
    ) -> Form | None:
        """The form, unless g captures what needs gradients: its first call finds that out."""
        with torch.set_grad_enabled(self.grad_enabled):
            form = self.form(x, inputs, params)
        if form is None or not any(t.requires_grad for t in form.tensors):
            return form
        return None if self.grad_enabled else form

    def independence(self) -> PerSample | None:
        """What is known of whether g treats samples independently; None: don't ask."""
        return PerSample(self.per_sample, self.step) if self.batch_dims == 1 else None

    def form(self, x: Tensor, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> Form | None:
        """The step as known layers, where it is no more than that and nothing stands around it."""
        dim = self.step.form_dim
        if dim == 0 or not isinstance(self.step, UserStep):
            return None
        if self.batch_dims != 1 or transforming():
            reason = "under a torch.func transform"
        elif self.autocast_dtype is not None:
            reason = "autocast"
        elif self.parts:
            reason = "a tuple state"
        elif dim != x.dim():
            reason = f"a state of {x.dim()} dimensions"
        else:
            found = self.step.form(x, inputs, params)
            if found is not None:
                return found
            reason = "g does more than its layers"
        self.eagerly_because = f"layers not used: {reason}"
        return None

    def evaluation(
        self,
        form: Form | None,
        x: Tensor,
        inputs: Sequence[Tensor] = (),
        params: Sequence[Tensor] = (),
    ) -> Evaluation:
        """What the loop calls: the form where there is one, else the step with its tensors."""
        if form is None:
            with self.autocast():
                g = self.step.bind(params)
            return Forward(self, g, inputs, self.independence())
        if isinstance(form, ConvForm):
            kernels = convolutions(self.backend, form, x)
            if kernels is not None:
                limits = self.limits(x, adjoint=self.linear)
                tf32 = whole.tf32_allowed(limits) and _convolutions_in_tf32(x)
                # Anderson's step measures r all the same.
                norms = self.solver.history == 1
                return Masked(self, kernels, form, x, tf32=tf32, norms=norms)
        g, inputs = form.opened()  # what does not depend on x stays out of the loop
        return Forward(self, g, inputs, PerSample(True, self.step))

    def _takes_whole(self, form: Form | None, x0: Tensor) -> TypeGuard[DenseForm]:
        """Whether one kernel solves it; else the record will say why not."""
        if self.driver not in ("auto", "whole"):
            return False
        refusal = (
            whole.refusal(form, x0, self.backend, self.solver)
            if isinstance(form, DenseForm)
            else "g is not of dense layers alone"
        )
        if refusal is None:
            return True
        if isinstance(form, DenseForm):
            self.eagerly_because = f"not whole: {refusal}"
        if self.driver == "whole":
            warn(f'{self.name}: driver="whole" is not possible: {refusal}', UserWarning)
        return False

    def _solve_whole(
        self, form: DenseForm, x0: Tensor, v: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The solve by one kernel; v as `_iterate` takes it."""
        floor, skip = self._floor(v)
        limits = self.limits(x0, adjoint=v is not None)
        x, record = whole.solve(form, x0, self.solver, limits, floor, skip)
        return x, self._finish(x, record, floor)

    def _floor(self, v: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """An adjoint's ‖v‖, and the samples where that is zero; None: there are none."""
        if v is None:
            return None, None
        b = self.batch_dims
        rows = v.reshape(v.shape[:b].numel(), v.shape[b:].numel()).to(accumulate_dtype(v.dtype))
        floor = torch.linalg.vector_norm(rows, dim=1)
        return floor, None if bool(floor.all()) else floor == 0

    def _full_precision(self) -> contextlib.AbstractContextManager[Any]:
        # The loop's own arithmetic stays out of the user's autocast, and so does a backward in one.
        if not torch.is_autocast_enabled(self.device_type):
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, enabled=False)

    def _iterate(
        self, evaluate: Evaluation, x0: Tensor, v: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        limits = self.limits(x0, adjoint=v is not None)
        backend = evaluate.steps or backends.choose(self.backend, x0)
        floor, skip = self._floor(v)
        x, record = iterate(
            evaluate,
            x0,
            self.batch_dims,
            self.solver,
            backend,
            limits,
            floor=floor,
            skip=skip,
            read=eager.reader(x0, self.max_iterations),
            driver=f"eager ({self.eagerly_because})" if self.eagerly_because else "eager",
        )
        record.evaluations = self.calls
        return x, self._finish(x, record, floor)

    def limits(self, x0: Tensor, *, adjoint: bool) -> Limits:
        """The stop rule for a state like x0."""
        size = x0.shape[self.batch_dims :].numel()
        rtol, atol = self.tolerance.resolve(x0.dtype, adjoint=adjoint)
        unit = torch.finfo(x0.dtype).eps / 2
        return Limits(
            rtol=rtol,
            offset=atol * math.sqrt(size),
            rounding=16 * unit * math.sqrt(size),
            # A fixed count runs to its end, at the rounding level too.
            patience=self.max_iterations if rtol == atol == 0 else self.solver.patience,
            max_iterations=self.max_iterations,
        )

    def _finish(self, x: Tensor, record: Record, floor: Tensor | None) -> Tensor | None:
        """Report, and say which samples' gradients are kept; None: all."""
        record.lipschitz = self.lipschitz
        self.report(record)
        if not record.failed:
            return None
        limits = record.progress.limits
        self._fail(x, record, fixed_count=limits.rtol == 0 and limits.offset == 0)
        return self.kept(record.status, floor)

    def kept(self, status: Tensor, floor: Tensor | None) -> Tensor | None:
        """Bool, shaped like status: the samples whose gradient is not masked; None: all."""
        if self.adjoint.failed == "use":
            return None
        keep = torch.ones_like(status, dtype=torch.bool)
        for masked in MASKED:
            keep &= status != masked
        if floor is not None:  # a NaN that came with the loss goes on
            keep |= ~floor.isfinite().view_as(keep)
        return keep

    def captured_solve(
        self,
        given: Sequence[Tensor],
        params: Sequence[Tensor],
        begin: Callable[[Problem, Sequence[Tensor], Sequence[Tensor]], Evaluation],
        end: Callable[[Any, Tensor, Progress], Sequence[Tensor | None]] | None = None,
        options: tuple[Any, ...] = (),
    ) -> graph.Solved | None:
        """One launch, or None where the eager driver is to run; see `graph.solve`.

        Args:
            given: what comes before g's own tensors; the first is where the iteration starts.
            params: g's shared tensors: those the user passes, then a module's own.
            begin: makes the evaluation, from a problem like this one, `given` and `params`.
            end: what follows the loop.
            options: what else begin and end depend on: which tensors need gradients.
        """
        if self.batch_dims != 1 or transforming():
            self.eagerly_because = "under a torch.func transform"
            return None
        step = self.step.inner if isinstance(self.step, AdjointStep) else self.step
        if not isinstance(step, UserStep):
            self.eagerly_because = "a derivative of higher order"
            return None
        n, m = len(given), step.n_params
        own = [t.detach() for t in params[m:]]
        alone = dataclasses.replace(self, report=Report())  # this call's problem stays as it is

        def begin_static(static: Sequence[Tensor]) -> Evaluation:
            alone.step = step.around(static[n + m :])
            return begin(alone, static[:n], [*static[n : n + m], *own])

        solved = graph.solve(
            graph.Request(
                g=step.g,
                options=(
                    *(end is None, self.parts, step.n_inputs, m, self.autocast_dtype),
                    *(self.adjoint.failed, self.backend, *options),
                ),
                given=[*given, *params[:m], *step.buffers],
                own=own,
                solver=self.solver,
                backend=backends.choose(self.backend, given[0]),
                limits=self.limits(given[0], adjoint=end is not None),
                begin=begin_static,
                end=end,
                adjoint=end is not None,
            )
        )
        if isinstance(solved, str):
            self.eagerly_because = solved
            return None
        return solved

    def _solve_captured(
        self, x0: Tensor, inputs: Sequence[Tensor], params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None] | None:
        def begin(
            problem: Problem, given: Sequence[Tensor], params: Sequence[Tensor]
        ) -> Evaluation:
            x0, *inputs = given
            return problem.evaluation(problem.form(x0, inputs, params), x0, inputs, params)

        solved = self.captured_solve([x0, *inputs], params, begin)
        if solved is None:
            return None
        return solved.x, self._finish(solved.x, solved.record, None)

    def _fail(self, x: Tensor, record: Record, *, fixed_count: bool) -> None:
        if self.on_failure == "return":
            return
        if fixed_count and not any(record.count(s) for s in MASKED):
            return
        message = f"{self.name}: {record.failures()}"
        if self.on_failure == "raise":
            raise FixedPointError(message, Solution(self.unpack(x), record))
        warn(message, FixedPointWarning)


def _convolutions_in_tf32(x: Tensor) -> bool:
    """Whether torch is set to round the operands of convolutions like x's to tf32."""
    own: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    everywhere = getattr(torch.backends, "fp32_precision", own)
    wanted = everywhere if own == "none" else own
    return x.device.type == "cuda" and x.dtype == torch.float32 and wanted == "tf32"


class FixedPoint(Function):
    """x̂ of a problem as one node. Inputs: problem, x0, g(x̂) where g captures tensors, tensors."""

    @staticmethod
    def forward(
        problem: Problem, x0: Tensor, captured: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        if problem.given is not None:
            x, keep = problem.given
        else:
            x, keep = problem.solve(x0.detach(), [t.detach() for t in tensors])
        if keep is None:
            keep = torch.ones(x.shape[: problem.batch_dims], dtype=torch.bool, device=x.device)
        return x, keep

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.problem, _, captured, *tensors = inputs
        x, keep = output
        ctx.captures = captured is not None
        ctx.mark_non_differentiable(keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, keep, *tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, _: Any) -> tuple[Any, ...]:
        problem: Problem = ctx.problem
        x, keep, *tensors = ctx.saved_tensors
        out: list[Tensor | None] = [None] * len(tensors)
        if v is None:
            return (None, None, None, *out)
        if legacy_batched(v):  # autograd.grad(is_grads_batched=True)
            return over_legacy_batch(lambda v: FixedPoint.backward(ctx, v, None), v)
        need = [i for i in range(len(tensors)) if ctx.needs_input_grad[3 + i]]
        higher = torch.is_grad_enabled() or transforming()
        if ctx.captures and higher:
            raise RuntimeError(
                "fixed_point: g captures a tensor that needs gradients, so only first derivatives "
                "exist; pass it in `inputs` (per sample) or `params` (shared) and take it as an "
                "argument of g"
            )
        masked = transforming() or not bool(keep.all())
        if masked:
            if not transforming() and not bool(keep.any()):
                zeros = [torch.zeros_like(t) if i in need else None for i, t in enumerate(tensors)]
                return (None, None, torch.zeros_like(x) if ctx.captures else None, *zeros)
            v = torch.where(_like(keep, v), v, 0)
            if problem.batch_dims == 1:
                # A failed sample's row may hold NaN, and 0·NaN is NaN: a good row stands in.
                n = problem.step.n_inputs
                rows = torch.arange(len(keep), device=keep.device)
                rows = torch.where(keep, rows, keep.to(torch.uint8).argmax())
                x, *tensors[:n] = (t.index_select(0, rows) for t in (x, *tensors[:n]))
        grads: Sequence[Tensor | None]
        c: Tensor | None = None
        with problem._full_precision():
            if higher:
                grads = _general(problem, x, v, tensors, need)
            else:
                c, grads = _first_order(problem, x, v, tensors, need)
        for i, g in zip(need, grads, strict=True):
            out[i] = g
        return (None, None, c if ctx.captures else None, *out)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "fpi_cuda.fixed_point has no forward-mode derivative yet; use reverse mode "
            "(torch.func.grad, vjp, jacrev)"
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, problem: Problem, x0: Tensor, captured: Any, *tensors: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        if captured is not None:
            raise RuntimeError(
                "fixed_point: under torch.vmap g must take every tensor that needs gradients as an "
                "argument; pass it in `inputs` or `params`"
            )

        def whole(t: Tensor, d: int | None) -> Tensor:
            return t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)

        dims = list(in_dims[3:])
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
        if problem.linear:  # x̂ and v take part in the state: a slice of their own each
            moved[:2] = [whole(t, d) for t, d in zip(tensors[:2], dims[:2], strict=True)]
            dims[:2] = [0, 0]
        mapped = problem.mapped([None if d is None else 0 for d in dims])
        out = FixedPoint.apply(mapped, whole(x0, in_dims[1]), None, *moved)  # type: ignore[no-untyped-call]
        return out, (0, 0)


class _NoDefaults(inspect.Signature):
    """Stands in for the signature that Function.apply binds at every call to fill in defaults."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments as they are: there is no default to fill in."""
        return SimpleNamespace(args=args, kwargs=kwargs, apply_defaults=lambda: None)


FixedPoint.forward.__signature__ = _NoDefaults()  # type: ignore[attr-defined]


def _like(keep: Tensor, v: Tensor) -> Tensor:
    return keep.reshape(*keep.shape, *(1,) * (v.dim() - keep.dim()))


def _general(
    problem: Problem, x: Tensor, v: Tensor, tensors: Sequence[Tensor], need: Sequence[int]
) -> Sequence[Tensor]:
    """The gradients as nodes of the same two kinds: differentiable again."""
    adjoint = problem.transposed()
    c, keep = FixedPoint.apply(adjoint, v, None, x, v, *tensors)  # type: ignore[no-untyped-call]
    c = torch.where(_like(keep, c), c, 0)
    if not need:
        return ()
    step = problem.step

    def h(x: Tensor, c: Tensor, *tensors: Tensor) -> Tensor:
        with problem.autocast():
            return torch.sum(c * step(x, *tensors))

    return partial_bound(h, [2 + i for i in need], x, c, *tensors)


def _first_order(
    problem: Problem, x: Tensor, v: Tensor, tensors: Sequence[Tensor], need: Sequence[int]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The gradients by one linearisation of g: one call, then vector-Jacobian products only."""
    adjoint = problem.transposed()
    n = problem.step.n_inputs
    solved = _whole_first_order(adjoint, x, v, tensors, need)
    if solved is not None:
        return solved
    if adjoint.driver == "graph":
        solved = _captured_first_order(adjoint, x, v, tensors, need)
        if solved is not None:
            return solved
    with adjoint._full_precision():
        linear = _linearise(adjoint, x, v, tensors[:n], tensors[n:], need)
        if isinstance(linear.evaluate, Adjoint):

            def unattached() -> Callable[..., Tensor]:
                with torch.no_grad(), problem.autocast():
                    return problem.step.bind([t.detach() for t in tensors[n:]])

            linear.evaluate.unattached = unattached
        with torch.no_grad():
            c, keep = adjoint._iterate(linear.evaluate, v, v)
    if keep is not None:
        c = torch.where(_like(keep, c), c, 0)
    return c, linear.pulled_back(c)


def _whole_first_order(
    adjoint: Problem, x: Tensor, v: Tensor, tensors: Sequence[Tensor], need: Sequence[int]
) -> tuple[Tensor, Sequence[Tensor | None]] | None:
    """The same for a step of dense layers, by one kernel; None where that can't be."""
    assert isinstance(adjoint.step, AdjointStep)
    inner = adjoint.step.inner
    if adjoint.driver != "whole" and (
        adjoint.driver != "auto" or v.dim() != 2 or inner.form_dim != 2
    ):
        return None  # known without a form, which takes g's weights to make
    n = inner.n_inputs
    leaves, wanted = _leaves(tensors, need)
    with torch.enable_grad():
        form = _inner(adjoint).form(x, leaves[:n], leaves[n:])
        if not adjoint._takes_whole(form, v):
            return None
        y, transposed = form.linearised(x.detach().requires_grad_())
    with torch.no_grad():
        c, keep = adjoint._solve_whole(transposed.plus(v), v, v)
        if keep is not None:
            c = torch.where(_like(keep, c), c, 0)
    return c, _pulled_back(y, wanted, c)


@dataclass
class Linearised:
    """c ↦ (∂g/∂x)ᵀ c + v, and g(x) attached to the leaves that need gradients."""

    evaluate: Evaluation
    y: Tensor
    wanted: Sequence[Tensor]

    def pulled_back(self, c: Tensor) -> Sequence[Tensor | None]:
        """(∂g/∂leaf)ᵀ c for each."""
        return _pulled_back(self.y, self.wanted, c)


def _pulled_back(y: Tensor, wanted: Sequence[Tensor], c: Tensor) -> Sequence[Tensor | None]:
    if not wanted or not y.requires_grad:
        return [None] * len(wanted)
    return torch.autograd.grad(y, wanted, c, allow_unused=True)


def _leaves(tensors: Sequence[Tensor], need: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors without their graph, and those of them that need gradients."""
    leaves = [t.detach() for t in tensors]
    return leaves, [leaves[i].requires_grad_() for i in need]


def _inner(adjoint: Problem) -> Problem:
    """The problem of the step that the adjoint transposes."""
    assert isinstance(adjoint.step, AdjointStep)
    return dataclasses.replace(adjoint, step=adjoint.step.inner)


def _linearise(
    adjoint: Problem,
    x: Tensor,
    v: Tensor,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    need: Sequence[int],
    *,
    captured: bool = False,
) -> Linearised:
    """g linearised at x: its form transposed where it has one, else by autograd."""
    step, n = adjoint.step, len(inputs)
    assert isinstance(step, AdjointStep)
    leaves, wanted = _leaves((*inputs, *params), need)
    with torch.enable_grad():
        form = _inner(adjoint).form(x, leaves[:n], leaves[n:]) if step.inner.form_dim else None
        if form is not None:
            y, transposed = form.linearised(x.detach().requires_grad_())
            return Linearised(adjoint.evaluation(transposed.plus(v), v), y, wanted)
        with adjoint.autocast():
            g = step.inner.bind(leaves[n:])
    per_sample = None if captured else adjoint.independence()
    evaluate = Adjoint(adjoint, g, x, v, leaves[:n], per_sample)
    return Linearised(evaluate, evaluate.y, wanted)


def _captured_first_order(
    adjoint: Problem, x: Tensor, v: Tensor, tensors: Sequence[Tensor], need: Sequence[int]
) -> tuple[Tensor, Sequence[Tensor | None]] | None:
    """The same by one launch: linearisation, loop and gradients; None where that can't be."""
    n = adjoint.step.n_inputs - 2
    linear: list[Linearised] = []

    def begin(problem: Problem, given: Sequence[Tensor], params: Sequence[Tensor]) -> Evaluation:
        v, x, *inputs = given
        problem.step = AdjointStep(problem.step)
        linear[:] = [_linearise(problem, x, v, inputs, params, need, captured=True)]
        return linear[0].evaluate

    def end(_: Evaluation, c: Tensor, progress: Progress) -> Sequence[Tensor | None]:
        keep = adjoint.kept(progress.counters[:, STATUS] - 1, progress.floor)
        if keep is not None:
            c = torch.where(_like(keep, c), c, 0)
        return [c, *linear.pop().pulled_back(c)]

    with torch.no_grad(), adjoint._full_precision():
        solved = adjoint.captured_solve(
            [v, x, *tensors[:n]], tensors[n:], begin, end, options=tuple(need)
        )
        if solved is None:
            return None
        adjoint._finish(solved.x, solved.record, None)
    c, *grads = solved.outputs
    assert c is not None
    return c, grads
