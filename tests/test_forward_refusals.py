"""Forward mode of what g captures: right, or refused by name; never a silent zero."""

import functools
import re

import pytest
import torch
from helpers import contraction
from helpers_derivatives import double, tight
from helpers_forward import (
    TRANSFORMS,
    direction,
    dual,
    func_in_inference_mode,
    joined,
    leaves,
    near,
    nested,
    tangent_of,
)
from helpers_forward_problems import Shifted, looped, opaque, solved
from torch import nn
from torch.autograd import forward_ad
from torch.func import hessian, jacrev, jvp, linearize, vmap

from fpi_cuda import Anderson, FixedPointLayer, GradientStep, fixed_point
from fpi_cuda.operators import partial

pytestmark = pytest.mark.usefixtures("one_thread")
NATIVE = tight("native", Anderson())
W, Z = contraction(3, 0.3), double(2, 3)
REFUSED = r"captures (a tensor|one).*(pass it in|only first derivatives)"


def right_or_refused(found, expected, words=REFUSED):
    """Both are functions without arguments; the second one is not called where the first raises."""
    try:
        value = found()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        assert re.search(words, str(error), re.DOTALL), error
    else:
        near(value, expected())


# --- captured tensors --------------------------------------------------------------------------


def of(g, z):
    return fixed_point(g, torch.zeros_like(z), z, **NATIVE).x


def closure(z, w):
    return of(lambda x, z: opaque(x, z, w), z)


def halved(z, w):
    half = 0.5 * w  # not the tensor that is followed, but made of it
    return of(lambda x, z: torch.tanh(2 * x @ half.mT + z), z)


def by_partial(z, w):
    return of(functools.partial(lambda w, x, z: opaque(x, z, w), w), z)


def by_module(z, w):
    """An attribute that is neither a parameter nor a buffer."""

    class Step(nn.Module):
        def forward(self, x, z):
            return opaque(x, z, self.w)

    step = Step()
    step.w = w
    return of(step, z)


INNER = nn.Linear(3, 3, bias=False).double()  # torch makes no module within its transforms
del INNER.weight


def by_inner_module(z, w):
    """As tutorials swap a parameter for a dual tensor: delattr, then setattr."""
    INNER.weight = w
    return of(lambda x, z: torch.tanh(INNER(x) + z), z)


def by_energy(z, w):
    """The fixed point is that of x = tanh(x wᵀ) + z, whose energy's gradient is x − that."""

    def energy(x, z):
        return (0.5 * x.square() - x * z).sum(-1) + torch.cos(x @ w.mT).sum(-1)

    return FixedPointLayer(GradientStep(energy, 0.8), **NATIVE)(z)


def by_energy_looped(z, w):
    x = torch.zeros_like(z)
    for _ in range(40):
        x = x - 0.8 * (x - z - torch.sin(x @ w.mT) @ w)
    return x


WAYS = {
    "closure": (closure, looped(opaque)),
    "made of it": (halved, looped(opaque)),
    "functools.partial": (by_partial, looped(opaque)),
    "module": (by_module, looped(opaque)),
    "inner module": (by_inner_module, looped(opaque)),
    "energy": (by_energy, by_energy_looped),
}
# w is captured, z an input.
FOLLOWED = (
    *("jvp_w", "jvp", "jacfwd_w", "jvp_w jvp_w", "tangents", "hessian"),
    *("jvp_w jvp_z", "jacfwd_w jacfwd_z", "jvp_w grad_z", "jvp_w vmap_z", "jvp_w vmap_z jvp_z"),
    *("grad_w jvp_z", "vmap_w jvp_z", "vmap_w jvp_z jvp_z", "grad_w jvp_z jvp_z"),
    *("jvp_z grad_w", "jvp_z vmap_w", "jvp_z jacrev_w", "jvp_z jvp_w"),
    *("dual_w", "dual", "no_grad dual_w", "no_grad dual", "dual_w grad_z", "dual_w vmap_z"),
    *("dual_z grad_w", "dual_z vmap_w", "dual grad_z", "backward", "dual_backward"),
    *("backward_dual", "dual_cotangent", "dual_cotangent_graph"),
)


