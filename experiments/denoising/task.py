"""Denoising (paper section 4.1, Table 1): a fixed point of g against g applied once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from fpi_cuda import Anderson, ConvStep, FixedPointLayer, ImplicitAdjoint, Tolerance
from fpi_cuda.contraction import jacobian_penalty

from ..layers import UnrolledConvolutions
from ..solves import Solves
from ..task import Batch, Figures, Parts, Settings, Task
from .photographs import NOISE, Noisy, Patches, psnr, read

Options = Mapping[str, Any]


class Denoiser(nn.Module):
    """z + R x̂ with x̂ = g(x̂, z) of several channels, for images of any size.

    Args:
        options: of the settings.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        channels = int(options["channels"])
        g = ConvStep(channels, 1, hidden=(int(options["hidden"]),))
        self.layer: nn.Module
        if options["layer"] == "unrolled":
            self.layer = UnrolledConvolutions(g, int(options["steps"]))
        else:
            self.layer = FixedPointLayer(
                g,
                solver=Anderson(history=5),
                adjoint=ImplicitAdjoint(
                    tolerance=Tolerance(rtol=options["adjoint_rtol"]),
                    max_iterations=int(options["adjoint_iterations"]),
                ),
                on_failure="return",  # what did not converge is counted
            )
        self.readout = nn.Conv2d(channels, 1, 3, padding=1)
        nn.init.zeros_(self.readout.bias)
        patch = int(options["patch"])
        # Kept with the weights, so that a run that goes on has it too.
        self.register_buffer("v", torch.randn(1, channels, patch, patch))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate, shaped like z [B, 1, H, W], and a penalty, which is 0 unless training.

        The penalty keeps the spectral radius of ∂g/∂x below a bound; it is looked at for one
        sample of a batch, at its fixed point.
        """
        layer, options = self.layer, self.options
        if not isinstance(layer, FixedPointLayer):
            return z + self.readout(layer(z)), z.new_zeros(())
        layer.tolerance = Tolerance(rtol=options["train_rtol" if self.training else "rtol"])
        layer.max_iterations = int(options["train_iterations" if self.training else "iterations"])
        x = layer(z)
        if not self.training:
            return z + self.readout(x), z.new_zeros(())
        penalty, v = jacobian_penalty(
            layer.g, x[:1].detach(), z[:1], bound=options["bound"], v=self.v
        )
        self.v.copy_(v)
        return z + self.readout(x), options["penalty"] * penalty


OPTIONS = {
    "sigma": 25.0,
    "channels": 16,
    "hidden": 32,
    "patch": 40,
    "patches": 4000,  # an epoch
    "validation": 20,  # photographs
    "tests": 0,  # photographs a set; 0: all
    # Training solves and differentiates loosely, for many steps a second; testing does not.
    "train_rtol": 3e-2,
    "train_iterations": 12,
    "adjoint_rtol": 2e-1,
    "adjoint_iterations": 8,
    "rtol": 1e-3,
    "iterations": 100,
    # The spectral radius of ∂g/∂x: its bound, and the weight of passing it.
    "bound": 0.6,
    "penalty": 0.3,
    "layer": "ours",
    "steps": 0,
}
FEEDFORWARD = {"layer": "unrolled", "steps": 1}
SIGMAS = (25, 15, 20)
# A method and what of its options is not as above.
METHODS: dict[str, dict[str, Any]] = {
    f"{name}-{sigma}{more}": {"sigma": float(sigma)} | options
    for sigma in SIGMAS
    for name, more, options in (
        ("FPI_NN", "", {}),
        ("feedforward", "", FEEDFORWARD),
        ("feedforward", "-steps", FEEDFORWARD),
        ("unrolled", "", {"layer": "unrolled", "steps": 5}),
    )
    if name != "unrolled" or sigma == 25
}


class Denoise(Task):
    """Gray photographs, sigma in 255ths: patches of Train400 train, BSD68 and Set12 test."""

    name = "denoise"
    score = "PSNR"
    needs_data = False
    methods = tuple(METHODS)
    groups: Mapping[str, Sequence[str]] = {
        str(sigma): [m for m in METHODS if f"-{sigma}" in m] for sigma in sorted(SIGMAS)
    }
    pairs = tuple(
        (f"FPI_NN-{options['sigma']:.0f}", method)
        for method, options in METHODS.items()
        if "layer" in options
    )

    def settings(self, method: str) -> Settings:
        feedforward = METHODS[method].get("steps") == 1
        return Settings(
            method,
            epochs=8,
            patience=0,
            batch=4,
            learning_rate=6e-3 if feedforward else 4e-3,
            schedule="cosine",
            warmup=20,
            # Early gradients are a hundred times the later ones: uncut and long remembered by
            # Adam, they would hold back a seed that meets large ones.
            beta2=0.99,
            clip=0.03,
            options=OPTIONS | METHODS[method],
        )

    def quick(self, settings: Settings) -> Settings:
        small = {"patches": 160, "validation": 2, "tests": 1}
        return replace(settings.with_values(**small), epochs=2)

    def grid(self, method: str) -> Mapping[str, Sequence[Any]]:
        middle = self.settings(method).learning_rate
        return {"learning_rate": (middle / 2, middle, 2 * middle)}

    def as_long_as(self, method: str) -> str | None:
        fixed_point = f"FPI_NN-{METHODS[method]['sigma']:.0f}"
        return None if method == fixed_point or method.endswith("-steps") else fixed_point

    def load(self, data: Path | None, settings: Settings, work: Path) -> Parts:
        options, found = settings.options, read(data)
        names = list(found.train)
        order = torch.randperm(
            len(names), generator=torch.Generator().manual_seed(settings.seed)
        ).tolist()
        held = min(int(options["validation"]), max(1, len(names) // 5))
        train = [found.train[names[i]] for i in order[held:]]
        validation = noisy({names[i]: found.train[names[i]] for i in order[:held]}, options, 1000)
        tests = {name: noisy(some, options, NOISE) for name, some in found.tests.items()}
        return Parts(Patches.of(train, int(options["patches"])), validation, tests)

    def model(self, settings: Settings, parts: Parts) -> nn.Module:
        return Denoiser(settings.options)

    def batch(self, samples: Patches, settings: Settings, generator: torch.Generator) -> Batch:
        clean = samples.cut(int(settings.options["patch"]), generator)
        noise = torch.randn(clean.shape, generator=generator)
        return clean, clean + settings.options["sigma"] / 255 * noise

    def losses(self, model: nn.Module, batch: Batch, settings: Settings) -> Tensor:
        clean, z = batch
        estimate, penalty = model(z)
        return (estimate - clean).square().flatten(1).mean(1) + penalty

    def validate(self, model: nn.Module, samples: Sequence[Noisy], device: torch.device) -> Figures:
        return {"PSNR": mean(psnr(x, y).item() for x, y in estimates(model, samples, device))}

    def test(
        self,
        model: nn.Module,
        samples: Mapping[str, Sequence[Noisy]],
        device: torch.device,
        validated: Figures,
    ) -> Figures:
        figures, counts = {}, Solves()
        for name, some in samples.items():
            values = []
            for estimate, clean in estimates(model, some, device):
                values.append(psnr(estimate, clean).item())
                counts.add(model)
            figures[name] = mean(values)
        return figures | counts.figures()


def noisy(some: Mapping[str, Tensor], options: Options, seed: int) -> list[Noisy]:
    """With noise that depends on the photograph's place alone."""
    chosen = list(some.items())[: int(options["tests"]) or None]
    return [
        Noisy.of(name, clean, options["sigma"], seed + i) for i, (name, clean) in enumerate(chosen)
    ]


@torch.no_grad()
def estimates(
    model: nn.Module, samples: Sequence[Noisy], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The estimate and the clean photograph, [1, 1, H, W] each, one after the other.

    One at a time: sizes differ, and on the CPU a photograph fills the caches alone.
    """
    for sample in samples:
        estimate, _ = model(sample.noisy[None, None].to(device))
        yield estimate.float(), sample.clean[None, None].to(device)
