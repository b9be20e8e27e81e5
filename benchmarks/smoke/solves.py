"""Whole solves and layers: dense, convolutions, a training step of each layer type."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fpi_cuda import (
    Anderson,
    ConvStep,
    DenseEnergy,
    DenseStep,
    FixedPointLayer,
    GradientStep,
    ImplicitAdjoint,
    NeuralStep,
    Picard,
    Tolerance,
    backends,
)
from fpi_cuda.forms import ConvForm
from fpi_cuda.record import ACTIVE, STATUS

from .check import (
    Check,
    Error,
    Place,
    Skipped,
    compare,
    contraction,
    normal,
    products_in,
    require,
)

SOLVERS = {"picard": Picard(), "anderson": Anderson(), "alternating": Anderson(every=3)}
RATE = 0.6  # of the maps here
TIGHT = {
    "tolerance": Tolerance(1e-12, 1e-14),
    "adjoint": ImplicitAdjoint(tolerance=Tolerance(1e-12)),
}


def tolerances(rtol: float) -> dict[str, Any]:
    return {"tolerance": Tolerance(rtol), "adjoint": ImplicitAdjoint(tolerance=Tolerance(rtol))}


# --- dense --------------------------------------------------------------------------------------

# Samples, state, hidden layer.
DENSE = {
    "kept": (300, 63, None),  # weights in shared memory
    "panels": (300, 255, None),  # streamed
    "hidden": (301, 96, 131),
    "wide": (300, 351, None),  # streamed in bfloat16 too; too large for float64
    "long": (70, 1101, 24),  # rows above 2 KiB
    "refill": (20001, 33, None),  # more samples than a device has slots
}
TINY_DENSE = {"kept": (7, 9, None), "hidden": (5, 7, 11)}
# Type, what its rounding leaves of x̂ and of a gradient, and the tolerance of the solve.
KINDS: dict[str, tuple[torch.dtype, float]] = {
    "float64": (torch.float64, 1e-11),
    "float32": (torch.float32, 1e-5),
    "tf32": (torch.float32, 4e-3),  # from 2e-3 on products may be in tf32
    "bfloat16": (torch.bfloat16, 1e-2),
}
FACTOR = 5  # x̂'s error is rate/(1 − rate) times the residual; a gradient's is both solves' together


def dense_solve(place: Place) -> Iterator[Check]:
    """Dense steps solved whole, their gradients and tangents."""
    for shape, (b, n, hidden) in (TINY_DENSE if place.tiny else DENSE).items():
        for kind in KINDS:
            if (shape, kind) == ("wide", "float64"):
                continue
            for name in SOLVERS:
                check = functools.partial(dense, place, b, n, hidden, kind, name)
                yield f"{shape}-{kind}-{name}", check


def dense_step(n: int, hidden: int | None, dtype: torch.dtype) -> DenseStep:
    torch.manual_seed(n)
    step = DenseStep(n, 5, hidden, output_activation="tanh" if hidden else None).double()
    with torch.no_grad():
        if step.output_weight is None:
            step.state_weight.copy_(contraction(n, n, n, RATE))
        else:
            step.state_weight.copy_(contraction(n, len(step.state_weight), n, RATE**0.5))
            step.output_weight.copy_(contraction(n + 1, *step.output_weight.shape, RATE**0.5))
        for bias in filter(lambda b: b is not None, (step.bias, step.output_bias)):
            bias.normal_()
    return step.to(dtype)  # the reference has the rounded weights


def solved(step: nn.Module, z: Tensor, **options: Any) -> tuple[FixedPointLayer, dict[str, Tensor]]:
    """x̂ and the gradients of a loss that weighs every value differently."""
    layer = FixedPointLayer(step, on_failure="return", **options)
    z = z.detach().clone().requires_grad_()
    x = layer(z)
    weigh = torch.linspace(-1, 1, x[0].numel(), dtype=torch.float64).view_as(x[0])
    loss = (x * weigh.to(x.dtype).to(x.device)).sum()
    wanted = {"z": z, **dict(step.named_parameters())}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return layer, {"x": x.detach(), **dict(zip(wanted, gradients, strict=True))}


def tangent(step: nn.Module, z: Tensor, **options: Any) -> tuple[FixedPointLayer, Tensor]:
    """That of x̂ along sin z."""
    layer = FixedPointLayer(step, on_failure="return", **options)
    with torch.no_grad(), forward_ad.dual_level():
        x = layer(forward_ad.make_dual(z, z.sin()))
        return layer, forward_ad.unpack_dual(x).tangent


@functools.cache
def dense_reference(b: int, n: int, hidden: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    step = dense_step(n, hidden, dtype).double()
    z = normal(b, b, 5).to(dtype).double()
    options = {"solver": Picard(), "backend": "reference", **TIGHT}
    return solved(step, z, **options)[1] | {"tangent": tangent(step, z, **options)[1]}


def dense(
    place: Place, b: int, n: int, hidden: int | None, kind: str, solver: str
) -> Iterator[Error]:
    dtype, rtol = KINDS[kind]
    exact = dense_reference(b, n, hidden, dtype)
    step = dense_step(n, hidden, dtype).to(place.device)
    z = normal(b, b, 5).to(dtype).to(place.device)
    tf32 = kind == "tf32" and place.cuda
    with products_in("tf32") if tf32 else nullcontext():
        options = {"solver": SOLVERS[solver], **tolerances(rtol)}
        layer, found = solved(step, z, **options)
        forward, found["tangent"] = tangent(step, z, **options)
    for path in (layer.last.path, layer.last.adjoint.path, forward.last.tangent.path):
        require(path == f"native, whole{', tf32' * tf32}", f"solved otherwise: {path}")
    ended = int(layer.last.converged.sum())
    yield Error("samples that did not converge", len(z) - ended, 0.0)
    # The weights' gradients are sums over samples whose roundings have no order.
    for what, value in found.items():
        yield compare(what, value, exact[what], FACTOR * rtol, rows=what in ("x", "tangent"))


# --- convolutions -------------------------------------------------------------------------------

# Of the largest value: float32 accumulates; the others round operands and hidden layers.
CONV = {
    "float32": (torch.float32, 1e-5),
    "tf32": (torch.float32, 5e-3),
    "bfloat16": (torch.bfloat16, 3e-2),
}
# Channels: three layers of one kernel, two, two that run one at a time, one.
NETS = {
    "chain-3": (1, 32, 32, 1),
    "chain-2": (17, 32, 17),
    "layers-2": (5, 70, 5),
    "layers-1": (20, 20),
}
TINY_NETS = {"chain-3": (1, 4, 3, 1), "chain-2": (3, 5, 3), "layers-1": (2, 2)}


def conv_chain(place: Place) -> Iterator[Check]:
    """Triton's convolutions in one kernel, forward and transposed, on odd images."""
    yield from convolutions(place, "chain")
    yield "repeated", functools.partial(repeated, place)


