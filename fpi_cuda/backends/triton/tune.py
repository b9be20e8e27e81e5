"""Measures configs of the convolution kernels on the device at hand and writes the table.

    python -m fpi_cuda.backends.triton.tune [--output FILE] [--precisions bfloat16 tf32 ...]
                                            [--minutes 10]

Entries of other devices stay. A config enters only where its result is right, and only where it is
faster than the rule's. Most of the time goes into compiling; when it is up, the best so far is
taken. --dry-run needs no device: it says how many candidates there are.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...forms.conv import ConvForm
from . import configs
from .configs import Config, Shape

__all__ = ["CASES", "TUNED", "Case", "best", "candidates", "main"]

FINALISTS = 5
NEAREST = 40
TUNED = ("bfloat16", "float16", "tf32", "float32")
# Of the largest value, against float64: what rounding of each product and hidden value explains.
_TOLERANCE = {"bfloat16": 3e-2, "float16": 4e-3, "tf32": 5e-3, "float32": 1e-5, "float64": 1e-12}
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Case:
    """A step, and the batch that it is measured on."""

    shape: Shape
    samples: int
    height: int
    width: int


CASES = (
    Case(Shape((16, 32, 16), (3, 3)), 64, 128, 128),
    Case(Shape((1, 32, 32, 1), (3, 3, 3)), 64, 128, 128),
    Case(Shape((32, 64, 32), (3, 3)), 64, 128, 128),
)


def candidates(shape: Shape, precision: str) -> list[Config]:
    """What may run these layers: the rule's config, then what differs from it least.

    Left out is what arithmetic rules out: too many or too few warps a multiprocessor, hidden layers
    beyond its L1 cache, sums beyond half of a thread's registers; and of fused and unfused ones
    each all but the nearest `NEAREST`.
    """
    rule = configs.rule(shape, precision)
    found = []
    programs = [(w, b) for w in (4, 8) for b in (1, 2, 3, 4) if 8 <= w * b <= 16]
    for inputs, stages, (warps, blocks) in itertools.product((16, 32), (1, 3), programs):
        options = {"inputs": inputs, "warps": warps, "stages": stages, "blocks": blocks}
        found += [
            Config(False, tile, outputs=outputs, **options)
            for tile in ((4, 16), (8, 16))
            for outputs in (32, 64)
        ]
        if configs.can_fuse(shape):
            found += [
                Config(True, tile, pixels=pixels, **options)
                for tile in ((8, 16), (8, 32), (16, 32), (14, 30))
                for pixels in (64, 128)
                if configs.scratch_values(shape, tile) * configs.PRECISIONS[precision] * blocks
                <= configs.MOST_SCRATCH
            ]
    found = [c for c in found if c != rule and _sums(c, shape, precision) <= _registers(c) / 2]
    found.sort(key=lambda config: _differences(config, rule))
    near = [[c for c in found if c.fused is fused][:NEAREST] for fused in (True, False)]
    return [rule, *sorted(near[0] + near[1], key=lambda config: _differences(config, rule))]


def _sums(config: Config, shape: Shape, precision: str) -> float:
    """Registers of a thread for the sums of the widest layer's block."""
    widest = max(configs.padded(channels) for channels in shape.channels[1:])
    if config.fused:
        values = config.pixels * widest
    else:
        values = config.tile[0] * config.tile[1] * min(config.outputs, widest)
    return values / (32 * config.warps) * (2 if precision == "float64" else 1)


def _registers(config: Config) -> int:
    return config.registers or configs.MOST_REGISTERS


def _differences(config: Config, rule: Config) -> int:
    return sum(a != b for a, b in zip(astuple(config), astuple(rule), strict=True))


def best(
    case: Case, precision: str, device: torch.device, seconds: float = math.inf
) -> tuple[Config, float, int]:
    """The fastest config whose result is right, its milliseconds a step, and how many were tried.

    Each is measured briefly, the last `FINALISTS` again and longer.

    Args:
        case: what is run.
        precision: a name of `configs.PRECISIONS`.
        device: where.
        seconds: after which no further one is tried; the rule's is, whatever it takes.

    Raises:
        RuntimeError: none ran and was right.
    """
    end = time.monotonic() + seconds
    form, x = _problem(case, _DTYPES[precision], device)
    expected = _exact(form, x)
    allowed = _TOLERANCE[precision] * max(1.0, float(expected.abs().max()))
    times: dict[Config, float] = {}
    tried = 0
    for config in candidates(case.shape, precision):
        if tried and time.monotonic() > end:
            break
        tried += 1
        try:
            step, out = _step(form, x, config, precision == "tf32")
            step()
            right = float((out.double() - expected).abs().max()) <= allowed
            if right:
                times[config] = _milliseconds(step, briefly=True)
        except Exception as reason:
            if not _is_refusal(reason):
                raise
            print(f"  {config}: {reason}")
    if not times:
        raise RuntimeError(f"no config ran {case} in {precision} and was right")
    for config in sorted(times, key=lambda config: times[config])[:FINALISTS]:
        step, _ = _step(form, x, config, precision == "tf32")
        times[config] = _milliseconds(step, briefly=False)
    fastest = min(times, key=lambda config: times[config])
    return fastest, times[fastest], tried


