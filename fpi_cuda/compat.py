"""The interface of the paper's first, pure-Python layer, on this library's autograd nodes.

For code written against it: tuples of tensors, conditions as callables, one stop decision for the
whole batch. New code should use `fixed_point`, which decides for each sample and says what
happened. Derivatives of every order are right here too: they are made of the same nodes.

What is kept, though `fixed_point` does otherwise:

* The state is one vector of the whole batch: a sample's answer depends on its batch-mates, and
  `m_anderson` mixes with one set of weights for all of them.
* A condition decides when to stop, and is asked first after the second evaluation of g. With
  `default_term_cond` the threshold is compared with a *squared* norm over the first tensor alone.
* The backward iteration is the same function on the transposed Jacobian, `backward_cond` in place
  of `forward_cond`; its own derivative swaps them again.
* x0 gets no gradient.

What differs, on purpose:

* NaN or Inf in the state ends the iteration with a `FixedPointWarning`; the state is returned as it
  is. It used to end in silence. Without NaN, `maxIter=0` still means no limit.
* `m_anderson` works on current torch. It counts the iterates of the window, the current one
  included (1 is plain iteration). `eps` is relative to the trace of the Gram matrix, and the
  default stands for a value that suits the dtype; an iteration whose residual keeps growing past
  a factor of 10⁴ is given up with a warning.
* The tensors of x0 must have one dtype and device.
* A module's buffers (running statistics) move once a call instead of once an iteration, and its
  parametrisations are evaluated once a call.
* `display` writes to the logger "fpi_cuda.compat" instead of printing.
* Where g is a plain function, first derivatives also reach tensors that it captures and `param`
  does not name; a second one raises and says so.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.overrides import TorchFunctionMode

from . import backends, operators
from ._torch import tree_map
from .adjoint import ImplicitAdjoint
from .drivers.support import Solved, Support
from .options import Options, Solver, Tolerance
from .record import ACTIVE_ROWS, NEVER, Progress
from .solution import FixedPointWarning, warn
from .solve.independence import samples_of
from .solve.maps import UserMap
from .solve.problem import Context, Problem, Report
from .solvers import Anderson, Picard
from .state import check_tuple

__all__ = ["FixedPointIteration", "default_term_cond", "fixed_point_iteration", "partial"]

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensors, Tensors], Sequence[Tensor]]
Condition = Callable[[int, Tensors, Tensors], bool]

_EPS = 1e-15
_log = logging.getLogger(__name__)


def default_term_cond(
    cnt: int,
    x: Sequence[Tensor],
    px: Sequence[Tensor],
    threshold: float = 1e-10,
    epsilon: float = 1e-8,
    normalized: bool = True,
    display: bool = False,
    minIter: int = 0,
    maxIter: int = 0,
) -> bool:
    """Whether to keep going: ‖x₀ − px₀‖² > threshold·(‖x₀‖² + epsilon), x₀ the first tensor whole.

    The norm is squared and over the batch: the relative change allowed is √threshold.

    Args:
        cnt: evaluations of g so far.
        x: the newest state; only its first tensor counts.
        px: the state before it.
        threshold: bound on the squared change.
        epsilon: keeps a fixed point at zero reachable.
        normalized: False compares ‖x₀ − px₀‖² with the threshold itself.
        display: log the count and the change.
        minIter: keep going below this count.
        maxIter: stop at this count; 0: no limit.

    Returns:
        True to keep going; False where the change is NaN.
    """
    with torch.no_grad():
        new, old = x[0], px[0]
        kind = torch.promote_types(new.dtype, torch.float32)
        change, size = (float(vector_norm(t, dtype=kind)) ** 2 for t in (new - old, new))
        if math.isfinite(change) and math.isfinite(size):
            change = change / (size + epsilon) if normalized else change
        else:  # NaN or Inf, unless it is only the square that overflowed
            change = math.inf if bool((new - old).isfinite().all()) else math.nan
    if display:
        _log.info("iteration %d: squared change %.3e", cnt, change)
    if math.isnan(change):
        return False
    if cnt < minIter:
        return True
    if 0 < maxIter <= cnt:
        return False
    return change > threshold


def fixed_point_iteration(
    y: Sequence[Tensor],
    x0: Sequence[Tensor],
    g: Step,
    forward_cond: Condition = default_term_cond,
    backward_cond: Condition = default_term_cond,
    m_anderson: int = 0,
    eps: float = _EPS,
    param: Sequence[Tensor] = (),
) -> Tensors:
    """Iterate x ← g(x, y) while forward_cond(count, x, x_prev) holds; differentiable to any order.

    Args:
        y: what g depends on besides x: tensors of any shapes.
        x0: where to start: floating tensors of any shapes and one dtype. Gets no gradient.
        g: takes and returns tuples. Every tensor it touches is in x, in y, in `param` or, where it
            is a module, among its own parameters.
        forward_cond: asked after every evaluation but the first; true: keep going.
        backward_cond: the same for the backward iteration, whose state is a tuple like x.
        m_anderson: window of Anderson acceleration over the whole batch; 0: plain iteration.
        eps: Anderson's regulariser, relative; the default stands for one that suits the dtype.
        param: tensors that a plain function g captures and that get derivatives.

    Returns:
        The last state, a tuple like x0.

    Raises:
        TypeError, ValueError: x0 or g's value is no tuple of tensors as said above.
        RuntimeError: a second derivative is asked for through a captured tensor.

    Warns:
        FixedPointWarning: the state became NaN or Inf.

    Example:
        >>> a = torch.tensor([0.7], requires_grad=True)
        >>> (x,) = fixed_point_iteration(
        ...     (a,), (torch.zeros(1),), lambda x, y: (torch.tanh(0.6 * x[0] + y[0]),)
        ... )
        >>> bool(abs(x - torch.tanh(0.6 * x + a)) < 1e-4)
        True
    """
    y, x0, param = _tensors("y", y), _tensors("x0", x0), _tensors("param", param)
    map = _TupleMap(g, y, x0, param)
    adjoint = _Swapping(failed="use", forward=forward_cond, backward=backward_cond)
    problem = Problem(
        map=map,
        options=Options(
            _solver(m_anderson, eps), adjoint, Tolerance(), 1, "auto", "warn", True, "eager"
        ),
        drivers=(_Conditioned(forward_cond),),
        context=Context.here(x0[0].device.type),
        unpack=map.unpack,
        samples=samples_of(True, map, x0[0]),
        name="compat.fixed_point_iteration",
        advice="pass it in y or param",
    )
    tensors = (*y, *param, *map.own)
    x = adjoint.attach(problem, map.pack(x0).detach(), tensors, Report())
    out: Tensors = map.unpack(x)
    map.settle(x, (y,), (), captured=False)
    return out


class FixedPointIteration(nn.Module):
    """The layer form: `FixedPointIteration(g, ...)(y, x0)`; checkpoints hold g's keys under `g.`.

    Args:
        g: a module or function, as in `fixed_point_iteration`.
        forward_cond, backward_cond, m_anderson, eps: as in `fixed_point_iteration`.
        param: as there; needed only where g is a plain function.
    """

    def __init__(
        self,
        g: Step,
        forward_cond: Condition = default_term_cond,
        backward_cond: Condition = default_term_cond,
        m_anderson: int = 0,
        eps: float = _EPS,
        param: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        _solver(m_anderson, eps)
        self.g = g
        self.forward_cond = forward_cond
        self.backward_cond = backward_cond
        self.m_anderson = m_anderson
        self.eps = eps
        self.param = tuple(param)

    def forward(self, y: Sequence[Tensor], x0: Sequence[Tensor]) -> Tensors:
        """The fixed point for y, started at x0: a tuple like x0."""
        conditions = self.forward_cond, self.backward_cond
        given = y, x0, self.g, *conditions, self.m_anderson, self.eps, self.param
        return fixed_point_iteration(*given)


def partial(
    fun: Callable[[Tensors, Tensors], Any],
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    param: Sequence[Tensor] = (),
) -> Tensors:
    """∂fun(x, y)/∂x by P, x, y and param taken as independent: the gradient inside FPI_GD.

    Args:
        fun: takes the tuples x and y; returns a scalar, or a tuple that holds one.
        x: tensors to differentiate by.
        y: tensors held fixed; derivatives of the result flow to them.
        param: tensors that a plain function captures; a module's own are found.

    Returns:
        One tensor for each of x, attached to the graph of x, y and param.
    """
    x, y, param = _tensors("x", x), _tensors("y", y), _tensors("param", param)
    r = _Scalar(fun, len(x), len(y), param)
    return operators.partial(r, *x, *y, *param, which=tuple(range(len(x))))


def _tensors(name: str, value: Any) -> Tensors:
    if not isinstance(value, (tuple, list)) or not all(isinstance(t, Tensor) for t in value):
        raise TypeError(
            f"compat: {name} must be a tuple of tensors (got {type(value).__name__}); write "
            f"({name},) for a single one"
        )
    return tuple(value)


def _solver(m_anderson: int, eps: float) -> Solver:
    if not m_anderson:
        return Picard()
    return Anderson(history=m_anderson, ridge=None if eps == _EPS else eps)


class _Substitute(TorchFunctionMode):
    """Puts explicit tensors in the place of closure tensors, in every torch call."""

    def __init__(self, closure: Tensors, given: Sequence[Tensor]) -> None:
        super().__init__()
        self._given = {id(c): t for c, t in zip(closure, given, strict=True)}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(
            lambda t: self._given.get(id(t), t) if isinstance(t, Tensor) else t,
            (args, kwargs or {}),
        )
        return func(*args, **kwargs)


class _TupleMap(UserMap):
    """g(x, y) on one row that holds the whole state; y and param count as shared."""

    def __init__(self, g: Step, y: Tensors, x0: Tensors, param: Tensors) -> None:
        if not x0:
            raise ValueError("compat: x0 must hold at least one tensor (got an empty tuple)")
        for i, t in enumerate(x0):
            if not t.is_floating_point() or t.dtype != x0[0].dtype or t.device != x0[0].device:
                raise TypeError(
                    f"compat: x0[{i}] must be floating, of x0[0]'s dtype and device, "
                    f"{x0[0].dtype} on {x0[0].device} (got {t.dtype} on {t.device})"
                )
        shapes = [t.shape for t in x0]
        sizes = [shape.numel() for shape in shapes]

        def pack(x: Any) -> Tensor:
            check_tuple("compat", x, len(shapes))
            for i, (t, shape) in enumerate(zip(x, shapes, strict=True)):
                if not isinstance(t, Tensor) or t.shape != shape:
                    got = str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__
                    raise ValueError(
                        f"compat: g must return a tensor of x0's shape {tuple(shape)} at {i} "
                        f"(got {got})"
                    )
            rows = [t.reshape(1, -1) for t in x]
            return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

        def unpack(x: Tensor) -> Tensors:
            lead = x.shape[:-2]  # dimensions that torch.vmap added
            parts = x.split(sizes, -1) if len(sizes) > 1 else (x,)
            return tuple(t.reshape((*lead, *s)) for t, s in zip(parts, shapes, strict=True))

        super().__init__(g, 0, len(y) + len(param), pack, unpack)
        self.form_dim = 0  # the state is one row of all samples, whatever g is
        self.n_y, self.param = len(y), param

    def bind(self, params: Sequence[Tensor]) -> Callable[..., Tensor]:
        """The map at these y, param and parameters."""
        y = tuple(params[: self.n_y])
        given = params[self.n_y : self.n_params]
        g = self.binding.bind(params[self.n_params :]) if self.binding else self.g

        def bound(x: Tensor) -> Tensor:
            if not self.param:
                return self.pack(g(self.unpack(x), y))
            with _Substitute(self.param, given):
                return self.pack(g(self.unpack(x), y))

        return bound


@dataclass(frozen=True)
class _Swapping(ImplicitAdjoint):
    """The adjoint's loop asks the other condition."""

    forward: Condition = default_term_cond
    backward: Condition = default_term_cond

    def transposed(self, problem: Problem) -> Problem:
        """The adjoint problem, conditions swapped."""
        swapped = dataclasses.replace(self, forward=self.backward, backward=self.forward)
        return (
            super()
            .transposed(problem)
            ._replace(
                options=problem.options._replace(adjoint=swapped),
                drivers=(_Conditioned(self.backward),),
                unpack=problem.unpack,
                name=f"{problem.name} (backward)",
            )
        )


