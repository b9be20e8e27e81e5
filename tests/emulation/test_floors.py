"""The table of dense steps in docs/floors.md is what csrc/cuda/dense_plan.h gives.

`python tests/emulation/test_floors.py` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from machine import HERE, Machine

PAGE = HERE.parents[1] / "docs" / "floors.md"
CASES = [
    *((256, 128, None), (1024, 256, None), (2112, 256, None), (4096, 256, None)),
    *((64, 1024, None), (4096, 64, None)),
    *((32, 159, 200), (512, 159, 200), (2515, 159, 200)),
]
PRODUCTS = {"float32": (4, False), "tf32": (4, True), "bfloat16": (2, True)}
# An H200.
MULTIPROCESSORS, SHARED, RESERVED = 132, 227 << 10, 1 << 10  # bytes of a block; beside each block
MHZ, L2 = 1755, 5.5e6  # bytes a µs
FLOP = {"float32": 67e6, "tf32": 494e6, "bfloat16": 989e6}  # a µs
WAVEFRONT = 128  # bytes
COLUMNS = (
    "B × N (× H)",
    "product",
    "slots",
    "blocks",
    "at once",
    "shared, KiB",
    "stay",
    "passes",
    "MFLOP",
    "done",
    "L2, MB",
    "floor, FLOP, µs",
    "floor, L2, µs",
    "floor, reads, µs",
    "**floor, µs**",
)


def up(a: int, b: int) -> int:
    return -(-a // b)


@dataclass
class Layer:
    """A product of a block's rows, all of them active."""

    k: int
    n: int
    kept: int
    tile: tuple[int, int]
    slab: int

    def passes(self, kept: int) -> int:
        return up(kept, self.slab) + up(self.n - kept, self.slab)

    def tiles(self, rows: int) -> int:
        """Of warps; the last of the rows that stay, and of those that stream, may be ragged."""
        high, wide = self.tile
        return up(rows, high) * (up(self.kept, wide) + up(self.n - self.kept, wide))


def wavefronts(tile: tuple[int, int], is_matrix: bool) -> float:
    """Of shared memory, by which a warp reads 16 bytes of k of its tile's rows and columns."""
    high, wide = tile
    if is_matrix:
        return (high + wide) * 16 / WAVEFRONT
    return high + wide * 16 / WAVEFRONT  # all lanes read a row's at once


def line(machine: Machine, b: int, n: int, hidden: int | None, product: str) -> tuple[str, ...]:
    size, is_matrix = PRODUCTS[product]
    planned = torch.zeros(6, dtype=torch.int64)
    machine.call(
        "dense_plan",
        {"plan": planned},
        n=n,
        hidden=-1 if hidden is None else hidden,
        value_bytes=size,
        history=1,
        tf32=+is_matrix,
        samples=b,
        slots=0,
        multiprocessors=MULTIPROCESSORS,
        shared_limit=SHARED,
    )
    slots, kept_hidden, kept, is_shared, shared, _ = planned.tolist()
    assert is_shared
    at_once = 2 if is_matrix and 2 * (shared + RESERVED) <= SHARED + RESERVED else 1
    blocks = up(b, slots)
    assert blocks <= at_once * MULTIPROCESSORS
    layers = []
    for k, columns, stays in [(n, hidden, kept_hidden), (n if hidden is None else hidden, n, kept)]:
        if columns is not None:
            tile = torch.zeros(3, dtype=torch.int64)
            numbers = {"is_matrix": +is_matrix, "rows": slots, "columns": columns}
            machine.call("product_tile", {"tile": tile}, **numbers)
            high, wide, slab = tile.tolist()
            layers.append(Layer(k, columns, stays, (high, wide), slab))
    useful = 2 * b * sum(layer.k * layer.n for layer in layers)
    chunk = 32 // size
    done = blocks * sum(
        2 * up(p.k, chunk) * chunk * p.tiles(slots) * p.tile[0] * p.tile[1] for p in layers
    )
    streamed = blocks * size * sum((p.n - p.kept) * up(p.k, chunk) * chunk for p in layers)
    reads = sum(p.tiles(slots) * up(p.k, chunk) * 2 * wavefronts(p.tile, is_matrix) for p in layers)
    reached = min(blocks, MULTIPROCESSORS) / MULTIPROCESSORS
    floors = (
        done / reached / FLOP[product],
        streamed / reached / L2,
        reads * up(blocks, MULTIPROCESSORS) / MHZ,
    )
    return (
        f"{b} × {n}" + ("" if hidden is None else f" × {hidden}"),
        product,
        str(slots),
        str(blocks),
        str(at_once),
        f"{shared / 1024:.0f}",
        ", ".join(f"{p.kept}/{p.n}" for p in reversed(layers)),
        ", ".join(f"{p.passes(p.kept)}/{p.passes(0)}" for p in reversed(layers)),
        f"{useful / 1e6:.1f}",
        f"{done / 1e6:.1f}",
        f"{streamed / 1e6:.1f}",
        *(f"{floor:.2f}" for floor in floors),
        f"**{max(floors):.2f}**",
    )


def table() -> list[str]:
    machine = Machine("sanitized")
    try:
        lines = [line(machine, *case, product) for case in CASES for product in PRODUCTS]
    finally:
        machine.close()
    return [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *lines)]


def test_the_page_has_the_figures_of_the_plans():
    assert "\n".join(table()) in PAGE.read_text()


if __name__ == "__main__":
    print("\n".join(table()))
