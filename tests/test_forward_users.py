"""Forward mode of what users build: networks with norms, checkpoints, empty batches."""

import pytest
import torch
from helpers_derivatives import double, tight
from helpers_forward import direction, dual, joined, near, tangent_of
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fpi_cuda import Anderson, FixedPointLayer, GradientStep, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")
NATIVE = tight("native", Anderson())
Z = double(3, 4)


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
    wanted = list(layer.parameters())
    with torch.autograd.forward_ad.dual_level():
        value = tangent_of(layer(dual(Z))).sin().sum()
        found = joined(torch.autograd.grad(value, wanted))
    ways = [direction(p, 3) for p in wanted]

    def moved(by):
        with torch.no_grad():
            for p, way in zip(wanted, ways, strict=True):
                p += by * way
            value = jvp(layer, (Z,), (direction(Z),))[1].sin().sum()
            for p, way in zip(wanted, ways, strict=True):
                p -= by * way
        return value

    difference = (8 * (moved(1e-4) - moved(-1e-4)) - moved(2e-4) + moved(-2e-4)) / 12e-4
    near(found @ joined(ways), difference, 1e-6)


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_around_a_solve_does_not_run_it_again_for_its_own_graphs():
    def energy(x, z):
        return 0.5 * (x - z).square().sum(-1) + torch.cos(x).sum(-1) / 4

    layers = FixedPointLayer(lambda x, z: 0.5 * torch.tanh(x) + z, **NATIVE), FixedPointLayer(
        GradientStep(energy, 0.6), **NATIVE
    )
    for layer in layers:
        calls = []

        def counted(z, layer=layer, calls=calls):
            calls.append(0)
            return layer(z)

        def kept(z, counted=counted):
            return checkpoint(counted, z, use_reentrant=False)

        z = Z.clone().requires_grad_()
        found = jvp(kept, (z,), (direction(Z),))[1]
        near(found, jvp(layer, (Z,), (direction(Z),))[1])
        with torch.autograd.forward_ad.dual_level():
            found = tangent_of(kept(dual(z)))
            assert len(calls) == 2
            slope = torch.autograd.grad(found.sin().sum(), z)[0]
        near(slope, grad(lambda z: jvp(layer, (z,), (direction(Z),))[1].sin().sum())(Z))


# --- nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 3, 4)])
def test_mapped_tangents_and_gradients_of_nothing_are_empty(shape):
    def f(z):
        return fixed_point(lambda x, z: torch.tanh(0.5 * x + z), torch.zeros_like(z), z, **NATIVE).x

    z = double(*shape)
    assert vmap(lambda z: jvp(f, (z,), (z,))[1])(z).shape == shape
    assert vmap(grad(lambda z: f(z).sum()))(z).shape == shape
