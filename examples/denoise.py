"""Denoising photographs: a fixed point of g against one application of the same g.

    python -m examples.denoise [--seconds 60] [--seeds 0] [--out DIR] [--json [FILE]] [--data DIR]

A noisy photograph z gets a 16-channel state x̂ = g(x̂, z) and the estimate z + R x̂, with g two 3×3
convolutions and R one (paper section 3.5, FPI_NN). The feedforward net is z + R g(0, z): the same
g and R, the same initialisation, optimiser, schedule, patches in the same order and the same time
on one core, with the best of three learning rates on the validation part. Every photograph is cut
into columns: the left part trains, a strip validates (whatever is chosen, is chosen there), the
right edge tests; gaps keep them apart.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpi_cuda
from fpi_cuda import Anderson, FixedPointLayer, ImplicitAdjoint, NeuralStep, Picard, Tolerance
from fpi_cuda.contraction import jacobian_norm, jacobian_penalty, jacobian_radius

try:
    import matplotlib
    import matplotlib.pyplot as plt
    import numpy as np
    from skimage import color, data, io, util
    from skimage.restoration import denoise_nl_means
    from tqdm import tqdm

    from benchmarks.machine import facts, slug
except ImportError as error:
    raise SystemExit(
        f"examples.denoise needs {error.name}: pip install matplotlib numpy scikit-image tqdm"
    ) from error

matplotlib.use("Agg")  # files only: no display is needed

SIGMA = 25 / 255
FEEDFORWARD, FIXED_POINT = "feedforward", "FPI_NN"
TRAIN, VALIDATION, TEST = range(3)
Account = dict[str, float]  # steps, seconds of processor time, seconds of wall time
BAR = "{desc}: {percentage:3.0f}%|{bar:30}| {n:.0f}/{total:.0f} s, {elapsed}"

# The photographs that scikit-image itself ships (its others are downloaded at first use).
BUNDLED: dict[str, Callable[[], Any]] = {
    "astronaut": data.astronaut,
    "camera": data.camera,
    "chelsea": data.chelsea,
    "coffee": data.coffee,
    "coins": data.coins,
    "motorcycle": lambda: data.stereo_motorcycle()[0],
    "rocket": data.rocket,
}


@dataclass(frozen=True)
class Recipe:
    """All that was chosen by hand, on the validation part."""

    channels: int = 16
    hidden: int = 32
    readout: int = 3  # its kernel's size
    batch: int = 4
    patch: int = 40
    warmup: int = 20  # steps
    # Early gradients are a hundred times the later ones: uncut and long remembered by Adam, they
    # would hold back a seed that meets large ones for the whole of so short a training.
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 0.03  # the gradient's norm; its median is about 0.01
    rate: float = 2e-3
    feedforward_rates: tuple[float, ...] = (3e-3, 6e-3, 1.2e-2)
    # Training solves and differentiates loosely, for many steps a second; testing does not.
    train_rtol: float = 3e-2
    train_iterations: int = 12
    adjoint_rtol: float = 2e-1
    adjoint_iterations: int = 8
    rtol: float = 1e-3
    iterations: int = 100
    # The spectral radius of ∂g/∂x: its bound, and the weight of passing it.
    bound: float = 0.6
    penalty: float = 0.3
    # NLM: its strength in units of σ, and its patches.
    nlm_strengths: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    nlm_patches: tuple[int, ...] = (3, 5)


RECIPE = Recipe()

# --- photographs -----------------------------------------------------------------------------


def photographs(folder: Path | None = None) -> dict[str, Tensor]:
    """Grey photographs in [0, 1], [H, W] each: scikit-image's own, or the files of a folder."""
    if folder is None:
        sources = BUNDLED
    else:
        kinds = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in kinds)
        if not files:
            raise SystemExit(f"--data: no file in {folder} ends in one of {', '.join(kinds)}")
        # From memory: the reader leaves a file that it can't decode open.
        sources = {p.stem: lambda p=p: io.imread(BytesIO(p.read_bytes())) for p in files}
    out = {}
    for name, read in sources.items():
        try:
            pixels = grey(util.img_as_float32(read()))
        except Exception as error:
            hint = "reinstall scikit-image" if folder is None else "remove or replace the file"
            raise SystemExit(f"photograph {name!r} can't be read ({error}); {hint}") from error
        out[name] = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
    return out


