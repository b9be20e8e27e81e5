"""Steps of convolutions in Triton: the layers fused, or one at a time; finished samples left out.

Given u, a sample's bits depend on the config, which the layers, precision and device choose, and
not on the batch or on who else is active.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import contextlib
import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...forms.activations import ACTIVATIONS
from ...forms.conv import ConvForm
from ...record import accumulate_dtype
from .. import triton as STEPS  # whose Picard step reads the sums that the kernels leave
from . import configs
from .conv_kernels import Layer, active_kernel, chain_kernel, conv_kernel, pack_kernel
from .language import INTERPRETED

__all__ = ["STEPS", "Chain", "active_samples", "pack_bits", "refusal"]

MOST_KERNEL = 7
_LIST_BLOCK = 1024  # samples that active_samples looks at in a pass
_PACK_BLOCK = 128  # pixels that a program of pack_bits packs


def active_samples(
    status: Tensor, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The samples that still iterate, ascending, as the kernels here take them.

    Args:
        status: int32 [B] of any stride, `Progress.counters[:, STATUS]`: ACTIVE where one iterates.
        into: the two tensors to write; None: new ones.

    Returns:
        index, int32 [B], of which the first count entries are written, and count, int32 [1]. The
        host does not wait for them.
    """
    b, device = len(status), status.device
    if into is None:
        into = (
            torch.empty(b, dtype=torch.int32, device=device),
            torch.empty(1, dtype=torch.int32, device=device),
        )
    index, count = into
    with _on(device):
        active_kernel[(1,)](status, index, count, status.stride(0), b, BLOCK=_LIST_BLOCK)
    return into


def pack_bits(slopes: Tensor) -> Tensor:
    """Slopes that are 0 or 1 as bits.

    Args:
        slopes: bool, [B, O, H, W], channels-last.

    Returns:
        int32, [B, H, W, ceil(O / 32)]; bit o % 32 of word o // 32 is channel o's.
    """
    values = _rows(slopes, "slopes").view(torch.uint8)
    *pixels, channels = values.shape
    words = triton.cdiv(channels, 32)
    packed = torch.empty(*pixels, words, dtype=torch.int32, device=slopes.device)
    count = math.prod(pixels)
    if count:
        with _on(slopes.device):
            pack_kernel[(triton.cdiv(count, _PACK_BLOCK),)](
                values, packed, count, OUTPUTS=channels, WORDS=words, BLOCK=_PACK_BLOCK
            )
    return packed


def refusal(form: ConvForm, x: Tensor) -> str | None:
    """Why `Chain` does not take this form, of right shapes, for states like x, or None."""
    if x.device.type == "cpu":
        if not INTERPRETED:
            return "Triton has no kernels for the CPU; TRITON_INTERPRET=1 runs them there, slowly"
    elif x.device.type != "cuda":
        return f"its Triton kernels are for CUDA devices, and x is on {x.device}"
    elif (machine(x.device)[0] or 0) < 80:
        return "a CUDA device older than compute capability 8.0"
    if x.dtype not in _PRECISION_NAMES:
        return f"no kernels for {x.dtype}"
    if form.output_scale is not None:
        return "no kernels for what a tangent multiplies after its last layer"
    for t in form.tensors:
        if t.device != x.device or t.dtype not in (x.dtype, torch.bool):
            return f"x is {x.dtype} on {x.device}, another tensor {t.dtype} on {t.device}"
    for w in form.weights:
        k = w.shape[-1]
        if w.shape[-2] != k or k % 2 == 0 or k > MOST_KERNEL:
            return (
                f"kernels must be square, odd and at most {MOST_KERNEL}, got {tuple(w.shape[-2:])}"
            )
    for name in (form.activation, form.hidden_activation):
        if name not in ACTIVATIONS:
            return f"no kernels for activation {name!r}"
    b, _, height, width = x.shape
    widest = max(w.shape[0] for w in form.weights)
    if height * width * configs.padded(max(widest, x.shape[1])) >= 2**31 or b * height * width >= (
        2**31
    ):
        return "a sample's layer, or the batch's pixels, beyond 2³¹ values"
    return None


