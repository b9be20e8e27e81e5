"""Solves under torch.autocast: tolerances, structured steps, loss scaling, transforms."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers_drivers import same
from tape import captures, tape_fixture  # noqa: F401
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fpi_cuda import (
    Anderson,
    ConvStep,
    DenseEnergy,
    DenseStep,
    FixedPointLayer,
    GradientStep,
    ImplicitAdjoint,
    NeuralStep,
    Picard,
    Status,
    Tolerance,
    fixed_point,
)
from fpi_cuda.contraction import lipschitz, spectral_normalize

BF16, FP16 = torch.bfloat16, torch.float16
DEFAULTS = {BF16: Tolerance(1e-2, 1e-3), FP16: Tolerance(2e-3, 1e-3)}
SOLVERS = [Picard(), Anderson()]


def autocast(dtype=BF16, enabled=True):
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


class Net(nn.Module):
    """A net that the solver knows nothing of."""

    def __init__(self, n=16, m=8):
        super().__init__()
        self.state_shape = (n,)
        self.inner, self.outer = nn.Linear(n, n), nn.Linear(m, n)
        with torch.no_grad():
            self.inner.weight.mul_(0.5)

    def forward(self, x, z):
        return torch.tanh(self.inner(x) + self.outer(z))


def gradient_step():
    energy = DenseEnergy(16, 8, hidden=24)
    with torch.no_grad():
        energy.state_weight.mul_(0.5)
    return GradientStep(energy, 1 / energy.smoothness())


STEPS = {
    "opaque": Net,
    "dense": lambda: DenseStep(16, 8, exact=True),
    "two layers": lambda: NeuralStep(DenseStep(16, 8, hidden=24, residual=0.1)),
    "energy": gradient_step,
    "convolutions": lambda: ConvStep(4, 2, hidden=(6,), activation="tanh", residual=0.1),
    "one convolution": lambda: ConvStep(4, 2, hidden=(), output_activation="tanh"),
}
WHOLE = ("dense", "two layers", "energy")


def make(name):
    g = STEPS[name]()
    z = torch.randn(12, 2, 6, 5) if "conv" in name else torch.randn(12, 8)
    return g, z


def far(found, expected):
    return float((found - expected).detach().norm() / expected.detach().norm())


def derivatives(layer, z, order, **cast):
    """Of a loss, or of the squares of its gradients: by z, and by all parameters as one tensor."""
    tensors = (z, *layer.parameters())
    with autocast(**cast):
        x = layer(z)
    loss = (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() + x.square().sum() / 2
    grads = torch.autograd.grad(loss, tensors, create_graph=order == 2)
    if order == 2:
        grads = torch.autograd.grad(sum(t.square().sum() for t in grads), tensors)
    return grads[0], torch.cat([t.reshape(-1) for t in grads[1:]])


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_defaults_are_those_of_what_g_computes_in(name, dtype, solver, backend):
    g, z = make(name)
    z.requires_grad_()
    told = DEFAULTS[dtype]
    found = []
    for tolerance, adjoint in ((Tolerance(), None), (told, Tolerance(told.rtol))):
        options = {
            **{"solver": solver, "backend": backend, "tolerance": tolerance},
            **{"adjoint": ImplicitAdjoint(tolerance=adjoint), "on_failure": "raise"},
        }
        x0 = torch.zeros_like(FixedPointLayer(g, max_iterations=1, on_failure="return")(z))
        with autocast(dtype):
            s = fixed_point(g, x0, z, **options)
        torch.autograd.grad(s.x.square().sum(), z)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(z.detach(), torch.ones_like(z))
            with autocast(dtype):
                t = fixed_point(g, x0, dual, **options)
        found.append((s, s.adjoint, t.tangent))
    whole = backend == "native" and name in WHOLE
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine.iterations, theirs.iterations) and mine.iterations.max() < 12
        assert mine.path.endswith("whole") == whole and "layers not used" not in mine.path


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", STEPS)
def test_derivatives_are_within_about_a_percent_of_float32s(name, order):
    g, z = make(name)
    z.requires_grad_()
    tight = Tolerance(1e-3, 0)
    exact = FixedPointLayer(g, tolerance=tight, adjoint=ImplicitAdjoint(tolerance=tight))
    expected = derivatives(exact, z, order, enabled=False)
    # The noise of bfloat16 is above such a tolerance where g is not solved whole.
    layer = exact if name in WHOLE else FixedPointLayer(g)
    factor = 1 if name in WHOLE else order  # where the tolerance, 1e-2, acts too
    for dtype, most in ((BF16, 0.015), (FP16, 0.003)):
        found = derivatives(layer, z, order, dtype=dtype)
        for mine, other in zip(found, expected, strict=True):
            assert far(mine, other) < factor * most


def test_a_whole_solve_rounds_the_weights_and_no_iterate():
    g, z = make("dense")
    g.exact = False
    tight = Tolerance(1e-6, 0)
    with autocast(), torch.no_grad():
        s = fixed_point(g, torch.zeros(12, 16), z, tolerance=tight)
        u = F.linear(z, g.input_weight, g.bias)
        assert u.dtype == BF16 and s.path == "native, whole" and s.converged.all()
    with torch.no_grad():
        x = torch.tanh(s.x @ g.state_weight.bfloat16().float().mT + u.float())
        torch.testing.assert_close(s.x, x, rtol=1e-5, atol=1e-5)
        assert far(s.x, torch.tanh(s.x @ g.state_weight.mT + u.float())) > 1e-4


@pytest.mark.parametrize("driver", ["auto", "eager"])
@pytest.mark.parametrize("name", STEPS)
def test_inputs_and_states_of_half_types(name, driver):
    g, z = make(name)
    layer = FixedPointLayer(g, on_failure="raise", driver=driver)
    expected = layer(z).detach()
    with autocast():
        x = layer(z.bfloat16().requires_grad_())
        x0 = torch.zeros_like(expected, dtype=BF16)
        s = fixed_point(g, x0, z, on_failure="raise", driver=driver)
    with autocast(FP16):
        mixed = fixed_point(g, x0, z, on_failure="raise", driver=driver)
    assert (x.dtype, s.x.dtype, mixed.x.dtype) == (torch.float32, BF16, BF16)
    whole = name in WHOLE and driver == "auto"
    for found, last in ((x, layer.last), (s.x, s), (mixed.x, mixed)):
        assert far(found.float(), expected) < 0.02
        found.square().sum().backward()
        assert last.path.endswith("whole") == last.adjoint.path.endswith("whole") == whole
        assert last.adjoint.converged.all()


def test_a_told_tolerance_is_kept_and_noise_ends_as_stalled():
    g, z = make("opaque")
    tight = Tolerance(1e-6, 0)
    with autocast():
        s = fixed_point(g, torch.zeros(12, 16), z, tolerance=tight, on_failure="return")
        dense = fixed_point(DenseStep(16, 8), torch.zeros(12, 16), z, tolerance=tight)
        wide = fixed_point(copy.deepcopy(g).double(), torch.zeros(12, 16).double(), z.double())
    assert set(s.status.tolist()) <= {Status.STALLED, Status.CONVERGED}
    assert (s.status == Status.STALLED).any() and s.iterations.max() < 60
    assert dense.residual_norm.max() < 1e-5 and wide.residual_norm.max() < 1e-4


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_residual_that_grows_before_it_falls_is_no_stall(dtype):
    """Of a causal g each entry is done after the one before, and those behind grow until then."""
    n, steps = 260, 13
    w = torch.diag(torch.full((n - 1,), 1.5), -1)
    w[::steps] = 0
    z, v, eye = torch.randn(4, n, requires_grad=True), torch.randn(4, n), torch.eye(n)
    for cast, tolerance in ((True, Tolerance()), (False, Tolerance(1e-2, 0))):
        to = torch.float32 if cast else dtype
        with autocast(dtype, cast):
            s = fixed_point(
                *(lambda x, z: F.linear(x, w.to(x)) + z, torch.zeros(4, n, dtype=to), z.to(to)),
                **{"solver": Picard(), "tolerance": tolerance, "on_failure": "raise"},
            )
        (grad,) = torch.autograd.grad(s.x, z, v.to(to))
        assert s.iterations.max() <= steps + 2 and s.adjoint.converged.all()
        assert far(s.x, torch.linalg.solve(eye - w, z.mT).mT) < 0.02
        assert far(grad, torch.linalg.solve((eye - w).mT, v.mT).mT) < 0.02


def test_eval_factor_divides_what_holds_under_autocast():
    g, z = make("opaque")
    layer = FixedPointLayer(g, eval_factor=2.0).eval()
    with autocast(), torch.no_grad():
        layer(z)
    rtol, atol = layer.last.record.progress.limits.rtol, layer.last.record.progress.limits.offset
    assert (rtol, atol) == (0.005, 0.0005 * 4)


@pytest.mark.parametrize("name", ["opaque", "dense"])
def test_bound_and_estimate_know_of_the_rounding_of_g(name):
    g, z = make(name)
    if name == "dense":
        spectral_normalize(g, 0.8)
        g.certified_lipschitz = lambda: lipschitz(g)
    exact = fixed_point(copy.deepcopy(g).double(), torch.zeros(12, 16).double(), z.double()).x
    with autocast(), torch.no_grad():
        s = fixed_point(g, torch.zeros(12, 16), z, tolerance=Tolerance(1e-3), on_failure="return")
    error = (s.x - exact).norm(dim=1)
    floor = torch.finfo(BF16).eps / 2 * s.x.norm(dim=1)
    assert (s.error_estimate > floor / 2).all()
    if name == "dense":
        assert (s.error_bound > error).all() and (s.error_bound > 8 * floor).all()


def test_a_bound_holds_where_float16_has_nothing_but_zero():
    class Small(nn.Module):
        def certified_lipschitz(self):
            return 0.5

        def forward(self, x, z):
            return F.linear(z, 1e-5 * torch.eye(3))

    z = torch.full((2, 3), 1e-3)
    with autocast(FP16):
        s = fixed_point(Small(), torch.zeros(2, 3), z)
    assert not s.x.any() and (s.error_bound > (1e-5 * z).norm(dim=1)).all()


# --- loss scaling -----------------------------------------------------------------------------


def trained(layer, z, scaler, dtype, steps, factor=1.0):
    """Train; after each step the adjoint's iterations, and whether it was left out."""
    optimizer, found = torch.optim.SGD(layer.parameters(), 1e-3 / factor), []
    for _ in range(steps):
        optimizer.zero_grad()
        with autocast(dtype):
            loss = factor * layer(z).square().mean()
        scaler.scale(loss).backward()
        finite = all(p.grad.isfinite().all() for p in layer.parameters())
        before, scale = [p.detach().clone() for p in layer.parameters()], scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        moved = not all(map(torch.equal, before, layer.parameters()))
        assert moved == finite == (scaler.get_scale() >= scale)
        found.append((layer.last.adjoint.iterations.tolist(), moved))
    return found


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", ["opaque", "dense", "convolutions"])
def test_a_loss_scale_changes_no_iteration(name, dtype):
    g, z = make(name)
    z.requires_grad_()
    rows = torch.ones(12, *[1] * (z.dim() - 1))
    rows[1::2] = 2.0**-20  # the loss of others may be of another scale
    found = []
    for scale in (2.0**-20, 1.0, 2.0**16):
        layer = FixedPointLayer(g, on_failure="raise")
        with autocast(dtype):
            x = layer(z)
        (scale * rows * x.square()).mean().backward()
        found.append(layer.last.adjoint.iterations)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert found[0].max() < 12


