"""The graph driver, and the WHILE node that it stands on."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fpi_cuda
from fpi_cuda import (
    Anderson,
    FixedPointLayer,
    ImplicitAdjoint,
    Picard,
    Tolerance,
    fixed_point,
)

from .check import (
    Check,
    Error,
    Place,
    Skipped,
    compare,
    contraction,
    name_of,
    normal,
    quietly,
    require,
    same,
)

SOLVERS = {"picard": Picard(), "anderson": Anderson()}
RTOL = {torch.float64: 1e-10, torch.float32: 1e-5}
TIGHT = {
    "tolerance": Tolerance(1e-13, 1e-14),
    "adjoint": ImplicitAdjoint(tolerance=Tolerance(1e-13)),
}
FACTOR = 20  # of what a solve's tolerance leaves: rates below are up to 0.9


def at(dtype: torch.dtype) -> dict[str, Any]:
    rtol = RTOL[dtype]
    return {"tolerance": Tolerance(rtol), "adjoint": ImplicitAdjoint(tolerance=Tolerance(rtol))}


class Affine(nn.Module):
    """x ↦ tanh(scale W x + shift) + z, with a buffer and a Python number."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(contraction(2, n, n, 0.6))
        self.register_buffer("shift", torch.full((n,), 0.1, dtype=torch.float64))
        self.scale = 1.0

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.scale * (x @ self.weight.mT) + self.shift) + z


class Diagonal(nn.Module):
    """x ↦ tanh(a ∘ x) + z, for rows of any length."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.linspace(-0.6, 0.6, n, dtype=torch.float64))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.a * x) + z


@contextlib.contextmanager
def tanh_calls() -> Iterator[list[int]]:
    """Grows whenever Python calls torch.tanh, as both modules do; they can't count by themselves,
    since a number that they read is part of a graph's kind.
    """
    calls: list[int] = []
    tanh = torch.tanh

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return tanh(x)

    torch.tanh = counted
    try:
        yield calls
    finally:
        torch.tanh = tanh


class Consensus(Affine):
    """The same, where every sample is drawn to the mean as well: the batch is one system."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(0.7 * x + 0.3 * x.mean(0, keepdim=True), z)


def needs_cuda(place: Place) -> None:
    if not place.cuda:
        raise Skipped("needs a CUDA device")


# --- the WHILE node alone -----------------------------------------------------------------------


def while_graph(place: Place) -> Iterator[Check]:
    """A loop on the device whose body counts."""
    needs_cuda(place)
    yield "tally", functools.partial(counted, place, 7, 100, 7)
    yield "max_iterations", functools.partial(counted, place, 100, 5, 5)
    yield "once", functools.partial(counted, place, 0, 100, 1)
    yield "no_finish", functools.partial(counted, place, 7, 100, 7, finish=False)


def counted(
    place: Place, active_until: int, max_iterations: int, expected: int, finish: bool = True
) -> Iterator[Error]:
    """Two launches; the condition starts as 1, so that the body runs at least once."""
    tally = torch.zeros(3, dtype=torch.int32, device=place.device)
    total = torch.zeros(2, dtype=torch.int32, device=place.device)
    limit = torch.full((1,), active_until, dtype=torch.int32, device=place.device)
    active, count = tally[:1], tally[2:]

    def prepare() -> None:
        count.zero_()

    def body() -> None:
        count.add_(1)
        total[:1].add_(1)
        active.copy_((count < limit).to(torch.int32))

    def end() -> None:
        total[1:].copy_(count)

    parts = (prepare, body, end) if finish else (prepare, body)
    for part in parts:  # as before any capture: what is loaded at a first call is loaded
        part()
    graphs = []
    for part in parts:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            part()
        graphs.append(graph)
    handles = [graph.raw_cuda_graph() for graph in graphs]
    before, inside, after = (*handles, 0)[:3]
    loop = fpi_cuda._build.cuda.WhileGraph(before, inside, after, tally.data_ptr(), max_iterations)
    total.zero_()
    for launch in (1, 2):
        loop.launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        yield same(f"launch {launch}: count", count, torch.tensor([expected], dtype=torch.int32))
        made = torch.tensor([launch * expected, expected if finish else 0], dtype=torch.int32)
        yield same(f"launch {launch}: bodies and the finish's copy", total, made)


# --- graph --------------------------------------------------------------------------------------


def solve(
    g: nn.Module, z: Tensor, backward: bool = True, **options: Any
) -> tuple[FixedPointLayer, dict[str, Tensor]]:
    """x̂ and the gradients of z and of g's parameters."""
    independent = not isinstance(g, Consensus)
    layer = FixedPointLayer(g, per_sample=independent, on_failure="return", **options)
    z = z.detach().clone().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        x = layer(z)
    found = {"x": x.detach()}
    if backward:
        wanted = {"z": z, **dict(g.named_parameters())}
        gradients = torch.autograd.grad(x.square().sum(), list(wanted.values()))
        found |= {f"gradient of {k}": t for k, t in zip(wanted, gradients, strict=True)}
    return layer, found