@pytest.mark.parametrize("nesting", FOLLOWED)
@pytest.mark.parametrize("way", ["closure", "energy"])
def test_a_captured_tensor_is_refused_by_name_or_right_in_every_nesting(way, nesting):
    mine, true = WAYS[way]
    right_or_refused(lambda: nested(nesting, mine)(Z, W), lambda: nested(nesting, true)(Z, W))


SOME = ("jvp_w", "jvp_w jvp_z", "vmap_w jvp_z", "grad_w jvp_z", "dual", "no_grad dual_w")


@pytest.mark.parametrize("nesting", SOME)
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("closure", "energy")])
def test_wherever_g_holds_it(way, nesting):
    mine, true = WAYS[way]
    right_or_refused(lambda: nested(nesting, mine)(Z, W), lambda: nested(nesting, true)(Z, W))


@pytest.mark.parametrize("level", ["jvp_w", "dual_w"])
def test_the_refusal_names_the_tensor(level):
    def f(z, w):
        return of(lambda x, z: opaque(x, z, w), z)

    with pytest.raises(RuntimeError, match=r"carries a tangent.* \(w of shape \(3, 3\)\)"):
        nested(level, f)(Z, W)


# --- gradients of autograd beside forward mode -------------------------------------------------


def test_a_captured_tensor_that_needs_gradients_has_its_part_in_the_tangents_gradient():
    (w,) = leaves(W)

    def gradient(f):
        def of(z):
            value = f(z, w).sin().sum()
            if not value.requires_grad:
                raise AssertionError("the gradient was lost")
            return torch.autograd.grad(value, w)[0]

        return of

    for name in ("dual_z", "jvp_z", "jvp_z jvp_z", "vmap_z jvp_z"):
        right_or_refused(
            lambda name=name: gradient(nested(name, closure))(Z),
            lambda name=name: gradient(nested(name, looped(opaque)))(Z),
        )


def test_a_tangent_past_a_captured_tensor_that_needs_gradients_names_it():
    (w,) = leaves(W)
    for name in ("jvp_z", "dual_z"):
        with pytest.raises(RuntimeError, match=r"^fixed_point: g captures .* \(w of shape"):
            nested(name, closure)(Z, w)


def test_a_captured_tensor_that_needs_gradients_is_no_matter_without_them():
    (w,) = leaves(W)
    for name in ("jvp_z", "dual_z"):
        with torch.no_grad():
            near(nested(name, closure)(Z, w), nested(name, looped(opaque))(Z, W))
    for name in ("jvp_z jvp_z", "vmap_z jvp_z"):  # nested levels have gradients on in any case
        with torch.no_grad():
            right_or_refused(
                lambda name=name: nested(name, closure)(Z, w),
                lambda name=name: nested(name, looped(opaque))(Z, W),
            )


def test_a_gradient_by_a_captured_tensor_of_a_dual_cotangent_is_right_or_refused():
    def gradient(f):
        z, w = leaves(Z, W)
        y = f(z, w)
        with forward_ad.dual_level():
            v = forward_ad.make_dual(direction(y), direction(y, 1))
            return joined([tangent_of(t) for t in torch.autograd.grad(y, (z, w), v)])

    right_or_refused(lambda: gradient(closure), lambda: gradient(looped(opaque)))


# --- what is not followed is not refused -------------------------------------------------------


@pytest.mark.parametrize(
    "nesting", ["jvp", "jvp jvp", "hessian", "vmap jvp", "dual", "dual_backward", "dual_cotangent"]
)
def test_constants_that_g_captures_are_nobodys_business(nesting):
    shift, step = double(3, seed=8), Shifted().requires_grad_(False)

    def g(x, z, w):
        scale = torch.arange(3, dtype=z.dtype) / 6
        return 0.5 * opaque(x, z, w) * scale + 0.3 * step(x, shift) + torch.ones_like(x)

    near(nested(nesting, solved(g)(NATIVE))(Z, W), nested(nesting, looped(g))(Z, W))


def test_a_level_that_follows_other_tensors_refuses_nothing():
    x = looped(opaque)(Z, W)
    with forward_ad.dual_level():
        other = dual(Z)
        near(closure(Z, W), x)
        near(tangent_of(closure(Z, W) * other), x * direction(Z))
    near(jvp(lambda t: closure(Z, W) * t, (Z,), (direction(Z),))[1], x * direction(Z))


