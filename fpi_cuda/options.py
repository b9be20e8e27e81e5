"""How a solve is done: everything of it but g and the tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ._check import check_whole
from ._torch import of_vmap
from .record import Progress

__all__ = ["BACKENDS", "DRIVERS", "Adjoint", "ByValue", "Options", "Solver", "Tolerance"]

BACKENDS = ("auto", "reference", "native", "triton")
DRIVERS = ("auto", "eager", "graph", "whole")
MOST = 2**31 - 1  # iterations that a record can count

_RTOL = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_ATOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}


class ByValue:
    """A frozen dataclass that is compared by its values, where these may be tensors."""

    def _of_fields(self, of: Callable[[Tensor], Any]) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(of(v) if isinstance(v, Tensor) else v for v in values)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self._of_fields(Tensor.tolist) == other._of_fields(Tensor.tolist)

    def __hash__(self) -> int:  # a tensor may be written to: its shape alone stays
        return hash(self._of_fields(lambda t: t.shape or t.item()))


@dataclass(frozen=True, eq=False)
class Tolerance(ByValue):
    """When a sample has converged: ‖g(x) − x‖₂ ≤ atol·√N + rtol·‖g(x)‖₂.

    Args:
        rtol: relative tolerance; None takes the default of the dtype that g computes in (float64
            1e-6, float32 1e-4, float16 2e-3, bfloat16 1e-2). That is the state's, or under
            torch.autocast the coarser one of the state's and autocast's. A floating tensor [B] has
            one for each sample of the batch, on any device; what is NaN, negative or of another
            length is refused by the solve.
        atol: absolute tolerance for each value; None likewise (1e-12, 1e-6, 1e-3, 1e-3), so that a
            fixed point at zero converges. The adjoint takes 0 by default: a gradient has no scale.
            May be a tensor [B] too.

    `Tolerance(0, 0)` asks for `max_iterations` iterations (fewer only where a residual is exactly
    zero); such a solve, or a sample whose own tolerances are both 0, never fails for want of
    convergence.

    Autocast is seen around the solve, not in g: for a g that takes it off inside, or has no
    operation that it casts, these defaults are looser than need be, and for one that alone enters
    it they are tighter than its noise; give a tolerance then. One that is given is kept under
    autocast too. Where g can't reach it, samples end as STALLED.

    Raises:
        ValueError: a tolerance is negative or not finite, or a tensor that has not one value a
            sample.
        TypeError: a tensor is not floating.
    """

    rtol: float | Tensor | None = None
    atol: float | Tensor | None = None
    own: ClassVar[bool] = False  # whether samples have their own; isinstance would cost more

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                check_own("Tolerance", name, value)
                value = value.detach() if value.dim() else value.item()
                object.__setattr__(self, name, value)
                if isinstance(value, Tensor):
                    object.__setattr__(self, "own", True)
                    continue
            if value is not None and not _finite(value):
                raise ValueError(
                    f"Tolerance: {name} must be a finite number >= 0 (got {value!r}); None takes "
                    "the default of g's dtype, a tensor [B] has one for each sample"
                )

    def resolve(
        self, dtype: torch.dtype, *, adjoint: bool = False
    ) -> tuple[float | Tensor, float | Tensor]:
        """The (rtol, atol) that hold where g computes in this dtype."""
        rtol = _RTOL[dtype] if self.rtol is None else self.rtol
        default_atol = 0.0 if adjoint else _ATOL[dtype]
        return rtol, default_atol if self.atol is None else self.atol


def _finite(value: Any) -> bool:
    try:
        return bool(0 <= value < math.inf)
    except (TypeError, ValueError):  # no number: a list, an array of several
        return False


class Solver(Protocol):
    """An algorithm: `Picard`, `Anderson`, `BiCGSTAB`, or any object with these.

    One that solves linear equations alone has `linear = True`, and is refused for a forward solve.
    """

    @property
    def history(self) -> int:
        """Iterates that it looks at; 1: the last alone."""

    @property
    def patience(self) -> int:
        """Iterations without progress before a sample at the rounding level counts as stalled."""

    def start(self, backend: Any, progress: Progress, x: Tensor, /) -> Any:
        """The update `(x, gx) -> None` that moves x, [R, N], in place, for one solve.

        Where the batch is one system, x is [1, B · N] and progress is the system's, with limits
        that are never reached: when it stops, is decided outside. An update that wants g of more
        than iterates has `iterate(x, gx)`, which gives the iterate and g by its recursion.
        """

    def contraction(self, ring: Tensor, iterations: Tensor, /) -> Tensor:
        """[B]: the measured rate of g, from what the update left in the record's ring."""


