"""With has_aux g returns (x, aux): that of the solution comes back, attached, by one call."""

import gc
import weakref

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, contraction, unroll
from helpers_derivatives import double
from tape import captures, tape_fixture  # noqa: F401
from torch import nn
from torch.autograd import grad

from fpi_cuda import (
    DenseStep,
    FixedPointLayer,
    GradientStep,
    NeuralStep,
    Picard,
    Solution,
    Status,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = {"tolerance": TIGHT, "adjoint": TIGHT_ADJOINT, "max_iterations": 500}
W = contraction(3, 0.6)


def pair(x, z, w):
    h = torch.tanh(x @ w.mT)
    return h + z, {"hidden": h * z, "loss": (h * w.sum()).square().sum(), "name": "pair"}


def first(x, *tensors):
    return pair(x, *tensors)[0]


def loss(x, aux):
    return (x.sin() * aux["hidden"]).sum() + aux["loss"]


def problem():
    return double(4, 3).requires_grad_(), W.clone().requires_grad_()


def unrolled(z, w):
    x = unroll(first, torch.zeros_like(z), z, w, steps=120)
    return loss(x, pair(x, z, w)[1])


class Net(nn.Module):
    """A net that returns aux and, as it is asked to, writes to a buffer or to an attribute."""

    def __init__(self, writes=""):
        super().__init__()
        self.w = nn.Parameter(W.clone())
        self.writes, self.calls = writes, 0
        self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))

    def forward(self, x, z):
        x, aux = pair(x, z, self.w)
        if self.writes == "buffer":
            self.seen.mul_(0.9).add_(aux["hidden"].mean(0))
        if self.writes == "attribute":
            self.router = aux["loss"]
        return x, aux


@pytest.mark.parametrize("way", ["params", "captured", "module", "method of a module"])
def test_gradients_are_those_of_unrolling(solver, way):
    z, w = problem()
    if way == "params":
        s = fixed_point(pair, 0 * z, z, params=(w,), solver=solver, has_aux=True, **EXACT)
    elif way == "captured":
        s = fixed_point(lambda x, z: pair(x, z, w), 0 * z, z, solver=solver, has_aux=True, **EXACT)
    else:
        net = Net()
        g = net if way == "module" else net.forward
        s, w = fixed_point(g, 0 * z, z, solver=solver, has_aux=True, **EXACT), net.w
    assert s.converged.all()
    assert s.aux["name"] == "pair"
    torch.testing.assert_close(s.aux["hidden"], pair(s.x, z, w)[1]["hidden"])
    found = grad(loss(s.x, s.aux), (z, w))
    torch.testing.assert_close(found, grad(unrolled(z, w), (z, w)), rtol=1e-9, atol=1e-11)


