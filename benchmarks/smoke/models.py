"""Layers as models use them: under autocast, and within torch.compile."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fpi_cuda import FixedPointLayer

from .check import Check, Error, Place, compare, normal, require
from .solves import LAYERS

WITHIN = 0.03  # of float32's gradients: some roundings of bfloat16, and the solve's tolerance


def autocast(place: Place) -> Iterator[Check]:
    """Each layer type under autocast, at its defaults, beside float32 on the CPU."""
    for layer in LAYERS:
        yield layer, functools.partial(rounded, place, layer)


def inputs(place: Place, images: bool) -> Tensor:
    size = (17, 19) if not place.tiny else (3, 5)
    b = place.size(65, 3)
    return (normal(3, b, 1, *size) if images else normal(3, b, 5)).float()


def of(layer: nn.Module, z: Tensor) -> dict[str, Tensor]:
    """x̂ and the gradients of a loss."""
    z = z.detach().clone().requires_grad_()
    x = layer(z)
    wanted = {"z": z, **dict(layer.named_parameters())}
    found = torch.autograd.grad(x.float().sin().sum(), list(wanted.values()))
    return {"x": x.detach(), **dict(zip(wanted, found, strict=True))}


def rounded(place: Place, name: str) -> Iterator[Error]:
    make, images, way = LAYERS[name]
    torch.manual_seed(1)
    step, z = make(place), inputs(place, images)
    exact = of(FixedPointLayer(copy.deepcopy(step)), z)
    layer = FixedPointLayer(step.to(place.device), on_failure="raise")
    with torch.autocast(torch.device(place.device).type, torch.bfloat16):
        found = of(layer, z.to(place.device))
    require(layer.last is not None and way in layer.last.path, f"solved otherwise: {layer.last}")
    require(found["x"].dtype == torch.float32, f"a state of {found['x'].dtype}")
    yield Error("iterations", float(layer.last.iterations.max()), 20.0)
    for what, right in exact.items():
        error = found[what].cpu() - right
        yield Error(what, float(error.norm() / right.norm()), WITHIN)


def compiled(place: Place) -> Iterator[Check]:
    """Models with a layer as one graph, beside the eager ones; on a device by inductor too."""
    cases = [(layer, "aot_eager") for layer in (["dense"] if place.tiny else LAYERS)]
    if place.cuda and not place.tiny:
        cases += [("neural", "inductor"), ("dense", "inductor")]
    for layer, backend in cases:
        for dtype in (None, torch.bfloat16):
            name = f"{layer}-{backend}{'-autocast' * (dtype is not None)}"
            yield name, functools.partial(in_a_graph, place, layer, backend, dtype)


def in_a_graph(place: Place, name: str, backend: str, dtype: torch.dtype | None) -> Iterator[Error]:
    make, images, way = LAYERS[name]
    torch.manual_seed(1)
    torch.compiler.reset()
    layer = FixedPointLayer(make(place).to(place.device), on_failure="raise")
    z = inputs(place, images).to(place.device)
    call = torch.compile(layer, backend=backend, fullgraph=True)
    kind = torch.device(place.device).type
    with torch.autocast(kind, dtype) if dtype is not None else nullcontext():
        right = of(layer, z)
        x = z.clone().requires_grad_()
        y = call(x)
        parameters = [x, *layer.parameters()]
        gradients = torch.autograd.grad(y.float().sin().sum(), parameters)
    require(layer.last is not None and way in layer.last.path, f"solved otherwise: {layer.last}")
    for (what, exact), got in zip(right.items(), [y.detach(), *gradients], strict=True):
        yield compare(what, got, exact.double().cpu(), WITHIN if dtype is not None else 1e-3)
