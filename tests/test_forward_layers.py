"""Tangents of steps that say what they are made of: by their layers, whoever drives."""

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, contraction, unroll
from helpers_derivatives import double
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

from fpi_cuda import (
    Anderson,
    ConvStep,
    DenseEnergy,
    DenseStep,
    FixedPointLayer,
    GradientStep,
    Picard,
    Tolerance,
)
from fpi_cuda.drivers import whole
from fpi_cuda.forms import DenseForm
from fpi_cuda.record import Limits

pytestmark = pytest.mark.usefixtures("one_thread")


def dense(hidden, activation):
    return DenseStep(5, 4, hidden=hidden, activation=activation, residual=0.1)


STEPS = {
    "one layer": lambda: dense(None, "tanh"),
    "two layers": lambda: DenseStep(5, 4, 7, "softplus", output_activation="sigmoid", residual=0.1),
    "no slope": lambda: dense(None, "identity"),
    "an energy": lambda: GradientStep(DenseEnergy(5, 4, 6), 0.2),
    "convolutions": lambda: ConvStep(2, 1, (3,), activation="relu", output_activation="tanh"),
    "one convolution": lambda: ConvStep(2, 1, (), output_activation="tanh", residual=0.1),
}


def case(name):
    """A step, its parameters and z, their tangents, and what iterates and what solves by them."""
    torch.manual_seed(0)
    step = STEPS[name]().double()
    z = double(6, 1, 4, 5) if isinstance(step, ConvStep) else double(6, 4)
    params = {k: v.detach() for k, v in step.named_parameters()}
    given = params, z
    moved = {k: double(*v.shape, seed=i) for i, (k, v) in enumerate(params.items())}, z.sin()

    def looped(params, z):
        shape = (2, 4, 5) if isinstance(step, ConvStep) else (5,)
        x = torch.zeros(len(z), *shape, dtype=z.dtype)
        return unroll(lambda x, z: functional_call(step, params, (x, z)), x, z, steps=200)

    def solved(layer):
        return lambda params, z: functional_call(
            layer, {f"g.{k}": v for k, v in params.items()}, (z,)
        )

    return step, given, moved, looped, solved


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=["Picard", "Anderson"])
@pytest.mark.parametrize("name", STEPS)
def test_tangents_by_layers_are_those_of_plain_iteration(name, solver):
    step, given, moved, looped, solved = case(name)
    expected = jvp(looped, given, moved)[1]
    counts = {}
    for driver in ("auto", "eager"):
        options = {"solver": solver, "tolerance": TIGHT, "adjoint": TIGHT_ADJOINT}
        layer = FixedPointLayer(step, driver=driver, **options)
        torch.testing.assert_close(jvp(solved(layer), given, moved)[1], expected)
        record = layer.last.tangent
        whole = driver == "auto" and not isinstance(step, ConvStep)
        assert ("whole" in record.path.split(",")[1]) == whole
        assert record.converged.all()
        counts[driver] = record.iterations
    assert (counts["auto"] - counts["eager"]).abs().max() <= 1  # at the tolerance rounding decides


@pytest.mark.parametrize("name", STEPS)
def test_samples_that_do_not_move_have_no_tangent_and_no_iteration(name):
    step, (_, z), _, _, _ = case(name)
    layer = FixedPointLayer(step, tolerance=TIGHT, adjoint=TIGHT_ADJOINT)
    dz = z.sin()
    dz[::2] = 0
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(z, dz))).tangent
    alone = jvp(layer, (z[1::2],), (dz[1::2],))[1]
    torch.testing.assert_close(found[1::2], alone)
    assert not found[::2].any()


NEAR = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.mark.parametrize("shape", [(1, 1, None), (7, 5, 3), (5, 33, 34), (2, 159, None)], ids=str)
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_the_kernel_scales_after_the_last_layer_and_adds_then(dtype, shape):
    """A tangent's form, beside plain iteration in float64 of the same rounded tensors."""
    (b, n, h), last = shape, shape[2] or shape[1]
    tensors = {
        "weight": contraction(max(n, last), 0.5)[:n, :last],
        "u": double(b, n),
        "output_scale": double(b, n, seed=1).sigmoid(),
    }
    if h is not None:
        tensors["hidden_weight"] = contraction(max(n, h), 1.0)[:h, :n]
        tensors["hidden_scale"] = double(b, h, seed=2).sigmoid()
        tensors["hidden_u"] = double(b, h, seed=3)
    rounded = {name: t.to(dtype) for name, t in tensors.items()}
    exact = DenseForm(**{name: t.double() for name, t in rounded.items()}, residual=0.25)
    x = torch.zeros(b, n, dtype=torch.float64)
    for _ in range(200):
        x = exact(x)
    (rtol, atol), x0 = Tolerance().resolve(dtype), torch.zeros(b, n, dtype=dtype)
    limits = Limits(rtol, atol, 0.0, 10**6, 200)
    for solver in (Picard(), Anderson()):
        found, record = whole.solve(DenseForm(**rounded, residual=0.25), x0, solver, limits)
        assert record.converged.all()
        assert (found.double() - x).norm() <= NEAR[dtype] * x.norm()


def test_a_tangent_of_dense_layers_calls_the_step_twice(monkeypatch):
    step, given, moved, _, solved = case("one layer")
    layer, calls, plain = FixedPointLayer(step), [], DenseForm.__call__
    monkeypatch.setattr(
        DenseForm, "__call__", lambda *form_and_x: calls.append(0) or plain(*form_and_x)
    )
    jvp(solved(layer), given, moved)
    assert "whole" in layer.last.tangent.path
    assert len(calls) == 2  # to see what g captures, and by P
