"""Weights held below their share, in training and out of it."""

import copy
import io
import math

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, unroll
from helpers_contraction import matrix
from torch import nn
from torch.nn.utils import parametrize

from fpi_cuda import (
    ConvStep,
    DenseEnergy,
    DenseStep,
    FixedPointLayer,
    GradientStep,
    NeuralStep,
    fixed_point,
)
from fpi_cuda.contraction import Certified, convolution_norm, lipschitz, spectral_normalize

pytestmark = pytest.mark.usefixtures("one_thread")

HELD = {
    "dense": lambda: DenseStep(5, 3),
    "two layers": lambda: DenseStep(5, 3, hidden=7, activation="sigmoid", residual=-0.3),
    "gelu": lambda: DenseStep(5, 3, hidden=4, activation="gelu", output_activation="gelu"),
    "descent": lambda: GradientStep(DenseEnergy(5, 3, hidden=7, curvature=0.6), 1.0),
    "descent, sigmoid": lambda: GradientStep(
        DenseEnergy(5, 3, hidden=7, activation="sigmoid"), step_size=1.2
    ),
    "conv": lambda: ConvStep(2, 1, hidden=(3, 4), residual=0.2),
    "conv, 5": lambda: ConvStep(2, 1, hidden=(), kernel_size=5, output_activation="tanh"),
    "sequence": lambda: NeuralStep(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 2, 3, padding="same"))
    ),
}


def inputs_of(step):
    if any(isinstance(m, nn.Conv2d) for m in step.modules()):
        images = torch.randn(3, 2, 6, 7), torch.randn(3, 1, 6, 7)
        return images[:1] if isinstance(step, NeuralStep) else images
    return torch.randn(3, 5), torch.randn(3, 3)


def train(step, optimiser, steps=1):
    for _ in range(steps):
        inputs = inputs_of(step)
        optimiser.zero_grad()
        (-step(*inputs).abs().mean()).backward()
        optimiser.step()
        with torch.no_grad():
            step(*inputs)  # an energy's vector does not move under its gradient


@pytest.mark.parametrize("bound", [0.9, 2.5])
@pytest.mark.parametrize("name", list(HELD))
def test_certified_weights_keep_the_bound_through_training(name, bound):
    step = spectral_normalize(HELD[name](), bound, certified=True)
    assert lipschitz(step) <= bound
    raw = {n: p.detach().clone() for n, p in step.named_parameters()}
    train(step, torch.optim.SGD(step.parameters(), lr=100.0))
    assert any("original" in n and not torch.equal(p, raw[n]) for n, p in step.named_parameters())
    assert lipschitz(step) <= bound
    with torch.no_grad():
        for n, p in step.named_parameters():
            if "original" in n:
                p.mul_(100)
    tight = lipschitz(step)
    assert tight <= bound
    assert tight == pytest.approx(bound, rel=1e-5)
    assert not list(step.buffers())


@pytest.mark.parametrize("name", list(HELD))
def test_estimates_follow_the_weights_through_training(name):
    size = (6, 7) if "conv" in name or name == "sequence" else None
    step = HELD[name]()
    with torch.no_grad():
        for p in step.parameters():
            p.mul_(3)
    spectral_normalize(step, size=size)
    train(step, torch.optim.Adam(step.parameters(), lr=1e-2), steps=100)
    held = [m for m in step.modules() if isinstance(m, parametrize.ParametrizationList)]
    assert held

    def norms(weights):
        dense = (matrix(w.detach(), size) if size else w.detach() for w in weights)
        return torch.stack([torch.linalg.matrix_norm(w, 2) for w in dense])

    assert norms([w.original for w in held]).max() > 1.02 * held[0][0].share
    assert norms([w() for w in held]).max() <= 1.05 * held[0][0].share


def test_without_a_size_convolutions_take_the_bound_and_matrices_an_estimate():
    assert not list(spectral_normalize(ConvStep(2, 1)).buffers())
    assert len(list(spectral_normalize(ConvStep(2, 1), size=(5, 6)).buffers())) == 3
    assert len(list(spectral_normalize(DenseStep(4, 1)).buffers())) == 1
    net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(40, 3))
    images, vector = spectral_normalize(net, size=(4, 5)).buffers()
    assert images.shape == (2, 4, 5)
    assert vector.shape == (40,)


