"""`ConvStep` solved: the same as an opaque step, with less work."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, assert_close, assert_solved
from helpers_conv import HIDDEN, SIZES, images, make, written_out
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import fpi_cuda
from fpi_cuda import Anderson, ConvStep, FixedPointLayer, NeuralStep, Picard, Status
from fpi_cuda.drivers import graph
from fpi_cuda.forms import ACTIVATIONS


def solved(g, z, params=(), shape=None, **options):
    """The solution, and the gradients of a loss in z and the params."""
    x0 = torch.zeros(shape, dtype=z.dtype)
    options = dict(tolerance=TIGHT, adjoint=TIGHT_ADJOINT, on_failure="return") | options
    sol = fpi_cuda.fixed_point(g, x0, z, params=params, **options)
    wanted = (z, *(params or g.parameters()))
    loss = torch.linspace(-1, 1, sol.x.numel(), dtype=z.dtype).view_as(sol.x)
    return sol, torch.autograd.grad((loss * sol.x).sum(), wanted, allow_unused=True)


class Counted(TorchDispatchMode):
    """How often each operator runs, and the channels that convolutions take."""

    def __init__(self):
        super().__init__()
        self.calls, self.channels = {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        if name == "convolution":
            self.channels.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Picard(beta=0.7)], ids=str)
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_solution_counts_and_gradients_are_those_of_an_opaque_step(activation, hidden, solver):
    step = make(hidden, activation=activation, output_activation="tanh", residual=0.1)
    g, params = written_out(step)
    z = images(5, (7, 6)).requires_grad_()
    with torch.no_grad():
        z *= torch.logspace(-2, 1, 5, dtype=z.dtype)[:, None, None, None]
    shape = (5, 4, 7, 6)
    sol, grads = solved(step, z, shape=shape, solver=solver)
    other, wanted = solved(g, z, params, shape=shape, solver=solver)
    assert torch.equal(sol.status, other.status)
    assert torch.equal(sol.iterations, other.iterations)
    assert torch.equal(sol.adjoint.iterations, other.adjoint.iterations)
    assert_close(sol.x, other.x)
    by_name = dict(zip([n for n, _ in step.named_parameters()], grads[1:], strict=True))
    ours = [by_name[f"layers.{i}.weight"] for i in range(len(step.layers))]
    ours += [by_name[f"layers.{i}.bias"] for i in range(len(step.layers))]
    for actual, expected in zip((grads[0], *ours, by_name["input_weight"]), wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_every_dtype_at_its_default_tolerance(dtype, backend):
    step = make(dtype=torch.float64, channels=3)
    z = images(4, (9, 8))
    wanted = FixedPointLayer(step, tolerance=TIGHT)(z)
    layer = FixedPointLayer(copy.deepcopy(step).to(dtype), backend=backend)
    x = layer(z.to(dtype))
    assert layer.last.converged.all()
    assert_solved(x, wanted)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_batch_size(batch):
    step = make()
    z = images(batch, (4, 3)).requires_grad_()
    x = FixedPointLayer(step)(z)
    assert x.shape == (batch, 4, 4, 3)
    (grad,) = torch.autograd.grad(x.sum(), z)
    assert grad.shape == z.shape


def test_any_strides_of_z():
    step = make()
    z = images(3, (6, 5))
    layer = FixedPointLayer(step, tolerance=TIGHT)
    wanted = layer(z)
    wide = images(3, (6, 10))
    wide[..., ::2] = z
    views = {
        "channels last": z.contiguous(memory_format=torch.channels_last),
        "every other column": wide[..., ::2],
        "transposed": z.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": z,
    }
    for name, view in views.items():
        assert torch.allclose(layer(view), wanted, rtol=1e-12, atol=1e-13), name
    one = z[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(layer(one), layer(one.contiguous()))


def test_what_z_gives_is_computed_once_a_solve():
    step = make((5,))
    z = images(3, (6, 5))
    layer = FixedPointLayer(step)
    with Counted() as counted:
        x = layer(z)
    evaluations = layer.last.evaluations
    assert evaluations > 3
    assert counted.channels.count(2) == 1  # z's channels
    assert counted.channels.count(4) == evaluations
    with Counted() as counted:
        x.sum().backward()
    assert counted.channels.count(2) == 1


def test_the_adjoint_calls_autograd_once_not_in_each_iteration():
    step = make((5,))
    layer = FixedPointLayer(step)
    x = layer(images(3, (6, 5)))
    with Counted() as counted:
        x.sum().backward()
    assert layer.last.adjoint.evaluations > 3
    assert counted.calls["convolution_backward"] == 3  # w₁, w₂ and U
    assert all(p.grad is not None for p in step.parameters())


def test_finished_samples_leave_the_batch_and_change_no_other():
    step = make((6,), activation="tanh")
    z = images(8, (6, 7))
    z[4:] = 0  # at x0 = 0 nearly the fixed point's size already
    with torch.no_grad():
        for layer in step.layers:
            layer.bias.zero_()
    layer = FixedPointLayer(step, solver=Picard(), tolerance=fpi_cuda.Tolerance(1e-10, 1e-12))
    x = layer(z)
    assert "compacted" in layer.last.path
    counts = layer.last.iterations
    assert counts[4:].max() < counts[:4].min()
    for i in range(8):
        torch.testing.assert_close(layer(z[i : i + 1])[0], x[i], rtol=1e-11, atol=1e-12)
        assert layer.last.iterations == counts[i]


def test_the_state_lies_channels_last_through_the_solve():
    step = make((6,), channels=8)
    x = FixedPointLayer(step)(images(4, (6, 7)))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_of_nan_ends_alone(backend):
    step = make()
    z = images(4, (5, 5))
    layer = FixedPointLayer(step, backend=backend, on_failure="return", tolerance=TIGHT)
    wanted = layer(z)
    z[2, 0, 1, 1] = torch.nan
    z.requires_grad_()
    x = layer(z)
    assert layer.last.status.tolist() == [
        *[Status.CONVERGED] * 2,
        Status.NONFINITE,
        Status.CONVERGED,
    ]
    keep = torch.tensor([0, 1, 3])
    torch.testing.assert_close(x[keep], wanted[keep], rtol=1e-11, atol=1e-12)
    x.sum().backward()
    assert all(p.grad.isfinite().all() for p in step.parameters())
    assert z.grad[keep].isfinite().all() and z.grad[keep].abs().sum() > 0


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_first_and_second_derivatives(activation):
    step = make((3,), activation=activation, channels=2, inputs=1)
    z = images(2, (3, 2), 1).requires_grad_()
    names = [n for n, _ in step.named_parameters()]

    def layer(z, *params):
        def g(x, z, *params):
            named = dict(zip(names, params, strict=True))
            return torch.func.functional_call(step, named, (x, z))

        x0 = torch.zeros(2, 2, 3, 2, dtype=z.dtype)
        options = dict(tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
        return fpi_cuda.fixed_point(g, x0, z, params=params, **options).x

    def own(z):
        return FixedPointLayer(step, tolerance=TIGHT, adjoint=TIGHT_ADJOINT)(z)

    assert torch.autograd.gradcheck(own, (z,))
    assert torch.autograd.gradgradcheck(own, (z,))
    params = tuple(p.detach().requires_grad_() for p in step.parameters())
    assert torch.autograd.gradgradcheck(layer, (z, *params), atol=1e-4)


def test_second_derivatives_in_the_weights_are_those_of_an_opaque_step():
    step = make((3,), activation="tanh", channels=2, inputs=1)
    g, params = written_out(step)
    z = images(2, (3, 4), 1)

    def hessian_product(x, wanted):
        first = torch.autograd.grad((x**2).sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum((f**2).sum() for f in first), wanted)

    options = dict(tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
    x0 = torch.zeros(2, 2, 3, 4, dtype=z.dtype)
    ours = hessian_product(fpi_cuda.fixed_point(step, x0, z, **options).x, params)
    other = hessian_product(fpi_cuda.fixed_point(g, x0, z, params=params, **options).x, params)
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_who_is_taken_apart_and_who_is_not():
    step = make()
    z = images(2, (4, 4))

    def takes(g):
        with Counted() as counted, torch.no_grad():
            FixedPointLayer(g, state_shape=(4, 4, 4))(z)
        return counted.channels.count(2) == 1

    class Doubled(ConvStep):
        def forward(self, x, z):
            return super().forward(x / 2, z)

    assert takes(step)
    assert takes(NeuralStep(step))
    doubled = Doubled(4, 2).double()
    assert not takes(doubled)
    handle = step.register_forward_hook(lambda module, inputs, output: output / 2)
    assert not takes(step)
    handle.remove()
    assert takes(step)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_hooks_of_a_layer_run_or_are_an_error():
    x, z = images(2, (4, 4), 4), images(2, (4, 4))
    pruned, normalised, hooked = make(), make(), make()
    prune.l1_unstructured(pruned.layers[0], "weight", 0.5)
    nn.utils.spectral_norm(normalised.layers[1])
    hooked.layers[0].register_forward_hook(lambda module, inputs, output: 0 * output)
    for step in (pruned, normalised, hooked):
        with pytest.raises(RuntimeError, match="hooks of a layer never run"):
            step(x, z)
    for step in (pruned, hooked):
        with pytest.raises(RuntimeError, match="hooks of a layer never run"):
            FixedPointLayer(step)(z)
    # A solve computes the weight as that hook would.
    layer = FixedPointLayer(normalised.eval(), max_iterations=2, on_failure="return")
    layer(z).sum().backward()
    assert normalised.layers[1].weight_orig.grad.abs().sum() > 0


@pytest.mark.parametrize("order", [1, 2])
def test_a_backward_inside_autocast_is_as_the_forward_was(order):
    step = make(dtype=torch.float32, activation="tanh")
    z = images(3, (6, 5), dtype=torch.float32).requires_grad_()
    found = []
    for enabled in (False, True):
        x = FixedPointLayer(step)(z)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (grad,) = torch.autograd.grad(x.square().sum(), z, create_graph=order == 2)
            if order == 2:
                (grad,) = torch.autograd.grad(grad.square().sum(), z)
        found.append(grad)
    torch.testing.assert_close(*found)


def test_a_graph_of_one_backend_serves_no_other(monkeypatch):
    requests = []
    monkeypatch.setitem(graph.RECORDERS, "cpu", graph.RECORDERS["cuda"])
    monkeypatch.setattr(graph, "find", lambda request: requests.append(request) or "not here")
    step, z = make(), images(2, (4, 4))
    backends = ("auto", "native", "reference")
    for backend in (*backends, "native"):
        with torch.no_grad():
            FixedPointLayer(step, driver="graph", backend=backend)(z)
    assert len({graph._key(request)[0] for request in requests}) == len(backends)


def test_the_layer_knows_the_state_of_any_image():
    layer = FixedPointLayer(NeuralStep(make()))
    for size in SIZES:
        assert layer(images(2, size)).shape == (2, 4, *size)


def test_vmap_and_functional_transforms_take_the_general_way():
    step = make((3,), activation="tanh")
    z = images(3, (4, 3))

    def total(z):
        x0 = torch.zeros(1, 4, 4, 3, dtype=z.dtype)
        return fpi_cuda.fixed_point(
            step, x0, z[None], tolerance=TIGHT, adjoint=TIGHT_ADJOINT
        ).x.sum()

    mapped = torch.vmap(torch.func.grad(total))(z)
    leaf = z.clone().requires_grad_()
    FixedPointLayer(step, tolerance=TIGHT, adjoint=TIGHT_ADJOINT)(leaf).sum().backward()
    torch.testing.assert_close(mapped, leaf.grad, rtol=1e-9, atol=1e-10)


def test_weights_under_a_parametrization_are_computed_once_a_solve():
    step = make(dtype=torch.float32)
    for layer in step.layers:
        nn.utils.parametrizations.spectral_norm(layer)
    calls = []
    for layer in step.layers:
        layer.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    layer = FixedPointLayer(step.eval())
    x = layer(images(2, (5, 5), dtype=torch.float32))
    assert layer.last.evaluations > 3
    assert len(calls) == len(step.layers)
    x.sum().backward()
    assert len(calls) == 2 * len(step.layers)
