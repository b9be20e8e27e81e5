"""P and H in forward mode, against torch.func.grad of the same function."""

import pytest
import torch
from helpers import Counter
from helpers_derivatives import double
from helpers_forward import (
    NESTINGS,
    by_name,
    direction,
    dual,
    joined,
    near,
    nested,
    numbers_of,
    tangent_of,
)
from helpers_forward_problems import ReverseOnly
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from fpi_cuda.operators import inner_product, partial

pytestmark = pytest.mark.usefixtures("one_thread")
Z, W = double(2, 3), double(3, 3, seed=1)


def energy(z, w):
    return (torch.tanh(z @ w.mT) * z).sum() + (w.sin() * w).sum() * z[:, :1].square().sum()


def both(z, w):
    """Both partial derivatives; samples in the first dimension."""
    dz, dw = partial(energy, z, w)
    return dz + dw.sum(0) * z


def both_by_torch(z, w):
    dz, dw = grad(energy, (0, 1))(z, w)
    return dz + dw.sum(0) * z


# --- nestings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_nesting_of_p_equals_that_of_torch(nesting):
    near(nested(nesting, both)(Z, W), nested(nesting, both_by_torch)(Z, W))


SOME = ("jvp", "jvp_other jvp", "jacfwd_w jacfwd_z", "hessian", "vmap jvp", "dual", "dual_backward")


def by_reverse_only(z, w):
    return partial(lambda z, w: ReverseOnly.apply(z, 0 * z, w).square().sum(), z, w, which=(0,))[0]


def by_reverse_only_torch(z, w):
    return grad(lambda z: torch.tanh(z @ w.mT).square().sum())(z)


def of_product(z, w):
    """P of H, with H's v among the arguments."""

    def h(v, z, w):
        return inner_product((v, v[0]), lambda z, w: (torch.tanh(z @ w), w.sin() @ z[0]))(z, w)

    return joined(partial(h, z.cos(), z, w))


def of_product_by_torch(z, w):
    def h(v, z, w):
        return (v * torch.tanh(z @ w)).sum() + (v[0] * (w.sin() @ z[0])).sum()

    return joined(grad(h, (0, 1, 2))(z.cos(), z, w))


def of_p(z, w):
    """P of P."""

    def r(z, w):
        return partial(energy, z, w, which=(0,))[0].sin().sum()

    return partial(r, z, w, which=(1,))[0]


def of_p_by_torch(z, w):
    return grad(lambda w: grad(energy)(z, w).sin().sum())(w)


def with_an_index(z, w):
    def r(z, w, i):
        return (torch.tanh(z @ w)[:, i] ** 3).sum()

    return partial(r, z, w, torch.tensor([0, 2]))[1]


def with_an_index_by_torch(z, w):
    return grad(lambda w: (torch.tanh(z @ w)[:, [0, 2]] ** 3).sum())(w)


def ignoring(z, w):
    """r is linear in z and does not depend on the last argument."""
    return partial(lambda z, w, _: (z @ w.sin()).sum(), z, w, z + 0)[0] * z


def ignoring_by_torch(z, w):
    return grad(lambda z: (z @ w.sin()).sum())(z) * z


WAYS = {
    "reverse formulas alone": (by_reverse_only, by_reverse_only_torch),
    "P of H": (of_product, of_product_by_torch),
    "P of P": (of_p, of_p_by_torch),
    "with an index": (with_an_index, with_an_index_by_torch),
    "linear": (ignoring, ignoring_by_torch),
}


@pytest.mark.parametrize("nesting", SOME)
@pytest.mark.parametrize("way", WAYS)
def test_other_functions_and_h_in_some_nestings(way, nesting):
    mine, true = WAYS[way]
    near(nested(nesting, mine)(Z, W), nested(nesting, true)(Z, W))


class Total(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2).double()
        self.register_buffer("shift", double(2, seed=2))

    def forward(self, z):
        return torch.tanh(self.net(z) * self.shift.cos()).square().sum()


class Slope(nn.Module):
    """P by z of a module, whose parameters and buffers are further arguments."""

    def __init__(self, slope):
        super().__init__()
        self.total, self.slope = Total(), slope

    def forward(self, z):
        return self.slope(self.total, z)


@pytest.mark.parametrize("nesting", SOME)
def test_a_modules_parameters_and_buffers_have_tangents(nesting):
    mine = Slope(lambda total, z: partial(total, z)[0])
    slow = Slope(lambda total, z: grad(total)(z))
    w = numbers_of(mine)

    def by(module):
        return lambda z, w: functional_call(module, by_name(module, w), (z,))

    near(nested(nesting, by(mine))(Z, w), nested(nesting, by(slow))(Z, w))


# --- complex arguments -------------------------------------------------------------------------


