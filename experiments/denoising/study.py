"""Of trained nets: other noise, cut solves, other sizes, and pictures."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from matplotlib.figure import Figure
from skimage.restoration import denoise_nl_means
from torch import Tensor

from fpi_cuda import FixedPointLayer
from fpi_cuda.contraction import jacobian_radius

from ..task import Task
from ..trained import nets
from .photographs import BUNDLED_TESTS, NOISE, Noisy, Photographs, psnr, read

SIGMA = 25
METHODS = (f"feedforward-{SIGMA}", f"FPI_NN-{SIGMA}")
LEVELS = (5, 10, 15, 20, 25, 30, 35, 40, 50)
CUTS = (1, 2, 3, 5, 8, 12, 20)
SIDES = ((32, 32), (61, 97), (180, 180), (256, 255))
PICTURED = ("astronaut", "camera", "chelsea", "coffee")
Rows = list[dict[str, str]]
Nets = dict[str, Any]


@torch.no_grad()
def denoised(net: Any, sample: Noisy, most: int | None = None) -> Tensor:
    """The estimate [1, 1, H, W], on the CPU; of a solve cut after `most` iterations if given."""
    z = sample.noisy[None, None].to(net.readout.weight.device)
    kept = net.options
    if most is not None:
        net.options = {**kept, "iterations": most, "rtol": 0.0}
    try:
        return net(z)[0].cpu()
    finally:
        net.options = kept


def score(net: Any, samples: Sequence[Noisy], most: int | None = None) -> tuple[float, list[int]]:
    """Mean PSNR, and the iterations of each solve."""
    values, iterations = [], []
    for sample in samples:
        values.append(psnr(denoised(net, sample, most), sample.clean[None, None]).item())
        if isinstance(net.layer, FixedPointLayer):
            iterations.append(int(net.layer.last.iterations))
    return mean(values), iterations


def noisy(clean: dict[str, Tensor], sigma: float) -> list[Noisy]:
    return [
        Noisy.of(name, image, sigma, NOISE + i) for i, (name, image) in enumerate(clean.items())
    ]


def span(values: Sequence[int]) -> str:
    return f"{mean(values):.1f} ({min(values)}-{max(values)})"


def other_noise(found: Nets, clean: dict[str, Tensor]) -> Iterator[dict[str, str]]:
    """PSNR at levels that were not trained on, converged and with a fixed count of iterations."""
    net = found[METHODS[1]]
    fixed = round(mean(score(net, noisy(clean, SIGMA))[1]))
    for sigma in LEVELS:
        samples = noisy(clean, sigma)
        value, iterations = score(net, samples)
        given = [psnr(s.noisy[None, None], s.clean[None, None]).item() for s in samples]
        row = {"σ": str(sigma), "noisy": f"{mean(given):.2f}"}
        if METHODS[0] in found:
            row[METHODS[0]] = f"{score(found[METHODS[0]], samples)[0]:.2f}"
        yield row | {
            METHODS[1]: f"{value:.2f}",
            "iterations, mean (range)": span(iterations),
            f"{METHODS[1]}, cut at {fixed}": f"{score(net, samples, fixed)[0]:.2f}",
        }


def cut(found: Nets, clean: dict[str, Tensor]) -> Iterator[dict[str, str]]:
    """What more iterations give."""
    net, samples = found[METHODS[1]], noisy(clean, SIGMA)
    for most in (*CUTS, None):
        values, residuals = [], []
        for sample in samples:
            values.append(psnr(denoised(net, sample, most), sample.clean[None, None]).item())
            last = net.layer.last
            residuals.append(float(last.residual_norm / last.x.norm()))
        yield {
            "iterations": str(most or "until converged"),
            "PSNR": f"{mean(values):.2f}",
            "‖g(x) − x‖ / ‖x‖, worst": f"{max(residuals):.1e}",
        }


def each(found: Nets, sample: Noisy) -> dict[str, str]:
    """PSNR by every net, and what the solve took."""
    row = {}
    for method, net in found.items():
        value, iterations = score(net, [sample])
        row[method] = f"{value:.2f}"
        if iterations:
            row["iterations"] = str(iterations[0])
            row["converged"] = "yes" if bool(net.layer.last.converged) else "no"
    return row


def sizes(found: Nets, image: Tensor) -> Iterator[dict[str, str]]:
    """Crops of one photograph, and all of it."""
    for height, width in (*SIDES, image.shape):
        sample = Noisy.of("", image[:height, :width], SIGMA, NOISE)
        row = {"height × width": f"{height} × {width}"}
        yield row | each(found, sample)


def cost(found: Nets, image: Tensor) -> Iterator[dict[str, str]]:
    """Time of an estimate, in turns, and whether the step contracts."""
    sample = Noisy.of("", image, SIGMA, NOISE)
    calls: dict[str, Callable[[], Tensor]] = {
        method: lambda net=net: denoised(net, sample) for method, net in found.items()
    }
    seconds: dict[str, list[float]] = {method: [] for method in calls}
    for _ in range(7):
        for method, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[method].append(time.perf_counter() - start)
    for method, net in found.items():
        row = {
            "method": method,
            "parameters": str(sum(p.numel() for p in net.parameters())),
            "of them trained": str(sum(p.numel() for p in net.parameters() if p.requires_grad)),
            f"ms an estimate of {image.shape[0]} × {image.shape[1]}, median of 7": (
                f"{1e3 * median(seconds[method]):.0f}"
            ),
        }
        if isinstance(net.layer, FixedPointLayer):
            z = sample.noisy[None, None, :128, :128].to(net.readout.weight.device)
            with torch.no_grad():
                net(z)
            radius, _ = jacobian_radius(net.layer.g, net.layer.last.x, z, iterations=60)
            row["spectral radius of ∂g/∂x at x̂"] = f"{float(radius.detach()):.2f}"
        yield row


def non_local_means(sample: Noisy, strength: float, patch: int) -> Tensor:
    """scikit-image's estimate, which learns nothing, given σ; the strength is in units of it."""
    sigma = SIGMA / 255
    estimate = denoise_nl_means(
        sample.noisy.numpy(), patch_size=patch, patch_distance=7, h=strength * sigma, sigma=sigma
    )
    return torch.from_numpy(estimate)[None, None]


