"""`DenseStep` and `DenseEnergy` as modules: who is solved whole, and who is called."""

import copy
import pickle
import types
import warnings

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, assert_close
from helpers_dense import (
    LAYERS,
    NEAR,
    assert_same_record,
    matmul_fixture,  # noqa: F401
    solve,
    step,
)
from torch import nn

from fpi_cuda import (
    ConvStep,
    DenseEnergy,
    DenseStep,
    FixedPointLayer,
    GradientStep,
    ImplicitAdjoint,
    NeuralStep,
    Picard,
    Tolerance,
    fixed_point,
)
from fpi_cuda.backends import native
from fpi_cuda.forms import structured

pytestmark = pytest.mark.usefixtures("one_thread")


# --- where it is used ------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", LAYERS.values(), ids=LAYERS)
def test_a_solve_saves_the_solution_the_inputs_and_the_parameters(hidden, solver):
    g, z = step(40, d=6, hidden=hidden), torch.randn(70, 6, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = fixed_point(g, torch.zeros(70, 40, dtype=torch.float64), z, solver=solver).x
    x.sum().backward()
    once = {t.data_ptr(): t.numel() for t in saved}
    assert sum(once.values()) <= 70 * (40 + 6 + 1) + sum(p.numel() for p in g.parameters())


def test_tf32_is_for_loose_tolerances_forward_and_backward(monkeypatch):
    asked, kernel = [], native.dense_solve

    def watched(*arguments):
        *most, tf32, slots, every, starts_plain = arguments
        asked.append(tf32)
        kernel(*most, False, slots, every, starts_plain)

    monkeypatch.setattr(native, "tf32_wanted", lambda x: True)
    monkeypatch.setattr(native, "dense_solve", watched)
    g, z = step(5, dtype=torch.float32), torch.randn(4, 3)
    for forward, backward in ((2e-3, 1.9e-3), (1.9e-3, 2e-3)):
        adjoint = ImplicitAdjoint(tolerance=Tolerance(backward))
        sol, _ = solve(g, z, tolerance=Tolerance(forward), adjoint=adjoint)
        found = [path.endswith(", tf32") for path in (sol.path, sol.adjoint.path)]
        assert found == asked == [forward >= 2e-3, backward >= 2e-3]
        asked.clear()


def test_tf32_is_wanted_where_torch_is_set_to_it(matmul):
    on_cuda = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    half = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    for setting in ("ieee", "tf32"):
        matmul.fp32_precision = setting
        assert native.tf32_wanted(on_cuda) == (setting == "tf32")
        assert not native.tf32_wanted(half)
        assert not native.tf32_wanted(torch.zeros(1))


@pytest.mark.parametrize("wrap", [lambda g: g, NeuralStep], ids=["itself", "NeuralStep"])
def test_a_layer_takes_it_as_any_step(wrap):
    layer = FixedPointLayer(wrap(step(9, hidden=4, dtype=torch.float32)))
    z = torch.randn(6, 3)
    x = layer(z)
    assert x.shape == (6, 9)
    assert layer.last.path == "native, whole"
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(twin(z), x)
    twin.load_state_dict(layer.state_dict())
    layer.double()
    assert layer(z.double()).dtype == torch.float64


def test_spectral_norm_is_taken_and_its_parameters_get_gradients():
    g = step(9)
    torch.nn.utils.parametrizations.spectral_norm(g, "state_weight")
    z = torch.randn(4, 3, dtype=torch.float64)
    g.eval()
    sol, gradients = solve(g, z, tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
    _, expected = solve(g, z, backend="reference", tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
    assert sol.path == "native, whole"
    for mine, other in zip(gradients, expected, strict=True):
        assert_close(mine, other, NEAR)


def doubled(module, arguments, output):
    return 0.5 * output


class Shifted(DenseStep):
    def forward(self, x, z, gain=None):
        return super().forward(x, z, gain) + 1


def test_what_is_more_than_its_layers_is_called():
    z = torch.randn(4, 3, dtype=torch.float64)
    hooked = step(5)
    hooked.register_forward_hook(doubled)
    shifted = step(5)
    shifted.__class__ = Shifted
    patched = step(5)
    patched.forward = lambda x, z: 0.5 * DenseStep.forward(patched, x, z)
    watched = step(5)
    watched.register_full_backward_hook(lambda module, at_input, at_output: None)
    for g in (hooked, shifted, patched, watched):
        sol, _ = solve(g, z, backward=False, tolerance=TIGHT)
        assert sol.path.startswith("native, eager (layers not used: g does more than its layers)")
        assert_close(sol.x, g(sol.x, z))
    captured = step(5)
    sol = fixed_point(lambda x, z: 1 * captured(x, z), torch.zeros(4, 5, dtype=torch.float64), z)
    assert sol.path.startswith("native, eager, ")


class Called(DenseStep):
    def __call__(self, x, z):
        return super().__call__(x, z) + 1


class CalledEnergy(DenseEnergy):
    def __call__(self, x, z):
        return 0.5 * super().__call__(x, z)


def test_a_subclass_that_calls_itself_otherwise_is_called():
    z = torch.randn(4, 3, dtype=torch.float64)
    dense, energy = Called(5, 3).double(), CalledEnergy(5, 3, 6).double()
    for g in (dense, NeuralStep(dense), GradientStep(energy, 1 / energy.smoothness())):
        assert not structured(g)
        sol, _ = solve(g, z, backward=False, tolerance=TIGHT)
        assert sol.path.startswith("native, eager (layers not used: g does more than its layers)")
        assert_close(sol.x, g(sol.x, z))


def steps():
    dense, energy = step(5), DenseEnergy(5, 3, 6).double()
    image = ConvStep(2, 3, hidden=()).double()
    return {
        "DenseStep": (dense, dense),
        "NeuralStep": (NeuralStep(dense), dense),
        "GradientStep": (GradientStep(energy, 1 / energy.smoothness()), energy),
        "ConvStep": (image, image),
        "NeuralStep of ConvStep": (NeuralStep(image), image),
    }


@pytest.mark.parametrize("name", steps())
def test_a_hook_of_all_modules_runs_forward_and_backward(name):
    """Solved whole, it would be left out."""
    g, watched = steps()[name]
    conv = "Conv" in name
    z = torch.randn(4, 3, *((4, 4) if conv else ()), dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(4, *((2, 4, 4) if conv else (5,)), dtype=torch.float64)
    options = {"tolerance": TIGHT, "adjoint": TIGHT_ADJOINT}
    before = fixed_point(g, x0, z, **options).x.detach()

    def changed(module, arguments, out):
        if not isinstance(module, type(watched)):
            return None
        return out + arguments[0].sum(-1) if out.dim() == 1 else 0.5 * out

    hook = nn.modules.module.register_module_forward_hook(changed)
    try:
        assert not structured(g)
        sol = fixed_point(g, x0, z, **options)
        assert_close(sol.x, g(sol.x, z))
        assert not torch.allclose(sol.x, before, atol=1e-3)
        (found,) = torch.autograd.grad(sol.x.sum(), z)
        x = x0
        for _ in range(150):
            x = g(x, z)
        (expected,) = torch.autograd.grad(x.sum(), z)
    finally:
        hook.remove()
    assert "layers not used: g does more than its layers" in sol.path
    assert_close(found, expected)


@pytest.mark.parametrize("name", steps())
@pytest.mark.parametrize("register", ["forward_pre", "full_backward", "full_backward_pre"])
def test_other_hooks_of_all_modules_are_seen(name, register):
    g, part = steps()[name]
    assert structured(g)
    add = getattr(nn.modules.module, f"register_module_{register}_hook")
    hook = add(lambda *_: None)
    try:
        assert not structured(g)
    finally:
        hook.remove()
    hook = part.register_forward_hook(lambda *_: None)
    assert not structured(g)
    hook.remove()
    assert structured(g)


def test_what_is_no_structured_step():
    others = (torch.tanh, lambda x, z: x, nn.Linear(3, 3), NeuralStep(nn.Linear(3, 3)))
    for g in (*others, GradientStep(lambda x, z: x.sum(-1), 0.1), Shifted(5, 3)):
        assert not structured(g)


@pytest.mark.parametrize("driver", ["auto", "eager"])
def test_what_a_step_captures_gets_its_gradient(driver):
    """A step size or a weight that is no parameter: found, and then g is called."""
    z = torch.randn(4, 3, dtype=torch.float64)
    energy = DenseEnergy(5, 3, 6).double()
    rate = torch.tensor(1 / energy.smoothness(), dtype=torch.float64, requires_grad=True)
    dense = step(5)
    weight = dense.state_weight.detach().clone().requires_grad_()
    del dense.state_weight
    dense.state_weight = weight
    few = dict(tolerance=Tolerance(0, 0), max_iterations=60, adjoint=TIGHT_ADJOINT)
    for g, captured in ((GradientStep(energy, rate), rate), (dense, weight)):
        x0 = torch.zeros(4, 5, dtype=torch.float64)
        solution = fixed_point(g, x0, z, solver=Picard(), driver=driver, **few)
        (found,) = torch.autograd.grad(solution.x.square().sum(), captured)
        x = x0
        for _ in range(300):
            x = g(x, z)
        (expected,) = torch.autograd.grad(x.square().sum(), captured)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_exact_step_is_a_module_like_any_other():
    g = DenseStep(4, 3, exact=True)
    x, z = torch.randn(6, 4), torch.randn(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert g(x, z.bfloat16()).dtype == torch.bfloat16
    assert g.to("meta")(x.to("meta"), z.to("meta")).shape == (6, 4)


def test_other_drivers_and_shapes_still_solve():
    g = step(5)
    z = torch.randn(4, 3, dtype=torch.float64)
    tight = Tolerance(1e-11, 0)
    expected, gradients = solve(g, z, tolerance=tight, adjoint=TIGHT_ADJOINT)
    eager, found = solve(g, z, tolerance=tight, adjoint=TIGHT_ADJOINT, driver="eager")
    assert "eager" in eager.path and "eager" in eager.adjoint.path
    assert_close(eager.x, expected.x, NEAR)
    for mine, other in zip(found, gradients, strict=True):
        assert_close(mine, other, NEAR)
    wide = fixed_point(
        g, torch.zeros(2, 2, 5, dtype=torch.float64), z.view(2, 2, 3), tolerance=tight
    )
    assert wide.path.startswith("native, eager (layers not used: a state of 3 dimensions)")
    assert_close(wide.x.view(4, 5), expected.x, NEAR)
    mapped = torch.vmap(lambda z: fixed_point(g, torch.zeros_like(wide.x[0]), z, tolerance=tight).x)
    assert_close(mapped(z.view(2, 2, 3)).view(4, 5), expected.x, NEAR)


def test_weights_beyond_any_cache_are_left_to_the_library(monkeypatch):
    g = step(8, hidden=4)
    z = torch.randn(4, 3, dtype=torch.float64)
    expected, gradients = solve(g, z)
    monkeypatch.setitem(native.MOST_WEIGHTS, "cpu", 2 * 8 * 4 * 8)
    assert solve(g, z)[0].path == "native, whole"
    monkeypatch.setitem(native.MOST_WEIGHTS, "cpu", 2 * 8 * 4 * 8 - 1)
    found, others = solve(g, z)
    for path in (found.path, found.adjoint.path):
        assert path.startswith("native, eager (not whole: weights beyond any cache")
    assert_same_record(found, expected)
    for mine, other in zip((found.x, *others), (expected.x, *gradients), strict=True):
        assert_close(mine, other, NEAR)


def test_asking_for_whole_where_it_can_not_be_warns():
    g = step(5)
    z = torch.randn(4, 3, dtype=torch.float64)
    x0 = torch.zeros(4, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match='driver="whole".*not of dense layers'):
        sol = fixed_point(lambda x, z: 1 * g(x, z), x0, z, driver="whole")
    assert "eager" in sol.path
    with pytest.warns(UserWarning, match='driver="whole".*backend "reference" has no whole solve'):
        fixed_point(g, x0, z, driver="whole", backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fixed_point(g, x0, z, driver="whole").path == "native, whole"


def test_the_module_is_an_ordinary_one():
    for hidden in (None, 7):
        g = step(5, hidden=hidden, residual=0.3)
        x, z = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
        u = z @ g.input_weight.mT + g.bias
        if hidden is None:
            expected = torch.tanh(0.3 * x + x @ g.state_weight.mT + u)
        else:
            h = torch.tanh(x @ g.state_weight.mT + u)
            expected = torch.tanh(0.3 * x + h @ g.output_weight.mT + g.output_bias)
        assert_close(g(x, z), expected)
        assert sum(p.numel() for p in g.parameters()) == sum(
            t.numel() for t in g.state_dict().values()
        )


@pytest.mark.slow
def test_the_module_compiles():
    g = step(5, hidden=4, dtype=torch.float32)
    x, z = torch.randn(6, 5), torch.randn(6, 3)
    assert_close(torch.compile(g, fullgraph=True)(x, z), g(x, z))


@pytest.mark.filterwarnings("ignore")
def test_the_module_and_its_layer_are_traced():
    """What torch.compile does before a compiler is called: the module whole, the layer in parts."""
    g = step(5, hidden=4, dtype=torch.float32)
    x, z = torch.randn(6, 5), torch.randn(6, 3)
    torch.compiler.reset()
    assert_close(torch.compile(g, fullgraph=True, backend="aot_eager")(x, z), g(x, z))
    layer = FixedPointLayer(g)
    expected = torch.autograd.grad(layer(z).sum(), g.state_weight)[0]
    traced = torch.compile(layer, backend="aot_eager")
    found = torch.autograd.grad(traced(z).sum(), g.state_weight)[0]
    assert layer.last.path == "native, whole"
    assert_close(found, expected)


# --- energies --------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "identity", "gelu"])
@pytest.mark.parametrize("convex", [True, False])
def test_an_energys_step_is_its_gradient_step(activation, convex, solver):
    if convex and activation == "gelu":
        with pytest.raises(ValueError, match="activation must be one of"):
            DenseEnergy(6, 3, 9, activation)
        return
    energy = DenseEnergy(6, 3, 9, activation, curvature=0.8, convex=convex).double()
    gradient_step = GradientStep(energy, step_size=1 / energy.smoothness())
    x, z = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(leaf, z).sum(), leaf)
    assert_close(gradient_step(x, z), x - gradient / energy.smoothness())
    assert_close(gradient_step.form(x, z)(x), x - gradient / energy.smoothness())
    options = dict(solver=solver, tolerance=TIGHT, adjoint=TIGHT_ADJOINT, max_iterations=2000)
    ours, gradients = solve(gradient_step, z, **options)
    theirs, expected = solve(gradient_step, z, **options, backend="reference")
    assert ours.path == ours.adjoint.path == "native, whole"
    assert_close(ours.x, theirs.x, {torch.float64: (1e-9, 1e-10)})
    for mine, other in zip(gradients, expected, strict=True):
        assert_close(mine, other, {torch.float64: (1e-7, 1e-9)})


def test_a_step_size_may_be_learned():
    energy = DenseEnergy(4, 3, 5).double()
    g = GradientStep(energy, nn.Parameter(torch.tensor(0.3, dtype=torch.float64)))
    z = torch.randn(4, 3, dtype=torch.float64)
    one = dict(tolerance=Tolerance(0, 0), max_iterations=3, solver=Picard())
    ours, gradients = solve(g, z, **one)
    _, expected = solve(g, z, backend="reference", **one)
    assert ours.path == "native, whole"
    for mine, other in zip(gradients, expected, strict=True):
        assert_close(mine, other, NEAR)


def test_an_energy_of_its_own_is_called():
    class Tilted(DenseEnergy):
        def forward(self, x, z):
            return super().forward(x, z) + x.sum(-1)

    sol, _ = solve(GradientStep(Tilted(4, 3, 5).double(), 0.2), torch.randn(2, 3).double())
    assert sol.path != "native, whole"


def test_bad_arguments_of_the_modules():
    for make, message in (
        (lambda: DenseStep(0, 3), "state_features must be a whole number >= 1"),
        (lambda: DenseStep(4, 2.5), "input_features must be a whole number >= 1"),
        (lambda: DenseStep(4, 3, hidden=True), "hidden must be a whole number >= 1"),
        (lambda: DenseStep(4, 3, activation="swish"), "activation must be one of"),
        (lambda: DenseStep(4, 3, output_activation="relu"), "output_activation belongs to two"),
        (lambda: DenseStep(4, 3, residual=float("nan")), "residual must be a finite number"),
        (lambda: DenseEnergy(4, 3, 5, "softplus"), "activation must be one of"),
        (lambda: DenseEnergy(4, 3, 5, curvature=-1), "curvature must be a finite number >= 0"),
        (lambda: DenseStep(4, 3)(torch.randn(2, 5), torch.randn(2, 3)), "dimension of x must be 4"),
        (lambda: DenseStep(4, 3)(torch.randn(2, 4), torch.randn(2, 2)), "dimension of z must be 3"),
        (
            lambda: fixed_point(DenseStep(4, 3), torch.zeros(2, 5), torch.randn(2, 3)),
            "dimension of x must be 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_an_energys_curvature_is_right_where_nothing_is_active():
    """At x = 0, z = 0 all activations are 0, and the Hessian holds their slope there."""
    energy = DenseEnergy(4, 3, hidden=5, activation="tanh").double()
    x, z = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: energy(x, z).sum(), x).view(4, 4)
    w = energy.state_weight.detach()
    assert_close(hessian, energy.curvature * torch.eye(4).double() + w.mT @ w, NEAR)


def test_the_energy_of_tanh_is_even_and_exact_far_out():
    energy = DenseEnergy(1, None, hidden=1, curvature=0.0, bias=False)
    energy.state_weight.data.fill_(1.0)
    x = torch.tensor([[12.0], [-12.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(energy.double()(x, 0 * x.detach()).sum(), x)
    torch.testing.assert_close(slope, torch.tanh(x.detach()), rtol=0, atol=1e-15)
    far = torch.tensor([[4e4], [-4e4]], dtype=torch.float16)
    assert (energy.half()(0 * far, far) == 4e4).all()
