"""Checkpoints: a file is whole or it is not there, and a damaged one is said to be so."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

State = dict[str, Any]


def save(path: Path, state: State) -> None:
    """Replace the file by this state; whatever happens on the way, the old one stays.

    Raises:
        OSError: it could not be written (the disk is full, say); the message names the file.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns the disk's errors into its own
        part.unlink(missing_ok=True)
        kept = f"{path} is still the last good one" if path.exists() else "there is no older one"
        raise OSError(
            f"checkpoint: {path} could not be written ({error}); {kept}. Make room and run the "
            "same command again"
        ) from error


def load(path: Path) -> State:
    """What was saved there, on the CPU.

    Raises:
        ValueError: the file is damaged or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself looks at no check sum
        if damaged is not None:
            raise ValueError(f"the check sum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file may fail anywhere in zipfile, pickle or torch
        raise ValueError(
            f"checkpoint: {path} must be a checkpoint of `python -m experiments` (got "
            f"{type(error).__name__}: {error}); delete it to start over"
        ) from error