def conv_layers(place: Place) -> Iterator[Check]:
    """Triton's convolutions one at a time."""
    return convolutions(place, "layers")


def convolutions(place: Place, nets: str) -> Iterator[Check]:
    if reason := backends.triton.missing(place.device):
        raise Skipped(reason)
    for net, channels in (TINY_NETS if place.tiny else NETS).items():
        if not net.startswith(nets):
            continue
        for kind in CONV:
            if place.tiny and (kind == "tf32" or (kind == "bfloat16" and net != "chain-2")):
                continue  # the interpreter
            yield f"{net}-{kind}", functools.partial(convolved, place, channels, kind, "relu")
    if nets == "chain":
        channels = TINY_NETS["chain-2"] if place.tiny else NETS["chain-2"]
        yield "tanh-bfloat16", functools.partial(convolved, place, channels, "bfloat16", "tanh")


def dense_image(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def conv_form(channels: Sequence[int], size: tuple[int, int], b: int, hidden: str) -> ConvForm:
    """In float64 on the CPU, its values those of bfloat16."""
    pairs = list(itertools.pairwise(channels))

    def values(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
        return normal(seed, *shape, scale=scale).bfloat16().double()

    return ConvForm(
        tuple(values(i, o, c, 3, 3, scale=(9 * c) ** -0.5) for i, (c, o) in enumerate(pairs)),
        (None, *(values(50 + i, o) for i, (_, o) in enumerate(pairs[1:]))),
        (dense_image(values(90, b, channels[1], *size)), *(None for _ in pairs[1:])),
        activation="tanh",
        hidden_activation=hidden,
        residual=0.5,
    )


def moved(form: ConvForm, dtype: torch.dtype, device: str) -> ConvForm:
    """The same there: bool stays, and so does the layout."""

    def put(t: Any) -> Any:
        if isinstance(t, tuple):
            return tuple(map(put, t))
        if not isinstance(t, Tensor):
            return t
        return (t if t.dtype == torch.bool else t.to(dtype)).to(device)

    return type(form)(**{k: put(v) for k, v in vars(form).items()})


def convolved(place: Place, channels: Sequence[int], kind: str, hidden: str) -> Iterator[Error]:
    _, allowed = CONV[kind]
    b = 3
    size = (place.size(33, 5), place.size(47, 9))
    active = [0, 2]  # one sample is left out
    form = conv_form(channels, size, b, hidden)
    x = dense_image(normal(7, b, channels[0], *size).bfloat16().double()).requires_grad_()
    y, adjoint = form.linearised(x, transpose=True)
    yield from chain("forward", place, form, x, y, kind, active, allowed)
    c, v = (dense_image(normal(8 + i, *x.shape).bfloat16().double()) for i in range(2))
    (product,) = torch.autograd.grad(y, x, c)
    slopes = kind == "bfloat16" and hidden != "relu"  # these are rounded too
    transposed = adjoint.plus(v)
    yield from chain(
        "transposed", place, transposed, c, product + v, kind, active, allowed * (1 + slopes)
    )


def chain(
    what: str,
    place: Place,
    form: ConvForm,
    x: Tensor,
    exact: Tensor,
    kind: str,
    active: list[int],
    allowed: float,
) -> Iterator[Error]:
    dtype = CONV[kind][0]
    on = moved(form, dtype, place.device)
    at = dense_image(x.detach().to(dtype).to(place.device))
    out, norms = stepped(on, at, active, kind == "tf32")
    others = [i for i in range(len(x)) if i not in active]
    written = sum(float((~t[others].isnan()).sum()) for t in (out, norms))
    yield Error(f"{what}: values written of samples that are not listed", written, 0.0)
    found, right = out[active].double().cpu(), exact.detach()[active]
    largest = max(1.0, float(right.abs().max()))
    error = float((found - right).abs().nan_to_num(math.inf).amax()) / largest
    yield Error(f"{what}: of the largest value", error, allowed)
    # The norms are of what was stored, so they are right to their own rounding.
    stored = at.double().cpu()[active]
    for part, value in ((0, found - stored), (1, found)):
        yield compare(
            f"{what}: sum of squares {part}",
            norms[active][..., part].double().sum(1),
            value.flatten(1).square().sum(1),
            1e-5,
        )


def stepped(form: ConvForm, x: Tensor, active: list[int], tf32: bool) -> tuple[Tensor, Tensor]:
    """What the kernels make of x, and the partial norms; NaN where nothing is written."""
    from fpi_cuda.backends.triton import conv

    counters = torch.full((len(x), 5), ACTIVE + 1, dtype=torch.int32, device=x.device)
    counters[torch.tensor(active, device=x.device), STATUS] = ACTIVE
    made = conv.Chain(form, x, tf32=tf32)
    out = torch.full_like(x, math.nan)
    norms = torch.full((len(x), made.tiles, 2), math.nan, device=x.device)
    made(x, out, *conv.active_samples(counters[:, STATUS]), norms)
    return out, norms


def repeated(place: Place) -> Iterator[Error]:
    """Hidden layers pass through memory of the programs' own: a race would change bits."""
    b, size = place.size(32, 2), (place.size(127, 9), place.size(129, 9))
    form = moved(conv_form((16, 32, 16), size, b, "relu"), torch.bfloat16, place.device)
    x = dense_image(normal(7, b, 16, *size).bfloat16().to(place.device))
    first, _ = stepped(form, x, list(range(b)), False)
    differ = torch.zeros((), dtype=torch.int64, device=place.device)
    for _ in range(place.size(50, 1)):
        again, _ = stepped(form, x, list(range(b)), False)
        differ += (again != first).sum()
    yield Error("values that differ in 50 runs, NaN included", float(differ), 0.0)


# --- a training step of each layer type ---------------------------------------------------------


class Net(nn.Module):
    state_shape = (21,)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(21 + 5, 33), nn.Linear(33, 21)
        with torch.no_grad():
            self.inner.weight.copy_(contraction(1, 33, 26, RATE**0.5))
            self.outer.weight.copy_(contraction(2, 21, 33, RATE**0.5))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.cat([x, z], 1))))


