"""Solves where there are shapes and no values: on the meta device, and of fake tensors."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fpi_cuda import (
    ConvStep,
    DenseEnergy,
    DenseStep,
    FixedPointLayer,
    GradientStep,
    Tolerance,
    fixed_point,
)
from fpi_cuda.compat import fixed_point_iteration
from fpi_cuda.contraction import Certified, lipschitz, spectral_normalize

WITHOUT = {"meta": lambda: torch.device("meta"), "fake": FakeTensorMode}


@pytest.fixture(params=WITHOUT)
def without(request):
    """In a world without values."""
    with WITHOUT[request.param]():
        yield request.param


def here(module):
    """The module made where it is; the suite's own torch.empty is unknown to torch.device."""
    device = torch.ones(()).device
    return module.to(device) if device.type == "meta" else module


def valueless(t):
    return t.is_meta or isinstance(t, FakeTensor)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x, z):
        return 0.3 * self.norm(self.linear(x)).tanh() + z


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, z):
        return self.linear(x).square().sum(-1) + (x - z).square().sum(-1)


STEPS = {
    "opaque": Normed,
    "dense": lambda: DenseStep(3, 3),
    "two layers": lambda: DenseStep(3, 3, hidden=5),
    "exact": lambda: DenseStep(3, 3, exact=True),
    "conv": lambda: ConvStep(2, 1),
    "descent": lambda: GradientStep(DenseEnergy(3, 3, hidden=4), 0.3),
    "opaque descent": lambda: GradientStep(Energy(), nn.Parameter(torch.tensor(0.3))),
    "normalised": lambda: spectral_normalize(DenseStep(3, 3)),
    "certified": lambda: Certified(spectral_normalize(ConvStep(2, 1), certified=True)),
}


@pytest.mark.parametrize("driver", ["auto", "graph"])
@pytest.mark.parametrize("name", STEPS)
def test_every_step_has_shapes_and_gradients(without, name, driver):
    layer = FixedPointLayer(here(STEPS[name]()), driver=driver, warm=True, eval_factor=2.0)
    images = any(isinstance(m, nn.Conv2d) for m in layer.modules())
    z = torch.ones(4, *((1, 5, 5) if images else (3,)), requires_grad=True)
    for mode in (True, False):
        x = layer.train(mode)(z)
        assert x.shape == (4, *((2, 5, 5) if images else (3,)))
        assert valueless(x) and valueless(layer.last.x)
        assert (x.dtype, x.device) == (z.dtype, z.device)
        x.sum().backward()
        for t in (z, *layer.parameters()):
            assert t.grad.shape == t.shape
    last = layer.last
    for t in (last.status, last.iterations, last.contraction, last.error_estimate, last.repelling):
        assert t.shape == (4,) and valueless(t)
    assert without in repr(last) and "shapes only" in repr(last)
    assert (layer.warm.hits, len(layer.warm._slots)) == (0, 0)


def test_every_state_and_option_has_shapes(without):
    z, w = torch.ones(4, 3, requires_grad=True), torch.ones(3, 3, requires_grad=True)
    state = {"u": torch.zeros(4, 3, dtype=torch.complex64), "v": (torch.zeros(4, 2), torch.ones(4))}

    def g(x, z, w, *, mask, scale):
        return {"u": 0.1j * x["u"] @ w.to(x["u"]) * mask + z, "v": x["v"]}, x["u"].real.sum(
            1
        ) * scale

    each = torch.full((4,), 1e-3)
    layer = FixedPointLayer(
        g,
        per_sample=False,
        has_aux=True,
        trace=True,
        norm_weights={"u": 4.0, "v": (1.0, 2.0)},
        tolerance=Tolerance(each, each),
        max_iterations=torch.full((4,), 30),
    )
    sizes = torch.full((4,), 2)
    x, aux = layer(z, x0=state, params=(w,), sizes=sizes, mask=torch.ones(4, 3), scale=2.0)
    assert x["u"].dtype == torch.complex64 and x["v"][1].shape == aux.shape == (4,)
    (x["u"].abs().sum() + aux.sum()).backward()
    assert z.grad.shape == z.shape and w.grad.shape == w.shape
    with pytest.raises(ValueError, match=r"sizes must have one value for each of the 4 samples"):
        layer(z, x0=state, params=(w,), sizes=sizes[:3], mask=torch.ones(4, 3), scale=2.0)
    assert fixed_point(torch.sin, torch.zeros(0, 3)).iterations.shape == (0,)
    half = torch.zeros(4, 3, dtype=torch.bfloat16)
    assert fixed_point(torch.sin, half).x.dtype == torch.bfloat16


def test_transforms_and_forward_mode_have_shapes(without):
    layer = FixedPointLayer(lambda x, z: 0.1 * x.tanh() + z)
    z = torch.ones(4, 3)
    assert torch.func.grad(lambda z: layer(z).sum())(z).shape == z.shape
    assert torch.func.jvp(layer, (z,), (z,))[1].shape == z.shape
    gradient = torch.func.grad(lambda z: layer(z).square().sum())
    assert torch.func.jvp(gradient, (z,), (z,))[1].shape == z.shape
    with forward_ad.dual_level():
        x = layer(forward_ad.make_dual(z, z), x0=forward_ad.make_dual(z, z))
        assert forward_ad.unpack_dual(x).tangent.shape == z.shape
    over = torch.vmap(lambda x0, z: layer(z, x0=x0), in_dims=(1, 0))
    assert over(torch.ones(4, 5, 3), torch.ones(5, 4, 3)).shape == (5, 4, 3)
    assert layer.last.iterations.shape == (5, 4) and valueless(layer.last.iterations)


@pytest.mark.parametrize("accelerate", [True, False])
def test_the_old_layer_has_shapes(without, accelerate):
    y, x0 = (torch.ones(4, 3, requires_grad=True),), (torch.zeros(4, 3), torch.zeros(4, 2))

    def g(x, y):
        return 0.5 * x[0] + y[0], 0.5 * x[1]

    x = fixed_point_iteration(y, x0, g, accelerate=accelerate)
    assert [t.shape for t in x] == [(4, 3), (4, 2)] and all(map(valueless, x))
    x[0].sum().backward()
    assert y[0].grad.shape == (4, 3)


def test_operations_are_counted_and_values_are_not_looked_at(without):
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    layer, z = FixedPointLayer(DenseStep(3, 3)), torch.ones(4, 3)
    with FlopCounterMode(display=False) as counter:
        layer(z)
    assert counter.get_total_flops() == 2 * 2 * 4 * 3 * 3  # z Uᵀ and x Wᵀ, once
    own = NotImplementedError, RuntimeError  # each world's
    with pytest.raises(own, match=r"meta|data.dependent|_local_scalar") as caught:
        fixed_point(lambda x: x if x.norm() > 1 else 0.5 * x, z)
    assert "must not look at values" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="can't be recorded as a graph"):
        make_fx(lambda x: fixed_point(torch.sin, x).x)(z)
    with pytest.raises(RuntimeError, match="not of fake tensors"):
        _ = fixed_point(torch.sin, z).residual_at_x
    assert lipschitz(DenseStep(3, 3)) != lipschitz(DenseStep(3, 3))  # NaN


def test_fake_tensors_leave_nothing_for_a_solve_with_values():
    layer, z = FixedPointLayer(DenseStep(3, 3), warm=True), torch.ones(4, 3)
    x, seen = layer(z), layer.warm.misses
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for around in (mode, contextlib.nullcontext()):  # fake tensors work outside of their mode too
        with around:
            fake = layer(mode.from_tensor(z))
            assert isinstance(fake, FakeTensor) and isinstance(layer.last.residual_norm, FakeTensor)
            (gradient,) = torch.autograd.grad(fake.sum(), layer.g.state_weight)
            assert isinstance(gradient, FakeTensor)
    again = layer(z)
    assert type(again) is torch.Tensor
    torch.testing.assert_close(again, x)
    assert bool(layer.last.converged.all()) and layer.last.iterations.max() == 1
    assert layer.warm.misses == seen


def test_one_world_at_a_time():
    layer, z, mode = FixedPointLayer(DenseStep(3, 3)), torch.ones(4, 3), FakeTensorMode()
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors") as caught:
        layer(mode.from_tensor(z))  # the parameters are not
    assert "of the same kind" in caught.value.__notes__[0]
    with mode, pytest.raises(ValueError, match="must all be fake"):
        layer(z)
    layer.g.state_weight = nn.Parameter(torch.ones(3, 3, device="meta"))
    with pytest.raises(ValueError, match="parameters and buffers of g must have values"):
        layer(z)
    mixing = FakeTensorMode(allow_non_fake_inputs=True)
    with mixing:
        w, fake = torch.ones(3), FixedPointLayer(DenseStep(3, 3))
        assert isinstance(fixed_point(torch.sin, z).x, FakeTensor)
    assert isinstance(fake(z), FakeTensor)  # by its parameters alone
    with pytest.raises(ValueError, match="must return values"):
        fixed_point(lambda x: 0.1 * w * x, z)
    with mode:
        fake = FixedPointLayer(DenseStep(3, 3))
    with pytest.raises(ValueError, match="must all be fake"):
        fake(z)


def test_a_model_made_on_the_meta_device_is_filled_later():
    true, z = FixedPointLayer(ConvStep(2, 1)), torch.ones(2, 1, 4, 4)
    for assign in (False, True):
        with torch.device("meta"):
            layer = here(FixedPointLayer(ConvStep(2, 1), warm=True))
            layer(torch.ones(2, 1, 4, 4))
        if not assign:
            layer.to_empty(device="cpu")
        layer.load_state_dict(true.state_dict(), assign=assign)
        assert torch.equal(layer(z), true(z))


@pytest.mark.parametrize("by", ["hooks", "forward"])
def test_weights_may_be_filled_when_a_module_is_called(by):
    """As offloading does: between calls they are on the meta device."""

    def offload(m):
        held, forward = {k: p.detach() for k, p in m.named_parameters(recurse=False)}, m.forward

        def fill(*_, device=None):
            for name, t in held.items():
                setattr(m, name, nn.Parameter(t.to(device)))

        def filled(*given):
            fill()
            out = forward(*given)
            fill(device="meta")
            return out

        fill(device="meta")
        if by == "forward":
            m.forward = filled
        else:
            m.register_forward_pre_hook(fill)
            m.register_forward_hook(lambda *_: fill(device="meta"))

    for true in (Normed().eval(), DenseStep(3, 3)):
        z, g, found = torch.randn(4, 3, requires_grad=True), copy.deepcopy(true), []
        for m in g.modules():
            if list(m.parameters(recurse=False)):
                offload(m)
        assert all(p.is_meta for p in g.parameters())
        for step in (g, true):
            x = FixedPointLayer(step)(z)
            found.append((x.detach(), *torch.autograd.grad(x.square().sum(), z)))
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    step = ConvStep(2, 1)
    for layer in step.layers:
        offload(layer)
    with pytest.raises(RuntimeError, match=r"hooks of a layer never run|offload the step whole"):
        FixedPointLayer(step)(torch.ones(2, 1, 4, 4))


def test_symbolic_sizes_stay_open():
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    z = mode.from_tensor(torch.ones(6, 3, requires_grad=True), symbolic_context=sizes)
    with mode:
        layer = FixedPointLayer(DenseStep(3, 3), warm=True)
        x = layer(z)
        x.sum().backward()
        assert layer.last.iterations.shape[0] is not None
        fixed_point(lambda x: {k: 0.5 * v for k, v in x.items()}, {"u": z, "v": z[:, :1]})
    assert not isinstance(x.shape[0], int) and z.grad.shape[1] == 3
    assert env.guards == []
