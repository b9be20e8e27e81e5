"""Maps of convolutions: one, and a denoising net of two."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fpi_cuda.contraction import convolution_norm

from .problem import Instance, Problem, Random, Rule, need

CHANNELS, WIDTH = 16, 32  # of the net: [x, z] of 16 + 1 channels → 32 → 16


def one_convolution(x: Tensor, u: Tensor, s: Tensor, weight: Tensor) -> Tensor:
    side = math.isqrt(x.shape[1])
    y = F.conv2d(x.view(-1, 1, side, side), weight, padding=1).flatten(1)
    return torch.tanh(s * y + u)


def net(
    x: Tensor, z: Tensor, s: Tensor, first: Tensor, bias: Tensor, second: Tensor, last: Tensor
) -> Tensor:
    """Two convolutions on [x, z] side by side, as one would write it; all channels last in memory.

    x: [B, H·W·C], z: [B, H·W], both of square images.
    """
    side = math.isqrt(z.shape[1])
    both = torch.cat([image(x, side), image(z, side)], 1)
    h = torch.relu(F.conv2d(both, first, bias, padding=1))
    return flat(F.conv2d(h, second, last, padding=1))


def image(x: Tensor, side: int) -> Tensor:
    """[B, C, side, side], a channels-last view of [B, N]."""
    return x.view(len(x), side, side, -1).permute(0, 3, 1, 2)


def flat(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(len(x), -1)


def conv(
    generator: torch.Generator, batch: int, size: int, count: int, data: Path | None
) -> Problem:
    """x ← tanh(w ⋆ x + u), w 3 × 3 with Σ|w| = 0.9, so that its norm is at most that."""
    if math.isqrt(size) ** 2 != size:
        raise ValueError(f"make: conv needs a square number of pixels (got {size})")
    random = Random(generator)
    weight = random.normal(1, 1, 3, 3)
    weight *= 0.9 / weight.abs().sum()
    made = []
    for _ in range(count):
        u, loss = random.normal(batch, size), random.normal(batch, size)
        ones = torch.ones(batch, 1)
        made.append(Instance(torch.zeros(batch, size), u, ones, (weight,), loss))
    return Problem("conv", one_convolution, batch, size, tuple(made))


def clean_images(random: Random, batch: int, side: int, data: Path | None, turn: int) -> Tensor:
    """[B, side²], gray levels about zero: smooth ones, or pieces of Set12."""
    if data is None:
        coarse = random.normal(batch, 1, 8, 8) / 4
        return F.interpolate(coarse, size=side, mode="bicubic").flatten(1)
    import numpy as np
    from PIL import Image

    files = sorted(need(data, "denoise", "Set12").glob("*.png"))
    pieces = []
    for i in range(turn * batch, (turn + 1) * batch):
        gray = torch.from_numpy(np.asarray(Image.open(files[i % len(files)]), dtype=np.float32))
        top, left = (
            int(torch.randint(n - side + 1, (), generator=random.generator)) for n in gray.shape
        )
        pieces.append(gray[top : top + side, left : left + side].flatten() / 255 - 0.5)
    return torch.stack(pieces)


def denoise(
    generator: torch.Generator, batch: int, size: int, count: int, data: Path | None
) -> Problem:
    """x ← w₂ ⋆ relu(w₁ ⋆ x + U ⋆ z + b₁) + b₂ with w₂ the transpose of w₁ and a norm of 0.95.

    z: images under noise of σ from 2 to 100 of 255, log-spaced over the batch and shuffled.
    """
    side = math.isqrt(size // CHANNELS)
    if CHANNELS * side**2 != size:
        raise ValueError(f"make: denoise needs {CHANNELS} square images a sample (got {size})")
    random = Random(generator)
    w = random.normal(WIDTH, CHANNELS, 3, 3)
    w *= math.sqrt(0.95) / float(convolution_norm(w, (side, side), iterations=100)[0])
    first = torch.cat([w, random.normal(WIDTH, 1, 3, 3) / 3], 1)
    bias, last = torch.full((WIDTH,), 0.5), torch.full((CHANNELS,), -0.05)
    weights = (first, bias, w.transpose(0, 1).flip(2, 3).contiguous(), last)
    made = []
    for turn in range(count):
        clean = clean_images(random, batch, side, data, turn)
        sigma = random.shuffled(torch.logspace(math.log10(2), math.log10(100), batch) / 255)
        z = clean + sigma[:, None] * random.normal(batch, side * side)
        ones, loss = torch.ones(batch, 1), random.normal(batch, size)
        made.append(Instance(torch.zeros(batch, size), z, ones, weights, loss))
    # ReLU's kinks: at 1e-4 every method's gradient in z would be off by 1 %.
    rule = Rule(rtol=2e-5, atol=2e-7, adjoint_rtol=2e-5)
    return Problem("denoise", net, batch, size, tuple(made), rule)
