"""Linear directions: u = M u + v, for the tangent of a fixed point and for its adjoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import normal
from ..derivatives import for_modules
from ..drivers.eager import Evaluation
from ..forms import Form
from ..norms import row_norms
from ..record import Limits, accumulate_dtype
from ..status import Status
from .direction import Direction, Forward
from .evaluation import Linearised
from .failed import masked, pulled_back
from .maps import LinearMap, UserMap
from .problem import Problem

__all__ = ["Backward", "Linear", "direction_of"]


class Linear(Direction):
    """u = M u + v, with M = ∂g/∂x at x̂ or its transpose; g linearised once.

    Args:
        problem: the linear one; its map linearises g's.
        x: x̂.
        v: what is added: of a tangent (∂g/∂z) dz, of an adjoint the gradient that comes in.
        tensors: g's, per sample and then shared.
        need: positions in `tensors`, of those whose gradients follow.
        higher: see `Direction`.
        compacting: whether finished samples may be left out.
        limits: the stop rule; None: the problem's.
    """

    linear = True
    _lost: Tensor | None = None  # bool [*batch], see `_overflowed`

    def __init__(
        self,
        problem: Problem,
        x: Tensor,
        v: Tensor,
        tensors: Sequence[Tensor],
        need: Sequence[int] = (),
        *,
        higher: bool = False,
        compacting: bool = True,
        limits: Limits | None = None,
    ) -> None:
        assert isinstance(problem.map, LinearMap)
        inner, self.transpose = problem.map.inner, problem.map.transpose
        n = inner.n_inputs
        super().__init__(problem, inner, v, tensors[n:], limits)
        self.x, self.v, self.need, self.higher, self.compacting = x, v, need, higher, compacting
        self._given = problem, x, v, tensors, need
        self.given = [v, x, *tensors[:n]]
        leaves = [normal(t.detach()) for t in tensors]  # without their graph
        self._wanted = [leaves[i].requires_grad_() for i in need]
        self._inputs, self._params = leaves[:n], leaves[n:]
        self._y: Tensor | None = None  # g(x̂), attached to the leaves

    def again(self) -> Linear:
        """See `Direction`."""
        return type(self)(*self._given, higher=self.higher, compacting=self.compacting)

    def scale(self, look: bool = True) -> Tensor:
        """[B]: what u is measured by beside itself; look: whether the host may, at values.

        ‖v‖; in a batch that is one system at least its root mean square there, so that a loss on
        few samples does not ask for digits of what is next to nothing elsewhere.
        """
        b, shape = self.problem.batch_dims, self.v.shape
        rows = self.v.reshape(shape[0] if b == 1 else shape[:b].numel(), shape[b:].numel())
        scale = row_norms(rows, look)
        if self.coupled and len(scale):
            systems = scale.view(-1, shape[b - 1])
            least = row_norms(systems, look) / math.sqrt(systems.shape[1])
            scale = torch.maximum(systems, least[:, None]).view(-1)
        return scale.to(accumulate_dtype(rows.dtype))

    def measure(self) -> None:
        """Floor, the samples where it is zero, as v is (of one system: everywhere); the start."""
        self.floor = self.scale()
        self.skip = None if bool(self.floor.all()) else self.floor == 0
        memory = self.problem.options.memory
        if memory is not None:
            self.start = memory.adjoint_start(self.v, self.coupled)

    def _unit(self) -> Tensor | None:
        """Powers of two by which v comes near 1, where autocast rounds u to float16; else None.

        One for each sample, or system: M u is then (M (unit · u)) / unit, and no scale of the loss
        is out of float16's range.
        """
        v, first = self.v, self.problem.batch_dims - self.coupled
        if self.problem.context.autocast_dtype != torch.float16 or not v.numel():
            return None
        if v.dtype not in (torch.float32, torch.bfloat16):  # float16's own range, or not rounded
            return None
        most = torch.where(v.isfinite(), v.abs(), 0)
        for dim in range(first, v.dim()):
            most = most.amax(dim, keepdim=True)
        exponent = torch.frexp(most).exponent.clamp(-100, 100)
        return torch.ldexp(torch.ones_like(most), -exponent)

    def _look(self) -> Form | None:
        if not isinstance(self.map, UserMap):
            return None
        with torch.set_grad_enabled(True):
            form = self._layers(self.x, self._inputs, self._params)
            if form is None:
                return None
            x = self.x.detach().requires_grad_()
            self._y, linear = form.linearised(x, transpose=self.transpose)
            linear, unit = linear.plus(self.v), self._unit()
            return linear if unit is None else dataclasses.replace(linear, unit=unit)

    def _opaque(self) -> Evaluation:
        context, lone = self.problem.context, self.compacting and not self.higher
        map, params = self.map, self.params

        def unattached() -> Any:  # holds nothing of the direction, which holds the evaluation
            with torch.no_grad(), context.autocast():
                return map.bind([t.detach() for t in params])

        with torch.set_grad_enabled(True), context.autocast():
            inputs = for_modules(self._inputs)
            g = self.map.bind(for_modules(self._params))
        evaluate = Linearised(
            *(context, self.seen, g, self.x, self.v, inputs),
            self._samples() if self.compacting else None,
            unattached if lone else None,
            transpose=self.transpose,
            unit=self._unit(),
        )
        self._y = evaluate.y
        return evaluate

    def kept(self, status: Tensor) -> Tensor | None:
        """See `Direction`; those too whose u overflowed, which `spoiled` marks."""
        keep, self._lost = super().kept(status), self._overflowed(status)
        return keep if keep is None or self._lost is None else keep | self._lost

    def _overflowed(self, status: Tensor) -> Tensor | None:
        """Bool, shaped like status: where an adjoint left float16's range; else None.

        g's derivative and what came in are finite there. The u returned is that of an iteration
        before, and zero would be as wrong: a loss scaler must see that its scale was too large.
        """
        if self.start.dtype != torch.float16 or not self.transpose:
            return None
        assert self.floor is not None
        at_zero = self.evaluation()(torch.zeros_like(self.start)).reshape(len(self.floor), -1)
        fine = at_zero.isfinite().all(1) & self.floor.isfinite()
        return (status == Status.NONFINITE) & fine.view_as(status)

    def spoiled(self, x: Tensor) -> Tensor:
        """See `Direction`."""
        lost = self._lost
        if lost is None:
            return x
        return torch.where(lost.view(*lost.shape, *(1,) * (x.dim() - lost.dim())), torch.nan, x)

    def sound(self, keep: Tensor | None) -> Tensor | None:
        """See `Direction`."""
        if self.skip is None or self.form is not None:  # whose activations have finite derivatives
            return keep
        if self.problem.options.adjoint.failed == "use":
            return keep
        at_zero = self.evaluation()(torch.zeros_like(self.start))
        rows = at_zero.reshape(len(self.skip), -1).isfinite().all(1)
        sound = (rows | ~self.skip).view(self.start.shape[: self.problem.batch_dims])
        if bool(sound.all()):
            return keep
        return sound if keep is None else keep & sound

    def outputs(self, x: Tensor, keep: Tensor | None) -> Sequence[Tensor | None]:
        """None."""
        return ()


class Backward(Linear):
    """c = (∂g/∂x)ᵀ c + v at x̂ (paper eq. 9); then (∂g/∂tensor)ᵀ c (eq. 11)."""

    def around(self, given: Sequence[Tensor], params: Sequence[Tensor], map: UserMap) -> Backward:
        """See `Direction`."""
        v, x, *inputs = given
        problem = self.problem._replace(map=LinearMap(map, transpose=True))
        tensors = [*inputs, *params]
        return Backward(problem, x, v, tensors, self.need, compacting=False, limits=self.limits)

    def outputs(self, x: Tensor, keep: Tensor | None) -> Sequence[Tensor | None]:
        """C without the samples that failed, and the gradients by it."""
        c, y = masked(self.spoiled(x), keep), self._y
        if not self._wanted or y is None or not y.requires_grad:
            return [c, *[None] * len(self._wanted)]
        return [c, *torch.autograd.grad(y, self._wanted, c, allow_unused=True)]

    def spared(self, x: Tensor, keep: Tensor | None) -> Sequence[Tensor | None]:
        """See `Direction`. One more call of g, where its derivative is known to be finite."""
        problem, _, _, tensors, need = self._given
        assert isinstance(problem.map, LinearMap)
        assert self.floor is not None
        c = masked(self.spoiled(x), keep)
        whose = (self.floor != 0).view(x.shape[: problem.batch_dims])
        if keep is not None:
            whose = keep & whose
        forward = problem._replace(map=problem.map.inner)
        return [c, *pulled_back(forward, whose, self.x, c, tensors, need)]


def direction_of(problem: Problem, x0: Tensor, tensors: Sequence[Tensor]) -> Direction:
    """The direction of a node's own solve; all tensors plain."""
    if isinstance(problem.map, LinearMap):
        x, v, *rest = tensors
        return Linear(problem, x, v, rest, higher=True)
    n = problem.map.n_inputs
    return Forward(problem, x0, tensors[:n], tensors[n:])
