"""Forward mode of a solve, of any order and any mix with reverse, against deep unrolling."""

import pytest
import torch
from helpers import SOLVERS, Counter, assert_close, contraction
from helpers_derivatives import double, scalar_g, tight
from helpers_forward import (
    FEW,
    FEWEST,
    NESTINGS,
    direction,
    dual,
    joined,
    near,
    nested,
    tangent_of,
)
from helpers_forward_problems import Shifted, looped, opaque, problem, solved, truth
from tape import tape_fixture  # noqa: F401
from torch.autograd import forward_ad
from torch.func import functional_call, jacfwd, jacrev, jvp, vmap

from fpi_cuda import Anderson, FixedPointLayer, Picard, fixed_point
from fpi_cuda.solve import node

pytestmark = pytest.mark.usefixtures("one_thread")
NATIVE = tight("native", Anderson())
W, Z = contraction(3, 0.3), double(2, 3)


def check(name, nesting, options):
    solved, _, z, w = problem(name)
    near(nested(nesting, solved(options))(z, w), truth(name, nesting))


# --- nestings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_nesting_equals_that_of_the_plain_loop(nesting):
    check("opaque", nesting, NATIVE)


@pytest.mark.parametrize("nesting", FEW)
@pytest.mark.parametrize(
    ("backend", "solver"),
    [("native", "picard"), ("reference", "picard"), ("reference", "anderson")],
)
def test_with_each_solver_of_each_backend(nesting, backend, solver):
    check("opaque", nesting, tight(backend, SOLVERS[solver]))


@pytest.mark.parametrize("nesting", FEW)
@pytest.mark.parametrize("name", ["reverse only", "module", "energy"])
def test_of_functions_with_reverse_formulas_alone_of_modules_and_of_energies(name, nesting):
    """P, which is in an energy's gradient, is nested in the solve's own derivatives."""
    check(name, nesting, NATIVE)


@pytest.mark.parametrize("nesting", FEWEST)
@pytest.mark.parametrize("name", ["tuple", "one system", "one dense layer", "two dense layers"])
def test_of_tuples_of_one_system_and_of_dense_layers(name, nesting):
    check(name, nesting, NATIVE)


@pytest.mark.parametrize("nesting", ["jvp", "jvp_other jvp", "jvp grad_w", "dual", "vmap jvp"])
@pytest.mark.parametrize("name", ["dense energy", "convolutions"])
def test_of_an_energy_of_dense_layers_and_of_convolutions(name, nesting):
    check(name, nesting, NATIVE)


@pytest.mark.parametrize("name", ["one dense layer", "two dense layers", "dense energy"])
def test_of_a_solve_by_one_kernel(name):
    check(name, "dual", NATIVE | {"driver": "whole", "solver": Picard()})
    check(name, "dual_backward", NATIVE | {"driver": "whole"})


@pytest.mark.parametrize("nesting", FEWEST)
def test_of_a_linear_map_whose_derivatives_have_closed_forms(nesting):
    check("linear", nesting, NATIVE)
    if nesting == "jvp_other jvp":  # x̂ is linear in z
        second = nested("jvp_z jvp_z", problem("linear").solved(NATIVE))(Z, W)
        near(second, torch.zeros_like(Z))


@pytest.mark.parametrize("nesting", ["dual", "dual_backward", "backward_dual", "dual_cotangent"])
def test_of_a_captured_graph(nesting, tape):
    check("opaque", nesting, NATIVE | {"driver": "graph", "per_sample": True})


def test_the_scalar_map_has_three_derivatives_in_closed_form():
    def f(a):
        return fixed_point(scalar_g, torch.zeros(1, 1, dtype=a.dtype), a[None, None], **NATIVE).x

    def along(f):
        return lambda a: jvp(f, (a,), (torch.ones_like(a),))[1]

    a = torch.tensor(0.7, dtype=torch.float64)
    found = [along(f), along(along(f)), along(along(along(f))), jacfwd(jacrev(jacfwd(f)))]
    expected = [0.3731672498812, -0.9320715913638, 2.7626714503983, 2.7626714503983]
    for derivative, value in zip(found, expected, strict=True):
        assert abs(derivative(a).item() - value) < 1e-8


# --- what is followed --------------------------------------------------------------------------


