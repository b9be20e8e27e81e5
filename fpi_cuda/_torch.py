"""Every name of torch that torch does not promise to keep, each with the reason for its use.

The rest of the package takes them from here. `tests/test_torch_names.py` checks, under each torch
that is supported, that a name exists and does what it is used for. Where no other reason stands,
torch up to 2.14 has no public name for it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# A mode in which tensors have shapes and no values. `import torch` itself has loaded the module.
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import Function, forward_ad
from torch.fx.experimental import proxy_tensor

# The module and its classes are documented, but under a path that is marked private.
from torch.utils._python_dispatch import TorchDispatchMode

# torch's own walk over nested containers, which agrees with its transforms about what a leaf is.
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["TorchDispatchMode", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"]

# ---- derivatives: torch.func and forward mode tell no caller of their levels ----

_functorch = torch._C._functorch

# Whether a torch.func transform (grad, vmap, ...) is running.
transforming = torch._C._are_functorch_transforms_active
# Whether a transform wraps a tensor, whether the outermost wrapper is vmap's, and what it holds.
wrapped = _functorch.is_functorch_wrapped_tensor
mapped = _functorch.is_batchedtensor
unwrapped = _functorch.get_unwrapped


def stripped(t: Tensor, of_mapped: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The tensor without the wrappers of transforms.

    Args:
        t: any tensor.
        of_mapped: what to make of the tensor in vmap's wrapper, and of the dimension mapped.
    """
    while wrapped(t):
        inner = unwrapped(t)
        t = of_mapped(inner, _functorch.maybe_get_bdim(t)) if mapped(t) else inner
    return t


def of_vmap(t: Tensor) -> bool:
    """Whether vmap maps the tensor, at any level: no host can look at its values."""
    while wrapped(t):
        if mapped(t):
            return True
        t = unwrapped(t)
    return False


def forward_mode() -> bool:
    """Whether a level of forward-mode derivatives is open here; in a node's forward none is.

    A tensor that carries a tangent may be hidden in g, so looking at the arguments is not enough.
    """
    return forward_level() and torch._C._is_fwd_grad_enabled()


def forward_level() -> bool:
    """The same, whether or not forward mode is switched on."""
    return forward_ad._current_level >= 0


def following() -> contextlib.AbstractContextManager[Any]:
    """Forward mode switched on: torch switches it off around a Function's rule for tangents.

    Plain operators in the rule would lose the tangents of the levels around it, in silence.
    """
    return forward_ad._set_fwd_grad_enabled(True)


_NOTHING = contextlib.nullcontext()
_excluded, _AUTOGRAD = (
    torch._C._dispatch_tls_is_dispatch_key_excluded,
    torch._C.DispatchKey.AutogradFunctionality,
)


def no_inference() -> contextlib.AbstractContextManager[Any]:
    """Inference mode switched off, the other modes as they are: no graph is recorded in it.

    What was made in it is to be passed through `normal` in there.
    """
    return _normal_mode() if graphless() else _NOTHING


def graphless() -> bool:
    """Whether no graph is recorded here, whatever the grad mode.

    torch.is_inference_mode_enabled() does not tell where torch.func's transforms run within it.
    """
    return _excluded(_AUTOGRAD)


@contextlib.contextmanager
def _normal_mode() -> Iterator[None]:
    grad, forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
    off = torch.inference_mode(False)  # first: it changes the other two
    with off, torch.set_grad_enabled(grad), forward_ad._set_fwd_grad_enabled(forward):
        yield


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """What is called in here has no gradient: an operator's rule for gradients calls its kernel."""
    return torch._C._AutoDispatchBelowAutograd()


def normal(t: Tensor) -> Tensor:
    """The tensor, or a copy that a graph may save, where it was made in inference mode."""
    return t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t


# What autograd saves goes through hooks that the caller has set (checkpoints, save_on_cpu). No
# public name says whether there are any.
_hooks_on_saved = torch._C._autograd._top_saved_tensors_default_hooks


def _as_it_is(t: Tensor) -> Tensor:
    return t


def unhooked() -> contextlib.AbstractContextManager[Any]:
    """No hooks for a graph that ends where it was made: a checkpoint's would run all again."""
    if _hooks_on_saved(True) is None:
        return _NOTHING
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


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


def legacy_batched(v: Any) -> bool:
    """Whether v is batched so."""
    return isinstance(v, Tensor) and _functorch.is_legacy_batchedtensor(v)


def legacy_level() -> int:
    """The level of the batch."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def legacy_unbatched(t: Tensor, level: int) -> Tensor:
    """The tensor behind t, its batch first."""
    return torch._remove_batch_dim(t, level, 0, 0)


def legacy_rebatched(t: Tensor, level: int) -> Tensor:
    """The tensor whose first dimension is the batch."""
    return torch._add_batch_dim(t, 0, level)


class _NoDefaults(inspect.Signature):
    """A signature that binds nothing."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments as they are: there is no default to fill in."""
        return SimpleNamespace(args=args, kwargs=kwargs, apply_defaults=lambda: None)


def bind_no_defaults(node: type[Function]) -> None:
    """Keep `node.apply` from binding its arguments to forward's signature in each call.

    Function.apply does so to fill in defaults, of which our nodes have none. No public switch. At
    (4, 4) it saves 25 us of the 195 of a forward solve (11 more than keeping the true signature in
    its place, which saves looking it up) and 45 of the 687 of forward and backward, on one core.
    """
    node.forward.__signature__ = _NoDefaults()  # type: ignore[attr-defined]


