"""In which direction a problem is solved: forward, or a linear one; see `linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch import transforming
from ..backends.native import tf32_wanted
from ..drivers.eager import Evaluation
from ..drivers.whole import tf32_allowed
from ..forms import ConvForm, Form
from ..options import Solver
from ..record import Limits
from ..solvers.coupled import Coupled
from ..state import refuse_freed
from ..status import MASKED
from .evaluation import Direct, Masked, Seen, convolutions
from .independence import INDEPENDENT, Samples
from .limits import limits_of
from .maps import Map, UserMap
from .problem import Problem


class Direction:
    """A problem with its tensors: all that a driver asks of a solve.

    Attributes:
        start: where the iteration starts, [*batch, *sample].
        given: what comes before the shared tensors, `start` first.
        params: the shared tensors: those the user passed, then a module's own.
        map: the map whose fixed point or whose adjoint is sought.
        need: positions of the tensors whose gradients follow the solve.
        transpose: whether it is an adjoint.
        linear: whether it is of u = M u + v: relative to ‖v‖, and done where that is zero.
        higher: whether it is part of a derivative of higher order, or a tangent.
        floor: of a linear one ‖v‖, [B]; skip: bool [B], the samples where that is zero, or None.
        seen: what its evaluations find out.
        refused: why the layers of g are not used, once `form` was asked for.
        coupled: whether the batch is one system.
        solver: the algorithm, for such a batch where it is one.
    """

    given: Sequence[Tensor]
    need: Sequence[int] = ()
    linear = False
    transpose = False
    higher = False
    floor: Tensor | None = None
    skip: Tensor | None = None
    refused = ""
    _looked = False
    _form: Form | None
    _evaluation: Evaluation | None = None

    def __init__(
        self,
        problem: Problem,
        map: Map,
        start: Tensor,
        params: Sequence[Tensor],
        limits: Limits | None = None,
    ) -> None:
        self.problem, self.map, self.start, self.params = problem, map, start, params
        self.seen = Seen()
        self.limits = limits or limits_of(problem, start, adjoint=self.linear)
        self.coupled = problem.samples.coupled
        self.solver: Solver = problem.options.solver
        if self.coupled:
            self.solver = Coupled(self.solver, start.shape[problem.batch_dims - 1])

    def limits_where(self, rounded: torch.dtype) -> Limits:
        """The stop rule where g's values are rounded to this dtype, whatever autocast's is."""
        return limits_of(self.problem, self.start, adjoint=self.linear, rounded=rounded)

    def spoiled(self, x: Tensor) -> Tensor:
        """X with NaN for samples that are kept though no number stands for what is sought."""
        return x

    def around(self, given: Sequence[Tensor], params: Sequence[Tensor], map: UserMap) -> Direction:
        """The same solve with other tensors, for a graph: no host looks at its samples."""
        raise NotImplementedError

    def again(self) -> Direction:
        """The same solve, from its start."""
        raise NotImplementedError

    def measure(self) -> None:
        """Find floor and skip; a linear one waits for the device."""

    def _look(self) -> Form | None:
        raise NotImplementedError

    def _opaque(self) -> Evaluation:
        raise NotImplementedError

    def outputs(self, x: Tensor, keep: Tensor | None) -> Sequence[Tensor | None]:
        """What follows the loop: the gradients."""
        raise NotImplementedError

    def spared(self, x: Tensor, keep: Tensor | None) -> Sequence[Tensor | None]:
        """The same by the samples alone that are kept, and whose v is not zero."""
        raise NotImplementedError

    def sound(self, keep: Tensor | None) -> Tensor | None:
        """Keep, without the samples left out since v = 0 at which the derivative is not finite."""
        raise NotImplementedError

    @property
    def form(self) -> Form | None:
        """The map as known layers, where it is no more than that; looked for once."""
        if not self._looked:
            self._looked = True
            self._form = self._look()
        return self._form

    def evaluation(self) -> Evaluation:
        """What a loop calls: the form where there is one, else the map with its tensors."""
        if self._evaluation is None:
            self._evaluation = self._evaluate()
        return self._evaluation

    def rows(self, evaluate: Evaluation) -> str:
        """What is iterated, for the record."""
        return "one system" if self.coupled else "masked" if evaluate.masks else "whole batch"

    def _evaluate(self) -> Evaluation:
        form, problem = self.form, self.problem
        if form is None:
            return self._opaque()
        if isinstance(form, ConvForm):
            if form.products == self.start.dtype:
                form = form.laid_out()  # all in one dtype
            kernels = convolutions(problem.options.backend, form, self.start)
            if kernels is not None:
                wanted = tf32_wanted(self.start, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
                # Anderson's step measures r all the same.
                norms = self.solver.history == 1
                tf32 = wanted and tf32_allowed(self.limits)
                return Masked(self.seen, kernels, form, self.start, tf32=tf32, norms=norms)
        g, inputs = form.opened()  # what does not depend on x stays out of the loop
        context = problem.context
        if context.autocast_dtype is not None:  # a form rounds by itself
            context = context._replace(autocast_dtype=None)
        return Direct(context, self.seen, g, inputs, None if self.coupled else INDEPENDENT)

    def _layers(self, x: Tensor, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> Form | None:
        problem, dim = self.problem, self.map.form_dim
        if dim == 0:
            return None
        assert isinstance(self.map, UserMap)
        if problem.batch_dims != 1 or transforming():
            reason = "under a torch.func transform"
        elif problem.structure:
            reason = "a state that is not one real tensor"
        elif dim != x.dim():
            reason = f"a state of {x.dim()} dimensions"
        elif self.map.arguments is not None:
            reason = "g is given more than tensors by position"
        else:
            dtype = problem.context.autocast_dtype
            if dtype is None:
                found = self.map.form(x, inputs, params)
            else:
                with problem.context.autocast():
                    found = self.map.form(x, inputs, params)
                if found is not None and x.dtype != torch.float64:  # which autocast leaves alone
                    found = found.cast(dtype, x.dtype)
            if found is not None:
                return found
            reason = "g does more than its layers"
        self.refused = f"layers not used: {reason}"
        return None

    def _samples(self) -> Samples | None:
        """What is known of the samples; None: finished ones are never left out."""
        problem = self.problem
        return None if self.coupled or problem.batch_dims != 1 else problem.samples

    def kept(self, status: Tensor) -> Tensor | None:
        """Bool, shaped like status: the samples whose gradient is not masked; None: all."""
        if self.problem.options.adjoint.failed == "use":
            return None
        keep = torch.ones_like(status, dtype=torch.bool)
        for failed in MASKED:
            keep &= status != failed
        if self.floor is not None:  # a NaN that came with the loss goes on
            keep |= ~self.floor.isfinite().view_as(keep)
        return keep


class Forward(Direction):
    """x = g(x, z; θ) (paper eq. 4)."""

    def __init__(
        self,
        problem: Problem,
        x0: Tensor,
        inputs: Sequence[Tensor],
        params: Sequence[Tensor],
        limits: Limits | None = None,
    ) -> None:
        super().__init__(problem, problem.map, x0, params, limits)
        self.inputs = inputs
        self.given = [x0, *inputs]

    def again(self) -> Forward:
        """See `Direction`."""
        return Forward(self.problem, self.start, self.inputs, self.params)

    def around(self, given: Sequence[Tensor], params: Sequence[Tensor], map: UserMap) -> Forward:
        """See `Direction`."""
        x0, *inputs = given
        return Forward(self.problem._replace(map=map), x0, inputs, params, self.limits)

    def _look(self) -> Form | None:
        """The form, unless g has closure tensors: the first call of g finds those out."""
        if self.map.form_dim == 0:
            return None
        refuse_freed(self.problem.name, "a parameter of g", *self.params)
        with self.problem.context.grad():
            form = self._layers(self.start, self.inputs, self.params)
        closure = form is not None and any(t.requires_grad for t in form.tensors)
        return None if closure and self.problem.context.grad_enabled else form

    def _opaque(self) -> Evaluation:
        context = self.problem.context
        with context.autocast():
            g = self.map.bind(self.params)
        return Direct(context, self.seen, g, self.inputs, self._samples())

    def outputs(self, x: Tensor, keep: Tensor | None) -> Sequence[Tensor | None]:
        """None."""
        return ()
