"""One iteration of a denoising net on a CUDA device: our kernels beside cuDNN, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import fpi_cuda
from fpi_cuda.backends import native, triton
from fpi_cuda.forms import ConvForm
from fpi_cuda.record import STATUS, Limits, Progress

from .. import ceilings
from ..clock import captured, interleave
from ..judge import relative_error
from ..records import Row
from .cell import Cell, Options, precision

Net = tuple[int, tuple[int, ...], int, int]
# State channels, hidden widths, batch, height: all with one channel of z.
NETS: tuple[Net, ...] = ((16, (32,), 64, 128), (1, (32, 32), 64, 128), (16, (32,), 1, 1024))
TINY_NETS: tuple[Net, ...] = ((16, (32,), 2, 4),)
LARGEST_ERROR = {"bfloat16": 2e-2, "tf32": 2e-3, "float32": 1e-5}  # of g(x), relative
PRECISIONS = ("bfloat16", "tf32", "float32")

OURS = "ours"
HOISTED, CONCATENATING = "cuDNN, hoisted", "cuDNN, concatenating"
RIVALS = (HOISTED, CONCATENATING)
FROM_PYTHON = ", launched from Python"
AT_ONCE = 8  # samples that are computed in float64 at a time


def cells(options: Options) -> Iterator[Cell]:
    """On a CUDA device: one Picard iteration of a net, our kernels beside compiled cuDNN.

    With none finished, and with half of the samples: cuDNN then gets the compacted half.
    """
    for net in options.either(NETS, TINY_NETS) if options.is_cuda else ():
        for name in PRECISIONS:
            run = functools.partial(rows, options, net, name)
            yield Cell(f"convolutions/{net[0]}-{net[2]}x{net[3]}-{name}", run)


def rows(options: Options, net: Net, name: str) -> list[Row]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with precision(name), torch.no_grad():
            return rows_of(options, *net, name)
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Case:
    """A net with its inputs, and which samples have finished: the first ones."""

    step: fpi_cuda.ConvStep
    x: Tensor
    z: Tensor
    finished: int
    count: int  # iterations of a call

    @property
    def live(self) -> int:
        return len(self.x) - self.finished


def rows_of(
    options: Options, channels: int, hidden: tuple[int, ...], batch: int, side: int, name: str
) -> list[Row]:
    from fpi_cuda.backends.triton import conv

    device, tf32 = options.device, name == "tf32"
    kind = torch.float32 if tf32 else getattr(torch, name)
    step = fpi_cuda.ConvStep(channels, 1, hidden=hidden).to(device, kind)
    z, x = (
        torch.randn(batch, c, side, side, device=device, dtype=kind).contiguous(
            memory_format=torch.channels_last
        )
        for c in (1, channels)
    )
    form = step.form(x, z).laid_out()
    chain = conv.Chain(form, x, tf32=tf32)
    error = error_of(chain, form, x)
    refused = wrong(chain, x, error, LARGEST_ERROR[name], options.either(50, 2))
    torch.compiler.reset()  # sizes of this net alone: none shall be symbolic
    flops_per_s, _ = ceilings.product(device, kind, budget=0.2, tiny=options.tiny)
    bytes_per_s, _ = ceilings.copy(device, options.either(512, 1) << 20)
    widths = (channels, *hidden, channels)
    found = []
    for finished in sorted({0, batch // 2}):
        case = Case(step, x, z, finished, options.either(10, 1))
        calls = cudnn(case, "eager" if options.tiny else "inductor")
        progress = Progress(x.flatten(1), Limits(0.0, 0.0, 0.0, 10**6, 10**6))
        if not refused:
            calls = ours(case, chain, progress) | calls
        measured = interleave(
            {method: lambda _, call=call: call() for method, call in calls.items()},
            device=device,
            budget=options.budget,
            rounds=options.turns(5, 51),
            label=f"{name} {hidden} {side}",
        )
        if not refused and int(progress.tally[0]) != case.live:
            raise RuntimeError("convolutions: samples finished while they were timed")
        pixels = case.live * side**2
        flops = sum(2 * 9 * i * o for i, o in pairwise(widths)) * pixels
        moved = (2 * channels + hidden[0]) * pixels * x.element_size()  # x, u in; g(x) out
        head = {
            "suite": "convolutions",
            "widths": widths,
            "batch": batch,
            "side": side,
            "dtype": name,
            "finished": finished,
        }
        if refused:
            about = {"family": "ours", "error": error, "refused": refused}
            found.append(head | {"method": OURS} | about)
        for method, times in measured.items():
            seconds = times.over(case.count)
            mine = method.startswith(OURS)
            found.append(
                head
                | {
                    "method": method,
                    "family": "ours" if mine else "plain",
                    "error": error if mine else None,
                    "refused": None,
                    "flops_per_s": flops / seconds.median,
                    "bytes_per_s": moved / seconds.median,
                    # The time that the ceilings of this run would leave, over the time taken.
                    "of_roofline": max(flops / flops_per_s, moved / bytes_per_s) / seconds.median,
                    **seconds.row(),
                }
            )
    return found


# --- ours -------------------------------------------------------------------------------------


def ours(case: Case, chain: Any, progress: Progress) -> dict[str, Callable[[], Any]]:
    """The active list, the chain and the step: as `backend="auto"` has them, and other ways.

    As one launch of a CUDA graph, but where the name says otherwise: else the host's launches would
    be what is timed.
    """
    from fpi_cuda.backends.triton import conv

    x = case.x
    batch, device = len(x), str(x.device)
    row = lambda t: t.permute(0, 2, 3, 1).reshape(batch, -1)  # noqa: E731 - a view
    state, out = x.clone(), torch.empty_like(x)
    progress.out = row(torch.empty_like(x))
    progress.counters[: case.finished, STATUS] = fpi_cuda.Status.CONVERGED + 1
    fresh = progress.counters.clone()
    sums = torch.empty(batch, chain.tiles, 2, device=x.device, dtype=progress.dtype)
    into = conv.active_samples(progress.counters[:, STATUS])

    def iterations(backend: ModuleType, norms: Tensor | None) -> Callable[[], None]:
        def call() -> None:
            state.copy_(x)  # from a fresh state, lest samples converge
            progress.counters.copy_(fresh)
            progress.norms = norms
            for _ in range(case.count):
                conv.active_samples(progress.counters[:, STATUS], into)
                chain(state, out, *into, norms)
                backend.picard_step(progress, row(state), row(out), 1.0)

        return call

    def kernels_alone() -> None:
        for _ in range(case.count):
            chain(state, out, *into, sums)

    taken, with_norms = step_of_auto(case)
    auto = iterations(taken, sums if with_norms else None)
    calls = {
        OURS: captured(auto, device),
        f"{OURS}, kernels alone": captured(kernels_alone, device),
        OURS + FROM_PYTHON: auto,
    }
    for other, norms in ((triton, sums), (native, None)):
        if other is not taken and x.device.type in other.devices():
            calls[f"{OURS}, {other.NAME} step"] = captured(iterations(other, norms), device)
    return calls


def step_of_auto(case: Case) -> tuple[ModuleType, bool]:
    """Whose Picard step a solve by `backend="auto"` takes, and whether the chain's norms with it.

    Seen in a solve of one iteration.
    """
    seen: list[tuple[ModuleType, bool]] = []

    def spy(backend: ModuleType) -> Any:
        real = backend.picard_step

        def picard_step(progress: Progress, *rest: Any) -> None:
            seen.append((backend, progress.norms is not None))
            real(progress, *rest)

        return mock.patch.object(backend, "picard_step", picard_step)

    with spy(native), spy(triton):
        fpi_cuda.fixed_point(
            case.step,
            case.x[:1],
            case.z[:1],
            solver=fpi_cuda.Picard(),
            max_iterations=1,
            on_failure="return",
            driver="eager",
        )
    if len(seen) != 1:
        raise RuntimeError(f"convolutions: one step of ours must run in one iteration (got {seen})")
    return seen[0]


def wrong(chain: Any, x: Tensor, error: float, limit: float, runs: int) -> str | None:
    """Why no time may be taken, or None."""
    if not error <= limit:
        return f"g(x) is off by {error:.2g}"
    first = image_of(chain, x)
    changed = sum(not torch.equal(image_of(chain, x), first) for _ in range(runs))
    # Hidden layers go through memory that programs share out: a race would show so.
    return f"g(x) has other bits in {changed} of {runs} runs" if changed else None


def image_of(chain: Any, x: Tensor) -> Tensor:
    from fpi_cuda.backends.triton import conv

    out = torch.full_like(x, torch.nan)
    status = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    chain(x, out, *conv.active_samples(status), None)
    return out


def error_of(chain: Any, form: ConvForm, x: Tensor) -> float:
    """‖g(x) − g*(x)‖ / ‖g*(x)‖ of the worst sample, g* in float64."""

    def double(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double()

    out, worst = image_of(chain, x), 0.0
    weights = tuple(w.detach().double() for w in form.weights)
    biases = tuple(map(double, form.biases))
    for start in range(0, len(x), AT_ONCE):
        few = slice(start, start + AT_ONCE)
        u = tuple(None if t is None else t[few].double() for t in form.u)
        wanted = replace(form, weights=weights, biases=biases, u=u)(x[few].double())
        for mine, true in zip(out[few], wanted, strict=True):
            worst = max(worst, relative_error(mine, true), key=nan_is_most)
    return worst


def nan_is_most(value: float) -> float:
    return value if value == value else float("inf")  # noqa: PLR0124


# --- cuDNN ------------------------------------------------------------------------------------


def cudnn(case: Case, compiler: str) -> dict[str, Callable[[], Any]]:
    """The same iteration in plain torch, compiled, channels-last, on the samples that go on.

    Hoisted: U ⋆ z + b is computed before the loop. Concatenating: in the loop, on [x, z], as one
    would write it. Both with the norms, the test and the masking that ours has.
    """
    x, z = (t[case.finished :] for t in (case.x, case.z))
    device = str(x.device)
    first, *later = case.step.layers
    into = case.step.input_weight
    hoisted = F.conv2d(z, last(into), first.bias, padding=first.weight.shape[-1] // 2)
    both = torch.cat([first.weight, into], 1)
    biases = [layer.bias for layer in later]
    weights = [last(layer.weight) for layer in later]
    of_x, of_both = last(first.weight), last(both)

    def plain(x: Tensor, hoisted: Tensor, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tested(x, layers(torch.relu(conv(x, of_x, None) + hoisted), weights, biases), on)

    def concatenating(x: Tensor, z: Tensor, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.relu(conv(torch.cat([x, z], 1), of_both, first.bias))
        return tested(x, layers(h, weights, biases), on)

    def iterations(iteration: Any, given: Tensor) -> Callable[[], Tensor]:
        compiled = torch.compile(iteration, dynamic=False, backend=compiler)

        def call() -> Tensor:
            state, on = x.clone(), all_on
            for _ in range(case.count):
                state, on, _ = compiled(state, given, on)
            return state

        return call

    all_on = torch.ones(len(x), dtype=torch.bool, device=x.device)
    calls = {HOISTED: iterations(plain, hoisted), CONCATENATING: iterations(concatenating, z)}
    return {method: captured(call, device) for method, call in calls.items()} | {
        method + FROM_PYTHON: call for method, call in calls.items()
    }


def last(t: Tensor) -> Tensor:
    return t.detach().contiguous(memory_format=torch.channels_last)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def layers(h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Those after the first, ReLU between them."""
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        h = conv(h, w, b)
        h = torch.relu(h) if i + 1 < len(weights) else h
    return h


def tested(x: Tensor, y: Tensor, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The next iterate, who goes on, and how many."""
    r, size = (t.flatten(1).float() for t in (y - x, y))
    going = torch.linalg.vector_norm(r, dim=1) > 1e-9 * torch.linalg.vector_norm(size, dim=1)
    going &= on
    return torch.where(going[:, None, None, None], y, x), going, going.sum()
