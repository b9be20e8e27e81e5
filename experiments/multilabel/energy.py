"""A convex energy network (after Amos et al.'s ICNN), and what certifies its minimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvexNetwork(nn.Module):
    """f(x, h) = ½ λ ‖x‖² + Σ softplus(V s + B x + C h + c),  s = softplus(A x + D h + d), V ≥ 0.

    Convex in x, as softplus is convex and rises and V has no negative entry; strongly, with the
    modulus λ. As an energy of `GradientStep` it is minimised by FPI_GD.

    Args:
        state_features: N; x is [B, N].
        input_features: values of h.
        width: of either layer.
        curvature: λ > 0.
    """

    def __init__(
        self, state_features: int, input_features: int, width: int, curvature: float = 1.0
    ) -> None:
        super().__init__()
        self.curvature = curvature
        self.state_shape = (state_features,)
        self.first = nn.Linear(state_features, width, bias=False)  # A
        self.second = nn.Linear(state_features, width, bias=False)  # B
        self.first_input = nn.Linear(input_features, width)  # D, d
        self.second_input = nn.Linear(input_features, width)  # C, c
        self.between = nn.Parameter(torch.full((width, width), -5.0))  # V = softplus of this

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """The energy of each sample, [B]."""
        s = F.softplus(self.first(x) + self.first_input(h))
        top = F.linear(s, F.softplus(self.between)) + self.second(x) + self.second_input(h)
        return self.curvature / 2 * (x * x).sum(-1) + F.softplus(top).sum(-1)

    @torch.no_grad()
    def smoothness(self) -> Tensor:
        """A bound L on the largest eigenvalue of ∂²f/∂x², for every x and h.

        With p = V s + B x + ..., σ = softplus′ and J = V diag(σ) A + B, the Hessian is
        λI + Jᵀ diag(σ′(p)) J + Σ_j (Vᵀ σ(p))_j σ′_j A_j A_jᵀ; 0 ≤ σ ≤ 1 and σ′ ≤ ¼ bound each term.
        """
        v = F.softplus(self.between).double()
        a, b = self.first.weight.double(), self.second.weight.double()
        norm_v, norm_a, norm_b = (torch.linalg.matrix_norm(t, 2) for t in (v, a, b))
        slope = norm_v * norm_a + norm_b
        return self.curvature + slope**2 / 4 + v.sum(0).max() * norm_a**2 / 4


@dataclass(frozen=True)
class Certificate:
    """How far x can be from the minimum of a strongly convex energy; [B] each, float64."""

    gradient_norm: Tensor  # ‖∂f/∂x‖
    distance: Tensor  # ‖x − x*‖ ≤ ‖∂f/∂x‖ / λ
    gap: Tensor  # f(x) − f(x*) ≤ ‖∂f/∂x‖² / 2λ


def certify(
    energy: Callable[..., Tensor], modulus: float, x: Tensor, *inputs: Tensor
) -> Certificate:
    """Bounds at x, whatever found it, from the gradient alone.

    Args:
        energy: f(x, *inputs) returning [B], strongly convex in x.
        modulus: λ > 0, of its strong convexity.
        x: [B, N]; it and the inputs in float64, or the bounds hold up to rounding only.
        inputs: of the energy.
    """
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(at, *inputs).sum(), at)
    norm = torch.linalg.vector_norm(gradient.double(), dim=1)
    return Certificate(norm, norm / modulus, norm**2 / (2 * modulus))
