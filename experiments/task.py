"""What an experiment is to the runner: data, models, a loss and a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]
Figures = dict[str, float]


class Samples(Protocol):
    """The part of the data that trains; rows of it are a part too."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Any: ...


@dataclass(frozen=True)
class Parts:
    """What trains, what chooses (the epoch, the threshold, the settings), and what is reported."""

    train: Samples
    validation: Any
    test: Any


@dataclass(frozen=True)
class Settings:
    """All that decides how a run ends, beside the data."""

    method: str
    seed: int = 0
    epochs: int = 40
    seconds: float = 0.0  # of training, after which a run ends; 0: epochs count
    patience: int = 10  # epochs without a better score after which a run ends; 0: it goes on
    batch: int = 128
    learning_rate: float = 1e-3
    schedule: str = "constant"  # or "cosine", down to 0 at the end of the epochs or seconds
    warmup: int = 0  # steps in which the learning rate rises to its value
    beta2: float = 0.999  # Adam's memory of squared gradients
    clip: float = 0.0  # of the gradient's norm; 0: none
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
    score: str  # the figure that chooses
    lower_is_better = False
    needs_data = True  # without --data there is nothing to train on
    methods: Sequence[str]
    groups: Mapping[str, Sequence[str]] = {}  # methods that share a figure, by its name; {}: all
    curves: Mapping[str, str] = {}  # more of validation's figures to draw, by the picture's name
    pairs: Sequence[tuple[str, str]] = ()  # a method and one that it is compared with, by seeds

    @abstractmethod
    def settings(self, method: str) -> Settings:
        """The committed recipe of a method."""

    @abstractmethod
    def grid(self, method: str) -> Mapping[str, Sequence[Any]]:
        """Values to try when tuning: as many for every method."""

    def quick(self, settings: Settings) -> Settings:
        """Settings that only show whether a method runs."""
        return replace(settings, epochs=2, average=0.9)

    def as_long_as(self, method: str) -> str | None:
        """The method whose training time this one is given, with the same seed."""
        return None

    @abstractmethod
    def load(self, data: Path | None, settings: Settings, work: Path) -> Parts:
        """The data; the seed decides what validates.

        Args:
            data: a folder; None only where `needs_data` is false.
            settings: of the run.
            work: where the task may keep what it makes for its runs.
        """

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

    @abstractmethod
    def test(
        self, model: nn.Module, samples: Any, device: torch.device, validated: Figures
    ) -> Figures:
        """The figures that are reported, with what validation chose."""
