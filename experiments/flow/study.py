"""Of trained nets: errors on photographs, what the iterations give, contraction, pictures."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from fpi_cuda import Tolerance
from fpi_cuda.contraction import jacobian_radius

from ..trained import nets
from . import chairs
from .colour import colours
from .files import known, read_pair
from .flownet import Refined
from .scenes import Album, scene
from .task import (
    NET,
    REFINED,
    SEED,
    Flow,
    Tested,
    end_point_error,
    errors,
    estimate,
    real_flow,
    size_of,
)

FIRST_SHOWN = 2_000_000  # of the generator's indices: no training or test pair has them
CUTS = (1, 2, 4, 8, 16)  # iterations
POWER = 60  # iterations, for the spectral radius
SHOWN = 6  # rows of a picture
TILE = 256  # columns of a tile
Table = list[dict[str, str]]
Models = Mapping[str, Refined]
Tile = tuple[str, Tensor]  # its column's name and its pixels, [H, W, 3], uint8


def photographs(models: Models, tested: Tested) -> Iterator[dict[str, str]]:
    """The end-point error on each real pair, in its own pixels."""
    for name, pairs in tested.real.items():
        for pair in pairs:
            first, second, truth = read_pair(pair)
            row = {
                "pair": f"{name} {pair.name}",
                "size": f"{first.shape[-1]} × {first.shape[-2]}",
                "no motion": error(torch.zeros_like(truth), truth),
            }
            for method, model in models.items():
                row[method] = error(
                    real_flow(model, first, second, tested.columns, place(model)), truth
                )
            if REFINED in models:
                last = models[REFINED].layer.last
                row["iterations"] = str(int(last.iterations))
                row["converged"] = "yes" if bool(last.converged) else "no"
            yield row


def place(model: Refined) -> torch.device:
    return next(model.parameters()).device


def error(flow: Tensor, truth: Tensor) -> str:
    return f"{float(end_point_error(flow[None], truth[None])):.2f}"


def cuts(models: Models, tested: Tested) -> Iterator[dict[str, str]]:
    """The test error of the trained layer by how many iterations its solves may take."""
    still = torch.cat([end_point_error(torch.zeros_like(t), t) for t in truths(tested)])
    yield {"flow": "no motion", "EPE": f"{float(still.mean()):.3f}"}
    model = models[REFINED]
    yield {"flow": "its net's own", "EPE": test_error(unread(model), tested)}
    for most in CUTS:
        yield {
            "flow": f"{most} iteration{'s' if most > 1 else ''}",
            "EPE": test_error(cut(model, most), tested),
        }
    yield {"flow": "converged", "EPE": test_error(model, tested)}


def truths(tested: Tested) -> Iterator[Tensor]:
    """The true flow of each test pair, [1, 2, H, W]."""
    for i in range(len(tested.pairs)):
        yield tested.pairs[torch.tensor([i])][2]


def test_error(model: Refined, tested: Tested) -> str:
    return f"{float(errors(model, tested.pairs, place(model)).mean()):.3f}"


def unread(model: Refined) -> Refined:
    """A copy whose layer adds nothing."""
    other = copy.deepcopy(model)
    for parameter in other.read.parameters():
        nn.init.zeros_(parameter)
    return other


def cut(model: Refined, most: int) -> Refined:
    """A copy whose solves end after so many iterations, converged or not."""
    other = copy.deepcopy(model)
    other.evaluated = Tolerance(0, 0), most
    return other


def radii(models: Models, tested: Tested) -> Iterator[dict[str, str]]:
    """Whether the trained step contracts where it ends, on the test pairs."""
    model, found = models[REFINED], []
    for rows in torch.arange(len(tested.pairs)).split(16):
        first, second, _ = tested.pairs[rows]
        images = [t.to(place(model)).float() / 255 for t in (first, second)]
        with torch.no_grad():
            z = model.inputs(model.net(*images)[0], *images)
            x = model.layer(z)
        found.append(jacobian_radius(model.layer.g, x, z, iterations=POWER)[0].detach())
    radius = torch.cat(found)
    yield {
        "mean": f"{float(radius.mean()):.2f}",
        "worst": f"{float(radius.max()):.2f}",
        "above 1": f"{int((radius > 1).sum())} of {len(radius)}",
    }


# --- pictures --------------------------------------------------------------------------------


def real_rows(models: Models, tested: Tested) -> Iterator[list[Tile]]:
    """A row a real pair: some of each set."""
    for pairs in tested.real.values():
        for pair in pairs[: max(1, SHOWN // len(tested.real))]:
            first, second, truth = read_pair(pair)
            flows = {
                method: real_flow(model, first, second, tested.columns, place(model))
                for method, model in models.items()
            }
            yield row(first, truth, flows)


def made_rows(models: Models, size: tuple[int, int]) -> Iterator[list[Tile]]:
    """A row a pair of this width and height that none trains on, of scikit-image's photographs."""
    album = Album(chairs.shipped())
    for i in range(SHOWN):
        pictures = scene(album, size, SEED, FIRST_SHOWN + i).pair(size)
        first, second, truth = (torch.from_numpy(np.ascontiguousarray(t)) for t in pictures)
        first, second = first.permute(2, 0, 1), second.permute(2, 0, 1)
        flows = {
            method: estimate(model, first[None], second[None], place(model))[0]
            for method, model in models.items()
        }
        yield row(first, truth, flows)


