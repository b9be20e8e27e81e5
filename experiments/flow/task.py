"""Optical flow (paper section 4.2, Figure 1): a small fixed-point layer behind FlowNetS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..solves import Solves
from ..task import Batch, Figures, Parts, Settings, Task
from . import chairs
from .files import Pair, Pairs, find_pairs, known, read_pair, split
from .flownet import SCALES, UNIT, Refined, enlarged

NET, REFINED, ONCE = "FlowNetS", "FlowNetS+FPI", "FlowNetS+FPI-once"
KINDS = {NET: "net", REFINED: "fixed point", ONCE: "once"}
WEIGHTS = (0.005, 0.01, 0.02, 0.08, 0.32)  # of the losses at the scales, finest first
VALIDATION = 0.1  # of the training pairs
REAL = {"chairs": "flyingchairs", "Middlebury": "middlebury"}  # folders of data/flow
EVALUATED = 16  # pairs at once
MEMORY = 2e9  # bytes up to which pairs stay in memory; a pixel has 14
SEED = 0  # of the generated pairs, which are the same for every run
OPTIONS: dict[str, Any] = {
    "width": 0.25,  # of the net; 1 is the paper's
    "source": "generated",  # or "flyingchairs": --data DIR holds them, in the published layout
    "pairs": 1000,  # that are generated
    "test_pairs": 100,
    "columns": 128,
    "rows": 96,
    "penalty": 100.0,  # weight of what keeps the step a contraction
}


@dataclass(frozen=True)
class Held:
    """What each epoch is scored with: `chosen` chooses, the test pairs are only logged."""

    chosen: Pairs
    test: Pairs


@dataclass(frozen=True)
class Tested:
    """What is reported: test pairs like those in training, and photographs from elsewhere.

    Args:
        pairs: of the size in training.
        real: by set; reduced to `columns` where they are wider.
        columns: of an image in training.
    """

    pairs: Pairs
    real: Mapping[str, Sequence[Pair]]
    columns: int


class Flow(Task):
    """The same net with the layer, with one step of it, and without."""

    name = "flow"
    score = "EPE"
    lower_is_better = True
    needs_data = False
    methods = tuple(KINDS)
    curves: Mapping[str, str] = {"figure-1": "test EPE"}
    pairs = ((REFINED, NET), (REFINED, ONCE))

    def settings(self, method: str) -> Settings:
        return Settings(
            method,
            epochs=30,
            patience=0,
            batch=8,
            learning_rate=5e-4,
            schedule="cosine",
            options=dict(OPTIONS),
        )

    def grid(self, method: str) -> Mapping[str, Sequence[Any]]:
        return {"learning_rate": (2.5e-4, 5e-4, 1e-3)}

    def quick(self, settings: Settings) -> Settings:
        few = {"width": 0.05, "pairs": 16, "test_pairs": 8, "columns": 64, "rows": 48}
        return replace(settings, epochs=2, options={**settings.options, **few})

    def load(self, data: Path | None, settings: Settings, work: Path) -> Parts:
        pairs, test = source(data, settings.options, work)
        order = torch.randperm(
            len(pairs), generator=torch.Generator().manual_seed(settings.seed)
        ).tolist()
        cut = max(1, round(VALIDATION * len(pairs)))
        if cut >= len(pairs) or not test:
            raise ValueError(
                f"{settings.method}: needs at least two training pairs and a test pair (got "
                f"{len(pairs)} and {len(test)})"
            )
        rows, columns = size_of(pairs[0])
        keep = 14 * rows * columns * (len(pairs) + len(test)) <= MEMORY
        tested = Pairs(test, keep)
        chosen, train = (
            Pairs([pairs[i] for i in part], keep) for part in (order[:cut], order[cut:])
        )
        return Parts(train, Held(chosen, tested), Tested(tested, real_pairs(data), columns))

    def model(self, settings: Settings, parts: Parts) -> nn.Module:
        size = size_of(parts.test.pairs.pairs[0])
        return Refined(settings.options["width"], KINDS[settings.method], size)

    def batch(self, samples: Any, settings: Settings, generator: torch.Generator) -> Batch:
        first, second, flow = samples
        pair = torch.stack((first, second), 1).float() / 255
        pair, flow = flipped(pair, flow, generator)
        pair = recoloured(pair, generator)
        return pair[:, 0], pair[:, 1], flow

    def losses(self, model: nn.Module, batch: Batch, settings: Settings) -> Tensor:
        first, second, flow = batch
        flows, penalty = model(first, second)
        return loss(flows, flow) + settings.options["penalty"] * penalty

    def validate(self, model: nn.Module, samples: Held, device: torch.device) -> Figures:
        return {
            "EPE": float(errors(model, samples.chosen, device).mean()),
            "test EPE": float(errors(model, samples.test, device).mean()),
        }

    def test(
        self, model: nn.Module, samples: Tested, device: torch.device, validated: Figures
    ) -> Figures:
        counts = Solves()
        figures = {"EPE": float(errors(model, samples.pairs, device, counts).mean())}
        for name, pairs in samples.real.items():
            found = [real_error(model, pair, samples.columns, device) for pair in pairs]
            figures[f"EPE, {name}"] = sum(found) / len(found)
        return figures | counts.figures()


# --- the pairs -------------------------------------------------------------------------------


def source(
    data: Path | None, options: Mapping[str, Any], work: Path
) -> tuple[list[Pair], list[Pair]]:
    """The training and the test pairs; generated into the work folder where they aren't there."""
    if options["source"] == "flyingchairs":
        if data is None:
            raise ValueError("source=flyingchairs: needs the data set; name its folder by --data")
        folder = data / "FlyingChairs_release"
        return split(folder if folder.is_dir() else data)
    if options["source"] != "generated":
        raise ValueError(
            f"source must be 'generated' or 'flyingchairs' (got {options['source']!r})"
        )
    names = ("columns", "rows", "pairs", "test_pairs")
    columns, rows, pairs, test_pairs = (int(options[name]) for name in names)
    folder = work / f"pairs-{columns}x{rows}-{pairs}-{test_pairs}"
    photographs = chairs.photographs(data)
    chairs.generate(folder, pairs, test_pairs, (columns, rows), SEED, photographs)
    return split(folder)


