"""The same as `_torch`: names of those who make graphs of what runs, and of tensors without values.

torch.compile, torch.export, torch.jit and recorders; tests/test_torch_names.py has a test each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# A mode in which tensors have shapes and no values. `import torch` itself has loaded the module.
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental import proxy_tensor

from ._torch import children, transforming, unwrapped, version, wrapped

# ---- recorders ----

# torch.func.linearize records what runs as a graph, which a loop whose length depends on data can't
# be. The tools of its recorder are documented nowhere.


# What proxy_tensor.get_proxy_mode() asks, at a tenth of its cost: each solve asks.
_get_dispatch_mode = torch._C._get_dispatch_mode
_PROXY, _FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


def recording() -> bool:
    """Whether a graph is being recorded here."""
    return _get_dispatch_mode(_PROXY) is not None


def unrecorded() -> contextlib.AbstractContextManager[Any]:
    """No recording: values may be looked at, which are constants of the graph then."""
    return proxy_tensor.disable_proxy_modes_tracing()


# Traces a function into a graph of torch's operators; torch.export is made of it, and torch.fx's
# documentation leaves it out.
make_fx = proxy_tensor.make_fx


def real_tensors() -> contextlib.AbstractContextManager[Any]:
    """Tensors made here have values, where torch.export works with such as have none."""
    return unset_fake_temporarily()


def _named(f: Callable[..., Any]) -> Callable[..., Any]:
    def solve(*tensors: Tensor) -> Any:  # a graph wants a name
        return f(*tensors)

    return solve


def as_one_call(f: Callable[..., Any], *tensors: Tensor) -> Any:
    """f(*tensors), as one call of f in the graph that is being recorded."""
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None
    with unrecorded():
        out = f(*tensors)
    slots = [
        proxy_tensor.get_proxy_slot(t, mode.tracer, None, lambda found: found.proxy)
        for t in tensors
    ]
    if any(slot is not None for slot in slots):
        given = tuple(t if slot is None else slot for slot, t in zip(slots, tensors, strict=True))
        call = mode.tracer.create_proxy("call_function", _named(f), given, {})
        proxy_tensor.track_tensor_tree(out, call, constant=None, tracer=mode.tracer)
    return out


# autograd.grad(is_grads_batched=True) still runs on the vmap that torch.func's replaced, without
# its rules. Of a tensor there: whether it is batched, at which level, without the batch, and back.


# ---- tensors without values ----

_KINDS = frozenset({Tensor, nn.Parameter})


def odd(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that may have no values: each solve asks, and seldom is there one to look at."""
    return [t for t in tensors if t.is_meta or type(t) not in _KINDS]


def fake_mode(*tensors: Tensor) -> Any:
    """The mode of the first tensor that is fake, behind whatever transforms; None: none is.

    torch's own function for it looks into subclasses first, and costs twenty times as much.
    """
    wraps = transforming()
    for given in tensors:
        t = given
        while wraps and wrapped(t):
            t = unwrapped(t)
        if type(t) not in _KINDS and isinstance(t, FakeTensor):
            return t.fake_mode
    return None


def fake_world(*tensors: Tensor) -> Any:
    """The mode that is on, else that of a tensor; None: values are made here."""
    return _get_dispatch_mode(_FAKE) or fake_mode(*tensors)


def valueless(t: Tensor) -> bool:
    """Whether there are shapes and no values: on the meta device, or where the tensor is fake."""
    return t.is_meta or fake_mode(t) is not None


# ---- torch.compile, torch.export, torch.jit ----


def compiled_module(m: nn.Module) -> bool:
    """Whether m is torch.compile's wrapper of the module `m._orig_mod`.

    Its class, private too, would import the compiler.
    """
    return "_orig_mod" in children(m)


def within_compiled(m: nn.Module) -> Any:
    """What such a wrapper wraps."""
    return children(m)["_orig_mod"]


def compiled_function(f: Any) -> bool:
    """Whether torch.compile made the function f."""
    return hasattr(f, "_torchdynamo_orig_callable")


def before_compile(f: Any) -> Any:
    """What torch.compile made such a function of."""
    return f._torchdynamo_orig_callable


def apart(f: Callable[..., Any], *arguments: Any) -> Any:
    """f(*arguments), as it is where torch.compile makes a graph: the graph breaks there.

    Also where a frame could not be compiled, and each function that it calls would be. Nothing
    public says that a compiler looks at frames.
    """
    if torch.compiler.is_compiling():
        if exporting():
            return f(*arguments)
    elif _looking() is None:
        return f(*arguments)
    from ._uncompiled import call

    return call(f, *arguments)


def constant_in_graphs(f: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which torch.compile calls while it makes a graph, for a constant of that.

    `torch.compiler.assume_constant_result` does no more than this, but imports the compiler.
    """
    f._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return f


def unwritten() -> set[int] | None:
    """The ids of the objects to which the graph that torch.compile makes here writes at its end.

    Those with attributes, lists, dicts, cells of closures, and tensors that were made before, to
    which a graph may write late. None: it writes to a global variable. What the compiler says of
    all this is documented nowhere.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output = InstructionTranslator.current_tx().output
    effects = output.side_effects
    if any(type(v).__name__ == "NewGlobalVariable" for v in effects.store_attr_mutations):
        return None
    found = {key for key, v in effects.id_to_variable.items() if effects.is_modified(v)}
    for tracer in output.tracers:
        for node in tracer.graph.find_nodes(op="placeholder"):
            given, fake = node.meta.get("grapharg"), node.meta.get("example_value")
            if given is not None and isinstance(fake, Tensor) and version(fake):  # from 0 on
                found.add(id(given.example))
    return found


def exporting() -> bool:
    """Whether torch.export makes a program; `torch.compiler.is_exporting` says so of any graph.

    (Where torch 2.11's compiler traces it.)
    """
    return torch.compiler._is_exporting_flag


_looking = torch._C._dynamo.eval_frame.get_eval_frame_callback


# torch.jit is deprecated since 2.5 and may go; these say what its results are, while it is there.
ScriptModule, ScriptFunction = torch.jit.ScriptModule, torch.jit.ScriptFunction
# Whether torch.jit.trace runs what is around.
jit_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
