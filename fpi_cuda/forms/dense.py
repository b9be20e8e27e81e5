"""What a step of dense layers tells the solver of itself, so that it can be solved whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS, slope_of

__all__ = ["DenseForm"]


@dataclass(frozen=True, eq=False)  # torch.compile may ask for a hash, which tensors would not give
class DenseForm:
    """A step of one or two dense layers with all that does not depend on x computed.

    With t = gain · scale ∘ x:

        one layer    g(x) = φ(residual t + t Wᵀ + u)
        two layers   g(x) = φ(residual t + h Wᵀ + u),  h = φ₁(t W₁ᵀ + u₁)

    A layer that has a scale of its own is linear: d ∘ (…) + u in place of φ(… + u).

    Attributes:
        weight: W, [N, N] or [N, H].
        u: [B, N], or [N] for all samples, or None.
        activation: φ, a name of `ACTIVATIONS`.
        residual: α, a number or a tensor without dimensions.
        hidden_weight: W₁, [H, N], or None: one layer.
        hidden_u: u₁, [B, H], [H] or None.
        hidden_activation: φ₁.
        gain: [B, 1], or None: 1.
        scale: s, [B, N], or None: 1.
        hidden_scale: d, [B, H], of the first of two layers.
        output_scale: d, [B, N], of the last layer.
        products: the dtype that the operands of products are rounded to, and what they give:
            autocast's. Sums, activations and the state stay in x's. None: nothing is rounded.
        unit: of a linear step, [B, 1] or [1, 1], powers of two: what is rounded for a product is
            times that, so that float16 holds it. None: 1.
    """

    weight: Tensor
    u: Tensor | None
    activation: str = "identity"
    residual: float | Tensor = 0.0
    hidden_weight: Tensor | None = None
    hidden_u: Tensor | None = None
    hidden_activation: str = "identity"
    gain: Tensor | None = None
    scale: Tensor | None = None
    hidden_scale: Tensor | None = None
    output_scale: Tensor | None = None
    products: torch.dtype | None = None
    unit: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """g(x), [B, N], in plain torch."""
        return self._layers(x)[-1]

    def _layers(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What the hidden activation takes and gives, and what the last one takes and gives."""
        t = x if self.gain is None else self.gain * x
        t = t if self.scale is None else self.scale * t
        before, h = None, t
        if self.hidden_weight is not None:
            before = self._product(t, self.hidden_weight)
            given = self.hidden_scale, self.hidden_u, self.hidden_activation
            before, h = _then(before, None, *given)
        after = self._product(h, self.weight)
        any_kept = isinstance(self.residual, Tensor) or self.residual != 0
        kept = self.residual * t if any_kept else None
        return h, before, *_then(after, kept, self.output_scale, self.u, self.activation)

    def _product(self, t: Tensor, weight: Tensor) -> Tensor:
        dtype = self.products
        if dtype is None:
            return F.linear(t, weight)
        unit = self.unit
        if unit is None:
            return F.linear(t.to(dtype), weight.to(dtype)).to(t.dtype)
        return F.linear((t * unit).to(dtype), weight.to(dtype)).to(t.dtype) / unit

    def linearised(self, x: Tensor, *, transpose: bool) -> tuple[Tensor, DenseForm]:
        """g(x), attached to what it depends on, and M = ∂g/∂x there as a form, or its transpose.

        Args:
            x: [B, N], a leaf that requires gradients.
            transpose: whether the form is c ↦ Mᵀ c, for an adjoint, or t ↦ M t, for a tangent.
        """
        assert self.scale is None and self.hidden_scale is None and self.output_scale is None
        h, before, after, y = self._layers(x)
        residual = self.residual
        if isinstance(residual, Tensor):
            residual = residual.detach()
        gain = None if self.gain is None else self.gain.detach()
        slope, weight = slope_of(self.activation, y, after), self.weight.detach()
        scales: dict[str, Any] = {"scale" if transpose else "output_scale": slope}
        # gain is one number a sample: before the product as good as after it
        linear = DenseForm(
            weight, None, residual=residual, gain=gain, products=self.products, **scales
        )
        if self.hidden_weight is None:
            return y, dataclasses.replace(linear, weight=weight.mT) if transpose else linear
        assert before is not None
        first, last = self.hidden_weight.detach(), weight
        if transpose:
            first, last = last.mT, first.mT
        d = slope_of(self.hidden_activation, h, before)
        return y, dataclasses.replace(linear, weight=last, hidden_weight=first, hidden_scale=d)

    def plus(self, v: Tensor) -> DenseForm:
        """The linear form that adds v, [B, N]."""
        assert self.u is None
        return dataclasses.replace(self, u=v)

    def cast(self, products: torch.dtype, state: torch.dtype) -> DenseForm:
        """The step as it is computed under autocast, for a state of the other dtype."""
        given = {name: t for name in _GIVEN if isinstance(t := getattr(self, name), Tensor)}
        wide: dict[str, Any] = {name: t.to(state) for name, t in given.items()}
        return dataclasses.replace(self, products=products, **wide)

    def widened(self, dtype: torch.dtype) -> DenseForm:
        """With the weights rounded to the products' dtype, and all tensors in that of the state.

        Its products round nothing else: they are exact for the rounded weights, but for sums.
        """
        found = {name: t for name, t in vars(self).items() if isinstance(t, Tensor) and t.dim()}
        for name in ("weight", "hidden_weight"):
            if name in found:
                found[name] = found[name].to(self.products)
        wide: dict[str, Any] = {name: t.to(dtype) for name, t in found.items()}
        return dataclasses.replace(self, products=None, **wide)

    @property
    def tensors(self) -> list[Tensor]:
        """All it holds."""
        return [t for t in vars(self).values() if isinstance(t, Tensor)]

    def opened(self) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        """g(x, *per_sample) and those tensors: the loop may leave samples of them out."""
        names = [
            name
            for name in ("u", "hidden_u", "gain", "scale", "hidden_scale", "output_scale", "unit")
            if (t := getattr(self, name)) is not None and t.dim() == 2
        ]

        weight, hidden = self.weight, self.hidden_weight
        if self.products is not None:  # once a solve
            weight = weight.to(self.products)
            hidden = None if hidden is None else hidden.to(self.products)
        form = dataclasses.replace(self, weight=weight, hidden_weight=hidden)

        def g(x: Tensor, *per_sample: Tensor) -> Tensor:
            given: Any = dict(zip(names, per_sample, strict=True))
            return dataclasses.replace(form, **given)(x)

        return g, [getattr(self, name) for name in names]


_GIVEN = "u", "hidden_u", "gain", "residual"  # of a step; a linear form's are made from these


def _then(
    sums: Tensor, kept: Tensor | None, scale: Tensor | None, u: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """What follows a layer's sums: what its activation takes, and the layer's value."""
    if scale is None and u is not None:
        sums = sums + u
    if kept is not None:
        sums = sums + kept
    if scale is None:
        return sums, ACTIVATIONS[activation](sums)
    value = scale * sums
    return sums, value if u is None else value + u
