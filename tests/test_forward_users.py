"""Forward mode of what users build: networks with norms, checkpoints, empty batches."""

import pytest
import torch
from helpers import unroll
from helpers_derivatives import double, tight
from helpers_forward import (
    direction,
    dual,
    func_in_inference_mode,
    joined,
    near,
    nested,
    tangent_of,
)
from helpers_forward_problems import problem, truth
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fpi_cuda import Anderson, DenseStep, FixedPointLayer, GradientStep, fixed_point
from fpi_cuda.operators import partial

pytestmark = pytest.mark.usefixtures("one_thread")
NATIVE = tight("native", Anderson())
Z = double(3, 4)


def energy(x, z):
    return 0.5 * (x - z).square().sum(-1) + torch.cos(x).sum(-1) / 4


# --- norms ---------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), norm
        self.double()
        with torch.no_grad():
            self.linear.weight.copy_(double(4, 4, seed=1, scale=0.3))
            self.linear.bias.copy_(double(4, seed=2))

    def forward(self, x, z):
        return 0.3 * torch.tanh(self.norm(self.linear(x) + z))


NORMS = {
    "layer": lambda: nn.LayerNorm(4),
    "batch, training": lambda: nn.BatchNorm1d(4),
    "batch, eval": lambda: nn.BatchNorm1d(4).eval(),
    "group": lambda: nn.GroupNorm(2, 4),
    "rms": lambda: nn.RMSNorm(4),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_hessians_product_is_the_same_in_every_mode(norm):
    """Torch's own third derivatives of layer and batch norm are wrong: none must be taken."""
    step = Normed(NORMS[norm]())
    layer = FixedPointLayer(step, per_sample=norm != "batch, training", **NATIVE)
    given = Z, {k: p.detach() for k, p in layer.named_parameters()}
    tangents = direction(Z), {k: direction(p) for k, p in given[1].items()}

    def loss(z, p):
        return functional_call(layer, p, (z,)).sin().sum()

    def flat(found):
        return joined((found[0], *found[1].values()))

    gradient = grad(loss, (0, 1))
    forward_over_reverse = flat(jvp(gradient, given, tangents)[1])
    reverse_over_forward = flat(grad(lambda *s: jvp(loss, s, tangents)[1], (0, 1))(*given))

    def moved(by):
        p = {k: t + by * tangents[1][k] for k, t in given[1].items()}
        return flat(gradient(given[0] + by * tangents[0], p))

    difference = (8 * (moved(1e-4) - moved(-1e-4)) - moved(2e-4) + moved(-2e-4)) / 12e-4
    near(forward_over_reverse, difference, 1e-6)
    near(reverse_over_forward, forward_over_reverse)


@pytest.mark.parametrize("norm", ["layer", "batch, eval"])
def test_the_tangents_gradient_reaches_a_norms_parameters(norm):
    """By dual tensors, which leave running statistics alone."""
    step = Normed(NORMS[norm]())
    layer = FixedPointLayer(step, **NATIVE)
    named = list(layer.named_parameters())
    wanted = [p for _, p in named]
    with torch.autograd.forward_ad.dual_level():
        value = tangent_of(layer(dual(Z))).sin().sum()
        found = joined(torch.autograd.grad(value, wanted))
    ways = [direction(p, 3) for p in wanted]

    def moved(by):
        moved = {k: p.detach() + by * way for (k, p), way in zip(named, ways, strict=True)}

        def along(z):
            return functional_call(layer, moved, (z,))

        return jvp(along, (Z,), (direction(Z),))[1].sin().sum()

    difference = (8 * (moved(1e-4) - moved(-1e-4)) - moved(2e-4) + moved(-2e-4)) / 12e-4
    near(found @ joined(ways), difference, 1e-6)


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [lambda x, z: 0.5 * torch.tanh(x) + z, GradientStep(energy, 0.6)])
def test_a_checkpoint_around_a_solve_does_not_run_it_again_for_its_own_graphs(g):
    layer, calls = FixedPointLayer(g, **NATIVE), []

    def counted(z):
        calls.append(0)
        return layer(z)

    def kept(z):
        return checkpoint(counted, z, use_reentrant=False)

    try:
        jvp(lambda z: checkpoint(torch.sin, z, use_reentrant=False), (Z,), (Z,))
    except NotImplementedError:  # torch 2.11
        pytest.skip("torch has no tangents through a checkpoint")

    def value(z):
        return jvp(layer, (z,), (direction(Z),))[1]

    z = Z.clone().requires_grad_()
    near(jvp(kept, (z,), (direction(Z),))[1], value(Z))
    with torch.autograd.forward_ad.dual_level():
        found = tangent_of(kept(dual(z)))
        assert len(calls) == 2
        slope = torch.autograd.grad(found.sin().sum(), z)[0]
    near(slope, grad(lambda z: value(z).sin().sum())(Z))


