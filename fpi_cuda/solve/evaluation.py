"""What the loop calls: g with its tensors put in, its linearisation, and both on fewer samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .._torch import version
from ..backends import triton
from ..derivatives import free, pulled, vjp
from ..forms import ConvForm
from ..layout import take
from ..record import STATUS, Progress
from .independence import Samples
from .maps import Bound, check_output
from .problem import Context

__all__: list[str] = []


WRITTEN = "fixed_point: g must not change its argument x in place; write x * 2, not x.mul_(2)"
GRADIENT_WRITTEN = (
    "fixed_point: the derivative of g must not change the gradient that it is given in place (an "
    "autograd.Function in g does); write grad * 2, not grad.mul_(2)"
)


class Seen:
    """What the evaluations of one solve find out."""

    calls = 0  # of g
    closure = False  # g reads a tensor that needs gradients and is no argument: first call
    random: bool | None = None  # g gives other values for the same arguments; None: not looked at


class Direct:
    """x ↦ g(x, *inputs) on the rows it holds."""

    masks = False
    steps: ModuleType | None = None

    def __init__(
        self,
        context: Context,
        seen: Seen,
        g: Bound,
        inputs: Sequence[Tensor],
        samples: Samples | None,
    ) -> None:
        self.context, self.seen, self.g, self.inputs = context, seen, g, inputs
        self.samples = samples
        # On a device a smaller batch costs a dozen launches, and a small one saves no time.
        below = 0.8 if context.device_type == "cpu" else 0.5
        self.compact_below = 0.0 if samples is None or samples.compactable is False else below
        self.first = True
        self.counted = False  # whether writes to x are: where it is no inference tensor
        self.wide = context.autocast_dtype is None

    def watch(self, progress: Progress) -> None:
        """Which samples have finished, the loop tells by `select`."""

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.calls += 1
        if self.first:
            self.first = False
            return self._first(x)
        counted = self.counted
        before = version(x) if counted else 0
        if self.wide:
            gx = check_output(self.g(x, *self.inputs), x)
        else:
            with self.context.autocast():
                gx = check_output(self.g(x, *self.inputs), x)
        if counted and version(x) != before:
            raise RuntimeError(WRITTEN)
        return gx

    def _first(self, x: Tensor) -> Tensor:
        """The first call also finds closure tensors."""
        self.counted = not x.is_inference()
        before = version(x) if self.counted else 0
        with self.context.grad(), self.context.autocast():
            gx = check_output(self.g(x, *self.inputs), x)
        if self.counted and version(x) != before:
            raise RuntimeError(WRITTEN)
        if gx.requires_grad:
            self.seen.closure = True
        return gx.detach()

    def part(self, positions: Tensor) -> Direct:
        """The same for the samples there."""
        inputs = [take(t, positions) for t in self.inputs]
        part = Direct(self.context, self.seen, self.g, inputs, self.samples)
        part.first, part.counted = False, self.counted
        return part

    def select(self, positions: Tensor, x: Tensor) -> Direct | None:
        samples = self.samples
        assert samples is not None

        def some(at: Tensor) -> Tensor:
            return self.part(at)(x.index_select(0, at))

        dtype, known = self.context.autocast_dtype, samples.compactable
        if known is None and not samples.learn(some, self(x), dtype):
            return None
        return self.part(positions)


class Linearised:
    """u ↦ M u + v, linearised once at x: M = ∂g/∂x, or its transpose."""

    masks = False
    steps: ModuleType | None = None

    def __init__(
        self,
        context: Context,
        seen: Seen,
        g: Bound,
        x: Tensor,
        v: Tensor,
        inputs: Sequence[Tensor],
        samples: Samples | None,
        unattached: Callable[[], Bound] | None = None,
        *,
        transpose: bool,
        unit: Tensor | None = None,
    ) -> None:
        self.context, self.seen, self.g, self.inputs, self.v = context, seen, g, inputs, v
        self.samples, self.transpose, self.unit = samples, transpose, unit
        # A smaller batch costs one more linearisation: it must save more than that.
        self.compact_below = 0.0 if samples is None or samples.compactable is False else 0.5
        # Gives g without a path to the params, which smaller linearisations do not need.
        self.unattached = unattached
        seen.calls += 1
        with torch.set_grad_enabled(True), context.autocast():
            self.x = free(x)
            before = version(self.x)
            self.y = check_output(g(self.x, *inputs), self.x)
        if version(self.x) != before:  # of x̂ itself
            raise RuntimeError(WRITTEN)
        self.of, self.by = self.y, self.x
        if not transpose:
            with torch.set_grad_enabled(True):
                self.of, self.by = pulled(self.y, self.x)

    def watch(self, progress: Progress) -> None:
        """Which samples have finished, the loop tells by `select`."""

    def __call__(self, u: Tensor) -> Tensor:
        before = version(u)
        if self.unit is None:
            mu = vjp(self.of, self.by, u) + self.v
        else:
            mu = vjp(self.of, self.by, u * self.unit) / self.unit + self.v
        if version(u) != before:
            raise RuntimeError(GRADIENT_WRITTEN)
        return mu

    def part(self, positions: Tensor) -> Linearised:
        """The same for the samples there."""
        if self.unattached is not None:
            self.g, self.unattached = self.unattached(), None
        inputs = [take(t.detach(), positions) for t in self.inputs]
        x, v = (take(t.detach(), positions) for t in (self.x, self.v))
        return Linearised(
            *(self.context, self.seen, self.g, x, v, inputs, self.samples),
            transpose=self.transpose,
            unit=None if self.unit is None else take(self.unit, positions),
        )

    def select(self, positions: Tensor, u: Tensor) -> Linearised | None:
        del u
        samples = self.samples
        assert samples is not None

        def some(at: Tensor) -> Tensor:
            return self.part(at).y.detach()

        dtype, known = self.context.autocast_dtype, samples.compactable
        if known is None and not samples.learn(some, self.y.detach(), dtype):
            return None
        return self.part(positions)


class Masked:
    """x ↦ g(x) by kernels that leave finished samples out, whatever the host knows.

    Args:
        seen: where calls are counted.
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
        seen: Seen,
        kernels: ModuleType,
        form: ConvForm,
        like: Tensor,
        *,
        tf32: bool,
        norms: bool,
    ) -> None:
        self.seen, self.kernels = seen, kernels
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
        self.seen.calls += 1
        self.active = self.kernels.active_samples(self.status, self.active)
        x = x.contiguous(memory_format=torch.channels_last)
        self.chain(x, self.out, *self.active, self.norms)
        return self.out

    def part(self, positions: Tensor) -> Masked:
        raise NotImplementedError  # it leaves samples out by itself

    def select(self, positions: Tensor, x: Tensor) -> Masked | None:
        return None


def convolutions(backend: str, form: ConvForm, x: Tensor) -> ModuleType | None:
    """The kernels for this form and a state like x, or None: torch's convolutions serve."""
    if backend not in ("auto", "triton") or (backend == "auto" and x.device.type != "cuda"):
        return None
    if form.products not in (None, x.dtype):
        return None
    if triton.missing(x.device.type) is not None:
        return None
    from ..backends.triton import conv

    return conv if conv.refusal(form, x) is None else None
