"""Convolution steps in Triton against float64 conv2d: every size, dtype and activation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conv_chains import (
    ALL_CONFIGS,
    BOTH,
    NETS,
    SIZES,
    SMALL,
    TOLERANCE,
    check,
    dense,
    make,
    name_of,
    run,
    state,
)
from interpreted import INTERPRETED

from fpi_cuda.backends.triton import conv
from fpi_cuda.backends.triton.configs import Config
from fpi_cuda.forms.activations import ACTIVATIONS
from fpi_cuda.forms.conv import ConvForm


@BOTH
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("net", list(NETS))
def test_a_step_is_the_float64_convolutions(net, size, config):
    form, x = make(NETS[net], size, b=1, hidden_activation="relu", residual=0.5)
    check(form, x, config)


@pytest.mark.parametrize("tile", [(8, 16), (6, 10)], ids=str)
@pytest.mark.parametrize("net", ["16-32-16", "1-32-32-1"])
def test_many_tiles_make_an_image(net, tile):
    form, x = make(NETS[net], (17, 19), b=1, hidden_activation="relu")
    fused = check(form, x, Config(True, tile, pixels=128))
    if tile == (8, 16):
        by_layer = check(form, x, Config(False, tile))
        torch.testing.assert_close(fused, by_layer, rtol=1e-12, atol=1e-12)


@BOTH
def test_the_widest_kernel(config):
    check(*make(((1, 1, 1), (7, 7)), (5, 9), b=1), config)


@ALL_CONFIGS
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=name_of)
@pytest.mark.parametrize("net", ["16-32-16", "1-32-32-1"])
def test_every_dtype_is_right_within_its_rounding(net, dtype, config):
    form, x = make(NETS[net], (5, 9), dtype, 1, hidden_activation="relu", residual=0.5)
    check(form, x, config)


@BOTH
def test_tf32_is_right_within_its_rounding(config):
    form, x = make(NETS["16-32-16"], (5, 9), torch.float32, hidden_activation="relu")
    check(form, x, config, tf32=True)


@pytest.mark.parametrize("net", [((5, 70, 5), (3, 3)), ((70, 70), (3,)), ((4, 4), (1,))], ids=str)
def test_wide_and_single_layers_run_one_at_a_time(net):
    form, x = make(net, (3, 5), b=1, residual=0.5, activation="tanh")
    out = check(form, x, SMALL["by layer"])
    assert not conv.Chain(form, x, tf32=False).config.fused
    torch.testing.assert_close(check(form, x), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("config", list(SMALL.values()), ids=list(SMALL))
def test_operands_loaded_ahead_or_not_give_the_same_bits(config, stages):
    form, x = make(NETS["3-20-7-3"], (5, 9), b=1, scale=True)
    out = check(form, x, dataclasses.replace(config, stages=stages))
    assert torch.equal(out, run(form, x, config)[0])


@BOTH
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_activations_are_right_near_zero_far_out_and_not_finite(activation, dtype, config):
    """Alone: all weights are 0, so the values are φ(u), and relatively right."""
    values = [10.0**e for e in range(-12, 3)] + [0.1 * k for k in range(1, 60)] + [0.0, math.inf]
    values = torch.tensor(values + [-v for v in values] + [math.nan], dtype=torch.float64)
    u = values.to(dtype).reshape(1, 1, 1, -1)
    zeros = torch.zeros(1, 1, 3, 3, dtype=dtype)
    form = ConvForm((zeros, zeros), (None, None), (None, u), activation)
    out, _ = run(form, torch.zeros_like(u), config)
    # Four units in the last place; a device's exponential and division have a few of their own.
    single = 4 * torch.finfo(torch.float32).eps if INTERPRETED else 2e-6
    rtol = 1e-12 if dtype == torch.float64 else single
    # Where φ itself is a difference of 1s, as torch's is.
    atol = {"gelu": 4 * torch.finfo(dtype).eps}.get(activation, torch.finfo(dtype).tiny)
    expected = ACTIVATIONS[activation](u.double())
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol, equal_nan=True)


@BOTH
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_hidden_layers_have_their_own_activation(activation, config):
    """Outside the image it is 0 and not φ(0)."""
    form, x = make(NETS["3-20-7-3"], (3, 5), b=1, hidden_activation=activation, activation="tanh")
    check(form, x, config)


@BOTH
@pytest.mark.parametrize("slopes", ["bits", "tensor"])
@pytest.mark.parametrize("net", [((16, 32, 16), (3, 3)), ((2, 33, 64, 2), (3, 1, 3))], ids=str)
def test_slopes_take_the_activations_place(net, slopes, config):
    form, x = make(net, (5, 9), b=1, slopes=slopes, scale=True, u=(len(net[1]) - 1,), residual=0.7)
    check(form, x, config)


@BOTH
def test_slopes_as_bits_and_as_numbers_give_the_same_bits(config):
    form, x = make(((2, 33, 40, 2), (3, 1, 3)), (3, 5), b=1, slopes="bits")
    numbers = dataclasses.replace(form, slopes=tuple(dense(s.double()) for s in form.slopes))
    assert torch.equal(run(form, x, config)[0], run(numbers, x, config)[0])


@BOTH
@pytest.mark.parametrize("u", [(0, 1, 2), ()], ids=str)
def test_every_layer_may_have_a_u(u, config):
    form, x = make(NETS["3-20-7-3"], (5, 9), b=1, u=u, scale=True, residual=-0.3)
    check(form, x, config)


@BOTH
def test_what_is_added_and_weights_may_lie_in_any_order(config):
    form, x = make(((2, 20, 2), (3, 3)), (3, 5), slopes="bits", scale=True)
    strided = dataclasses.replace(
        form,
        weights=tuple(w.mT.contiguous().mT for w in form.weights),
        u=tuple(u if u is None else u.contiguous() for u in form.u),
        scale=form.scale.contiguous(),
        slopes=tuple(s.contiguous() for s in form.slopes),
    )
    assert torch.equal(run(strided, x, config)[0], run(form, x, config)[0])


@BOTH
@pytest.mark.parametrize("hidden", ["relu", "tanh"])
def test_the_adjoint_form_is_the_vector_jacobian_product(hidden, config):
    net = NETS["3-20-7-3"]
    form, x = make(net, (5, 9), b=1, hidden_activation=hidden, activation="tanh", residual=0.4)
    x.requires_grad_()
    y, adjoint = form.linearised(x, transpose=True)
    c, v = state(*x.shape), state(*x.shape)
    (expected,) = torch.autograd.grad(y, x, c)
    out, _ = run(adjoint.plus(v), c, config)
    torch.testing.assert_close(out, expected + v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 5), (1, 31, 7, 1), (2, 32, 9, 8), (3, 33, 5, 9)], ids=str
)
def test_bits_are_the_slopes(shape):
    slopes = dense(torch.rand(shape) < 0.5)
    packed = conv.pack_bits(slopes)
    b, o, h, w = shape
    assert packed.shape == (b, h, w, -(-o // 32))
    assert packed.dtype == torch.int32
    channel = torch.arange(packed.shape[-1] * 32)
    bits = (packed[..., channel // 32] >> (channel % 32).int()) & 1
    assert torch.equal(bits[..., :o].bool().permute(0, 3, 1, 2), slopes)
    assert not bits[..., o:].any()


def test_no_slopes_are_no_bits():
    assert conv.pack_bits(dense(torch.ones(0, 5, 3, 3, dtype=torch.bool))).shape == (0, 3, 3, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": (torch.ones(2, 2, 2, 2), torch.ones(2, 2, 3, 3))}, "odd"),
        ({"weights": (torch.ones(2, 2, 9, 9), torch.ones(2, 2, 3, 3))}, "at most 7"),
        ({"weights": (torch.ones(2, 2, 3, 1), torch.ones(2, 2, 3, 3))}, "square"),
        ({"activation": "sine"}, "sine"),
        ({"hidden_activation": "sine"}, "sine"),
        ({"dtype": torch.int32}, "int32"),
        ({"dtype": torch.float64}, "another tensor torch.float32"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take_is_said(change, said):
    form, x = make(((2, 2, 2), (3, 3)), (3, 5), torch.float32)
    assert conv.refusal(form, x) is None
    x = x.to(change.pop("dtype", x.dtype))
    form = dataclasses.replace(form, **change)
    assert said in conv.refusal(form, x)
    with pytest.raises(ValueError, match=said):
        conv.Chain(form, x, tf32=False)


def test_a_state_of_another_layout_shape_or_place_is_an_error():
    form, x = make(((2, 2, 2), (3, 3)), (3, 5))
    chain = conv.Chain(form, x, tf32=False)
    active = conv.active_samples(torch.zeros(2, dtype=torch.int32))
    out = torch.empty_like(x)
    with pytest.raises(ValueError, match="channels-last"):
        chain(x.contiguous(), out, *active)
    with pytest.raises(ValueError, match="channels-last"):
        chain(x, out.contiguous(), *active)
    with pytest.raises(ValueError, match="other memory"):
        chain(x, x, *active)
    with pytest.raises(ValueError, match="must be as the state"):
        chain(x[:1], out, *active)
    with pytest.raises(ValueError, match="must be as the state"):
        chain(x.float(), out, *active)
