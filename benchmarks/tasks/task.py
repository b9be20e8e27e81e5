"""What an experiment is to the runner: data, models, a loss and a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]
Figures = dict[str, float]


class Samples(Protocol):
    """A part of the data; rows of it are a part too."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Any: ...


@dataclass(frozen=True)
class Parts:
    """What trains, what chooses (the epoch, the threshold, the settings), and what is reported."""

    train: Samples
    validation: Samples
    test: Samples


@dataclass(frozen=True)
class Settings:
    """All that decides how a run ends, beside the data."""

    method: str
    seed: int = 0
    epochs: int = 40
    patience: int = 10  # epochs without a better score after which a run ends
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    average: float = 0.0  # decay of the weights' moving average, which is what is evaluated
    options: Mapping[str, Any] = field(default_factory=dict)  # of the task's own

    def with_values(self, **values: Any) -> Settings:
        """Changed: a name that is no field's is an option's.

        Raises:
            ValueError: neither has that name.
        """
        known = {name: getattr(self, name) for name in self.__dataclass_fields__}
        options = dict(self.options)
        for name, value in values.items():
            if name in known and name != "options":
                known[name] = type(known[name])(value)
            elif name in options:
                options[name] = type(options[name])(value)
            else:
                names = ", ".join([*(n for n in known if n != "options"), *options])
                raise ValueError(f"no setting is called {name!r}; there are {names}")
        return Settings(**known | {"options": options})


class Task(ABC):
    """One experiment. A layer of this library, or another's, is a part of some of its models."""

    name: str
    score: str  # the figure that chooses; larger is better
    methods: Sequence[str]

    @abstractmethod
    def settings(self, method: str) -> Settings:
        """The committed recipe of a method."""

    @abstractmethod
    def grid(self, method: str) -> Mapping[str, Sequence[Any]]:
        """Values to try when tuning: as many for every method."""

    @abstractmethod
    def load(self, data: Path | None, seed: int) -> Parts:
        """The data; the seed decides what validates."""

    @abstractmethod
    def model(self, settings: Settings, parts: Parts) -> nn.Module:
        """A fresh model for this data, initialised from torch's global generator."""

    @abstractmethod
    def batch(self, samples: Any, settings: Settings, generator: torch.Generator) -> Batch:
        """What a training step takes, on the CPU, first dimensions B.

        Everything random (noise, dropout's masks) is drawn here: a map must not change while its
        fixed point is sought, and however many processes share a batch, it is the same.
        """

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch, settings: Settings) -> Tensor:
        """Of each sample, [B]."""

    @abstractmethod
    def validate(self, model: nn.Module, samples: Any, device: torch.device) -> Figures:
        """Figures with the score among them, and what was chosen on the way."""

    def study(self, folder: Path, data: Path) -> Mapping[str, Sequence[Mapping[str, str]]]:
        """Tables about the trained nets under a folder of runs; none unless a task has some."""
        return {}

    @abstractmethod
    def test(
        self, model: nn.Module, samples: Any, device: torch.device, validated: Figures
    ) -> Figures:
        """The figures that are reported, with what validation chose."""
