"""A tensor that g captures and a transform follows is refused by name; nothing else is."""

import functools

import pytest
import torch
from helpers import Energy, contraction
from helpers_derivatives import close, double, tight
from torch import nn
from torch.autograd import forward_ad, grad
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.func import grad as fgrad

from fpi_cuda import Anderson, FixedPointLayer, GradientStep, fixed_point
from fpi_cuda.operators import partial

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = tight("reference", Anderson())
REFUSED = r"fixed_point: g captures a tensor that .*; pass it in `inputs`.*or `params`"
W, Z = contraction(3, 0.6), double(4, 3)
WS = torch.stack([W, 0.5 * W])


def solved(g, z=Z):
    return fixed_point(g, torch.zeros_like(z), z, **OPTIONS).x.sum()


def plain(w, z=Z):
    return solved(lambda x, z: torch.tanh(x @ w.mT + z), z)


class Applied(torch.autograd.Function):
    """x wᵀ, by rules of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x @ w.mT

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, c):
        x, w = ctx.saved_tensors
        return c @ w, c.mT @ x

    @staticmethod
    def jvp(ctx, dx, dw):
        x, w = ctx.saved_tensors
        return (0 if dx is None else dx @ w.mT) + (0 if dw is None else x @ dw.mT)


def by_function(w):
    return solved(lambda x, z: torch.tanh(Applied.apply(x, w) + z))


def by_partial(w):
    return solved(functools.partial(lambda w, x, z: torch.tanh(x @ w.mT + z), w))


def by_method(w):
    class Step:
        def __init__(self, w):
            self.w = w

        def __call__(self, x, z):
            return torch.tanh(x @ self.w.mT + z)

    return solved(Step(w))


def of_positive(w):
    """Raises on zeros: there is no Cholesky factor of those."""
    return solved(
        lambda x, z: (
            0.2 * x @ torch.linalg.cholesky(z.mT @ z + w @ w.mT)
            - 0.2 * x @ torch.linalg.cholesky(z.mT @ z)
            + z
        )
    )


WAYS = {
    "closure": plain,
    "Function": by_function,
    "partial": by_partial,
    "attribute": by_method,
    "raises on zeros": of_positive,
}


def of_dual(f, w):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(w, torch.ones_like(w)))


LEVELS = {
    "grad": lambda f: fgrad(f)(W),
    "vjp": lambda f: vjp(f, W),
    "jacrev": lambda f: jacrev(f)(W),
    "jvp": lambda f: jvp(f, (W,), (W,)),
    "jacfwd": lambda f: jacfwd(f)(W),
    "hessian": lambda f: hessian(f)(W),
    "vmap": lambda f: vmap(f)(WS),
    "vmap(grad)": lambda f: vmap(fgrad(f))(WS),
    "grad(vmap)": lambda f: fgrad(lambda ws: vmap(f)(ws).sum())(WS),
    "grad(grad)": lambda f: fgrad(lambda w: fgrad(f)(w).sum())(W),
    "jvp(grad)": lambda f: jvp(fgrad(f), (W,), (W,)),
    "grad(jvp)": lambda f: fgrad(lambda w: jvp(f, (w,), (w,))[1])(W),
    "dual": lambda f: of_dual(f, W),
    "dual, no_grad": lambda f: of_dual(torch.no_grad()(f), W),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_a_captured_tensor_that_is_followed_is_refused_by_name(level, way):
    with pytest.raises(RuntimeError, match=REFUSED):
        level(way)


OTHERS = {
    "grad, z of grad": lambda: fgrad(lambda w: fgrad(lambda z: plain(w, z))(Z).sum())(W),
    "jvp, z of grad": lambda: jvp(lambda w: fgrad(lambda z: plain(w, z))(Z), (W,), (W,)),
    "grad, z of vmap": lambda: fgrad(lambda w: vmap(lambda z: plain(w, z[None]))(Z).sum())(W),
    "vmap, z of grad": lambda: vmap(lambda w: fgrad(lambda z: plain(w, z))(Z))(WS),
    "vmap, z of vmap": lambda: vmap(lambda w: vmap(lambda z: plain(w, z[None]))(Z))(WS),
    "jvp, z of vmap": lambda: jvp(lambda w: vmap(lambda z: plain(w, z[None]))(Z), (W,), (W,)),
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_a_level_further_out_than_those_of_the_inputs_is_seen(case):
    with pytest.raises(RuntimeError, match=REFUSED):
        case()


def test_a_captured_tensor_of_autograd_under_vmap_is_refused():
    """Its derivative would be lost."""
    w = torch.eye(3, dtype=torch.float64, requires_grad=True)
    each = vmap(lambda z: solved(lambda x, z: 0.3 * x @ w + z, z[None]))
    with pytest.raises(RuntimeError, match=REFUSED):
        each(Z)
    with torch.no_grad():
        assert each(Z).shape == (4,)
    w.requires_grad_(False)
    assert each(Z).shape == (4,)


def test_a_captured_modules_parameters_have_their_derivative_under_vmap():
    net = nn.Linear(3, 3).double()
    with torch.no_grad():
        net.weight.mul_(0.3)
    found = vmap(lambda z: solved(lambda x, z: net(x) + z, z[None]))(Z).sum()
    beside = sum(solved(lambda x, z: net(x) + z, z[None]) for z in Z)
    wanted = list(net.parameters())
    for a, b in zip(grad(found, wanted), grad(beside, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_g_is_asked_at_the_solution_never_at_zeros():
    """The first slice of what is mapped."""
    seen = []

    def g(x, z):
        seen[:] = [torch.func.debug_unwrap(t) for t in (x, z)]
        return 0.5 * x + z

    vmap(lambda z: solved(g, z[None]))(Z)
    close(seen[0], 2 * Z[:1])
    assert torch.equal(seen[1], Z[:1])
    vmap(lambda z: solved(g, z), in_dims=1)(torch.stack([Z, -Z], 1))
    assert torch.equal(seen[1], Z)
    fgrad(lambda z: solved(g, z))(Z)
    assert torch.equal(seen[1], Z)


def test_errors_of_g_reach_the_user():
    def g(x, z):
        raise LookupError("mine")

    for follow in (fgrad, lambda f: functools.partial(of_dual, f)):
        with pytest.raises(LookupError, match="mine"):
            follow(lambda z: solved(g, z))(Z)
    with pytest.raises(TypeError, match="must return a tensor"):
        fgrad(lambda z: solved(lambda x, z: None, z))(Z)


# --- P, and the energy of a step ---------------------------------------------------------------


def of_energy(w):
    def energy(x, z):
        return ((x @ w.mT - z) ** 2).sum(-1) + (x**2).sum(-1)

    return FixedPointLayer(GradientStep(energy, 0.1), **OPTIONS)(Z).sum()


def of_partial(w):
    return partial(lambda x: (torch.tanh(x @ w.mT) ** 2).sum(), Z)[0].sum()


@pytest.mark.parametrize("way", [of_energy, of_partial])
@pytest.mark.parametrize("level", LEVELS)
def test_a_captured_tensor_of_an_energy_is_refused_by_name(level, way):
    if (way, level) == (of_partial, "dual, no_grad"):  # no node stands in between
        found = of_dual(lambda w: forward_ad.unpack_dual(torch.no_grad()(way)(w)).tangent, W)
        rise = [way(W + step) for step in (1e-6, -1e-6)]
        torch.testing.assert_close(found, (rise[0] - rise[1]) / 2e-6, rtol=1e-6, atol=1e-8)
        return
    with pytest.raises(RuntimeError, match=r"captures a tensor that .*; pass it in"):
        LEVELS[level](way)


def test_an_energy_that_owns_its_tensors_is_refused_nothing():
    layer = FixedPointLayer(GradientStep(Energy(), 0.4), state_shape=(3,), **OPTIONS)
    params = {k: v.detach() for k, v in layer.named_parameters()}

    def loss(params, z):
        return functional_call(layer, params, (z,)).sin().sum()

    z = double(2, 2)
    true = grad(layer(z).sin().sum(), list(layer.parameters()))
    for mine, one in zip(fgrad(loss)(params, z).values(), true, strict=True):
        close(mine, one)
    each = vmap(fgrad(lambda p, z: loss(p, z[None])), (None, 0))(params, z)
    for mine, one in zip(each.values(), true, strict=True):
        close(mine.sum(0), one)


# --- what is not captured, or not followed ---------------------------------------------------


@pytest.mark.parametrize("follow", [fgrad, jacrev, lambda f: vmap(fgrad(lambda z: f(z[None])))])
def test_constants_and_tensors_made_in_g_are_no_captures(follow):
    shift = double(3)

    def mine(z):
        def g(x, z):
            scale = torch.arange(3, dtype=z.dtype) / 6
            return scale * x * torch.ones_like(x) + z @ W + shift

        return solved(g, z)

    def true(z):
        return ((z @ W + shift) / (1 - torch.arange(3, dtype=z.dtype) / 6)).sum()

    close(follow(mine)(Z), follow(true)(Z))


def test_a_modules_own_parameters_are_no_captures():
    layer = FixedPointLayer(Affine(), **OPTIONS)
    params = {"g.w": W}
    mine = fgrad(lambda p: functional_call(layer, p, (Z,)).sum())(params)["g.w"]
    close(mine, fgrad(lambda w: affine(w, Z))(W))
    each = vmap(lambda p: functional_call(layer, p, (Z,)).sum())({"g.w": WS})
    close(each, torch.stack([affine(w, Z) for w in WS]))


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(0.5 * W)

    def forward(self, x, z):
        return 0.5 * x @ self.w.mT + z


def affine(w, z):
    return torch.linalg.solve(torch.eye(3, dtype=w.dtype) - 0.5 * w, z.mT).sum()


def test_an_open_level_that_follows_nothing_changes_nothing():
    w, z = W.clone().requires_grad_(), Z.clone().requires_grad_()
    true = grad(plain(w, z), (w, z))
    with forward_ad.dual_level():
        for mine, one in zip(grad(plain(w, z), (w, z)), true, strict=True):
            close(mine, one)


def test_nothing_is_asked_where_nothing_follows():
    calls = []

    def g(x, z):
        calls.append(None)
        return 0.5 * x + z

    solution = fixed_point(g, torch.zeros_like(Z), Z, **OPTIONS)
    assert len(calls) == solution.evaluations
    calls.clear()
    with forward_ad.dual_level():
        solution = fixed_point(g, torch.zeros_like(Z), Z, **OPTIONS)
    assert len(calls) == solution.evaluations + 1


def test_a_solve_in_g_asks_nothing_of_its_own():
    """Within a node's forward no level is open."""
    calls = []

    def inner(y, x):
        calls.append(None)
        return 0.5 * y + 0.2 * x

    def outer(x, z):
        solution = fixed_point(inner, torch.zeros_like(x), x, **OPTIONS)
        counted.append(solution.evaluations)
        return solution.x + z

    counted: list[int] = []
    with forward_ad.dual_level():
        solved(outer)
    assert len(calls) == sum(counted) + 1  # the outer's question asks the inner one


# --- autograd, outside torch.func ------------------------------------------------------------


def test_batched_cotangents_reach_a_captured_tensor():
    w, z = W.clone().requires_grad_(), Z.clone().requires_grad_()
    x = fixed_point(lambda x, z: torch.tanh(x @ w.mT + z), torch.zeros_like(z), z, **OPTIONS).x
    v = double(3, 4, 3, seed=5)
    mine = grad(x, (w, z), v, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(v):
        for a, b in zip(mine, grad(x, (w, z), one, retain_graph=True), strict=True):
            close(a[i], b)
    (only,) = grad(x, w, v, is_grads_batched=True, retain_graph=True)
    close(only, mine[0])
    with pytest.raises(RuntimeError, match="only first derivatives exist"):
        grad(x, (w, z), v, is_grads_batched=True, create_graph=True)


# --- the tensor by its name --------------------------------------------------------------------


def test_a_captured_tensor_is_named_wherever_g_holds_it():
    w, still = (torch.randn(3, 3) / 4).requires_grad_(), torch.ones(3, 3)
    z = torch.randn(2, 3)

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = {"all": [w]}

        def forward(self, x, z):
            return torch.tanh(x @ self.kept["all"][0]) + z

    def made():
        factor = 2 * w
        return lambda x, z: torch.tanh(x @ factor / 2) + z

    for g, name in (
        (lambda x, z: torch.tanh(x @ (still * w)) + z, "w"),  # the other one has no gradient
        (lambda x, z, v=w: torch.tanh(x @ v) + z, "v"),
        (functools.partial(lambda x, z, u: torch.tanh(x @ u) + z, u=w), "u"),
        (made(), "factor"),
        (Owner(), r"kept\['all'\]\[0\]"),
        (nn.ModuleList([Owner()])[0].forward, r"self.kept\['all'\]\[0\]"),
    ):
        x = fixed_point(g, torch.zeros(2, 3), z).x
        with pytest.raises(RuntimeError, match=rf"needs gradients \({name} of shape \(3, 3\)\)"):
            grad(x.sum(), w, create_graph=True)
    with pytest.raises(ValueError, match=r"captures one \(w of shape \(3, 3\)\)"):
        partial(lambda x: (x @ w).sum(), z)
    for follow, what in ((torch.func.grad, "needs gradients"), (torch.vmap, "torch.vmap maps")):
        with pytest.raises(RuntimeError, match=rf"{what}.* \(v of shape \(3, 3\)\)"):
            follow(lambda v: fixed_point(lambda x: torch.tanh(x @ v), z).x.sum())(
                w.detach() if follow is torch.func.grad else w.detach().expand(2, 3, 3)
            )
