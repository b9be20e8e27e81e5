"""The graph driver: one iteration captured once, repeated by the device until no sample is active.

A solve becomes three graphs over static tensors: what comes before the loop (g's weights computed,
the linearisation of an adjoint, a fresh record), one iteration, and what follows (gradients). Each
later solve of the same kind copies its tensors in, launches once, and copies the results out; the
host waits once, at the end, for the counts that `on_failure` and the record need.
"""

from __future__ import annotations

import copy
import random
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..layout import Layout
from ..record import STATUS, Limits, Progress, accumulate_dtype
from ..solution import Record, Status, warn
from ..solvers.iterate import Evaluation
from . import eager, kind
from .capture import RECORDERS, Recorder

__all__ = ["MAX_GRAPHS", "RECORDERS", "Request", "Solved", "solve"]

MAX_GRAPHS = 8  # of one g; the least recently used goes first
MAX_REFUSED = 64

RANDOM = (
    "g draws random numbers, and a graph would draw the same ones in every iteration; freeze "
    'dropout (one mask a solve, as an input), call g.eval(), or use driver="eager"'
)
DRAWN_ON_HOST = (
    "random numbers were drawn on the host while g ran (by torch, Python or numpy), and a graph "
    "would go on with the first ones; draw them outside g and pass them in, or call g.eval()"
)
CHANGING = (
    "g changes Python values that it can read whenever it runs (a counter, say), and a graph would "
    'not; keep them outside g or in tensors that a solve does not change, or use driver="eager"'
)


@dataclass
class Request:
    """One solve, said so that it can be captured, and found again."""

    g: Any
    options: tuple[Any, ...]  # all that fixes what is computed, beside g and the tensors
    given: Sequence[Tensor]  # copied in at every launch; the first is where the iteration starts
    own: Sequence[Tensor]  # g's parameters, used where they are
    solver: Any
    backend: Any
    limits: Limits
    begin: Callable[[Sequence[Tensor]], Evaluation]  # from the static copies of `given`
    end: Callable[[Any, Tensor, Progress], Sequence[Tensor | None]] | None = None
    adjoint: bool = False  # starts at v: relative to ‖v‖, and done where that is zero


@dataclass
class Solved:
    """What a launch left."""

    x: Tensor
    record: Record
    outputs: Sequence[Tensor | None]  # of `end`