@pytest.mark.parametrize("options", [{}, {"on_failure": "raise"}, {"driver": "graph"}], ids=str)
@pytest.mark.parametrize("name", ["opaque", "dense", "convolutions"])
def test_a_scaler_sees_what_overflows_and_goes_on(name, options, request):
    if "driver" in options:
        request.getfixturevalue("tape")
    g, z = make(name)
    layer = FixedPointLayer(g, per_sample=True, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-5)
    found = trained(layer, z, scaler, FP16, 8)
    moved = [m for _, m in found]
    assert not moved[0] and moved[-1] and moved == sorted(moved)
    assert layer.last.adjoint.converged.all()


@pytest.mark.parametrize("driver", ["auto", "eager"])
@pytest.mark.parametrize("name", ["opaque", "dense", "convolutions"])
def test_a_state_in_bfloat16_too_has_any_scale_of_the_loss_under_float16(name, driver):
    g, z = make(name)
    g.to(BF16)
    with autocast(FP16):
        x0 = torch.zeros_like(FixedPointLayer(g)(z), dtype=BF16)
        s = fixed_point(g, x0, z.requires_grad_(), driver=driver, on_failure="raise")
    v, found = torch.randn_like(x0), []
    for scale in (2.0**-30, 1.0, 2.0**20):
        torch.autograd.grad(s.x, z, v * scale, retain_graph=True)
        found.append((s.adjoint.iterations, s.adjoint.residual_norm / scale))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_state_of_several_tensors_may_have_the_other_half_type(dtype):
    z = torch.randn(4, 3, dtype=FP16 if dtype == BF16 else BF16)
    layer = FixedPointLayer(lambda x, z: (0.5 * x[1], z), state_shape=((3,), (3,)))
    x0 = torch.zeros_like(z), torch.zeros_like(z)
    with autocast(dtype):
        x = layer(z, x0=x0)
        same([x[0], x[1]], [0.5 * z, z])
        square = FixedPointLayer(lambda x, z: 0.5 * x + z[:, :1], state_shape=(4,))
        assert square(z).shape == (4, 4)  # of as many samples as values: the shape is looked at


