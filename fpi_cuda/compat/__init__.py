"""The interface of the paper's first, pure-Python layer, on this library's autograd nodes.

For code written against it: tuples of tensors, conditions as callables, one stop decision for the
whole batch. docs/dropin.md says how it is the old layer's twin, and what `accelerate=True` makes of
the same call. Derivatives of every order are right either way.

What is kept, though `fixed_point` does otherwise:

* The state is one vector of the whole batch: a sample's answer depends on its batch-mates, and
  `m_anderson` mixes with one set of weights for all of them. It is the number of differences, so
  the window holds m_anderson + 1 iterates.
* A condition decides when to stop, and is asked first after the second evaluation of g, with the
  count 1: `maxIter=k` makes k + 1 evaluations. With `default_term_cond` the threshold is compared
  with a *squared* norm over the first tensor alone, relative to the state before it; `display=k`
  prints every k-th change; without NaN `maxIter=0` means no limit.
* The backward iteration is the same function on the transposed Jacobian, `backward_cond` in place
  of `forward_cond`; its own derivative swaps them again.
* x0 gets no gradient.

What differs, on purpose:

* NaN or Inf in the state ends the iteration with a `FixedPointWarning`; the state is returned as it
  is. It used to end in silence.
* `minIter` keeps the loop going while the count is not above it, as it was meant; a count not above
  it used to end the loop. `maxIter` is the stronger of the two.
* Norms are taken in the state's dtype, as before, and their quotient in float64. Where a norm
  overflows, or underflows and epsilon is below 1e-30, the change is computed again in float64 and
  scaled, and the loop goes on by that; it used to end, or to be called converged. `m_anderson`
  takes a plain step where a norm overflows.
* `m_anderson` works on current torch. `eps` is relative to the trace of the Gram matrix, and the
  default stands for a value that suits the dtype; an iteration whose residual keeps growing past
  a factor of 10⁴ is given up with a warning.
* The tensors of x0 must have one dtype and device.
* A module's buffers (running statistics) move once a call instead of once an iteration, and its
  parametrisations are evaluated once a call.
* Where g is a plain function, first derivatives also reach tensors that it captures and `param`
  does not name; a second one raises and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import operators
from .._check import check_whole
from ..options import Solver
from ..solution import Solution, kept
from ..solvers import Anderson, Picard
from . import each_sample, whole_batch
from .conditions import Condition, Tensors, default_term_cond, read
from .tuples import Scalar, Step, tensors

__all__ = ["FixedPointIteration", "default_term_cond", "fixed_point_iteration", "partial"]

_EPS = 1e-15


def fixed_point_iteration(
    y: Sequence[Tensor],
    x0: Sequence[Tensor],
    g: Step,
    forward_cond: Condition = default_term_cond,
    backward_cond: Condition = default_term_cond,
    m_anderson: int = 0,
    eps: float = _EPS,
    param: Sequence[Tensor] = (),
    *,
    accelerate: bool = False,
) -> Tensors:
    """Iterate x ← g(x, y) while forward_cond(count, x, x_prev) holds; differentiable to any order.

    Args:
        y: what g depends on besides x: tensors of any shapes.
        x0: where to start: floating tensors of any shapes and one dtype. Gets no gradient.
        g: takes and returns tuples. Every tensor it touches is in x, in y, in `param` or, where it
            is a module, among its own parameters.
        forward_cond: asked after every evaluation but the first, with the count 1 at first; true:
            keep going.
        backward_cond: the same for the backward iteration, whose state is a tuple like x.
        m_anderson: Anderson acceleration over the whole batch, with the differences of so many
            successive iterates; 0: plain iteration.
        eps: Anderson's regulariser, relative; the default stands for one that suits the dtype.
        param: tensors that a plain function g captures and that get derivatives.
        accelerate: solve by `fpi_cuda.fixed_point`, each sample to the tolerance that the
            conditions imply, with Anderson on each (m_anderson + 1 iterates, 0: its default). The
            tensors of x0 must have the batch first; those of y that have as many rows hold one for
            each sample. Conditions must hand on to `default_term_cond`: their threshold, epsilon,
            normalized and maxIter are read (0: 10,000 evaluations), minIter and display do nothing.

    Returns:
        The last state, a tuple like x0.

    Raises:
        TypeError, ValueError: x0 or g's value is no tuple of tensors as said above; with
            accelerate, a condition can't be read or x0 has no batch.
        RuntimeError: a second derivative is asked for through a captured tensor.

    Warns:
        FixedPointWarning: the state became NaN or Inf; with accelerate, samples did not converge.

    Example:
        >>> a = torch.tensor([0.7], requires_grad=True)
        >>> (x,) = fixed_point_iteration(
        ...     (a,), (torch.zeros(1),), lambda x, y: (torch.tanh(0.6 * x[0] + y[0]),)
        ... )
        >>> bool(abs(x - torch.tanh(0.6 * x + a)) < 1e-4)
        True
    """
    given = tensors("y", y), tensors("x0", x0), g, forward_cond, backward_cond
    more = _solver(m_anderson, eps, accelerate), tensors("param", param)
    if not accelerate:
        return _own(whole_batch.solve(*given, *more))
    return _own(each_sample.solve(*given, *more).x)


class FixedPointIteration(nn.Module):
    """The layer form: `FixedPointIteration(g, ...)(y, x0)`; checkpoints hold g's keys under `g.`.

    Args:
        g: a module or function, as in `fixed_point_iteration`.
        forward_cond, backward_cond, m_anderson, eps: as in `fixed_point_iteration`.
        param: as there; needed only where g is a plain function.
        accelerate: as there. The record of the last call is then in `last`, a `Solution`.
    """

    accelerate: bool = False  # a layer that was pickled without
    last: Solution | None = None

    def __init__(
        self,
        g: Step,
        forward_cond: Condition = default_term_cond,
        backward_cond: Condition = default_term_cond,
        m_anderson: int = 0,
        eps: float = _EPS,
        param: Sequence[Tensor] = (),
        *,
        accelerate: bool = False,
    ) -> None:
        super().__init__()
        _solver(m_anderson, eps, accelerate)
        if accelerate:
            read("forward_cond", forward_cond)
            read("backward_cond", backward_cond)
        self.g = g
        self.forward_cond = forward_cond
        self.backward_cond = backward_cond
        self.m_anderson = m_anderson
        self.eps = eps
        self.param = tuple(param)
        self.accelerate = accelerate

    def forward(self, y: Sequence[Tensor], x0: Sequence[Tensor]) -> Tensors:
        """The fixed point for y, started at x0: a tuple like x0."""
        given = y, x0, self.g, self.forward_cond, self.backward_cond
        if not self.accelerate:
            return fixed_point_iteration(*given, self.m_anderson, self.eps, self.param)
        solver = _solver(self.m_anderson, self.eps, True)
        solution = each_sample.solve(
            tensors("y", y), tensors("x0", x0), *given[2:], solver, self.param
        )
        self.last = kept(solution)
        return _own(solution.x)

    def __getstate__(self) -> dict[str, Any]:
        """Without the record of the last call."""
        return {**self.__dict__, "last": None}


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
    x, y, param = tensors("x", x), tensors("y", y), tensors("param", param)
    r = Scalar(fun, len(x), len(y), param)
    return operators.partial(r, *x, *y, *param, which=tuple(range(len(x))))


def _solver(m_anderson: int, eps: float, accelerate: bool) -> Solver:
    check_whole(
        "compat", "m_anderson", m_anderson, 0, "; the number of differences, 0 is plain iteration"
    )
    ridge = None if eps == _EPS else eps
    if not m_anderson:
        return Anderson(ridge=ridge) if accelerate else Picard()
    return Anderson(history=m_anderson + 1, ridge=ridge)


def _own(x: Any) -> Tensors:
    """A copy of the state, so that the caller may change it in place."""
    return tuple(t.clone() for t in ((x,) if isinstance(x, Tensor) else x))