class Energy(nn.Module):
    """½ ‖x − P z‖² + Σ softplus(W x + b), strongly convex."""

    state_shape = (21,)

    def __init__(self) -> None:
        super().__init__()
        self.w, self.p = nn.Linear(21, 9), nn.Linear(5, 21, bias=False)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        fit = 0.5 * (x - self.p(z)).square().sum(1)
        return fit + nn.functional.softplus(self.w(x)).sum(1)


def conv_step(place: Place) -> nn.Module:
    step = ConvStep(3, 1, hidden=(place.size(12, 4),), output_activation="tanh", residual=0.1)
    with torch.no_grad():
        step.layers[0].weight.mul_(0.3)  # few iterations, for the interpreter's sake
    return step


def energys_step(_: Place) -> nn.Module:
    energy = DenseEnergy(21, 5, 40)
    return GradientStep(energy, step_size=1 / energy.smoothness())


# A step, the shape of one z, and how the device has to solve it.
LAYERS: dict[str, tuple[Callable[[Place], nn.Module], bool, str]] = {
    "neural": (lambda _: NeuralStep(Net()), False, "eager"),
    "energy": (lambda _: GradientStep(Energy(), 0.5), False, "eager"),
    "dense": (lambda _: DenseStep(21, 5), False, "whole"),
    "dense-hidden": (lambda _: DenseStep(21, 5, hidden=34), False, "whole"),
    "dense-energy": (energys_step, False, "whole"),
    "conv": (conv_step, True, ""),
}


