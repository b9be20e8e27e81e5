"""Our solvers in torchdeq's registry: get_deq(f_solver="fpi_anderson", b_solver="fpi_anderson").

Importing this module registers "fpi_anderson" and "fpi_picard"; see docs/torchdeq.md. How the fixed
point is differentiated is torchdeq's: it calls a solver without gradients, forward on the user's
function, and where it differentiates implicitly, backward on a linear one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import drivers
from .._check import check_whole
from .._torch_graphs import apart
from ..adjoint import ImplicitAdjoint
from ..modules import Binding
from ..norms import row_norms
from ..options import Options, Solver, Tolerance
from ..record import RESIDUAL, VALUE, Progress
from ..solve import route
from ..solve.direction import Forward
from ..solve.independence import samples_of
from ..solve.maps import Bound, UserMap
from ..solve.problem import Context, Problem, Report
from ..solvers import Anderson, Picard
from ..solvers.picard import Update
from ..state import State, same, state_of

try:
    _solver, _stat = import_module("torchdeq.solver"), import_module("torchdeq.solver.stat")
except ImportError as error:
    raise ImportError(
        f"fpi_cuda.bridges.torchdeq needs torchdeq, and importing that failed: {error}. Install it "
        "with `pip install torchdeq`"
    ) from error

__all__ = ["register"]

Found = tuple[Any, list[Any], Any]  # the state, those of the steps asked for, a SolverStat

_START = 1e8  # what torchdeq's traces have for the residual of x0, which nobody has evaluated
_TINY = 1e-9  # what it adds to the norm that a relative residual is relative to
_KEPT = 256
# Shape and dtype of samples that depended on each other in some forward solve, or were said to.
_coupled: dict[tuple[torch.Size, torch.dtype], None] = {}


def register(
    name: str,
    solver: Solver,
    *,
    per_sample: bool | str = "auto",
    on_failure: str = "return",
    backend: str = "auto",
) -> None:
    """Make a solver known to torchdeq, as `get_deq(f_solver=name, b_solver=name)`.

    In one call, `deq(..., solver_kwargs={...})` changes these options for the forward solve, and
    takes torchdeq's own: return_final, m (our `history`), tau (our `beta`).

    Args:
        name: for torchdeq's f_solver and b_solver.
        solver: `Anderson(...)`, `Picard(...)`.
        per_sample: as in `fixed_point`, but finished samples stay in the batch given to the
            function, frozen: it may hold tensors of the whole batch, which nobody can take apart.
        on_failure: "return": nothing is said of samples that do not converge, as by torchdeq;
            "warn" or "raise".
        backend: as in `fixed_point`.

    Raises:
        TypeError, ValueError: an option is not as said above.
    """
    options = Options(
        solver=solver,
        adjoint=ImplicitAdjoint(),
        tolerance=Tolerance(),
        max_iterations=1,
        backend=backend,
        on_failure=on_failure,
        per_sample=per_sample,
        driver="eager",
    )
    options.check()

    def solve(
        func: Callable[..., Any],
        x0: Any,
        max_iter: float = 50,
        tol: float = 1e-3,
        stop_mode: str = "abs",
        indexing: Sequence[float] | None = None,
        return_final: bool = False,
        **more: Any,
    ) -> Found:
        if stop_mode not in ("abs", "rel"):
            raise ValueError(f'{name}: stop_mode must be "abs" or "rel" (got {stop_mode!r})')
        max_iter = int(max_iter)  # torchdeq's own may be a float
        check_whole(name, "max_iter", max_iter, least=0)
        task = _Task(name, max_iter, tol, stop_mode == "rel", indexing or (), return_final)
        given = func, x0, task, _changed(name, options, more) if more else options
        return apart(_solve, *given)  # type: ignore[no-any-return]

    _solver.register_solver(name, solve)


class _Task(NamedTuple):
    """What torchdeq asks of a solver."""

    name: str
    max_iter: int
    tol: float
    relative: bool
    indexing: Sequence[float]
    final: bool  # all iterations, and the last state; else that of the lowest residual

    def tolerance(self, size: int) -> Tolerance:
        """The same for samples of so many values; an absolute one is a value's there."""
        if self.final:
            return Tolerance(0.0, 0.0)
        if self.relative:
            return Tolerance(self.tol, 0.0)
        return Tolerance(0.0, self.tol / max(size, 1) ** 0.5)


