"""Gradients that cost less than the exact one: what each is, to what it tends, where it is none."""

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, contraction, unroll
from torch.autograd import grad

from fpi_cuda import (
    Anderson,
    ImplicitAdjoint,
    Neumann,
    OneStep,
    Phantom,
    Picard,
    Status,
    Tolerance,
    Truncated,
    Unrolled,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
W = contraction(5, 0.6, seed=3)
Z = torch.linspace(-1, 1, 20, dtype=F64).view(4, 5)
V = torch.linspace(1, -2, 20, dtype=F64).view(4, 5)
EVERY = [
    OneStep(),
    Neumann(2),
    Truncated(2),
    Truncated(2, Picard(), Tolerance(0, 0)),
    Unrolled(2),
    Phantom(3, 0.5),
]
RECORDED = [Unrolled(2), Phantom(3, 0.5)]
every = pytest.mark.parametrize("adjoint", EVERY, ids=lambda a: type(a).__name__)
recorded = pytest.mark.parametrize("adjoint", RECORDED, ids=lambda a: type(a).__name__)


def g(x, z, w):
    return torch.tanh(x @ w.mT + z)


def solve(adjoint, z, w, **options):
    given = {"tolerance": TIGHT, "per_sample": True, **options}
    return fixed_point(g, torch.zeros_like(z), z, params=(w,), adjoint=adjoint, **given)


def leaves():
    return Z.clone().requires_grad_(), W.clone().requires_grad_()


def gradients(adjoint, v=V, **options):
    z, w = leaves()
    s = solve(adjoint, z, w, **options)
    return s, grad(s.x, (z, w), v)


def by_hand(series, v=V):
    """The gradients by z and W for c = series(J, v), of each sample, at the fixed point."""
    z, w = leaves()
    with torch.no_grad():
        x = solve(ImplicitAdjoint(), z, w).x
    slope = 1 - x * x
    c = torch.stack([series(s[:, None] * W, r) for s, r in zip(slope, v, strict=True)])
    return grad(g(x, z, w), (z, w), c)


def power_sum(j, v, k):
    """Σ_{i ≤ k} (Jᵀ)ⁱ v."""
    total = v
    for _ in range(k):
        total = j.mT @ total + v
    return total


def close(found, expected, rtol=1e-10):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("driver", ["auto", "eager"])
@pytest.mark.parametrize(
    "adjoint", [OneStep(), Neumann(0), Truncated(0), ImplicitAdjoint(max_iterations=0)]
)
def test_one_step_takes_v_for_c(adjoint, driver, recwarn):
    s, found = gradients(adjoint, driver=driver)
    close(found, by_hand(lambda j, v: v))
    assert s.adjoint.iterations.tolist() == [0] * 4
    assert s.adjoint.evaluations == 1
    assert not recwarn.list


@pytest.mark.parametrize("k", [1, 2, 5])
def test_neumanns_sum_has_so_many_products(k, recwarn):
    s, found = gradients(Neumann(k))
    close(found, by_hand(lambda j, v: power_sum(j, v, k)))
    assert s.adjoint.iterations.tolist() == [k] * 4
    assert not recwarn.list


def test_a_damped_neumann_sum_is_the_one_it_says():
    def series(j, v):
        m = 0.6 * j.mT + 0.4 * torch.eye(5, dtype=F64)
        u = 0.6 * (v + m @ v + m @ m @ v) + m @ m @ m @ v
        return v + j.mT @ u

    _, found = gradients(Neumann(4, 0.6))
    close(found, by_hand(series))


@pytest.mark.parametrize("create_graph", [False, True], ids=["first order", "any order"])
def test_a_truncated_adjoint_ends_after_k_products_or_at_its_tolerance(create_graph, recwarn):
    v = V * torch.tensor([[1.0], [0], [1], [1]], dtype=F64)
    z, w = leaves()
    own = torch.tensor([0.9, 0.9, 1e-9, 0.9])
    for adjoint, counts in (
        (Truncated(3), [3, 0, 3, 3]),
        (Truncated(3, tolerance=Tolerance(0.9)), [1, 0, 1, 1]),
        (Truncated(3, tolerance=Tolerance(own)), [1, 0, 3, 1]),
        (Truncated(200, tolerance=Tolerance(1e-9)), None),
    ):
        s = solve(adjoint, z, w, on_failure="raise")
        found = grad(s.x, (z, w), v, create_graph=create_graph)
        if counts:
            assert s.adjoint.iterations.tolist() == counts
            assert not s.adjoint.wanting.any()
    close(found, gradients(TIGHT_ADJOINT, v)[1], 1e-7)
    assert s.adjoint.converged.all()
    assert not recwarn.list


def test_a_truncated_adjoint_is_nearer_than_neumanns_at_equal_cost():
    _, exact = gradients(TIGHT_ADJOINT)
    (_, ours), (_, series) = (gradients(a) for a in (Truncated(5, Anderson()), Neumann(5)))
    assert (ours[1] - exact[1]).norm() < 0.5 * (series[1] - exact[1]).norm()


@pytest.mark.parametrize(
    "adjoint",
    [
        Neumann(80),
        Neumann(150, 0.5),
        Truncated(80, tolerance=Tolerance(1e-13)),
        Unrolled(80),
        Phantom(150, 0.5),
    ],
    ids=repr,
)
def test_many_steps_are_the_implicit_gradient(adjoint):
    s, found = gradients(adjoint)
    close(found, gradients(TIGHT_ADJOINT)[1])
    torch.testing.assert_close(s.x, solve(TIGHT_ADJOINT, Z, W).x, rtol=1e-11, atol=1e-11)


def test_neumann_is_unrolled_without_its_memory():
    close(gradients(Neumann(3))[1], gradients(Unrolled(4))[1])


@pytest.mark.parametrize("k, tau", [(1, 1.0), (1, 0.3), (5, 0.5)])
def test_phantom_is_torchdeqs(k, tau):
    """Of a loose solve too, whose x̂ is where the steps begin."""
    loose = {"tolerance": Tolerance(1e-2), "solver": Picard()}
    z, w = leaves()
    s = solve(Phantom(k, tau), z, w, **loose)
    x = solve(ImplicitAdjoint(), Z, W, **loose).x
    for _ in range(k):
        x = tau * g(x, z, w) + (1 - tau) * x
    torch.testing.assert_close(s.x, x, rtol=1e-15, atol=0)
    close(grad(s.x, (z, w), V), grad(x, (z, w), V), 1e-14)
    if tau == 1:
        assert torch.equal(solve(Unrolled(k), Z.clone().requires_grad_(), W, **loose).x, s.x)


@recorded
def test_recorded_steps_have_their_own_derivatives_of_every_order(adjoint):
    z, w = leaves()

    def f(z, w):
        return solve(adjoint, z, w).x

    x = solve(ImplicitAdjoint(), Z, W).x
    steps, tau = (2, 1.0) if isinstance(adjoint, Unrolled) else (3, 0.5)

    def hand(z, w):
        return unroll(lambda x: tau * g(x, z, w) + (1 - tau) * x, x, steps=steps)

    def second(f):
        first = grad(f(z, w).sin().sum(), (z, w), create_graph=True)
        return grad(sum(t.square().sum() for t in first), (z, w))

    close(second(f), second(hand), 1e-12)
    tangents = torch.func.jvp(f, (Z, W), (V, W))[1]
    close([tangents], [torch.func.jvp(hand, (Z, W), (V, W))[1]], 1e-12)
    of_loss = [lambda z, f=f: f(z, W).sin().sum() for f in (f, hand)]
    close(*([torch.func.hessian(loss)(Z)] for loss in of_loss), 1e-12)
    mapped = [torch.vmap(torch.func.grad(lambda z, f=f: f(z, W).sin().sum())) for f in (f, hand)]
    zs = Z.expand(2, 4, 5)
    x = x.detach()
    close(*([m(zs)] for m in mapped), 1e-12)


@pytest.mark.parametrize("adjoint", [OneStep(), Neumann(1), Neumann(3), Truncated(2, Picard())])
def test_second_derivatives_and_tangents_cut_every_solve(adjoint):
    """Of x = g(x, z), one number: x′ = S g_z, x″ = S (g_zz + 2 g_xz x′ + g_xx x′²)."""
    k = adjoint._solves()[2]
    z = torch.tensor([[0.4]], dtype=F64, requires_grad=True)

    def g(x, z):
        return torch.sin(0.7 * x + z) * z

    def f(z):
        x0 = torch.zeros(1, 1, dtype=F64)
        return fixed_point(g, x0, z, adjoint=adjoint, tolerance=TIGHT, per_sample=True).x

    (first,) = grad(f(z).sum(), z, create_graph=True)
    (second,) = grad(first.sum(), z)
    x = f(z).item(), z.item()
    scalars = [torch.tensor(v, dtype=F64) for v in x]
    (g_x, g_z), ((g_xx, g_xz), (_, g_zz)) = (
        of(g, tuple(scalars)) for of in (torch.autograd.functional.jacobian, hessian)
    )
    s = sum(g_x**i for i in range(k + 1))
    d = s * g_z
    torch.testing.assert_close(first.reshape(()), d, rtol=1e-10, atol=0)
    expected = s * (g_zz + 2 * g_xz * d + g_xx * d * d)
    torch.testing.assert_close(second.reshape(()), expected, rtol=1e-10, atol=0)
    one = torch.ones_like(z)
    tangent = torch.func.jvp(f, (z.detach(),), (one,))[1]
    torch.testing.assert_close(tangent.reshape(()), d, rtol=1e-10, atol=0)
    both = torch.func.hessian(lambda z: f(z).sum())(z.detach())
    torch.testing.assert_close(both.reshape(()), expected, rtol=1e-10, atol=0)


def hessian(g, at):
    return torch.autograd.functional.hessian(g, at)


def failing(x, z, w):
    """Sample 1 has no square root, sample 2 runs away."""
    return torch.tanh(x @ w.mT) + torch.sqrt(z) + torch.where(z > 50, 3 * x, 0)


BAD = torch.tensor([[0.5] * 5, [-1.0] * 5, [100.0] * 5, [0.2] * 5], dtype=F64)


@every
@pytest.mark.filterwarnings("ignore:fpi_cuda. g can't be given a part of the batch")
@pytest.mark.parametrize("captured", [False, True], ids=["given", "captured"])
def test_failed_samples_have_no_gradient_and_spoil_none(adjoint, captured):
    def of(z, keep=slice(None)):
        z, w, own = z.clone().requires_grad_(), W.clone().requires_grad_(), BAD.clone()
        own = own[keep].requires_grad_()

        def of_captured(x, z, w):
            return failing(x, own if captured else z, w)

        given = {"per_sample": "auto" if captured else True, "solver": Picard()}
        given["on_failure"] = "return"
        x0 = torch.zeros_like(z)
        s = fixed_point(of_captured, x0, z, params=(w,), adjoint=adjoint, tolerance=TIGHT, **given)
        rows = own if captured else z
        return s, grad(s.x, (rows, w), V[keep].clone())

    s, (for_z, for_w) = of(BAD)
    assert s.status.tolist() == [0, Status.NONFINITE, Status.DIVERGED, 0]
    good = torch.tensor([0, 3])
    _, (of_good, w_of_good) = of(BAD[good], good)
    assert for_z[1:3].abs().max() == 0
    close((for_z[good], for_w), (of_good, w_of_good), 1e-12)


@every
def test_a_batch_of_failures_alone_has_zeros(adjoint):
    z, w = BAD[1:2].clone().requires_grad_(), W.clone().requires_grad_()
    given = {"tolerance": TIGHT, "on_failure": "return", "per_sample": True}
    s = fixed_point(failing, torch.zeros_like(z), z, params=(w,), adjoint=adjoint, **given)
    assert [t.abs().max().item() for t in grad(s.x.nan_to_num().sum(), (z, w))] == [0, 0]


@every
def test_that_holds_where_g_captures_what_needs_gradients(adjoint):
    w = W.clone().requires_grad_()
    s = fixed_point(
        lambda x, z: failing(x, z, w),
        torch.zeros(1, 5, dtype=F64),
        BAD[1:2],
        adjoint=adjoint,
        tolerance=TIGHT,
        on_failure="return",
    )
    s.x.nan_to_num().sum().backward()
    assert w.grad is None or w.grad.abs().max() == 0


@recorded
def test_use_lets_failed_samples_make_the_steps(adjoint):
    z, w = BAD.clone().requires_grad_(), W.clone().requires_grad_()
    used = type(adjoint)(*list(vars(adjoint).values())[:-1], failed="use")
    given = {"tolerance": TIGHT, "on_failure": "return", "per_sample": True}
    s = fixed_point(failing, torch.zeros_like(z), z, params=(w,), adjoint=used, **given)
    (of_w,) = grad(s.x[0].sum() + s.x[1].nan_to_num().sum(), w)
    assert of_w.isnan().any()


@recorded
def test_failures_of_mapped_slices_spoil_none(adjoint):
    zs = torch.stack((BAD, BAD[[0, 3, 3, 0]], BAD[[1, 1, 1, 1]]))
    given = {"tolerance": TIGHT, "on_failure": "return", "per_sample": True, "solver": Picard()}

    def loss(z, w):
        s = fixed_point(failing, torch.zeros_like(z), z, params=(w,), adjoint=adjoint, **given)
        return s.x.nan_to_num(0, 0, 0).sum()

    of_z, of_w = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(zs, W)
    good, wanted = of_z[1], torch.func.grad(loss, argnums=(0, 1))(zs[1], W)
    close((good, of_w[1]), wanted, 1e-12)
    assert of_z[2].abs().max() == of_w[2].abs().max() == of_z[0, 1:3].abs().max() == 0
    close([of_w[0]], [torch.func.grad(loss, argnums=1)(BAD[[0, 3]], W)], 1e-12)


@every
def test_a_captured_tensor_gets_the_gradient_that_an_argument_gets(adjoint):
    w = W.clone().requires_grad_()
    s = fixed_point(
        lambda x, z: g(x, z, w), torch.zeros_like(Z), Z, adjoint=adjoint, tolerance=TIGHT
    )
    close(grad(s.x, w, V), gradients(adjoint)[1][1:], 1e-9)


@recorded
def test_steps_are_made_where_a_derivative_is_asked_for(adjoint):
    exact = ImplicitAdjoint()
    loose = {"tolerance": Tolerance(0.1), "solver": Picard()}
    with torch.no_grad():
        assert torch.equal(solve(adjoint, *leaves(), **loose).x, solve(exact, Z, W, **loose).x)
    assert torch.equal(solve(adjoint, Z, W, **loose).x, solve(exact, Z, W, **loose).x)
    s, plain = solve(adjoint, *leaves(), **loose), solve(exact, Z, W, **loose)
    assert not torch.equal(s.x, plain.x)
    assert s.evaluations == plain.evaluations + adjoint._steps()[0]


@every
def test_states_of_any_kind(adjoint):
    """Packed, weighted and complex; one system."""
    z, w = leaves()

    def of(x, z, w):
        y = torch.tanh((x["b"].real @ w.mT) * 0.9 + z)
        return {"a": y[:, :2] + 0.1 * x["a"], "b": torch.complex(y, 0.2 * x["b"].imag + z)}

    x0 = {"a": torch.zeros(4, 2, dtype=F64), "b": torch.zeros(4, 5, dtype=torch.complex128)}

    def loss(x):
        return x["a"].sin().sum() + (x["b"] * x["b"]).real.sum()

    def found(adjoint, **options):
        given = {"adjoint": adjoint, "tolerance": TIGHT, **options}
        return grad(loss(fixed_point(of, x0, z, params=(w,), **given).x), (z, w))

    weights = {"a": 4.0, "b": 0.25}
    # What Anderson truncates depends on the norm; a polynomial of the Jacobian does not.
    if not (isinstance(adjoint, Truncated) and adjoint.solver is None):
        close(found(adjoint, norm_weights=weights), found(adjoint), 1e-9)
        close(found(adjoint, per_sample=False), found(adjoint), 1e-9)
    many = {OneStep: None, Neumann: Neumann(90), Truncated: Truncated(90, tolerance=TIGHT)}
    many |= {Unrolled: Unrolled(90), Phantom: Phantom(150, 0.5)}
    if many[type(adjoint)] is not None:
        exact = found(TIGHT_ADJOINT, norm_weights=weights)
        close(found(many[type(adjoint)], norm_weights=weights), exact, 1e-9)


@every
def test_autocast(adjoint):
    z, w = (t.float() for t in (Z, W))
    z, w = z.requires_grad_(), w.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = fixed_point(g, torch.zeros_like(z), z, params=(w,), adjoint=adjoint)
    assert s.x.dtype == torch.float32
    found = grad(s.x, (z, w), V.float())
    rough = gradients(adjoint)[1]
    for a, b in zip(found, rough, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.1 * b.norm()


@pytest.mark.parametrize(
    "make",
    [
        lambda: OneStep("keep"),
        lambda: Neumann(-1),
        lambda: Neumann(2, 0.0),
        lambda: Truncated(2.0),
        lambda: Unrolled(0),
        lambda: Unrolled(True),
        lambda: Phantom(0, 0.5),
        lambda: Phantom(3, 2.0),
        lambda: ImplicitAdjoint(max_iterations=-1),
    ],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"(failed|k|damping|last|max_iterations) must"):
        make()


def test_what_is_no_adjoint_is_refused():
    with pytest.raises(TypeError, match=r'Truncated: solver must be .*BiCGSTAB.*"auto"'):
        Truncated(2, solver=3)
    with pytest.raises(
        TypeError, match=r"adjoint must be ImplicitAdjoint\(...\), or one of OneStep"
    ):
        solve(OneStep, Z, W)
    with pytest.raises(ValueError, match="ImplicitAdjoint: max_iterations must be from 1"):
        solve(ImplicitAdjoint(max_iterations=torch.tensor([1, 0, 1, 1])), *leaves())
    with pytest.raises(RuntimeError, match="recorded steps have no adjoint problem"):
        Unrolled(2).transposed(None)
    _, found = gradients(ImplicitAdjoint(max_iterations=torch.tensor(0)))
    close(found, gradients(OneStep())[1], 0)