def row(first: Tensor, truth: Tensor, flows: Mapping[str, Tensor]) -> list[Tile]:
    """The first image, the true flow and what the nets find, on one scale of colours.

    Args:
        first: [3, H, W], uint8.
        truth: [2, H, W].
        flows: by method, [2, H, W].
    """
    length = torch.linalg.vector_norm(truth, dim=0)[known(truth)]
    # A small thing that moves far must not leave all else white.
    largest = max(float(length.quantile(0.95)), float(length.max()) / 4, 1e-6)
    shown = [("first image", first.permute(1, 2, 0)), ("true flow", colours(truth, largest))]
    for method in (NET, REFINED):
        if method in flows:
            found = f"{error(flows[method], truth)} px"
            shown.append((f"{method}: {found}", colours(flows[method], largest)))
    return shown


def picture(path: Path, rows: Sequence[Sequence[Tile]]) -> None:
    """Write rows of tiles with their names above, all as wide, one below the other."""
    gap, head = 4, 14
    tiles = [[scaled(pixels) for _, pixels in row] for row in rows]
    heights = [max(tile.height for tile in row) + head + gap for row in tiles]
    width = max(len(row) for row in tiles) * (TILE + gap) - gap
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for names, row, height in zip(rows, tiles, heights, strict=True):
        for i, ((name, _), tile) in enumerate(zip(names, row, strict=True)):
            left = i * (TILE + gap)
            draw.text((left, top), name, fill="black")
            sheet.paste(tile, (left, top + head))
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=90)


def scaled(pixels: Tensor) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels.numpy()))
    return image.resize((TILE, round(TILE * image.height / image.width)))


def study(task: Flow, folder: Path, data: Path | None, device: torch.device) -> dict[str, Table]:
    """The tables of the page from seed 0 of the runs in the folder; pictures go into that.

    Writes pictures.jpg, of the real pairs where the data have some, and published/pictures.jpg, of
    pairs of scikit-image's photographs, which others may see.
    """
    kept = list(nets(task, folder, task.methods, data, device))
    if not kept:
        return {}
    # Test pairs like those of the first net.
    models, tested = {net.method: net.model for net in kept}, kept[0].parts.test
    tables: dict[str, Table] = {
        "End-point error on photographs, in their own pixels": [*photographs(models, tested)]
    }
    if REFINED in models:
        tables["What the iterations give: end-point error on the test pairs"] = [
            *cuts(models, tested)
        ]
        tables["Spectral radius of ∂g/∂x at the fixed point (test pairs)"] = [
            *radii(models, tested)
        ]
    rows, columns = size_of(tested.pairs.pairs[0])
    size = columns, rows
    if tested.real:
        picture(folder / "pictures.jpg", [*real_rows(models, tested)])
    picture(folder / "published" / "pictures.jpg", [*made_rows(models, size)])
    return {title: rows for title, rows in tables.items() if rows}
