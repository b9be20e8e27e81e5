"""The problems: x ← tanh(s (W x) + u), easy, hard and conv; an energy; a net of convolutions.

`g` is an opaque function to every method: nobody knows what W is. u = z Uᵀ + b does not
depend on x and is hoisted out of the loop for all of them, as a per-sample input; so is s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fpi_cuda.contraction import convolution_norm

SIZES = ((256, 128), (1024, 256), (64, 1024), (4096, 64))
BIBTEX = ((32, 159), (512, 159), (2515, 159))  # labels of that data set, three batches
DENOISE = ((32, 16 * 64 * 64),)  # 32 images of 64 × 64, a state of 16 channels
KINDS = ("easy", "hard", "conv", "energy", "denoise")
DENSE = KINDS[:2]
INSTANCES = 3  # inputs of one problem that the timed calls rotate over


HIDDEN = 200  # terms of the energy
CHANNELS, WIDTH = 16, 32  # of the net: [x, z] of 16 + 1 channels → 32 → 16
CURVATURE, STEP_SIZE, ENERGY_NORM = 1.0, 2 / 11, 3.0  # λ, γ and ‖W‖₂: a rate of at most 9/11


def g(x: Tensor, u: Tensor, s: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 1:
        return net(x, u, weight)
    if u.shape[1] != x.shape[1]:  # gradient descent on λ/2 ‖x‖² + Σ log cosh(W x + u)
        slope = torch.tanh(x @ weight.T + u) @ weight
        return (1 - STEP_SIZE * CURVATURE) * x - STEP_SIZE * slope
    return torch.tanh(s * linear(x, weight) + u)


def net(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Two convolutions on [x, z] side by side, as one would write it; all channels last in memory.

    x: [B, H·W·C], z: [B, H·W], both of square images; weight: what `layers` takes apart.
    """
    side = math.isqrt(z.shape[1])
    first, bias, second, last_bias = layers(weight)
    both = torch.cat([image(x, side), image(z, side)], 1)
    h = torch.relu(F.conv2d(both, first, bias, padding=1))
    return flat(F.conv2d(h, second, last_bias, padding=1))


def image(x: Tensor, side: int) -> Tensor:
    """[B, C, side, side], a channels-last view of [B, N]."""
    return x.view(len(x), side, side, -1).permute(0, 3, 1, 2)