def test_an_infinite_loss_reaches_the_gradients_of_any_dtype():
    for name, dtype in (("dense", BF16), ("opaque", FP16), ("convolutions", BF16)):
        g, z = make(name)
        layer = FixedPointLayer(g, on_failure="return")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-120)
        found = trained(layer, z, scaler, dtype, 3, 2.0**20)
        assert [m for _, m in found] == [False, True, True]


def test_in_float16_an_infinite_derivative_is_masked_and_an_overflow_is_not():
    z = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 4.0]])
    w = (0.2 * torch.eye(2)).requires_grad_()

    def g(x, z, w):  # of the square root at 0 the derivative is infinite: sample 1
        return F.linear(x, w) + (x * z).abs().sqrt() * 0.1 + z

    def gradients(scale):
        with autocast(FP16):
            s = fixed_point(g, torch.zeros_like(z), z, params=(w,), on_failure="return")
        (grad,) = torch.autograd.grad((scale * s.x).sum(), w)
        return grad, s.adjoint.status.tolist()

    for scale, finite in ((1.0, True), (1e6, False)):
        grad, status = gradients(scale)
        assert bool(grad.isfinite().all()) == finite and grad.any()
        assert status == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]


def test_a_float16_state_that_overflows_backward_gives_no_finite_gradient(backend):
    z = torch.ones(3, 2, dtype=FP16)
    z[1] = 1e-4

    def gradient(scale):
        w = (0.9 * torch.eye(2)).to(FP16).requires_grad_()
        s = fixed_point(
            *(lambda x, z, w: F.linear(x, w) + z, 0 * z, z),
            **{"params": (w,), "backend": backend, "on_failure": "return", "solver": Picard()},
        )
        torch.autograd.backward(s.x, torch.full_like(s.x, scale))
        return w.grad, s.adjoint.status

    grad, status = gradient(1.0)
    assert grad.isfinite().all() and (status == Status.CONVERGED).all()
    grad, status = gradient(3e4)
    assert (status == Status.NONFINITE).all() and not grad.isfinite().any()


