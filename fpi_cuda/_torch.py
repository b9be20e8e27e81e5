"""Every name of torch that torch does not promise to keep, each with the reason for its use.

The rest of the package takes them from here. `tests/test_torch_names.py` checks, under each torch
that is supported, that a name exists and does what it is used for. "No public one" is said of
torch up to 2.14.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

# The module and its classes are documented, but under a path that is marked private.
from torch.utils._python_dispatch import TorchDispatchMode

# torch's own walk over nested containers, which agrees with its transforms about what a leaf is.
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["TorchDispatchMode", "tree_leaves", "tree_map"]

# ---- derivatives ----


def transforming() -> bool:
    """Whether a torch.func transform (grad, vmap, ...) is running. No public one."""
    return bool(torch._C._are_functorch_transforms_active())


def forward_mode() -> bool:
    """Whether a level of forward-mode derivatives is open. No public one.

    Only a node can refuse a tangent, so there must be one even where nothing needs gradients.
    """
    return forward_ad._current_level >= 0


def wrapped(t: Tensor) -> bool:
    """Whether a torch.func transform wraps t. No public one."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(t))


def mapped(t: Tensor) -> bool:
    """Whether the outermost wrapper of t is torch.vmap's. No public one."""
    return bool(torch._C._functorch.is_batchedtensor(t))


def unwrapped(t: Tensor) -> Tensor:
    """What the outermost wrapper of t holds. No public one."""
    return torch._C._functorch.get_unwrapped(t)


def legacy_batched(v: Any) -> bool:
    """Whether v is batched by autograd.grad(is_grads_batched=True), which is no transform.

    No public one: that option still runs on the vmap that torch.func's replaced, without its rules.
    """
    return isinstance(v, Tensor) and torch._C._functorch.is_legacy_batchedtensor(v)


def legacy_level() -> int:
    """The level of the batch that `is_grads_batched=True` runs under. No public one."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def legacy_unbatched(t: Tensor, level: int) -> Tensor:
    """The tensor behind t, its batch first. No public one."""
    return torch._remove_batch_dim(t, level, 0, 0)


def legacy_rebatched(t: Tensor, level: int) -> Tensor:
    """The tensor whose first dimension is the batch of this level. No public one."""
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


def version(t: Tensor) -> int:
    """How often t was written to. No public one; an inference tensor has none."""
    return t._version


def storage_id(t: Tensor) -> int:
    """What tells one storage from another: the address of the object, not of its memory.

    The public data_ptr() is 0 for every storage without memory. No public one.
    """
    return t.untyped_storage()._cdata  # type: ignore[no-any-return]


def copy_all(into: list[Tensor], source: list[Tensor]) -> None:
    """Copy tensors into others, in few launches on a device. No public one."""
    torch._foreach_copy_(into, source)


# What torch.tensor ends in, as a dispatch mode sees it: a constant made just now. Operators under
# torch.ops.aten are not promised to stay.
lift_fresh = torch.ops.aten.lift_fresh.default


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


def parameters(m: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters, where it keeps them: a change of the dict changes the module."""
    return m._parameters


def buffers(m: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers, likewise."""
    return m._buffers


def children(m: nn.Module) -> dict[str, nn.Module | None]:
    """The module's own children, likewise."""
    return m._modules


def pre_hooks(m: nn.Module) -> dict[int, Any]:
    """The hooks that run before the module's forward, likewise. Hooks have no public list."""
    return m._forward_pre_hooks


def hooked(m: nn.Module, kinds: Iterable[str] = HOOKS) -> bool:
    """Whether hooks of these kinds stand around the module. No public one."""
    own = vars(m)
    return any(own.get(kind) for kind in kinds)


def global_hooks() -> list[tuple[int, Any]]:
    """The hooks of all modules, by their ids: those before forward, then those after it.

    torch.nn.modules.module has public functions that register them, and none that lists them.
    """
    of_all = torch.nn.modules.module
    return [*of_all._global_forward_pre_hooks.items(), *of_all._global_forward_hooks.items()]


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


def compiled_module(m: Any) -> bool:
    """Whether m is torch.compile's wrapper of a module. No public one.

    Asking for the wrapper's class, which is private too, would import the compiler.
    """
    return hasattr(m, "_orig_mod")


def compiled_function(f: Any) -> bool:
    """Whether torch.compile made the function f. No public one."""
    return hasattr(f, "_torchdynamo_orig_callable")


# torch.jit is deprecated since 2.5 and may go; these say what its results are, while it is there.
ScriptModule, ScriptFunction = torch.jit.ScriptModule, torch.jit.ScriptFunction


# ---- CUDA ----


def end_pool(device: int, pool: Any) -> None:
    """Take a memory pool back from a capture that broke: torch does so only where one ends well.

    No public one. Either half may have been done already, which raises RuntimeError.
    """
    for forget in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with contextlib.suppress(RuntimeError):
            forget(device, pool)


def clear_cublas_workspaces() -> None:
    """Make cuBLAS take its workspaces anew, from a graph's memory while one is captured.

    No public one, and `torch.cuda.graph` does not do it.
    """
    torch._C._cuda_clearCublasWorkspaces()
