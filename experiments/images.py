"""Photographs: a folder's files, or those that scikit-image itself ships."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

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


def read(path: Path, mode: str | None = None) -> np.ndarray:
    """A whole image of 8 bits a channel, uint8: gray ones [H, W], others [H, W, 3].

    Args:
        path: of the file.
        mode: "L" makes any gray, "RGB" gives any three channels; None: as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, cut short, or of more than 8 bits.
    """
    content = path.read_bytes()
    try:
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES, which must stay False")
        # Decoding looks at no check sum, and takes a file without an end; this does neither.
        Image.open(BytesIO(content)).verify()
        with Image.open(BytesIO(content)) as image:
            if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                raise ValueError(f"the mode {image.mode}")
            return np.array(image.convert(mode or ("L" if image.mode in "LA" else "RGB")))
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(
            f"{path} must be a whole image of 8 bits a channel (got {type(error).__name__}: "
            f"{error}); fetch or make it again"
        ) from error


def bundled(mode: str | None = None) -> dict[str, np.ndarray]:
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
    pixels = {name: make() for name, make in sources.items()}
    if mode is not None:
        pixels = {name: np.array(Image.fromarray(p).convert(mode)) for name, p in pixels.items()}
    return pixels