# Of products, by dtype; float32's are tf32 or exact.
_PRECISION_NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}


class Chain:
    """The step of a `ConvForm` by these kernels.

    Weights are packed and the workspace is allocated once, by operations on the device alone, so
    that a CUDA graph can capture it.

    Args:
        form: the step.
        like: a state, [B, C, H, W], channels-last; only its shape, dtype and device are used.
        tf32: whether float32's products may round their operands to tf32.
        config: how to run; None: as `configs` has it for these layers and this device.

    Attributes:
        tiles: partial norms a sample.

    Raises:
        ValueError: for a form that these kernels don't take; says why.
    """

    def __init__(
        self, form: ConvForm, like: Tensor, *, tf32: bool, config: configs.Config | None = None
    ) -> None:
        reason = refusal(form, like)
        if reason is not None:
            raise ValueError(f"the Triton convolutions do not take this step: {reason}")
        b, c, height, width = self._state = like.shape
        self._dtype = like.dtype
        self._shape = configs.Shape(
            (c, *(w.shape[0] for w in form.weights)), tuple(w.shape[-1] for w in form.weights)
        )
        name = _PRECISION_NAMES[like.dtype]
        if tf32 and name == "float32":
            name = "tf32"
        capability, multiprocessors = machine(like.device)
        config = self.config = config or configs.choose(self._shape, name, capability)
        acc = accumulate_dtype(like.dtype)
        self._layers = [self._layer(form, layer) for layer in range(len(form.weights))]
        self._hidden_activation, self._activation = form.hidden_activation, form.activation
        self._scale = None if form.scale is None else _rows(form.scale, "scale")
        self._alpha: Tensor | None = None
        if form.residual != 0:
            self._alpha = torch.full((1,), form.residual, dtype=acc, device=like.device)
        self._options: dict[str, Any] = {
            "AHEAD": config.stages == 1,
            "PRECISION": "tf32" if name == "tf32" else "ieee",
            "ACC": tl.float64 if acc == torch.float64 else tl.float32,
            "TILE_H": config.tile[0],
            "TILE_W": config.tile[1],
            "num_warps": config.warps,
            "num_stages": config.stages,
            "maxnreg": config.registers,
        }
        self._across = triton.cdiv(width, config.tile[1])
        places = triton.cdiv(height, config.tile[0]) * self._across
        self._programs = multiprocessors * config.blocks
        if config.fused:
            self._parts = [1]
            values = configs.scratch_values(self._shape, config.tile)
            programs = min(self._programs, b * places)
            self._workspace = [torch.empty(programs, values, dtype=like.dtype, device=like.device)]
        else:
            outputs = self._shape.channels[1:]
            self._blocks = [min(config.outputs, configs.padded(o)) for o in outputs]
            self._parts = list(map(triton.cdiv, outputs, self._blocks))
            # Hidden layers take turns: each reads the one before.
            self._workspace = [
                torch.empty(b * height * width * max(taking), dtype=like.dtype, device=like.device)
                for taking in (outputs[:-1][::2], outputs[:-1][1::2])
                if taking
            ]
        self._places = places
        self.tiles = places * self._parts[-1]

    def _layer(self, form: ConvForm, at: int) -> Layer:
        weight = form.weights[at].detach()
        outputs, inputs, kernel, _ = weight.shape
        block_k = min(configs.padded(inputs), self.config.inputs)
        rows = weight.to(self._dtype).permute(2, 3, 1, 0).reshape(kernel**2, inputs, outputs)
        in_memory = inputs
        if self.config.fused and at > 0:
            in_memory = configs.padded(inputs)
        if in_memory <= configs.MOST_PACKED:
            block_k = min(configs.padded(kernel**2 * inputs), self.config.inputs)
            rows = rows.reshape(1, kernel**2 * inputs, outputs)
        padding = -rows.shape[1] % block_k
        block_o = configs.padded(outputs)
        if not self.config.fused:
            block_o = min(block_o, self.config.outputs)
        rows = F.pad(rows, (0, -outputs % block_o, 0, padding))
        slope = None
        if form.slopes is not None and at < len(form.slopes):
            slope = form.slopes[at]
            slope = pack_bits(slope) if slope.dtype == torch.bool else _rows(slope, "slopes")
        bias, u = form.biases[at], form.u[at]
        weight = rows.reshape(-1, rows.shape[2]).contiguous()
        constants = (kernel, in_memory, outputs, *weight.shape, block_k)
        return Layer(
            weight,
            None if bias is None else bias.detach().contiguous(),
            None if u is None else _rows(u, "u"),
            slope,
            *map(tl.constexpr, constants),
        )

    def __call__(
        self, x: Tensor, out: Tensor, index: Tensor, count: Tensor, norms: Tensor | None = None
    ) -> None:
        """out[b] = g(x)[b] for the samples b in index[:count]; other samples keep every bit.

        Args:
            x: [B, C, H, W], channels-last, as `like`.
            out: likewise; other memory than x, whose neighbouring pixels are read.
            index: int32 [B], and
            count: int32 [1]; of `active_samples`.
            norms: [B, tiles, 2], float32 (float64 for float64): for each listed sample the parts,
                in a fixed order, of ‖g(x) − x‖² and ‖g(x)‖² over the values as stored in out.
        """
        if x.shape != self._state or x.dtype != self._dtype:
            raise ValueError(
                f"x must be as the state that the chain was made for, {tuple(self._state)} "
                f"of {self._dtype}; got {tuple(x.shape)} of {x.dtype}"
            )
        if x.numel() == 0:
            return
        x, out = _rows(x, "x", view=True), _rows(out, "out", view=True)
        if x.data_ptr() == out.data_ptr():
            raise ValueError("out must be other memory than x: its neighbours' pixels are read")
        with _on(x.device):
            (self._fused if self.config.fused else self._by_layer)(x, out, index, count, norms)

    def _fused(
        self, x: Tensor, out: Tensor, index: Tensor, count: Tensor, norms: Tensor | None
    ) -> None:
        b, height, width, _ = x.shape
        first, *middle, last = self._layers
        chain_kernel[(min(self._programs, b * self._places),)](
            x, out, self._scale, self._alpha, norms, index, count, self._workspace[0],
            first, middle[0] if middle else None, last, height, width, self._across, self._places,
            MIDDLE=bool(middle),
            BLOCK_P=self.config.pixels,
            HIDDEN_ACTIVATION=self._hidden_activation,
            ACTIVATION=self._activation,
            **self._options,
        )  # fmt: skip

    def _by_layer(
        self, x: Tensor, out: Tensor, index: Tensor, count: Tensor, norms: Tensor | None
    ) -> None:
        b, height, width, _ = x.shape
        src = x
        for at, layer in enumerate(self._layers):
            final = at + 1 == len(self._layers)
            dst = out if final else self._workspace[at % 2]
            tiles = self._places * self._parts[at]
            hidden = self._hidden_activation if layer.slope is None else "identity"
            conv_kernel[(min(self._programs, b * tiles),)](
                src, self._scale if at == 0 else None, dst, layer,
                *((x, self._scale, self._alpha, norms) if final else (None,) * 4),
                index, count, height, width, self._across, tiles,
                BLOCK_O=self._blocks[at],
                ACTIVATION=self._activation if final else hidden,
                **self._options,
            )  # fmt: skip
            src = dst


def _rows(t: Tensor, name: str, view: bool = False) -> Tensor:
    """[B, C, H, W] as [B, H, W, C], contiguous; view: or an error where that takes a copy."""
    rows = t.detach().permute(0, 2, 3, 1)
    if view and not rows.is_contiguous():
        raise ValueError(
            f"{name} must be channels-last and dense, got shape {tuple(t.shape)} with strides "
            f"{t.stride()}; use {name}.contiguous(memory_format=torch.channels_last)"
        )
    return rows.contiguous()


@cache  # an entry a device, whose hardware never changes; a test may clear it, nobody has to
def machine(device: torch.device) -> tuple[int | None, int]:
    """A device's capability, as 90 for 9.0, and multiprocessors; the interpreter has two."""
    if device.type != "cuda":
        return None, 2
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Where kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