def best_non_local_means(samples: Sequence[Noisy]) -> tuple[float, int]:
    """The parameters of the highest PSNR."""
    return max(
        itertools.product((0.5, 0.6, 0.7, 0.8), (3, 5)),
        key=lambda choice: sum(
            psnr(non_local_means(s, *choice), s.clean[None, None]).item() for s in samples
        ),
    )


def images(
    found: Nets, samples: Sequence[Noisy], choice: tuple[float, int]
) -> Iterator[dict[str, str]]:
    """A row a photograph."""
    for sample in samples:
        row = {"photograph": sample.name, "height × width": "{} × {}".format(*sample.clean.shape)}
        value = psnr(non_local_means(sample, *choice), sample.clean[None, None]).item()
        row["non-local means"] = f"{value:.2f}"
        yield row | each(found, sample)


def picture(path: Path, found: Nets, samples: Sequence[Noisy], side: int = 160) -> None:
    """A row a photograph: noisy, each estimate, clean; the middle of it, and PSNR of all of it."""
    figure = Figure(figsize=(2.2 * (2 + len(found)), 2.4 * len(samples)))
    axes = figure.subplots(len(samples), 2 + len(found), squeeze=False)
    for row, sample in zip(axes, samples, strict=True):
        clean = sample.clean[None, None]
        shown = {"noisy": sample.noisy[None, None]}
        shown |= {method: denoised(net, sample) for method, net in found.items()}
        for axis, (what, image) in zip(row, (shown | {"clean": clean}).items(), strict=True):
            top, left = ((n - min(side, n)) // 2 for n in sample.clean.shape)
            part = image[0, 0, top : top + side, left : left + side]
            axis.imshow(part.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            value = "" if what == "clean" else f"  {psnr(image, clean).item():.2f} dB"
            axis.set_title(what + value, fontsize=8)
            axis.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, pil_kwargs={"quality": 80})


def study(task: Task, folder: Path, data: Path | None, device: torch.device) -> dict[str, Rows]:
    """Tables and pictures of the nets of seed 0 for σ = 25; none before FPI_NN is trained.

    What is drawn of the data's photographs stays in the folder; what may be published, of
    scikit-image's, goes to its folder published.
    """
    kept = {net.method: net for net in nets(task, folder, METHODS, data, device)}
    if METHODS[1] not in kept:
        return {}
    found = {method: net.model for method, net in kept.items()}
    name, clean = list(read(data).tests.items())[-1]
    small = {n: image for n, image in clean.items() if image.numel() <= 256**2} or clean
    largest = max(clean.values(), key=Tensor.numel)
    shipped = all_of(read(None))
    # Without data, most of these train.
    pictured = noisy({n: shipped[n] for n in (PICTURED if data else BUNDLED_TESTS)}, SIGMA)
    picture(folder / "published" / "pictures.jpg", found, pictured)
    picture(folder / "pictures.jpg", found, noisy(clean, SIGMA))
    choice = best_non_local_means(kept[METHODS[1]].parts.validation[:5])
    about = f"nets for σ = {SIGMA}, seed 0"
    where = f"{len(small)} photographs of {name}"
    return {
        f"Noise that was not trained on ({about}; PSNR, {where})": list(other_noise(found, small)),
        f"Solves cut short ({about}; {where})": list(cut(found, small)),
        f"Sizes ({about}; crops of one photograph, PSNR)": list(sizes(found, largest)),
        f"Cost ({about})": list(cost(found, next(iter(small.values())))),
        f"Each photograph of {name} ({about}; PSNR)": list(
            images(found, noisy(clean, SIGMA), choice)
        ),
        f"scikit-image's photographs in the picture ({about}; PSNR)": list(
            images(found, pictured, choice)
        ),
    }


def all_of(photographs: Photographs) -> dict[str, Tensor]:
    """By name, whether they train or test."""
    together: dict[str, Tensor] = dict(photographs.train)
    for some in photographs.tests.values():
        together |= some
    return together
