"""Single operators: what is loaded, the steps in every layout, products."""

from __future__ import annotations

import functools
import itertools
import math
import platform
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fpi_cuda
from fpi_cuda import DenseStep, FixedPointLayer, Status, backends
from fpi_cuda.backends import native, reference
from fpi_cuda.record import (
    ITERATIONS,
    REFERENCE,
    RESIDUAL,
    RING_START,
    STATUS,
    TRAIL,
    WINDOW,
    Limits,
    Progress,
    accumulate_dtype,
)

from .check import (
    DTYPES,
    Check,
    Error,
    Place,
    Skipped,
    Told,
    compare,
    name_of,
    normal,
    products_in,
    require,
    same,
)

# Of a row's norm. Accumulation is in float32 or float64; what is stored is rounded to the dtype.
ROUNDED = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}
MIXED = 30  # Anderson's weights make that of what rounds the residuals
FOREVER = Limits(rtol=0.0, offset=0.0, rounding=0.0, patience=10**6, max_iterations=10**6)


# --- load ---------------------------------------------------------------------------------------


def load(place: Place) -> Iterator[Check]:
    """What runs here, and one step."""
    yield "versions", versions
    if place.cuda:
        yield "device", device
    yield "build", lambda: str(fpi_cuda.build_info())
    yield "library", lambda: loaded(place)
    for beta in (1.0, 0.3):
        yield f"one-step-{beta}", functools.partial(one_step, place, beta)


def versions() -> str:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError as error:
        triton_version = f"none ({error})"
    return (
        f"python {platform.python_version()}, torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}, triton {triton_version}, fpi_cuda {fpi_cuda.__version__}"
    )


