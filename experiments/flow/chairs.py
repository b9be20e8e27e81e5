"""Pairs with exact flow, made in the manner of Flying Chairs, in the layout of the published set.

    python -m experiments.flow.chairs FOLDER [--train 22232] [--test 640] [--size 512 384]
        [--seed 0] [--data DIR] [--workers N]

The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from .. import images
from .files import SPLIT, write_flo
from .scenes import Album, Array, scene

TRAIN, TEST = 22_232, 640  # the published set's pairs
FIRST_TEST = 1_000_000  # the test pairs' indices start here: they stay, whatever is trained on
VERSION = 1  # of the generator: raise it where the same seed makes other pairs


# --- photographs -----------------------------------------------------------------------------


def shipped() -> list[Array]:
    """The photographs that scikit-image holds, but for Middlebury's, which evaluate."""
    return [pixels for name, pixels in images.bundled().items() if name != "motorcycle"]


def photographs(data: Path | None = None) -> list[Array]:
    """Photographs to make pairs of, uint8, [H, W] in gray and [H, W, 3] in colour.

    Those that scikit-image holds and, where `data` has them, the 400 gray ones of 180 x 180 pixels
    in its folder denoise/Train400. None is of a set that flow is evaluated on.

    Raises:
        ValueError: a file is damaged.
    """
    folder = data / "denoise" / "Train400" if data else None
    found = sorted(folder.glob("*.png")) if folder else []
    return [*shipped(), *(images.read(path) for path in found)]


# --- a folder of pairs -----------------------------------------------------------------------


def generate(
    folder: Path,
    train: int,
    test: int,
    size: tuple[int, int] = (128, 96),
    seed: int = 0,
    photographs: Sequence[Array] | None = None,
    workers: int = 1,
) -> None:
    """Make a data set in the layout of the published Flying Chairs, as files.split reads it.

    Pairs that are there already stay. made.json tells what the folder was made with.

    Args:
        folder: gets data/00001_img1.png, data/00001_img2.png, data/00001_flow.flo and so on, the
            training pairs first, and FlyingChairs_train_val.txt.
        train: how many training pairs.
        test: how many test pairs; the same ones whatever `train` is.
        size: width and height, in pixels.
        seed: of all that is random.
        photographs: uint8, [H, W] or [H, W, 3]; those that scikit-image holds where None.
        workers: processes that make pairs.

    Raises:
        ValueError: a count or a size is impossible, or the folder was made with other values.
    """
    if not (train >= 1 and test >= 0 and train + test <= 99_999 and min(size) >= 16):
        raise ValueError(
            "generate: needs train of at least 1, test of at least 0, 99,999 pairs at most and "
            f"sides of at least 16 pixels (got train {train}, test {test}, size {size})"
        )
    if workers < 1 or seed < 0:
        raise ValueError(
            "generate: workers must be at least 1 and the seed at least 0 (got "
            f"workers {workers}, seed {seed})"
        )
    if photographs is None:
        photographs = shipped()
    album = Album(photographs)
    agree(folder, recipe(train, test, size, seed, photographs))
    jobs = [(i + 1, i if i < train else FIRST_TEST + i - train) for i in range(train + test)]
    missing = [job for job in jobs if not all(path.exists() for path in paths(folder, job[0]))]
    done = made(partial(make, folder, size, seed), missing, album, workers)
    for _ in tqdm(done, desc=str(folder), initial=len(jobs) - len(missing), total=len(jobs)):
        pass
    with whole(folder / SPLIT) as part:
        part.write_text("1\n" * train + "2\n" * test)


def recipe(
    train: int, test: int, size: tuple[int, int], seed: int, photographs: Sequence[Array]
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for photograph in photographs:
        digest.update(f"{photograph.shape}".encode() + photograph.tobytes())
    return {
        "generator": VERSION,
        "train": train,
        "test": test,
        "size": list(size),
        "seed": seed,
        "photographs": len(photographs),
        "sha256": digest.hexdigest(),
    }


def agree(folder: Path, wanted: dict[str, Any]) -> None:
    """Note what the folder is made with, or refuse where it was made with something else."""
    note, data = folder / "made.json", folder / "data"
    if not note.exists():
        if data.exists() and any(data.iterdir()):
            raise ValueError(
                f"{data} must be empty or made by this program (got files, and no {note}); name "
                "another folder"
            )
        data.mkdir(parents=True, exist_ok=True)
        with whole(note) as part:
            part.write_text(json.dumps(wanted, indent=1) + "\n")
        return
    try:
        there = json.loads(note.read_text())
        differ = [f"{key} {there.get(key)}" for key in wanted if there.get(key) != wanted[key]]
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{note} must tell what the folder was made with (got {type(error).__name__}: "
            f"{error}); delete the folder to start over"
        ) from error
    if differ:
        asked = [f"{key} {wanted[key]}" for key in wanted if there.get(key) != wanted[key]]
        raise ValueError(
            f"{folder} must be made with the values in {note}, {', '.join(differ)} (got "
            f"{', '.join(asked)}); name another folder, or delete this one"
        )
    data.mkdir(exist_ok=True)


def paths(folder: Path, number: int) -> tuple[Path, Path, Path]:
    names = (f"{number:05d}_img1.png", f"{number:05d}_img2.png", f"{number:05d}_flow.flo")
    first, second, flow = (folder / "data" / name for name in names)
    return first, second, flow


def make(
    folder: Path, size: tuple[int, int], seed: int, job: tuple[int, int], album: Album
) -> None:
    """Write the pair with that number, of the scene with that index."""
    number, index = job
    *pictures, flow = scene(album, size, seed, index).pair(size)
    *shown, last = paths(folder, number)
    for path, picture in zip(shown, pictures, strict=True):
        with whole(path) as part:
            # A photograph hardly gets smaller by a higher level, and takes several times as long.
            Image.fromarray(picture).save(part, "png", compress_level=1)
    with whole(last) as part:
        write_flo(part, torch.from_numpy(flow))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name to write at, of this process; the file gets its own once it is whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield part
    part.replace(path)


_ALBUM: list[Album] = []  # a worker's own, for it goes to each of them once


def made(
    one: partial[None], jobs: list[tuple[int, int]], album: Album, workers: int
) -> Iterator[None]:
    if workers == 1:
        yield from (one(job, album) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start_worker, (album,)) as pool:
        yield from pool.map(partial(by_worker, one), jobs, chunksize=16)


def start_worker(album: Album) -> None:
    torch.set_num_threads(1)
    _ALBUM[:] = [album]


def by_worker(one: partial[None], job: tuple[int, int]) -> None:
    one(job, _ALBUM[0])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.flow.chairs")
    parser.description = "Make pairs with exact flow, in the manner of Flying Chairs."
    add = parser.add_argument
    add("folder", type=Path)
    add("--train", type=int, default=TRAIN, help="pairs; default: %(default)s")
    add("--test", type=int, default=TEST, help="pairs; default: %(default)s")
    add("--size", type=int, nargs=2, default=(512, 384), metavar=("WIDTH", "HEIGHT"))
    add("--seed", type=int, default=0)
    add("--data", type=Path, metavar="DIR", help="its denoise/Train400 gives more photographs")
    add("--workers", type=int, default=1, help="processes; default: 1")
    given = parser.parse_args(arguments)
    width, height = given.size
    try:
        generate(
            given.folder,
            given.train,
            given.test,
            (width, height),
            given.seed,
            photographs(given.data),
            given.workers,
        )
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
