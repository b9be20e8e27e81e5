"""Nets that were trained: the best checkpoint of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .task import Parts, Settings, Task


@dataclass(frozen=True)
class Trained:
    """A net, evaluating, with what it was trained by."""

    method: str
    model: Any
    settings: Settings
    parts: Parts
    best: dict[str, Any]  # its epoch, and the figures of validation there

    @classmethod
    def load(
        cls, task: Task, path: Path, data: Path | None, work: Path, device: torch.device
    ) -> Trained:
        """Of a best.pt.

        Args:
            task: that it is of.
            path: of the file.
            data, work: as of `Task.load`.
            device: where the net shall compute.
        """
        state = checkpoint.load(path)
        settings = Settings(**state["settings"])
        parts = task.load(data, settings, work)
        model = task.model(settings, parts)
        model.load_state_dict(state["model"])
        return cls(settings.method, model.eval().to(device), settings, parts, state["best"])


def nets(
    task: Task,
    work: Path,
    methods: Sequence[str],
    data: Path | None,
    device: torch.device | None = None,
) -> Iterator[Trained]:
    """Those of seed 0, of the methods that were trained under the folder; by default on the CPU."""
    for method in methods:
        path = work / method / "seed-0" / "best.pt"
        if path.exists():
            yield Trained.load(task, path, data, work, device or torch.device("cpu"))
