"""The old layer's demonstration: two nets that are given their own labels, on Bibtex or its like.

Written from the description of the paper's experiment (section 4.3) and of its authors' program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .problem import need


@dataclass(frozen=True)
class Shape:
    """Bibtex's."""

    batch: int = 40
    features: int = 1836
    labels: int = 159
    words: float = 38.0  # of a sample of the mean length, beside those of its labels
    tags: float = 2.4  # labels of a sample, in the mean
    topic: int = 15  # words that a label makes likely


def batches(
    shape: Shape, count: int, data: Path | None, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Words [B, features] and labels [B, labels], zeros and ones, the same for the same seed.

    data: a folder with Bibtex; None: made ones.
    """
    random = torch.Generator().manual_seed(seed)
    if data is None:
        yield from _made(shape, count, random)
        return
    import numpy as np

    file = np.load(need(data, "multilabel", "bibtex_train.npz"))
    words, labels = (torch.from_numpy(file[name]).float() for name in "XY")
    order = torch.randperm(len(words), generator=random)[: count * shape.batch]
    for rows in order.split(shape.batch):
        yield words[rows], labels[rows]


def _made(shape: Shape, count: int, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Few words and labels are frequent, texts differ in length; a label has words of its own."""
    topics = torch.zeros(shape.labels, shape.features)
    for topic in topics:
        topic[torch.randperm(shape.features, generator=random)[: shape.topic]] = 0.5
    tags = 1 / torch.arange(1.0, shape.labels + 1)
    words = torch.arange(1.0, shape.features + 1) ** -0.5
    for _ in range(count):
        labels = torch.zeros(shape.batch, shape.labels)
        more = torch.poisson(torch.full((shape.batch,), shape.tags - 1), generator=random)
        for row, n in zip(labels, more.clamp(max=shape.labels - 1), strict=True):
            row[torch.multinomial(tags, 1 + int(n), generator=random)] = 1
        length = torch.exp(0.9 * torch.randn(shape.batch, 1, generator=random))
        any_text = (shape.words * length * words / words.sum()).clamp(max=0.9)
        rate = 1 - (1 - any_text) * torch.exp(labels @ torch.log1p(-topics))
        yield torch.bernoulli(rate, generator=random), labels


class Feedback(nn.Module):
    """FPI_NN: [z, x] → relu → sigmoid."""

    def __init__(self, shape: Shape, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(shape.features + shape.labels, hidden)
        self.second = nn.Linear(hidden, shape.labels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = torch.relu(self.first(torch.cat([z, x], 1)))
        return torch.sigmoid(self.second(h))

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy(x, labels)


class Energy(nn.Module):
    """FPI_GD's: the mean of squared relus of [z, x], of each sample."""

    def __init__(self, shape: Shape, hidden: int) -> None:
        super().__init__()
        self.units = nn.Linear(shape.features + shape.labels, hidden)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.relu(self.units(torch.cat([z, x], 1))).square().mean(1)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, labels)