class Adjoint(Protocol):
    """How a fixed point is differentiated: `ImplicitAdjoint`, or any object with these."""

    @property
    def failed(self) -> str:
        """What becomes of the gradient of samples that failed: "mask" or "use"."""

    def attach(self, problem: Any, x0: Tensor, tensors: Any, report: Any, /) -> Tensor:
        """The problem solved from x0; x̂ attached to the tensors."""

    def transposed(self, problem: Any, /) -> Any:
        """The problem whose solution is the gradient at g(x̂), for an `attach` by the node.

        An attribute `by_node = True` says that it is by that: else a compiled layer leaves its
        graph.
        """


class Options(NamedTuple):
    """The options of `fixed_point`, under their names there."""

    solver: Solver
    adjoint: Adjoint
    tolerance: Tolerance
    max_iterations: int | Tensor
    backend: str
    on_failure: str
    per_sample: bool | str
    driver: str
    trace: bool = False
    callback: Callable[..., Any] | None = None
    has_aux: bool = False
    norm_weights: Any = None  # numbers > 0 in the state's structure: ‖x‖² = Σ w_i ‖x_i‖²
    sizes: Tensor | None = None  # of one call, which a layer takes none of
    memory: Any = None  # likewise: the `warm.Slot` of a layer's call that starts warm
    checkpoints: Sequence[int] = ()  # likewise: iterations whose iterates are wanted

    def check(self) -> None:
        """Raise unless every option is in its range."""
        check_parts("fixed_point", self.solver, self.tolerance, self.max_iterations)
        if self.sizes is not None:
            _check_sizes(self.sizes)
        if self.checkpoints != ():
            _check_checkpoints(self.checkpoints)
        if not _has(self.adjoint, _ADJOINT):
            raise TypeError(
                "fixed_point: adjoint must be ImplicitAdjoint(...), or one of OneStep(), "
                "Neumann(k), Truncated(k), Phantom(k, damping) and Unrolled(k) (got "
                f"{self.adjoint!r})"
            )
        _check_one_of("backend", self.backend, BACKENDS)
        _check_one_of("on_failure", self.on_failure, ("warn", "raise", "return"))
        _check_one_of("per_sample", self.per_sample, ("auto", True, False))
        _check_one_of("driver", self.driver, DRIVERS)
        if self.trace is not False or self.has_aux is not False:
            _check_one_of("trace", self.trace, (True, False))
            _check_one_of("has_aux", self.has_aux, (True, False))
        if self.callback is not None and not callable(self.callback):
            raise TypeError(
                "fixed_point: callback must be callable as callback(iteration, x, residual_norm), "
                f"or None (got {self.callback!r})"
            )


def _check_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed or not isinstance(value, (str, bool)):  # 0 == False == numpy's
        raise ValueError(f"fixed_point: {name} must be one of {allowed} (got {value!r})")