@pytest.mark.parametrize("certified", [True, False])
def test_a_weight_below_its_share_stays_as_it_is(certified):
    step = DenseStep(5, 3, hidden=4)
    x, z = inputs_of(step)
    with torch.no_grad():
        for weight in (step.state_weight, step.output_weight):
            weight.mul_(0.4)
        plain = step(x, z)
        weight = step.state_weight.clone()
        spectral_normalize(step, certified=certified)
        assert torch.equal(step.state_weight, weight)
        assert torch.equal(step(x, z), plain)
        step.state_weight = torch.zeros(4, 5)
        assert torch.equal(step.state_weight, torch.zeros(4, 5))
    step(x, z).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in step.parameters())


def test_derivatives_pass_through_the_scale():
    step = spectral_normalize(DenseStep(4, 2).double(), 0.5, certified=True)
    raw = step.parametrizations.state_weight.original

    def weight(raw):
        norm = torch.linalg.matrix_norm(raw, 2)
        return raw * (0.5 / norm)

    c = torch.randn(4, 4, dtype=torch.float64)
    (got,) = torch.autograd.grad((step.state_weight * c).sum(), raw)
    (want,) = torch.autograd.grad((weight(raw) * c).sum(), raw)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    estimated = spectral_normalize(DenseStep(4, 2).double(), 0.5).eval()
    raw = estimated.parametrizations.state_weight.original
    held = estimated.parametrizations.state_weight[0]
    assert torch.autograd.gradcheck(held, raw)


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize("name", ["dense", "two layers", "descent", "conv"])
def test_a_normalised_step_is_solved_like_any_other(name, certified):
    step = HELD[name]().double()
    with torch.no_grad():
        for p in step.parameters():
            p.mul_(3)
    size = (6, 7) if name == "conv" and not certified else None
    plain_path = FixedPointLayer(step, max_iterations=3, on_failure="return")
    z = inputs_of(step)[1].double().requires_grad_()
    plain_path(z)
    spectral_normalize(step, 0.6, size=size, certified=certified)
    for v in step.buffers():
        v.add_(0.1 * torch.randn_like(v))  # away from where it rests
    oracle = copy.deepcopy(step).eval()
    before = [b.clone() for b in step.buffers()]
    layer = FixedPointLayer(step, tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
    layer.eval()
    x = layer(z)
    assert layer.last.path.split(",")[:2] == plain_path.last.path.split(",")[:2]
    assert bool(layer.last.converged.all())
    true = unroll(oracle, torch.zeros_like(x), z, steps=90)
    torch.testing.assert_close(x, true)
    mine = torch.autograd.grad(x.sin().sum(), (z, *step.parameters()))
    theirs = torch.autograd.grad(true.sin().sum(), (z, *oracle.parameters()))
    torch.testing.assert_close(mine, theirs)
    assert all(torch.equal(a, b) for a, b in zip(before, step.buffers(), strict=True))
    layer.train()(z)  # a training call moves each vector once, by one iteration
    once = copy.deepcopy(oracle).train()
    with torch.no_grad():
        once(x, z)
    for a, b, c in zip(step.buffers(), once.buffers(), before, strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("size", [None, (6, 7)])
def test_the_estimate_is_good_before_any_training(size):
    layer = nn.Linear(30, 20) if size is None else nn.Conv2d(2, 3, 3, padding=1)
    with torch.no_grad():
        layer.weight.mul_(20)
    spectral_normalize(nn.Sequential(layer).eval(), 0.5, size=size)
    weight = layer.weight.detach()
    norm = torch.linalg.matrix_norm(weight if size is None else matrix(weight, size), 2)
    assert float(norm) == pytest.approx(0.5, rel=2e-3)


def test_a_training_call_is_ten_iterations_and_another_none():
    step = spectral_normalize(ConvStep(2, 1, hidden=()), size=(6, 7))
    held = step.layers[0].parametrizations.weight
    start = torch.randn(2, 6, 7)
    start /= torch.linalg.vector_norm(start)
    held[0].v.copy_(start)
    with torch.no_grad():
        held.original.mul_(9)
        for training in (False, True):
            weight = step.train(training).layers[0].weight
            norm, v = convolution_norm(
                held.original, (6, 7), iterations=10 if training else 0, v=start
            )
            torch.testing.assert_close(weight, held.original * (0.9 / norm), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(held[0].v, v, rtol=1e-4, atol=1e-5)


def test_lipschitz_moves_no_buffer():
    step = spectral_normalize(DenseStep(5, 3), 0.5)
    v = next(step.buffers()).copy_(torch.ones(5) / 5**0.5).clone()
    lipschitz(step)
    assert torch.equal(next(step.buffers()), v)
    step(*inputs_of(step))
    assert not torch.equal(next(step.buffers()), v)


@pytest.mark.parametrize(("make", "size"), [(HELD["dense"], None), (HELD["conv"], (6, 7))])
def test_copies_and_state_dicts(make, size):
    step = spectral_normalize(make(), 0.5, size=size)
    train(step, torch.optim.SGD(step.parameters(), lr=1.0))
    inputs = inputs_of(step)
    file = io.BytesIO()
    torch.save(step.state_dict(), file)
    file.seek(0)
    fresh = spectral_normalize(make(), 0.5, size=size)
    fresh.load_state_dict(torch.load(file))
    twin = copy.deepcopy(step)
    with torch.no_grad():
        for other in (fresh, twin):
            assert torch.equal(other.eval()(*inputs), step.eval()(*inputs))
    train(twin.train(), torch.optim.SGD(twin.parameters(), lr=1.0))
    assert torch.equal(fresh(*inputs), step(*inputs))  # the copy has its own tensors
    plain = step.state_weight if size is None else step.layers[0].weight
    module = step if size is None else step.layers[0]
    name = "state_weight" if size is None else "weight"
    parametrize.remove_parametrizations(module, name)
    assert type(module) in (DenseStep, nn.Conv2d)
    torch.testing.assert_close(getattr(module, name), plain)


def test_half_and_moved_dtypes():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for size in (None, (4, 4)):
            step = spectral_normalize(ConvStep(2, 1, hidden=(3,)), 0.5, size=size).to(dtype)
            with torch.no_grad():
                for layer in step.layers:
                    layer.parametrizations.weight.original.mul_(8)
            for layer in step.layers:
                assert layer.weight.dtype == dtype
            if size is None:
                assert lipschitz(step) <= 0.5
            else:
                norms = (matrix(layer.weight.detach().double(), size) for layer in step.layers)
                assert math.prod(float(torch.linalg.matrix_norm(a, 2)) for a in norms) <= 0.52


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 4), (1, 6), (2, 3, 3, 3)])
@pytest.mark.parametrize("norm", [0.98, 1.02, 20.0])
def test_gradients_in_16_bits_are_those_of_float64(norm, shape, certified):
    """Also where a norm is near its share, by more than its rounding: the gradient jumps there."""
    size = (4, 4) if len(shape) == 4 and not certified else None
    layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(3, 2, 3, padding=1)
    net = nn.Sequential(layer.double())
    with torch.no_grad():
        layer.weight.mul_(norm * 0.5 / lipschitz(net) if size is None else norm)
    spectral_normalize(net, 0.5, size=size, certified=certified).eval()
    c = torch.randn(shape, dtype=torch.float64)

    def gradient(net, dtype):
        net, weight = net.to(dtype), net[0].parametrizations.weight.original
        return torch.autograd.grad(net[0].weight, weight, c.to(dtype))[0].double()

    for dtype, within in ((torch.bfloat16, 0.015), (torch.float16, 0.0025)):
        low = copy.deepcopy(net).to(dtype)
        want = gradient(copy.deepcopy(low), torch.float64)
        off = float(torch.linalg.vector_norm(gradient(low, dtype) - want))
        scale = 1.0 if norm < 1 else 0.5 / max(norm, 1)  # a scalar above its share has none
        least = scale * float(torch.linalg.vector_norm(c))
        assert off <= within * max(float(torch.linalg.vector_norm(want)), least)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_certified_weights_keep_the_bound_where_all_entries_are_rounded_up(dtype):
    for shape in ((7, 7), (3, 64), (2, 2, 3, 3)):
        conv = len(shape) == 4
        layer = nn.Conv2d(2, 2, 3, padding=1) if conv else nn.Linear(shape[1], shape[0])
        net = spectral_normalize(nn.Sequential(layer), 0.7, certified=True).to(dtype)
        for value in torch.linspace(1, 2, 9):
            layer.weight = torch.full(shape, float(value), dtype=dtype)
            assert 0.68 < lipschitz(net) <= 0.7


