"""Tags of bibliography entries (paper section 4.3, Table 2): one layer, only g changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpi_cuda import (
    DenseEnergy,
    DenseStep,
    FixedPointLayer,
    GradientStep,
)

from .multilabel import Samples, best_threshold, example_f1, read
from .task import Batch, Figures, Parts, Settings, Task

VALIDATION = 0.1  # of the training split
CLOSED = 1e4  # taken from what a dropped unit gets: relu leaves nothing of it


class Net(nn.Module):
    """Scores of labels; subclasses say how they follow from a hidden layer."""

    def __init__(self, features: int, labels: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.dropout = float(options["dropout"])
        self.hidden = nn.Linear(features, int(options["hidden"]))
        self.scores = nn.Linear(int(options["hidden"]), labels)

    def forward(
        self, z: Tensor, keep_input: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        h = torch.relu(self.hidden(z if keep_input is None else z * keep_input))
        return self.from_hidden(h if keep is None else h * keep)

    def from_hidden(self, h: Tensor) -> Tensor:
        return self.scores(h)


class Refined(Net):
    """FPI_NN: an embedding of labels, s = tanh(W s + U h + b), is added to the MLP."""

    def __init__(self, features: int, labels: int, options: Mapping[str, Any]) -> None:
        super().__init__(features, labels, options)
        state = int(options["state"])
        self.layer = FixedPointLayer(DenseStep(state, int(options["hidden"])), on_failure="return")
        self.read = nn.Linear(state, labels, bias=False)

    def from_hidden(self, h: Tensor) -> Tensor:
        return self.scores(h) + self.read(self.layer(h))


class Hidden(Net):
    """FPI_NN: the MLP whose hidden layer sees the scores too: x = W₂ relu(W₁ x + U z + b).

    Dropout stays what it is in an MLP: a dropped unit's input is taken below zero, and since relu
    is homogeneous, what the others give is scaled by scaling all that they get.
    """

    def __init__(self, features: int, labels: int, options: Mapping[str, Any]) -> None:
        super().__init__(features, labels, options)
        step = DenseStep(labels, None, hidden=int(options["hidden"]), activation="relu", bias=False)
        with torch.no_grad():
            step.state_weight *= 0.1
            step.output_weight.copy_(self.scores.weight)
        self.bias = self.scores.bias
        del self.scores
        self.layer = FixedPointLayer(step, on_failure="return")

    def forward(
        self, z: Tensor, keep_input: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        u = self.hidden(z if keep_input is None else z * keep_input)
        if keep is None:
            return self.layer(u) + self.bias
        scale = 1 / (1 - self.dropout)
        u = scale * u - CLOSED * (keep == 0)
        return self.layer(u, torch.full_like(u[:, :1], scale)) + self.bias


class Energy(Net):
    """FPI_GD: y minimises ½ λ ‖y‖² + Σ a ψ(W y + U h + b), and is added to the MLP."""

    def __init__(self, features: int, labels: int, options: Mapping[str, Any]) -> None:
        super().__init__(features, labels, options)
        energy = DenseEnergy(
            labels,
            int(options["hidden"]),
            hidden=int(options["state"]),
            activation=options["activation"],
            curvature=1.0,
            convex=bool(options["convex"]),
        )
        if energy.term_weight is not None:
            with torch.no_grad():
                energy.term_weight.fill_(options["sign"])
        self.layer = FixedPointLayer(GradientStep(energy, 0.5), on_failure="return")

    def from_hidden(self, h: Tensor) -> Tensor:
        return self.scores(h) + self.layer(h)


NETS: dict[str, type[Net]] = {
    "MLP": Net,
    "FPI_NN": Refined,
    "FPI_NN hidden": Hidden,
    "FPI_GD": Energy,
}


class Multilabel(Task):
    """A set of Mulan's; scores by binary cross entropy, labels by a threshold."""

    score = "F1"
    methods = tuple(NETS)

    def __init__(self, name: str) -> None:
        self.name = name

    def settings(self, method: str) -> Settings:
        return Settings(
            method,
            epochs=60,
            patience=15,
            batch=128,
            learning_rate=1e-3,
            weight_decay=0.0,
            average=0.99,
            options={
                "hidden": 500,
                "state": 64,
                "dropout": 0.5,
                "input_dropout": 0.2,
                "penalty": 0.0,
                "activation": "tanh",
                "convex": 0,
                "sign": -1.0,
            },
        )

    def grid(self, method: str) -> Mapping[str, Sequence[Any]]:
        return {
            "learning_rate": (5e-4, 1e-3, 2e-3),
            "dropout": (0.5, 0.7),
            "input_dropout": (0.2, 0.4),
        }

    def load(self, data: Path | None, seed: int) -> Parts:
        if data is None:
            raise ValueError(f"{self.name}: needs the data; name its folder by --data")
        train, test = read(data, self.name)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        cut = round(VALIDATION * len(train))
        self.sizes = train.features.shape[1], train.labels.shape[1]
        return Parts(train[order[cut:]], train[order[:cut]], test)

    def model(self, settings: Settings) -> nn.Module:
        return NETS[settings.method](*self.sizes, settings.options)

    def batch(self, samples: Samples, settings: Settings, generator: torch.Generator) -> Batch:
        options, b = settings.options, len(samples)
        masks = (
            kept(b, size, options[name], generator)
            for size, name in (
                (self.sizes[0], "input_dropout"),
                (int(options["hidden"]), "dropout"),
            )
        )
        return samples.features, samples.labels, *masks

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        z, labels, keep_input, keep = batch
        scores = model(z, keep_input, keep)
        return F.binary_cross_entropy_with_logits(scores, labels, reduction="none").sum(1)

    def validate(self, model: nn.Module, samples: Samples, device: torch.device) -> Figures:
        threshold, f1 = best_threshold(probabilities(model, samples, device), samples.labels)
        return {"F1": 100 * f1, "threshold": threshold}

    def test(
        self, model: nn.Module, samples: Samples, device: torch.device, validated: Figures
    ) -> Figures:
        scores = probabilities(model, samples, device)
        predicted = (scores > validated["threshold"]).float()
        return {"F1": 100 * float(example_f1(predicted, samples.labels).mean())}


def kept(b: int, size: int, dropout: float, generator: torch.Generator) -> Tensor:
    """0 with this probability, else what makes up for it; [b, size]."""
    return (torch.rand(b, size, generator=generator) >= dropout) / (1 - dropout)


@torch.no_grad()
def probabilities(model: nn.Module, samples: Samples, device: torch.device) -> Tensor:
    """[B, labels], on the CPU."""
    parts = (torch.sigmoid(model(z.to(device))) for z in samples.features.split(512))
    return torch.cat([part.float().cpu() for part in parts])