def test_complex_arguments_have_tangents_by_torchs_convention():
    """The derivative by a + ib is ∂r/∂a + i ∂r/∂b; its tangent is that of the pair."""
    z, dz = torch.complex(Z, Z.sin()), torch.complex(direction(Z), direction(Z, 1))

    def quartic(z):
        return partial(lambda z: (z.abs() ** 4).sum(), z)[0]

    near_complex(quartic(z), 4 * z.abs() ** 2 * z)
    found = jvp(quartic, (z,), (dz,))[1]
    inner = (z.conj() * dz).real
    near_complex(found, 8 * inner * z + 4 * z.abs() ** 2 * dz)
    twice = jvp(lambda z: jvp(quartic, (z,), (dz,))[1], (z,), (dz,))[1]
    near_complex(twice, 8 * dz.abs() ** 2 * z + 16 * inner * dz)
    with forward_ad.dual_level():
        near_complex(tangent_of(quartic(forward_ad.make_dual(z, dz))), found)
    several = vmap(lambda t: jvp(quartic, (z,), (t,))[1])(torch.stack([dz, 1j * dz]))
    near_complex(several[0], found)
    near_complex(several[1], jvp(quartic, (z,), (1j * dz,))[1])


def test_complex_and_real_arguments_mixed_equal_torch():
    z, dz = torch.complex(Z, Z.sin()), torch.complex(direction(Z), direction(Z, 1))

    def r(z, w):
        return ((z @ w.to(z.dtype)).exp() * z).imag.sum()

    def mine(z, w):
        return partial(r, z, w)

    def true(z, w):
        return grad(r, (0, 1))(z, w)

    def along(f):
        return lambda z, w: jvp(f, (z, w), (dz, direction(w)))[1]

    for found, expected in zip(along(mine)(z, W), along(true)(z, W), strict=True):
        near_complex(found, expected)
    for found, expected in zip(along(along(mine))(z, W), along(along(true))(z, W), strict=True):
        near_complex(found, expected)


def near_complex(found, expected):
    near(
        torch.view_as_real(torch.complex(*parts(found))),
        torch.view_as_real(torch.complex(*parts(expected))),
    )


def parts(t):
    return (t.real, t.imag) if t.is_complex() else (t, torch.zeros_like(t))


# --- grad mode, calls --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_dual_tensor_has_its_tangent_whatever_the_grad_mode(mode):
    with mode(), forward_ad.dual_level():
        (found,) = partial(lambda z: (z**3).sum(), dual(Z))
        near(tangent_of(found), 6 * Z * direction(Z))
        near(forward_ad.unpack_dual(found).primal, 3 * Z**2)
        (plain,) = partial(lambda z: (z**3).sum(), Z)
        assert forward_ad.unpack_dual(plain).tangent is None
        (of_other,) = partial(lambda z, w: (z @ w).sum(), Z, dual(W), which=(0,))
        near(tangent_of(of_other), direction(W).sum(1).expand(2, 3))
    with mode():
        found = nested("jvp_z jvp_z", lambda z, w: partial(lambda z: (z**3).sum(), z)[0])(Z, W)
        near(found, 6 * direction(Z) ** 2)


def test_the_tangent_is_attached_to_autograd():
    z = Z.clone().requires_grad_()
    with forward_ad.dual_level():
        (found,) = partial(lambda z: (z**4).sum(), dual(z))
        (second,) = torch.autograd.grad(tangent_of(found).sum(), z, create_graph=True)
        near(second, 24 * z * direction(z))
        (third,) = torch.autograd.grad(second.sum(), z)
        near(third, 24 * direction(z))


def test_r_is_called_few_times():
    for nesting, most in (("jvp", 3), ("dual", 3), ("jvp jvp", 6), ("jvp jvp jvp", 14)):
        r = Counter(energy)
        nested(nesting, lambda z, w, r=r: partial(r, z, w)[0])(Z, W)
        assert r.calls <= most


def test_inside_vmap_over_rows_and_over_tangents():
    def slope(row):
        return partial(lambda t: (t.exp() * t).sum(), row)[0]

    expected = (Z + 2) * Z.exp() * direction(Z[0])
    found = vmap(lambda row: jvp(slope, (row,), (direction(row),))[1])(Z)
    near(found, expected)
    near(vmap(jacfwd(slope))(Z), torch.diag_embed((Z + 2) * Z.exp()))
    near(vmap(hessian(lambda row: slope(row).sum()))(Z), torch.diag_embed((Z + 3) * Z.exp()))
    near(jacfwd(vmap(slope))(Z), jacrev(vmap(slope))(Z))


# --- functions that capture ----------------------------------------------------------------------


def captured_in_r(z, w):
    return partial(lambda z: energy(z, w), z)[0]


def captured_in_h(z, w):
    return partial(inner_product((w[:2],), lambda z: (torch.tanh(z),)), z)[0]


TRUE = {
    captured_in_r: lambda z, w: grad(lambda z: energy(z, w))(z),
    captured_in_h: lambda z, w: w[:2] * (1 - torch.tanh(z) ** 2),
}
CAPTURING = (
    *("jvp_w", "jvp", "jvp_w jvp_z", "jvp_w grad_z", "vmap_w jvp_z", "jacfwd_w jacfwd_z"),
    *("grad_w jvp_z", "dual_w", "dual", "no_grad dual_w", "no_grad dual", "dual_w grad_z"),
)


@pytest.mark.parametrize("nesting", CAPTURING)
@pytest.mark.parametrize("way", TRUE)
def test_a_captured_tensor_is_refused_by_name_or_has_its_part(way, nesting):
    try:
        found = nested(nesting, way)(Z, W)
    except (RuntimeError, ValueError) as error:
        assert "captures" in str(error)
        assert "pass it in s" in str(error)
    else:
        near(found, nested(nesting, TRUE[way])(Z, W))
