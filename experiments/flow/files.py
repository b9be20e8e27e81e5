"""Pairs of photographs and the flow between them: files, and the layouts of the known data sets.

A flow [2, H, W] holds u and v, in pixels to the right and down: the pixel (x, y) of the first
photograph is at (x + u, y + v) in the second.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import images

TAG = 202021.25  # the first four bytes of a .flo file; "PIEH" as text
UNKNOWN = 1e9  # a component beyond it says that nobody knows the flow there
LONGEST, LARGEST = 32_767, 100_000_000  # a side's pixels, and a picture's
IMAGES, FLOWS = (".png", ".ppm", ".jpg", ".jpeg"), (".flo", ".flo.gz")
# The names of the first photograph, the second and the flow, without what a file's name ends in.
LAYOUTS = (
    ("{}_img1", "{}_img2", "{}_flow"),  # Flying Chairs as published
    ("{}-img0", "{}-img1", "{}-gt"),  # its examples
    ("{}/frame10", "{}/frame11", "{}/flow10"),  # Middlebury
)
SPLIT = "FlyingChairs_train_val.txt"


@dataclass(frozen=True)
class Pair:
    """Where the two photographs and the flow from the first to the second are."""

    name: str
    first: Path
    second: Path
    flow: Path


# --- flow ------------------------------------------------------------------------------------


def read_flo(path: Path) -> Tensor:
    """The flow [2, H, W], float32, of a .flo file in Middlebury's format, or of a .flo.gz file.

    Unknown flow, a component over 1e9 in absolute value, stays as it is; `known` tells where.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged: another tag, an impossible size, too short or long, a NaN.
    """
    with path.open("rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            head = file.read(12)
            width, height = flo_size(path, head)
            wanted = width * height * 8
            body = file.read(wanted + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} must be a whole .gz file (got {type(error).__name__}: {error}); fetch or "
                "make it again"
            ) from error
    if len(body) != wanted:
        came = f"{len(body)}" if len(body) < wanted else "more"
        raise ValueError(
            f"{path} must have {wanted} bytes of flow after its first 12, for {width}x{height} "
            f"pixels (got {came}); fetch or make it again"
        )
    flow = torch.from_numpy(np.frombuffer(body, "<f4").astype(np.float32))
    if flow.isnan().any():
        raise ValueError(f"{path} must hold numbers (got NaN); write unknown flow as 1e10")
    return flow.view(height, width, 2).permute(2, 0, 1).contiguous()


def flo_size(path: Path, head: bytes) -> tuple[int, int]:
    """Width and height, of a .flo file's first 12 bytes."""
    if len(head) < 12 or struct.unpack_from("<f", head)[0] != TAG:
        raise ValueError(
            f"{path} must be a .flo file, which starts with the float32 {TAG}, the width and the "
            f"height (got the bytes {head.hex(' ') or 'of an empty file'})"
        )
    width, height = struct.unpack_from("<ii", head, 4)
    if not (1 <= width <= LONGEST and 1 <= height <= LONGEST and width * height <= LARGEST):
        raise ValueError(
            f"{path} must say a size of 1 to {LONGEST} pixels a side and at most {LARGEST} in all "
            f"(got {width}x{height}); is it damaged?"
        )
    return width, height


def write_flo(path: Path, flow: Tensor) -> None:
    """Write a flow [2, H, W] as a .flo file, of float32.

    Raises:
        ValueError: the flow has another shape, or a NaN.
    """
    if flow.dim() != 3 or len(flow) != 2 or not flow.numel():
        raise ValueError(f"{path}: a flow must be [2, H, W] (got {list(flow.shape)})")
    if flow.isnan().any():
        raise ValueError(f"{path}: a flow must hold numbers (got NaN); unknown flow is 1e10")
    _, height, width = flow.shape
    values = flow.detach().cpu().permute(1, 2, 0).numpy().astype("<f4")
    path.write_bytes(struct.pack("<fii", TAG, width, height) + values.tobytes())


def known(flow: Tensor) -> Tensor:
    """Where the flow [..., 2, H, W] is known; bool [..., H, W]."""
    return (flow.abs() <= UNKNOWN).all(-3)


# --- photographs -----------------------------------------------------------------------------


def read_image(path: Path) -> Tensor:
    """A photograph of 8 bits as [3, H, W], uint8; one in gray has three equal channels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, cut short or of more than 8 bits.
    """
    return torch.from_numpy(images.read(path, "RGB")).permute(2, 0, 1).contiguous()


