"""States of any structure, with one norm over all tensors, against loops over the structure."""

import copy
import dataclasses
import functools
import pickle
from collections import OrderedDict, deque
from typing import NamedTuple

import pytest
import torch
from helpers import unroll
from helpers_bad_input import raises
from helpers_derivatives import close, double
from helpers_layers import EXACT
from tape import captures, tape_fixture  # noqa: F401
from torch.autograd import grad

from fpi_cuda import (
    Anderson,
    FixedPointLayer,
    GradientStep,
    NeuralStep,
    Picard,
    Status,
    Tolerance,
    fixed_point,
)
from fpi_cuda.tree import flatten

pytestmark = pytest.mark.usefixtures("one_thread")

B = 3
Z, W = double(B, 3, scale=0.5), double(3, 3, seed=1, scale=0.2)


@dataclasses.dataclass
class Part:
    """Not registered with torch."""

    a: torch.Tensor
    b: torch.Tensor
    seen: int = dataclasses.field(default=0, init=False)


class Named(NamedTuple):
    u: object
    part: object


# A state of three tensors made in each structure, and these out of it.
KINDS = {
    "a tuple": (lambda u, a, b: (u, a, b), lambda x: x),
    "a dict": (lambda u, a, b: {"u": u, 7: a, "b": b}, lambda x: (x["u"], x[7], x["b"])),
    "an OrderedDict": (
        lambda u, a, b: OrderedDict(b=b, u=u, a=a),
        lambda x: (x["u"], x["a"], x["b"]),
    ),
    "a list within a dict": (
        lambda u, a, b: {"u": [u], "rest": [a, (b,)], "none": ()},
        lambda x: (x["u"][0], x["rest"][0], x["rest"][1][0]),
    ),
    "a dataclass within a named tuple": (
        lambda u, a, b: Named(u, {"part": Part(a, b)}),
        lambda x: (x.u, x.part["part"].a, x.part["part"].b),
    ),
    "a type that torch's pytree knows": (
        lambda u, a, b: deque([u, (a, b)]),
        lambda x: (x[0], *x[1]),
    ),
}
KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
NESTED = KINDS["a dataclass within a named tuple"]
DICT = KINDS["a dict"]


def start(make, b=B, dtype=torch.float64):
    return make(*(torch.zeros(b, *s, dtype=dtype) for s in ((3,), (2, 2), ())))


@functools.cache  # residual_at_x asks for the g of the solve
def step(kind):
    """g(x, z, w) that couples the three."""
    make, of = kind

    def g(x, z, w):
        u, a, b = of(x)
        return make(
            0.5 * torch.tanh(u @ w.mT + z) + 0.1 * b[:, None],
            0.3 * a.sin() + u[:, :2, None] * 0.2,
            0.2 * b + 0.3 * (a * z[:, :1, None]).sum((1, 2)),
        )

    return g


def solved(kind, z, w, **options):
    return fixed_point(step(kind), start(kind[0], len(z)), z, params=(w,), **{**EXACT, **options})


def loop(kind, z, w):
    """Unrolled."""
    return unroll(step(kind), start(kind[0], len(z)), z, w, steps=60)


def loss(kind, x):
    u, a, b = kind[1](x)
    return u.sin().sum() + (a.square() * b[:, None, None]).sum() + b.cos().sum()


def alike(mine, true):
    a, b = flatten(mine), flatten(true)
    assert [type(mine)] == [type(true)] and len(a[0]) == len(b[0])
    for t, s in zip(a[0], b[0], strict=True):
        close(t, s)


@KIND
def test_the_solution_and_its_derivatives_are_those_of_the_loop(kind):
    z, w = Z.clone().requires_grad_(), W.clone().requires_grad_()
    x, true = solved(kind, z, w).x, loop(kind, z, w)
    alike(x, true)
    for value in (x, true):
        first = grad(loss(kind, value), (z, w), create_graph=True)
        second = grad(sum(d.square().sum() for d in first), (z, w))
        found = [*first, *second]
        if value is x:
            mine = found
    for a, b in zip(mine, found, strict=True):
        close(a, b)


