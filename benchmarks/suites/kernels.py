"""kernels: one step's bytes against the machine's copy, and the roofs that hold for all kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch

from fpi_cuda.backends import native
from fpi_cuda.record import Limits, Progress

from .. import ceilings
from ..clock import interleave
from ..methods import HISTORY
from ..records import Row
from .cell import Cell, Options

CPU_KERNELS = ((4096, 1024, "float32"),)
TINY_KERNELS = ((64, 16, "float32"), (2, 8192, "bfloat16"))
COPIES = (1, 8, 64, 256)  # MiB, source and target together
CUDA_KERNELS = (
    (65536, 64, "float32"),
    (16384, 1024, "float32"),
    (16384, 1024, "bfloat16"),
    (256, 32768, "float32"),
    (256, 32768, "bfloat16"),
    (8, 1048576, "float32"),
    (8, 1048576, "float64"),
)


def cells(options: Options) -> Iterator[Cell]:
    """Bandwidth of one step with a full window, for the bytes of the committed layout.

    The copy goes through as much memory as the step does and counts what it reads and writes.
    """
    yield Cell(f"kernels/ceilings-{options.dtype}", lambda: roofs(options))
    if torch.device(options.device).type in native.devices():
        full = CUDA_KERNELS if options.is_cuda else CPU_KERNELS
        for batch, size, dtype in options.either(full, TINY_KERNELS):
            yield Cell(
                f"kernels/steps-{batch}x{size}-{dtype}",
                functools.partial(kernels_at, options, batch, size, dtype),
            )


def roofs(options: Options) -> list[Row]:
    """The machine's own: bytes/s of a copy, by working set, and FLOP/s of a square product."""
    rows: list[Row] = []
    for mebibytes in options.either(COPIES, COPIES[:1]):
        value, times = ceilings.copy(options.device, mebibytes << 20)
        head = {"suite": "ceilings", "method": "copy", "what": "copy bytes/s", "dtype": "float32"}
        rows.append(head | {"working_set": mebibytes << 20, "value": value} | times.row())
    value, times = ceilings.product(
        options.device, getattr(torch, options.dtype), tiny=options.tiny
    )
    head = {"suite": "ceilings", "method": "product", "what": "flop/s", "dtype": options.dtype}
    return [*rows, head | {"value": value} | times.row()]


# A value: Picard r, ‖r‖², ‖y‖²; Anderson these, two differences, 2m of the Gram row and right-hand
# side (a multiply and an add each) and m of the mixing.
FLOPS = {"Picard": 5, "Anderson": 7 + 6 * HISTORY}


def step_vectors(device: str, row_bytes: int, m: int) -> dict[str, int]:
    """Vectors of N that a step moves; docs/design.md says which."""
    if not device.startswith("cuda"):
        return {"Anderson": 2 * m + 4, "Picard": 3}
    if row_bytes <= 16384:
        return {"Anderson": 2 * m + 3, "Picard": 3}
    return {"Anderson": 2 * m + 5, "Picard": 4}


def working_set(method: str, state_bytes: int, m: int) -> int:
    """Bytes that calls of a step go through in turn: x, m + 1 values of g, Anderson's window."""
    return (1 + (m + 1) + (2 * m if method.startswith("Anderson") else 0)) * state_bytes


@torch.no_grad()
def kernels_at(options: Options, batch: int, size: int, dtype: str) -> list[Row]:
    device, m = options.device, HISTORY
    kind = {"device": device, "dtype": getattr(torch, dtype)}
    x = torch.randn(batch, size, **kind)
    # No two of a window may be one, or there is nothing to solve for.
    values_of_g = cycle([torch.randn(batch, size, **kind) for _ in range(m + 1)])
    limits = Limits(1e-9, 0.0, 0.0, 10**6, 10**6)
    progress, of_picard = Progress(x, limits), Progress(x, limits)
    window = [torch.empty(batch, m, size, **kind) for _ in range(2)]
    window.append(torch.empty(batch, m, m, device=device, dtype=progress.dtype))
    # On a device many at once, so that the host's launches hide behind them.
    repeats = 20 if options.is_cuda else 1

    def anderson(_: int) -> None:
        for _ in range(repeats):
            native.anderson_step(progress, x, next(values_of_g), 1.0, 1e-6, 1e30, *window)

    def picard(_: int) -> None:
        for _ in range(repeats):
            # As before the end comes near: x is kept in no trail.
            native.picard_step(of_picard, x, next(values_of_g), 1.0)

    def copy_of(nbytes: int) -> Callable[[int], Any]:
        source = torch.randn(nbytes // 8, device=device)
        target = torch.randn(nbytes // 8, device=device)

        def copy(_: int) -> None:
            for _ in range(repeats):
                target.copy_(source)

        return copy

    vectors = step_vectors(device, x.nbytes // batch, m)
    rows = []
    for name, step, record in (("Anderson", anderson, progress), ("Picard", picard, of_picard)):
        for _ in range(2 * m):
            step(0)
        touched = working_set(name, x.nbytes, m)
        measured = interleave(
            {"step": step, "copy": copy_of(touched)},
            device=device,
            budget=options.budget,
            rounds=options.turns(11, 101),
            label=f"{name} step",
        )
        if record.tally[:2].tolist() != [batch, 0]:
            raise RuntimeError(f"kernels: samples finished during the {name} step's timing")
        seconds = measured["step"].over(repeats)
        moved = vectors[name] * x.nbytes
        bandwidth = moved / seconds.median
        copied = touched * repeats / measured["copy"].median
        rows.append(
            {
                "suite": "kernels",
                "method": f"{name} step",
                "batch": batch,
                "size": size,
                "device": device,
                "dtype": dtype,
                "history": m if name == "Anderson" else None,
                "bytes": moved,
                "flops": FLOPS[name] * x.numel(),
                "working_set": touched,
                "bytes_per_s": bandwidth,
                "copy_bytes_per_s": copied,
                "of_copy": bandwidth / copied,
                **seconds.row(),
            }
        )
    return rows