def test_a_parameter_swapped_for_a_dual_tensor_is_right_or_refused():
    """torch's own recipe for tangents of a module's parameters."""
    tangents = {name: direction(p) for name, p in Shifted().named_parameters()}

    def swapped(solve):
        step = Shifted()
        with forward_ad.dual_level():
            for name, tangent in tangents.items():
                owner, _, last = name.rpartition(".")
                value = step.get_parameter(name).detach()
                delattr(step.get_submodule(owner), last)
                setattr(step.get_submodule(owner), last, forward_ad.make_dual(value, tangent))
            return tangent_of(solve(step))

    def loop(step):
        x = torch.zeros_like(Z)
        for _ in range(40):
            x = step(x, Z)
        return x

    right_or_refused(lambda: swapped(lambda g: of(g, Z)), lambda: swapped(loop))


# --- linearize ---------------------------------------------------------------------------------


def along(f):
    """What linearize(f, Z, W) should give."""
    return lambda dz, dw: jvp(f, (Z, W), (dz, dw))[1]


def several(tangent):
    tangents = [torch.stack([direction(t), direction(t, 1)]) for t in (Z, W)]
    return vmap(tangent)(*tangents)


LINEAR = {
    "applied": lambda t: t(direction(Z), direction(W)),
    "applied twice": lambda t: t(direction(Z), direction(W)) - t(direction(Z, 1), direction(W)),
    "vmapped": several,
    "its jacobian": lambda t: jacrev(t, 1)(direction(Z), direction(W)),
    "along": lambda t: jvp(t, (Z, W), (direction(Z), direction(W)))[1],
}
of_linearize = pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")


@of_linearize
@pytest.mark.parametrize("use", LINEAR.values(), ids=LINEAR)
def test_linearize_is_right(use):
    near(use(linearize(solved(opaque)(NATIVE), Z, W)[1]), use(along(looped(opaque))))


@of_linearize
@pytest.mark.parametrize("inner", ["grad_w", "rows"])
def test_linearize_of_another_transform_is_right(inner):
    mine, true = (TRANSFORMS[inner](f) for f in (solved(opaque)(NATIVE), looped(opaque)))
    use = LINEAR["applied"]
    near(use(linearize(mine, Z, W)[1]), use(along(true)))


@of_linearize
def test_linearize_of_a_module_and_of_p_is_right():
    layer, dz = FixedPointLayer(Shifted().requires_grad_(False), **NATIVE), direction(Z)

    def loop(z):
        x = torch.zeros_like(z)
        for _ in range(40):
            x = layer.g(x, z)
        return x

    near(linearize(layer, Z)[1](dz), jvp(loop, (Z,), (dz,))[1])

    def slope(z):
        return partial(lambda z: (z**3).sum(), z)[0]

    near(linearize(slope, Z)[1](dz), 6 * Z * dz)


# --- inference mode ----------------------------------------------------------------------------


@func_in_inference_mode
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jvp(f, (Z,), (direction(Z),))[1],
        lambda f: jvp(lambda z: jvp(f, (z,), (Z,))[1], (Z,), (direction(Z),))[1],
        lambda f: jacrev(f)(Z),
        lambda f: hessian(lambda z: f(z).sin().sum())(Z),
        lambda f: vmap(lambda z: jvp(f, (z,), (z,))[1])(Z[:, None]),
    ],
    ids=["jvp", "jvp jvp", "jacrev", "hessian", "vmap jvp"],
)
@pytest.mark.parametrize("kind", ["g", "energy", "P"])
def test_what_torch_func_takes_in_inference_mode_is_right_or_refused(kind, transform):
    def mine(z):
        if kind == "P":
            return partial(lambda z: (z**3).sum(), z)[0]
        g = GradientStep(Energy(), 0.5) if kind == "energy" else functools.partial(opaque, w=W)
        return fixed_point(g, torch.zeros_like(z), z, **NATIVE).x

    expected = transform(mine)
    with torch.inference_mode():
        right_or_refused(lambda: transform(mine), lambda: expected, "inference_mode")


class Energy(nn.Module):
    def forward(self, x, z):
        return 0.5 * (x - z).square().sum(1) + 0.1 * x.pow(4).sum(1)
