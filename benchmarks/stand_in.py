"""Runs a module as on a CUDA device, on a machine that has none: its Python comes to its end.

    python -m benchmarks.stand_in benchmarks.smoke picard --device cuda
    python -m benchmarks.stand_in benchmarks kernels loop --device cuda

A "CUDA" tensor is a CPU tensor whose storage is marked. Every operator passes a dispatch mode that
marks results, refuses to mix devices, and knows which operators make the host wait; torch.cuda's
streams, events and graphs are plain Python. A graph writes down operators and repeats them on the
same tensors. Kernels are the CPU's and, for Triton, its interpreter's. What a device computes, and
how long it takes, does not show here: only that nothing on the way there is misspelt.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import runpy
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .cuda_in_python import DEVICE, WhileGraph, cuda, is_tensor, local, wait

SAYS = "stand-in: no device; CPU kernels, torch.cuda in plain Python; no figure means anything"
CPU = torch.device("cpu")

installed = False  # whether this process is one

_device_of = torch.Tensor.device  # the real one
_to = torch.Tensor.to
_tolist = torch.Tensor.tolist


def is_marked(t: torch.Tensor) -> bool:
    """Whether it passes for a tensor on the device."""
    try:
        return hasattr(t.untyped_storage(), "on_device")
    except (NotImplementedError, RuntimeError):  # a wrapper of torch.func
        return False


def is_anywhere(t: torch.Tensor) -> bool:
    """Whether autograd made it, with nothing known yet that it goes with."""
    return not is_marked(t) and hasattr(t.untyped_storage(), "anywhere")


def mark(t: torch.Tensor) -> None:
    t.untyped_storage().on_device = True


def device_of(t: torch.Tensor) -> torch.device:
    real: torch.device = _device_of.__get__(t)
    return DEVICE if real.type == "cpu" and is_marked(t) else real


# --- every operator -----------------------------------------------------------------------------

WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero"}
CROSSING = {"_to_copy", "copy_", "_foreach_copy_", "set_"}  # may take tensors of two devices
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}


class Device(TorchDispatchMode):
    """Marks what is on the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if is_tensor(t)]
        here = any(is_marked(t) for t in given)
        if name not in CROSSING and here:
            check_devices(func, name, args, given)
            for t in filter(is_anywhere, given):
                mark(t)
        target = here
        if (wanted := kwargs.get("device")) is not None:
            target = torch.device(wanted).type == "cuda"
            generator = kwargs.get("generator")
            if target and generator is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            if target:
                kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        if here and (name in WAITING or (name in INDEXING and masks(args))):
            wait(name)
        if name in CROSSING and not async_copy(name, args, kwargs):
            crossed = target != here if name == "_to_copy" else len({*map(is_marked, given)}) > 1
            if crossed:
                wait(name)
        if name == "_dense_fits":
            return True
        if name in ("_dense_map", "_dense_solve"):
            args = tuple(False if a is True else a for a in args)  # tf32, which CPUs have not
        before = {t.untyped_storage()._cdata for t in given}
        # Below autograd, where an operator of ours can't ask whether it is differentiated.
        ours = func.namespace == "fpi_cuda" and not any(t.requires_grad for t in given)
        with torch.no_grad() if ours else contextlib.nullcontext():
            out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if is_tensor(t)]
        fresh = [t.untyped_storage()._cdata not in before for t in results]
        # What autograd makes it makes on the real device, which is always the CPU.
        by_autograd = "device" in kwargs and torch._C._current_graph_task_id() != -1
        for t, new in zip(results, fresh, strict=True):
            if new and target:
                mark(t)
            elif new and by_autograd:
                t.untyped_storage().anywhere = True
        if (graph := getattr(local, "capture", None)) is not None and (here or target):
            graph.write((func, *tree_map(kept, (args, kwargs)), results, fresh))
        return out


def kept(t: Any) -> Any:
    """As a graph keeps an argument: a tensor by its place, a number on the CPU by its value."""
    if not is_tensor(t):
        return t
    return t.detach() if is_marked(t) or t.dim() > 0 else t.detach().clone()


def check_devices(func: Any, name: str, args: Any, given: Sequence[torch.Tensor]) -> None:
    if name in INDEXING and is_marked(args[0]):
        return  # indices may come from the CPU
    others = [t for t in given if not (is_marked(t) or is_anywhere(t) or t.dim() == 0)]
    if any(_device_of.__get__(t).type == "cpu" for t in others):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func})"
        )


def masks(args: Any) -> bool:
    return any(t is not None and t.dtype == torch.bool for t in args[1])


def async_copy(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))


# --- what does not reach an operator ------------------------------------------------------------


