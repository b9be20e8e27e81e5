"""One iteration of a denoising net on a CUDA device: our kernels beside compiled cuDNN."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fpi_cuda
from fpi_cuda.backends import native, triton
from fpi_cuda.backends.progress import STATUS, Limits, Progress
from fpi_cuda.forms import ConvForm

from .. import ceilings
from ..clock import interleave
from ..judge import relative_error
from ..records import Row
from .cell import Cell, Options

Net = tuple[int, tuple[int, ...], int, int]
# State channels, hidden widths, batch, height: all with one channel of z.
NETS: tuple[Net, ...] = ((16, (32,), 64, 128), (1, (32, 32), 64, 128), (16, (32,), 1, 1024))
LARGEST_ERROR = {"bfloat16": 2e-2, "tf32": 2e-3, "float32": 1e-5}  # of g(x), relative
PRECISIONS = (("bfloat16", False), ("float32", True), ("float32", False))  # dtype, tf32


def cells(options: Options) -> Iterator[Cell]:
    """On a CUDA device: one Picard iteration of a net, our kernels beside compiled cuDNN.

    With none finished, and with half of the samples: cuDNN then gets the compacted half.
    """
    for net in NETS:
        for dtype, tf32 in PRECISIONS:
            name = f"convolutions/{net[0]}-{net[2]}x{net[3]}-{'tf32' if tf32 else dtype}"
            yield Cell(name, functools.partial(rows, options, net, dtype, tf32=tf32))


def rows(options: Options, net: Net, dtype: str, *, tf32: bool) -> list[Row]:
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision, torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    convolutions.fp32_precision = products.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        return rows_of(options.device, options.budget, *net, dtype, tf32=tf32)
    finally:
        convolutions.fp32_precision, products.fp32_precision = before[:2]
        torch.backends.cudnn.benchmark = before[2]


def rows_of(
    device: str,
    budget: float,
    channels: int,
    hidden: tuple[int, ...],
    batch: int,
    side: int,
    dtype: str,
    *,
    tf32: bool,
) -> list[Row]:
    from fpi_cuda.backends.triton import conv

    kind = getattr(torch, dtype)
    step = fpi_cuda.ConvStep(channels, 1, hidden=hidden).to(device, kind)
    z, x = (
        torch.randn(batch, c, side, side, device=device, dtype=kind).contiguous(
            memory_format=torch.channels_last
        )
        for c in (1, channels)
    )
    with torch.no_grad():
        form = step.form(x, z).laid_out()
        chain = conv.Chain(form, x, tf32=tf32)
        first = torch.cat([step.layers[0].weight, step.input_weight], 1)
        weights = [first, *(layer.weight.detach() for layer in step.layers[1:])]
        weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]
        biases = [layer.bias.detach() for layer in step.layers]
    error = error_of(chain, form, x)

    def iteration(x: Tensor, z: Tensor, active: Tensor) -> Any:
        h = torch.cat([x, z], 1)
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            h = F.conv2d(h, w, b, padding=1)
            h = torch.relu(h) if i + 1 < len(weights) else h
        r = (h - x).flatten(1).float()
        going = torch.linalg.vector_norm(r, dim=1) > 1e-9 * torch.linalg.vector_norm(
            h.flatten(1).float(), dim=1
        )
        going &= active
        return torch.where(going[:, None, None, None], h, x), going, going.sum()

    torch.compiler.reset()  # sizes of this net alone: none shall be symbolic
    compiled = torch.compile(iteration, dynamic=False)
    flops_per_s, _ = ceilings.product(device, kind, budget=0.2)
    bytes_per_s, _ = ceilings.copy(device, (512 if device.startswith("cuda") else 8) << 20)
    # On a device several at once, so that launches hide; from a fresh state, lest they converge.
    repeats, found = 10 if device.startswith("cuda") else 1, []
    for finished in sorted({0, batch // 2}):
        progress = Progress(x.flatten(1), Limits(0.0, 0.0, 0.0, 10**6, 10**6))
        progress.counters[:finished, STATUS] = fpi_cuda.Status.CONVERGED + 1
        state, out = x.clone(), torch.empty_like(x)
        row = lambda t: t.permute(0, 2, 3, 1).reshape(batch, -1)  # noqa: E731 - a view
        fresh = progress.counters.clone()
        progress.out = row(torch.empty_like(x))
        norms = torch.empty(batch, chain.tiles, 2, device=device, dtype=progress.dtype)
        into = conv.active_samples(progress.counters[:, STATUS])
        live = batch - finished
        kept, z_kept = x[finished:], z[finished:]
        all_on = torch.ones(live, dtype=torch.bool, device=device)

        def kernels_alone(_: int, a: Any = (state, out, *into, norms)) -> None:
            for _ in range(repeats):
                chain(*a)

        def ours(backend: Any, norms: Any, progress: Any = progress) -> Callable[[int], None]:
            def call(_: int) -> None:
                state.copy_(x)  # noqa: B023
                progress.counters.copy_(fresh)  # noqa: B023
                for _ in range(repeats):
                    conv.active_samples(progress.counters[:, STATUS], into)  # noqa: B023
                    chain(state, out, *into, norms)  # noqa: B023
                    progress.norms = norms
                    backend.picard_step(progress, row(state), row(out), 1.0)  # noqa: B023

            return call  # noqa: B023

        def cudnn(_: int, a: Any = (kept, z_kept, all_on)) -> None:
            start, z, on = a
            state = start.clone()
            with torch.no_grad():
                for _ in range(repeats):
                    state, _, _ = compiled(state, z, on)

        calls = {
            "ours, kernels alone": kernels_alone,
            "ours, Triton step": ours(triton, norms),
            "cuDNN, compiled": cudnn,
        }
        if "cuda" in native.devices():
            calls["ours, native step"] = ours(native, None)
        name = "tf32" if tf32 else dtype
        refused = None
        if not error <= LARGEST_ERROR[name]:  # no time for what is wrong
            refused = f"g(x) is off by {error:.2g}"
            calls = {name: call for name, call in calls.items() if not name.startswith("ours")}
        measured = interleave(
            calls,
            device=device,
            budget=budget,
            rounds=(5, 51),
            label=f"{dtype} {hidden} {side}",
        )
        if not refused and int(progress.tally[0]) != live:
            raise RuntimeError("convolutions: samples finished while they were timed")
        pixels = live * side**2
        widths = (channels, *hidden, channels)
        flops = sum(2 * 9 * i * o for i, o in pairwise(widths)) * pixels
        moved = (2 * channels + hidden[0]) * pixels * x.element_size()  # x, u in; g(x) out
        for method, times in measured.items():
            seconds = times.over(repeats)
            found.append(
                {
                    "suite": "convolutions",
                    "method": method,
                    "widths": widths,
                    "batch": batch,
                    "side": side,
                    "dtype": name,
                    "finished": finished,
                    "error": None if method.startswith("cuDNN") else error,
                    "refused": refused,
                    "flops_per_s": flops / seconds.median,
                    "bytes_per_s": moved / seconds.median,
                    # The time that the ceilings of this run would leave, over the time taken.
                    "of_roofline": max(flops / flops_per_s, moved / bytes_per_s) / seconds.median,
                    **seconds.row(),
                }
            )
    return found


def error_of(chain: Any, form: ConvForm, x: Tensor) -> float:
    """‖g(x) − g*(x)‖ / ‖g*(x)‖ of the kernels, g* in float64 on a few samples."""
    from fpi_cuda.backends.triton import conv

    out = torch.full_like(x, torch.nan)
    status = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    chain(x, out, *conv.active_samples(status), None)

    def double(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double()

    few = slice(0, 4)
    exact = replace(
        form,
        weights=tuple(w.detach().double() for w in form.weights),
        biases=tuple(map(double, form.biases)),
        u=tuple(None if t is None else t[few].double() for t in form.u),
    )
    wanted = exact(x[few].double())
    return relative_error(out[few], wanted)