# --- nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 3, 4)])
def test_mapped_tangents_and_gradients_of_nothing_are_empty(shape):
    def f(z):
        return fixed_point(lambda x, z: torch.tanh(0.5 * x + z), torch.zeros_like(z), z, **NATIVE).x

    z = double(*shape)
    assert vmap(lambda z: jvp(f, (z,), (z,))[1])(z).shape == shape
    assert vmap(grad(lambda z: f(z).sum()))(z).shape == shape


# --- inference mode ------------------------------------------------------------------------------


def test_p_and_steps_by_p_are_right_in_inference_mode():
    layer = FixedPointLayer(GradientStep(energy, 0.6), **NATIVE)
    with torch.no_grad():
        expected = layer(Z)
    with torch.inference_mode():
        made_there = Z.clone()
        for z in (Z, made_there):
            near(partial(lambda z: (z**3).sum(), z)[0], 3 * Z**2)
            near(layer(z), expected)
        near(partial(lambda z: (z * made_there.sin()).sum(), Z)[0], Z.sin())  # captures it
    near(layer(made_there), expected)
    near(jvp(layer, (made_there,), (direction(Z),))[1], jvp(layer, (Z,), (direction(Z),))[1])


@func_in_inference_mode
@pytest.mark.parametrize(
    "nesting", ["jvp", "jvp jvp", "hessian", "grad_w jvp", "grad_w", "vmap jvp"]
)
@pytest.mark.parametrize("name", ["opaque", "two dense layers"])
def test_derivatives_are_right_in_inference_mode(name, nesting):
    """As torch.func's are, of plain operators."""
    solved, _, z, w = problem(name)
    with torch.inference_mode():
        near(nested(nesting, solved(NATIVE))(z.clone(), w.clone()), truth(name, nesting))


@func_in_inference_mode
def test_a_model_made_in_inference_mode_has_tangents_there():
    with torch.inference_mode():

        def loop(z):
            return unroll(step, torch.zeros_like(z), z, steps=60)

        step = Normed(nn.Identity())
        layer = FixedPointLayer(step, **NATIVE)
        near(jvp(layer, (Z,), (direction(Z),))[1], jvp(loop, (Z,), (direction(Z),))[1])


# --- a step alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_an_exact_step_outside_a_solve_has_tangents(bias):
    step = DenseStep(4, 3, exact=True, bias=bias).double()
    x, z, named = Z, double(3, 3, seed=5), dict(step.named_parameters())
    given = x, z, {k: p.detach() for k, p in named.items()}
    tangents = direction(x), direction(z), {k: direction(p) for k, p in named.items()}
    true = jvp(lambda x, z, p: functional_call(step, p, (x, z)), given, tangents)[1]
    with torch.autograd.forward_ad.dual_level():
        x, z = dual(x), dual(z)
        found = functional_call(step, {k: dual(p) for k, p in given[2].items()}, (x, z))
        near(tangent_of(found), true)


def test_an_operator_without_second_derivatives_is_explained():
    """Attention, as a transformer in eval mode has it: one of torch's kernels can't go on."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()

    def g(x, z):
        return 0.2 * attention(x, x, x, need_weights=False)[0] + z

    z = double(2, 3, 4)
    layer = FixedPointLayer(g, **NATIVE)
    plain = lambda z: unroll(g, torch.zeros_like(z), z, steps=40)  # noqa: E731
    with sdpa_kernel(SDPBackend.MATH):
        near(jvp(layer, (z,), (z,))[1], jvp(plain, (z,), (z,))[1])
    try:
        jvp(layer, (z,), (z,))
    except RuntimeError as error:
        assert any("SDPBackend.MATH" in note for note in error.__notes__)
