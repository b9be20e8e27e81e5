"""Time of a model with a layer under torch.compile, by that of the eager model, as a table.

    python -m benchmarks.compiled [--sizes 4x4 64x64 256x128] [--seconds 6]

The model is linear, layer norm, GELU; the layer; a residual, layer norm, linear; float32. g is two
linear layers with tanh, or a `DenseStep`. A size is samples x values. Beside it the same model
without the layer: what torch.compile itself costs and saves there. Values and gradients are checked
before anything is timed; both take turns; times are medians of processor time on one thread, of a
forward without gradients ("infer") and of forward and backward ("train").
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fpi_cuda import DenseStep, FixedPointLayer


class Opaque(nn.Module):
    """Two linear layers that no kernel knows."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.x, self.z = nn.Linear(n, n), nn.Linear(n, n)
        with torch.no_grad():
            self.x.weight.mul_(0.8 / torch.linalg.matrix_norm(self.x.weight, 2))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.x(x) + self.z(z))


class Model(nn.Module):
    """The layer between what a compiler fuses."""

    def __init__(self, n: int, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.layer = nn.Linear(n, n), nn.LayerNorm(n), layer
        self.then, self.last = nn.LayerNorm(n), nn.Linear(n, n)

    def forward(self, t: Tensor) -> Tensor:
        z = nn.functional.gelu(self.norm(self.first(t)))
        y: Tensor = self.last(self.then(self.layer(z) + z))
        return y


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "no layer": lambda n: nn.Identity(),
    "two linear layers": lambda n: FixedPointLayer(Opaque(n), per_sample=True),
    "DenseStep": lambda n: FixedPointLayer(DenseStep(n, n)),
}


def train(call: Callable[[Tensor], Tensor], t: Tensor, model: nn.Module) -> list[Tensor]:
    y = call(t)
    return [y, *torch.autograd.grad(y.square().sum(), [*model.parameters()])]


def infer(call: Callable[[Tensor], Tensor], t: Tensor, model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [call(t)]


def rows(name: str, b: int, n: int, seconds: float) -> list[str]:
    """A line for inference and one for training."""
    torch.manual_seed(n)
    torch.compiler.reset()
    model, t = Model(n, LAYERS[name](n)), torch.randn(b, n)
    call = torch.compile(model, fullgraph=True, dynamic=False)
    lines = []
    for what in (infer, train):
        for mine, true in zip(what(call, t, model), what(model, t, model), strict=True):
            torch.testing.assert_close(
                mine, true, rtol=1e-2, atol=1e-3 * float(true.detach().abs().max())
            )
        times: tuple[list[float], list[float]] = ([], [])
        end = time.process_time() + seconds / 2
        while time.process_time() < end or len(times[0]) < 20:
            for f, taken in zip((model, call), times, strict=True):
                start = time.process_time()
                for _ in range(4):
                    what(f, t, model)
                taken.append((time.process_time() - start) / 4)
        eager, compiled = (1e6 * statistics.median(taken[3:]) for taken in times)
        lines.append(
            f"| {b} x {n} | {name} | {what.__name__} | {eager:.0f} | {compiled:.0f} "
            f"| {compiled - eager:+.0f} | {compiled / eager:.2f} |"
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description="Models with a layer, compiled and eager."
    )
    parser.add_argument("--sizes", nargs="+", default=["4x4", "64x64", "256x128"])
    parser.add_argument("--seconds", type=float, default=6.0, help="of each model")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| B x N | g | what | eager, µs | compiled, µs | difference | ratio |")
    print("|---|---|---|---|---|---|---|")
    for size in given.sizes:
        b, n = map(int, size.split("x"))
        for name in LAYERS:
            print(*rows(name, b, n, given.seconds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