def training(place: Place) -> Iterator[Check]:
    """A training step of each layer type, beside the same on the CPU in float64."""
    for layer in LAYERS:
        for name, solver in SOLVERS.items():
            if not (layer == "conv" and name != "picard" and place.tiny):
                yield f"{layer}-{name}", functools.partial(trained, place, layer, solver)


def trained(place: Place, name: str, solver: Any) -> Iterator[Error]:
    make, images, way = LAYERS[name]
    torch.manual_seed(1)
    step = make(place)
    b = place.size(65, 3)
    z = normal(3, b, 1, *((17, 19) if not place.tiny else (3, 5))) if images else normal(3, b, 5)
    tiny_conv = images and place.tiny  # the interpreter: a loose solve
    rtol = 1e-3 if tiny_conv else 1e-6
    right, _ = one_step(copy.deepcopy(step).double(), z, solver, backend="reference", **TIGHT)
    got, path = one_step(
        copy.deepcopy(step).to(place.device), z.float(), solver, **tolerances(rtol)
    )
    require(way in path, f"solved otherwise: {path}")
    # float32's rounding, through a map of rate 0.8 or less and its adjoint.
    for what, exact in right.items():
        yield compare(what, got[what], exact, 30 * max(rtol, 3e-6))


def one_step(
    step: nn.Module, z: Tensor, solver: Any, **options: Any
) -> tuple[dict[str, Tensor], str]:
    """The loss, gradients, and parameters after a step of SGD."""
    start = next(step.parameters())
    z = z.detach().to(start.device).clone().requires_grad_()
    layer = FixedPointLayer(step, solver=solver, on_failure="raise", max_iterations=1000, **options)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    loss = (layer(z) - 0.3).square().mean()
    loss.backward()
    found = {"loss": loss.detach(), "gradient of z": z.grad}
    found |= {f"gradient of {k}": p.grad.clone() for k, p in step.named_parameters()}
    optimiser.step()
    found |= {f"{k} after": p.detach() for k, p in step.named_parameters()}
    return found, layer.last.path
