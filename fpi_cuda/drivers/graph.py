"""The graph driver: one iteration captured once, repeated by the device until no sample is active.

A solve becomes three graphs over static tensors: what comes before the loop (g's weights computed,
the linearisation of an adjoint, a fresh record), one iteration, and what follows (gradients). Each
later solve of the same kind copies its tensors in, launches once, and copies the results out; the
host waits once, at the end, for the counts that `on_failure` and the record need.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import _build
from ..backends.progress import STATUS, Limits, Progress, accumulate_dtype
from ..solution import Record, Status, warn
from ..solvers.iterate import Evaluation
from ..solvers.layout import Layout
from . import eager

__all__ = ["MAX_GRAPHS", "RECORDERS", "Recorder", "Request", "Solved", "solve"]

MAX_GRAPHS = 8  # of one g; the least recently used goes first
MAX_SEEN = 64
SIGHTINGS = 2  # solves of one kind that "auto" runs eagerly before it captures

RANDOM = (
    "g draws random numbers, and a graph would draw the same ones in every iteration; freeze "
    'dropout (one mask a solve, as an input), call g.eval(), or use driver="eager"'
)


class Recorder(Protocol):
    """What turns callables into something the device repeats. Tests have one in plain Python."""

    @staticmethod
    def missing() -> str | None:
        """Why it can't work here, or None."""

    def __init__(self, device: torch.device) -> None: ...

    def random_state(self) -> Tensor:
        """The state of the device's generator."""

    def restore_random_state(self, state: Tensor) -> None:
        """Put it back."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run outside any capture what is to be recorded."""

    def record(self, run: Callable[[], None]) -> None:
        """The next of: what comes before the loop, one iteration, what follows (if any)."""

    def loop(self, tally: Tensor, max_iterations: int) -> Callable[[], None]:
        """A launch of what was recorded; iterates while tally[0] > 0."""


class CudaRecorder:
    """torch's capture, and the WHILE node that torch has no binding for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []  # they own the memory that the kernels use

    @staticmethod
    @functools.cache
    def missing() -> str | None:
        """Why this build or machine has no loops on the device."""
        if _build.cuda is None:
            return "this build has no CUDA library"
        version = _build.cuda.driver_version()
        if version == 0:
            return "there is no CUDA driver"
        if version < 12040:
            return f"the CUDA driver is for {version // 1000}.{version % 1000 // 10}, before 12.4"
        return None

    def random_state(self) -> Tensor:
        """Of the default generator: seed and offset."""
        return torch.cuda.get_rng_state(self.device)

    def restore_random_state(self, state: Tensor) -> None:
        """Put it back."""
        torch.cuda.set_rng_state(state, self.device)

    def warm_up(self, run: Callable[[], None]) -> None:
        """On a side stream, as torch demands before a capture."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()
        current.wait_stream(self.stream)

    def record(self, run: Callable[[], None]) -> None:
        """Capture on the side stream; leaves torch able to capture and to draw after a failure."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream), _own_workspaces():
            # Other threads may allocate meanwhile; only this one is held to what a capture allows.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                run()
                graph.capture_end()
            except BaseException:  # it is the one that tells, not what ending the capture says
                try:
                    graph.capture_end()
                except RuntimeError:
                    self._recover()
                raise
        self.graphs.append(graph)

    def _recover(self) -> None:
        """A broken capture leaves torch's allocator and generator believing that it goes on."""
        for forget in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with contextlib.suppress(RuntimeError):
                forget(self.device.index, self.pool)
        graph = torch.cuda.CUDAGraph()  # one that ends well takes the generator out of it
        scrap = torch.zeros(1, device=self.device)
        torch.cuda.synchronize(self.device)
        graph.capture_begin(capture_error_mode="thread_local")
        scrap.zero_()
        graph.capture_end()

    def loop(self, tally: Tensor, max_iterations: int) -> Callable[[], None]:
        """One launch on the current stream."""
        handles = [graph.raw_cuda_graph() for graph in self.graphs]
        before, body, after = (*handles, 0)[:3]
        with torch.cuda.device(self.device):
            loop = _build.cuda.WhileGraph(before, body, after, tally.data_ptr(), max_iterations)

        def launch() -> None:
            with torch.cuda.device(self.device):
                loop.launch(torch.cuda.current_stream(self.device).cuda_stream)

        return launch


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS takes its workspaces anew, from the graph's memory, and leaves them there."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


# By device type: where there is a graph driver at all.
RECORDERS: dict[str, type[Recorder]] = {"cuda": CudaRecorder}


