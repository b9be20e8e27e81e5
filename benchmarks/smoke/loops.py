"""Late reads and compaction; samples' own limits, threads and streams under every driver."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fpi_cuda import (
    DenseStep,
    FixedPointLayer,
    ImplicitAdjoint,
    Tolerance,
    backends,
    fixed_point,
)
from fpi_cuda.drivers.eager import LAG

from .check import Check, Error, Place, compare, contraction, normal, require, same
from .drivers import FACTOR, SOLVERS, Affine, at, exact, needs_cuda, solve


def uneven(place: Place, b: int, n: int = 32) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """Samples that need very different numbers of iterations: g, z, w; elementwise but for tanh."""
    n = place.size(n, 4)
    w = contraction(1, n, n, 0.95)
    z = torch.logspace(-3, 0.5, b, dtype=torch.float64)[:, None] * (1 + normal(2, b, n).abs())
    z = z[torch.randperm(b, generator=torch.Generator().manual_seed(3))]

    def g(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x @ w.mT + z)

    return g, z, w


def late_read(place: Place) -> Iterator[Check]:
    """The eager driver waits for nothing before the end, and stops in time."""
    for name, solver in SOLVERS.items():
        yield name, functools.partial(late, place, solver, True)
        yield f"{name}-coupled", functools.partial(late, place, solver, False)
        yield f"{name}-max_iterations", functools.partial(bounded, place, solver)


def late(place: Place, solver: Any, per_sample: bool) -> Iterator[Error]:
    plain, z, w = uneven(place, place.size(512, 24))
    z, w = z.to(place.device), w.to(place.device)
    syncs: list[int] = []
    options = {"solver": solver, "driver": "eager", "per_sample": per_sample, "params": (w,)}
    options["tolerance"] = Tolerance(1e-9)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")

        def g(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
            syncs.append(sum("synchronizing CUDA operation" in str(s.message) for s in seen))
            return plain(x, z, w)

        first = fixed_point(g, z * 0, z, **options)
        syncs.clear()
        if place.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            second = fixed_point(g, z * 0, z, **options)
        finally:
            if place.cuda:
                torch.cuda.set_sync_debug_mode("default")
    yield Error("waits between the first and the last call of g", syncs[-1] - syncs[0], 0.0)
    needed = int(second.iterations.max())
    yield Error("evaluations beyond those needed", len(syncs) - needed, LAG)
    yield same("a second solve's x", second.x, first.x)
    yield same("a second solve's iterations", second.iterations, first.iterations)
    right = fixed_point(
        plain, (z * 0).cpu(), z.cpu(), params=(w.cpu(),), backend="reference", **TIGHT_FORWARD
    )
    yield compare("x", second.x, right.x, 100 * 1e-9)


TIGHT_FORWARD: dict[str, Any] = {"tolerance": Tolerance(1e-13, 1e-14), "max_iterations": 2000}


def bounded(place: Place, solver: Any) -> Iterator[Error]:
    plain, z, w = uneven(place, place.size(64, 8))
    z, w = z.to(place.device), w.to(place.device)
    options = {"solver": solver, "driver": "eager", "per_sample": False}
    solution = fixed_point(
        plain, z * 0, z, params=(w,), tolerance=Tolerance(0, 0), max_iterations=9, **options
    )
    yield Error("evaluations beyond max_iterations", abs(solution.evaluations - 9), 0.0)
    yield Error("most iterations, beside 9", abs(int(solution.iterations.max()) - 9), 0.0)


def compaction(place: Place) -> Iterator[Check]:
    """Finished samples are left out of the batch that g sees."""
    for name, solver in SOLVERS.items():
        yield name, functools.partial(compacted, place, solver)


def compacted(place: Place, solver: Any) -> Iterator[Error]:
    g, z, w = uneven(place, place.size(4096, 64))
    rtol = 1e-9
    options = {"solver": solver, "driver": "eager", "max_iterations": 1000, **at(torch.float64)}
    options["tolerance"] = Tolerance(rtol)

    def once(per_sample: bool) -> tuple[Any, Tensor]:
        leaf = z.to(place.device).requires_grad_()
        shared = w.to(place.device)
        solution = fixed_point(
            g, (leaf * 0).detach(), leaf, params=(shared,), per_sample=per_sample, **options
        )
        return solution, torch.autograd.grad(solution.x.sum(), leaf)[0]

    (first, gradient), (second, again), (whole, expected) = map(once, (True, True, False))
    require("compacted" in first.path, f"samples were to be left out (got {first.path})")
    require("one system" in whole.path, f"none was to be left out (got {whole.path})")
    yield Error("samples that did not converge", int((~first.converged).sum()), 0.0)
    # A library's products have other bits in another batch; how much is left out is decided by
    # counts that arrive when they do only where the driver lets them.
    yield same("a second run's x", second.x, first.x)
    yield same("a second run's gradient", again, gradient)
    yield compare("x beside the whole batch's", first.x, whole.x, 100 * rtol, rows=True)
    yield compare("gradient beside the whole batch's", gradient, expected, 100 * 1e-9)
    right = fixed_point(g, z * 0, z, params=(w,), backend="reference", **TIGHT_FORWARD)
    yield compare("x", first.x, right.x, 100 * rtol, rows=True)


# --- limits of each sample ----------------------------------------------------------------------


def own_limits(place: Place) -> Iterator[Check]:
    """Each sample ends at a tolerance or a number of iterations of its own."""
    for name, solver in SOLVERS.items():
        for driver in ("eager", "whole", *(("graph",) if place.cuda else ())):
            yield f"{name}-{driver}", functools.partial(limited, place, solver, driver, "auto")
        if not backends.triton.missing(place.device):
            yield f"{name}-triton", functools.partial(limited, place, solver, "eager", "triton")


def limited(place: Place, solver: Any, driver: str, backend: str) -> Iterator[Error]:
    b, n = place.size(130, 9), place.size(37, 5)
    torch.manual_seed(1)
    g = DenseStep(n, None).double() if driver == "whole" else Affine(n).eval()
    z = normal(1, b, n)
    number = torch.arange(b)
    rtol = 10.0 ** -(3 + number % 8).double()
    rtol[::3] = 0  # every third makes a fixed number of iterations
    most = torch.where(number % 3 == 0, 1 + number % 7, 500)

    def once(device: str, **options: Any) -> tuple[Any, Tensor]:
        there = copy.deepcopy(g).to(device)
        leaf = z.to(device).requires_grad_()
        layer = FixedPointLayer(there, solver=solver, per_sample=True, **options)
        tolerance = Tolerance(rtol.to(device), torch.zeros((), dtype=torch.float64))
        layer.adjoint = ImplicitAdjoint(tolerance=Tolerance(rtol.to(device)))
        x = layer(leaf, tolerance=tolerance, max_iterations=most.to(device))
        return layer.last, torch.autograd.grad(x.square().sum(), leaf)[0]

    found, gradient = once(place.device, driver=driver, backend=backend)
    right, expected = once("cpu", driver="eager", backend="reference")
    require(f", {driver}" in found.path, f"solved otherwise: {found.path}")
    fixed = found.iterations.cpu()[::3] - most[::3]
    yield Error("iterations beside a fixed number", int(fixed.abs().max()), 0.0)
    missed = int((found.iterations.cpu() - right.iterations).abs().max())
    yield Error("iterations beside the reference's", missed, 1.0)
    # One iteration more or less changes a sample's x by its tolerance, of at most 1e-3.
    yield compare("x", found.x, right.x, FACTOR * 1e-3, rows=True)
    yield compare("x of a fixed number", found.x[::3], right.x[::3], FACTOR * 1e-10, rows=True)
    yield compare("gradient", gradient, expected, 10 * FACTOR * 1e-3, rows=True)


# --- threads and streams ------------------------------------------------------------------------


def threads(place: Place) -> Iterator[Check]:
    """Two threads that solve dense layers of other shapes at once."""
    yield "float32", functools.partial(at_once, place)


def at_once(place: Place) -> Iterator[Error]:
    turns = place.size(50, 5)
    layers, inputs, expected = [], [], []
    for i, n in enumerate((40, 200)):  # so that a block's shared memory differs
        torch.manual_seed(i)
        step = DenseStep(place.size(n, n // 10), 5).to(place.device)
        layers.append(FixedPointLayer(step))
        inputs.append(normal(i, place.size(700, 9), 5).float().to(place.device))
        with torch.no_grad():
            expected.append(layers[i](inputs[i]))
    wrong, errors = [0, 0], []
    start = threading.Barrier(2, timeout=30)

    def work(i: int) -> None:
        try:
            start.wait()
            for _ in range(turns):
                with torch.no_grad():
                    found = layers[i](inputs[i])
                wrong[i] += not torch.allclose(found, expected[i], rtol=1e-4, atol=1e-5)
        except Exception as error:  # told by the check
            errors.append(error)

    started = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]
    for i, count in enumerate(wrong):
        yield Error(f"wrong solves of {turns} in thread {i}", count, 0.0)


def streams(place: Place) -> Iterator[Check]:
    """Solves on a side stream whose inputs come late."""
    needs_cuda(place)
    for driver in ("eager", "graph", "whole"):
        yield driver, functools.partial(late_inputs, place, driver)


def late_inputs(place: Place, driver: str) -> Iterator[Error]:
    n = place.size(37, 5)
    if driver == "whole":
        torch.manual_seed(1)
        g: nn.Module = DenseStep(n, None).double().to(place.device)
    else:
        g = Affine(n).to(place.device).eval()
    z = normal(1, place.size(256, 6), n).to(place.device)
    right = exact(g, z)
    side = torch.cuda.Stream()
    for turn in range(3):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            late = torch.zeros_like(z)
            torch.cuda._sleep(10**7)  # clocks: a solve on another stream would see zeros
            late.copy_(z)
            layer, found = solve(g, late, driver=driver, **at(torch.float64))
        torch.cuda.current_stream().wait_stream(side)
        require(f", {driver}" in layer.last.path, f"solved otherwise: {layer.last.path}")
        for what, value in found.items():
            yield compare(f"turn {turn}: {what}", value, right[what], FACTOR * 1e-10)
