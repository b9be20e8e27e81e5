"""`ConvStep` in a layer on the Triton backend: kernels, steps and adjoint together."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers import assert_solved

import fpi_cuda
from fpi_cuda import (
    Anderson,
    ConvStep,
    FixedPointLayer,
    ImplicitAdjoint,
    Picard,
    Status,
    Tolerance,
)
from fpi_cuda.backends.triton import configs, conv
from fpi_cuda.backends.triton.configs import Config

# Few iterations: the interpreter takes a tenth of a second for one.
TOLERANCE, ADJOINT = Tolerance(1e-9, 1e-11), ImplicitAdjoint(tolerance=Tolerance(1e-9))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    def choose(shape, precision, capability):
        fused = configs.can_fuse(shape)
        return Config(fused, (4, 8), pixels=32, outputs=32, blocks=1)

    monkeypatch.setattr(configs, "choose", choose)


def make(hidden=(5,), dtype=torch.float64, **options):
    options = dict(activation="tanh") | options
    step = ConvStep(3, 2, hidden=hidden, **options).to(dtype)
    with torch.no_grad():
        step.layers[0].weight.mul_(0.4)
        for layer in step.layers:
            layer.bias.uniform_(-0.5, 0.5)
    return step


def images(batch, size=(3, 5), dtype=torch.float64):
    return torch.randn(batch, 2, *size, dtype=dtype)


def layer_of(step, backend="triton", **options):
    options = dict(tolerance=TOLERANCE, adjoint=ADJOINT, on_failure="return") | options
    return FixedPointLayer(step, backend=backend, **options)


class Lists:
    """The active samples of every call of the kernels."""

    def __init__(self, monkeypatch):
        self.seen = []
        plain = conv.Chain.__call__

        def call(chain, x, out, index, count, norms=None):
            self.seen.append(index[: int(count)].tolist())
            plain(chain, x, out, index, count, norms)

        monkeypatch.setattr(conv.Chain, "__call__", call)


@pytest.mark.parametrize(
    ("hidden", "solver"),
    [((), Picard(beta=0.7)), ((5,), Picard()), ((5,), Anderson(3)), ((4, 6), Picard())],
    ids=str,
)
def test_solution_counts_and_gradients_are_those_of_the_reference(hidden, solver):
    step = make(hidden, residual=0.1, output_activation="tanh")
    z = images(2)
    z *= torch.tensor([0.01, 2.0], dtype=z.dtype)[:, None, None, None]
    found = {}
    for backend in ("triton", "reference"):
        leaf = z.clone().requires_grad_()
        layer = layer_of(step, backend, solver=solver)
        x = layer(leaf)
        weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
        grads = torch.autograd.grad((weights * x).sum(), (leaf, *step.parameters()))
        found[backend] = (layer.last, x, grads)
    (ours, x, grads), (other, wanted, expected) = found["triton"], found["reference"]
    assert ours.path.startswith("triton, eager, masked")
    assert ours.adjoint.path.startswith("triton, eager, masked")
    assert torch.equal(ours.iterations, other.iterations)
    assert torch.equal(ours.adjoint.iterations, other.adjoint.iterations)
    assert torch.equal(ours.status, other.status)
    torch.testing.assert_close(x, wanted, rtol=1e-11, atol=1e-12)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_relu_keeps_its_slopes_as_bits(monkeypatch):
    packed = []
    plain = conv.pack_bits

    def pack(slopes):
        packed.append(tuple(slopes.shape))
        return plain(slopes)

    monkeypatch.setattr(conv, "pack_bits", pack)
    step = make((5,), activation="relu")
    z = images(2).requires_grad_()
    layer = layer_of(step)
    (grad,) = torch.autograd.grad(layer(z).square().sum(), z)
    assert packed == [(2, 5, 3, 5)]
    (wanted,) = torch.autograd.grad(layer_of(step, "reference")(z).square().sum(), z)
    torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("solver", "wanted"), [(Picard(), True), (Anderson(3), False)], ids=str)
def test_the_kernels_leave_sums_where_the_step_reads_them(monkeypatch, solver, wanted):
    seen = []
    plain = conv.Chain.__call__

    def call(chain, x, out, index, count, norms=None):
        seen.append(norms is not None)
        plain(chain, x, out, index, count, norms)

    monkeypatch.setattr(conv.Chain, "__call__", call)
    layer_of(make((5,)), solver=solver, max_iterations=3)(images(1))
    assert seen == [wanted] * 3


@pytest.mark.parametrize("solver", [Picard(), Anderson(3)], ids=str)
def test_finished_samples_are_left_out_by_the_kernels(monkeypatch, solver):
    lists = Lists(monkeypatch)
    step = make((5,))
    with torch.no_grad():
        for layer in step.layers:
            layer.bias.zero_()
    z = images(4)
    z[1] = 0
    layer = layer_of(step, solver=solver)
    layer(z)
    counts = layer.last.iterations.tolist()
    assert counts[1] == 1
    assert lists.seen == [
        [i for i in range(4) if counts[i] > k] for k in range(layer.last.evaluations)
    ]


def test_a_sample_of_nan_leaves_the_others_their_bits():
    step = make((5,))
    z = images(3)
    layer = layer_of(step, solver=Picard())
    wanted = layer(z)
    z[1, 0, 2, 2] = torch.nan
    x = layer(z)
    assert layer.last.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert torch.equal(x[[0, 2]], wanted[[0, 2]])


class Given(ConvStep):
    """What torch's convolution would make of z is given."""

    def form(self, x, z):
        form = super().form(x, z)
        return dataclasses.replace(form, u=(z, *form.u[1:]))

    def forward(self, x, z):
        return self.form(x, z)(x)


