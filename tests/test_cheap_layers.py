"""Layers with gradients that cost less: within torch.compile, and started warm."""

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, Net
from helpers_layers import close
from tape import tape_fixture  # noqa: F401
from torch import nn
from torch.autograd import grad

from fpi_cuda import (
    ConvStep,
    DenseStep,
    FixedPointLayer,
    Neumann,
    OneStep,
    Phantom,
    Truncated,
    Unrolled,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Z = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)
W = torch.linspace(1, -2, 20, dtype=torch.float64).view(4, 5)
EVERY = [OneStep(), Neumann(2), Truncated(2), Unrolled(2), Phantom(3, 0.5)]
every = pytest.mark.parametrize("adjoint", EVERY, ids=lambda a: type(a).__name__)


class Normed(nn.Module):
    """Notes what it does, moves a buffer, and returns aux."""

    def __init__(self):
        super().__init__()
        self.net = Net(n=5, d=5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, z):
        self.calls += 1
        y = self.net(x, z)
        self.seen = y.square().mean()
        return y, y.sum()


@every
def test_modules_their_buffers_aux_and_eval(adjoint):
    module = Normed()
    layer = FixedPointLayer(module, adjoint=adjoint, tolerance=TIGHT, has_aux=True)
    x, aux = layer(Z)
    assert module.calls == 1
    found = grad(x, tuple(module.parameters()), W, retain_graph=True)

    def plain(adjoint):
        s = fixed_point(module.net, torch.zeros_like(Z), Z, adjoint=adjoint, tolerance=TIGHT)
        return grad(s.x, tuple(module.parameters()), W)

    for a, b in zip(found, plain(adjoint), strict=True):
        close(a, b)
    assert all(t is not None for t in grad(aux + module.seen, tuple(module.parameters())))
    with torch.no_grad():
        torch.testing.assert_close(layer(Z)[0], x.detach(), rtol=1e-11, atol=1e-12)


@every
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_steps_with_kernels_of_their_own(adjoint, kind):
    torch.manual_seed(0)
    if kind == "dense":
        step, z = DenseStep(6, 4), torch.randn(3, 4, dtype=torch.float64)
    else:
        step, z = ConvStep(2, 3, hidden=(4,)), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for p in step.double().parameters():
        p.data.mul_(0.4)
    shape = {"adjoint": adjoint, "tolerance": TIGHT, "state_shape": step.state_shape}
    layer = FixedPointLayer(step, **shape)
    plain = FixedPointLayer(lambda x, z: step(x, z) + 0, **shape)
    found, expected = (
        grad(of(z).square().sum(), tuple(step.parameters())) for of in (layer, plain)
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@every
def test_captured_solves(adjoint, tape):
    """The forward is captured, and the adjoint where it iterates."""
    net, found = Net(n=5, d=5), []
    for driver in ("eager", "graph", "graph"):
        given = {"adjoint": adjoint, "tolerance": TIGHT, "per_sample": True, "driver": driver}
        layer = FixedPointLayer(net, **given)
        found.append(grad(layer(Z), tuple(net.parameters()), W))
    assert "graph" in layer.last.path
    if isinstance(adjoint, (Neumann, Truncated)):
        assert "graph" in layer.last.adjoint.path
        assert layer.last.adjoint.iterations.tolist() == [2] * 4
        assert not layer.last.adjoint.wanting.any()
    for graph in found[1:]:
        for a, b in zip(found[0], graph, strict=True):
            close(a, b)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.no_poison
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
@every
def test_compiled_layers(adjoint):
    net = Net(n=5, d=5)
    layer = FixedPointLayer(net, adjoint=adjoint, tolerance=TIGHT)
    whole = not isinstance(adjoint, (Unrolled, Phantom))
    call = torch.compile(lambda z: 2 * layer(z), backend="aot_eager", fullgraph=whole)
    found = [
        grad(f(Z).sin().sum(), tuple(net.parameters())) for f in (call, lambda z: 2 * layer(z))
    ]
    for a, b in zip(*found, strict=True):
        close(a, b)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.no_poison
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_recorded_steps_leave_a_compiled_graph():
    net = Net(n=5, d=5)
    layer = FixedPointLayer(net, adjoint=Unrolled(2), tolerance=TIGHT)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fpi_cuda leaves the graph here"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(Z)
    layer.adjoint = OneStep()
    call = torch.compile(layer, backend="aot_eager")
    call(Z)
    layer.adjoint = Unrolled(2)  # which the graph does not see before it runs
    with pytest.raises(RuntimeError, match="Unrolled, which the layer was given after it was comp"):
        call(Z)
    found = [grad(f(Z).sin().sum(), tuple(net.parameters())) for f in (call, layer)]
    for a, b in zip(*found, strict=True):
        close(a, b)


@every
def test_warm_starts(adjoint):
    """C begins at v wherever its definition says so; a truncated one goes on from the last."""
    net, found = Net(n=5, d=5), []
    for warm in (False, True):
        layer = FixedPointLayer(net, adjoint=adjoint, tolerance=TIGHT, warm=warm)
        for _ in range(3):
            grads = grad(layer(Z).sin().sum(), tuple(net.parameters()))
        found.append(grads)
    if isinstance(adjoint, Truncated):
        layer.adjoint = TIGHT_ADJOINT
        exact = grad(layer(Z).sin().sum(), tuple(net.parameters()))
        near, far = (
            sum((a - b).norm() for a, b in zip(f, exact, strict=True)) for f in found[::-1]
        )
        assert near < 0.1 * far
    else:
        for a, b in zip(*found, strict=True):
            close(a, b)
