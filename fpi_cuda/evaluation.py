"""What the loop calls: g with every tensor explicit, its adjoint, and both on fewer samples.

A step is a map of the state that takes all it depends on as arguments; an evaluation is a step with
its tensors put in, on the rows that a solve still iterates.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from .backends import triton
from .forms import ConvForm, Form, form_of
from .layout import take
from .modules import Binding, bindable
from .operators import transforming
from .record import STATUS, Progress
from .solution import warn

__all__: list[str] = []

Bound = Callable[..., Tensor]


class Owner(Protocol):
    """What an evaluation knows of the solve that it belongs to."""

    calls: int  # of g
    captured: bool  # whether g captures a tensor that needs gradients: found by the first call
    grad_enabled: bool  # where the solve was called
    autocast_dtype: torch.dtype | None
    device_type: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast state g was called under."""


# --- steps -----------------------------------------------------------------------------------


class Step:
    """A step g(x, *inputs, *params) whose every tensor is explicit.

    `bind(params)` does what depends on the shared tensors alone, once, and returns f(x, *inputs).
    """

    n_inputs: int
    form_dim = 0  # dimensions of the states for which the step may have a form; 0: it never has

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """The step with its shared tensors put in."""
        raise NotImplementedError

    def __call__(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The step at x; tensors are the inputs, then the params."""
        n = self.n_inputs
        return self.bind(tensors[n:])(x, *tensors[:n])


class UserStep(Step):
    """The user's g, checked at every call.

    Args:
        g: a callable g(x, *inputs, *params).
        n_inputs, n_params: how many of each the user passed; a module's own parameters follow.
        pack, unpack: between the user's state (a tensor or a tuple) and the solver's one tensor.
    """

    def __init__(
        self,
        g: Callable[..., Any],
        n_inputs: int,
        n_params: int,
        pack: Callable[[Any], Tensor],
        unpack: Callable[[Tensor], Any],
    ) -> None:
        self.g, self.n_inputs, self.n_params = g, n_inputs, n_params
        self.pack, self.unpack = pack, unpack
        self.binding = Binding(g) if bindable(g) else None  # type: ignore[arg-type]
        self.form_dim = getattr(g, "form_dim", 0)

    @property
    def buffers(self) -> list[Tensor]:
        """The snapshot of the module's buffers."""
        return self.binding.buffers if self.binding else []

    def around(self, buffers: Sequence[Tensor]) -> UserStep:
        """The same step with this snapshot of the buffers."""
        other = copy.copy(self)
        other.binding = self.binding.around(buffers) if self.binding else None
        return other

    def form(self, x: Tensor, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> Form | None:
        """g as layers that the library knows, if that is all it is; x is what g would get."""
        if self.binding is None or self.n_params:
            return None
        return form_of(self.binding.bind(params), "form", x, *inputs)

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """g with the user's params appended and the module's own put in."""
        shared = params[: self.n_params]
        g = self.binding.bind(params[self.n_params :]) if self.binding else self.g
        pack, unpack = self.pack, self.unpack

        def bound(x: Tensor, *inputs: Tensor) -> Tensor:
            return pack(g(unpack(x), *inputs, *shared))

        return bound


class AdjointStep(Step):
    """c ↦ (∂g/∂x)ᵀ c + v at x: the backward layer's step (paper eq. 10). Inputs: x, v, then g's."""

    def __init__(self, inner: Step) -> None:
        self.inner = inner
        self.n_inputs = 2 + inner.n_inputs

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """The affine step at these params."""
        g = self.inner.bind(params)

        def bound(c: Tensor, x: Tensor, v: Tensor, *inputs: Tensor) -> Tensor:
            if transforming():
                return torch.func.vjp(lambda q: g(q, *inputs), x)[1](c)[0] + v  # type: ignore[no-any-return]
            # x is a leaf of an independent graph here, as everything is inside a node's forward.
            graph = torch.is_grad_enabled()
            with torch.enable_grad():
                leaf = x if x.requires_grad else x.detach().requires_grad_()
                y = g(leaf, *inputs)
                jc = vjp(y, leaf, c, graph)
            return jc + v

        return bound


class MappedStep(Step):
    """torch.vmap of a step over a new first dimension of x and of the tensors that have it."""

    def __init__(self, inner: Step, dims: Sequence[int | None]) -> None:
        self.inner, self.dims, self.n_inputs = inner, tuple(dims), inner.n_inputs

    def bind(self, params: Sequence[Tensor]) -> Bound:
        """The mapped step at these params."""
        mapped = torch.vmap(self.inner, in_dims=(0, *self.dims))

        def bound(x: Tensor, *inputs: Tensor) -> Tensor:
            return mapped(x, *inputs, *params)

        return bound


def vjp(y: Tensor, x: Tensor, c: Tensor, graph: bool) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    (out,) = torch.autograd.grad(y, x, c, retain_graph=True, create_graph=graph, allow_unused=True)
    return torch.zeros_like(x) if out is None else out


# --- evaluations -----------------------------------------------------------------------------

# Whether g treats samples independently, found out once a g (and a training state of it).
_PER_SAMPLE: weakref.WeakKeyDictionary[Any, dict[Any, bool]] = weakref.WeakKeyDictionary()


class PerSample:
    """Whether finished samples may be left out of the batch given to one g."""

    def __init__(self, setting: bool | str, step: Step) -> None:
        self.known: bool | None = None if setting == "auto" else bool(setting)
        while not isinstance(step, UserStep):
            step = step.inner  # type: ignore[attr-defined]
        g = step.g
        self._g = g
        modules = g.modules() if isinstance(g, torch.nn.Module) else ()
        self._key = tuple(m.training for m in modules)
        if self.known is None:
            with contextlib.suppress(TypeError):  # g takes no weak reference: look each time
                self.known = _PER_SAMPLE.get(g, {}).get(self._key)

    def learn(self, part: Callable[[], Tensor], whole: Tensor, dtype: torch.dtype | None) -> bool:
        """Compare g on the compacted rows with those rows of g on the whole batch.

        dtype is autocast's: g's products have the rounding of that, whatever the state's.
        """
        try:
            rows = part()
        except Exception:
            self.known = False
        else:
            self.known = self._agree(rows, whole, dtype or whole.dtype)
        with contextlib.suppress(TypeError):
            _PER_SAMPLE.setdefault(self._g, {})[self._key] = self.known
        if not self.known:
            warn(
                "fpi_cuda: g does not treat the samples of a batch independently (batch norm, "
                "attention across it, or a captured tensor with the batch dimension?): finished "
                "samples are frozen but stay in the batch given to g. Pass captured tensors as "
                "inputs, or per_sample=False to say so and silence this.",
                UserWarning,
            )
        return self.known

    @staticmethod
    def _agree(part: Tensor, whole: Tensor, dtype: torch.dtype) -> bool:
        eps = max(torch.finfo(part.dtype).eps, torch.finfo(dtype).eps)
        # A library GEMM's or convolution's rows differ in the last bits with the batch's size.
        slack = (16 if eps > 1e-5 else 256) * eps
        part, whole = (t.reshape(len(t), -1).double() for t in (part, whole))
        scale = torch.maximum(torch.linalg.vector_norm(whole, dim=1), part.new_tensor(1e-300))
        worst = torch.linalg.vector_norm(part - whole, dim=1) / scale
        # Rows that hold NaN or Inf say nothing.
        return not bool((worst > slack).any())


class Forward:
    """x ↦ g(x, *inputs) on the rows it holds."""

    masks = False
    steps: ModuleType | None = None

    def __init__(
        self, owner: Owner, g: Bound, inputs: Sequence[Tensor], per_sample: PerSample | None
    ) -> None:
        self.owner, self.g, self.inputs, self.per_sample = owner, g, inputs, per_sample
        # On a device a smaller batch costs a dozen launches, and a small one saves no time.
        below = 0.8 if owner.device_type == "cpu" else 0.5
        self.compact_below = 0.0 if per_sample is None or per_sample.known is False else below
        self.first = True
        self.wide = owner.autocast_dtype is None

    def watch(self, progress: Progress) -> None:
        """Which samples have finished, the loop tells by `select`."""

    def __call__(self, x: Tensor) -> Tensor:
        self.owner.calls += 1
        if self.first:
            self.first = False
            return self._first(x)
        if self.wide:
            return check_output(self.g(x, *self.inputs), x)
        with self.owner.autocast():
            return check_output(self.g(x, *self.inputs), x)

    def _first(self, x: Tensor) -> Tensor:
        """The first call also finds what g captures, and whether it writes to its argument."""
        version = None if x.is_inference() else x._version
        with torch.set_grad_enabled(self.owner.grad_enabled), self.owner.autocast():
            gx = check_output(self.g(x, *self.inputs), x)
        if version is not None and x._version != version:
            raise RuntimeError(
                "fixed_point: g must not change its argument x in place; write x * 2, not x.mul_(2)"
            )
        if gx.requires_grad:
            self.owner.captured = True
        return gx.detach()

    def select(self, positions: Tensor, x: Tensor) -> Forward | None:
        assert self.per_sample is not None
        inputs = [take(t, positions) for t in self.inputs]
        part = Forward(self.owner, self.g, inputs, self.per_sample)
        part.first = False
        if self.per_sample.known is None:
            whole = self(x).index_select(0, positions)
            dtype = self.owner.autocast_dtype
            if not self.per_sample.learn(lambda: part(x.index_select(0, positions)), whole, dtype):
                return None
        return part


class Adjoint:
    """c ↦ (∂g/∂x)ᵀ c + v, linearised once at x."""

    masks = False
    steps: ModuleType | None = None

    def __init__(
        self,
        owner: Owner,
        g: Bound,
        x: Tensor,
        v: Tensor,
        inputs: Sequence[Tensor],
        per_sample: PerSample | None,
    ) -> None:
        self.owner, self.g, self.v, self.inputs = owner, g, v, inputs
        self.per_sample = per_sample
        # A smaller batch costs one more linearisation: it must save more than that.
        self.compact_below = 0.0 if per_sample is None or per_sample.known is False else 0.5
        # Gives g without a path to the params, which smaller linearisations do not need.
        self.unattached: Callable[[], Bound] | None = None
        owner.calls += 1
        with torch.enable_grad(), owner.autocast():
            self.x = x.detach().requires_grad_()
            self.y = check_output(g(self.x, *inputs), self.x)

    def watch(self, progress: Progress) -> None:
        """Which samples have finished, the loop tells by `select`."""

    def __call__(self, c: Tensor) -> Tensor:
        return vjp(self.y, self.x, c, False) + self.v

    def select(self, positions: Tensor, c: Tensor) -> Adjoint | None:
        del c
        assert self.per_sample is not None

        def rows(t: Tensor) -> Tensor:
            return take(t.detach(), positions)

        def smaller() -> Adjoint:
            if self.unattached is not None:
                self.g, self.unattached = self.unattached(), None
            inputs = [rows(t) for t in self.inputs]
            return Adjoint(self.owner, self.g, rows(self.x), rows(self.v), inputs, self.per_sample)

        if self.per_sample.known is not None:
            return smaller()
        made: list[Adjoint] = []

        def part() -> Tensor:
            made.append(smaller())
            return made[0].y.detach()

        dtype = self.owner.autocast_dtype
        return made[0] if self.per_sample.learn(part, rows(self.y), dtype) else None


class Masked:
    """x ↦ g(x) by kernels that leave finished samples out, whatever the host knows.

    Args:
        owner: the solve.
        kernels: see `convolutions`.
        form: the step.
        like: a state, [B, C, H, W].
        tf32: whether products may round float32 operands to tf32.
        norms: whether the kernels leave their sums of squares with the record. Only their own
            backend's steps read them, so these are the solve's, whatever its backend.
    """

    masks = True
    compact_below = 0.0

    def __init__(
        self,
        owner: Owner,
        kernels: ModuleType,
        form: ConvForm,
        like: Tensor,
        *,
        tf32: bool,
        norms: bool,
    ) -> None:
        self.owner, self.kernels = owner, kernels
        self.steps: ModuleType | None = kernels.STEPS if norms else None
        self.out = torch.empty_like(like, memory_format=torch.channels_last)
        self.chain = kernels.Chain(form.laid_out(), self.out, tf32=tf32)
        # Without a record to watch, all are active.
        self.status = torch.zeros(len(like), dtype=torch.int32, device=like.device)
        self.active: tuple[Tensor, Tensor] | None = None
        self.norms: Tensor | None = None

    def watch(self, progress: Progress) -> None:
        self.status = progress.counters[:, STATUS]
        if self.steps is None:
            return
        shape = (len(self.out), self.chain.tiles, 2)
        self.norms = torch.empty(shape, dtype=progress.dtype, device=self.out.device)
        progress.norms = self.norms

    def __call__(self, x: Tensor) -> Tensor:
        self.owner.calls += 1
        self.active = self.kernels.active_samples(self.status, self.active)
        x = x.contiguous(memory_format=torch.channels_last)
        self.chain(x, self.out, *self.active, self.norms)
        return self.out

    def select(self, positions: Tensor, x: Tensor) -> Masked | None:
        return None


def convolutions(backend: str, form: ConvForm, x: Tensor) -> ModuleType | None:
    """The kernels for this form and a state like x, or None: torch's convolutions serve."""
    if backend not in ("auto", "triton") or (backend == "auto" and x.device.type != "cuda"):
        return None
    if triton.missing(x.device.type) is not None:
        return None
    from .backends.triton import conv

    return conv if conv.refusal(form, x) is None else None


def check_output(gx: Any, x: Tensor) -> Tensor:
    """g's value, or an error that says what it must be."""
    if not isinstance(gx, Tensor):
        raise TypeError(f"fixed_point: g must return a tensor like x (got {type(gx).__name__})")
    if gx.shape != x.shape:
        raise ValueError(
            f"fixed_point: g must return the shape of x, {tuple(x.shape)} (got {tuple(gx.shape)}); "
            "where g broadcasts, give x0 the full shape"
        )
    if gx.device != x.device:
        raise ValueError(
            f"fixed_point: g must return a tensor on x's device, {x.device} (got {gx.device})"
        )
    if gx.dtype != x.dtype:
        if torch.is_autocast_enabled(x.device.type) and gx.is_floating_point():
            return gx.to(x.dtype)
        raise TypeError(
            f"fixed_point: g must return x's dtype, {x.dtype} (got {gx.dtype}); convert x0, the "
            "inputs or the parameters to one dtype"
        )
    return gx
