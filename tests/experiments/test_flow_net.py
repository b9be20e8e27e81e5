"""Optical flow: the net, and the layer behind it."""

import math

import pytest
import torch

from experiments.flow import flownet, study
from experiments.flow import task as flow_task
from experiments.flow.flownet import FlowNetS, Refined
from experiments.flow.task import KINDS, NET, ONCE, REFINED

pytestmark = pytest.mark.usefixtures("one_thread")
FULL_SIZE = 38_676_506  # parameters of the paper's net


def images(rows, columns, b=2, seed=0):
    """Two smooth images [b, 3, rows, columns], 0 to 1."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(2 * b, 3, 6, 8, generator=g)
    big = torch.nn.functional.interpolate(small, (rows, columns), mode="bicubic").clamp(0, 1)
    return big[:b], big[b:]


def refined(method, seed=0, size=(48, 64), width=0.05):
    torch.manual_seed(seed)
    return Refined(width, KINDS[method], size)


def read_something(model):
    """Give R values, which is zero before training."""
    torch.manual_seed(5)
    torch.nn.init.normal_(model.read.weight, std=0.1)
    return model


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def full():
    return FlowNetS(1)


def test_the_layer_is_less_than_a_ten_thousandth_of_the_full_size_net(full):
    assert parameters(full) == FULL_SIZE
    for method in (REFINED, ONCE):
        model = refined(method)
        added = parameters(model) - parameters(model.net)
        assert added == parameters(model.layer) + parameters(model.read)
        assert 0 < added < 1e-4 * FULL_SIZE
    assert parameters(refined(NET)) == parameters(refined(NET).net)


def test_the_full_size_net_has_the_papers_channels(full):
    convolutions = [m for m in full.stages.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions] == [
        (64, 7, 2),
        (128, 5, 2),
        (256, 5, 2),
        (256, 3, 1),
        (512, 3, 2),
        (512, 3, 1),
        (512, 3, 2),
        (512, 3, 1),
        (1024, 3, 2),
        (1024, 3, 1),
    ]
    assert [m.out_channels for m in full.up] == [512, 256, 128, 64]
    assert [m.in_channels for m in full.predict] == [1024, 1026, 770, 386, 194]


@pytest.mark.parametrize(("rows", "columns"), [(96, 128), (75, 100), (64, 64), (1, 5)])
def test_flows_at_five_scales_of_any_size(rows, columns):
    first, second = images(rows, columns)
    for method in KINDS:
        with torch.no_grad():
            flows, penalty = refined(method).eval()(first, second)
        assert [tuple(f.shape) for f in flows] == [
            (2, 2, math.ceil(rows / s), math.ceil(columns / s)) for s in (4, 8, 16, 32, 64)
        ]
        assert penalty == 0
        assert flownet.enlarged(flows[0], rows, columns).shape == (2, 2, rows, columns)


def test_what_is_repeated_beyond_the_border_is_what_a_larger_image_would_hold():
    """A net fed with an image and one fed with it padded by hand find the same."""
    first, second = images(50, 70)
    net = refined(NET).eval().net
    padded = [torch.nn.functional.pad(i, (0, 58, 0, 14), mode="replicate") for i in (first, second)]
    with torch.no_grad():
        odd, whole = net(first, second), net(*padded)
    for a, b in zip(odd, whole, strict=True):
        torch.testing.assert_close(a, b[..., : a.shape[-2], : a.shape[-1]])


def test_the_brightness_of_both_images_changes_no_flow():
    first, second = images(64, 64)
    net = refined(NET).eval().net
    with torch.no_grad():
        for a, b in zip(net(first, second), net(first + 0.2, second + 0.2), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_one_seed_starts_all_methods_alike():
    first, second = images(48, 64)
    models = {method: refined(method, seed=3).eval() for method in KINDS}
    weights = {method: model.net.state_dict() for method, model in models.items()}
    with torch.no_grad():
        flows = {method: model(first, second)[0] for method, model in models.items()}
    for method in (REFINED, ONCE):
        for name, value in weights[NET].items():
            assert torch.equal(value, weights[method][name]), name
        for a, b in zip(flows[NET], flows[method], strict=True):
            assert torch.equal(a, b)
    layers = [models[method].layer.g.state_dict() for method in (REFINED, ONCE)]
    assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])
    with torch.no_grad():
        other = refined(NET, seed=4).eval()(first, second)[0]
    assert not torch.allclose(other[0], flows[NET][0])


def test_once_is_a_solve_that_ends_after_one_iteration():
    first, second = images(48, 64)
    once, fixed = (read_something(refined(m, seed=3).eval()) for m in (ONCE, REFINED))
    with torch.no_grad():
        converged = fixed(first, second)[0][0]
        assert fixed.layer.last.converged.all() and fixed.layer.last.iterations.min() > 1
        fixed.evaluated = study.Tolerance(0, 0), 1
        torch.testing.assert_close(fixed(first, second)[0][0], once(first, second)[0][0])
        assert not torch.allclose(converged, fixed(first, second)[0][0], atol=1e-3)


@pytest.mark.parametrize("method", [REFINED, ONCE])
def test_gradients_reach_the_layer_once_it_is_read(method):
    first, second = images(48, 64)
    truth = torch.ones(2, 2, 48, 64)
    model = refined(method).train()

    def gradients():
        model.zero_grad()
        flows, _ = model(first, second)
        flow_task.loss(flows, truth).sum().backward()
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return {name: float(p.grad.abs().sum()) for name, p in trained}

    before = gradients()
    assert before["read.weight"] > 0
    assert all(g == 0 for name, g in before.items() if name.startswith("layer."))
    read_something(model)
    after = {name: g for name, g in gradients().items() if not name.startswith("net.stages")}
    assert all(g > 0 for g in after.values())
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == ({"layer.g.layers.0.weight"} if method == ONCE else set())  # acts on x = 0


def test_the_implicit_gradient_is_that_of_many_steps():
    """Of the layer's weights, tightly solved, against steps differentiated through."""
    first, second = images(32, 32)
    model = read_something(refined(REFINED, size=(32, 32))).double().eval()
    tight = study.Tolerance(rtol=1e-12, atol=1e-14)
    model.evaluated = tight, 500
    model.layer.adjoint = flownet.ImplicitAdjoint(tolerance=tight, max_iterations=500)
    pair = first.double(), second.double()
    weights = [*model.layer.g.parameters()]
    implicit = torch.autograd.grad(model(*pair)[0][0].square().sum(), weights)
    z = model.inputs(model.net(*pair)[0], *pair)
    x = z.new_zeros(2, flownet.STATE, 8, 8)
    for _ in range(200):
        x = model.layer.g(x, z)
    flow = model.net(*pair)[0] + flownet.FINE * model.read(x)
    unrolled = torch.autograd.grad(flow.square().sum(), weights)
    for a, b in zip(implicit, unrolled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_the_penalty_holds_a_step_that_is_no_contraction():
    first, second = images(48, 64)
    model = refined(REFINED).train()
    assert model(first, second)[1] == 0  # fresh weights contract
    with torch.no_grad():
        for layer in model.layer.g.layers:
            layer.weight.mul_(3)
    before = model.v.clone()
    for _ in range(20):  # v moves once a step towards the largest eigenvalue's vector
        penalty = model(first, second)[1]
    assert penalty > 0.1
    assert not torch.equal(model.v, before)
    assert "v" in model.state_dict()
    penalty.backward()
    assert all(float(layer.weight.grad.abs().sum()) > 0 for layer in model.layer.g.layers)
    assert all(p.grad is None for p in model.net.parameters())


@pytest.mark.parametrize("method", list(KINDS))
def test_autocast_trains_too(method):
    first, second = images(48, 64)
    model = refined(method).train()
    if method != NET:
        read_something(model)
    exact = model(first, second)[0][0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        flows, penalty = model(first, second)
        loss = flow_task.loss(flows, torch.ones(2, 2, 48, 64)).sum() + penalty
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert (flows[0].float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_an_impossible_net_is_refused():
    with pytest.raises(ValueError, match=r"width must be above 0 \(got 0\)"):
        FlowNetS(0)
    with pytest.raises(ValueError, match=r"kind must be .* \(got 'twice'\)"):
        Refined(0.1, "twice", (48, 64))
