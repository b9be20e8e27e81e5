"""One kind of solve, captured: what comes before the loop, one iteration, and what follows."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._torch import TorchDispatchMode, copy_all, lift_fresh, storage_id, tree_leaves
from ..layout import Layout
from ..record import STATUS, Progress, accumulate_dtype
from .capture import Recorder
from .eager import Evaluation

__all__ = ["CHANGING", "Captured", "Changing", "Random", "Refused", "Request"]


class Refused(Exception):
    """Why a solve can't be captured."""


class Changing(Refused):
    """Its key is another one after each run of g."""


class Random(Refused):
    """g draws random numbers on the device: an error, whoever drives."""


RANDOM = (
    "g draws random numbers, and a graph would draw the same ones in every iteration; freeze "
    'dropout (one mask a solve, as an input), call g.eval(), or use driver="eager"'
)
CHANGING = (
    "g changes Python values that it can read whenever it runs (a counter, say), and a graph would "
    'not; keep them outside g or in tensors that a solve does not change, or use driver="eager"'
)
DRAWN_ON_HOST = (
    "random numbers were drawn on the host while g ran (by torch, Python or numpy), and a graph "
    "would go on with the first ones; draw them outside g and pass them in, or call g.eval()"
)


class Request:
    """One solve, said so that it can be captured.

    Attributes:
        given: what is copied in at every launch; the first is where the iteration starts.
        own: the parameters of the modules that g calls, used where they are.
        options: all that fixes what is computed, beside g and the tensors.
    """

    def __init__(self, direction: Any) -> None:
        problem, self.map = direction.problem, direction.map
        self.direction = direction
        options = problem.options
        self.solver, self.limits = direction.solver, direction.limits
        self.backend = backends.choose(options.backend, direction.start)
        self._n, self._m = len(direction.given), self.map.n_params
        params, at = direction.params, len(direction.params) - self.map.n_buffers
        self.given = [*direction.given, *params[: self._m], *params[at:]]
        self.own = [t.detach() for t in params[self._m : at]]
        if self.limits.own is not None:
            self.given.append(self.limits.own)
        self.options = (
            *(direction.linear, problem.structure, self.map.n_inputs, self._m),
            *(problem.context.autocast_dtype, options.adjoint.failed, options.backend),
            *direction.need,
        )

    def around(self, static: Sequence[Tensor]) -> Any:
        """The direction with the static copies of `given`."""
        at = self._n + self._m
        buffers = static[at : at + self.map.n_buffers]
        params = [*static[self._n : at], *self.own, *buffers]
        return self.direction.around(static[: self._n], params, self.map)