def grey(pixels: Any) -> Any:
    """[H, W] from [H, W], [H, W, 3] or [H, W, 4]."""
    return pixels if pixels.ndim == 2 else color.rgb2gray(pixels[..., :3])


def columns(width: int) -> tuple[slice, slice, slice]:
    """The columns that train, validate and test; at least 8 lie between one and the next."""
    end, gap, validation, test = int(0.55 * width), 8, 48, 96
    parts = slice(0, end), slice(end + gap, end + gap + validation), slice(width - test, width)
    if parts[VALIDATION].stop + gap > parts[TEST].start:
        raise SystemExit(f"a photograph must be at least 354 pixels wide (got {width})")
    return parts


def noisy(clean: Tensor, seed: int) -> Tensor:
    """Clean plus Gaussian noise, the same for the same seed."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return clean + SIGMA * noise


@dataclass(frozen=True)
class Photographs:
    """Train: [H, W] each. Validation and test: clean and noisy, [B, 1, rows, columns]."""

    names: list[str]
    train: list[Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def split(cls, images: dict[str, Tensor]) -> Photographs:
        """Cut every photograph by `columns`; the middle rows validate and test."""
        rows = min(288, *(len(image) for image in images.values()))

        def strips(part: int, seed: int) -> tuple[Tensor, Tensor]:
            cut = []
            for image in images.values():
                top = (len(image) - rows) // 2
                cut.append(image[top : top + rows, columns(image.shape[1])[part]])
            clean = torch.stack(cut)[:, None]
            return clean, noisy(clean, seed)

        train = [image[:, columns(image.shape[1])[TRAIN]] for image in images.values()]
        if rows < RECIPE.patch:
            raise SystemExit(f"a photograph must be at least {RECIPE.patch} pixels high")
        return cls(list(images), train, strips(VALIDATION, 1001), strips(TEST, 1002))


class Patches:
    """Batches of random patches, turned and mirrored, with noise; the same for the same seed."""

    def __init__(self, images: Sequence[Tensor], batch: int, size: int, seed: int) -> None:
        self.images, self.batch, self.size = images, batch, size
        self.generator = torch.Generator().manual_seed(seed)
        self.areas = torch.tensor([float(image.numel()) for image in images])

    def draw(self, n: int) -> int:
        """0, ..., n − 1."""
        return int(torch.randint(n, (), generator=self.generator))

    def patch(self, image: Tensor) -> Tensor:
        """One of the patches of an image, in one of its eight orientations."""
        top, left = (self.draw(n - self.size + 1) for n in image.shape)
        patch = image[top : top + self.size, left : left + self.size].rot90(self.draw(4))
        return patch.flip(0) if self.draw(2) else patch

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Clean and noisy, [batch, 1, size, size]."""
        chosen = torch.multinomial(self.areas, self.batch, True, generator=self.generator)
        clean = torch.stack([self.patch(self.images[i]) for i in chosen.tolist()])[:, None]
        return clean, clean + SIGMA * torch.randn(clean.shape, generator=self.generator)


def psnr(estimate: Tensor, clean: Tensor) -> list[float]:
    """Peak signal-to-noise ratio in dB of each image, cut to [0, 1] where photographs live."""
    error = (estimate.clamp(0, 1) - clean).square().flatten(1).mean(1)
    return (-10 * error.log10()).tolist()


# --- the two nets ----------------------------------------------------------------------------