@pytest.mark.parametrize("name", ["dense", "two layers", "descent", "conv"])
def test_autocast_rounds_weights_and_bounds_stay_bounds(name):
    step = HELD[name]()
    with torch.no_grad():
        for p in step.parameters():
            p.mul_(3)
    spectral_normalize(step, 0.8, certified=True)
    z = inputs_of(step)[1]
    x0 = torch.zeros(3, 2, 6, 7) if name == "conv" else torch.zeros(3, 5)
    plain = lipschitz(step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = fixed_point(Certified(step), x0, z, max_iterations=60, on_failure="return")
        assert s.record.lipschitz == lipschitz(step)
    rounded = copy.deepcopy(step)
    for m in rounded.modules():
        for weight in list(getattr(m, "parametrizations", ())):
            parametrize.remove_parametrizations(m, weight)
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.bfloat16())
    assert max(plain, lipschitz(rounded)) <= s.record.lipschitz <= 0.81
    z = z.bfloat16().double()
    true = fixed_point(rounded.double(), x0.double(), z, tolerance=TIGHT, max_iterations=400).x
    error = (s.x - true).flatten(1).norm(dim=1)
    assert bool((error <= s.error_bound).all())


def test_a_shared_layer_is_normalised_once():
    layer = nn.Linear(4, 4)
    net = spectral_normalize(nn.Sequential(layer, nn.Tanh(), layer), 0.25, certified=True)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(100)
    assert len(layer.parametrizations.weight) == 1
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(0.5, rel=1e-5)
    assert lipschitz(net) == pytest.approx(0.25, rel=1e-5)


