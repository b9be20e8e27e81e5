"""Layers within torch.compile: part of the graph, with the values and gradients of eager ones."""

import copy

import pytest
import torch
from helpers import Net
from helpers_compiled import LAYER, MARKS, NET, STEPS, W, Z, compiled, layer_of, same
from helpers_layers import Normalised, close, double
from torch import nn
from torch.autograd import grad

from fpi_cuda import (
    Anderson,
    ConvStep,
    FixedPointError,
    FixedPointLayer,
    FixedPointWarning,
    Picard,
    Tolerance,
)

pytestmark = MARKS


class Model(nn.Module):
    def __init__(self, layer, n=3):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, n), layer, nn.Linear(n, 2)

    def forward(self, t):
        return self.last(self.layer(torch.relu(self.first(t))))


# --- whole models ----------------------------------------------------------------------------


def tree(x, z):
    return {"a": 0.5 * torch.tanh(x["a"]) + z, "b": (0.3 * x["b"][0] + x["a"].sum(1),)}


@pytest.mark.parametrize("step", STEPS)
def test_a_model_is_one_graph_and_two_for_any_batch(step):
    from torch._dynamo.testing import CompileCounterWithBackend

    model = Model(layer_of(STEPS[step]())).double()
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(model, counter)
    parameters = [*model.parameters(), *NET.parameters()]
    for b in range(2, 6 if step != "module" else 12):
        t = double(b, 4)
        found = [
            (y, *grad(y.square().sum(), parameters, allow_unused=True)) for y in (call(t), model(t))
        ]
        for mine, true in zip(*found, strict=True):
            assert (mine is None) == (true is None)
            if true is not None:
                close(mine, true)
        assert counter.frame_count <= 2
        with torch.no_grad():
            for p in parameters:
                p.mul_(0.99)
    frames = counter.frame_count
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            close(call(t), model(t))
    assert counter.frame_count - frames <= 2
    torch._dynamo.reset_code_caches()


@pytest.mark.parametrize("step", ["module", "two dense layers"])
def test_inductor(step):
    model = Model(layer_of(STEPS[step]())).double()
    same(model, [double(4, 4)], [*model.parameters()], backend="inductor")


def test_images():
    step = ConvStep(2, 1, hidden=(3,)).double()
    same(layer_of(step), [double(2, 1, 6, 5)], [*step.parameters()])


def test_training_takes_the_steps_of_an_eager_model():
    model = Model(layer_of(Net(d=3))).double()
    twin, t = copy.deepcopy(model), double(6, 4)
    call = compiled(model)
    for f, m in ((call, model), (twin, twin)):
        optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            f(t).square().sum().backward()
            optimizer.step()
    for mine, true in zip(model.parameters(), twin.parameters(), strict=True):
        close(mine, true)


# --- what a call is given --------------------------------------------------------------------

KEYWORD = layer_of(lambda x, z, w, k=2, u=None: torch.tanh(x @ w["w"] * (k / 2) + z))
TREE = layer_of(tree, state_shape={"a": (3,), "b": ((),)}, norm_weights={"a": 4.0, "b": (1.0,)})
COMPLEX = layer_of(lambda x, z: 0.5j * x.conj() + z)
TWICE = layer_of(lambda x, y, z: 0.3 * torch.tanh(x) + y * z + y)
OWN = torch.full((5,), 1e-3, dtype=torch.float64)

CALLS = {
    "x0": lambda z, w: LAYER(z, x0=torch.ones_like(z)),
    "a tolerance and a count": lambda z, w: LAYER(z, tolerance=Tolerance(1e-3), max_iterations=9),
    "those of each sample": lambda z, w: LAYER(
        z, tolerance=Tolerance(OWN), max_iterations=torch.full((5,), 50), sizes=torch.full((5,), 3)
    ),
    "params": lambda z, w: layer_w(z, params=(w,)),
    "keywords": lambda z, w: KEYWORD(z, w={"w": w, "n": None}, k=1),
    "not tensors by position": lambda z, w: KEYWORD(z, {"w": w}, 2, None),
    "a tensor twice": lambda z, w: TWICE(z, z),
    "two layers": lambda z, w: LAYER(LAYER(z)),
    "changed in place": lambda z, w: LAYER(z).relu_(),
}
layer_w = layer_of(lambda x, z, w: torch.tanh(x @ w + z))


@pytest.mark.parametrize("call", CALLS)
def test_a_call(call):
    same(CALLS[call], [Z, W], [*NET.parameters()])


def test_states_of_other_kinds():
    same(TREE, [Z], loss=lambda x: x["a"].sin().sum() + x["b"][0].cos().sum())
    x0 = torch.zeros(5, 3, dtype=torch.complex128)
    same(lambda z: COMPLEX(z, x0=x0), [Z], loss=lambda x: x.abs().square().sum())


def test_a_call_of_another_count_is_another_call():
    call = compiled(lambda z, n: LAYER(z, max_iterations=n, tolerance=Tolerance(0, 0)), "eager")
    for n in (3, 7, 5):
        call(Z, n)
        assert LAYER.last.iterations.tolist() == [n] * 5