# ---- tensors ----

# How often a tensor was written to; an inference tensor has no such count.
version = attrgetter("_version")


def held(t: Tensor) -> Tensor:
    """A tensor from a weak reference to it, as one to hold on to.

    Where C++ alone held it, its Python object has to be told that it has an owner again, as
    torch.utils.weak.TensorWeakRef does, which is documented nowhere.
    """
    t._fix_weakref()  # type: ignore[attr-defined]
    return t


# Copy tensors into others, in few launches on a device.
copy_all = torch._foreach_copy_
# What torch.tensor ends in, as a dispatch mode sees it: a constant made just now. Operators under
# torch.ops.aten are not promised to stay.
lift_fresh = torch.ops.aten.lift_fresh.default


def storage_id(t: Tensor) -> int:
    """What tells one storage from another; the public data_ptr() is 0 where there is no memory."""
    return t.untyped_storage()._cdata  # type: ignore[no-any-return]


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


# ---- operators ----

# The dispatch key that meets a call before every torch.func transform. Keys have no public list.
TRANSFORMS_KEY = "FuncTorchDynamicLayerFrontMode"
# Modules of torch that define the classes of operators: objects that are code.
OPERATOR_MODULES = frozenset({"torch._ops", "torch._library.custom_ops"})


def has_kernel(operator: str, device_type: str) -> bool:
    """Whether an operator, "namespace::name", has a kernel for a type of device.

    `torch.library.get_kernel` is public, but raises for an operator that is not defined, with the
    same error as for a kernel that is not there.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, device_type.upper())


def with_cpu_kernel(namespace: str) -> list[str]:
    """The operators of a namespace that have a CPU kernel. No public list."""
    all_of_them = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    prefix = f"{namespace}::"
    return [name.removeprefix(prefix) for name in all_of_them if name.startswith(prefix)]


# ---- modules ----

# Where a module keeps what it owns. The public iterators name and de-duplicate, leave out what is
# None, and can't say where a tensor stands, which it takes to put another one there.
PARAMETERS, BUFFERS, CHILDREN = "_parameters", "_buffers", "_modules"
PRE_HOOKS = "_forward_pre_hooks"
FORWARD_HOOKS = (PRE_HOOKS, "_forward_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_pre_hooks", "_backward_hooks")


def attribute(o: Any, name: str) -> Any:
    """An attribute that is no parameter, buffer or child; None where there is none.

    A module searches in those, and ends in an exception that costs more than the search.
    """
    kind = type(o)
    hands_on = not isinstance(o, nn.Module) or kind.__getattr__ is not nn.Module.__getattr__
    if hands_on or name in o.__dict__ or hasattr(kind, name):
        return getattr(o, name, None)
    return None


# A module's own; a change of the dict changes the module.
parameters, buffers, children, pre_hooks = map(
    attrgetter, (PARAMETERS, BUFFERS, CHILDREN, PRE_HOOKS)
)


def hooked(m: nn.Module, kinds: Iterable[str] = HOOKS) -> bool:
    """Whether hooks of these kinds stand around the module."""
    own = vars(m)
    return any(own.get(kind) for kind in kinds)


def global_hooks() -> list[tuple[int, Any]]:
    """The hooks of all modules, by their ids: those before forward, then those after it.

    torch.nn.modules.module has public functions that register them, and none that lists them.
    """
    of_all = torch.nn.modules.module
    return [*of_all._global_forward_pre_hooks.items(), *of_all._global_forward_hooks.items()]


# Whether there is any, those of backward too.
any_global_hook: Callable[[], Any] = torch.nn.modules.module._has_any_global_hook


def renew_flat_weights(m: nn.Module) -> None:
    """Make a recurrent layer use the weights that it has now: it keeps a second list of them.

    flatten_parameters() is public, but copies the weights into one piece of memory.
    """
    if isinstance(m, nn.RNNBase):
        m._flat_weights = [getattr(m, name) for name in m._flat_weights_names]


def computes_weight(hook: Any) -> bool:
    """Whether a hook is one of torch.nn.utils' older weight_norm and spectral_norm.

    Their classes have names without underscore but are documented nowhere; the functions that tell
    (remove_weight_norm) take the hook away. torch.nn.utils.parametrizations replaces them.
    """
    return type(hook).__name__ in ("SpectralNorm", "WeightNorm")


def of_fsdp(hook: Any) -> bool:
    """Whether a hook is one by which fully_shard gathers parameters around a module's calls."""
    return getattr(hook, "__module__", "") == "torch.distributed.fsdp._fully_shard._fsdp_state"


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


# ---- CUDA ----


def end_pool(device: int, pool: Any) -> None:
    """Take a memory pool back from a capture that broke: torch does so only where one ends well.

    Either half may have been done already, which raises RuntimeError.
    """
    for forget in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with contextlib.suppress(RuntimeError):
            forget(device, pool)


def clear_cublas_workspaces() -> None:
    """Make cuBLAS take its workspaces anew, from a graph's memory while one is captured.

    `torch.cuda.graph` does not do it.
    """
    torch._C._cuda_clearCublasWorkspaces()