@dataclass
class Request:
    """One solve, said so that it can be captured, and found again."""

    g: Any
    name: str  # "auto" or "graph"
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
        watch = _Watch((*static, *request.own))

        def look() -> None:
            nonlocal layout
            with watch:
                evaluate = begin(static)
                evaluate.watch(Progress(start, request.limits))  # as in `prepare`: the same kernels
                layout = Layout(evaluate(start))  # the layout that g returns costs no copies

        before = recorder.random_state()
        recorder.warm_up(look)
        if not torch.equal(before, recorder.random_state()):
            recorder.restore_random_state(before)
            raise RuntimeError(RANDOM)
        watch.check()

        self._layout = layout
        x = layout.rows(start).clone()
        floor = x.new_zeros(b, dtype=accumulate_dtype(x.dtype)) if request.adjoint else None
        self._progress = progress = Progress(x, request.limits, floor)
        step = request.solver.start(request.backend, progress, progress.out)
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

        def iteration() -> None:
            step(x, layout.rows(made[0](state)))

        def finish() -> None:
            assert end is not None
            out = layout.state(progress.out, (b,))
            self._outputs = list(end(made[0], out, progress))

        parts = (prepare, iteration) if end is None else (prepare, iteration, finish)
        for _ in range(2):  # whatever g or a library does at its first and second call is done
            for part in parts:
                recorder.warm_up(part)
        made.clear()
        self._outputs.clear()
        for part in parts:
            recorder.record(part)
        self.rows = "masked" if made[0].masks else "whole batch"
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
    """Of one g: captured solves, and how often others were seen or why they can't be captured."""

    graphs: OrderedDict[Any, _Captured] = field(default_factory=OrderedDict)
    seen: OrderedDict[Any, int | str] = field(default_factory=OrderedDict)
    warned: set[str] = field(default_factory=set)

    everyone: ClassVar[weakref.WeakKeyDictionary[Any, _Cache]] = weakref.WeakKeyDictionary()


_capturing = threading.Lock()


def solve(request: Request) -> Solved | str:
    """Solve on the device alone, or say why the eager driver is to do it.

    Raises:
        RuntimeError: g draws random numbers and "graph" was asked for; or the user is capturing.
    """
    device = request.given[0].device
    recorder = RECORDERS[device.type]
    if device.type == "cuda":
        eager.refuse_capture()
    if request.backend.NAME == "reference":
        return f"the {request.backend.NAME} backend reads the device in every iteration"
    if not request.given[0].numel():
        return "the state is empty"
    odd = next((t for t in request.given if type(t) not in (Tensor, nn.Parameter)), None)
    if odd is not None:
        return f"a {type(odd).__name__} can't be copied into a graph's memory"
    try:
        owner, key = _key(request)
        cache = _Cache.everyone.setdefault(owner, _Cache())
    except TypeError:
        return "g can't be found again: it takes no weak reference or hash"
    reason = recorder.missing()
    if reason is not None:
        return _refuse(cache, request, reason)
    captured = cache.graphs.get(key)
    if captured is None:
        seen = cache.seen.get(key, 0)
        if isinstance(seen, str):
            return _refuse(cache, request, seen)
        if request.name == "auto" and seen < SIGHTINGS:
            _keep(cache.seen, key, seen + 1, MAX_SEEN)
            return f"a graph after {SIGHTINGS - seen} more of the same kind"
        # Nobody waits: whoever captures may need the thread that would wait, autograd's.
        if not _capturing.acquire(blocking=False):
            return "another solve is being captured"
        try:
            captured = _Captured(recorder(device), request)
        except torch.OutOfMemoryError:
            return _refuse(cache, request, "the graph's memory could not be allocated")
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            _keep(cache.seen, key, reason, MAX_SEEN)
            return _refuse(cache, request, reason)
        finally:
            _capturing.release()
        cache.seen.pop(key, None)
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
        path=f"{request.backend.NAME}, graph, {captured.rows}",
        failed=failed,
        evaluations=1 if request.adjoint else iterations,
    )
    return Solved(x, record, outputs)


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > limit:
        kept.popitem(last=False)


def _refuse(cache: _Cache, request: Request, reason: str) -> str:
    """Say it once; random numbers are an error where a graph was asked for."""
    if reason == RANDOM and request.name == "graph":
        raise RuntimeError(f"fixed_point: {reason}")
    quiet = request.name == "auto" and reason == RECORDERS[request.given[0].device.type].missing()
    if not quiet and reason not in cache.warned:
        cache.warned.add(reason)
        warn(f"fpi_cuda: no CUDA graph for this solve, it runs eagerly: {reason}", UserWarning)
    return reason


def _key(request: Request) -> tuple[Any, tuple[Any, ...]]:
    """Whose graphs are looked through, and what must agree."""
    g = request.g
    owner, method = (g.__self__, g.__func__) if isinstance(g, MethodType) else (g, None)
    return owner, (
        method,
        request.options,
        request.solver,
        request.limits,
        tuple((t.shape, _dense(t), t.dtype, t.device) for t in request.given),
        tuple((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in request.own),
        _python_state(owner),
        _precision(),
    )


def _dense(t: Tensor) -> tuple[int, ...]:
    """The strides of a copy: an expanded gradient is of the same kind as a plain one."""
    return (t if t.is_contiguous() else torch.empty_like(t, device="meta")).stride()


_INTERNAL = frozenset(nn.Module().__dict__)


def _python_state(g: Any) -> tuple[Any, ...]:
    """The Python values g may read, as far as they can be seen: a graph has them built in."""
    if isinstance(g, nn.Module):
        return tuple(
            (
                type(m),
                m.training,
                *m._modules,
                *m._forward_hooks,
                *m._forward_pre_hooks,
                *((k, _plain(v)) for k, v in vars(m).items() if k not in _INTERNAL),
            )
            for m in g.modules()
        )
    if isinstance(g, FunctionType):
        cells = [c.cell_contents for c in g.__closure__ or ()]
        return tuple(_plain(v) for v in (*cells, *(g.__defaults__ or ())))
    return tuple((k, _plain(v)) for k, v in getattr(g, "__dict__", {}).items())


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, complex, str, type(None))):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return tuple((_plain(k), _plain(v)) for k, v in value.items())
    return (id(value), value._version) if isinstance(value, Tensor) else id(value)


def _precision() -> tuple[Any, ...]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )
