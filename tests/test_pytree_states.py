"""States of any structure, with one norm over all tensors, against loops over the structure."""

import copy
import dataclasses
import gc
import pickle
import weakref
from typing import NamedTuple

import pytest
import torch
from helpers_bad_input import raises
from helpers_derivatives import close
from helpers_layers import EXACT
from helpers_states import (
    DICT,
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
from tape import captures, tape_fixture  # noqa: F401
from torch.autograd import grad

from fpi_cuda import (
    Anderson,
    FixedPointError,
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

KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


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


# --- what else a solve does ------------------------------------------------------------------


def test_failed_samples_have_no_gradient():
    z = torch.tensor([[0.5], [30.0], [0.2]], dtype=torch.float64, requires_grad=True)

    def g(x, z):
        return {"p": Part(z * x["p"].a + 1, 0.5 * x["p"].b + x["p"].a)}

    x0 = {"p": Part(torch.zeros_like(z), torch.zeros_like(z))}
    s = fixed_point(g, x0, z, solver=Picard(), on_failure="return", **EXACT)
    assert s.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    (mine,) = grad(s.x["p"].b.sum(), z)  # b = 2 a, a = 1 / (1 - z)
    close(mine, torch.where(z < 1, 2 / (1 - z) ** 2, 0))


def test_an_error_under_vmap_has_the_state_mapped():
    def solve(z):
        start = {"p": Part(torch.zeros_like(z), z.new_zeros(len(z)))}
        g = lambda x, z: {"p": Part(2 * x["p"].a + z, x["p"].b + 1)}  # noqa: E731
        return fixed_point(g, start, z, max_iterations=3, on_failure="raise").x["p"].b

    with pytest.raises(FixedPointError, match=f"{2 * B} of {2 * B} samples") as raised:
        torch.vmap(solve)(torch.stack([Z, Z.sin()]))
    part = raised.value.solution.x["p"]
    assert type(part) is Part
    assert part.a.shape == (2, B, 3)
    assert part.b.shape == (2, B)


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


def test_a_dataclass_is_made_anew_and_the_first_one_is_not_kept():
    x0, given = Part(torch.zeros(2, 3), torch.zeros(2, 1, requires_grad=True)), []

    def g(x, z):
        given.append(weakref.ref(x.a))
        return Part(0.5 * x.a + z, 0.5 * x.b)

    x0.seen, held = 5, weakref.ref(x0.a)
    gc.disable()
    try:
        s = fixed_point(g, x0, torch.ones(2, 1, requires_grad=True))
        assert type(s.x) is Part and s.x.seen == 0  # a field that __init__ does not take
        del x0
        assert held() is None and s.x.a.shape == (2, 3)  # no circle waits for the collector
        assert [r() is None for r in given].count(False) <= 1
    finally:
        gc.enable()


def test_a_dataclass_that_torch_knows_goes_through_its_transforms():
    @dataclasses.dataclass
    class Known:
        a: torch.Tensor
        b: torch.Tensor

    torch.utils._pytree.register_dataclass(Known)

    def g(x, z):
        return Known(0.5 * x.a + z, 0.5 * x.b)

    x0 = Known(torch.zeros(1, 3, dtype=Z.dtype), torch.zeros(1, dtype=Z.dtype))
    x = torch.vmap(lambda z: fixed_point(g, x0, z[None], **EXACT).x)(Z)
    assert type(x) is Known
    close(x.a[:, 0], 2 * Z)
    with raises(TypeError, r"return a Known of \.a, \.b like x0 \(got tuple\)"):
        fixed_point(lambda x: (x.a, x.b), x0)


def test_a_dataclass_that_its_fields_do_not_make_says_so():
    @dataclasses.dataclass
    class Odd:
        a: torch.Tensor
        scale: dataclasses.InitVar[int]

    with raises(TypeError, "scale") as caught:
        fixed_point(lambda x: x, Odd(torch.zeros(2, 3), 3))
    assert "made anew by its fields" in caught.value.__notes__[0]


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


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of objects with tensors
def test_a_compiled_layer_is_attached_where_the_compiler_does_not_know_the_state():
    def g(x, z):
        p = x["p"]
        return {"u": 0.5 * torch.tanh(x["u"]) + z, "p": Part(0.5 * p.a + x["u"][:, :2], 0.2 * p.b)}

    layer = FixedPointLayer(g, state_shape={"u": (3,), "p": Part((2,), ())}, **EXACT)

    def loss(z):
        x = layer(z)
        return x["u"].sin().sum() + x["p"].a.cos().sum()

    mine, true = (Z.clone().requires_grad_() for _ in range(2))
    torch.compile(loss, backend="eager")(mine).backward()
    loss(true).backward()
    close(mine.grad, true.grad)
    assert not layer.last.x["u"].requires_grad


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
        (lambda x: {**x, "a": x["a"].to("meta")}, ValueError, r"got meta at \['a'\] and cpu at"),
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
        ({"u": torch.tensor(1.0)}, ValueError, r"write x0\['u'\]\.reshape\(1, 1\)"),
        ({X0["a"]}, TypeError, r"tuple, list, dict or dataclass of tensors \(got set\)"),
    ],
)
def test_a_start_that_is_no_state_is_named_by_its_place(x0, error, message):
    with raises(error, message):
        fixed_point(lambda x: x, x0)