def _changed(name: str, options: Options, more: dict[str, Any]) -> Options:
    """The options with what one call says beside them."""
    solver: Any = options.solver
    known_as = dataclasses.fields(solver) if dataclasses.is_dataclass(solver) else ()
    fields = {field.name for field in known_as}
    of_solver = {k: v for k, v in (("m", "history"), ("tau", "beta")) if v in fields}
    of_options = ("per_sample", "on_failure", "backend")
    for keyword in more.keys() - {*of_solver, *of_options}:
        known = ", ".join(("return_final", *of_solver, *of_options))
        raise TypeError(
            f"{name}: the solver's keywords are {known} (got {keyword!r}); other parameters are "
            "the solver's own: fpi_cuda.bridges.torchdeq.register(name, Anderson(...))"
        )
    given = {ours: more[k] for k, ours in of_solver.items() if k in more}
    changed = options._replace(
        solver=dataclasses.replace(solver, **given) if given else solver,
        **{k: more[k] for k in of_options if k in more},
    )
    changed.check()
    return changed


@torch.no_grad()
def _solve(func: Callable[..., Any], x0: Any, task: _Task, options: Options) -> Found:
    if isinstance(x0, Tensor) and x0.dim() < 2:  # each value is a sample
        shape = x0.shape
        state = State(x0.reshape(-1, 1), lambda v: v.reshape(-1, 1), lambda x: x.view(shape))
    else:  # the parts of a tuple come where torchdeq was told to keep no statistics
        state = state_of(x0)
    pack, unpack = state.pack, state.unpack
    watch = _Watch(options.solver, state.packed.detach(), task)
    latest = watch.latest

    def g(x: Tensor) -> Tensor:
        latest[0] = value = pack(func(unpack(x)))
        return value

    if task.max_iter:
        _iterate(_Map(g, func), watch, options)
    states, few = watch.states, max(len(watch.wanted), bool(task.indexing)) - len(watch.states)
    states += [watch.best] * few  # those after the end; and torchdeq wants one at least
    return unpack(watch.best), [unpack(x) for x in states], watch.statistics()


def _iterate(map: _Map, watch: _Watch, options: Options) -> None:
    """Solve; what comes of it, the watch has."""
    x0, task = watch.best, watch.task
    kind = x0.shape[1:], x0.dtype
    backward = getattr(map.func, "__module__", "") == "torchdeq.grad"
    if backward and options.per_sample == "auto" and kind in _coupled:
        options = options._replace(per_sample=False)  # they depend on each other as forward
    samples = samples_of(options.per_sample, map, x0, together=True)
    problem = Problem(
        map=map,
        options=options._replace(
            solver=watch,
            tolerance=task.tolerance(x0.shape[1:].numel()),
            max_iterations=task.max_iter,
        ),
        drivers=drivers.ORDER["eager"],
        context=Context.here(x0.device.type),
        unpack=same,
        samples=samples,
        name=task.name,
    )
    report = Report()
    x, _, _ = route.solve(Forward(problem, x0, (), ()), report)
    assert report.record is not None
    watch.iterations = report.record.iterations
    if task.final:
        watch.best = x
    if samples.coupled and not backward:
        _coupled[kind] = None
        if len(_coupled) > _KEPT:
            del _coupled[next(iter(_coupled))]


class _Map(UserMap):
    """A function that is called as it is: what it leaves on its modules stays there."""

    def __init__(self, g: Bound, func: Callable[..., Any]) -> None:
        self.g, self.func, self.arguments = g, func, None
        self.n_inputs = self.n_params = 0
        # By its modules and their modes it is known again; torchdeq's wrapper is another each time.
        self.binding = Binding.of(getattr(func, "func", func))

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """The function."""
        return self.g  # type: ignore[no-any-return]


