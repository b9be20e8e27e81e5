"""Weights of a state's tensors in its norm, against the same problem scaled by hand."""

import copy

import pytest
import torch
from helpers_bad_input import raises
from helpers_derivatives import close, double
from helpers_layers import EXACT
from helpers_states import (
    KINDS,
    NESTED,
    B,
    Named,
    Part,
    W,
    Z,
    alike,
    loop,
    loss,
    solved,
    solved_as_one_tensor,
    step,
)
from torch.autograd import grad

from fpi_cuda import Anderson, FixedPointLayer, Picard, Tolerance, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")
DICT = KINDS["a dict"]

WEIGHTS = {"u": 4.0, 7: 2, "b": 0.3}


@pytest.mark.parametrize("solver", [Anderson(), Picard()])
def test_weights_are_those_of_the_norm(solver):
    z = Z.clone().requires_grad_()
    options = {"tolerance": Tolerance(1e-4, 1e-7), "solver": solver}
    s = solved(DICT, z, W, norm_weights=WEIGHTS, **options)
    scales = [w**0.5 for w in WEIGHTS.values()]
    true = solved_as_one_tensor(z, W, scales, **EXACT | options)
    assert torch.equal(s.iterations, true.iterations)
    close(s.residual_norm, true.residual_norm)
    g_of = step(DICT)(s.x, z, W)
    off = [(g_of[k] - s.x[k]).flatten(1).square().sum(1) for k in ("u", 7)]
    off.append((g_of["b"] - s.x["b"]).square())
    norm = sum(w * t for w, t in zip(WEIGHTS.values(), off, strict=True)).sqrt()
    torch.testing.assert_close(s.residual_at_x, norm.detach(), rtol=1e-6, atol=1e-12)
    mine = grad(s.x["u"].sum() + s.x["b"].sin().sum(), z)[0]
    parts = true.x.split([3, 4, 1], 1)
    close(mine, grad(parts[0].sum() / scales[0] + (parts[2] / scales[2]).sin().sum(), z)[0])
    assert torch.equal(s.adjoint.iterations, true.adjoint.iterations)


def test_a_heavy_tensor_decides_when_a_sample_stops():
    def g(x):
        return {"slow": 0.9 * x["slow"] + 1, "fast": 0.1 * x["fast"] + 1}

    def iterations(slow, fast):
        options = {"solver": Picard(), "tolerance": Tolerance(1e-3), "max_iterations": 500}
        x0 = {"slow": torch.zeros(2, 3), "fast": torch.zeros(2, 3)}
        weights = {"fast": fast, "slow": slow}
        return fixed_point(g, x0, norm_weights=weights, **options).iterations.max()

    found = iterations(1e-8, 1.0), iterations(1.0, 1.0), iterations(1.0, 1e-8)
    assert found[0] < 8 and 40 < found[1] <= found[2]


def test_derivatives_do_not_depend_on_the_weights():
    z, w = Z.clone().requires_grad_(), W.clone().requires_grad_()
    weights = Named(100.0, {"part": Part(0.5, 3)})
    x, true = solved(NESTED, z, w, norm_weights=weights).x, loop(NESTED, z, w)
    alike(x, true)
    mine, other = (grad(loss(NESTED, v), (z, w), create_graph=True) for v in (x, true))
    for a, b in zip(mine, other, strict=True):
        close(a, b)
    again = [grad(d[1].square().sum(), z)[0] for d in (mine, other)]
    close(*again)


def test_weights_that_are_powers_of_4_round_nothing():
    x0 = {k: double(B, 3, seed=i) for i, k in enumerate("ab")}
    returned, got = [dict(x0)], []

    def g(x):
        got.append({k: v.clone() for k, v in x.items()})
        returned.append({k: torch.sin(v) * 0.7 + 0.1 for k, v in x.items()})
        return returned[-1]

    options = {"solver": Picard(), "tolerance": Tolerance(0, 0), "max_iterations": 5}
    weights = {"a": 4.0**7, "b": 4.0**-9}
    s = fixed_point(g, x0, per_sample=True, norm_weights=weights, **options)
    for a, b in zip(got, returned, strict=False):
        assert all(torch.equal(a[k], b[k]) for k in "ab")
    assert all(torch.equal(s.x[k], returned[-1][k]) for k in "ab")


def test_a_certificate_of_the_plain_norm_bounds_nothing_where_tensors_weigh_otherwise():
    class Certified(torch.nn.Module):
        def certified_lipschitz(self):
            return 0.5

        def forward(self, x):
            return tuple(0.5 * t + 1 for t in x)

    x0 = (torch.zeros(2, 3), torch.zeros(2, 1))
    assert fixed_point(Certified(), x0).error_bound is not None
    assert fixed_point(Certified(), x0, norm_weights=(1, 2)).error_bound is None


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            {"a": 1.0},
            TypeError,
            r"in the structure of x0, a dict of \['a'\], \['b'\] \(got dict of",
        ),
        ({"a": 1.0, "b": (1, 2)}, TypeError, r"norm_weights\['b'\] must be a number > 0 \(got tup"),
        ({"a": 1.0, "b": torch.ones(())}, TypeError, r"norm_weights\['b'\] .*\(got Tensor\)"),
        ({"a": 1.0, "b": True}, TypeError, r"norm_weights\['b'\] .*\(got bool\)"),
        (
            {"a": 0, "b": 1},
            ValueError,
            r"norm_weights\['a'\] must be a finite number > 0 .*\(got 0",
        ),
        ({"a": -1.0, "b": 1}, ValueError, r"norm_weights\['a'\] .*\(got -1.0\)"),
        ({"a": float("nan"), "b": 1}, ValueError, r"norm_weights\['a'\] .*\(got nan\)"),
        ({"a": float("inf"), "b": 1}, ValueError, r"norm_weights\['a'\] .*\(got inf\)"),
        ({"a": 1e-90, "b": 1}, ValueError, r"torch.float32 holds \(got 1e-90\)"),
        (2.0, TypeError, r"numbers in the structure of x0, a dict of .* \(got float\)"),
    ],
)
def test_wrong_weights_are_named(weights, error, message):
    with raises(error, message):
        fixed_point(lambda x: x, dict.fromkeys("ab", torch.zeros(2, 3)), norm_weights=weights)


def test_one_tensor_has_no_weights():
    with raises(ValueError, r"norm_weights weigh the tensors of a state .* x0 is one tensor"):
        fixed_point(lambda x: x, torch.zeros(2, 3), norm_weights=2.0)


def test_a_layer_has_weights():
    layer = FixedPointLayer(
        lambda x, z: {"a": 0.5 * x["a"] + z, "b": 0.5 * x["b"]},
        state_shape={"a": (3,), "b": (1,)},
        norm_weights={"a": 4.0, "b": 1.0},
    )
    layer(Z)
    norms = 2 * (0.5 * layer.last.x["a"] + Z - layer.last.x["a"]).norm(dim=1)
    torch.testing.assert_close(layer.last.residual_at_x, norms)
    twin = copy.deepcopy(layer).eval()
    twin.eval_factor = 2.0
    assert twin(Z)["a"].shape == (B, 3)
