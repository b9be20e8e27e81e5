"""What a step of convolutions tells the solver of itself, so that no graph is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS, slope_of

__all__ = ["ConvForm"]

# Those that may overwrite what they are given: nothing else reads it where no graph is kept.
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}


@dataclass(frozen=True, eq=False)  # torch.compile may ask for a hash, which tensors would not give
class ConvForm:
    """A step of stacked convolutions with all that does not depend on x computed.

    With t = scale ∘ x, h₀ = t and l = 1..L, every convolution of stride 1 and zero padding k//2:

        p_l = w_l ⋆ h_{l−1} + bias_l + u_l        (+ residual · t where l = L)
        h_l = φ_l(p_l), or slope_l ∘ p_l in hidden layers that have slopes
        g(x) = h_L, or with an output scale d, of a linear last layer, d ∘ (p_L − u_L) + u_L

    Attributes:
        weights: w_l, [O_l, I_l, k, k]; I_1 = O_L = C, the state's channels.
        biases: [O_l], or None: 0.
        u: [B, O_l, H, W], or None: 0; z's part of the first layer, an adjoint's v in the last.
        activation: φ_L, a name of `ACTIVATIONS`.
        hidden_activation: φ_l of all other layers.
        residual: α.
        scale: [B, C, H, W], or None: 1.
        slopes: of the hidden layers, in place of φ_l: [B, O_l, H, W], bool where they are 0 or 1.
        output_scale: d, [B, C, H, W], or None: 1.
        products: the dtype that convolutions and hidden layers are computed in: autocast's. What
            follows the last convolution is in x's. None: all is.
        unit: of a linear step, [B, 1, 1, 1] or one for all, powers of two: the first convolution
            takes t times that, so that float16 holds it. None: 1.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    u: tuple[Tensor | None, ...]
    activation: str = "identity"
    hidden_activation: str = "identity"
    residual: float = 0.0
    scale: Tensor | None = None
    slopes: tuple[Tensor, ...] | None = None
    output_scale: Tensor | None = None
    products: torch.dtype | None = None
    unit: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """g(x), [B, C, H, W], in plain torch."""
        return self._layers(x)[1][-1]

    def _layers(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """p_l and h_l of every layer."""
        t = x if self.scale is None else self.scale * x
        before, after = [], [t]
        for layer in range(len(self.weights)):
            is_last = layer + 1 == len(self.weights)
            p = self._convolve(after[-1], layer)
            if is_last and self.products is not None:
                p = p.to(t.dtype)
            u, scale = self.u[layer], self.output_scale if is_last else None
            if u is not None and scale is None:
                p = p + u
            if not is_last:
                h = (
                    ACTIVATIONS[self.hidden_activation](p)
                    if self.slopes is None
                    else self.slopes[layer] * p
                )
            else:
                if self.residual != 0:
                    p = p + self.residual * t
                if scale is None:
                    h = ACTIVATIONS[self.activation](p)
                else:
                    h = scale * p if u is None else scale * p + u
            before.append(p)
            after.append(h)
        return before, after[1:]

    def iterated(self, x: Tensor) -> Tensor:
        """g(x) where no graph is kept: each layer's value is worked on where it lies."""
        t = x if self.scale is None else self.scale * x
        h = t if self.unit is None else t * self.unit
        for layer in range(len(self.weights)):
            is_last = layer + 1 == len(self.weights)
            h = self._convolve(h, layer)
            if is_last and self.products is not None:
                h = h.to(t.dtype)
                if self.unit is not None:
                    h = h / self.unit
            u, scale = self.u[layer], self.output_scale if is_last else None
            if u is not None and scale is None:
                h.add_(u)
            activation = self.hidden_activation
            if is_last:
                activation = self.activation
                if self.residual != 0:
                    h.add_(t, alpha=self.residual)
                if scale is not None:
                    h.mul_(scale)
                    h = h if u is None else h.add_(u)
                    continue
            elif self.slopes is not None:
                h.mul_(self.slopes[layer])
                continue
            h = _IN_PLACE.get(activation, ACTIVATIONS[activation])(h)
        return h

    def linearised(self, x: Tensor, *, transpose: bool) -> tuple[Tensor, ConvForm]:
        """g(x), attached to what it depends on, and M = ∂g/∂x there as a form, or its transpose.

        Args:
            x: [B, C, H, W], a leaf that requires gradients.
            transpose: whether the form is c ↦ Mᵀ c, for an adjoint, or t ↦ M t, for a tangent.
        """
        assert self.scale is None and self.slopes is None and self.output_scale is None
        before, after = self._layers(x)
        *hidden, _ = zip(after, before, strict=True)
        relu = self.hidden_activation == "relu"
        slopes: Any = [h > 0 if relu else slope_of(self.hidden_activation, h, p) for h, p in hidden]
        slope = slope_of(self.activation, after[-1], before[-1])
        weights = [w.detach() for w in self.weights]
        if transpose:
            weights = [w.transpose(0, 1).flip(2, 3) for w in reversed(weights)]
            slopes = slopes[::-1]
        nothing = (None,) * len(weights)
        return after[-1], ConvForm(
            tuple(weights),
            nothing,
            nothing,
            residual=self.residual,
            scale=slope if transpose else None,
            slopes=None if None in slopes else tuple(slopes),
            output_scale=None if transpose else slope,
            products=self.products,
        )

    def cast(self, products: torch.dtype, state: torch.dtype) -> ConvForm:
        """The step as it is computed under autocast, for a state of the other dtype."""
        u = [None if u is None else u.to(products) for u in self.u]
        if u[-1] is not None:  # what follows the last convolution is in the state's
            u[-1] = u[-1].to(state)
        return dataclasses.replace(self, products=products, u=tuple(u))

    def plus(self, v: Tensor) -> ConvForm:
        """The linear form that adds v, [B, C, H, W]."""
        assert self.u[-1] is None
        return dataclasses.replace(self, u=(*self.u[:-1], v))

    def laid_out(self) -> ConvForm:
        """The same, channels-last in memory, which the convolutions then keep to."""

        def put(t: Tensor) -> Tensor:
            return t.contiguous(memory_format=torch.channels_last)

        form, dtype = self, self.products
        if dtype is not None:  # once a solve
            weights = tuple(w.to(dtype) for w in self.weights)
            biases = tuple(None if b is None else b.to(dtype) for b in self.biases)
            form = dataclasses.replace(self, weights=weights, biases=biases)
        return form._with(tuple(put(w) for w in form.weights), map(put, form._per_sample))

    def _convolve(self, h: Tensor, layer: int) -> Tensor:
        weight, bias, dtype = self.weights[layer], self.biases[layer], self.products
        if dtype is not None:
            h, weight = h.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)

    @property
    def _per_sample(self) -> list[Tensor]:
        found = (self.scale, *self.u, *(self.slopes or ()), self.output_scale, self.unit)
        return [t for t in found if t is not None]

    def _with(self, weights: tuple[Tensor, ...], per_sample: Iterator[Tensor]) -> ConvForm:
        def following(t: Tensor | None) -> Tensor | None:
            return None if t is None else next(per_sample)

        return dataclasses.replace(
            self,
            weights=weights,
            scale=following(self.scale),
            u=tuple(following(t) for t in self.u),
            slopes=None if self.slopes is None else tuple(next(per_sample) for _ in self.slopes),
            output_scale=following(self.output_scale),
            unit=following(self.unit),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All it holds."""
        return [*self.weights, *self._per_sample, *(b for b in self.biases if b is not None)]

    def opened(self) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        """g(x, *per_sample) and those tensors: the loop may leave samples of them out."""
        form = self.laid_out()

        def g(x: Tensor, *per_sample: Tensor) -> Tensor:
            return form._with(form.weights, iter(per_sample)).iterated(x)

        return g, form._per_sample