class Step(nn.Module):
    """G: two convolutions of the state. What z gives, u, is the same in every iteration."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.second = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor | None, u: Tensor) -> Tensor:
        """g(x, u), [B, channels, H, W]; None is x = 0, for which the first convolution gives 0."""
        return self.second(F.relu(u if x is None else u + self.first(x)))


class Denoiser(nn.Module):
    """z + R x̂, with x̂ the fixed point of g or, feedforward, g(0, z); for images of any size."""

    def __init__(self, recipe: Recipe, *, fixed_point: bool) -> None:
        super().__init__()
        self.recipe, self.fixed_point = recipe, fixed_point
        self.lift = nn.Conv2d(1, recipe.hidden, 3, padding=1)
        self.layer = FixedPointLayer(
            NeuralStep(Step(recipe.channels, recipe.hidden)),
            state_shape=lambda u: (recipe.channels, *u.shape[2:]),
            solver=Anderson(history=5),
            adjoint=ImplicitAdjoint(
                tolerance=Tolerance(rtol=recipe.adjoint_rtol),
                max_iterations=recipe.adjoint_iterations,
            ),
            on_failure="return",  # the table counts what did not converge
            per_sample=True,
        )
        self.readout = nn.Conv2d(recipe.channels, 1, recipe.readout, padding=recipe.readout // 2)
        nn.init.zeros_(self.readout.bias)

    def forward(self, z: Tensor) -> Tensor:
        """The estimate, shaped like z, [B, 1, H, W]."""
        u = self.lift(z)
        if not self.fixed_point:
            return z + self.readout(self.layer.g(None, u))
        r = self.recipe
        self.layer.tolerance = Tolerance(rtol=r.train_rtol if self.training else r.rtol)
        self.layer.max_iterations = r.train_iterations if self.training else r.iterations
        return z + self.readout(self.layer(u))


@dataclass(frozen=True)
class Job:
    """One training; the seed sets the initialisation, the patches and their noise."""

    fixed_point: bool
    rate: float
    seed: int

    def net(self) -> Denoiser:
        """The net before training."""
        torch.manual_seed(self.seed)
        return Denoiser(RECIPE, fixed_point=self.fixed_point)


@torch.no_grad()
def denoise(net: Denoiser, z: Tensor) -> Tensor:
    """The net's estimate, at the test's tolerance."""
    net.eval()
    estimate = net(z)
    net.train()
    return estimate


done: Any  # seconds that each training has had; shared by the processes


def share(values: Any) -> None:
    """Start a worker: where to tell how far it is."""
    global done  # noqa: PLW0603 - the one way into a pool's workers
    done = values


def train(
    images: list[Any], seconds: float, job: Job, index: int
) -> tuple[dict[str, Any], Account]:
    """Train one net for that long; its parameters, as arrays, and what it took."""
    torch.set_num_threads(1)
    recipe = RECIPE
    net = job.net()
    optimiser = torch.optim.Adam(net.parameters(), lr=job.rate, betas=recipe.betas)
    patches = Patches([torch.from_numpy(i) for i in images], recipe.batch, recipe.patch, job.seed)
    # The one thread's own time: wall time on an idle machine, and fair on a busy one.
    wall, start, elapsed, steps, v = time.perf_counter(), time.process_time(), 0.0, 0, None
    while elapsed < seconds:
        # Whatever the machine and the net, the schedule ends with the time.
        decay = 0.5 + 0.5 * math.cos(math.pi * elapsed / seconds)
        optimiser.param_groups[0]["lr"] = job.rate * decay * min(1, (steps + 1) / recipe.warmup)
        clean, z = patches()
        loss = F.mse_loss(net(z), clean)
        if job.fixed_point:
            # One sample is enough: the penalty is there in every step.
            x, u = net.layer.last.x[:1], net.lift(z[:1])
            penalty, v = jacobian_penalty(net.layer.g, x, u, bound=recipe.bound, v=v)
            loss = loss + recipe.penalty * penalty
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
        optimiser.step()
        steps += 1
        elapsed = time.process_time() - start
        done[index] = min(elapsed, seconds)
    parameters = {name: value.numpy() for name, value in net.state_dict().items()}
    return parameters, {"steps": steps, "seconds": elapsed, "wall": time.perf_counter() - wall}


def train_all(
    photos: Photographs, seconds: float, jobs: Sequence[Job]
) -> list[tuple[Denoiser, Account]]:
    """Every job's net and what it took: one process and one thread each, as many at once as cores.

    Two threads make such a small step hardly faster; two processes make twice the steps.
    """
    images = [image.numpy() for image in photos.train]
    workers = min(len(jobs), cores())
    title = f"seed {jobs[0].seed}: {len(jobs)} trainings, {workers} at once"
    context = multiprocessing.get_context("spawn")
    progress = context.Array("d", len(jobs))
    with (
        ProcessPoolExecutor(workers, context, share, (progress,)) as pool,
        tqdm(total=seconds * len(jobs), desc=title, bar_format=BAR) as bar,
    ):
        futures = [pool.submit(train, images, seconds, job, i) for i, job in enumerate(jobs)]
        waiting = set(futures)
        while waiting:
            _, waiting = wait(waiting, timeout=0.5)
            bar.update(sum(progress) - bar.n)
        results = [future.result() for future in futures]
    out = []
    for job, (parameters, account) in zip(jobs, results, strict=True):
        net = job.net()
        net.load_state_dict({name: torch.from_numpy(value) for name, value in parameters.items()})
        out.append((net, account))
    return out


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- the comparison --------------------------------------------------------------------------


def nlm(z: Tensor, strength: float, patch: int) -> Tensor:
    """Non-local means, which learns nothing, given the true σ."""
    options = {"patch_size": patch, "patch_distance": 7, "h": strength * SIGMA, "sigma": SIGMA}
    images = [denoise_nl_means(image, **options) for image in z[:, 0].numpy()]
    return torch.from_numpy(np.stack(images))[:, None]


def best_nlm(photos: Photographs) -> tuple[Tensor, dict[str, float]]:
    """NLM's estimate of the test images, and the parameters: the best on the validation part."""
    clean, z = photos.validation
    grid = [(h, patch) for h in RECIPE.nlm_strengths for patch in RECIPE.nlm_patches]
    scores = [
        mean(psnr(nlm(z, *choice), clean))
        for choice in tqdm(grid, desc="NLM's parameters", leave=False)
    ]
    strength, patch = grid[scores.index(max(scores))]
    return nlm(photos.test[1], strength, patch), {"strength": strength, "patch": patch}