def check_parts(
    owner: str, solver: Any, tolerance: Any, max_iterations: Any, own: bool = True
) -> None:
    """Raise unless these are what they must be; own False: None stands for another solve's."""
    if (own or solver is not None) and not _has(solver, _SOLVER):
        linear = "" if own else "BiCGSTAB(), "
        kinds = f'Picard(...), Anderson(...), {linear}Auto(...) or its name, "auto"'
        raise TypeError(f"{owner}: solver must be {kinds} (got {solver!r})")
    if own and getattr(solver, "linear", False):
        name = type(solver).__name__
        raise TypeError(
            f"{owner}: solver must solve any g, and {name} solves linear equations alone (got "
            f"{solver!r}); give it as adjoint=ImplicitAdjoint(solver={name}()), and Anderson(...) "
            "or Picard(...) here"
        )
    if (own or tolerance is not None) and not isinstance(tolerance, Tolerance):
        advice = "; write Tolerance(rtol=1e-4)" if own else ""
        raise TypeError(f"{owner}: tolerance must be a Tolerance (got {tolerance!r}){advice}")
    if type(max_iterations) is not int and isinstance(max_iterations, Tensor):
        check_own(owner, "max_iterations", max_iterations, whole=True)
        if max_iterations.dim() == 0:
            check_whole(owner, "max_iterations", max_iterations.item(), least=int(own))
    elif own or max_iterations is not None:  # an adjoint may do without
        check_whole(owner, "max_iterations", max_iterations, least=int(own))
        if max_iterations > MOST:
            raise ValueError(
                f"{owner}: max_iterations must be at most {MOST} (got {max_iterations!r})"
            )


def check_failed(owner: str, failed: Any) -> None:
    """Raise unless it says what becomes of the gradients of samples that failed."""
    if failed not in ("mask", "use"):
        raise ValueError(f'{owner}: failed must be "mask" or "use" (got {failed!r})')


def _check_sizes(sizes: Any) -> None:
    what = "a tensor [B] of whole numbers, the valid entries of each sample"
    if not isinstance(sizes, Tensor):
        raise TypeError(
            f"fixed_point: sizes must be {what} (got {type(sizes).__name__}); write "
            "sizes=torch.tensor([...])"
        )
    if sizes.dtype == torch.bool:
        raise TypeError(
            f"fixed_point: sizes must be {what} (got a mask of torch.bool); of one shaped like x0 "
            "write mask.flatten(1).sum(1)"
        )
    check_own("fixed_point", "sizes", sizes, whole=True)


def _check_checkpoints(checkpoints: Any) -> None:
    last, rising = 0, isinstance(checkpoints, (tuple, list))
    for k in checkpoints if rising else ():
        rising = rising and type(k) is int and k > last
        last = k if rising else last
    if not rising:
        raise ValueError(
            "fixed_point: checkpoints must be a tuple of whole numbers >= 1 that rise, the "
            f"iterations whose iterates are wanted, as (4, 8) (got {checkpoints!r})"
        )


def check_own(owner: str, name: str, t: Tensor, *, whole: bool = False) -> None:
    """Raise unless the tensor may say something of each sample, whatever its values are."""
    kind = "whole numbers" if whole else "a floating dtype"
    integral = not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
    if not (integral if whole else t.is_floating_point()):
        raise TypeError(f"{owner}: {name} must be a tensor of {kind} (got one of {t.dtype})")
    if not torch.compiler.is_compiling() and of_vmap(t):
        raise ValueError(
            f"{owner}: {name} must not be mapped by torch.vmap, whose slices share it: pass "
            f"a tensor [B] from outside (got one of shape {tuple(t.shape)} that vmap maps)"
        )
    if t.dim() > 1:
        raise ValueError(
            f"{owner}: {name} must have one value a sample, shape [B] (got shape {tuple(t.shape)})"
        )


_SOLVER = attrgetter("start", "patience", "contraction", "history")
_ADJOINT = attrgetter("attach", "transposed", "failed")


def _has(value: Any, attributes: attrgetter[Any]) -> bool:
    try:
        attributes(value)
    except AttributeError:
        return False
    return not isinstance(value, type)