class _Captured:
    """One kind of solve on its static tensors. Holds nothing of g but what the device runs."""

    def __init__(self, recorder: Recorder, request: Request) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._lock = threading.Lock()
            self._outputs: list[Tensor | None] = []
            self._static = [t.detach().clone() for t in request.given]
            self._build(recorder, request)

    def _build(self, recorder: Recorder, request: Request) -> None:
        static, begin, end = self._static, request.begin, request.end
        start = static[0]
        b = start.shape[0]
        self._batch = start.shape[:1]
        layout = Layout(start)
        backend = request.backend

        def look() -> None:
            nonlocal layout, backend
            evaluate = begin(static)
            backend = evaluate.steps or backend
            evaluate.watch(Progress(start, request.limits))  # as in `prepare`: the same kernels
            layout = Layout(evaluate(start))  # the layout that g returns costs no copies

        def watched() -> None:
            watch = _Watch((*static, *request.own))
            with watch:
                look()
            watch.check()

        before, on_host = recorder.random_state(), _random_on_host()
        recorder.warm_up(look)  # what g makes at its first call and keeps is there from now on
        if not torch.equal(before, recorder.random_state()):
            recorder.restore_random_state(before)
            raise RuntimeError(RANDOM)
        if on_host != _random_on_host():
            raise RuntimeError(DRAWN_ON_HOST)
        self.key = _key(request)
        recorder.warm_up(watched)
        if self.key != _key(request):
            raise RuntimeError(CHANGING)

        self._layout = layout
        x = layout.rows(start).clone()
        floor = x.new_zeros(b, dtype=accumulate_dtype(x.dtype)) if request.adjoint else None
        self._progress = progress = Progress(x, request.limits, floor)
        step = request.solver.start(backend, progress, progress.out)
        state = layout.state(x, (b,))
        made: list[Evaluation] = []

        def prepare() -> None:
            made[:] = [begin(static)]
            made[0].watch(progress)
            x.copy_(layout.rows(start))
            for t in (progress.counters, progress.scalars, progress.tally):
                t.zero_()
            if floor is not None:
                torch.linalg.vector_norm(start.reshape(b, -1).to(floor.dtype), dim=1, out=floor)
                progress.counters[:, STATUS].masked_fill_(floor == 0, Status.CONVERGED + 1)
                progress.out.copy_(x)

        def iterations() -> None:
            for _ in range(recorder.unroll):  # where none is needed it changes nothing
                step(x, layout.rows(made[0](state)))

        def finish() -> None:
            assert end is not None
            out = layout.state(progress.out, (b,))
            self._outputs = list(end(made[0], out, progress))

        parts = (prepare, iterations) if end is None else (prepare, iterations, finish)
        for _ in range(2):  # whatever g or a library does at its first and second call is done
            for part in parts:
                recorder.warm_up(part)
        made.clear()
        self._outputs.clear()
        for part in parts:
            recorder.record(part)
        rows = "masked" if made[0].masks else "whole batch"
        self.path = f"{backend.NAME}, graph{recorder.note}, {rows}"
        self._launch = recorder.loop(progress.tally, request.limits.max_iterations)
        self._used = x, step  # the device's own: nothing here reads them again

    def __call__(self, given: Sequence[Tensor]) -> tuple[Tensor, Progress, list[Tensor | None]]:
        """Solve; what is returned belongs to the caller."""
        progress = self._progress
        with self._lock, torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_(self._static, [t.detach() for t in given])
            self._launch()
            x = self._layout.state(progress.out.clone(), self._batch)
            outputs = [None if t is None else t.clone() for t in self._outputs]
            found = copy.copy(progress)
            del found.out
            found.norms = None
            for name in ("counters", "scalars", "tally"):
                setattr(found, name, getattr(progress, name).clone())
            found.tally = found.tally.cpu()  # the one wait: nobody else's launch may come before
        return x, found, outputs


def _random_on_host() -> tuple[Any, ...]:
    numpy: Any = sys.modules.get("numpy")
    state = numpy.random.get_state(legacy=False) if numpy else None
    return torch.get_rng_state().tolist(), random.getstate(), repr(state)


class _Watch(TorchDispatchMode):
    """Finds tensors that g captured: a graph would go on with them after they were replaced."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {self._storage(t) for t in known}
        self._foreign: Tensor | None = None

    @staticmethod
    def _storage(t: Tensor) -> int:
        return t.untyped_storage()._cdata  # type: ignore[no-any-return]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # a constant made just now
            for t in tree_leaves((args, kwargs)):
                # A number on its way into a kernel comes as a CPU scalar.
                number = isinstance(t, Tensor) and t.dim() == 0 and t.device.type == "cpu"
                if isinstance(t, Tensor) and not number and self._storage(t) not in self._known:
                    self._foreign = t
        out = func(*args, **kwargs)
        self._known.update(self._storage(t) for t in tree_leaves(out) if isinstance(t, Tensor))
        return out

    def check(self) -> None:
        """Raise if there was one."""
        if (t := self._foreign) is not None:
            raise RuntimeError(
                f"g captures a tensor of shape {tuple(t.shape)} on {t.device}, which may be "
                "replaced behind the graph's back; pass it in `inputs` or `params`, or register it "
                "as a buffer"
            )


# --- finding a captured solve again ------------------------------------------------------------


@dataclass
class _Cache:
    """Of one g: captured solves, and why others can't be captured."""

    graphs: OrderedDict[Any, _Captured] = field(default_factory=OrderedDict)
    refused: OrderedDict[Any, str] = field(default_factory=OrderedDict)
    warned: set[str] = field(default_factory=set)
    changed: int = 0  # captures for nothing, since the key was another one after them

    everyone: ClassVar[weakref.WeakKeyDictionary[Any, _Cache]] = weakref.WeakKeyDictionary()


