"""Nets that were trained: the best checkpoint of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint
from .task import Parts, Settings, Task


def net(task: Task, path: Path, parts: Parts) -> tuple[Any, Settings]:
    """The model of a best.pt, evaluating, and its settings."""
    state = checkpoint.load(path)
    settings = Settings(**state["settings"])
    model = task.model(settings, parts)
    model.load_state_dict(state["model"])
    return model.eval(), settings


def nets(
    task: Task, folder: Path, methods: Sequence[str], parts: Parts
) -> Iterator[tuple[str, Any, Settings]]:
    """Those of seed 0, of the methods that were trained under this folder."""
    for method in methods:
        path = folder / method / "seed-0" / "best.pt"
        if path.exists():
            yield (method, *net(task, path, parts))
