"""How the convolution kernels are laid over a device: a table, and a rule for what it lacks.

The table, configs.json beside this file, is what `python -m fpi_cuda.backends.triton.tune` measured
on devices; nothing is tuned at run time. Neither the batch nor how much of it is active chooses a
config, so a sample's bits do not depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

__all__ = ["PRECISIONS", "Config", "Shape", "choose", "read", "rule", "write"]

TABLE = Path(__file__).with_name("configs.json")

# Bytes a value of each precision; "tf32" and "float32" are two ways to multiply float32.
PRECISIONS = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4, "float64": 8}

MOST_FUSED = 64  # channels of a fused layer
MOST_PACKED = 4  # input channels whose taps lie one after another: padding each would be most of it
# Of a multiprocessor's programs together, bytes of hidden layers: so that they stay in its L1 cache
# (192 KiB on the A100, 256 KiB on the H100, shared memory included).
MOST_SCRATCH = 176 * 2**10
REGISTERS = 65536  # of a multiprocessor, and
MOST_REGISTERS = 255  # of a thread
# Pixels computed over pixels kept, of the worst hidden layer: beyond, single layers are cheaper.
MOST_RECOMPUTED = 2.0


@dataclass(frozen=True)
class Shape:
    """What a config is looked up by, besides precision and device.

    Attributes:
        channels: (C, O_1, ..., C).
        kernels: the size of each layer's kernel.
    """

    channels: tuple[int, ...]
    kernels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.kernels) + 1:
            raise ValueError(
                f"a shape of {len(self.kernels)} kernels has one more entry in channels, "
                f"got {self.channels}"
            )


@dataclass(frozen=True)
class Config:
    """How a step runs.

    Attributes:
        fused: all layers in one kernel, or each by itself.
        tile: height and width, in pixels, of what a program computes at a time. Unfused: powers
            of two.
        pixels: of the tile, that are multiplied at a time (fused).
        inputs: most channels of the input that are multiplied at a time.
        outputs: likewise of the output (unfused).
        warps: of a program.
        stages: of the compiler's pipeline, which copies operands to shared memory past L1; 1: none,
            and they go through L1 and registers, a step ahead.
        blocks: programs a multiprocessor, at a time.
    """

    fused: bool
    tile: tuple[int, int]
    pixels: int = 128
    inputs: int = 32
    outputs: int = 64
    warps: int = 4
    stages: int = 1
    blocks: int = 2

    @property
    def registers(self) -> int | None:
        """Most of a thread, so that a multiprocessor has room for that many programs.

        The compiler knows nothing of the plan and takes a few more where it may. A warp's registers
        are given in pieces of 256, so a thread's in eights. None: there is room whatever it takes,
        and a limit would only make it take more, and spill.
        """
        fair = REGISTERS // (self.blocks * self.warps * 32) // 8 * 8
        return fair if fair <= MOST_REGISTERS else None


def padded(channels: int) -> int:
    """The power of two, 16 or more, that a narrow layer's channels are padded to."""
    return max(16, 1 << (channels - 1).bit_length())


def scratch_values(shape: Shape, tile: tuple[int, int]) -> int:
    """Values that a program's hidden layers have, halo and padding included."""
    return sum(
        height * width * padded(channels)
        for (height, width), channels in zip(
            _hidden_tiles(shape, tile), shape.channels[1:-1], strict=True
        )
    )


def recomputed(shape: Shape, tile: tuple[int, int]) -> float:
    """Pixels that the first layer computes over those that it would unfused."""
    height, width = _hidden_tiles(shape, tile)[0]
    return height * width / (tile[0] * tile[1])


def _hidden_tiles(shape: Shape, tile: tuple[int, int]) -> list[tuple[int, int]]:
    around = [sum(k - 1 for k in shape.kernels[layer:]) for layer in range(1, len(shape.kernels))]
    return [(tile[0] + a, tile[1] + a) for a in around]


def can_fuse(shape: Shape) -> bool:
    """Whether the fused kernel takes these layers."""
    return len(shape.kernels) in (2, 3) and max(shape.channels) <= MOST_FUSED


def rule(shape: Shape, precision: str) -> Config:
    """The config where the table has none: by bytes and registers as counted, nothing measured."""
    products = _PRODUCTS[precision]
    if can_fuse(shape):
        if products["pixels"] > 64 and _spills(shape):
            products = {**products, "pixels": 64}
        most = MOST_SCRATCH // products["blocks"]
        for tile in ((16, 32), (8, 32), (8, 16)):
            small = scratch_values(shape, tile) * PRECISIONS[precision] <= most
            if small and recomputed(shape, tile) <= MOST_RECOMPUTED:
                return Config(True, tile, **products)
    if precision in ("float32", "float64"):
        return Config(False, (4, 16), outputs=32, inputs=16, stages=2, blocks=3)
    tile = (4, 16) if precision == "tf32" else (8, 16)  # of which wide layers would spill
    return Config(False, tile, **{**products, "warps": 4, "blocks": 2})


def _spills(shape: Shape) -> bool:
    """Whether blocks of 128 pixels would keep more of the threads' values in memory than a few.

    So it was compiled: two layers of 64 outputs, or all taps of a large kernel at once.
    """
    wide = [channels for channels in shape.channels[1:] if padded(channels) == MOST_FUSED]
    taps_at_once = shape.kernels[0] > 3 and shape.channels[0] <= MOST_PACKED
    return len(wide) > 1 or taps_at_once


# Blocks that leave the fused kernel's threads registers enough on every architecture, all but a
# few. Products that no tensor core makes are unrolled, so their blocks are small.
_PRODUCTS: dict[str, dict[str, int]] = {
    "bfloat16": {"pixels": 128, "warps": 8, "blocks": 2},
    "float16": {"pixels": 128, "warps": 8, "blocks": 2},
    "tf32": {"pixels": 64, "inputs": 16, "blocks": 3},
    "float32": {"pixels": 64, "inputs": 16, "blocks": 2},
    "float64": {"pixels": 64, "inputs": 16, "warps": 8, "stages": 2, "blocks": 1},
}


def choose(shape: Shape, precision: str, capability: int | None) -> Config:
    """The config for a device: of the table where it was measured, else by the rule.

    Args:
        shape: of the layers.
        precision: a name of `PRECISIONS`.
        capability: the device's, as 90 for 9.0; None: no device, the interpreter.
    """
    key = (shape, precision, capability)
    return _table().get(key) or rule(shape, precision)


@cache  # one entry; whoever writes the table in this process calls _table.cache_clear()
def _table() -> dict[tuple[Shape, str, int | None], Config]:
    return read(TABLE)


def read(path: Path) -> dict[tuple[Shape, str, int | None], Config]:
    """The table in a file as `write` makes it."""
    return {
        (
            Shape(tuple(entry["channels"]), tuple(entry["kernels"])),
            entry["precision"],
            entry["capability"],
        ): Config(**{**entry["config"], "tile": tuple(entry["config"]["tile"])})
        for entry in json.loads(path.read_text())
    }


def write(path: Path, table: dict[tuple[Shape, str, int | None], Config]) -> None:
    """Write a table, an entry a line, so that a change shows as one."""
    lines: Sequence[str] = [
        json.dumps(
            {
                "channels": shape.channels,
                "kernels": shape.kernels,
                "precision": precision,
                "capability": capability,
                "config": asdict(config),
            }
        )
        for (shape, precision, capability), config in table.items()
    ]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")
