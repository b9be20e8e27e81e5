"""Photographs to denoise: which train and which test, patches, noise, PSNR."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import images

TRAIN, TESTS = "Train400", ("BSD68", "Set12")
NOISE = 2000  # the seed of the first test photograph's
# A photograph that would train and of which a test photograph holds 180 × 106 pixels: Set12's 04.
SHARED = "test_020"
# Of scikit-image's photographs, these test where there is no other data; the rest trains.
BUNDLED_TESTS = ("astronaut", "camera")


@dataclass(frozen=True)
class Patches:
    """Photographs [H, W] in [0, 1]; sample i is a patch of photograph i modulo their number.

    Where in it, and in which orientation, is drawn with the batch.
    """

    photographs: Sequence[Tensor]
    rows: Tensor

    @classmethod
    def of(cls, photographs: Sequence[Tensor], count: int) -> Patches:
        return cls(photographs, torch.arange(count))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Patches:
        return Patches(self.photographs, self.rows[rows])

    def cut(self, size: int, generator: torch.Generator) -> Tensor:
        """A patch of each sample in one of its eight orientations, [B, 1, size, size]."""
        corners = torch.rand(len(self), 2, generator=generator).tolist()
        turns = torch.randint(8, (len(self),), generator=generator).tolist()
        cut = []
        for row, corner, turn in zip(self.rows.tolist(), corners, turns, strict=True):
            image = self.photographs[row % len(self.photographs)]
            top, left = (int(c * (n - size + 1)) for c, n in zip(corner, image.shape, strict=True))
            patch = image[top : top + size, left : left + size].rot90(turn % 4)
            cut.append(patch.flip(0) if turn >= 4 else patch)
        return torch.stack(cut)[:, None]


@dataclass(frozen=True)
class Noisy:
    """A photograph, clean and noisy, [H, W] each."""

    name: str
    clean: Tensor
    noisy: Tensor

    @classmethod
    def of(cls, name: str, clean: Tensor, sigma: float, seed: int) -> Noisy:
        """With Gaussian noise of deviation sigma / 255, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(clean.shape, generator=generator)
        return cls(name, clean, clean + sigma / 255 * noise)


@dataclass(frozen=True)
class Photographs:
    """What trains, and named sets of named photographs that test; [H, W] in [0, 1] each."""

    train: dict[str, Tensor]
    tests: dict[str, dict[str, Tensor]]


@functools.cache
def read(data: Path | None) -> Photographs:
    """Train400 but for what Set12 shares with it, BSD68 and Set12; or scikit-image's photographs.

    Args:
        data: holds the folders Train400, and BSD68 or Set12 or both; or its folder denoise does.
            None: scikit-image's.

    Raises:
        FileNotFoundError: a folder is missing, or has no images.
        ValueError: an image is damaged.
    """
    if data is None:
        found = {name: scaled(pixels) for name, pixels in images.bundled("L").items()}
        tests = {name: found.pop(name) for name in BUNDLED_TESTS}
        return Photographs(found, {"scikit-image": tests})
    for place in (data, data / "denoise"):
        if (place / TRAIN).is_dir():
            tests = {name: folder(place / name) for name in TESTS if (place / name).is_dir()}
            if not tests:
                raise FileNotFoundError(
                    f"{place} must hold {' or '.join(TESTS)} beside {TRAIN}: test images"
                )
            train = folder(place / TRAIN)
            train.pop(SHARED, None)
            return Photographs(train, tests)
    raise FileNotFoundError(
        f"{data} must hold the folders {TRAIN}, {' and '.join(TESTS)} of gray images, or a folder "
        "denoise with them; without --data, scikit-image's photographs are used"
    )


def folder(path: Path) -> dict[str, Tensor]:
    return {file.stem: scaled(images.read(file, "L")) for file in images.files(path)}


def scaled(pixels: object) -> Tensor:
    """[H, W] in [0, 1] of bytes."""
    return torch.tensor(pixels, dtype=torch.float32) / 255


def psnr(estimate: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, [B] of [B, 1, H, W]; estimates are cut to
    [0, 1], where photographs live.
    """
    error = (estimate.clamp(0, 1) - clean).square().flatten(1).mean(1)
    return -10 * error.log10()