@pytest.mark.parametrize("kind", [NESTED, DICT], ids=["nested", "dict"])
def test_transforms_of_torch_func(kind):
    def of(solve):
        def at(z, w):
            return loss(kind, solve(kind, z, w))

        f = torch.func
        return [
            f.jacrev(f.jacrev(at))(Z, W),
            f.vmap(f.grad(at), in_dims=(0, None))(torch.stack([Z, -Z]), W),
            f.vmap(lambda z: kind[1](solve(kind, z[None], W))[1])(Z),
            f.grad(lambda w: f.grad(at, argnums=1)(Z, w).sin().sum())(W),
        ]

    for a, b in zip(of(lambda *s: solved(*s).x), of(loop), strict=True):
        close(a, b)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("solver", [Anderson(), Picard()])
def test_the_record_is_of_one_norm_over_all_tensors(solver, per_sample):
    coarse = {"tolerance": Tolerance(1e-3, 0.0), "solver": solver, "per_sample": per_sample}
    s = solved(NESTED, Z, W, **coarse)
    rows = solved_as_one_tensor(Z, W, **coarse)
    close(torch.cat([t.flatten(1) for t in leaves(s)], 1), rows.x)
    assert torch.equal(s.iterations, rows.iterations) and s.iterations.min() > 2
    for name in ("residual_norm", "error_estimate", "contraction"):
        torch.testing.assert_close(getattr(s, name), getattr(rows, name), rtol=1e-6, atol=0)
    assert s.residual_norm.shape == s.status.shape == (B,)
    pairs = zip(flatten(step(NESTED)(s.x, Z, W))[0], flatten(s.x)[0], strict=True)
    off = sum((t - x).square().reshape(B, -1).sum(1) for t, x in pairs)
    torch.testing.assert_close(s.residual_at_x, off.sqrt(), rtol=1e-6, atol=1e-12)


def leaves(s):
    """Of a solution's x, each with its samples' own dimensions."""
    return [t if t.dim() > 1 else t[:, None] for t in flatten(s.x)[0]]


def solved_as_one_tensor(z, w, scales=(1, 1, 1), **options):
    """The same by hand: x is the three side by side, each times its scale."""

    def split(x):
        u, a, b = (t / s for t, s in zip(x.split([3, 4, 1], 1), scales, strict=True))
        return u, a.view(-1, 2, 2), b[:, 0]

    def g(x, z, w):
        parts = step(KINDS["a tuple"])(split(x), z, w)
        rows = zip(parts, scales, strict=True)
        return torch.cat([t.reshape(len(x), -1) * s for t, s in rows], 1)

    return fixed_point(g, torch.zeros(len(z), 8, dtype=z.dtype), z, params=(w,), **options)


# --- weights ---------------------------------------------------------------------------------


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


# --- what else a solve does ------------------------------------------------------------------


def test_failed_samples_have_no_gradient():
    z = torch.tensor([[0.5], [30.0], [0.2]], dtype=torch.float64, requires_grad=True)

    def g(x, z):
        return {"p": Part(z * x["p"].a + 1, 0.5 * x["p"].b + x["p"].a)}

    x0 = {"p": Part(torch.zeros_like(z), torch.zeros_like(z))}
    s = fixed_point(g, x0, z, on_failure="return", **EXACT)
    assert s.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    (mine,) = grad(s.x["p"].b.sum(), z)  # b = 2 a, a = 1 / (1 - z)
    close(mine, torch.where(z < 1, 2 / (1 - z) ** 2, 0))


def test_padded_samples_stop_as_without_padding():
    def g(x, z):
        return {"u": 0.8 * torch.sin(x["u"]) + z, "v": 0.8 * torch.sin(x["v"]) + 2 * z}

    def solve(z, **options):
        x0 = {"u": torch.zeros_like(z), "v": torch.zeros_like(z)}
        tolerance = Tolerance(1e-6, 1e-4)
        return fixed_point(g, x0, z, tolerance=tolerance, solver=Picard(), **options)

    z = torch.zeros(2, 50, dtype=torch.float64)
    z[0, :2], z[1] = 0.02, 0.01
    s = solve(z, sizes=torch.tensor([4, 100]))
    assert s.iterations[0] == solve(z[:1, :2]).iterations[0] != solve(z).iterations[0]


def test_autocast_leaves_the_state_wide():
    layer = torch.nn.Linear(3, 3)
    torch.nn.init.orthogonal_(layer.weight, 0.3)
    x0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = fixed_point(lambda x: {"b": layer(x["b"]), "a": 0.5 * x["a"] + 1}, x0)
    assert {t.dtype for t in s.x.values()} == {torch.float32} and s.converged.all()


