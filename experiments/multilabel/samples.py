"""Samples with several labels: files, F1, and the threshold that turns scores into labels."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

# Labels of the sets that are known by name: a file with others is another set.
LABELS = {"bibtex": 159, "enron": 53}


@dataclass(frozen=True)
class Samples:
    """features [B, F] and labels [B, L], float32 of zeros and ones."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor) -> Samples:
        return Samples(self.features[rows], self.labels[rows])


def read(folder: Path, name: str) -> tuple[Samples, Samples]:
    """A set's training and test samples.

    Args:
        folder: holds NAME_train.npz and NAME_test.npz (arrays X and Y of zeros and ones), or
            Mulan's NAME-train.arff, NAME-test.arff and NAME.xml; or its folder multilabel does.
        name: of the set, as "bibtex".

    Raises:
        FileNotFoundError: no such files.
        ValueError: a file is damaged, or the sizes are not the set's.
    """
    for place in (folder, folder / "multilabel"):
        for pattern, reader in ((f"{name}_{{}}.npz", read_npz), (f"{name}-{{}}.arff", read_arff)):
            paths = [place / pattern.format(part) for part in ("train", "test")]
            if any(path.exists() for path in paths):
                return together(name, paths, reader)
    raise FileNotFoundError(
        f"{name}: {folder} must hold {name}_train.npz and {name}_test.npz, or {name}-train.arff, "
        f"{name}-test.arff and {name}.xml, or a folder multilabel with them; name it by --data"
    )


def together(
    name: str, paths: list[Path], reader: Callable[[Path], Samples]
) -> tuple[Samples, Samples]:
    train, test = (reader(path) for path in paths)
    for path, samples in zip(paths, (train, test), strict=True):
        sizes = samples.features.shape[1], samples.labels.shape[1]
        wanted = train.features.shape[1], LABELS.get(name, train.labels.shape[1])
        if sizes != wanted:
            raise ValueError(
                f"{name}: {path} must have {wanted[0]} features and {wanted[1]} labels (got "
                f"{sizes[0]} and {sizes[1]}); is it another set, or another version of it?"
            )
    return train, test


def read_npz(path: Path) -> Samples:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            x, y = file["X"], file["Y"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} must be a .npz file with arrays X and Y (got {type(error).__name__}: {error})"
        ) from error
    return checked(path, x, y)


def read_arff(path: Path) -> Samples:
    """Mulan's sparse ARFF; the .xml file beside it says which attributes are labels."""
    import arff  # liac-arff

    described = path.with_name(path.name.rpartition("-")[0] + ".xml")
    try:
        tree = ElementTree.parse(described)
        labels = [item.attrib["name"] for item in tree.iter() if item.tag.endswith("label")]
    except (ElementTree.ParseError, KeyError) as error:
        raise ValueError(
            f"{described} must be Mulan's list of labels (got {type(error).__name__}: {error})"
        ) from error
    try:
        with path.open() as file:
            content = arff.load(file, return_type=arff.LOD)
    except (arff.ArffException, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"{path} must be a sparse ARFF file (got {type(error).__name__}: {error})"
        ) from error
    names = [name for name, _ in content["attributes"]]
    missing = sorted(set(labels) - set(names))
    if missing or not labels:
        raise ValueError(
            f"{path} must have every label of {described} as an attribute (got none called "
            f"{missing[:3] or 'a label'})"
        )
    values = np.zeros((len(content["data"]), len(names)), np.float32)
    for row, sparse in zip(values, content["data"], strict=True):
        for column, value in sparse.items():
            row[column] = float(value)
    is_label = np.isin(names, labels)
    return checked(path, values[:, ~is_label], values[:, is_label])


def checked(path: Path, x: np.ndarray, y: np.ndarray) -> Samples:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
        raise ValueError(
            f"{path} must hold X [samples, features] and Y [samples, labels] (got shapes "
            f"{x.shape} and {y.shape})"
        )
    for name, values in (("features", x), ("labels", y)):
        if not np.isin(values, (0, 1)).all():
            raise ValueError(f"{path}: the {name} must all be 0 or 1")
    return Samples(*(torch.from_numpy(t.astype(np.float32)) for t in (x, y)))


def example_f1(predicted: Tensor, labels: Tensor) -> Tensor:
    """2 |P ∩ Y| / (|P| + |Y|) of every sample, 0 where both are empty; [B] of [B, L] each."""
    both = (predicted * labels).sum(1)
    return 2 * both / (predicted.sum(1) + labels.sum(1)).clamp_min(1)


def best_threshold(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """The probability above which a label counts that gives the highest mean F1, and that F1."""
    thresholds = [i / 100 for i in range(5, 61)]
    values = [float(example_f1((scores > t).float(), labels).mean()) for t in thresholds]
    best = max(range(len(values)), key=values.__getitem__)
    return thresholds[best], values[best]
