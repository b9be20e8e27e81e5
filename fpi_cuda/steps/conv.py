"""Steps of convolutions: modules like any other, which the solver takes apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .._check import check_activation, check_residual, check_sizes
from .._torch import FORWARD_HOOKS, hooked
from ..forms import ACTIVATIONS, ConvForm

__all__ = ["ConvStep"]

# Of a fresh step's Lipschitz constant: a contraction for activations of slope at most 1.
NORM = 0.7
LARGEST_KERNEL = 7


class ConvStep(nn.Module):
    """A stack of convolutions as a step g(x, z): x⁺ = α x + stack([x, z]).

    With L = len(hidden) + 1 convolutions of stride 1 and zero padding, so that any H and W do:

        h₁ = φ(w₁ ⋆ x + U ⋆ z + b₁),  h_l = φ(w_l ⋆ h_{l−1} + b_l),
        x⁺ = φ_out(α x + w_L ⋆ h_{L−1} + b_L)

    In `fixed_point` and `FixedPointLayer` U ⋆ z + b₁ is computed once a solve; the adjoint iterates
    transposed convolutions and needs no autograd graph. On CUDA Triton's kernels leave finished
    samples out by themselves (`Solution.path` says "masked"); on the CPU the batch is compacted.
    Under torch.autocast the convolutions and hidden layers are computed in its dtype, by torch,
    and what follows the last of them in x's. Anywhere else it is a module like any other. Fresh
    weights make a contraction with every activation whose slope is at most 1 (all but gelu, 1.13)
    where |α| < 0.2;
    `contraction.spectral_normalize` keeps trained ones so.

    Args:
        state_channels: C; x is [B, C, H, W].
        input_channels: channels of z, [B, input_channels, H, W].
        hidden: widths of the layers between; (): one layer.
        kernel_size: k, odd, at most 7.
        activation: φ: "relu", "tanh", "sigmoid", "softplus", "gelu" or "identity".
        output_activation: φ_out; None: "identity".
        residual: α.
        bias: whether there are biases.

    Attributes:
        layers: L `nn.Conv2d`, the first of them on x; `layers[l].weight` is w_l.
        input_weight: U, [O₁, input_channels, k, k].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> layer = FixedPointLayer(ConvStep(8, 1, hidden=(16,)))
        >>> layer(torch.randn(2, 1, 12, 20)).shape
        torch.Size([2, 8, 12, 20])
    """

    form_dim = 4  # as in `DenseStep`

    def __init__(
        self,
        state_channels: int,
        input_channels: int,
        hidden: Sequence[int] = (32, 32),
        kernel_size: int = 3,
        activation: str = "relu",
        output_activation: str | None = None,
        residual: float = 0.0,
        bias: bool = True,
    ) -> None:
        owner = "ConvStep"
        check_sizes(owner, state_channels=state_channels, input_channels=input_channels)
        if not isinstance(hidden, (tuple, list)):
            raise TypeError(
                f"{owner}: hidden must be a tuple of widths (got {hidden!r}); write hidden=(32,)"
            )
        for i, width in enumerate(hidden):
            check_sizes(owner, **{f"hidden[{i}]": width})
        if type(kernel_size) is not int or kernel_size not in range(1, LARGEST_KERNEL + 1, 2):
            raise ValueError(
                f"{owner}: kernel_size must be odd and at most {LARGEST_KERNEL}, so that the state "
                f"keeps its size (got {kernel_size!r}); stack more layers to see farther"
            )
        check_activation(owner, "activation", activation, tuple(ACTIVATIONS))
        if output_activation is not None:
            check_activation(owner, "output_activation", output_activation, tuple(ACTIVATIONS))
        check_residual(owner, residual)
        super().__init__()
        self.state_channels, self.input_channels = state_channels, input_channels
        self.hidden, self.kernel_size = tuple(hidden), kernel_size
        self.activation = activation
        self.output_activation = output_activation or "identity"
        self.residual = float(residual)
        widths = (state_channels, *self.hidden, state_channels)
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, kernel_size, padding=kernel_size // 2, bias=bias)
            for i, o in itertools.pairwise(widths)
        )
        share = NORM ** (1 / len(self.layers))
        with torch.no_grad():
            for layer in self._stack:
                o, i = layer.weight.shape[:2]
                # The symbol at a frequency is Gaussian, with k times the deviation of a weight.
                nn.init.normal_(
                    layer.weight, std=share / (kernel_size * (math.sqrt(i) + math.sqrt(o)))
                )
                if layer.bias is not None:
                    layer.bias.zero_()
        inputs = input_channels * kernel_size**2
        self.input_weight = nn.Parameter(
            torch.randn(widths[1], input_channels, kernel_size, kernel_size) / math.sqrt(inputs)
        )

    @property
    def _stack(self) -> list[nn.Conv2d]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def state_shape(self) -> Callable[[Tensor], tuple[int, ...]]:
        """One sample's state for a first input z: (C, H, W)."""
        channels = self.state_channels

        def shape(z: Tensor) -> tuple[int, ...]:
            _check_image("z", z, self.input_channels)
            return (channels, *z.shape[-2:])

        return shape

    def form(self, x: Tensor, z: Tensor) -> ConvForm:
        """The step at z as the solver takes it; of x only the shape is looked at."""
        _check_image("x", x, self.state_channels)
        _check_image("z", z, self.input_channels)
        if x.dim() != z.dim():
            raise ValueError(
                "ConvStep: x and z must both be a batch of images, or both one image (got shapes "
                f"{tuple(x.shape)} and {tuple(z.shape)})"
            )
        if x.shape[-2:] != z.shape[-2:]:
            raise ValueError(
                f"ConvStep: x and z must have one height and width (got {tuple(x.shape[-2:])} and "
                f"{tuple(z.shape[-2:])}); resize z, or give the layer no x0 of another size"
            )
        first, *rest = self._stack
        for layer in (first, *rest):
            plain = layer.padding_mode == "zeros" and layer.groups == 1
            if not plain or (*layer.stride, *layer.dilation) != (1, 1, 1, 1):
                raise RuntimeError(
                    "ConvStep: a layer must keep stride 1, dilation 1, one group and zero padding, "
                    f"with which its weight is used (got {layer})"
                )
        if z.dtype != self.input_weight.dtype and not torch.is_autocast_enabled(z.device.type):
            raise TypeError(
                f"ConvStep: z must have the weights' dtype, {self.input_weight.dtype} (got "
                f"{z.dtype}); convert it, or the step"
            )
        if any(hooked(layer, FORWARD_HOOKS) for layer in (first, *rest)):
            raise RuntimeError(
                "ConvStep: hooks of a layer never run, since its weight is used without it (older "
                "spectral_norm and weight_norm and torch's pruning are such hooks); use "
                "torch.nn.utils.parametrizations, or a hook of the step"
            )
        if not z.is_meta and any(w.is_meta for layer in (first, *rest) for w in layer.parameters()):
            raise RuntimeError(
                "ConvStep: its layers' parameters must have values (got one on the meta device); a "
                "forward of a layer's own, with which offloading fills it, never runs: offload "
                "the step whole"
            )
        u = torch.conv2d(z, self.input_weight, first.bias, padding=self.kernel_size // 2)
        last = len(rest)
        return ConvForm(
            tuple(layer.weight for layer in self._stack),
            (None, *(layer.bias for layer in rest)),
            (u, *(None for _ in range(last))),
            self.output_activation,
            self.activation,
            self.residual,
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x⁺, shaped like x.

        Args:
            x: [B, C, H, W], or [C, H, W].
            z: [B, input_channels, H, W], or [input_channels, H, W].

        Raises:
            ValueError: the shapes do not fit the step, or each other.
            TypeError: z is of another dtype than the weights, outside autocast.
            RuntimeError: a layer has hooks, or strides, dilation, groups or padding of its own.
        """
        return self.form(x, z)(x)

    def extra_repr(self) -> str:
        """What the constructor was given."""
        text = (
            f"{self.state_channels}, {self.input_channels}, hidden={self.hidden}, "
            f"kernel_size={self.kernel_size}, activation={self.activation!r}"
        )
        if self.output_activation != "identity":
            text += f", output_activation={self.output_activation!r}"
        bias = self._stack[0].bias is not None
        return text + f", residual={self.residual:g}, bias={bias}"


def _check_image(name: str, t: Tensor, channels: int) -> None:
    if t.dim() not in (3, 4) or t.shape[-3] != channels:
        raise ValueError(
            f"ConvStep: {name} must be [B, {channels}, H, W] (got shape {tuple(t.shape)})"
        )