# --- around and inside --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opaque", "energy", "convolutions"])
def test_transforms_and_wrappers_see_the_same_solve(name):
    g, z = make(name)
    layer = FixedPointLayer(g, on_failure="raise")

    def loss(z):
        return layer(z).square().sum()

    exact = layer(z).detach()
    z.requires_grad_()
    (expected,) = torch.autograd.grad(loss(z), z)
    with autocast():
        x = layer(z)
        (inside,) = torch.autograd.grad(x.square().sum(), z, retain_graph=True)
        again = checkpoint(layer, z, use_reentrant=False)
        by_transform = torch.func.grad(loss)(z.detach())
        of_each = torch.vmap(lambda z: layer(z[None])[0])(z.detach())
        with torch.inference_mode():
            plain = layer(z.detach())
        system = FixedPointLayer(g, per_sample=False, on_failure="raise")(z)
    (outside,) = torch.autograd.grad(x.square().sum(), z)
    assert torch.equal(inside, outside) and torch.equal(plain, x) and torch.equal(again, x)
    assert torch.equal(torch.autograd.grad(again.square().sum(), z)[0], inside)
    for mine in (outside, by_transform, torch.autograd.grad(system.square().sum(), z)[0]):
        assert far(mine, expected) < 0.02
    for mine in (x, of_each, system):
        assert far(mine.detach(), exact) < 0.01


def test_a_step_that_takes_autocast_off_computes_as_it_says():
    inner, z = Net(), torch.randn(12, 8)

    def g(x, z):
        with autocast(enabled=False):
            return inner(x, z)

    found, tight = [], Tolerance(1e-6, 0)
    for enabled in (False, True):
        with autocast(enabled=enabled):
            s = fixed_point(g, torch.zeros(12, 16), z, tolerance=tight, on_failure="raise")
        found.append(s.x)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["two layers", "convolutions"])
def test_a_graph_solves_as_the_loop_does(name, tape):
    g, z = make(name)
    found = []
    for driver in ("graph", "eager", "graph"):
        layer = FixedPointLayer(g, driver=driver, per_sample=True, on_failure="raise")
        with autocast():
            x = layer(z.requires_grad_())
        found.append([x, *torch.autograd.grad(x.square().sum(), (z, *g.parameters()))])
        assert driver in layer.last.path and driver in layer.last.adjoint.path
    same(found[0], found[2])
    for mine, other in zip(found[0], found[1], strict=True):
        assert far(mine.detach(), other.detach()) < 0.01
    assert captures() == 2