def test_a_loss_on_aux_alone_has_its_gradient_and_the_second_derivative():
    z, w = problem()

    def of_aux(z, w, layer):
        if layer:
            s = fixed_point(pair, 0 * z, z, params=(w,), has_aux=True, **EXACT)
            return s.aux["loss"]
        x = unroll(first, torch.zeros_like(z), z, w, steps=120)
        return pair(x, z, w)[1]["loss"]

    def twice(layer):
        once = grad(of_aux(z, w, layer), (z, w), create_graph=True)
        return *once, *grad(sum(t.square().sum() for t in once), (z, w))

    torch.testing.assert_close(twice(True), twice(False), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_torch_func_follows_aux(transform):
    z, w = (t.detach() for t in problem())
    net = Net("buffer" if transform == "grad" else "")  # no module writes to one under vmap

    def by_layer(z, w):
        tensors = {"w": w, "seen": net.seen.detach()}
        layer = FixedPointLayer(net, has_aux=True, per_sample=True, **EXACT)
        tensors = {f"g.{name}": t for name, t in tensors.items()}
        return loss(*torch.func.functional_call(layer, tensors, (z,)))

    ways = [torch.func.grad(f, argnums=(0, 1)) for f in (by_layer, unrolled)]
    if transform == "vmap of grad":
        ways, z = [torch.vmap(f, in_dims=(0, None)) for f in ways], torch.stack([z, 2 * z])
    torch.testing.assert_close(ways[0](z, w), ways[1](z, w), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("of", [torch.vmap, lambda f: torch.func.jacfwd(torch.func.grad(f))])
def test_a_captured_tensor_that_aux_alone_reads_is_named_where_torch_fails(of):
    z = torch.ones(2, 3)

    def f(w):
        def g(x, z):
            return 0.5 * x + z, (w * x).sum()

        def of_z(z):
            return fixed_point(g, torch.zeros_like(z), z, has_aux=True).aux

        return torch.func.grad(of_z)(z).sum()

    with pytest.raises(RuntimeError) as raised:
        of(f)(torch.ones(2) if of is torch.vmap else torch.tensor(1.0))
    (note,) = raised.value.__notes__
    assert "captures a tensor that torch.func follows (w of shape ())" in note


def test_it_is_one_call_more_and_counted(backend):
    z, w = problem()
    calls = []

    def counted(x, z, w):
        calls.append(1)
        return pair(x, z, w)

    options = {"params": (w,), "backend": backend, "per_sample": True}
    s = fixed_point(counted, 0 * z, z, has_aux=True, **options)
    assert s.evaluations == len(calls)
    assert s.evaluations == fixed_point(first, 0 * z, z, **options).evaluations + 1
    assert s.residual_at_x.shape == (4,)
    assert s.evaluations == len(calls)
    torch.testing.assert_close(s.residual_at_x, (pair(s.x, z, w)[0] - s.x).norm(dim=1).detach())


@pytest.mark.parametrize("writes", ["buffer", "attribute"])
def test_where_a_call_leaves_something_on_a_module_it_is_the_same_call(monkeypatch, writes):
    z, _ = problem()
    net, calls = Net(writes), []
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda *given: calls.append(1) or forward(*given))
    layer = FixedPointLayer(net, has_aux=True, per_sample=True, **EXACT)
    for i in (1, 2):
        calls.clear()
        x, aux = layer(z)
        assert len(calls) == layer.last.evaluations
        if writes == "attribute":
            assert net.router is aux["loss"]
            continue
        assert not net.seen.requires_grad
        scale = 1 if i == 1 else 1.9
        torch.testing.assert_close(net.seen, scale * aux["hidden"].detach().mean(0))
    found = grad(loss(x, aux), (z, net.w))
    torch.testing.assert_close(found, grad(unrolled(z, net.w), (z, net.w)), rtol=1e-9, atol=1e-11)


def test_the_layer_returns_both_and_its_record_keeps_no_graph():
    z, w = problem()

    class Own:  # which torch's pytrees do not look into
        pass

    def g(x, z):
        x, aux = pair(x, z, w)
        own = Own()
        own.held = aux["loss"]
        return x, (aux, own, None)

    layer = FixedPointLayer(g, has_aux=True)
    x, (aux, own, nothing) = layer(z)
    assert own.held.requires_grad
    assert nothing is layer.last.aux is None
    x.mul_(2)  # the caller's own
    grad(aux["loss"], z)

    s = fixed_point(g, 0 * z, z, has_aux=True)
    assert isinstance(s, Solution)
    assert "\n" not in repr(s)
    cut = s.detach()
    assert not cut.aux[0]["loss"].requires_grad
    assert cut.aux[0]["name"] == "pair"
    assert cut.aux[1] is None
    assert s.aux[0]["loss"].requires_grad


def test_without_a_graph_nothing_is_attached():
    z, w = problem()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            s = fixed_point(pair, 0 * z, z, params=(w,), has_aux=True)
        assert not s.aux["loss"].requires_grad
    s = fixed_point(pair, 0 * z.detach(), z.detach(), params=(w.detach(),), has_aux=True)
    assert not s.aux["loss"].requires_grad


def test_aux_of_an_iteration_is_dropped_before_the_next():
    z, w = problem()
    before = []

    def g(x, z):
        assert all(ref() is None for ref in before)
        x, aux = pair(x, z, w.detach())
        before[:] = [weakref.ref(aux["hidden"])]
        return x, aux

    s = fixed_point(g, 0 * z, z, has_aux=True, per_sample=True)
    assert before[0]() is s.aux["hidden"]


def test_what_a_solution_holds_ends_with_it():
    z, w = problem()
    s = fixed_point(pair, 0 * z, z, params=(w,), has_aux=True)
    gone = [weakref.ref(s.aux["hidden"]), weakref.ref(s.x)]
    gc.disable()
    try:
        del s
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_a_loss_that_leaves_failed_samples_out_has_the_gradient_of_the_others():
    z, w = problem()
    bad = z.detach().clone()
    bad[1] = torch.inf
    bad.requires_grad_()
    good = [0, 2, 3]

    def g(x, z, w):
        h = torch.tanh(x @ w.mT)
        return h + z, 2 * h  # finite at the x of every sample

    def of(z):
        s = fixed_point(g, torch.zeros_like(z), z, params=(w,), has_aux=True, **EXACT)
        kept = s.status == Status.CONVERGED
        return torch.where(kept[:, None], s.x, 0).sin().sum() + s.aux[kept].square().sum(), s

    total, s = of(bad)
    assert s.status[1] == Status.NONFINITE
    for_z, for_w = grad(total, (bad, w))
    few = z.detach()[good].requires_grad_()
    expected_z, expected_w = grad(of(few)[0], (few, w))
    torch.testing.assert_close(for_z[good], expected_z, rtol=1e-9, atol=1e-11)
    assert not for_z[1].any()
    torch.testing.assert_close(for_w, expected_w, rtol=1e-9, atol=1e-11)


def test_a_tuple_state_and_named_arguments():
    z, _ = problem()

    def g(x, z, *, scale):
        a, b = x
        return (0.5 * torch.tanh(b) + z, 0.3 * a * scale), (a + b, scale)

    layer = FixedPointLayer(g, state_shape=((3,), (3,)), has_aux=True, **EXACT)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (a, b), (total, same) = layer(z, scale=scale)
    torch.testing.assert_close(total, a + b)
    assert same is scale
    found = grad(total.square().sum(), (z, scale))

    def plain(z, scale):
        x = torch.zeros_like(z), torch.zeros_like(z)
        for _ in range(100):
            x = g(x, z, scale=scale)[0]
        return (x[0] + x[1]).square().sum()

    expected = grad(plain(z, scale), (z, scale))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_state_shape_that_holds_the_batch_too_is_still_noticed():
    with pytest.raises(ValueError, match="without the batch"):
        FixedPointLayer(lambda x, z: (0.5 * x + z, None), state_shape=(4, 3), has_aux=True)(
            torch.ones(4, 3)
        )
    FixedPointLayer(lambda x, z: (0.5 * x + z, None), state_shape=(3,), has_aux=True)(
        torch.ones(3, 3)
    )


def test_on_the_meta_device_aux_has_its_shapes():
    z = torch.zeros(4, 3, device="meta")
    s = fixed_point(pair, z, z, params=(torch.zeros(3, 3, device="meta"),), has_aux=True)
    assert s.aux["hidden"].shape == (4, 3)
    assert s.aux["hidden"].is_meta
    assert s.evaluations == 1


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_neural_step_passes_it_on_and_compiled_layers_do():
    z, _ = problem()
    net = Net()
    layer = FixedPointLayer(NeuralStep(net), has_aux=True, **EXACT)
    for call in (layer, torch.compile(layer, backend="eager")):
        found = grad(loss(*call(z)), (z, net.w))
        expected = grad(unrolled(z, net.w), (z, net.w))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_graph_driver_drops_it_too(tape):
    z, _ = problem()
    net = Net("buffer")
    layer = FixedPointLayer(net, has_aux=True, driver="graph", **EXACT)
    for _ in range(2):
        x, aux = layer(z)
        assert "graph" in layer.last.path
        found = grad(loss(x, aux), (z, net.w))
        expected = grad(unrolled(z, net.w), (z, net.w))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert captures() == 2  # forward and backward
    torch.testing.assert_close(net.seen, 1.9 * aux["hidden"].detach().mean(0))


STEP = DenseStep(3, 3, 4)


@pytest.mark.parametrize(
    "g, has_aux, match",
    [
        (lambda x, z: x, True, r"tuple of two, \(x, aux\) \(got Tensor\)"),
        (lambda x, z: (x, 1, 2), True, r"tuple of two, \(x, aux\) \(got 3 items\)"),
        (lambda x, z: (x, 1), False, r"\(got tuple\); where g returns \(x, aux\), pass has_aux="),
        (lambda x, z: (1, x), True, r"must return a tensor like x \(got int\)"),
        (STEP, True, r"tuple of two, \(x, aux\) \(got Tensor\)"),
        (NeuralStep(STEP), True, r"tuple of two, \(x, aux\) \(got Tensor\)"),
        (GradientStep(lambda x, z: (x - z).square().sum(1), 0.1), True, r"\(got Tensor\)"),
    ],
)
def test_another_value_of_g_is_refused(g, has_aux, match):
    z = torch.ones(4, 3)
    with pytest.raises(TypeError, match=match):
        fixed_point(g, 0 * z, z, has_aux=has_aux)


def test_a_tuple_state_with_aux_but_without_the_option_is_told_of_it():
    x0 = torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(TypeError) as caught:
        fixed_point(lambda x: (x, "aux"), x0)
    assert any("has_aux=True" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match="tuple of 2 tensors"):
        fixed_point(lambda x: x, x0, has_aux=True)


def test_picard_under_autocast_gives_aux_in_its_dtype():
    z = torch.ones(4, 3)
    w = torch.eye(3) * 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = fixed_point(
            lambda x, z: (torch.tanh(x @ w) + z, x @ w), 0 * z, z, has_aux=True, solver=Picard()
        )
    assert s.aux.dtype == torch.bfloat16
