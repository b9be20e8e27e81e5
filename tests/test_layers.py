"""The layer among other modules: shared, nested, trained, copied, saved, cast."""

import copy
import io
import pickle

import pytest
import torch
from helpers import Energy, Net, assert_solved, contraction, unroll
from helpers_layers import EXACT, close, double, layer_of, unrolled
from torch import nn
from torch.autograd import grad

from fpi_cuda import (
    Anderson,
    FixedPointLayer,
    GradientStep,
    ImplicitAdjoint,
    NeuralStep,
    Picard,
    Solution,
    Tolerance,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- use in a graph --------------------------------------------------------------------------


def test_a_scripted_submodule_gets_its_gradients():
    class Scripted(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, z):
            return 0.3 * self.net(x) + z

    net = nn.Linear(3, 3).double()
    z = double(4, 3).requires_grad_()
    found, expected = (
        grad(FixedPointLayer(g, **EXACT)(z).sin().sum(), (z, *net.parameters()))
        for g in (Scripted(torch.jit.script(net)), Scripted(net))
    )
    for one, true in zip(found, expected, strict=True):
        close(one, true)


def test_two_forwards_then_two_backwards(backend, solver):
    net = Net()
    layer = layer_of(net, backend=backend, solver=solver)
    a, b = double(2, 2).requires_grad_(), double(3, 2).requires_grad_()
    tensors = tuple(net.parameters())
    x, y = layer(a), layer(b)
    mine_b = grad(y.sin().sum(), (b, *tensors))
    mine_a = grad(x.sin().sum(), (a, *tensors))
    for mine, z in ((mine_a, a), (mine_b, b)):
        for one, true in zip(mine, grad(unrolled(net, z).sin().sum(), (z, *tensors)), strict=True):
            close(one, true)


def test_backward_uses_the_parameters_of_its_own_forward_or_raises(backend):
    """An optimizer step between forward and backward must not mix two parameter values."""
    net = Net()
    layer = layer_of(net, backend=backend)
    x = layer(double(2, 2))
    with torch.no_grad():
        net.a.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_second_backward_over_one_graph_gives_the_same_gradient(backend):
    net = Net()
    z = double(2, 2).requires_grad_()
    x = layer_of(net, backend=backend)(z)
    one = grad(x.sin().sum(), (z, *net.parameters()), retain_graph=True)
    two = grad(x.sin().sum(), (z, *net.parameters()))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_layer_shared_twice_in_a_net_sums_its_gradients(backend, solver):
    net = Net(n=3, d=3)
    layer = layer_of(net, backend=backend, solver=solver)
    z = double(2, 3).requires_grad_()
    tensors = (z, *net.parameters())
    mine = grad(layer(torch.sin(layer(z))).sum(), tensors)
    true = grad(unrolled(net, torch.sin(unrolled(net, z))).sum(), tensors)
    for a, b in zip(mine, true, strict=True):
        close(a, b)


def test_second_derivatives_through_a_layer_shared_twice(backend):
    net = Net(n=3, d=3)
    layer = layer_of(net, backend=backend)
    z = double(2, 3).requires_grad_()
    tensors = (z, *net.parameters())

    def second(x):
        first = grad(x.sin().sum(), tensors, create_graph=True)
        return grad(sum(t.square().sum() for t in first), tensors)

    for a, b in zip(
        second(layer(torch.sin(layer(z)))),
        second(unrolled(net, torch.sin(unrolled(net, z)))),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_layer_inside_the_step_of_another(backend):
    inner = layer_of(Net(n=3, d=3), backend=backend)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x, z):
            return 0.3 * self.inner(x) + z

    def plain(x, z):
        return 0.3 * unrolled(inner.g.net, x, steps=60) + z

    z = double(2, 3).requires_grad_()
    tensors = (z, *inner.parameters())
    x = FixedPointLayer(Outer(), backend=backend, **EXACT)(z)
    true = unroll(plain, torch.zeros(2, 3, dtype=z.dtype), z, steps=60)
    for a, b in zip(grad(x.sin().sum(), tensors), grad(true.sin().sum(), tensors), strict=True):
        close(a, b)


def test_training_fits_a_fixed_point():
    """Adam on a teacher's fixed points: the loss falls tenfold."""
    teacher = layer_of(Net(seed=5))
    student = FixedPointLayer(NeuralStep(Net(seed=6)), state_shape=(3,))
    z = double(16, 2)
    target = teacher(z).detach()
    optimizer = torch.optim.Adam(student.parameters(), 5e-2)
    losses = []
    for _ in range(25):
        loss = (student(z) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_frozen_tied_and_unused_parameters(backend):
    net = Net()
    net.a.bias.requires_grad_(False)
    net.unused = nn.Parameter(double(2))
    net.d = net.b  # the same module under two names
    layer = layer_of(net, backend=backend)
    layer(double(2, 2)).sum().backward()
    assert net.a.bias.grad is None
    assert net.unused.grad is None or not net.unused.grad.any()
    assert net.a.weight.grad.abs().max() > 0

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(contraction(3, 0.6))
            self.w = self.v

        def forward(self, x, z):
            return 0.8 * torch.tanh(torch.tanh(x @ self.v.mT) @ self.w + z)

    tied, z = Tied(), double(2, 3)
    (mine,) = grad(FixedPointLayer(tied, backend=backend, **EXACT)(z).sin().sum(), tied.v)
    (true,) = grad(unrolled(tied, z).sin().sum(), tied.v)
    close(mine, true)


def test_parameter_hooks_fire_once_a_backward(backend):
    net, fired = Net(), []
    net.a.weight.register_hook(lambda g: fired.append("tensor"))
    net.a.weight.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    layer_of(net, backend=backend)(double(2, 2)).sum().backward()
    assert fired == ["tensor", "accumulated"]


def test_bound_method_has_the_derivatives_of_its_modules_parameters(backend):
    net = Net()
    z = double(2, 2).requires_grad_()

    def solve():
        return fixed_point(
            net.forward,
            torch.zeros(2, 3, dtype=z.dtype),
            z,
            backend=backend,
            per_sample=False,
            **EXACT,
        ).x

    mine = grad(solve().sin().sum(), (z, *net.parameters()))
    for a, b in zip(mine, grad(unrolled(net, z).sin().sum(), (z, *net.parameters())), strict=True):
        close(a, b)

    def second(x):
        (first,) = grad(x.sin().sum(), z, create_graph=True)
        return grad(first.square().sum(), (z, net.a.weight))

    for a, b in zip(second(solve()), second(unrolled(net, z)), strict=True):
        close(a, b)


# --- the layer itself ------------------------------------------------------------------------


def test_layer_adds_no_parameter_buffer_or_state_key():
    net = Net()
    layer = FixedPointLayer(net)
    assert set(layer.state_dict()) == {f"g.{key}" for key in net.state_dict()}
    assert [id(p) for p in layer.parameters()] == [id(p) for p in net.parameters()]
    assert list(layer.buffers()) == []
    other = FixedPointLayer(Net(seed=1), solver=Picard(), max_iterations=7)
    assert str(other.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(other.g.a.weight, net.a.weight)


def test_last_is_the_record_of_the_last_call_without_a_graph(backend):
    layer = layer_of(Net(), backend=backend)
    assert layer.last is None
    x = layer(double(2, 2))
    first = layer.last
    assert isinstance(first, Solution)
    assert torch.equal(first.x, x)
    assert not first.x.requires_grad
    assert first.adjoint is None
    x.sum().backward()
    assert layer.last.adjoint.converged.all()
    layer(double(5, 2))
    assert layer.last.status.shape == (5,)


def test_warm_start_by_x0_of_the_layer(backend):
    layer = FixedPointLayer(NeuralStep(Net()), state_shape=(3,), backend=backend)
    z = double(2, 2)
    layer(z)
    cold = layer.last.iterations
    x = layer(z, x0=layer.last.x)
    assert layer.last.iterations.max() <= 2 < cold.min()
    assert_solved(x, unrolled(layer.g.net, z))


def test_state_shape_may_be_fixed_a_tuple_or_computed(backend):
    z = torch.randn(4, 3)

    class Own(nn.Module):
        state_shape = (2,)

        def forward(self, x, z):
            return 0.5 * x + z[:, :2]

    assert FixedPointLayer(Own(), backend=backend)(z).shape == (4, 2)
    same = FixedPointLayer(lambda x, z: 0.5 * x + z, backend=backend)
    assert same(z).shape == (4, 3)
    computed = FixedPointLayer(
        lambda x, z: 0.5 * x + z[:, :1, None],
        backend=backend,
        state_shape=lambda z: (z.shape[1], 7),
    )
    assert computed(z).shape == (4, 3, 7)
    pair = FixedPointLayer(
        lambda x, z: (0.5 * x[0] + z, 0.5 * x[1] + x[0].sum(1)[:, None]),
        backend=backend,
        state_shape=((3,), (1,)),
    )
    u, v = pair(z)
    assert (u.shape, v.shape) == ((4, 3), (4, 1))
    assert_solved(u, 2 * z.double())


@pytest.mark.parametrize("used", [False, True])
def test_layer_deepcopies_and_pickles(used, backend):
    layer = FixedPointLayer(
        GradientStep(Energy(), 0.4),
        state_shape=(3,),
        solver=Anderson(history=3, beta=0.9),
        adjoint=ImplicitAdjoint(solver=Picard(0.9), failed="use"),
        tolerance=Tolerance(1e-8),
        max_iterations=99,
        on_failure="return",
        per_sample=True,
        backend=backend,
    )
    z = double(2, 2)
    if used:
        layer(z).sin().sum().backward()
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        for name in (
            "solver",
            "adjoint",
            "tolerance",
            "max_iterations",
            "backend",
            "on_failure",
            "per_sample",
            "state_shape",
        ):
            assert getattr(twin, name) == getattr(layer, name)
        assert torch.equal(twin(z), layer(z))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert not torch.equal(twin(z), layer(z))


def test_layer_saves_and_loads_by_torch():
    layer, file = layer_of(Net()), io.BytesIO()
    z = double(2, 2)
    x = layer(z)
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(z), x)


@pytest.mark.parametrize(
    "record", [Picard(0.5), Anderson(7, 0.9, 1e-8, 5.0), Tolerance(1e-3), ImplicitAdjoint()]
)
def test_options_are_frozen_equal_and_picklable(record):
    assert pickle.loads(pickle.dumps(record)) == record
    assert copy.deepcopy(record) == record
    assert hash(record) == hash(copy.copy(record))
    with pytest.raises(AttributeError):
        record.beta = 1.0


def test_layer_moves_to_another_dtype(backend):
    layer = FixedPointLayer(NeuralStep(Net()), state_shape=(3,), backend=backend)
    z = double(2, 2)
    x = layer(z)
    assert_solved(layer.float()(z.float()), x)
    assert layer(z.float()).dtype == torch.float32


def test_solution_prints_and_deepcopies_after_detach(backend):
    solution = fixed_point(lambda x, z: 0.5 * x + z, torch.zeros(2, 1), torch.ones(2, 1)).detach()
    assert "Solution" in repr(solution)
    twin = copy.deepcopy(solution)
    assert torch.equal(twin.x, solution.x)
    assert torch.equal(twin.status, solution.status)


# --- autocast --------------------------------------------------------------------------------


def test_autocast_keeps_the_state_wide_and_gradients_close(backend, solver):
    layer = FixedPointLayer(
        NeuralStep(Net(dtype=torch.float32)),
        state_shape=(3,),
        backend=backend,
        solver=solver,
        tolerance=Tolerance(1e-2, 1e-3),
        adjoint=ImplicitAdjoint(tolerance=Tolerance(1e-2)),
        on_failure="return",
    )
    z = torch.randn(4, 2, requires_grad=True)
    tensors = (z, *layer.parameters())
    x = layer(z)
    true = grad(x.sin().sum(), tensors)
    seen = set()
    handle = layer.g.net.a.register_forward_hook(lambda m, i, o: seen.add((i[0].dtype, o.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(z)
    handle.remove()
    assert (torch.float32, torch.bfloat16) in seen
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x, rtol=0.05, atol=0.05)
    # Outside of autocast, as a training loop calls it: g's own derivative is still the cast one's.
    for mine, expected in zip(grad(y.sin().sum(), tensors), true, strict=True):
        assert mine.dtype == torch.float32
        scale = expected.abs().max()
        torch.testing.assert_close(mine / scale, expected / scale, rtol=0.1, atol=0.1)


def test_autocast_of_a_bfloat16_input_gives_a_float32_state(backend):
    layer = FixedPointLayer(
        NeuralStep(Net(dtype=torch.float32)), state_shape=(3,), backend=backend, on_failure="return"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 2, dtype=torch.bfloat16)).dtype == torch.float32
