"""Of trained nets: what fixed step counts cost, how near FPI_GD comes to the minimum."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpi_cuda import FixedPointLayer, GradientStep, ImplicitAdjoint, Tolerance
from fpi_cuda.contraction import jacobian_radius

from ..layers import Unrolled
from ..task import Settings
from ..trained import nets
from .bibtex import STEPS, Multilabel
from .energy import certify

TIGHT = Tolerance(rtol=1e-12, atol=1e-14)
BATCH = 256
Table = list[dict[str, str]]


def exactly(layer: Any) -> FixedPointLayer:
    """Solved to 1e-12, forward and backward."""
    return FixedPointLayer(
        layer.g,
        tolerance=TIGHT,
        adjoint=ImplicitAdjoint(tolerance=TIGHT),
        max_iterations=5000,
        on_failure="raise",
    )


def gradient(task: Multilabel, model: nn.Module, batch: Any, settings: Settings) -> Tensor:
    """Of the mean loss in all parameters, as one vector in float64."""
    leaves = list(model.parameters())
    loss = task.losses(model, batch, settings).mean()
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, leaves)])


def gradient_errors(task: Multilabel, folder: Path, data: Path) -> Iterator[dict[str, str]]:
    """Relative errors of the gradient at the trained weights, by how the layer is computed."""
    for net in nets(task, folder, ("FPI_NN", "FPI_GD"), data):
        method, model, settings, train = net.method, net.model, net.settings, net.parts.train
        samples = train[torch.arange(min(BATCH, len(train)))]
        batch = task.batch(samples, settings, torch.Generator().manual_seed(0))
        wide = tuple(t.double() for t in batch)
        exact = copy.deepcopy(model).double()
        exact.layer = exactly(exact.layer)
        reference = gradient(task, exact, wide, settings)
        row = {"method": method}
        for steps in STEPS:
            unrolled = copy.deepcopy(model).double()
            unrolled.layer = Unrolled(unrolled.layer.g, steps)
            found = gradient(task, unrolled, wide, settings)
            row[f"{steps} step{'s' if steps > 1 else ''}, float64"] = error(found, reference)
        row["converged, float32, default tolerance"] = error(
            gradient(task, model, batch, settings), reference
        )
        yield row


def error(found: Tensor, reference: Tensor) -> str:
    return f"{float((found - reference).norm() / reference.norm()):.1e}"


def certificates(task: Multilabel, folder: Path, data: Path) -> Iterator[dict[str, str]]:
    """Bounds on the distance of the default solution to the minimum, over the test samples."""
    for net in nets(task, folder, ("FPI_GD", "FPI_GD, ICNN"), data):
        method, model, z = net.method, net.model, net.parts.test.features
        with torch.no_grad():
            h = torch.relu(model.hidden(z))
            y = model.layer(h)
        energy = copy.deepcopy(model.layer.g.energy).double()
        found = certify(energy, energy.curvature, y.double(), h.double())
        with torch.no_grad():
            minimum = exactly(copy.deepcopy(model.layer).double())(h.double())
        away = torch.linalg.vector_norm(y.double() - minimum, dim=1)
        size = torch.linalg.vector_norm(minimum, dim=1)
        yield {
            "method": method,
            "‖y‖, median": f"{float(size.median()):.2f}",
            "‖∂f/∂y‖, worst": f"{float(found.gradient_norm.max()):.1e}",
            "‖y − y*‖ ≤, worst": f"{float(found.distance.max()):.1e}",
            "‖y − y*‖, worst": f"{float(away.max()):.1e}",
            "f(y) − f(y*) ≤, worst": f"{float(found.gap.max()):.1e}",
            "bound holds for": f"{int((away <= found.distance * (1 + 1e-9)).sum())} of {len(z)}",
            "iterations, mean": f"{float(model.layer.last.iterations.float().mean()):.1f}",
        }


def radii(task: Multilabel, folder: Path, data: Path) -> Iterator[dict[str, str]]:
    """Whether the trained steps contract, at their fixed points of 256 test samples."""
    for net in nets(task, folder, ("FPI_NN", "FPI_GD"), data):
        method, model, z = net.method, net.model, net.parts.test.features[:BATCH]
        with torch.no_grad():
            h = torch.relu(model.hidden(z))
            x = model.layer(h)
        g = model.layer.g
        radius = jacobian_radius(g, x, h, iterations=60)[0].detach()
        row = {
            "method": method,
            "radius, mean": f"{float(radius.mean()):.2f}",
            "worst": f"{float(radius.max()):.2f}",
            "above 1": f"{int((radius > 1).sum())} of {len(z)}",
        }
        if isinstance(g, GradientStep):
            row["L = smoothness()"] = f"{float(g.energy.smoothness()):.1f}"
            row["2 / γ"] = f"{2 / float(g.step_size):.1f}"
        yield row


def study(
    task: Multilabel, folder: Path, data: Path | None, device: torch.device
) -> dict[str, Table]:
    """The tables of the page, from seed 0 of the runs in the folder; always on the CPU."""
    assert data is not None  # `needs_data`
    tables = {
        "Relative error of the gradient at the trained weights (256 training samples)": list(
            gradient_errors(task, folder, data)
        ),
        "FPI_GD's solution at default tolerance against the minimum (test samples, float64)": list(
            certificates(task, folder, data)
        ),
        "Spectral radius of ∂g/∂x at the fixed point (256 test samples)": list(
            radii(task, folder, data)
        ),
    }
    return {title: rows for title, rows in tables.items() if rows}