def device() -> str:
    found = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return (
        f"{found.name}, capability {found.major}.{found.minor}, {found.multi_processor_count} "
        f"multiprocessors, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    )


def loaded(place: Place) -> str:
    if not place.cuda:
        return f"backends {backends.available()}"
    info = fpi_cuda.build_info()
    require(info["cuda_loaded"], f"cuda_loaded must be True (cuda_missing: {info['cuda_missing']})")
    for name, found in (("steps", native.devices()), ("dense solves", native.dense_devices())):
        require("cuda" in found, f"native {name} must be there for cuda (they are for {found})")
    version = fpi_cuda._build.cuda.driver_version()
    require(version >= 12040, f"graphs with loops need a driver for CUDA 12.4 (got {version})")
    return f"backends {backends.available()}, driver for CUDA {version}"


def one_step(place: Place, beta: float) -> Iterator[Error]:
    for i, dtype in enumerate(DTYPES):
        x, gx = (normal(i + k, 3, 1025).to(dtype) for k in (0, 10))
        expected = x.double() + beta * (gx.double() - x.double())
        moved = x.to(place.device)
        native.picard_step(Progress(moved, FOREVER), moved, gx.to(place.device), beta)
        yield compare(name_of(dtype), moved, expected, ROUNDED[dtype])


# --- steps --------------------------------------------------------------------------------------

WARP, BLOCK = 1024, 16384  # bytes of the longest row of each layout: csrc/cuda/plan.h


def lengths(place: Place, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Values of a row under each layout: an odd number, and whole accesses of 16 bytes."""
    size = dtype.itemsize
    warp, block = WARP // size, BLOCK // size
    parts = place.size(3 * block, block + 64)  # the interpreter and the oracle take longer
    return {
        "warp": (1, 31, warp - 3, warp),
        "block": (warp + 1, place.size(block, warp + 64)),
        "blocks": (parts + 1, parts + 64),
    }


def on_triton(place: Place, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """The same for Triton's two plans, by values: fpi_cuda/backends/triton/rows.py."""
    most = 1024 if dtype == torch.float64 else 2048
    return {
        "program": (1, place.size(most - 3, 67)),
        "programs": (most + 1, place.size(20 * most + 64, most + 64)),
    }


def picard(place: Place) -> Iterator[Check]:
    """The native Picard step, every layout and dtype."""
    return picard_of(native, lengths, place)


def triton_picard(place: Place) -> Iterator[Check]:
    """Triton's Picard step."""
    return picard_of(triton_of(place), on_triton, place)


def anderson(place: Place) -> Iterator[Check]:
    """The native Anderson step, every layout and dtype."""
    yield from anderson_of(native, lengths, place)
    most = native.MAX_HISTORY["cuda"]
    for layout, sizes in lengths(place, torch.float32).items():
        step = functools.partial(anderson_step, native, place, torch.float32, sizes[-1:])
        yield f"{layout}-history-18", functools.partial(step, 18, ((0.6, 3),))
        if not place.tiny:
            yield f"{layout}-history-{most}", functools.partial(step, most, ((1.0, 1),))


def triton_anderson(place: Place) -> Iterator[Check]:
    """Triton's Anderson step."""
    yield from anderson_of(triton_of(place), on_triton, place)


def triton_of(place: Place) -> ModuleType:
    if reason := backends.triton.missing(place.device):
        raise Skipped(reason)
    return backends.triton


def picard_of(backend: ModuleType, layouts: Any, place: Place) -> Iterator[Check]:
    for dtype in DTYPES:
        for layout, sizes in layouts(place, dtype).items():
            name = f"{layout}-{name_of(dtype)}"
            yield name, functools.partial(picard_step, backend, place, dtype, sizes)
    for layout, sizes in layouts(place, torch.float32).items():
        yield f"{layout}-finish", functools.partial(finish, backend, place, "picard", sizes[-2])


def anderson_of(backend: ModuleType, layouts: Any, place: Place) -> Iterator[Check]:
    for dtype in DTYPES:
        for layout, sizes in layouts(place, dtype).items():
            if backend is backends.triton and place.tiny and dtype.itemsize == 2:
                continue  # the interpreter
            name = f"{layout}-{name_of(dtype)}"
            m, mixing = 5, ((1.0, 1), (0.6, 1), (1.0, 3))
            if backend is backends.triton and place.tiny:
                m, mixing = 3, ((0.6, 3),)
            yield name, functools.partial(anderson_step, backend, place, dtype, sizes, m, mixing)
    for layout, sizes in layouts(place, torch.float32).items():
        yield f"{layout}-finish", functools.partial(finish, backend, place, "anderson", sizes[-2])


def oracle_of(p: Progress) -> Progress:
    """A float64 copy on the CPU: the oracle starts each step where the kernel did."""
    q = Progress(torch.empty(p.out.shape, dtype=torch.float64), p.limits)
    q.counters, q.scalars = p.counters.cpu().clone(), p.scalars.double().cpu().clone()
    q.index = None if p.index is None else p.index.cpu()
    q.out, q.tally = p.out.double().cpu().clone(), p.tally.cpu().clone()
    return q


def record_errors(what: str, p: Progress, q: Progress) -> Iterator[Error]:
    yield same(f"{what}: counters", p.counters, q.counters)
    yield same(f"{what}: tally", p.tally, q.tally)
    allowed = ROUNDED[p.dtype]
    for part, columns, factor in (
        ("residual", slice(RESIDUAL, RESIDUAL + 1), 1),
        ("reference", slice(REFERENCE, REFERENCE + 1), 1),
        ("ring", slice(RING_START, None), 30),  # secants divide by differences
    ):
        pair = p.scalars[:, columns], q.scalars[:, columns]
        yield compare(f"{what}: {part}", *pair, factor * allowed)


def poisoned(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def picard_step(
    backend: ModuleType, place: Place, dtype: torch.dtype, sizes: tuple[int, ...]
) -> Iterator[Error]:
    b = place.size(5, 2)  # four rows a block are one too few
    for n in sizes:
        for beta in (1.0, 0.6):
            what = f"n {n}, beta {beta}"
            x = normal(n, b, n).to(dtype).to(place.device)
            p = Progress(x, FOREVER)
            p.out.fill_(math.nan)
            trail = poisoned(b, TRAIL, n, dtype=dtype, device=place.device)
            for k in range(place.size(7, 2)):  # the ring has five
                gx = normal(n + k + 1, b, n).to(dtype).to(place.device)
                q, y = oracle_of(p), x.double().cpu().clone()
                kept = trail.double().cpu().clone()
                backend.picard_step(p, x, gx, beta, trail)
                reference.picard_step(q, y, gx.double().cpu(), beta, kept)
                yield same(f"{what}, step {k}: trail", trail, kept.to(dtype))
                yield compare(f"{what}, step {k}: x", x, y, ROUNDED[dtype], True, gx)
                yield from record_errors(f"{what}, step {k}", p, q)
            yield same(f"{what}: out, of which nothing may be written", p.out, q.out)


def anderson_step(
    backend: ModuleType,
    place: Place,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    m: int,
    mixing: tuple[tuple[float, int], ...],
) -> Iterator[Error]:
    """mixing: pairs of beta and every."""
    b = place.size(5, 2)
    allowed = ROUNDED[dtype]
    ridge = 0.05  # well posed also where N < m, so that rounding is all that may differ
    kind = {"device": place.device}
    for n, (beta, every) in itertools.product(sizes, mixing):
        what = f"n {n}, beta {beta}, every {every}"
        x = normal(n, b, n).to(dtype).to(place.device)
        p = Progress(x, FOREVER)
        p.out.fill_(math.nan)
        values, residuals = (poisoned(b, m, n, dtype=dtype, **kind) for _ in range(2))
        gram = poisoned(b, m, m, dtype=p.dtype, **kind)
        for k in range(place.size(m + 3, m + 1)):  # the window is full, and turns over
            at = f"{what}, step {k}"
            gx = normal(n + k + 1, b, n).to(dtype).to(place.device)
            q, y = oracle_of(p), x.double().cpu().clone()
            window = [t.double().cpu().clone() for t in (values, residuals, gram)]
            given = beta, ridge, 1e9
            backend.anderson_step(p, x, gx, *given, values, residuals, gram, every=every)
            reference.anderson_step(q, y, gx.double().cpu(), *given, *window, every=every)
            yield compare(f"{at}: x", x, y, MIXED * allowed, True, gx)
            yield from record_errors(at, p, q)
            yield compare(f"{at}: values", values, window[0], allowed)
            yield compare(f"{at}: residuals", residuals, window[1], allowed)
        full = torch.full((b,), m, dtype=torch.int32)
        yield same(f"{what}: windows that are full", p.counters[:, WINDOW], full)
        yield same(f"{what}: out, of which nothing may be written", p.out, q.out)


def finish(backend: ModuleType, place: Place, solver: str, n: int) -> Iterator[Error]:
    """Row r holds sample index[r]; one converges, one is not finite, one runs out of iterations."""
    b, dtype, kind = 6, torch.float32, {"device": place.device}
    limits = Limits(rtol=1e-2, offset=0.0, rounding=0.0, patience=10**6, max_iterations=2)
    x = normal(1, 3, n).to(dtype).to(place.device)
    p = Progress(torch.empty(b, n, dtype=dtype, **kind), limits)
    p.out.fill_(math.nan)
    p.narrow(torch.tensor([4, 1, 5], **kind))
    window = [poisoned(b, 3, n, dtype=dtype, **kind) for _ in range(2)]
    window.append(poisoned(b, 3, 3, dtype=accumulate_dtype(dtype), **kind))

    def step(gx: Tensor) -> None:
        if solver == "picard":
            backend.picard_step(p, x, gx, 1.0)
        else:
            backend.anderson_step(p, x, gx, 1.0, 1e-3, 1e9, *window)

    first = x.clone()
    gx = normal(2, 3, n).to(dtype).to(place.device)
    gx[0] = x[0]  # converged at once
    gx[2, n // 2] = math.inf
    step(gx)
    converged, ended = 1 + Status.CONVERGED, 1 + Status.NONFINITE
    yield same("status", p.counters[:, STATUS], ints(0, 0, 0, 0, converged, ended))
    yield same("tally", p.tally, ints(1, 1, 1))
    yield same("out of the converged sample", p.out[4], gx[0])
    yield same("out of the sample that is not finite: its last finite x", p.out[5], first[2])
    frozen = x[::2].clone()
    gx = normal(3, 3, n).to(dtype).to(place.device)
    step(gx)
    yield same("finished rows", x[::2], frozen)
    yield same("out of the last sample", p.out[1], gx[1])
    yield same("tally at the end", p.tally, ints(0, 2, 2))
    yield same("iterations", p.counters[:, ITERATIONS], ints(0, 2, 0, 0, 1, 1))
    yield same("out of samples without a row", p.out[[0, 2, 3]], torch.full((3, n), math.nan))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- products -----------------------------------------------------------------------------------

# Rows, inputs, outputs: odd; weights that stay in shared memory; those that come in panels; rows
# above 2 KiB; more rows than a device has slots.
PRODUCTS = ((5, 31, 33), (64, 159, 200), (300, 256, 512), (70, 700, 300), (20001, 40, 24))
TINY_PRODUCTS = ((5, 31, 33), (7, 159, 40))


def dense_map(place: Place) -> Iterator[Check]:
    """Products in the library's own order of sums."""
    for b, k, n in TINY_PRODUCTS if place.tiny else PRODUCTS:
        for dtype in DTYPES:
            name = f"{b}x{k}x{n}-{name_of(dtype)}"
            yield name, functools.partial(product, place, b, k, n, dtype, False)
        yield f"{b}x{k}x{n}-tf32", functools.partial(product, place, b, k, n, torch.float32, True)
    yield "exact", functools.partial(exact, place)


def product(place: Place, b: int, k: int, n: int, dtype: torch.dtype, tf32: bool) -> Told:
    x, weight, u = (normal(i, *s).to(dtype) for i, s in enumerate(((b, k), (n, k), (n,))))
    tensors = [t.to(place.device) for t in (x, weight, u)]
    # Halves are rounded once, at the end; tf32 rounds both operands to 10 bits, or cuts them off.
    allowed = (1 if dtype.itemsize == 2 else 8) * torch.finfo(dtype).eps
    if tf32 and place.cuda:
        allowed = 2.0**-9
        with products_in("tf32"):
            require(native.tf32_wanted(tensors[0]), "torch's switch was not seen")
            found = native.dense_map(*tensors)
    else:
        found = native.dense_map(*tensors)
    right = x.double() @ weight.double().mT + u.double()
    # Of each value, by what its sum is made of.
    size = x.double().abs() @ weight.double().abs().mT + u.double().abs()
    error = ((found.double().cpu() - right).abs() / size).nan_to_num(math.inf).amax()
    return Error("of a value's terms", float(error), allowed)


def exact(place: Place) -> Iterator[Error]:
    """With `exact=True` a sample has its bits in any batch: no library's product comes between."""
    b = place.size(1000, 40)
    for hidden in (None, 45):
        torch.manual_seed(0)
        layer = FixedPointLayer(DenseStep(37, 21, hidden=hidden, exact=True).to(place.device))
        z = normal(1, b, 21).float().to(place.device)
        rows = torch.randperm(b)[: b // 7].to(place.device)
        with torch.no_grad():
            together, some = layer(z), layer(z[rows])
        require("whole" in layer.last.path, f"a whole solve was asked for (got {layer.last.path})")
        yield same(f"hidden {hidden}", some, together[rows])