_capturing = threading.Lock()


def solve(request: Request) -> Solved | str:
    """Solve on the device alone, or say why the eager driver is to do it.

    Raises:
        RuntimeError: g draws random numbers; or the user is capturing.
    """
    start = request.given[0]
    if start.device.type == "cuda":
        eager.refuse_capture()
    if request.backend.NAME == "reference":
        return f"the {request.backend.NAME} backend reads the device in every iteration"
    if not start.numel():
        return "the state is empty"
    try:
        owner = kind.owner_of(request.g)
        cache = _Cache.everyone.setdefault(owner, _Cache())
    except TypeError:
        return "g can't be found again: it takes no weak reference or hash"
    odd = next((t for t in request.given if type(t) not in (Tensor, nn.Parameter)), None)
    if odd is not None:
        return f"a {type(odd).__name__} can't be copied into a graph's memory"
    for t in (*request.given, *request.own):
        if t.device != start.device:  # a number on the host becomes an argument of a kernel
            return _refuse(
                cache,
                f"a tensor of shape {tuple(t.shape)} that g takes is on {t.device}, where a graph "
                f"would not see its value change; move it to {start.device}",
            )
    if cache.changed >= 3:
        return CHANGING
    try:
        key = _key(request)
    except kind.Unseen as unseen:
        return _refuse(cache, str(unseen))
    captured = cache.graphs.get(key)
    if captured is None:
        if key in cache.refused:
            return _refuse(cache, cache.refused[key])
        # Nobody waits: whoever captures may need the thread that would wait, autograd's.
        if not _capturing.acquire(blocking=False):
            return "another solve is being captured"
        try:
            captured = _Captured(RECORDERS[start.device.type](start.device), request)
        except torch.OutOfMemoryError:
            return _refuse(cache, "the graph's memory could not be allocated")
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            cache.changed += reason == CHANGING
            _keep(cache.refused, key, reason, MAX_REFUSED)
            return _refuse(cache, reason)
        finally:
            _capturing.release()
        key = captured.key  # what g keeps from its first call is part of it from now on
    _keep(cache.graphs, key, captured, MAX_GRAPHS)
    try:
        x, progress, outputs = captured(request.given)
    except BaseException:
        cache.graphs.pop(key, None)  # nobody knows what it is worth
        raise
    _, failed, iterations = progress.tally.tolist()
    record = Record(
        progress=progress,
        batch=x.shape[:1],
        rate=request.solver.contraction,
        path=captured.path,
        failed=failed,
        evaluations=1 if request.adjoint else iterations,
    )
    return Solved(x, record, outputs)


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > limit:
        kept.popitem(last=False)


def _refuse(cache: _Cache, reason: str) -> str:
    """Say it once; random numbers are an error."""
    if reason == RANDOM:
        raise RuntimeError(f"fixed_point: {reason}")
    if reason not in cache.warned:
        cache.warned.add(reason)
        warn(f"fpi_cuda: no CUDA graph for this solve, it runs eagerly: {reason}", UserWarning)
    return reason


def _key(request: Request) -> tuple[Any, ...]:
    """What must agree for a captured solve to serve this one.

    Raises:
        Unseen: g reads what can't be looked into.
    """
    return (
        request.options,
        request.solver,
        request.limits,
        tuple((t.shape, _dense(t), t.dtype, t.device) for t in request.given),
        tuple((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in request.own),
        kind.python_values(request.g),
        kind.precision(),
    )


def _dense(t: Tensor) -> tuple[int, ...]:
    """The strides of a copy: an expanded gradient is of the same kind as a plain one."""
    return (t if t.is_contiguous() else torch.empty_like(t, device="meta")).stride()