def test_what_can_not_be_normalised():
    for bad in (0.0, -1.0, math.inf, math.nan, "0.9", None):
        with pytest.raises(ValueError, match="bound must be a finite number > 0"):
            spectral_normalize(DenseStep(3, 2), bad)
    for step in (DenseStep(3, 2, residual=-0.9), ConvStep(2, 1, residual=1.0)):
        with pytest.raises(ValueError, match=r"\|residual\| must be below"):
            spectral_normalize(step, 0.9)
    with pytest.raises(ValueError, match=r"step_size \* curvature\| must be below bound"):
        spectral_normalize(GradientStep(DenseEnergy(3, 2, hidden=2, curvature=0.1), 0.5))
    for step in (
        GradientStep(DenseEnergy(3, 2, hidden=2, convex=False), 0.5),
        GradientStep(DenseEnergy(3, 2, hidden=2), nn.Parameter(torch.tensor(0.5))),
    ):
        with pytest.raises(TypeError, match="convex and its step size a number"):
            spectral_normalize(step)
    with pytest.raises(ValueError, match="no weight"):
        spectral_normalize(nn.Sequential(nn.Tanh()))
    with pytest.raises(ValueError, match="leave size out"):
        spectral_normalize(ConvStep(2, 1), size=(4, 4), certified=True)
    with pytest.raises(ValueError, match="stride 1"):
        spectral_normalize(nn.Sequential(nn.Conv2d(2, 2, 3)), size=(4, 4))
    for size in ((4,), (4, 4, 4), (0, 4), (4.0, 4), 4, "44", (True, 4)):
        with pytest.raises(ValueError, match=r"size must be \(H, W\)"):
            spectral_normalize(ConvStep(2, 1), size=size)
    step = spectral_normalize(DenseStep(3, 2))
    with pytest.raises(ValueError, match="parametrised already"):
        spectral_normalize(step)
    assert len(step.parametrizations.state_weight) == 1
