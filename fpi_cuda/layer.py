"""`FixedPointLayer`: the fixed point as a module."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Sequence
from numbers import Real
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ._torch import transforming
from ._torch_graphs import apart, constant_in_graphs, exporting, odd, valueless
from .adjoint import ImplicitAdjoint
from .fixed_point import solve
from .options import Adjoint, Options, Solver, Tolerance
from .solution import Solution, State, each, kept
from .solve.problem import Context
from .solvers import Anderson, named
from .start import start_of
from .state import state_of
from .warm import CAPACITY, Slot, Warm, check_key

__all__ = ["FixedPointLayer"]

_OF_CALLS = ("sizes", "memory", "checkpoints")
_OPTIONS = tuple(n for n in Options._fields if n not in _OF_CALLS)


_layers: WeakValueDictionary[int, FixedPointLayer] = WeakValueDictionary()  # that live, by id


class FixedPointLayer(nn.Module):
    """x̂ = g(x̂, z; θ) as a layer: `layer(z)` returns the fixed point of x ↦ g(x, z).

    Adds no parameter and no buffer to g's. The record of the last call is in `last`; forward of an
    exported model may return its tensors (docs/deploy.md).

    Args:
        g: a module or callable g(x, *inputs).
        state_shape: the shape of one sample's state; shapes in a tuple, list, dict or dataclass,
            nested, for a state of that structure; a function of the first input that returns either
            (images of any size). None: g's own `state_shape` where it has one, else the first
            input's. The state is real, for a complex input too: pass a complex one as x0.
        solver, adjoint, tolerance, max_iterations, backend, on_failure, per_sample, driver,
            trace, callback, has_aux, norm_weights: as in `fixed_point`. With has_aux the layer
            returns (x̂, aux); `last` has no aux. (For `checkpoints`, call `fixed_point` in a
            module's forward.)
        eval_factor: in eval mode a solve takes so many times max_iterations, and a tolerance that
            many times smaller; the adjoint keeps its own tolerance.
        warm: whether calls start where the last one with the same key ended, forward and backward;
            a number: the most keys kept, of which the least recently used goes first; True: 64.

    `layer.warm` is None, or what is kept (`Warm`): set it to True, False or a number at any time;
    `layer.warm.clear()` forgets all, and it counts hits and misses. It serves calls that come
    again little changed: a full batch, a minibatch of fixed samples (its index as `key=`), frames
    of a video. Results then depend on the calls before, within the tolerance; of several fixed
    points, on them altogether. A sample that diverged, or was not finite, starts cold next time. A
    solve that ends in its first iteration measures no `contraction` (NaN) and no `error_estimate`
    (Inf). Plain tensors are kept, three states a key, never a graph; not by state_dict, copies or
    pickles. A start that is given stays, so a complex state, which needs one, is warm in its
    adjoint alone: give x0=layer.last.x. Higher orders of derivatives, the adjoint under
    driver="graph", and calls under torch.func or forward mode start cold and leave nothing.

    Raises:
        TypeError, ValueError: an option is not as `fixed_point` says.

    Example:
        >>> layer = FixedPointLayer(lambda x, z: 0.5 * torch.tanh(x) + z)
        >>> z = torch.randn(4, 3)
        >>> x = layer(z)
        >>> bool(torch.allclose(x, 0.5 * torch.tanh(x) + z, atol=1e-3))
        True
    """

    solver: Any
    adjoint: Any
    tolerance: Tolerance
    max_iterations: int | Tensor
    backend: str
    on_failure: str
    per_sample: bool | str
    driver: str
    trace: bool = False
    callback: Any = None
    has_aux: bool = False
    g: Any
    state_shape: Any
    eval_factor: float = 1.0
    norm_weights: Any = None
    _last: Solution | None = None
    _traced: Solution | None = None  # of torch.export, while it runs
    _fits: Any = None  # state_shape and a batch size that are no mistake
    _warm: Warm | None = None
    _plan: Any = None  # a `compiled.Plan`, where the layer is part of a compiled graph

    def __init__(
        self,
        g: Callable[..., Any],
        *,
        state_shape: Any = None,
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
        eval_factor: float = 1.0,
        warm: bool | int = False,
        norm_weights: Any = None,
    ) -> None:
        super().__init__()
        chosen: Solver = named(solver)
        options = Options(
            *(chosen, adjoint, tolerance, max_iterations, backend, on_failure, per_sample, driver),
            *(trace, callback, has_aux, norm_weights),
        )
        options.check()
        if not (isinstance(eval_factor, Real) and 0 < eval_factor < math.inf):
            raise ValueError(
                f"FixedPointLayer: eval_factor must be a finite number > 0 (got {eval_factor!r}); "
                "1 treats eval mode as training"
            )
        self.g = g
        self.eval_factor = eval_factor
        self.state_shape = state_shape
        for name in _OPTIONS:
            setattr(self, name, getattr(options, name))
        self.warm = warm
        if not torch.compiler.is_dynamo_compiling():
            _made(self)

    @property
    def last(self) -> Solution | None:
        """The solution of the last call, detached; while torch.export traces one, of that."""
        if exporting():
            from .export import traced_last

            return traced_last(self._traced, self._last)
        # A compiled graph leaves it when it runs, not while it is made.
        return apart(_last, self)  # type: ignore[no-any-return]

    @last.setter
    def last(self, last: Solution | None) -> None:
        self._last = last

    @property
    def warm(self) -> Warm | None:
        """What is kept between calls; None: each starts cold."""
        return self._warm

    @warm.setter
    def warm(self, warm: Warm | bool | int | None) -> None:
        if warm is None or warm is False:
            self._warm = None
        elif warm is not True:
            self._warm = warm if isinstance(warm, Warm) else Warm(warm)
        elif self._warm is None:
            self._warm = Warm(CAPACITY)

    def forward(
        self,
        *inputs: Any,
        x0: State | None = None,
        params: Sequence[Tensor] = (),
        tolerance: Tolerance | None = None,
        max_iterations: Any = None,
        sizes: Tensor | None = None,
        key: Hashable = None,
        **keywords: Any,
    ) -> Any:
        """The fixed point for these inputs: of x ↦ g(x, *inputs, *params, **keywords).

        Args:
            inputs: tensors [B, ...]; the first is z. None and whatever is no tensor go to g as they
                are.
            x0: where to start; None: zeros, or with `layer.warm` where the last call ended.
            params: tensors that the batch shares, as in `fixed_point`.
            tolerance: of this call; None: the layer's.
            max_iterations: likewise.
            sizes: valid entries of each padded sample, as in `fixed_point`.
            key: whose start `layer.warm` takes and keeps: anything hashable, such as the index of a
                minibatch or ("validation", index). What is kept under it goes when the state's
                shapes, dtype or device change. None: the last call's with a state like this. A
                layer called several times a step has a key for each. Without `warm` it is not used.
            keywords: go to g under their names (but for those above): an edge index, a mask, a time
                step, a module. Tensors in them, in lists, tuples and dicts too, get gradients of
                every order; g gets them whole, so a NaN in one is every sample's. If one of them
                has a dimension of B or holds integers, which may number samples, or comes in an
                object of another class, all samples stay in the batch given to g until the last has
                ended: pass what belongs to samples by position.

        Returns:
            x̂, shaped like the state; attached to autograd. With has_aux (x̂, aux).

        Raises:
            TypeError: no input and no x0 was given; key is a tensor or not hashable.
        """
        given = x0, inputs, params, tolerance, max_iterations, sizes, key, keywords
        if torch.compiler.is_compiling():
            if exporting():
                if torch.compiler.is_dynamo_compiling():
                    others = params, tolerance, max_iterations, sizes
                    return self._strictly(inputs, x0, keywords or others != ((), None, None, None))
                return self._solved(*given)
            if torch.compiler.is_dynamo_compiling():  # here, and not in another thread
                found = self._compiled(*given)
                if found is not None:
                    return found
        return apart(self._solved, *given)

    def _solved(self, x0: State | None, inputs: Sequence[Any], params: Any, *of_call: Any) -> Any:
        """The output; for the arguments see `_prepared`."""
        start, options, slot, given = self._prepared(x0, x0 is None, inputs, params, *of_call)
        solution = solve(self.g, start, inputs, params, options, given)
        if exporting():
            self._traced = solution
        else:
            last = self.__dict__["_last"] = kept(solution)  # nn.Module's own way takes 2 µs
            if slot is not None:
                slot.keep(last)
        # What is kept, for a warm start and for the backward, is the solver's own: the caller may
        # change the output in place.
        x = solution.x
        x = x.clone() if isinstance(x, Tensor) else each(lambda t: t.clone(), x)
        return (x, solution.aux) if self.has_aux else x

    def _prepared(
        self,
        x0: State | None,
        cold: bool,
        inputs: Sequence[Any],
        params: Any,
        tolerance: Tolerance | None,
        max_iterations: Any,
        sizes: Tensor | None,
        key: Hashable,
        keywords: dict[str, Any],
    ) -> tuple[State, Options, Slot | None, dict[str, Any] | None]:
        """What a call solves: the start, the options, what is kept, and keywords for `solve`."""
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        given = None if len(tensors) == len(inputs) and not keywords else keywords
        if given is not None:
            _check_first(inputs)
        if key is not None:
            check_key(key)
        if x0 is None:
            x0 = start_of(self, tensors, inputs, params, given)
        # All of them: a compiler of torch 2.11 makes a tuple without the defaults.
        values: list[Any] = [*[getattr(self, name) for name in _OPTIONS], sizes, None, ()]
        options = Options(*values)
        options = options._replace(solver=named(options.solver))  # it may have been set since
        if not self.training and self.eval_factor != 1:
            options = self._evaluating(options, x0)
        if tolerance is not None:
            options = options._replace(tolerance=tolerance)
        if max_iterations is not None:
            options = options._replace(max_iterations=max_iterations)
        slot = None
        # A program has no memory, nor have tensors without values.
        if self._warm is not None and not exporting() and not any(map(valueless, odd(tensors))):
            x0, slot = self._warm.begin(x0, key, not cold)
            options = options._replace(memory=slot)
        return x0, options, slot, given

    def _compiled(self, x0: State | None, inputs: Sequence[Any], params: Any, *of_call: Any) -> Any:
        """The output as one operator of the graph that is being made; None: it can't be one."""
        from .compiled import call

        if transforming():
            return None
        if not self._planned():
            return None
        names = "tolerance", "max_iterations", "sizes", "key", "keywords"
        given = dict(zip(names, of_call, strict=True))
        cold = x0 is None
        if x0 is None:
            tensors = [t for t in inputs if isinstance(t, Tensor)]
            x0 = start_of(self, tensors, inputs, params, given["keywords"])
        return call(self, x0, cold, {"inputs": inputs, "params": params, **given})

    @constant_in_graphs
    def _planned(self) -> bool:
        """Whether `_plan` is the one for what g is now, while a graph is made; False: no graph can.

        A method, of which the compiler asks no identity: a graph serves layers that are alike.
        """
        from .compiled.plan import plan, plan_each, waits

        plan_each([ref() for ref in _layers.valuerefs()])
        plan(self)
        return getattr(self.adjoint, "by_node", False) and not waits(self)

    def _strictly(self, inputs: Sequence[Any], x0: Any, others: Any) -> Tensor:
        """The call while torch.export reads Python, strict=True."""
        from .export import strict

        given = inputs if x0 is None else (*inputs, x0)
        if others or not all([isinstance(t, Tensor) for t in given]):
            raise TypeError(strict.TENSORS)
        own, rate = [*self.parameters(), *self.buffers()], named(self.solver).contraction
        one = self.per_sample is False
        self._traced = strict.call(self._kept_by(), own, inputs, x0, rate, one)
        x: Tensor = self._traced.x.clone()
        return x

    @constant_in_graphs
    def _kept_by(self) -> int:  # of this very layer, whatever it was copied from
        from .export import strict

        return strict.keep(self)

    def _evaluating(self, options: Options, x0: State) -> Options:
        """The options in eval mode."""
        options.check()
        factor, packed = self.eval_factor, state_of(x0).packed
        dtype = packed.dtype
        if not packed.is_meta:
            dtype = Context.here(packed.device.type).precision(dtype)
        values, most = options.tolerance.resolve(dtype), options.max_iterations
        # In float64, as numbers are: in a narrow dtype tolerances round to 0 and limits overflow.
        rtol, atol = ((t.double() if isinstance(t, Tensor) else t) / factor for t in values)
        if isinstance(most, Tensor):
            most = (most.double() * factor).ceil().long()
        else:
            most = math.ceil(most * factor)
        return options._replace(tolerance=Tolerance(rtol, atol), max_iterations=most)

    def extra_repr(self) -> str:
        """The solver and its limits."""
        return f"solver={self.solver}, max_iterations={self.max_iterations}"

    def __getstate__(self) -> dict[str, Any]:
        """Without what calls left behind, and a graph's handle."""
        state = {**self.__dict__, "_last": None, "_traced": None}
        state.pop("_plan", None)
        if self._warm is not None:  # copy.copy would share it
            state["_warm"] = Warm(self._warm.capacity)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or one of another process."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _made(self)


def _made(layer: FixedPointLayer) -> None:
    """Note a layer for graphs to come; where there are some, that they may serve it too."""
    _layers[id(layer)] = layer
    compiled = sys.modules.get("fpi_cuda.compiled.plan")
    if compiled is not None:
        compiled.plan_each([layer])


def _last(layer: FixedPointLayer) -> Solution | None:
    layer._traced = None  # of an export that has ended
    return layer._last


def _check_first(inputs: Sequence[Any]) -> None:
    """Raise where the layer is called as a solver is: with g."""
    first = inputs[0] if inputs else None
    if callable(first) and not isinstance(first, Tensor):
        raise TypeError(
            "FixedPointLayer: is called with the inputs of its g, the first a tensor [B, ...] (got "
            f"the callable {getattr(first, '__name__', type(first).__name__)!r}); give g where the "
            "layer is made, FixedPointLayer(g)(z), or use fixed_point(g, x0)"
        )
