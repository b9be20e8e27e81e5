"""Tags of bibliography entries (paper section 4.3, Table 2): one layer, only g changes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpi_cuda import DenseEnergy, DenseStep, FixedPointLayer, GradientStep

from ..layers import TorchDeq, Unrolled
from ..task import Batch, Figures, Parts, Settings, Task
from .energy import ConvexNetwork
from .samples import Samples, best_threshold, example_f1, read

Options = Mapping[str, Any]
VALIDATION = 0.1  # of the training split


class Net(nn.Module):
    """Scores of labels from a hidden layer; the subclasses go on from there.

    Args:
        features, labels: how many.
        options: of the settings.
    """

    def __init__(self, features: int, labels: int, options: Options) -> None:
        super().__init__()
        self.options = options
        self.hidden = nn.Linear(features, int(options["hidden"]))
        self.scores = nn.Linear(int(options["hidden"]), labels)

    def forward(
        self, z: Tensor, keep_input: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Logits [B, labels].

        Args:
            z: [B, features].
            keep_input, keep: dropout's masks of z and of the hidden layer.
        """
        h = torch.relu(self.hidden(z if keep_input is None else z * keep_input))
        return self.solved(h if keep is None else h * keep)

    def solved(self, h: Tensor) -> Tensor:
        return self.scores(h)

    def layer_of(self, g: nn.Module) -> nn.Module:
        """The layer around a step: this library's, or one to compare it with."""
        if self.options["layer"] == "torchdeq":
            return TorchDeq(g)
        if self.options["layer"] == "unrolled":
            return Unrolled(g, int(self.options["steps"]))
        return FixedPointLayer(g, on_failure="return")


class Embedding(Net):
    """FPI_NN: an embedding of the labels, s = tanh(W s + U h + b), adds R s to the scores."""

    def __init__(self, features: int, labels: int, options: Options) -> None:
        super().__init__(features, labels, options)
        state = int(options["state"])
        self.layer = self.layer_of(DenseStep(state, int(options["hidden"])))
        self.read = nn.Linear(state, labels, bias=False)

    def solved(self, h: Tensor) -> Tensor:
        return self.scores(h) + self.read(self.layer(h))


class Energy(Net):
    """FPI_GD: y minimises f(y, h) = ½ ‖y‖² + Σ ψ(W y + U h + b) and is added to the scores."""

    step_size = 0.5

    def __init__(self, features: int, labels: int, options: Options) -> None:
        super().__init__(features, labels, options)
        energy = self.energy_of(labels, int(options["hidden"]), int(options["state"]))
        self.layer = self.layer_of(GradientStep(energy, self.step_size))

    def energy_of(self, labels: int, hidden: int, state: int) -> nn.Module:
        return DenseEnergy(labels, hidden, hidden=state)

    def solved(self, h: Tensor) -> Tensor:
        return self.scores(h) + self.layer(h)


class Convex(Energy):
    """FPI_GD with a convex network of two layers for its energy."""

    step_size = 0.25

    def energy_of(self, labels: int, hidden: int, state: int) -> nn.Module:
        return ConvexNetwork(labels, hidden, state)


STEPS = (1, 5, 20)
OPTIONS = {
    "hidden": 500,
    "state": 64,
    "dropout": 0.7,
    "input_dropout": 0.4,
    "entropy": 0.3,  # weight of the cross entropy
    "F1": 20.0,  # of 1 − F1
    "layer": "ours",
    "steps": 0,
}
# A net and what of its options is not as above. The MLP is as large as FPI_NN.
METHODS: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "MLP": (Net, {"hidden": 523}),
    "FPI_NN": (Embedding, {}),
    "FPI_GD": (Energy, {}),
    "FPI_GD, ICNN": (Convex, {}),
    "FPI_NN, torchdeq": (Embedding, {"layer": "torchdeq"}),
    "FPI_GD, torchdeq": (Energy, {"layer": "torchdeq"}),
    **{
        f"{name}, {steps} step{'s' if steps > 1 else ''}": (
            net,
            {"layer": "unrolled", "steps": steps},
        )
        for name, net in (("FPI_NN", Embedding), ("FPI_GD", Energy))
        for steps in STEPS
    },
}


class Multilabel(Task):
    """A set of Mulan's: scores by cross entropy and a soft F1, labels by one threshold."""

    score = "F1"
    methods = tuple(METHODS)

    def __init__(self, name: str) -> None:
        self.name = name

    def settings(self, method: str) -> Settings:
        return Settings(
            method,
            epochs=100,
            patience=20,
            batch=128,
            learning_rate=1e-3,
            average=0.99,
            options=OPTIONS | METHODS[method][1],
        )

    def grid(self, method: str) -> Mapping[str, Sequence[Any]]:
        return {
            "input_dropout": (0.2, 0.4, 0.6),
            "dropout": (0.3, 0.5, 0.7),
        }

    def load(self, data: Path | None, settings: Settings, work: Path) -> Parts:
        assert data is not None  # `needs_data`
        train, test = _read(data, self.name)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
        cut = round(VALIDATION * len(train))
        return Parts(train[order[cut:]], train[order[:cut]], test)

    def model(self, settings: Settings, parts: Parts) -> nn.Module:
        sizes = (t.shape[1] for t in (parts.train.features, parts.train.labels))
        return METHODS[settings.method][0](*sizes, settings.options)

    def batch(self, samples: Samples, settings: Settings, generator: torch.Generator) -> Batch:
        options, b = settings.options, len(samples)
        masks = (
            kept(b, size, options[name], generator)
            for size, name in (
                (samples.features.shape[1], "input_dropout"),
                (int(options["hidden"]), "dropout"),
            )
        )
        return samples.features, samples.labels, *masks

    def losses(self, model: nn.Module, batch: Batch, settings: Settings) -> Tensor:
        z, labels, *masks = batch
        return loss(model(z, *masks), labels, settings.options)

    def validate(self, model: nn.Module, samples: Samples, device: torch.device) -> Figures:
        threshold, f1 = best_threshold(probabilities(model, samples, device), samples.labels)
        return {"F1": 100 * f1, "threshold": threshold}

    def test(
        self, model: nn.Module, samples: Samples, device: torch.device, validated: Figures
    ) -> Figures:
        scores = probabilities(model, samples, device)
        predicted = (scores > validated["threshold"]).float()
        return {"F1": 100 * float(example_f1(predicted, samples.labels).mean())}


_read = functools.cache(read)


def kept(b: int, size: int, dropout: float, generator: torch.Generator) -> Tensor:
    """0 with this probability, else what makes up for it; [b, size]."""
    return (torch.rand(b, size, generator=generator) >= dropout) / (1 - dropout)


def loss(scores: Tensor, labels: Tensor, options: Options) -> Tensor:
    """Of each sample, [B]: cross entropy, and 1 − F1 with probabilities for decisions."""
    entropy = F.binary_cross_entropy_with_logits(scores, labels, reduction="none").sum(1)
    p = torch.sigmoid(scores)
    f1 = 2 * (p * labels).sum(1) / (p.sum(1) + labels.sum(1))
    return options["entropy"] * entropy + options["F1"] * (1 - f1)


@torch.no_grad()
def probabilities(model: nn.Module, samples: Samples, device: torch.device) -> Tensor:
    """[B, labels], on the CPU."""
    parts = (torch.sigmoid(model(z.to(device))) for z in samples.features.split(512))
    return torch.cat([part.float().cpu() for part in parts])
