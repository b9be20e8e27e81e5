"""What tools of torch see of a solve: the counter of floating-point operations, the meta device."""

import pytest
import torch
from helpers import Energy, Net
from torch import nn

from fpi_cuda import ConvStep, DenseStep, FixedPointLayer, GradientStep, fixed_point
from fpi_cuda.contraction import jacobian_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def net(**kwargs):
    return Net(d=3, dtype=torch.float32, **kwargs)


class Counted:
    """The counter; a product of one of net's layers, for four samples, counts `of_one`."""

    of_one = 2 * 4 * 3 * 3

    def __init__(self):
        # It imports triton, which must see first that it is to be interpreted: at collection.
        from torch.utils.flop_counter import FlopCounterMode

        self.mode = FlopCounterMode(display=False)

    def __enter__(self):
        self.mode.__enter__()
        return self

    def __exit__(self, *given):
        self.mode.__exit__(*given)
        self.total = self.mode.get_total_flops()


def test_the_iterations_of_a_module_are_counted_in_both_directions():
    layer, z = FixedPointLayer(net(), per_sample=False), randn(4, 3).requires_grad_()
    with Counted() as forward:
        x = layer(z)
    record = layer.last
    with Counted() as backward:
        x.sum().backward()
    calls = record.evaluations
    assert forward.total == calls * 3 * Counted.of_one
    # g linearised once, two layers transposed an iteration, and what three weights and z get.
    rounds = int(record.adjoint.iterations.max())
    assert backward.total == (3 + 2 * rounds + 5) * Counted.of_one


@pytest.mark.parametrize("driver", ["auto", "eager"])
@pytest.mark.parametrize("kind", ["dense", "conv", "energy", "closure", "nested"])
def test_derivatives_under_the_counter_are_those_without(kind, driver):
    z = randn(4, 3)
    w = nn.Parameter(0.3 * randn(3, 3))
    g = {
        "dense": lambda: DenseStep(3, 3),
        "conv": lambda: ConvStep(1, 1, hidden=(2,)),
        "energy": lambda: GradientStep(Energy(d=3, dtype=torch.float32), 0.3),
        "closure": lambda: lambda x, z: torch.tanh(x @ w + z),
        "nested": lambda: nn.ModuleList([net(), net(seed=1)]),
    }[kind]()
    if kind == "conv":
        z = randn(2, 1, 4, 4)
    step = (lambda x, z: 0.5 * g[0](x, z) + 0.5 * g[1](x, z)) if kind == "nested" else g
    wanted = [z.requires_grad_(), *([w] if kind == "closure" else g.parameters())]

    def grads():
        x = fixed_point(step, torch.zeros_like(z), z, driver=driver).x
        first = torch.autograd.grad(x.sin().sum(), wanted, create_graph=kind != "closure")
        if kind == "closure":
            return first
        return *first, *torch.autograd.grad(first[0].sin().sum(), wanted)

    true = grads()
    with Counted() as counted:
        mine = grads()
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # known layers run as modules
    assert counted.total > 0


def test_a_jacobians_norm_is_counted():
    with Counted() as counted:
        jacobian_norm(net(), randn(4, 3), randn(4, 3))
    assert counted.total > 0


@pytest.mark.parametrize("g", [net(), DenseStep(3, 3), GradientStep(Energy(d=3), 0.3).float()])
def test_on_the_meta_device_shapes_alone_are_found(g):
    layer = FixedPointLayer(g).to("meta")
    z = torch.empty(4, 3, device="meta", requires_grad=True)
    x = layer(z)
    assert (x.shape, x.dtype, x.is_meta) == (z.shape, z.dtype, True)
    assert "shapes only" in layer.last.path
    assert layer.last.evaluations == 1
    assert layer.last.iterations.shape == layer.last.residual_norm.shape == (4,)
    assert layer.last.iterations.is_meta
    x.sum().backward()
    for t in (z, *layer.parameters()):
        assert t.grad.is_meta
        assert t.grad.shape == t.shape


def test_on_the_meta_device_tuples_come_back_and_wrong_values_are_refused():
    a, b = torch.empty(4, 3, device="meta"), torch.empty(4, device="meta")
    x = fixed_point(lambda x, z: (x[0] * z[:, None], x[1] + z), (a, b), b).x
    assert [t.shape for t in x] == [(4, 3), (4,)]
    assert all(t.is_meta for t in x)
    assert fixed_point(lambda x: 0.5 * x, b).x.shape == (4,)
    with pytest.raises(ValueError, match="return the shape of x"):
        fixed_point(lambda x: x[:, :2], a)
    with pytest.raises(TypeError, match="return x's dtype"):
        fixed_point(lambda x: x.double(), a)
    with pytest.raises(ValueError, match="on x0's device, meta"):
        fixed_point(lambda x, z: x + z, a, torch.zeros(4, 3))