def real_pairs(data: Path | None) -> dict[str, list[Pair]]:
    """By set, those that the data have."""
    if data is None:
        return {}
    folders = {name: data / "flow" / folder for name, folder in REAL.items()}
    return {name: find_pairs(path) for name, path in folders.items() if path.is_dir()}


def size_of(pair: Pair) -> tuple[int, int]:
    """H and W."""
    rows, columns = read_pair(pair)[0].shape[1:]
    return rows, columns


def flipped(pair: Tensor, flow: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the pairs mirrored left to right, half top to bottom, with their flow.

    Args:
        pair: both images, [B, 2, 3, H, W].
        flow: [B, 2, H, W].
        generator: draws which.
    """
    for axis, component in ((-1, 0), (-2, 1)):
        turned = (torch.rand(len(flow), generator=generator) < 0.5).view(-1, 1, 1, 1)
        sign = torch.ones(2, 1, 1)
        sign[component] = -1
        pair = torch.where(turned[..., None], pair.flip(axis), pair)
        flow = torch.where(turned, sign * flow.flip(axis), flow)
    return pair, flow


def recoloured(pair: Tensor, generator: torch.Generator) -> Tensor:
    """Other contrast, colours and brightness, nearly alike for both images, and a little noise."""
    b = len(pair)

    def normal(*shape: int) -> Tensor:
        return torch.randn(b, *shape, generator=generator)

    middle = pair.mean((1, 3, 4), keepdim=True)
    contrast = (0.2 * normal(1, 1, 1, 1)).exp()
    colour = (0.1 * normal(1, 3, 1, 1) + 0.02 * normal(2, 1, 1, 1)).exp()
    brightness = 0.1 * normal(1, 1, 1, 1) + 0.01 * normal(2, 1, 1, 1)
    noise = 0.03 * torch.rand(b, 1, 1, 1, 1, generator=generator) * normal(*pair.shape[1:])
    return ((pair - middle) * contrast + middle) * colour + brightness + noise


# --- loss and error --------------------------------------------------------------------------


def loss(flows: Sequence[Tensor], truth: Tensor) -> Tensor:
    """FlowNet's: the end-point errors of all scales, in units of 20 pixels, summed over pixels.

    Args:
        flows: as of `Refined`.
        truth: [B, 2, H, W]; where it is unknown, it counts nothing.

    Returns:
        Of each sample, [B].
    """
    there = known(truth)[:, None]
    truth = torch.where(there, truth, 0)
    total = truth.new_zeros(len(truth))
    for flow, scale, weight in zip(flows, SCALES, WEIGHTS, strict=True):
        target, share = pooled(truth, there, scale)
        error = torch.linalg.vector_norm(flow.float() - target, dim=1) / UNIT
        total = total + weight * (error * share).sum((1, 2))
    return total


def pooled(flow: Tensor, there: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Means of the known flow over scale × scale pixels, and which part of these is known.

    Args:
        flow: [B, 2, H, W], zero where it is unknown.
        there: [B, 1, H, W].
        scale: of the result, [B, 2, ⌈H / scale⌉, ⌈W / scale⌉].
    """
    both = torch.cat((flow, there.to(flow.dtype)), 1)
    rows, columns = (-n % scale for n in flow.shape[-2:])
    sums = F.avg_pool2d(F.pad(both, (0, columns, 0, rows)), scale)
    share = sums[:, 2]
    return sums[:, :2] / share[:, None].clamp_min(1 / scale**2), share


def end_point_error(flow: Tensor, truth: Tensor) -> Tensor:
    """Of each pair, [B]: the mean length of the difference over the known pixels, in pixels.

    Raises:
        ValueError: of a pair no flow is known.
    """
    there = known(truth)
    if not there.flatten(1).any(1).all():
        raise ValueError("end_point_error: every pair must have a known flow somewhere (got none)")
    error = torch.linalg.vector_norm(flow - truth, dim=1)
    return torch.where(there, error, 0).sum((1, 2)) / there.sum((1, 2))


@torch.no_grad()
def estimate(model: nn.Module, first: Tensor, second: Tensor, device: torch.device) -> Tensor:
    """The flow [B, 2, H, W], on the CPU, between images of [B, 3, H, W], uint8 or 0 to 1."""
    images = (
        image.to(device).float() / (1 if image.is_floating_point() else 255)
        for image in (first, second)
    )
    flows, _ = model(*images)
    return enlarged(flows[0].float(), *first.shape[-2:]).cpu()


def estimates(
    model: nn.Module, pairs: Pairs, device: torch.device, counts: Solves | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Flow and true flow of some pairs after others; what the solves took goes into counts."""
    for rows in torch.arange(len(pairs)).split(EVALUATED):
        first, second, truth = pairs[rows]
        flow = estimate(model, first, second, device)
        if counts is not None:
            counts.add(model)
        yield flow, truth


def errors(
    model: nn.Module, pairs: Pairs, device: torch.device, counts: Solves | None = None
) -> Tensor:
    """The end-point error of each pair, [N]."""
    return torch.cat([end_point_error(*both) for both in estimates(model, pairs, device, counts)])


def reduced(image: Tensor, columns: int) -> Tensor:
    """[3, H, W], uint8, as [1, 3, h, w] of 0 to 1, with so many columns where it had more."""
    image = image[None].float() / 255
    rows, wide = image.shape[-2:]
    if wide <= columns:
        return image
    size = (max(1, round(rows * columns / wide)), columns)
    small = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    return small.clamp(0, 1)


def real_flow(
    model: nn.Module, first: Tensor, second: Tensor, columns: int, device: torch.device
) -> Tensor:
    """The flow [2, H, W] of photographs [3, H, W], in their own pixels, found on reduced ones."""
    flow = estimate(model, reduced(first, columns), reduced(second, columns), device)
    size = first.shape[-2:]
    scale = torch.tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]])
    big = F.interpolate(flow, tuple(size), mode="bilinear", align_corners=False)
    return big[0] * scale[:, None, None]


def real_error(model: nn.Module, pair: Pair, columns: int, device: torch.device) -> float:
    """The end-point error of one pair, in its own pixels."""
    first, second, truth = read_pair(pair)
    flow = real_flow(model, first, second, columns, device)
    return float(end_point_error(flow[None], truth[None]))