def test_x0_has_no_part_in_any_derivative():
    def f(x0, z):
        return fixed_point(opaque, x0, z, params=(W,), **NATIVE).x

    x0 = 0.1 * direction(Z)
    for nesting in ("jvp_z", "jvp_z jvp_z", "vmap_z jvp_z"):
        found = nested(nesting, f)(x0, Z)
        near(found, torch.zeros_like(found))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(dual(x0), Z)).tangent
        assert tangent is None or not tangent.any()
    near(nested("jvp jvp", f)(x0, Z), nested("jvp_z jvp_z", looped(opaque))(Z, W))


def test_a_solution_that_is_an_input_or_a_constant_has_right_tangents():
    def of(g, z):
        return fixed_point(g, torch.zeros_like(z), z, **NATIVE).x

    def sinus(z):
        return of(lambda x, z: z, z).sin()

    dz = direction(Z)
    near(jvp(sinus, (Z,), (dz,))[1], Z.cos() * dz)
    twice = jvp(lambda z: jvp(sinus, (z,), (dz,))[1], (Z,), (dz,))[1]
    near(twice, -Z.sin() * dz * dz)
    with forward_ad.dual_level():
        x = of(lambda x, z: z, dual(Z))
        near(tangent_of(x), dz)
    still = jvp(lambda z: of(lambda x, z: 0.5 * x + 1, z), (Z,), (dz,))[1]
    near(still, torch.zeros_like(Z))
    constants = jvp(lambda z: of(lambda x, z: torch.ones_like(x), z), (Z,), (dz,))[1]
    near(constants, torch.zeros_like(Z))


def test_integer_inputs_and_params_ride_along():
    index, rates = torch.tensor([2, 0]), torch.tensor([1, 2, 3])

    def g(x, z, index, w, rates):
        return torch.tanh(x @ w.mT + z) * (1 + index[:, None]) / (3 * rates)

    def f(z, w):
        return fixed_point(g, torch.zeros_like(z), z, index, params=(w, rates), **NATIVE).x

    true = looped(lambda x, z, w: g(x, z, index, w, rates))
    for nesting in ("jvp", "jvp jvp", "hessian", "vmap jvp", "dual", "dual_backward"):
        near(nested(nesting, f)(Z, W), nested(nesting, true)(Z, W))


def test_tensors_in_keywords_have_tangents_too():
    def f(z, w):
        layer = FixedPointLayer(lambda x, z, *, w: opaque(x, z, w["w"]), **NATIVE)
        return layer(z, w={"w": w})

    for nesting in ("jvp", "jvp jvp", "grad_w jvp", "dual"):
        near(nested(nesting, f)(Z, W), truth("opaque", nesting))


def test_a_modules_parameters_given_as_dual_tensors():
    step, z = Shifted(), Z
    layer = FixedPointLayer(step, **NATIVE)
    tensors = {**dict(layer.named_parameters()), "g.shift": step.shift}
    with forward_ad.dual_level():
        duals = {name: dual(t.detach()) for name, t in tensors.items()}
        found = tangent_of(functional_call(layer, duals, (z,)))
    near(found, jvp_of_module(step, {name: direction(t) for name, t in tensors.items()}))


def jvp_of_module(step, tangents):
    """Of the plain loop, by the tangent of each parameter and buffer."""
    values = {k.removeprefix("g."): t for k, t in tangents.items()}
    primals = {k: step.get_parameter(k) if k != "shift" else step.shift for k in values}

    def loop(tensors):
        x = torch.zeros_like(Z)
        for _ in range(40):
            x = functional_call(step, tensors, (x, Z))
        return x

    return jvp(loop, ({k: t.detach() for k, t in primals.items()},), (values,))[1]


def test_parameters_that_need_gradients_beside_a_tangent_of_z():
    """The tangent's gradient reaches parameters that no level of forward mode follows."""
    layer = FixedPointLayer(Shifted(), **NATIVE)
    wanted = list(layer.parameters())

    def slow(z):
        x = torch.zeros_like(z)
        for _ in range(40):
            x = layer.g(x, z)
        return x

    def mixed(f):
        with forward_ad.dual_level():
            tangent = tangent_of(f(dual(Z)))
            return joined(torch.autograd.grad(tangent.sin().sum(), wanted))

    near(mixed(layer), mixed(slow))
    with torch.no_grad(), forward_ad.dual_level():
        assert not tangent_of(layer(dual(Z))).requires_grad


