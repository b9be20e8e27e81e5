"""What a step of dense layers tells the solver of itself, so that it can be solved whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS, slope_of

__all__ = ["DenseForm"]


@dataclass(frozen=True, eq=False)  # torch.compile may ask for a hash, which tensors would not give
class DenseForm:
    """A step of one or two dense layers with all that does not depend on x computed.

    With t = gain · scale ∘ x:

        one layer    g(x) = φ(residual t + t Wᵀ + u)
        two layers   g(x) = φ(residual t + h Wᵀ + u),  h = φ₁(t W₁ᵀ + u₁) or d ∘ (t W₁ᵀ + u₁)

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
        hidden_scale: d, [B, H]: in place of φ₁.
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

    def __call__(self, x: Tensor) -> Tensor:
        """g(x), [B, N], in plain torch."""
        return self._layers(x)[-1]

    def _layers(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What the hidden activation takes and gives, and what the last one takes and gives."""
        t = x if self.gain is None else self.gain * x
        t = t if self.scale is None else self.scale * t
        before, h = None, t
        if self.hidden_weight is not None:
            before = F.linear(t, self.hidden_weight)
            before = before if self.hidden_u is None else before + self.hidden_u
            if self.hidden_scale is None:
                h = ACTIVATIONS[self.hidden_activation](before)
            else:
                h = self.hidden_scale * before
        after = F.linear(h, self.weight)
        after = after if self.u is None else after + self.u
        if isinstance(self.residual, Tensor) or self.residual != 0:
            after = after + self.residual * t
        return h, before, after, ACTIVATIONS[self.activation](after)

    def linearised(self, x: Tensor) -> tuple[Tensor, DenseForm]:
        """g(x), attached to what it depends on, and c ↦ (∂g/∂x)ᵀ c as a form of this kind.

        Args:
            x: [B, N], a leaf that requires gradients.
        """
        assert self.scale is None and self.hidden_scale is None
        h, before, after, y = self._layers(x)
        residual = self.residual
        if isinstance(residual, Tensor):
            residual = residual.detach()
        gain = None if self.gain is None else self.gain.detach()
        slope = slope_of(self.activation, y, after)
        if self.hidden_weight is None:
            weight = self.weight.detach().mT
            return y, DenseForm(weight, None, residual=residual, gain=gain, scale=slope)
        assert before is not None
        return y, DenseForm(
            self.hidden_weight.detach().mT,
            None,
            residual=residual,
            hidden_weight=self.weight.detach().mT,
            gain=gain,  # one number a sample: before the product as good as after it
            scale=slope,
            hidden_scale=slope_of(self.hidden_activation, h, before),
        )

    def plus(self, v: Tensor) -> DenseForm:
        """The form that adds v, [B, N], before its last activation."""
        assert self.u is None
        return dataclasses.replace(self, u=v)

    @property
    def tensors(self) -> list[Tensor]:
        """All it holds."""
        return [t for t in vars(self).values() if isinstance(t, Tensor)]

    def opened(self) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        """g(x, *per_sample) and those tensors: the loop may leave samples of them out."""
        names = [
            name
            for name in ("u", "hidden_u", "gain", "scale", "hidden_scale")
            if (t := getattr(self, name)) is not None and t.dim() == 2
        ]

        def g(x: Tensor, *per_sample: Tensor) -> Tensor:
            given: Any = dict(zip(names, per_sample, strict=True))
            return dataclasses.replace(self, **given)(x)

        return g, [getattr(self, name) for name in names]
