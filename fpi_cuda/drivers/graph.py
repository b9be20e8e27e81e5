"""The graph driver: one iteration captured once, repeated by the device until no sample is active.

A solve becomes three graphs over static tensors: what comes before the loop (g's weights computed,
the linearisation of an adjoint, a fresh record), one iteration, and what follows (gradients). Each
later solve of the same kind copies its tensors in, launches once, and copies the results out; the
host waits once, at the end, for the counts that `on_failure` and the record need.
"""

from __future__ import annotations

import functools
import threading
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._torch import transforming
from ..record import Record
from ..solution import warn
from . import eager, kind, observe
from .capture import RECORDERS
from .captured import CHANGING, Captured, Changing, Random, Refused, Request
from .support import Solved, Support
from .whole import tf32_allowed

__all__ = ["MAX_GRAPHS", "RECORDERS", "STRICT", "support"]

MAX_GRAPHS = 8  # of one g; the least recently used goes first
MAX_REFUSED = 64
# Tests set it: an error of this package's own code ends the capture and the test, where a user gets
# a warning and the eager driver.
STRICT = False


def support(direction: Any, because: str) -> Support:
    """Takes what is captured already, or can be."""
    if direction.problem.batch_dims != 1 or transforming():
        return Support(reason="under a torch.func transform")
    if direction.higher or direction.map.g is None:
        return Support(reason="a derivative of higher order")
    if watched := observe.asked(direction):
        lacking = f'driver="graph" is not possible: {watched}: {observe.WHY}'
        warn(f"{direction.problem.name}: {lacking}", UserWarning)
        return Support(reason=watched)
    found = find(Request(direction))
    return Support(reason=found) if isinstance(found, str) else Support(lambda *_: found())


@dataclass
class _Cache:
    """Of one g: captured solves, and why others can't be captured."""

    graphs: OrderedDict[Any, Captured] = field(default_factory=OrderedDict)
    refused: OrderedDict[Any, str] = field(default_factory=OrderedDict)
    warned: set[str] = field(default_factory=set)
    changed: int = 0  # captures for nothing, since the key was another one after them

    everyone: ClassVar[weakref.WeakKeyDictionary[Any, _Cache]] = weakref.WeakKeyDictionary()


_capturing = threading.Lock()


def find(request: Request) -> str | Callable[[], Solved]:
    """What solves on the device alone, captured now or before; or why the eager driver is to.

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
    g = request.map.g
    try:
        cache = _Cache.everyone.setdefault(kind.owner_of(g), _Cache())
    except TypeError:
        return "g can't be found again: it takes no weak reference or hash"
    odd = next((t for t in request.given if type(t) not in (Tensor, nn.Parameter)), None)
    if odd is not None:
        return f"a {type(odd).__name__} can't be copied into a graph's memory"
    try:
        for t in (*request.given, *request.own):
            if t.device != start.device:  # a number on the host becomes an argument of a kernel
                raise Refused(
                    f"a tensor of shape {tuple(t.shape)} that g takes is on {t.device}, where a "
                    f"graph would not see its value change; move it to {start.device}"
                )
        if cache.changed >= 3:
            raise Changing(CHANGING)
        key = _key(request)
        if key in cache.refused:
            raise Refused(cache.refused[key])
        captured = cache.graphs.get(key)
        if captured is None:
            # Whoever captures may need this thread to go on (autograd's, say): no waiting for it.
            if not _capturing.acquire(blocking=False):
                return "another solve is being captured"
            try:
                captured = _capture(request)
            except Refused as refused:
                cache.changed += isinstance(refused, Changing)
                if not isinstance(refused, Random):
                    _keep(cache.refused, key, str(refused), MAX_REFUSED)
                raise
            finally:
                _capturing.release()
            key = captured.key  # what g keeps from its first call is part of it from now on
    except Random as random:
        raise RuntimeError(f"fixed_point: {random}") from None
    except (Refused, kind.Unseen, torch.OutOfMemoryError) as refused:
        lacking = isinstance(refused, torch.OutOfMemoryError)
        reason = "the graph's memory could not be allocated" if lacking else str(refused)
        if reason not in cache.warned:
            cache.warned.add(reason)
            warn(f"fpi_cuda: no CUDA graph for this solve, it runs eagerly: {reason}", UserWarning)
        return reason
    _keep(cache.graphs, key, captured, MAX_GRAPHS)
    return functools.partial(_launch, cache, key, captured, request)


def _capture(request: Request) -> Captured:
    device = request.given[0].device
    try:
        return Captured(RECORDERS[device.type](device), request, _key)
    except (Refused, torch.OutOfMemoryError):
        raise
    except Exception as error:  # g's, or torch's of what can't be captured
        if STRICT and not isinstance(error, RuntimeError) and _of_this_package(error):
            raise
        text = str(error).strip() or type(error).__name__
        raise Refused(text.splitlines()[0]) from None


def _of_this_package(error: Exception) -> bool:
    """Whether its line of code is."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent.parent)


def _launch(cache: _Cache, key: Any, captured: Captured, request: Request) -> Solved:
    try:
        x, progress, outputs = captured(request.given)
    except BaseException:
        cache.graphs.pop(key, None)  # nobody knows what it is worth
        raise
    progress.limits = request.limits  # the captured ones may have had others of each sample
    _, failed, iterations = progress.tally.tolist()
    request.map.left = captured.left  # a launch runs none of g's Python
    direction = request.direction
    adjoint = direction.linear
    if adjoint and failed:  # the device's own is another launch's soon
        direction.floor = direction.scale()
    record = Record(
        progress=progress,
        batch=x.shape[:1],
        rate=request.solver.contraction,
        path=captured.path,
        failed=failed,
        evaluations=1 if adjoint else iterations,
    )
    return Solved(x, record, outputs if adjoint else None)


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > limit:
        kept.popitem(last=False)


def _key(request: Request) -> tuple[Any, ...]:
    """What must agree for a captured solve to serve this one.

    Raises:
        Unseen: g reads what can't be looked into.
    """
    return (
        request.options,
        request.solver,
        tf32_allowed(request.limits) if request.limits.own is not None else request.limits,
        tuple((t.shape, _dense(t), t.dtype, t.device) for t in request.given),
        tuple((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in request.own),
        kind.python_values(request.map.values),
        kind.precision(),
    )


def _dense(t: Tensor) -> tuple[int, ...]:
    """The strides of a copy: an expanded gradient is of the same kind as a plain one."""
    return (t if t.is_contiguous() else torch.empty_like(t, device="meta")).stride()