def test_a_padded_batch_has_the_tangents_of_its_samples_alone():
    sizes, dz = torch.tensor([3, 2]), direction(Z)
    kept = (torch.arange(3) < sizes[:, None]).double()

    def f(z, w):
        g = lambda x, z, kept, w: kept * opaque(x, z, w)  # noqa: E731
        return fixed_point(g, torch.zeros_like(z), z, kept, params=(w,), sizes=sizes, **NATIVE).x

    for nesting in ("jvp", "jvp_other jvp", "dual"):
        found = nested(nesting, f)(Z, W)
        near(found, nested(nesting, looped(lambda x, z, w: kept * opaque(x, z, w)))(Z, W))
    assert dz[1, 2] != 0
    assert found[1, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tangents_have_the_dtype_of_the_solve(dtype):
    z, w = Z.to(dtype), W.to(dtype)
    for nesting in ("jvp", "jvp_other jvp", "dual"):
        found = nested(nesting, solved(opaque)({"backend": "native"}))(z, w)
        assert found.dtype == dtype
        near(found.double(), truth("opaque", nesting), 1e-3 if dtype == torch.float32 else 0.1)


def test_an_operator_whose_forward_mode_torch_nests_wrongly_is_right_in_g():
    """g is differentiated by its reverse formulas alone: linalg.solve's are right, at any order."""

    def g(x, z, w):
        mixed = torch.linalg.solve(torch.eye(3, dtype=w.dtype) + 0.3 * w, x.mT).mT
        return 0.2 * mixed + z.sin() * w[0]

    f, slow = solved(g)(NATIVE), looped(g)
    for i, j in ((0, 0), (0, 1), (1, 1)):
        found = jacfwd(jacfwd(f, i), j)(Z, W)
        near(found, jacrev(jacrev(slow, i), j)(Z, W))


def test_slices_of_tangents_stop_at_their_own_end():
    """One tangent is a million times the other: the tolerance is relative to each."""
    f = solved(opaque)(NATIVE | {"solver": Picard()})
    scales = torch.tensor([1.0, 1e-6, 0.0], dtype=torch.float64)
    found = vmap(lambda s: jvp(f, (Z, W), (s * direction(Z), s * direction(W)))[1])(scales)
    for scale, tangent in zip(scales, found, strict=True):
        near(tangent / max(scale.item(), 1e-6), truth("opaque", "jvp") * (scale > 0))


# --- calls of g and solves ---------------------------------------------------------------------

# More calls of g than the plain solve's 21: one to see what g captures, for each tangent one by P,
# one to linearise g, and one more where finished samples are left out.
CALLS = {
    "jvp": 4,
    "jacfwd_w": 3,
    "dual": 4,
    "tangents": 3,
    "jvp jvp": 11,
    "hessian": 8,
    "grad_w jvp": 11,
    "jvp jvp jvp": 27,
}
SOLVES = {"jvp": 2, "jacfwd_w": 2, "dual": 2, "jvp jvp": 4, "hessian": 4, "jvp jvp jvp": 8}


@pytest.mark.parametrize("nesting", CALLS)
def test_derivatives_call_g_few_times_more_than_the_solve(nesting):
    g = Counter(opaque)
    f = solved(g)(tight("native", Picard()) | {"per_sample": True})
    w = contraction(3, 0.7)
    f(Z, w)
    plain, g.calls = g.calls, 0
    nested(nesting, f)(Z, w)
    assert plain >= 20
    assert g.calls == plain + CALLS[nesting]


@pytest.mark.parametrize("nesting", SOLVES)
def test_tangents_cost_one_solve_each(nesting, monkeypatch):
    solves = Counter(node.solve)
    monkeypatch.setattr(node, "solve", solves)
    nested(nesting, solved(opaque)(NATIVE | {"per_sample": True}))(Z, W)
    assert solves.calls == SOLVES[nesting]


def test_a_solve_in_a_level_that_nothing_is_followed_by_has_no_second_solve(monkeypatch):
    solves = Counter(node.solve)
    monkeypatch.setattr(node, "solve", solves)
    f = solved(opaque)(NATIVE | {"per_sample": True})
    with forward_ad.dual_level():
        x = f(Z, W)
        assert forward_ad.unpack_dual(x).tangent is None
    jvp(lambda t: t + f(Z, W), (Z,), (Z,))
    assert solves.calls == 2
    assert_close(x, looped(opaque)(Z, W))