class _Watch:
    """A solver that keeps what torchdeq tells of a solve.

    Attributes:
        latest: g's last value, put there by g: [B, ...], in g's own layout.
        best: g's value of the lowest residual so far; x0 before any.
        states: the best, or the latest where the last is wanted, at each step that is wanted.
        wanted: those steps, of 1 to max_iter.
        kept: of each step ‖g(x) − x‖ and ‖g(x)‖, [B], and by what the best is chosen, [rows].
        iterations: [B], of a sample; put there after the solve.
    """

    iterations: Tensor

    def __init__(self, solver: Solver, x0: Tensor, task: _Task) -> None:
        self.solver, self.task, self.x0 = solver, task, x0
        self.history, self.patience = solver.history, solver.patience
        self.contraction = solver.contraction
        self.wanted = sorted({int(k) for k in task.indexing if 0 < k <= task.max_iter})
        self.latest: list[Any] = [None]
        self.best = x0
        self.states: list[Tensor] = []
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def start(self, backend: Any, progress: Progress, x: Tensor) -> Update:
        """The solver's update, watched; afresh where the batch is solved once more."""
        move = self.solver.start(backend, progress, x)
        b, latest, wanted, dtype = len(self.x0), self.latest, set(self.wanted), progress.dtype
        relative, final = self.task.relative, self.task.final
        self.best = best = self.x0.clone()
        self.states, self.kept = states, kept = [], []
        lowest = torch.full((len(x),), torch.inf, dtype=dtype, device=x.device)
        rows = -1, *[1] * (best.dim() - 1)
        one = len(x) < b  # the batch is one system, and x its one row

        def update(x: Tensor, gx: Tensor) -> None:
            if one:
                absolute, value = (row_norms(t.view(b, -1)).to(dtype) for t in (gx - x, gx))
            move(x, gx)
            chosen, size = progress.scalars[:, [RESIDUAL, VALUE]].unbind(1)
            if not one:
                absolute, value = chosen, size
            if relative:
                chosen = chosen / (size + _TINY)
            kept.append((absolute, value, chosen))
            if not final:
                better = (chosen <= lowest).expand(b)
                torch.fmin(lowest, chosen, out=lowest)
                if x.is_cpu:  # most are, and a device would have to be waited for
                    worse = (~better).nonzero().view(-1)
                    old = best.index_select(0, worse)
                    best.copy_(latest[0]).index_copy_(0, worse, old)
                else:
                    torch.where(better.view(rows), latest[0], best, out=best)
            if len(kept) in wanted:
                states.append((latest[0] if final else best).to(best.dtype, copy=True))

        return update

    def statistics(self) -> Any:
        """What torchdeq keeps; traces are [B, 1 + max_iter], and begin before the first step."""
        b, steps, device = len(self.x0), self.task.max_iter, self.x0.device
        traces = torch.full((2, b, 1), _START, device=device)
        step = torch.zeros(b, 1, dtype=torch.long, device=device)
        if self.kept:
            absolute, value, chosen = (torch.stack(t, 1) for t in zip(*self.kept, strict=True))
            end = self.iterations[:, None] - 1  # what came after a sample's end is its last
            at = torch.minimum(torch.arange(steps, device=device), end)
            both = torch.stack((absolute, absolute / (value + _TINY)))
            traces = torch.cat((traces, both.gather(2, at.expand(2, b, steps))), 2)
            chosen = chosen.gather(1, at[: len(chosen)]).nan_to_num(torch.inf, torch.inf)
            step = 1 + (end if self.task.final else chosen.argmin(1, keepdim=True).expand(b, 1))
        lowest = traces.gather(2, step.expand(2, b, 1))[..., 0]
        return _stat.SolverStat(
            abs_lowest=lowest[0],
            rel_lowest=lowest[1],
            abs_trace=traces[0],
            rel_trace=traces[1],
            nstep=step[:, 0].to(traces.dtype),
        )


register("fpi_anderson", Anderson())
register("fpi_picard", Picard())