@dataclass
class Fight:
    """What one seed gave: the fixed-point net, both estimates of the test images, the figures."""

    net: Denoiser
    estimates: dict[str, Tensor]
    record: dict[str, Any]


def fight(photos: Photographs, seconds: float, seed: int) -> Fight:
    """Train both nets from one seed, the feedforward one at each rate, and test them."""
    jobs = [Job(True, RECIPE.rate, seed)]
    jobs += [Job(False, rate, seed) for rate in RECIPE.feedforward_rates]
    trained = train_all(photos, seconds, jobs)
    scores = [validate(net, photos) for net, _ in trained]
    best = max(range(1, len(jobs)), key=lambda i: scores[i])
    (net, account), (feedforward, feedforward_account) = trained[0], trained[best]

    clean, z = photos.test
    estimates = {FEEDFORWARD: denoise(feedforward, z), FIXED_POINT: denoise(net, z)}
    solution = net.layer.last
    assert solution is not None and isinstance(solution.x, Tensor)
    size = torch.linalg.vector_norm(solution.x.flatten(1), dim=1)
    with torch.no_grad():
        at = net.layer.g, solution.x, net.lift(z)
        norm, _ = jacobian_norm(*at, iterations=20)
        radius, _ = jacobian_radius(*at, iterations=40)
    record = {
        "seed": seed,
        "psnr": {name: psnr(estimate, clean) for name, estimate in estimates.items()},
        "validation_psnr": {
            FIXED_POINT: scores[0],
            FEEDFORWARD: dict(zip(RECIPE.feedforward_rates, scores[1:], strict=True)),
        },
        "rate": {FEEDFORWARD: jobs[best].rate, FIXED_POINT: RECIPE.rate},
        "training": {FEEDFORWARD: feedforward_account, FIXED_POINT: account},
        "iterations": solution.iterations.tolist(),
        "converged": solution.converged.tolist(),
        "relative_residual": (solution.residual_norm / size).tolist(),
        "jacobian_norm": norm.tolist(),
        "jacobian_radius": radius.tolist(),
    }
    return Fight(net, estimates, record)