def test_a_samples_bits_do_not_depend_on_its_batch_where_u_does_not():
    layer = layer_of(Given(3, 5, hidden=(5,), activation="tanh").double(), solver=Anderson(3))
    u = torch.randn(3, 5, 3, 5, dtype=torch.float64)
    x = layer(u)
    assert layer.last.path.startswith("triton, eager, masked")
    order = [2, 0, 1]
    assert torch.equal(layer(u[order]), x[order])
    assert torch.equal(layer(u[1:2])[0], x[1])


def test_a_sample_has_the_same_answer_in_any_batch():
    layer = layer_of(make((5,)), solver=Anderson(3))
    z = images(3)
    x = layer(z)
    order = [2, 0, 1]
    torch.testing.assert_close(layer(z[order]), x[order], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(layer(z[1:2])[0], x[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_at_its_default_tolerance(dtype):
    step = make((5,))
    z = images(2)
    wanted = layer_of(step, "reference")(z)
    layer = FixedPointLayer(copy.deepcopy(step).to(dtype), backend="triton")
    x = layer(z.to(dtype))
    assert "masked" in layer.last.path
    assert layer.last.converged.all()
    assert_solved(x, wanted)


def test_first_and_second_derivatives():
    step = make((3,))
    z = images(1, (2, 3)).requires_grad_()
    layer = layer_of(step)
    assert torch.autograd.gradcheck(layer, (z,), atol=1e-4, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (z,), atol=1e-4, fast_mode=True)
    assert "masked" in layer.last.path


def test_an_opaque_step_has_triton_steps_and_is_compacted():
    def g(x, z):
        return 0.5 * torch.tanh(x) + z

    z = torch.randn(8, 3, dtype=torch.float64)
    z[2:] = 0
    sol = fpi_cuda.fixed_point(g, torch.zeros_like(z), z, backend="triton", tolerance=TOLERANCE)
    assert sol.path.startswith("triton, eager")
    assert sol.converged.all()
    torch.testing.assert_close(sol.x, g(sol.x, z), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", [Picard(), Anderson(3)], ids=str)
def test_a_batch_that_is_one_system_stops_together(solver):
    """By these kernels' steps, around a g that mixes samples and around convolutions alone."""
    z = images(2)
    z *= torch.tensor([0.01, 2.0], dtype=z.dtype)[:, None, None, None]
    step = make(residual=0.1)
    mixing = torch.nn.Module()
    mixing.forward = lambda x, z: (
        torch.tanh(0.3 * x.mean(0, keepdim=True) - 0.2 * x) + z.mean(1, True)
    )
    for g in (mixing, step):
        found = {}
        for backend in ("triton", "reference"):
            leaf = z.clone().requires_grad_()
            layer = layer_of(g, backend, per_sample=False, solver=solver, state_shape=(3, 3, 5))
            x = layer(leaf)
            (gradient,) = torch.autograd.grad(x[1].sum(), leaf)
            assert backend in layer.last.path
            adjoint = layer.last.adjoint
            found[backend] = x.detach(), gradient, layer.last.iterations, adjoint.iterations
        for a, b in zip(*found.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        assert found["triton"][2].unique().numel() == found["triton"][3].unique().numel() == 1