# --- what a layer does beside its value ------------------------------------------------------


def test_buffers_move_once_and_the_graph_sees_it():
    net = Normalised().train()
    layer, twin = (layer_of(n, per_sample=False) for n in (net, copy.deepcopy(net)))

    def f(layer):
        def call(z):
            x = layer(z)
            return x, layer.g.norm.running_mean * 2

        return call

    found = []
    for call, g in ((compiled(f(layer)), net), (f(twin), twin.g)):
        z = Z.clone().requires_grad_()
        x, mean = call(z)
        gradients = grad(x.sin().sum(), (z, *g.parameters()))
        found.append((x, mean, *g.buffers(), *gradients))
    for mine, true in zip(*found, strict=True):
        close(mine, true)


def test_modes_are_those_of_the_forward():
    layer = layer_of(Normalised().train(), per_sample=False)
    z = Z.clone().requires_grad_()
    x = layer(z)
    (true,) = grad(x.sin().sum(), z)
    x = compiled(layer)(z)
    layer.eval()
    close(grad(x.sin().sum(), z)[0], true)


class Router(nn.Module):
    def __init__(self, aux=False):
        super().__init__()
        self.net, self.aux, self.loss, self.seen = Net(d=3), aux, None, None

    def forward(self, x, z):
        y = self.net(x, z)
        self.seen = y.detach()
        self.loss = None if self.aux == "none" else y.square().mean()
        return (y, {"loss": y.exp().sum()}) if self.aux is True else y


def test_aux_is_part_of_the_graph_and_what_g_leaves_attached():
    g = Router(aux=True)
    layer = layer_of(g, has_aux=True)
    found = []
    for call in (compiled(layer), layer):
        z = Z.clone().requires_grad_()
        x, aux = call(z)
        loss = x.sin().sum() + aux["loss"] + g.loss
        found.append((loss, *grad(loss, (z, *g.parameters()))))
    for mine, true in zip(*found, strict=True):
        close(mine, true)


def test_without_aux_what_g_leaves_is_detached_or_refused():
    g = Router(aux="none")
    x = compiled(layer_of(g))(Z)
    close(g.seen, x)
    with pytest.raises(RuntimeError, match="must not leave a tensor that needs gradients"):
        compiled(layer_of(Router()))(Z)
    with torch.no_grad():
        compiled(layer_of(Router()))(Z)


def test_the_record_of_a_call_and_of_its_adjoint():
    call = compiled(LAYER)
    z = Z.clone().requires_grad_()
    for f in (call, LAYER):
        LAYER.last = None
        x = f(z)
        last = LAYER.last
        assert last.adjoint is None
        x.sum().backward()
        assert torch.equal(last.x, x)
        assert last.converged.all() and last.adjoint.converged.all()
        assert not last.x.requires_grad
        assert last.residual_at_x.max() < 1e-12


def test_the_record_is_read_after_the_graph_ran():
    def f(z):
        x = LAYER(z)
        return x * LAYER.last.iterations.sum()

    for z in (Z, Z[:2] * 9):
        close(torch.compile(f, backend="eager")(z), f(z))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leaves the graph here"):
        compiled(f)(Z)


def test_warm_starts_go_on():
    layer = layer_of(Net(d=3), warm=True)
    call = compiled(lambda z, k: layer(z, key=("batch", k)))
    for k in (0, 1, 0, 1):
        call(Z + k, k)
    assert (layer.warm.hits, layer.warm.misses) == (2, 2)
    assert layer.last.iterations.max() == 1


def test_options_are_those_of_the_call():
    layer = layer_of(NET)
    call = compiled(layer)
    call(Z)
    layer.solver, layer.max_iterations, layer.on_failure = Picard(), 2, "raise"
    with pytest.raises(FixedPointError, match="5 of 5 samples") as caught:
        call(Z)
    assert caught.value.solution.iterations.tolist() == [2] * 5
    layer.on_failure = "warn"
    with pytest.warns(FixedPointWarning):
        call(Z)
    seen = []
    layer.solver, layer.on_failure = Anderson(), "return"
    layer.callback, layer.trace = lambda *shown: seen.append(shown[0]), True
    call(Z)
    assert seen == [1, 2]
    assert len(layer.last.trace) == 2


def test_failed_samples_have_no_gradient():
    layer = layer_of(lambda x, z: torch.where(z > 2, 2 * x + z, 0.5 * x + z), on_failure="return")
    z = Z.clamp(-1, 1)
    z[1] = 3
    same(layer, [z])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = Model(FixedPointLayer(Net(d=3).float(), on_failure="return")).float()
    t, found = torch.randn(5, 4), []
    for call in (compiled(model), model):
        with torch.autocast("cpu", dtype):
            y = call(t)
        found.append((y, model.layer.last.iterations, *grad(y.sum(), [*model.parameters()])))
        assert model.layer.last.x.dtype == torch.float32
    for mine, true in zip(*found, strict=True):
        torch.testing.assert_close(mine, true, rtol=0.03, atol=0.03)