def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Tensor.to, which else finds that the device is the right one already."""
    if args and is_tensor(args[0]):
        args = (args[0].device, args[0].dtype, *args[1:])
    kwargs = {
        k: torch.device(v) if k == "device" and v is not None else v for k, v in kwargs.items()
    }
    args = tuple(torch.device(a) if isinstance(a, str) else a for a in args)
    wanted = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.device)), None)
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        return _to(self, *args, **kwargs)
    if (wanted.type == "cuda") == is_marked(self):  # stays where it is
        more = {k: v for k, v in kwargs.items() if k in ("copy", "memory_format")}
        dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
        return _to(self, dtype=dtype or self.dtype, **more)
    kwargs["copy"] = True
    where = DEVICE if wanted.type == "cuda" else CPU

    def put(a: Any) -> Any:
        return where if isinstance(a, torch.device) else a

    return _to(self, *map(put, args), **{k: put(v) for k, v in kwargs.items()})


def tolist(self: torch.Tensor) -> Any:
    if is_marked(self):
        wait("tolist")
    return _tolist(self)


def made_here(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A constructor from data, which copies to the device by itself."""

    def constructor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        needs = kwargs.pop("requires_grad", None)
        t = make(*args, **kwargs)
        t = t if device is None else t.to(device)
        return t if needs is None else t.requires_grad_(needs)

    return constructor


# --- installing -------------------------------------------------------------------------------


def uncompiled(model: Any = None, **options: Any) -> Any:
    """torch.compile: the function itself."""
    return model if model is not None else lambda f: f


def install() -> None:
    """Replace, in this process and for good. Call it before fpi_cuda and triton are imported."""
    global installed  # noqa: PLW0603
    os.environ["TRITON_INTERPRET"] = "1"
    import torch._dynamo  # lists torch's functions at its import, which a mode's first use brings

    for name, value in cuda().items():
        setattr(torch.cuda, name, value)
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        setattr(torch._C, name, lambda *_: None)
    torch.Tensor.device = property(device_of)
    torch.Tensor.is_cuda = property(is_marked)
    torch.Tensor.get_device = lambda t: 0 if is_marked(t) else -1
    torch.Tensor.to = to
    torch.Tensor.cuda = lambda t, device=None, **more: t.to(DEVICE, **more)
    torch.Tensor.cpu = lambda t, **more: t.to(CPU, **more)
    torch.Tensor.tolist = tolist
    torch.Tensor.pin_memory = lambda t, *_: t
    torch.tensor, torch.as_tensor = made_here(torch.tensor), made_here(torch.as_tensor)
    torch.compile = uncompiled

    mode = Device()
    mode.__enter__()
    run = threading.Thread.run

    def run_on_device(self: threading.Thread) -> None:
        with mode:
            run(self)

    threading.Thread.run = run_on_device  # a mode is its thread's
    installed = True
    pretend()


def pretend() -> None:
    """The library as if its CUDA kernels were built and loaded."""
    import fpi_cuda
    from fpi_cuda import _build, backends
    from fpi_cuda.backends import native

    build_info = _build.build_info

    def loaded() -> dict[str, Any]:
        here = {"cuda_built": True, "cuda_loaded": True, "cuda_missing": None, "cuda_archs": ["90"]}
        return build_info() | here

    fpi_cuda.build_info = _build.build_info = loaded
    _build.cuda = types.SimpleNamespace(WhileGraph=WhileGraph, driver_version=lambda: 13000)
    native._has = lambda device, operator: True
    native.devices.cache_clear()
    native.dense_devices.cache_clear()

    absent = backends.triton.missing("cpu")  # None where the interpreter runs
    backends.triton.missing = lambda device: absent
    if absent is None:
        interpret()


def interpret() -> None:
    """Triton's interpreter, with launches as a device's; numpy does not warn of NaN."""
    import numpy
    from triton.runtime import interpreter

    from fpi_cuda.backends.triton import configs

    numpy.seterr(all="ignore")

    def choose(shape: Any, precision: str, capability: int | None) -> Any:
        """Small tiles: the interpreter takes as long for pixels outside the image."""
        fused = configs.can_fuse(shape)
        return configs.Config(fused, (4, 8), pixels=32, outputs=32, blocks=1)

    configs.choose = choose
    launch = interpreter.GridExecutor.__call__

    def launch_as_one(self: Any, *args: Any, **kwargs: Any) -> None:
        """A node of its own in a graph, and not the operators that the interpreter is made of."""
        graph, local.capture = getattr(local, "capture", None), None
        try:
            launch(self, *args, **kwargs)
        finally:
            local.capture = graph
        if graph is not None:
            graph.write((functools.partial(launch, self), args, kwargs, [], []))

    interpreter.GridExecutor.__call__ = launch_as_one
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        """Triton 3.6's bounds of loops are arrays that numpy 2.4 makes no number of."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda t: int(t.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python -m benchmarks.stand_in MODULE [ARGUMENT ...]", file=sys.stderr)
        return 2
    print(SAYS, flush=True)
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    # Not this module, which is __main__, but the one by its name, which others ask.
    sys.exit(importlib.import_module("benchmarks.stand_in").main())