class _Conditioned:
    """A driver whose loop goes on while a condition on the whole state holds."""

    def __init__(self, cond: Condition) -> None:
        self.cond = cond

    def support(self, direction: Any, because: str) -> Support:
        """Takes every solve."""
        return Support(self._solve)

    def _solve(self, direction: Any, because: str) -> Solved:
        evaluate, problem = direction.evaluation(), direction.problem
        x, k = direction.start.clone(), 0
        advance = self._accelerated(problem.options, x)
        while True:
            k += 1
            gx, previous = evaluate(x), x
            # A sum is NaN or Inf where a value is; where it only overflowed, the values are asked.
            if not math.isfinite(float(gx.detach().sum())) and not bool(gx.isfinite().all()):
                warn(
                    f"{problem.name}: NaN or Inf after {k} evaluations of g; the state is returned "
                    "as it is. Look at x0 and y, or make g a contraction.",
                    FixedPointWarning,
                )
                x = gx
                break
            if advance is None:
                x = gx
            else:
                x, active = advance(x, gx)
                if not active:
                    warn(
                        f"{problem.name}: the residual kept growing; given up after {k} "
                        "evaluations of g. Make g a contraction, or use m_anderson=0 to look at "
                        "the iterates.",
                        FixedPointWarning,
                    )
                    break
            if k > 1 and not self.cond(k, problem.unpack(x), problem.unpack(previous)):
                break
        return Solved(x, None)

    @staticmethod
    def _accelerated(options: Options, x: Tensor) -> Callable[..., tuple[Tensor, bool]] | None:
        if isinstance(options.solver, Picard):
            return None
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        progress = Progress(rows, NEVER)  # the condition alone decides
        update = options.solver.start(backends.choose(options.backend, x), progress, rows)

        def advance(x: Tensor, gx: Tensor) -> tuple[Tensor, bool]:
            moved = x.reshape(rows.shape).clone()
            update(moved, gx.reshape(rows.shape).contiguous())
            return moved.view(x.shape), int(progress.tally[ACTIVE_ROWS]) > 0

        return advance


class _Scalar(nn.Module):
    """A function of the tuples x, y as a scalar function of all their tensors and param."""

    def __init__(self, fun: Any, n_x: int, n_y: int, param: Tensors) -> None:
        super().__init__()
        self.fun, self.n_x, self.n_y, self.param = fun, n_x, n_y, param

    def forward(self, *s: Tensor) -> Tensor:
        """fun(x, y)."""
        x, y = s[: self.n_x], s[self.n_x : self.n_x + self.n_y]
        if self.param:
            with _Substitute(self.param, s[self.n_x + self.n_y :]):
                value = self.fun(x, y)
        else:
            value = self.fun(x, y)
        if isinstance(value, (tuple, list)) and len(value) == 1:
            value = value[0]
        return cast(Tensor, value)
