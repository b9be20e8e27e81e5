"""What is solved in the tests of forward mode, each beside a plain loop that gives the same."""

import functools

import torch
import torch.nn.functional as F
from helpers import Energy, contraction, linear, unroll
from helpers_conv import written_out
from helpers_derivatives import double
from helpers_forward import Problem, by_name, nested, numbers_of
from torch import nn
from torch.autograd import Function
from torch.func import functional_call, grad

from fpi_cuda import ConvStep, DenseEnergy, DenseStep, FixedPointLayer, GradientStep, fixed_point

W, Z = contraction(3, 0.3), double(2, 3)
STEPS = 40  # at a rate of 0.3 or less


def looped(g, steps=STEPS):
    return lambda z, w: unroll(g, torch.zeros_like(z), z, w, steps=steps)


def solved(g, **more):
    """By the options of a solve: f(z, w), the fixed point of x ↦ g(x, z, w)."""
    return lambda options: (
        lambda z, w: fixed_point(g, torch.zeros_like(z), z, params=(w,), **options, **more).x
    )


# --- functions of x, z and w -------------------------------------------------------------------


def opaque(x, z, w):
    return torch.tanh(x @ w.mT + z)


class ReverseOnly(Function):
    """tanh(x wᵀ + z) with a backward, differentiable again, and no rule for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, z, w):
        return torch.tanh(x @ w.mT + z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, c):
        x, _, w, y = ctx.saved_tensors
        d = c * (1 - y * y)
        return d @ w, d, d.mT @ x


def reverse_only(x, z, w):
    return ReverseOnly.apply(x, z, w)


def by_inverse(z, w):
    """The solution of x = x wᵀ + z; torch's nested forward mode of linalg.solve is wrong."""
    return z @ torch.linalg.inv(torch.eye(len(w), dtype=w.dtype) - w).mT


def mixing(x, z, w):
    """Samples that depend on each other."""
    return torch.tanh(0.7 * x @ w.mT + z) + 0.15 * x.flip(0).sin()


# --- a tuple of states -------------------------------------------------------------------------


def pair(x, z, w):
    u, y = x
    mixed = torch.tanh(u @ w.mT + z)
    return mixed + 0.1 * y.mean(1), 0.2 * y * u[:, None] + torch.stack([z.cos(), mixed], 1) / 4


def pair_start(z):
    return torch.zeros_like(z), z.new_zeros(len(z), 2, 3)


def flattened(x):
    return torch.cat([t.flatten(1) for t in x], 1)


def solved_pair(options):
    return lambda z, w: flattened(fixed_point(pair, pair_start(z), z, params=(w,), **options).x)


def looped_pair(z, w):
    x = pair_start(z)
    for _ in range(STEPS):
        x = pair(x, z, w)
    return flattened(x)


# --- modules: w is all their parameters and buffers --------------------------------------------


def of_module(step, g, z, shape=(3,), steps=STEPS):
    """A layer of the step, and g(x, z, tensors by name) in a plain loop."""

    def by_layer(options):
        layer = FixedPointLayer(step, state_shape=shape, **options)

        def f(z, w):
            tensors = {f"g.{name}": t for name, t in by_name(step, w).items()}
            return functional_call(layer, tensors, (z,))

        return f

    def by_loop(z, w):
        x0, tensors = z.new_zeros(len(z), *shape), by_name(step, w)
        return unroll(g, x0, z, tensors, steps=steps)

    return Problem(by_layer, by_loop, z, numbers_of(step))


class Shifted(nn.Module):
    """A step with a layer inside, a buffer, and one that counts."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3).double()
        self.register_buffer("shift", double(3, seed=3))
        self.register_buffer("count", torch.tensor(7))
        with torch.no_grad():
            self.inner.weight.copy_(contraction(3, 0.3, seed=2))
            self.inner.bias.copy_(double(3, seed=4, scale=0.2))

    def forward(self, x, z):
        return torch.tanh(self.inner(x) * self.shift.cos() + z)


def shifted(x, z, t):
    y = x @ t["inner.weight"].mT + t["inner.bias"]
    return torch.tanh(y * t["shift"].cos() + z)


def scaled(module, factor):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(factor)
    return module


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


@functools.cache
def of_energy():
    energy = Energy()

    def g(x, z, t):
        t = {name.removeprefix("energy."): value for name, value in t.items()}
        return x - 0.8 * grad(lambda x: functional_call(energy, t, (x, z)).sum())(x)

    return of_module(GradientStep(energy, 0.8), g, double(2, 2), steps=30)


@functools.cache
def of_dense_energy():
    step = GradientStep(seeded(lambda: DenseEnergy(3, 2, hidden=4)), 0.6)

    def g(x, z, t):
        weight, u = t["energy.state_weight"], z @ t["energy.input_weight"].mT + t["energy.bias"]
        return x - 0.6 * (x + torch.tanh(x @ weight.mT + u) @ weight)

    return of_module(step, g, double(2, 2))


@functools.cache
def of_dense(hidden):
    def make():
        return DenseStep(3, 2, hidden, "tanh" if hidden is None else "sigmoid", residual=0.1)

    def g(x, z, t):
        h = F.linear(x, t["state_weight"]) + F.linear(z, t["input_weight"], t["bias"])
        if hidden is None:
            return torch.tanh(h + 0.1 * x)
        return F.linear(torch.sigmoid(h), t["output_weight"], t["output_bias"]) + 0.1 * x

    return of_module(scaled(seeded(make), 0.4), g, double(2, 2))


@functools.cache
def of_conv():
    step = scaled(seeded(lambda: ConvStep(2, 1, hidden=(2,), activation="tanh")), 0.5)
    written, tensors = written_out(step)
    names = {id(p): name for name, p in step.named_parameters()}
    order = [names[id(p)] for p in tensors]

    def g(x, z, t):
        return written(x, z, *[t[name] for name in order])

    return of_module(step, g, double(2, 1, 2, 3), shape=(2, 2, 3))


# --- all of them -------------------------------------------------------------------------------

PROBLEMS = {
    "opaque": lambda: Problem(solved(opaque), looped(opaque), Z, W),
    "linear": lambda: Problem(solved(linear), by_inverse, Z, W),
    "reverse only": lambda: Problem(solved(reverse_only), looped(opaque), Z, W),
    "one system": lambda: Problem(solved(mixing, per_sample=False), looped(mixing), Z, W),
    "tuple": lambda: Problem(solved_pair, looped_pair, Z, W),
    "module": lambda: of_module(Shifted(), shifted, Z),
    "energy": of_energy,
    "dense energy": of_dense_energy,
    "one dense layer": lambda: of_dense(None),
    "two dense layers": lambda: of_dense(4),
    "convolutions": of_conv,
}


@functools.cache
def problem(name):
    return PROBLEMS[name]()


@functools.cache
def truth(name, nesting):
    """What a nesting gives of the plain loop."""
    _, f, z, w = problem(name)
    return nested(nesting, f)(z, w)
