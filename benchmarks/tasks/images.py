"""Photographs: a folder's files, or those that scikit-image itself ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KINDS = (".png", ".ppm", ".pgm", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


def files(folder: Path) -> list[Path]:
    """The images in a folder, sorted by name.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in KINDS)
    if not found:
        raise FileNotFoundError(
            f"{folder} must hold images, whose names end in one of {', '.join(KINDS)} (got none)"
        )
    return found


def read(path: Path, mode: str = "RGB") -> np.ndarray:
    """A whole image, uint8: [H, W, 3], or [H, W] for mode "L".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no image.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return np.asarray(image.convert(mode))  # decodes all of it
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders fail with almost any class
        raise ValueError(
            f"{path} must be a whole image file (got {type(error).__name__}: {error}); replace it"
        ) from error


def bundled(mode: str = "RGB") -> dict[str, np.ndarray]:
    """scikit-image's own photographs by name, as `read` gives them; no download is needed."""
    from skimage import data

    sources: dict[str, Callable[[], Any]] = {
        "astronaut": data.astronaut,
        "camera": data.camera,
        "chelsea": data.chelsea,
        "coffee": data.coffee,
        "coins": data.coins,
        "motorcycle": lambda: data.stereo_motorcycle()[0],
        "rocket": data.rocket,
    }
    return {
        name: np.asarray(Image.fromarray(make()).convert(mode)) for name, make in sources.items()
    }