def flat(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(len(x), -1)


def layers(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w₁ of [x, z], b₁, w₂, b₂ of the net, from one vector."""
    shapes = ((WIDTH, CHANNELS + 1, 3, 3), (WIDTH,), (CHANNELS, WIDTH, 3, 3), (CHANNELS,))
    parts = weight.split([math.prod(shape) for shape in shapes])
    first, bias, second, last = (p.view(s) for p, s in zip(parts, shapes, strict=True))
    return first, bias, second, last


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """W x: dense, or a convolution of square images of one channel; x is [B, N] for both."""
    if weight.dim() == 2:
        return x @ weight.T
    side = math.isqrt(x.shape[1])
    return F.conv2d(x.view(-1, 1, side, side), weight, padding=1).flatten(1)


@dataclass(frozen=True)
class Rule:
    """A sample has converged when ‖g(x) − x‖₂ ≤ atol·√N + rtol·‖g(x)‖₂; the adjoint has no atol."""

    rtol: float = 1e-4
    atol: float = 1e-6
    adjoint_rtol: float = 1e-4
    max_iterations: int = 200


@dataclass(frozen=True)
class Instance:
    x0: Tensor  # [B, N], zero
    u: Tensor  # [B, N]; denoise: z, [B, H·W]
    s: Tensor  # [B, 1]
    weight: Tensor  # W: [N, N], [1, 1, 3, 3], or the vector of a net's weights
    loss: Tensor  # [B, N]: the loss is Σ loss·x̂

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x0, self.u, self.s, self.weight

    def to(self, *args: torch.device | torch.dtype | str) -> Instance:
        names = ("x0", "u", "s", "weight", "loss")
        return replace(self, **{name: getattr(self, name).to(*args) for name in names})


@dataclass(frozen=True)
class Problem:
    kind: str
    batch: int
    size: int
    instances: tuple[Instance, ...]
    rule: Rule = Rule()

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch}x{self.size}"


def spectral_norm(weight: Tensor, device: str = "cpu") -> float:
    w = weight.to(device).double()
    return math.sqrt(float(torch.linalg.eigvalsh(w @ w.T)[-1]))  # a tenth of an SVD's time


def make(
    kind: str, batch: int, size: int, device: str = "cpu", instances: int = INSTANCES
) -> Problem:
    """A problem whose instances share W and differ in u, in the order of s and in the loss.

    easy: W Gaussian with ‖W‖₂ = 0.9 (spectral radius about 0.45), s = 1, u of unit scale. All
        samples take 9-12 iterations.
    hard: W symmetric Gaussian with ‖W‖₂ = 0.99, u small, s log-spaced from 0.1 to 0.99 over the
        batch and shuffled. A few samples take 80-200 iterations, the mean is 13-18.
    energy: W Gaussian [200, N], 3 in norm, u of unit scale: about 40 iterations.
    denoise: x ← w₂ ⋆ relu(w₁ ⋆ x + U ⋆ z + b₁) + b₂ with w₂ the transpose of w₁ and a norm of 0.95,
        z smooth images under noise of σ from 2 to 100 of 255, log-spaced over the batch.
    conv: W a 3×3 convolution with Σ|w| = 0.9, so that ‖W‖₂ is at most that; else as easy.
    """
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    if kind == "energy":
        weight = normal(HIDDEN, size)
        weight *= ENERGY_NORM / spectral_norm(weight, device)
        made = []
        for _ in range(instances):
            u, loss = normal(batch, HIDDEN), normal(batch, size)
            ones = torch.ones(batch, 1)
            instance = Instance(torch.zeros(batch, size), u, ones, weight, loss)
            made.append(instance.to(device))
        return Problem(kind, batch, size, tuple(made))
    if kind == "denoise":
        side = math.isqrt(size // CHANNELS)
        if CHANNELS * side**2 != size:
            raise ValueError(f"make: denoise needs {CHANNELS} square images a sample (got {size})")
        w = normal(WIDTH, CHANNELS, 3, 3)
        w *= math.sqrt(0.95) / float(convolution_norm(w, (side, side), iterations=100)[0])
        first = torch.cat([w, normal(WIDTH, 1, 3, 3) / 3], 1)
        bias, last = torch.full((WIDTH,), 0.5), torch.full((CHANNELS,), -0.05)
        parts = (first, bias, w.transpose(0, 1).flip(2, 3), last)
        weight = torch.cat([part.flatten() for part in parts])
        made = []
        for _ in range(instances):
            clean = F.interpolate(normal(batch, 1, 8, 8) / 4, size=side, mode="bicubic").flatten(1)
            sigma = torch.logspace(math.log10(2 / 255), math.log10(100 / 255), batch)
            sigma = sigma[torch.randperm(batch, generator=random), None]
            z = clean + sigma * normal(batch, side * side)
            ones, loss = torch.ones(batch, 1), normal(batch, size)
            instance = Instance(torch.zeros(batch, size), z, ones, weight, loss)
            made.append(instance.to(device))
        # ReLU's kinks: at 1e-4 every method's gradient in z would be off by 1 %.
        rule = Rule(rtol=2e-5, atol=2e-7, adjoint_rtol=2e-5)
        return Problem(kind, batch, size, tuple(made), rule)
    if kind == "conv":
        if math.isqrt(size) ** 2 != size:
            raise ValueError(f"make: conv needs a square number of pixels (got {size})")
        weight = normal(1, 1, 3, 3)
        weight *= 0.9 / weight.abs().sum()
        u, loss = normal(instances, batch, size), normal(instances, batch, size)
        return Problem(
            kind,
            batch,
            size,
            tuple(
                Instance(torch.zeros(batch, size), u[i], torch.ones(batch, 1), weight, loss[i]).to(
                    device
                )
                for i in range(instances)
            ),
        )
    weight, into = normal(size, size), normal(size, size) / math.sqrt(size)
    if kind == "easy":
        norm, scale = 0.9, 1.0
    elif kind == "hard":
        weight, norm, scale = (weight + weight.T) / 2, 0.99, 0.05
    else:
        raise ValueError(f"make: kind must be one of {KINDS} (got {kind!r})")
    weight *= norm / spectral_norm(weight, device)
    bias = normal(size)
    made = []
    for _ in range(instances):
        z = normal(batch, size)
        s = torch.ones(batch)
        if kind == "hard":
            spread = torch.logspace(-1, math.log10(0.99), batch)
            s = spread[torch.randperm(batch, generator=random)]
        u = scale * (z @ into.T + bias)
        instance = Instance(torch.zeros_like(u), u, s[:, None], weight, normal(batch, size))
        made.append(instance.to(device))
    return Problem(kind, batch, size, tuple(made))


def check_spread(problem: Problem, longest: int, mean: float) -> None:
    """A hard problem must be one where finished samples matter, in plain Picard iterations."""
    if problem.kind == "hard" and longest < 4 * mean:
        raise RuntimeError(
            f"{problem.name}: the slowest sample must take at least 4 times the mean "
            f"(got {longest} and {mean:.1f}): this problem does not exercise finished samples"
        )