def validate(net: Denoiser, photos: Photographs) -> float:
    """Mean PSNR on the validation part."""
    clean, z = photos.validation
    return mean(psnr(denoise(net, z), clean))


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean PSNR of both nets and the fixed point's margin: mean and deviation over the seeds."""
    scores = {name: [mean(r["psnr"][name]) for r in records] for name in (FEEDFORWARD, FIXED_POINT)}
    scores["margin"] = [b - a for a, b in zip(*scores.values(), strict=True)]
    out: dict[str, Any] = {
        name: {
            "seeds": values,
            "mean": mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
        }
        for name, values in scores.items()
    }
    out["converged"] = mean([float(c) for r in records for c in r["converged"]])
    return out


# --- what is printed and drawn ---------------------------------------------------------------


def table(names: Sequence[str], psnrs: dict[str, list[float]], record: dict[str, Any]) -> str:
    """PSNR of each method and the solve's account, one line a test image, then the mean."""
    heads = [*psnrs, "margin", "iterations", "residual", "converged"]
    margin = [b - a for a, b in zip(psnrs[FEEDFORWARD], psnrs[FIXED_POINT], strict=True)]
    rows = list(
        zip(
            *psnrs.values(),
            margin,
            record["iterations"],
            record["relative_residual"],
            record["converged"],
            strict=True,
        )
    )
    rows.append(tuple(mean([float(v) for v in column]) for column in zip(*rows, strict=True)))
    formats = [*["{:.2f}"] * len(psnrs), "{:+.2f}", "{:.0f}", "{:.1e}", "{:.0%}"]
    lines = [f"{'PSNR, dB':<12}" + "".join(f"{head:>13}" for head in heads)]
    for name, row in zip([*names, "mean"], rows, strict=True):
        cells = [form.format(value) for form, value in zip(formats, row, strict=True)]
        lines.append(f"{name[:12]:<12}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def draw_picture(path: Path, photos: Photographs, estimates: dict[str, Tensor]) -> None:
    """One row a test image: noisy, both estimates, clean."""
    clean, z = photos.test
    shown = {"noisy": z, **estimates, "clean": clean}
    side = clean.shape[-1]
    top = (clean.shape[-2] - side) // 2
    fig, axes = plt.subplots(
        len(photos.names), len(shown), figsize=(9, 2.3 * len(photos.names)), squeeze=False
    )
    for row, name in enumerate(photos.names):
        for axis, (what, images) in zip(axes[row], shown.items(), strict=True):
            image = images[row : row + 1]
            axis.imshow(image[0, 0, top : top + side].clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            score = "" if what == "clean" else f"{psnr(image, clean[row : row + 1])[0]:.2f} dB"
            axis.set_xlabel(score, fontsize=8)
            if row == 0:
                axis.set_title(what, fontsize=10)
        axes[row, 0].set_ylabel(name, fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


@torch.no_grad()
def residuals(net: Denoiser, z: Tensor, solver: Picard | Anderson, iterations: int) -> Tensor:
    """‖g(x) − x‖ / ‖g(x)‖ of every iterate, [iterations, B]; no sample stops."""
    g, u = net.layer.g, net.lift(z)
    rows: list[Tensor] = []

    def watched(x: Tensor, u: Tensor) -> Tensor:
        gx = g(x, u)
        size = torch.linalg.vector_norm(gx.flatten(1), dim=1)
        rows.append(torch.linalg.vector_norm((gx - x).flatten(1), dim=1) / size)
        return gx

    x0 = z.new_zeros(len(z), net.recipe.channels, *z.shape[2:])
    fpi_cuda.fixed_point(
        watched,
        x0,
        u,
        solver=solver,
        tolerance=Tolerance(0, 0),
        max_iterations=iterations,
        per_sample=False,
        on_failure="return",
    )
    return torch.stack(rows)


def draw_convergence(path: Path, photos: Photographs, net: Denoiser) -> None:
    """The residual of every test image against the iterations, Picard and Anderson."""
    fig, axis = plt.subplots(figsize=(6.4, 4.2))
    for solver, colour in ((Picard(), "tab:orange"), (net.layer.solver, "tab:blue")):
        curves = residuals(net, photos.test[1], solver, 60)
        steps = range(1, len(curves) + 1)
        label = f"{type(solver).__name__}, {len(photos.names)} test images"
        for i, curve in enumerate(curves.T.tolist()):
            axis.semilogy(steps, curve, color=colour, lw=1, alpha=0.7, label=None if i else label)
    axis.axhline(net.recipe.rtol, color="black", lw=0.8, ls=":", label="tolerance of the test")
    axis.set_xlabel("iteration k")
    axis.set_ylabel("‖g(x) − x‖ / ‖g(x)‖")
    axis.grid(alpha=0.3)
    axis.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


# --- the program -----------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Run every seed, print, draw and write, as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.denoise", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--seconds", type=float, default=60, help="of one core, for each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("build/denoise"), help="for the pictures")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path("benchmarks/results") / slug("cpu") / "denoise.json",
        help="write all figures (without FILE: where the results of this machine are)",
    )
    parser.add_argument("--data", type=Path, help="photographs to use instead of scikit-image's")
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds must be > 0 (got {options.seconds:g})")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data: no folder {options.data}")
    options.out.mkdir(parents=True, exist_ok=True)

    photos = Photographs.split(photographs(options.data))
    clean, z = photos.test
    nlm_estimate, nlm_choice = best_nlm(photos)
    fixed = {"noisy": psnr(z, clean), "NLM": psnr(nlm_estimate, clean)}
    fights = []
    for seed in options.seeds:
        fights.append(fight(photos, options.seconds, seed))
        record = fights[-1].record
        print(f"\nseed {seed}, {options.seconds:g} s each")
        print(table(photos.names, {**fixed, **record["psnr"]}, record), flush=True)

    records = [f.record for f in fights]
    result = {
        **facts("cpu"),
        "command": shlex.join(["python", "-m", "examples.denoise", *map(str, arguments)]),
        "seconds": options.seconds,
        "threads_a_training": 1,
        "trainings_at_once": min(cores(), 1 + len(RECIPE.feedforward_rates)),
        "sigma": SIGMA,
        "recipe": asdict(RECIPE),
        "images": photos.names,
        "nlm": nlm_choice,
        "psnr": fixed,
        "summary": {**{k: {"mean": mean(v)} for k, v in fixed.items()}, **summarise(records)},
        "seeds": records,
    }
    if len(records) > 1:
        print(f"\n{len(records)} seeds, mean ± standard deviation")
        for name in (FEEDFORWARD, FIXED_POINT, "margin"):
            print("{0:<12} {mean:.3f} ± {std:.3f} dB".format(name, **result["summary"][name]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    picture, convergence = options.out / "denoise.png", options.out / "convergence.png"
    draw_picture(picture, photos, fights[0].estimates)
    draw_convergence(convergence, photos, fights[0].net)
    written = [picture, convergence, *([options.json] if options.json else [])]
    print("\nwritten: " + ", ".join(str(path.resolve()) for path in written))


if __name__ == "__main__":
    main(sys.argv[1:])
