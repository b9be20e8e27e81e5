"""Compiled layers in programs that write to what g reads, share, replace or repeat modules."""

import copy
import warnings

import pytest
import torch
from helpers import Net
from helpers_compiled import MARKS, layer_of
from helpers_layers import Normalised, close, double
from torch import nn
from torch.autograd import grad
from torch.func import functional_call

from fpi_cuda import FixedPointLayer, FixedPointWarning, Picard, Tolerance

pytestmark = MARKS

Z = double(5, 3)


def compiled(f, backend="aot_eager", **options):
    return torch.compile(f, backend=backend, **options)


def counter():
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend("aot_eager")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scale, self.list, self.plain = Net(d=3), 1.0, [1.0], torch.ones(3).double()
        self.register_buffer("mask", None)

    def forward(self, x, z):
        y = self.net(x, z) * self.scale * self.list[0] * self.plain
        return y if self.mask is None else y * self.mask


# --- what the compiled function writes to before it calls the layer ----------------------------


def attribute(layer, z):
    layer.g.scale = layer.g.scale / 2


def attached(layer, z):
    layer.g.scale = torch.sigmoid(z.mean(0))


def item(layer, z):
    layer.g.list[0] = 0.5


def tensor(layer, z):
    layer.g.plain.mul_(0.5)


def option(layer, z):
    layer.solver, layer.max_iterations, layer.tolerance = Picard(), 3, Tolerance(0, 0)


@pytest.mark.parametrize("write", [attribute, attached, item, tensor, option])
def test_the_solve_sees_what_was_written_before(write):
    first, found = layer_of(Scaled(), on_failure="return"), []

    def f(layer, z):
        write(layer, z)
        return layer(z)

    for call in (compiled(f), f):
        layer, z = copy.deepcopy(first), Z.clone().requires_grad_()
        for _ in range(2):
            x = call(layer, z)
            found.append((x, *grad(x.sin().sum(), (z, *layer.parameters()))))
    for mine, true in zip(found[:2], found[2:], strict=True):
        for a, b in zip(mine, true, strict=True):
            close(a, b)


def test_the_solve_sees_a_variable_of_a_closure_and_modes():
    k = 0.5
    layer = layer_of(lambda x, z: k * torch.tanh(x) + z)
    normal = layer_of(Normalised(), per_sample=False)

    def f(z):
        nonlocal k
        k = k / 2
        normal.eval()
        y = normal(z)
        normal.train()
        return layer(z) + y + normal(z)

    state = copy.deepcopy(normal.state_dict())
    x = compiled(f)(Z)
    k = 0.5
    normal.load_state_dict(state)
    close(x, f(Z))


def test_a_counter_beside_the_layer_keeps_one_graph():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.steps = layer_of(Scaled()), 0

        def forward(self, z):
            self.steps += 1
            return self.layer(z)

    model = Model()
    close(compiled(model, fullgraph=True)(Z), model.layer(Z))
    assert model.steps == 1


def test_an_attribute_of_a_class_and_the_meta_device():
    class G(nn.Module):
        scale = 0.5

        def forward(self, x, z):
            return self.scale * torch.tanh(x) + z

    layer = layer_of(G())

    def f(z):
        G.scale = 0.25
        return layer(z)

    x = compiled(f)(Z)
    close(x, layer(Z))
    assert compiled(layer)(Z.to("meta")).shape == Z.shape


def test_functional_call_moves_the_buffers_that_it_is_given():
    layer = layer_of(Normalised().train(), per_sample=False)
    before, found = copy.deepcopy(dict(layer.named_buffers())), []

    def f(given, z):
        return functional_call(layer, given, (z,))

    for call in (compiled(f), f):
        given = {name: t.clone() for name, t in before.items()}
        found.append((call(given, Z), *given.values()))
        for mine, true in zip(layer.buffers(), before.values(), strict=True):
            assert torch.equal(mine, true)
    for mine, true in zip(*found, strict=True):
        close(mine, true)


# --- calls ---------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_call_and_make_no_graphs():
    seen = []

    def g(x, z, k):
        seen.append(k)
        return 0.3 * k * torch.tanh(x) + z

    layer, count = layer_of(g), counter()
    call = compiled(layer, count, fullgraph=True)
    for k in (0.125, 0.25, 0.5, 0.75):
        close(call(Z, k), layer(Z, k))
        assert set(seen) == {k}
        seen.clear()
    assert count.frame_count <= 2
    for k in (True, 1.0, 1):
        call(Z, k)
        assert {type(v) for v in seen} == {type(k)}
        seen.clear()


