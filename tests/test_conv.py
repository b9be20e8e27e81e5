"""ConvStep: a module like any other, which the solver takes apart; against float64 and autograd."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import TIGHT, TIGHT_ADJOINT, assert_close, assert_solved
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import fpi_cuda
from fpi_cuda import Anderson, ConvStep, FixedPointLayer, NeuralStep, Picard, Status
from fpi_cuda.drivers import graph
from fpi_cuda.forms import ACTIVATIONS

SIZES = [(1, 1), (1, 5), (2, 3), (7, 9), (17, 16)]
HIDDEN = [(), (5,), (3, 6)]


def make(hidden=(5,), dtype=torch.float64, channels=4, inputs=2, **options):
    step = ConvStep(channels, inputs, hidden=hidden, **options).to(dtype)
    with torch.no_grad():
        for layer in step.layers:
            if layer.bias is not None:
                layer.bias.uniform_(-0.5, 0.5)
    return step


def images(batch, size, channels=2, dtype=torch.float64, **options):
    return torch.randn(batch, channels, *size, dtype=dtype, **options)


def written_out(step):
    """The stack on [x, z] side by side, as one would write it, and its parameters."""

    def g(x, z, *params):
        weights, biases = list(params[: len(step.layers)]), list(params[len(step.layers) : -1])
        weights[0] = torch.cat([weights[0], params[-1]], 1)
        h = torch.cat([x, z], 1)
        for i, w in enumerate(weights):
            h = F.conv2d(h, w, biases[i] if biases else None, padding=w.shape[-1] // 2)
            if i + 1 < len(weights):
                h = ACTIVATIONS[step.activation](h)
        return ACTIVATIONS[step.output_activation](step.residual * x + h)

    weights = [layer.weight for layer in step.layers]
    biases = [layer.bias for layer in step.layers if layer.bias is not None]
    return g, (*weights, *biases, step.input_weight)


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


# --- the module ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_stack_on_x_and_z_side_by_side(size, hidden, kernel_size):
    step = make(hidden, kernel_size=kernel_size, residual=0.1, output_activation="tanh")
    g, params = written_out(step)
    x, z = images(3, size, 4), images(3, size)
    assert_close(step(x, z), g(x, z, *params))


def test_without_biases_and_without_a_batch():
    step = make(bias=False)
    g, params = written_out(step)
    x, z = images(1, (4, 5), 4), images(1, (4, 5))
    assert_close(step(x[0], z[0]), g(x, z, *params)[0])


def test_fresh_steps_contract():
    for hidden in HIDDEN:
        for activation in ("relu", "tanh", "identity"):
            step = make(hidden, activation=activation, channels=16, inputs=1)
            x, y, z = (images(4, (16, 16), channels) for channels in (16, 16, 1))
            ratio = (step(x, z) - step(y, z)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(
                dim=1
            )
            assert ratio.max() < 0.9
            assert FixedPointLayer(step, max_iterations=100)(z).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(kernel_size=2), "kernel_size must be odd"),
        (dict(kernel_size=9), "at most 7"),
        (dict(kernel_size=-1), "kernel_size must be odd"),
        (dict(kernel_size=True), "kernel_size must be odd"),
        (dict(kernel_size=3.0), "kernel_size must be odd"),
        (dict(activation="swish"), "activation must be one of"),
        (dict(output_activation="swish"), "output_activation must be one of"),
        (dict(residual=float("nan")), "residual must be a finite number"),
        (dict(residual=nn.Parameter(torch.tensor(0.1))), "residual must be a finite number"),
        (dict(hidden=(8, 0)), r"hidden\[1\] must be a whole number"),
        (dict(state_channels=0), "state_channels must be a whole number"),
        (dict(input_channels=None), "input_channels must be"),
    ],
)
def test_bad_arguments_say_what_must_hold(arguments, says):
    given = dict(state_channels=4, input_channels=2) | arguments
    with pytest.raises(ValueError, match=says):
        ConvStep(**given)


def test_groups_and_a_bare_width_are_type_errors():
    with pytest.raises(TypeError, match="groups"):
        ConvStep(4, 2, groups=2)
    with pytest.raises(TypeError, match=r"write hidden=\(32,\)"):
        ConvStep(4, 2, hidden=32)


def test_shapes_that_do_not_fit_say_so():
    step = make()
    x, z = images(2, (5, 5), 4), images(2, (5, 5))
    with pytest.raises(ValueError, match=r"x must be \[B, 4, H, W\] \(got shape \(2, 3, 5, 5\)\)"):
        step(x[:, :3], z)
    with pytest.raises(ValueError, match=r"z must be \[B, 2, H, W\]"):
        step(x, z[:, :1])
    with pytest.raises(ValueError, match="one height and width"):
        step(x, z[..., :4])
    with pytest.raises(ValueError, match=r"z must be \[B, 2, H, W\]"):
        FixedPointLayer(step)(z[:, :1])
    with pytest.raises(ValueError, match="both be a batch of images"):  # z's channels as its batch
        FixedPointLayer(step)(z[0])


def test_a_layer_with_ways_of_its_own_is_an_error():
    x, z = images(2, (5, 5), 4), images(2, (5, 5))
    for name, value in (("padding_mode", "circular"), ("stride", (2, 2)), ("dilation", (2, 2))):
        step = make()
        setattr(step.layers[1], name, value)
        with pytest.raises(
            RuntimeError, match="must keep stride 1, dilation 1, one group and zero"
        ):
            step(x, z)


def test_z_of_another_dtype_is_an_error():
    step = make()
    for z in (images(2, (5, 5)).float(), torch.ones(2, 2, 5, 5, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"weights' dtype, torch.float64 \(got"):
            step(images(2, (5, 5), 4), z)


def test_copies_and_checkpoints():
    step = make()
    layer = FixedPointLayer(step)
    z = images(2, (5, 6))
    wanted = layer(z)
    torch.testing.assert_close(copy.deepcopy(layer)(z), wanted)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(z), wanted)
    other = FixedPointLayer(make())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(z), wanted)
    assert set(layer.state_dict()) == {f"g.{name}" for name in step.state_dict()}


@pytest.mark.no_poison
def test_the_module_compiles_whole():
    step = make(dtype=torch.float32)
    x, z = images(2, (8, 8), 4, torch.float32), images(2, (8, 8), dtype=torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, z), step(x, z))


# --- the solve -------------------------------------------------------------------------------


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
