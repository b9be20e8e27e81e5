"""Iterates on the way to x̂, attached by one call of g each: `checkpoints=` of `fixed_point`."""

import pytest
import torch
from helpers import TIGHT, Net, contraction
from torch.autograd import grad

from fpi_cuda import (
    Anderson,
    DenseStep,
    FixedPointLayer,
    ImplicitAdjoint,
    OneStep,
    Picard,
    Tolerance,
    Unrolled,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
W = contraction(5, 0.8, seed=3)
Z = torch.linspace(-1, 1, 20, dtype=F64).view(4, 5)


def g(x, z, w):
    return torch.tanh(x @ w.mT + z)


def solve(z=Z, w=W, at=(2, 5), **options):
    given = {"solver": Picard(), "tolerance": TIGHT, "per_sample": True, **options}
    return fixed_point(g, torch.zeros_like(z), z, params=(w,), checkpoints=at, **given)


def plain(z, w, k):
    """g of the iterate after k plain steps, which is a constant."""
    x = torch.zeros_like(z)
    with torch.no_grad():
        for _ in range(k):
            x = g(x, z, w)
    return g(x, z, w)


def test_a_checkpoint_is_g_of_the_iterate_and_has_its_gradients():
    z, w = Z.clone().requires_grad_(), W.clone().requires_grad_()
    s = solve(z, w)
    assert len(s.checkpoints) == 2
    bare = fixed_point(
        g, torch.zeros_like(Z), Z, params=(W,), solver=Picard(), tolerance=TIGHT, per_sample=True
    )
    assert s.evaluations == bare.evaluations + 2
    assert torch.equal(s.x, bare.x)
    for k, x in zip((2, 5), s.checkpoints, strict=True):
        expected = plain(z, w, k)
        torch.testing.assert_close(x, expected, rtol=1e-14, atol=1e-15)
        loss = [t.sin().square().sum() for t in (x, expected)]
        for a, b in zip(*(grad(t, (z, w), create_graph=True) for t in loss), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    whole = s.x.square().sum() + 0.8 * s.checkpoints[0].square().sum()
    of_x, of_first = (
        grad(t.square().sum(), w, retain_graph=True)[0] for t in (s.x, s.checkpoints[0])
    )
    torch.testing.assert_close(grad(whole, w)[0], of_x + 0.8 * of_first)


@pytest.mark.parametrize("solver", [Picard(0.7), Anderson(3)], ids=["damped", "anderson"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_the_iterate_is_where_g_is_evaluated_next(solver, per_sample, backend):
    shown = {}
    s = solve(
        solver=solver,
        per_sample=per_sample,
        backend=backend,
        at=(1, 4),
        callback=lambda k, x, residual: shown.update({k: x}),
    )
    for k, x in zip((1, 4), s.checkpoints, strict=True):
        torch.testing.assert_close(x, g(shown[k + 1], Z, W), rtol=1e-12, atol=1e-14)
    assert "eager" in s.path


def test_a_sample_that_ended_is_at_its_solution():
    z = Z.clone()
    z[1] = 0  # whose solution is the start
    s = solve(z, at=(3, 10_000), max_iterations=10_000)
    assert s.iterations[1] == 1
    assert s.checkpoints[0][1].abs().max() == 0
    assert (s.checkpoints[0] - s.x)[0].abs().max() > 1e-3
    torch.testing.assert_close(s.checkpoints[1], s.x.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjoint", [OneStep(), Unrolled(2), ImplicitAdjoint()], ids=repr)
def test_failed_samples_have_no_gradient(adjoint):
    z = Z.abs().clone()
    z[2] = -1
    z, w = z.requires_grad_(), W.clone().requires_grad_()

    def of(z, w, keep=slice(None)):
        s = fixed_point(
            lambda x, z, w: g(x, z, w) + torch.sqrt(z),
            *(torch.zeros_like(z), z),
            params=(w,),
            adjoint=adjoint,
            on_failure="return",
            per_sample=True,
            checkpoints=(2,),
        )
        return s.checkpoints[0]

    for_z, for_w = grad(of(z, w).nan_to_num().sum(), (z, w))
    good = torch.tensor([0, 1, 3])
    some, of_some = grad(of(z[good], w).sum(), (z, w))
    assert for_z[2].abs().max() == 0
    torch.testing.assert_close(for_z[good], some[good], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(for_w, of_some, rtol=1e-6, atol=1e-6)


def test_states_modules_and_captured_tensors():
    net, scale = Net(n=5, d=5), torch.tensor(0.9, dtype=F64, requires_grad=True)

    def of(x, z):
        y = net(x["a"] + x["c"].real, z) * scale
        return {"a": 0.3 * y, "c": torch.complex(0.3 * y, z)}

    x0 = {"a": torch.zeros(4, 5, dtype=F64), "c": torch.zeros(4, 5, dtype=torch.complex128)}
    weights = {"a": 4.0, "c": 1.0}
    given = {"tolerance": TIGHT, "norm_weights": weights, "solver": Picard()}
    s = fixed_point(of, x0, Z, checkpoints=(3,), **given)
    x = x0
    with torch.no_grad():
        for _ in range(3):
            x = of(x, Z)
    x = of(x, Z)
    (found,) = s.checkpoints
    tensors = (scale, *net.parameters())
    for a, b in zip(found.values(), x.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        losses = (t.abs().square().sum() for t in (a, b))
        for p, q in zip(*(grad(t, tensors, retain_graph=True) for t in losses), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert not s.detach().checkpoints[0]["a"].requires_grad


def test_without_gradients_they_are_values():
    with torch.no_grad():
        s = solve()
    assert not any(x.requires_grad for x in s.checkpoints)
    torch.testing.assert_close(s.checkpoints[0], plain(Z, W, 2))
    assert solve(at=()).checkpoints == ()


@pytest.mark.parametrize("driver", ["auto", "whole"])
def test_the_solve_is_eager(driver):
    step = DenseStep(5, 5)
    given = {"checkpoints": (2,), "driver": driver, "tolerance": Tolerance(1e-4)}
    if driver == "whole":
        with pytest.warns(UserWarning, match=r"not possible: checkpoints: only the host's loop"):
            s = fixed_point(step, torch.zeros(3, 5), torch.ones(3, 5), **given)
    else:
        s = fixed_point(step, torch.zeros(3, 5), torch.ones(3, 5), **given)
    assert "eager" in s.path


@pytest.mark.parametrize(
    "at", [(0, 2), (4, 4), (8, 4), (2.0,), (True,), 4, "48", torch.tensor([2])]
)
def test_they_are_whole_numbers_that_rise(at):
    with pytest.raises(ValueError, match=r"checkpoints must be a tuple of whole numbers >= 1"):
        solve(at=at)


def test_where_there_are_none_an_error_says_so():
    with pytest.raises(RuntimeError, match="attached by plain autograd"):
        torch.func.grad(lambda z: solve(z).checkpoints[0].sum())(Z)
    with pytest.raises(RuntimeError, match="attached by plain autograd"):
        torch.func.jvp(lambda z: solve(z).x, (Z,), (Z,))
    with pytest.raises(TypeError, match="checkpoints"):
        FixedPointLayer(g, checkpoints=(2,))

    class Solves(torch.nn.Module):
        def forward(self, z):
            return solve(z, on_failure="return").x

    with pytest.raises(Exception, match=r"checkpoints=\(2, 5\) can't be exported"):
        torch.export.export(Solves(), (Z,))


def test_shapes_alone():
    z = torch.empty(4, 5, device="meta")
    s = fixed_point(lambda x, z: torch.tanh(x) + z, torch.zeros_like(z), z, checkpoints=(1, 2))
    assert [x.shape for x in s.checkpoints] == [z.shape, z.shape]


@pytest.mark.parametrize("adjoint", [OneStep(), ImplicitAdjoint(), Unrolled(2)], ids=str)
def test_where_all_samples_failed_a_loss_on_them_has_no_gradient_and_no_error(adjoint):
    """Of captured tensors, too."""
    w = torch.full((5, 5), torch.nan, requires_grad=True)
    s = fixed_point(
        lambda x: torch.tanh(x @ w.mT),
        torch.zeros(3, 5),
        adjoint=adjoint,
        per_sample=True,
        on_failure="return",
        checkpoints=(1,),
    )
    (s.checkpoints[0].sum() + s.x.sum()).backward()
    assert w.grad is None or not w.grad.any()