def test_two_equal_calls_are_two():
    def g(x, z):
        return torch.nn.functional.dropout(0.5 * x + z)

    layer = FixedPointLayer(g, max_iterations=3, tolerance=Tolerance(0, 0))
    x, y = compiled(lambda z: (layer(z), layer(z)))(Z)
    assert not torch.equal(x, y)


def test_images_of_other_sizes_are_one_graph_more():
    net = nn.Conv2d(2, 2, 3, padding=1).double()
    layer, count = layer_of(lambda x, z: 0.3 * torch.tanh(net(x)) + z), counter()
    call = compiled(layer, count, fullgraph=True)
    for b, h, w in ((2, 3, 4), (3, 5, 6), (4, 6, 7)):
        z = double(b, 2, h, w)
        close(call(z), layer(z))
    assert count.frame_count <= 2


def test_the_warning_is_at_the_callers_line():
    layer = layer_of(Net(d=3), max_iterations=1)
    call = compiled(layer, "eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(Z)
    assert [w.filename for w in caught if w.category is FixedPointWarning] == [__file__]


def test_hooks_that_copy_saved_tensors_are_refused():
    call = compiled(layer_of(Net(d=3)))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        x = call(Z)
    with pytest.raises(RuntimeError, match="hooks on saved tensors gave copies"):
        x.sum().backward()


def test_another_thread_that_compiles_is_none_of_an_eager_call(monkeypatch):
    layer, z = layer_of(Scaled()), Z.clone().requires_grad_()
    (true,) = grad(layer(z).sum(), z)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(layer, "_compiled", None)
    close(grad(layer(z).sum(), z)[0], true)


# --- modules that are replaced, shared, repeated -------------------------------------------------


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.a = base, nn.Parameter(0.1 * double(3, 3))

    def forward(self, x):
        return self.base(x) + x @ self.a


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(3, 3).double() for _ in range(2))
        self.b.weight = self.a.weight
        self.register_buffer("mask", None)

    def forward(self, x, z):
        y = 0.4 * torch.tanh(self.a(x) + self.b(z)) + z
        return y if self.mask is None else y * self.mask


def test_a_change_of_g_is_another_graph():
    layer = layer_of(Pair())
    call = compiled(layer, fullgraph=True)
    close(call(Z), layer(Z))

    def untied():
        layer.g.b.weight = nn.Parameter(2 * layer.g.a.weight.detach())

    def masked():
        layer.g.mask = double(3)

    def adapted():
        layer.g.a = Adapted(layer.g.a)

    def replaced():
        layer.g.a = Adapted(nn.Linear(3, 3).double())

    for change in (untied, masked, adapted, replaced):
        change()
        found = []
        for f in (call, layer):
            z = Z.clone().requires_grad_()
            x = f(z)
            found.append((x, *grad(x.sin().sum(), (z, *layer.parameters()))))
        for mine, true in zip(*found, strict=True):
            close(mine, true)


def test_parameters_that_come_to_be_shared_are_refused_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(0.3 * double(3)) for _ in range(2))

        def forward(self, x, z):
            return torch.tanh(self.a * x + self.b * z)

    layer = layer_of(Net())
    call = compiled(layer)
    call(Z)
    layer.g.b = layer.g.a
    with pytest.raises(RuntimeError, match="needs the modules that g called"):
        call(Z)
    close(call(Z), layer(Z))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = layer_of(Net(d=3)), nn.Linear(3, 3).double()

    def forward(self, z):
        return self.out(self.layer(z))


def test_blocks_that_are_alike_share_a_graph():
    """More of them than the compiler makes graphs of one function (8)."""
    count, blocks = counter(), nn.Sequential(*[Block() for _ in range(10)])
    true, z = blocks(Z), Z.clone().requires_grad_()
    for block in blocks:
        block.compile(backend=count, fullgraph=True)
    x = blocks(z)
    close(x, true)
    parameters = [*blocks.parameters()]
    mine = grad(x.sin().sum(), parameters)
    later = [Block(), copy.deepcopy(blocks[3])]
    for block in later:
        close(compiled(block, count, fullgraph=True)(Z), block(Z))
    assert count.frame_count <= 2
    torch.compiler.reset()
    twin = copy.deepcopy(blocks)
    for block in twin:
        block._compiled_call_impl = None
    for a, b in zip(mine, grad(twin(Z).sin().sum(), [*twin.parameters()]), strict=True):
        close(a, b)