def _is_refusal(error: Exception) -> bool:
    """Whether triton says that it can't compile a config, or that the device has no room for it."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    # A pass of the compiler that fails says so by a plain RuntimeError, as a lost device would.
    failed_pass = isinstance(error, RuntimeError) and "PassManager::run failed" in str(error)
    return failed_pass or isinstance(error, (CompilationError, OutOfResources, PTXASError))


def _problem(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[ConvForm, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def state(channels: int) -> Tensor:
        t = normal(case.samples, channels, case.height, case.width)
        return t.contiguous(memory_format=torch.channels_last)

    channels, kernels = case.shape.channels, case.shape.kernels
    weights = tuple(
        normal(o, i, k, k) / (i * k * k) ** 0.5
        for i, o, k in zip(channels[:-1], channels[1:], kernels, strict=True)
    )
    form = ConvForm(
        weights,
        tuple(normal(o) for o in channels[1:]),
        (state(channels[1]), *(None,) * (len(kernels) - 1)),
        hidden_activation="relu",
        residual=0.5,
    )
    return form, state(channels[0])


def _exact(form: ConvForm, x: Tensor) -> Tensor:
    def double(ts: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.double() for t in ts)

    weights = tuple(w.double() for w in form.weights)
    exact = ConvForm(
        weights,
        double(form.biases),
        double(form.u),
        hidden_activation=form.hidden_activation,
        residual=form.residual,
    )
    return exact(x.double())


def _step(
    form: ConvForm, x: Tensor, config: Config, tf32: bool
) -> tuple[Callable[[], None], Tensor]:
    from .conv import Chain, active_samples

    chain = Chain(form, x, tf32=tf32, config=config)
    index, count = active_samples(torch.zeros(len(x), dtype=torch.int32, device=x.device))
    accumulated = torch.float64 if x.dtype == torch.float64 else torch.float32
    norms = torch.empty(len(x), chain.tiles, 2, dtype=accumulated, device=x.device)
    out = torch.empty_like(x)
    return lambda: chain(x, out, index, count, norms), out


def _milliseconds(step: Callable[[], None], *, briefly: bool) -> float:
    from triton.testing import do_bench

    warmup, rep = (2, 10) if briefly else (10, 50)
    return float(do_bench(step, warmup=warmup, rep=rep, return_mode="median"))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="fpi_cuda.backends.triton.tune", description=__doc__)
    parser.add_argument("--output", type=Path, default=configs.TABLE)
    parser.add_argument("--precisions", nargs="+", choices=_DTYPES, default=TUNED)
    parser.add_argument("--minutes", type=float, default=10, help="for all of it (default: 10)")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0 (got {options.minutes})")
    end = time.monotonic() + 60 * options.minutes
    table = configs.read(options.output) if options.output.exists() else {}
    todo = list(itertools.product(CASES, options.precisions))
    for done, (case, precision) in enumerate(todo):
        named = f"{'-'.join(map(str, case.shape.channels))} {precision}"
        if options.dry_run:
            print(f"{named}: {len(candidates(case.shape, precision))} candidates")
            continue
        from .conv import machine

        device = torch.device("cuda", torch.cuda.current_device())
        seconds = (end - time.monotonic()) / (len(todo) - done)  # what one leaves, others have
        config, milliseconds, tried = best(case, precision, device, seconds)
        of = len(candidates(case.shape, precision))
        print(f"{named}: {milliseconds:.3f} ms by {config}, {tried} of {of} tried", flush=True)
        key = (case.shape, precision, machine(device)[0])
        table.pop(key, None)
        if config != configs.rule(case.shape, precision):
            table[key] = config
        configs.write(options.output, table)


if __name__ == "__main__":
    main()