def exact(g: nn.Module, z: Tensor, backward: bool = True) -> dict[str, Tensor]:
    """The same in float64 on the CPU, from the same values."""
    twin = copy.deepcopy(g).cpu().double()
    return solve(twin, z.detach().cpu().double(), backward, backend="reference", **TIGHT)[1]


def graph_forward(place: Place) -> Iterator[Check]:
    """driver="graph", beside eager and float64."""
    needs_cuda(place)
    yield from of_every_kind(place, False)
    rows = functools.partial(graphed, place, Anderson(), torch.float32, make=Diagonal)
    yield "long_rows", functools.partial(rows, False, n=9001)  # the step takes two launches
    yield "in_place", functools.partial(changed_in_place, place)


def graph_backward(place: Place) -> Iterator[Check]:
    """The same with gradients."""
    needs_cuda(place)
    yield from of_every_kind(place, True)
    yield "two_forwards", functools.partial(two_forwards, place)


def of_every_kind(place: Place, backward: bool) -> Iterator[Check]:
    for dtype in RTOL:
        for name, solver in SOLVERS.items():
            check = functools.partial(graphed, place, solver, dtype, backward)
            yield f"{name}-{name_of(dtype)}", check
    for name, solver in SOLVERS.items():
        check = functools.partial(graphed, place, solver, torch.float64, backward, make=Consensus)
        yield f"coupled-{name}", check


def graphed(
    place: Place,
    solver: Any,
    dtype: torch.dtype,
    backward: bool,
    n: int = 37,
    make: Callable[[int], nn.Module] = Affine,
) -> Iterator[Error]:
    """Four solves of one kind: the first captures, the others launch with other values."""
    n = place.size(n, 5)
    g = make(n).to(place.device, dtype).eval()
    options = {"solver": solver, **at(dtype)}
    for seed in range(4):
        z = normal(seed, place.size(130, 6), n).to(dtype).to(place.device)
        with tanh_calls() as calls:
            layer, found = solve(g, z, backward, driver="graph", **options)
        records = [layer.last, layer.last.adjoint] if backward else [layer.last]
        paths = [record.path for record in records]
        require(all(", graph," in p for p in paths), f"a graph was asked for (got {paths})")
        called = f"g's Python must run for the capture alone (solve {seed}: {len(calls)} calls)"
        require(bool(calls) == (seed == 0), called)
        eager, beside = solve(g, z, backward, driver="eager", **options)
        right = exact(g, z, backward)
        for what, value in found.items():
            yield compare(f"solve {seed}: {what}", value, right[what], FACTOR * RTOL[dtype])
            # The same g and steps; a library may choose other products in a capture.
            yield compare(f"solve {seed}: {what}, eager", value, beside[what], FACTOR * RTOL[dtype])
        missed = int((layer.last.iterations - eager.last.iterations).abs().amax())
        yield Error(f"solve {seed}: iterations beside eager's", missed, 1.0)


def changed_in_place(place: Place) -> Iterator[Error]:
    """A launch sees parameters and buffers that changed where they are."""
    g = Affine(place.size(37, 5)).to(place.device).eval()
    z = normal(1, 9, len(g.shift)).to(place.device)
    options = {"driver": "graph", **at(torch.float64)}
    solve(g, z, False, **options)
    with torch.no_grad():
        g.weight.mul_(0.5)
        g.shift.add_(0.3)
    _, found = solve(g, z, False, **options)
    yield compare("x", found["x"], exact(g, z, False)["x"], FACTOR * 1e-10)


def two_forwards(place: Place) -> Iterator[Error]:
    """Two forwards, then their two backwards: a result is not the graph's own memory."""
    g = Affine(place.size(37, 5)).to(place.device).eval()
    layer = FixedPointLayer(g, driver="graph", per_sample=True, **at(torch.float64))
    zs = [normal(i, 9, len(g.shift)).to(place.device).requires_grad_() for i in range(2)]
    xs = [layer(z) for z in zs]
    for i, (x, z) in enumerate(zip(xs, zs, strict=True)):
        gradients = torch.autograd.grad(x.square().sum(), (z, *g.parameters()))
        right = exact(g, z)
        for (what, value), found in zip(right.items(), (x, *gradients), strict=True):
            yield compare(f"solve {i}: {what}", found, value, FACTOR * 1e-10)


def graph_failed(place: Place) -> Iterator[Check]:
    """A capture that fails, then one that does not."""
    needs_cuda(place)
    for attempt in (1, 2):
        yield f"sync-{attempt}", functools.partial(failing, place)
        yield f"random_numbers-{attempt}", functools.partial(random_numbers, place)
        yield f"memory-{attempt}", functools.partial(memory, place)
        good = functools.partial(graphed, place, Picard(), torch.float64, True)
        yield f"then_a_good_one-{attempt}", good


