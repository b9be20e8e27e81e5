"""The layer under torch.compile, in several threads, and what it leaves in memory."""

import gc
import threading
import weakref

import pytest
import torch
from helpers import Counter, Net, contraction
from helpers_layers import EXACT, close, double, layer_of, unrolled
from torch import nn
from torch.autograd import grad

from fpi_cuda import fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")


# --- torch.compile ---------------------------------------------------------------------------


@pytest.mark.no_poison
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at every one
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_model_with_the_layer_gives_the_same_value_and_gradient(compiler, backend):
    torch._dynamo.reset()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 2, dtype=torch.float64)
            self.layer = layer_of(Net(), backend=backend)
            self.last = nn.Linear(3, 1, dtype=torch.float64)

        def forward(self, t):
            return self.last(self.layer(torch.relu(self.first(t))))

    model, t = Model(), double(5, 4)
    true = model(t)
    expected = grad(true.square().sum(), list(model.parameters()))
    compiled = torch.compile(model, backend=compiler)
    for _ in range(2):
        x = compiled(t)
        close(x, true)
        mine = grad(x.square().sum(), list(model.parameters()))
        for a, b in zip(mine, expected, strict=True):
            close(a, b)


@pytest.mark.no_poison
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at every one
def test_compiled_step_works_as_g(backend):
    torch._dynamo.reset()
    net = Net()
    z = double(4, 2).requires_grad_()
    step = torch.compile(net, backend="aot_eager")
    x = fixed_point(
        step, torch.zeros(4, 3, dtype=z.dtype), z, backend=backend, per_sample=False, **EXACT
    ).x
    true = unrolled(net, z)
    close(x, true)
    mine = grad(x.sin().sum(), (z, *net.parameters()))
    for a, b in zip(mine, grad(true.sin().sum(), (z, *net.parameters())), strict=True):
        close(a, b)


# --- threads ---------------------------------------------------------------------------------


def run_threads(n, work):
    """Call work(i) in n threads that start together; raise what any of them raised."""
    barrier, errors, results = threading.Barrier(n), [], [None] * n

    def body(i):
        try:
            barrier.wait()
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


def test_eight_threads_with_different_parameters_do_not_mix(backend):
    """One g, eight θ: each thread's values and gradients are those of its own θ."""
    z = double(4, 3)
    thetas = [contraction(3, 0.1 * (i + 1), seed=i).requires_grad_() for i in range(8)]

    def g(x, z, w):
        return torch.tanh(x @ w.mT + z)

    def solve(w):
        x = fixed_point(g, torch.zeros_like(z), z, params=(w,), backend=backend, **EXACT).x
        return x.detach(), grad(x.sin().sum(), w)[0]

    alone = [solve(w) for w in thetas]

    def work(i):
        return [solve(thetas[i]) for _ in range(5)]

    for results, (x, gradient) in zip(run_threads(8, work), alone, strict=True):
        for mine in results:
            assert torch.equal(mine[0], x)
            assert torch.equal(mine[1], gradient)


def test_eight_threads_over_one_module_do_not_disturb_it_or_one_another(backend):
    """Differentiation puts tensors into private clones: a direct call never sees them."""
    net = Net()
    layers = [layer_of(net, backend=backend) for _ in range(4)]
    zs = [double(3, 2).requires_grad_() for _ in range(8)]
    x0 = double(3, 3)

    def solve(i):
        x = layers[i](zs[i])
        first = grad(x.sin().sum(), zs[i], create_graph=True)[0]
        return x.detach(), grad(first.sum(), zs[i])[0]

    alone = [solve(i) for i in range(4)]
    direct = [net(x0, z).detach() for z in zs]
    before = {name: id(p) for name, p in net.named_parameters()}

    def work(i):
        if i < 4:
            return [solve(i) for _ in range(5)]
        for _ in range(300):
            assert torch.equal(net(x0, zs[i]), direct[i])
            assert {name: id(p) for name, p in net.named_parameters()} == before
        return None

    for results, (x, second) in zip(run_threads(8, work)[:4], alone, strict=True):
        for mine in results:
            assert torch.equal(mine[0], x)
            assert torch.equal(mine[1], second)


def test_eight_threads_transform_one_module_with_their_own_parameters(backend):
    """torch.func in every thread, each with its own θ, over one step and private layers."""

    def g(x, z, w, b):
        return torch.tanh(x @ w.mT + z + b)

    z = double(3, 3)
    thetas = [(contraction(3, 0.7, seed=i), double(3)) for i in range(8)]

    def loss(w, b):
        return (
            fixed_point(g, torch.zeros_like(z), z, params=(w, b), backend=backend, **EXACT)
            .x.sin()
            .sum()
        )

    derivative = torch.func.grad(loss, argnums=(0, 1))
    alone = [derivative(*theta) for theta in thetas]
    for results, expected in zip(
        run_threads(8, lambda i: [derivative(*thetas[i]) for _ in range(3)]), alone, strict=True
    ):
        for mine in results:
            for a, b in zip(mine, expected, strict=True):
                assert torch.equal(a, b)


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
def test_graph_dies_with_its_outputs_without_the_garbage_collector(order, backend):
    net = Net()
    layer = layer_of(net, backend=backend)
    for _ in range(2):  # the first call may fill caches
        z = double(2, 2).requires_grad_()
        g = Counter(net)
        x = layer(z)
        y = (
            fixed_point(
                g, torch.zeros(2, 3, dtype=z.dtype), z, backend=backend, per_sample=False, **EXACT
            ).x
            if order < 2
            else x
        )
        refs = [weakref.ref(t) for t in (z, x, y, g)]
        gc.collect()
        gc.disable()
        try:
            if order == 1:
                (x.sum() + y.sum()).backward()
            elif order == 2:
                (first,) = grad(x.sin().sum(), z, create_graph=True)
                (second,) = grad(first.sum(), z, create_graph=True)
                second.sum().backward()
                refs += [weakref.ref(first), weakref.ref(second)]
                del first, second
            net.zero_grad()
            del z, x, y, g
            layer.last = None
            dead = [r() is None for r in refs]
        finally:
            gc.enable()
    assert all(dead), dead


def test_layer_keeps_no_graph_between_calls(backend):
    layer = layer_of(Net(), backend=backend)
    z = double(2, 2).requires_grad_()
    ref = weakref.ref(z)
    x = layer(z)
    gc.collect()
    gc.disable()
    try:
        del z, x
        assert ref() is None  # layer.last holds values only
    finally:
        gc.enable()


def test_training_steps_keep_no_tensors(backend):
    layer = layer_of(Net(), backend=backend)
    z = double(4, 2)

    def live():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    counts = []
    for _ in range(4):
        x = layer(z)
        first = grad(x.sin().sum(), list(layer.parameters()), create_graph=True)
        sum(t.square().sum() for t in first).backward()
        layer.zero_grad()
        del x, first
        counts.append(live())
    assert counts[-1] == counts[1]