def read_pair(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """The photographs [3, H, W], uint8, and the flow [2, H, W], float32.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is damaged, or they differ in size.
    """
    first, second, flow = read_image(pair.first), read_image(pair.second), read_flo(pair.flow)
    for path, other in ((pair.second, second), (pair.flow, flow)):
        if other.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{pair.name}: {pair.first} and {path} must have one size (got {size(first)} and "
                f"{size(other)}); is one of another pair?"
            )
    return first, second, flow


def size(picture: Tensor) -> str:
    return f"{picture.shape[-1]}x{picture.shape[-2]}"


# --- data sets -------------------------------------------------------------------------------


def find_pairs(folder: Path) -> list[Pair]:
    """All pairs of a folder or, where it has none itself, of its folder data; sorted by name.

    Raises:
        FileNotFoundError: no pair is there, or a part of one is missing.
    """
    for place in (folder, folder / "data"):
        files = parts(place)
        pairs = [pair for layout in LAYOUTS for pair in of_layout(place, files, layout)]
        if pairs:
            return sorted(pairs, key=lambda pair: pair.name)
    raise FileNotFoundError(
        f"{folder} must hold pairs (got {'none' if folder.is_dir() else 'no such folder'}): "
        "NAME_img1, NAME_img2 and NAME_flow, as Flying Chairs; NAME-img0, NAME-img1 and NAME-gt, "
        "as its examples; or folders NAME with frame10, frame11 and flow10, as Middlebury. "
        f"Photographs end in {', '.join(IMAGES)}, flow in {' or '.join(FLOWS)}"
    )


def parts(folder: Path) -> dict[str, Path]:
    """The photographs and flows, by their names in the folder without what they end in."""
    listed = [
        *folder.glob("*"),
        *folder.glob("*/frame10.*"),
        *folder.glob("*/frame11.*"),
        *folder.glob("*/flow10.*"),
    ]
    out: dict[str, Path] = {}
    for path in sorted(listed):
        name = path.relative_to(folder).as_posix()
        for ending in (*IMAGES, *FLOWS):
            if name.endswith(ending):
                out.setdefault(name.removesuffix(ending), path)
    return out


def of_layout(folder: Path, files: dict[str, Path], layout: tuple[str, str, str]) -> list[Pair]:
    names = set()
    for pattern in layout:
        start, end = pattern.split("{}")
        for file in files:
            name = file[len(start) : len(file) - len(end)]
            if name and file == pattern.format(name):
                names.add(name)
    return [Pair(name, *(part(folder, files, p.format(name)) for p in layout)) for name in names]


def part(folder: Path, files: dict[str, Path], name: str) -> Path:
    if name not in files:
        endings = FLOWS if name.endswith(("flow", "gt", "flow10")) else IMAGES
        raise FileNotFoundError(
            f"{folder / name}{endings[0]} (or {', '.join(endings[1:])}) is missing, though other "
            "files of its pair are there; fetch it, or remove them"
        )
    return files[name]


def split(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """The training and test pairs of Flying Chairs.

    Args:
        folder: of the pairs. It or the folder that it is in holds FlyingChairs_train_val.txt: a
            number for each pair in the names' order, 1 for training and 2 for test.

    Raises:
        FileNotFoundError: that file or a pair's is missing.
        ValueError: it has another count of numbers, or other numbers.
    """
    pairs = find_pairs(folder)
    places = (folder / SPLIT, folder.resolve().parent / SPLIT)
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"{places[0]} is missing, and {places[1]} too; it tells the training pairs from the "
            "test pairs and is published with Flying Chairs"
        )
    marks = path.read_bytes().split()
    others = sorted(set(marks) - {b"1", b"2"})
    if others:
        shown = others[0][:20].decode(errors="replace")
        raise ValueError(f"{path} must hold 1 for training and 2 for test, only (got {shown!r})")
    if len(marks) != len(pairs):
        raise ValueError(
            f"{path} must hold a number for each of the {len(pairs)} pairs of {folder} (got "
            f"{len(marks)}); is it another set's, or are pairs missing?"
        )
    train, test = (
        [pair for pair, mark in zip(pairs, marks, strict=True) if mark == wanted]
        for wanted in (b"1", b"2")
    )
    return train, test


class Pairs:
    """Some pairs of a data set, read when they are asked for.

    Args:
        pairs: theirs.
        keep: whether what was read stays in memory: 14 bytes a pixel.
        threads: that read and decode at the same time.

    `pairs[rows]`, with rows [B] of int64, is the first photographs [B, 3, H, W], uint8, the second
    ones, and the flow [B, 2, H, W], float32. It raises what `read_pair` does, and ValueError where
    the rows' pairs differ in size.
    """

    def __init__(self, pairs: Sequence[Pair], keep: bool = False, threads: int = 4) -> None:
        self.pairs, self.keep = list(pairs), keep
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._pool = ThreadPoolExecutor(threads, "pairs")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = rows.tolist()
        if rows.dim() != 1 or not chosen:
            raise ValueError(f"rows must be [B] with B of at least 1 (got {list(rows.shape)})")
        read = list(self._pool.map(self._read, chosen))
        for row, (first, _, _) in zip(chosen, read, strict=True):
            if first.shape != read[0][0].shape:
                raise ValueError(
                    f"the pairs of one batch must have one size (got {size(read[0][0])} of "
                    f"{self.pairs[chosen[0]].first} and {size(first)} of {self.pairs[row].first}); "
                    "take one at a time"
                )
        first, second, flow = (torch.stack(part) for part in zip(*read, strict=True))
        return first, second, flow

    def _read(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        if row in self._kept:
            return self._kept[row]
        read = read_pair(self.pairs[row])
        if self.keep:
            self._kept[row] = read
        return read