def failing(place: Place) -> Iterator[Error]:
    """g waits for the device, which no capture allows: it runs eagerly, with a warning."""

    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * x * float(z.abs().max().clamp(max=1)) + z

    z = normal(1, 9, 5).to(place.device)
    options = {"per_sample": True, "tolerance": Tolerance(1e-10)}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        solution = fixed_point(g, z * 0, z, driver="graph", **options)
    said = [str(w.message) for w in seen]
    require(any("runs eagerly" in text for text in said), f"a warning was due (got {said})")
    require("eager (" in solution.path, f"eager was due (got {solution.path})")
    yield compare("x", solution.x, 2 * z, FACTOR * 1e-10)
    capturing = torch.cuda.is_current_stream_capturing()
    yield Error("whether the stream still captures", float(capturing), 0.0)


def random_numbers(place: Place) -> Iterator[Error]:
    """torch's generator is out of the capture."""
    one, two = (torch.rand(1000, device=place.device) for _ in range(2))
    yield Error("mean, from 0.5", abs(float(one.mean()) - 0.5), 0.1)
    yield Error("equal draws", float((one == two).double().mean()), 0.5)


def memory(place: Place) -> Iterator[Error]:
    """torch's allocator is out of the capture."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    t = torch.ones(2**20, device=place.device)
    pinned = torch.ones(2**10).pin_memory().to(place.device, non_blocking=True)
    yield Error("sum", abs(float(t.sum() + pinned.sum()) - 2**20 - 2**10), 0.0)


def graph_refused(place: Place) -> Iterator[Check]:
    """What a graph must not hold."""
    needs_cuda(place)
    yield "captured_tensor", functools.partial(captured_tensor, place)
    yield "dropout", functools.partial(dropout, place)
    for where in ("params", "own"):
        yield f"cpu_scalar_in_{where}", functools.partial(cpu_scalar, place, where)
    yield "users_capture", functools.partial(users_capture, place)


def captured_tensor(place: Place) -> Iterator[Error]:
    w = [contraction(1, 5, 5, 0.5).to(place.device)]

    def g(x: Tensor, z: Tensor) -> Tensor:
        return x @ w[0] + z

    z = normal(1, 9, 5).to(place.device)
    for turn in range(3):
        w[0] = w[0] * 0.5  # another tensor each time
        solution = quietly(
            lambda: fixed_point(
                g, z * 0, z, driver="graph", per_sample=True, tolerance=Tolerance(1e-10)
            )
        )
        eye = torch.eye(5, dtype=torch.float64)
        right = torch.linalg.solve(eye - w[0].cpu().mT, z.cpu().mT).mT
        yield compare(f"turn {turn}: x", solution.x, right, FACTOR * 1e-10)
    require("eager (" in solution.path, f"eager was due (got {solution.path})")


def dropout(place: Place) -> Iterator[Error]:
    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * nn.functional.dropout(x, 0.5) + z

    z = normal(1, 9, 5).to(place.device)
    state = torch.cuda.get_rng_state()
    try:
        solution = quietly(lambda: fixed_point(g, z * 0, z, driver="graph", on_failure="return"))
    except RuntimeError as error:
        require("random numbers" in str(error), f"another error: {error}")
    else:
        require(False, f"an error was due (got {solution.path})")
    yield same("the generator's state", torch.cuda.get_rng_state(), state)


def cpu_scalar(place: Place, where: str) -> Iterator[Error]:
    """A number on the CPU is an argument of kernels: a capture would keep its first value."""
    z = normal(1, 9, 5).to(place.device)
    number = torch.tensor(0.5, dtype=torch.float64)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.number = nn.Parameter(number, requires_grad=False)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.number * x + z

    def explicit(x: Tensor, z: Tensor, a: Tensor) -> Tensor:
        return a * x + z

    module = Scaled()
    for value in (0.5, 0.25, 0.125, 0.0625):
        module.number.fill_(value)
        number = torch.tensor(value, dtype=torch.float64)
        g: Callable[..., Tensor] = module if where == "own" else explicit
        params = () if where == "own" else (number,)
        options = {"driver": "graph", "per_sample": True, "tolerance": Tolerance(1e-10)}
        solution = quietly(functools.partial(fixed_point, g, z * 0, z, params=params, **options))
        yield compare(f"{value}: x", solution.x, z / (1 - value), FACTOR * 1e-10)


def users_capture(place: Place) -> Iterator[Error]:
    """A solve in the user's own capture is refused, and the next one outside works."""
    g = Affine(5).to(place.device).eval()
    z = normal(1, 9, 5).to(place.device)
    right = exact(g, z, False)["x"]
    for driver in ("eager", "graph"):
        solve(g, z, False, driver=driver, **at(torch.float64))
        torch.cuda.synchronize()
        try:
            with warnings.catch_warnings(), torch.cuda.graph(torch.cuda.CUDAGraph()):
                warnings.simplefilter("ignore")  # torch: the graph is empty
                solve(g, z, False, driver=driver)
        except RuntimeError as error:
            require("can't be captured" in str(error), f"another error: {error}")
        else:
            require(False, f"{driver}: an error was due")
        _, found = solve(g, z, False, driver=driver, **at(torch.float64))
        yield compare(f"{driver}: x after it", found["x"], right, FACTOR * 1e-10)