def test_the_structure_is_part_of_a_graphs_kind(tape):
    options = {"solver": Picard(), "per_sample": True, "tolerance": Tolerance(1e-9)}

    def g(x, z):
        items = {k: x[k] for k in sorted(x)} if isinstance(x, dict) else dict(enumerate(x))
        out = {k: 0.5 * t + (i + 1) * z for i, (k, t) in enumerate(items.items())}
        return out if isinstance(x, dict) else tuple(out.values())

    zeros, z = torch.zeros(4, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    of_kinds = [
        ({"a": zeros, "b": zeros}, None),
        ({"b": zeros, "a": zeros}, None),
        ((zeros, zeros), None),
        ((zeros, zeros), (4, 1)),
    ]
    for made, (x0, weights) in enumerate(of_kinds, 1):
        for factor in (1, 3):
            s = fixed_point(g, x0, factor * z, driver="graph", norm_weights=weights, **options)
            assert ", graph" in s.path
            x = [s.x[k] for k in sorted(s.x)] if isinstance(s.x, dict) else s.x
            for i, t in enumerate(x):
                torch.testing.assert_close(t, 2 * factor * (i + 1) * z, rtol=1e-7, atol=0)
        assert captures() == made


def test_a_line_names_the_tensors_and_copies_keep_the_structure():
    s = solved(DICT, Z, W)
    assert repr(s).startswith(
        "Solution(x ['u'] [3, 3] float64, [7] [3, 2, 2] float64, ['b'] [3] float64; 3 samples"
    )
    for twin in (copy.deepcopy(s.detach()), pickle.loads(pickle.dumps(s.detach()))):
        alike(twin.x, s.x)
    on_meta = fixed_point(
        step(DICT), {k: v.to("meta") for k, v in s.x.items()}, Z.to("meta"), params=(W.to("meta"),)
    )
    assert {k: t.shape for k, t in on_meta.x.items()} == {k: t.shape for k, t in s.x.items()}


def test_a_solve_keeps_no_dataclass_of_the_start_alive():
    """A field that __init__ does not set is made anew, and the fields' tensors are the state's."""
    x0 = Part(torch.zeros(2, 3), torch.zeros(2, 1))
    x0.seen = 5
    x = fixed_point(lambda x: Part(0.5 * x.a + 1, 0.5 * x.b), x0).x
    assert type(x) is Part and x.seen == 0 and x.a.shape == (2, 3)


# --- layers ----------------------------------------------------------------------------------

SHAPES = {
    "a dict": {"u": (3,), 7: [2, 2], "b": ()},
    "nested": Named(torch.Size([3]), {"part": Part((2, 2), ())}),
}


@pytest.mark.parametrize(("kind", "shape"), [(DICT, "a dict"), (NESTED, "nested")])
def test_a_layer_gives_the_structure_of_its_state_shape(kind, shape):
    g, z = step(kind), Z.clone().requires_grad_()
    layer = FixedPointLayer(lambda x, z: g(x, z, W), state_shape=SHAPES[shape], **EXACT)
    x, true = layer(z), loop(kind, z, W)
    alike(x, true)
    (first,) = grad(loss(kind, x), z, retain_graph=True)
    close(first, grad(loss(kind, true), z)[0])
    for t in kind[1](x):
        t.mul_(0.0)  # the caller's own
    alike(layer.last.x, loop(kind, Z, W))
    assert not any(t.requires_grad for t in flatten(layer.last.x)[0])
    layer(z, x0=layer.last.x)
    assert layer.last.iterations.max() == 1
    assert layer.eval()(z, tolerance=Tolerance(1e-3)) is not None
    one = torch.vmap(lambda z: kind[1](layer(z[None]))[0])(Z)
    torch.testing.assert_close(one[:, 0], kind[1](true)[0].detach(), rtol=1e-2, atol=1e-4)
    assert [t.shape[0] for t in flatten(layer.last.x)[0]] == [B] * 3


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


def test_steps_get_the_structure():
    def energy(x, z):
        return (x["p"].a - z).square().sum(1) + (x["p"].b[0] - 1).square().sum(1)

    shape = {"p": Part((3,), [(1,)])}
    x = FixedPointLayer(GradientStep(energy, 0.3), state_shape=shape, **EXACT)(Z)
    close(x["p"].a, Z)
    close(x["p"].b[0], torch.ones(B, 1, dtype=Z.dtype))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.state_shape = {"a": (3,)}

        def forward(self, x, z):
            return {"a": 0.5 * x["a"] + z}

    close(FixedPointLayer(NeuralStep(Net()), **EXACT)(Z)["a"], 2 * Z)


def test_a_state_shape_of_a_structure_that_holds_the_batch_is_named():
    layer = FixedPointLayer(
        lambda x, z: {"a": 0.5 * x["a"] + z}, state_shape={"a": (B, 3)}, per_sample=True
    )
    with raises(ValueError, r"state_shape must be the shape of one sample's state.*\{'a': \(3, 3"):
        layer(Z)
    for wrong in ({"a": 3}, {"a": (3.0,)}, {}, (3, (2,))):
        layer.state_shape = wrong
        with raises(
            TypeError, r"state_shape must be the shape of one sample's state, or a tuple, "
        ):
            layer(Z)


# --- errors ----------------------------------------------------------------------------------

X0 = {"a": torch.zeros(2, 3), "b": [torch.zeros(2, 2), torch.zeros(2)]}


@pytest.mark.parametrize(
    ("g", "error", "message"),
    [
        (lambda x: x["a"], TypeError, r"return a dict of \['a'\], \['b'\] like x0 \(got Tensor\)"),
        (lambda x: {"a": x["a"], "c": 1}, TypeError, r"like x0 \(got dict of \['a'\], \['c'\]\)"),
        (lambda x: {**x, "b": x["a"]}, TypeError, r"return a list of 2 tensors like x0 at \['b'\]"),
        (lambda x: {**x, "b": x["b"][:1]}, TypeError, r"at \['b'\] \(got 1 items\)"),
        (lambda x: {**x, "b": [x["b"][0], 0.0]}, TypeError, r"\(got float at \['b'\]\[1\]\)"),
        (
            lambda x: {**x, "a": x["a"][:, :1]},
            ValueError,
            r"shape \[B, 3\] at \['a'\] \(got \(2, 1",
        ),
        (
            lambda x: {**x, "b": [x["b"][0], x["b"][1][0]]},
            ValueError,
            r"\[B\] at \['b'\]\[1\] \(got",
        ),
        (
            lambda x: {**x, "a": x["a"].double()},
            TypeError,
            r"float32, at \['a'\] \(got torch.float64",
        ),
        (
            lambda x: {**x, "a": x["a"] + 0j},
            TypeError,
            r"\['a'\] .*complex64\); take its real part",
        ),
        (lambda x: {**x, "a": x["a"][:1]}, ValueError, r"got 1 at \['a'\] and 2 at \['b'\]\[0\]"),
    ],
)
def test_a_value_of_another_structure_is_named_by_its_place(g, error, message):
    with raises(error, message):
        fixed_point(g, X0)


def test_another_named_tuple_or_dataclass_is_another_structure():
    class Other(NamedTuple):
        part: object
        u: object

    a, b = torch.zeros(2, 3), torch.zeros(2, 3)
    with raises(TypeError, r"return a Named of \.u, \.part like x0 \(got Other\)"):
        fixed_point(lambda x: Other(x.part, x.u), Named(a, b))
    with raises(TypeError, r"return a Part of \.a, \.b like x0 \(got tuple\)"):
        fixed_point(lambda x: (x.a, x.b), Part(a, b))
    assert type(fixed_point(lambda x: [x.u * 0.5, x.part], Named(a, b)).x) is Named


@pytest.mark.parametrize(
    ("x0", "error", "message"),
    [
        ({}, ValueError, r"at least one tensor \(got an empty dict\)"),
        ({"a": [()]}, ValueError, r"at least one tensor"),
        (Part(X0["a"], None), TypeError, r"x0\.b must be a tensor \(got NoneType\)"),
        ({"u": [X0["a"], "x"]}, TypeError, r"x0\['u'\]\[1\] must be a tensor \(got str\)"),
        (
            {"u": (X0["a"], X0["a"].double())},
            ValueError,
            r"x0\['u'\]\[1\] must have the dtype of x0",
        ),
        (
            {"u": X0["a"], "v": X0["a"].cdouble()},
            ValueError,
            r"x0\['v'\] .*float32, or be complex of",
        ),
        (
            {"u": X0["a"], "v": X0["a"][:1]},
            ValueError,
            r"x0\['v'\] must have the batch size of x0\[",
        ),
        ({X0["a"]}, TypeError, r"tuple, list, dict or dataclass of tensors \(got set\)"),
    ],
)
def test_a_start_that_is_no_state_is_named_by_its_place(x0, error, message):
    with raises(error, message):
        fixed_point(lambda x: x, x0)