class Captured:
    """One kind of solve on its static tensors. Holds nothing of g but what the device runs."""

    def __init__(self, recorder: Recorder, request: Request, key: Callable[[Request], Any]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._lock = threading.Lock()
            self._outputs: list[Tensor | None] = []
            self.left: str | None = None  # what g's calls left on its modules
            self._static = [t.detach().clone() for t in request.given]
            self._build(recorder, request, key)

    def _build(self, recorder: Recorder, request: Request, key: Callable[[Request], Any]) -> None:
        static, adjoint, limits = self._static, request.direction.linear, request.limits
        if limits.own is not None:
            limits = dataclasses.replace(limits, own=static[-1])
        start = static[0]
        b = start.shape[0]
        self._batch = start.shape[:1]
        layout = Layout(start)
        backend = request.backend

        def look() -> None:
            nonlocal layout, backend
            evaluate = request.around(static).evaluation()
            backend = evaluate.steps or backend
            evaluate.watch(Progress(start, limits))  # as in `prepare`: the same kernels
            layout = Layout(evaluate(start))  # the layout that g returns costs no copies
            if request.map.binding:
                self.left = request.map.binding.left

        def watched() -> None:
            watch = Watch((*static, *request.own))
            with watch:
                look()
            watch.check()

        before, on_host = recorder.random_state(), _random_on_host()
        recorder.warm_up(look)  # what g makes at its first call and keeps is there from now on
        if not torch.equal(before, recorder.random_state()):
            recorder.restore_random_state(before)
            raise Random(RANDOM)
        if on_host != _random_on_host():
            raise Refused(DRAWN_ON_HOST)
        self.key = key(request)
        recorder.warm_up(watched)
        if self.key != key(request):
            raise Changing(CHANGING)

        self._layout = layout
        x = layout.rows(start).clone()
        zeros = x.new_zeros(b, dtype=accumulate_dtype(x.dtype)) if adjoint else None
        self._progress = progress = Progress(x, limits, zeros)
        floor, own = progress.floor if adjoint else None, progress.own
        state = layout.state(x, (b,))
        made: list[tuple[Any, Evaluation, Any]] = []

        def prepare() -> None:
            direction = request.around(static)
            direction.floor = floor
            evaluate = direction.evaluation()
            evaluate.watch(progress)
            x.copy_(layout.rows(start))
            for t in (progress.counters, progress.scalars, progress.tally):
                t.zero_()
            if own is not None:
                own.copy_(static[-1])
            if floor is not None:
                floor.copy_(direction.scale(look=False))
                progress.skip(floor == 0, x)
            # What a solver keeps is made here, so that every launch begins with it fresh.
            made[:] = [(direction, evaluate, request.solver.start(backend, progress, progress.out))]

        def iterations() -> None:
            _, evaluate, update = made[0]
            for _ in range(recorder.unroll):  # where none is needed it changes nothing
                update(x, layout.rows(evaluate(state)))

        def finish() -> None:
            direction = made[0][0]
            keep = direction.kept(progress.counters[:, STATUS] - 1)
            self._outputs = list(direction.outputs(layout.state(progress.out, (b,)), keep))

        parts = (prepare, iterations, finish) if adjoint else (prepare, iterations)
        for _ in range(2):  # whatever g or a library does at its first and second call is done
            for part in parts:
                recorder.warm_up(part)
        made.clear()
        self._outputs.clear()
        for part in parts:
            recorder.record(part)
        rows = made[0][0].rows(made[0][1])
        self.path = f"{backend.NAME}, graph{recorder.note}, {rows}"
        # Samples' own limits end the loop by themselves; another call's may be higher.
        most = limits.max_iterations if own is None else 2**30
        self._launch = recorder.loop(progress.tally, most)
        self._used = x, made[0][2]  # the device's own: nothing here reads them again

    def __call__(self, given: Sequence[Tensor]) -> tuple[Tensor, Progress, list[Tensor | None]]:
        """Solve; what is returned belongs to the caller."""
        progress = self._progress
        with self._lock, torch.inference_mode(False), torch.no_grad():
            copy_all(self._static, [t.detach() for t in given])
            self._launch()
            x = self._layout.state(progress.out.clone(), self._batch)
            outputs = [None if t is None else t.clone() for t in self._outputs]
            found = copy.copy(progress)
            found.result()
            for name in ("counters", "scalars", "tally"):
                setattr(found, name, getattr(progress, name).clone())
            found.tally = found.tally.cpu()  # the one wait: nobody else's launch may come before
        return x, found, outputs


def _random_on_host() -> tuple[Any, ...]:
    numpy: Any = sys.modules.get("numpy")
    state = numpy.random.get_state(legacy=False) if numpy else None
    return torch.get_rng_state().tolist(), random.getstate(), repr(state)


class Watch(TorchDispatchMode):
    """Finds tensors that g captured: a graph would go on with them after they were replaced."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {storage_id(t) for t in known}
        self._foreign: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not lift_fresh:  # a constant made just now
            for t in tree_leaves((args, kwargs)):
                # A number on its way into a kernel comes as a CPU scalar.
                number = isinstance(t, Tensor) and t.dim() == 0 and t.device.type == "cpu"
                if isinstance(t, Tensor) and not number and storage_id(t) not in self._known:
                    self._foreign = t
        out = func(*args, **kwargs)
        self._known.update(storage_id(t) for t in tree_leaves(out) if isinstance(t, Tensor))
        return out

    def check(self) -> None:
        """Raise if there was one."""
        if (t := self._foreign) is not None:
            raise Refused(
                f"g captures a tensor of shape {tuple(t.shape)} on {t.device}, which may be "
                "replaced behind the graph's back; pass it in `inputs` or `params`, or register it "
                "as a buffer"
            )
