"""`ConvStep`: a module like any other, against the stack written out in float64."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_close
from helpers_conv import HIDDEN, SIZES, images, make, written_out
from torch import nn

from fpi_cuda import ConvStep, FixedPointLayer


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_stack_on_x_and_z_side_by_side(size, hidden, kernel_size):
    step = make(hidden, kernel_size=kernel_size, residual=0.1, output_activation="tanh")
    g, params = written_out(step)
    x, z = images(3, size, 4), images(3, size)
    assert_close(step(x, z), g(x, z, *params))


def test_without_biases_and_without_a_batch():
    step = make(bias=False)
    g, params = written_out(step)
    x, z = images(1, (4, 5), 4), images(1, (4, 5))
    assert_close(step(x[0], z[0]), g(x, z, *params)[0])


def test_fresh_steps_contract():
    for hidden in HIDDEN:
        for activation in ("relu", "tanh", "identity"):
            step = make(hidden, activation=activation, channels=16, inputs=1)
            x, y, z = (images(4, (16, 16), channels) for channels in (16, 16, 1))
            ratio = (step(x, z) - step(y, z)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(
                dim=1
            )
            assert ratio.max() < 0.9
            assert FixedPointLayer(step, max_iterations=100)(z).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(kernel_size=2), "kernel_size must be odd"),
        (dict(kernel_size=9), "at most 7"),
        (dict(kernel_size=-1), "kernel_size must be odd"),
        (dict(kernel_size=True), "kernel_size must be odd"),
        (dict(kernel_size=3.0), "kernel_size must be odd"),
        (dict(activation="swish"), "activation must be one of"),
        (dict(output_activation="swish"), "output_activation must be one of"),
        (dict(residual=float("nan")), "residual must be a finite number"),
        (dict(residual=nn.Parameter(torch.tensor(0.1))), "residual must be a finite number"),
        (dict(hidden=(8, 0)), r"hidden\[1\] must be a whole number"),
        (dict(state_channels=0), "state_channels must be a whole number"),
        (dict(input_channels=None), "input_channels must be"),
    ],
)
def test_bad_arguments_say_what_must_hold(arguments, says):
    given = dict(state_channels=4, input_channels=2) | arguments
    with pytest.raises(ValueError, match=says):
        ConvStep(**given)


def test_groups_and_a_bare_width_are_type_errors():
    with pytest.raises(TypeError, match="groups"):
        ConvStep(4, 2, groups=2)
    with pytest.raises(TypeError, match=r"write hidden=\(32,\)"):
        ConvStep(4, 2, hidden=32)


def test_shapes_that_do_not_fit_say_so():
    step = make()
    x, z = images(2, (5, 5), 4), images(2, (5, 5))
    with pytest.raises(ValueError, match=r"x must be \[B, 4, H, W\] \(got shape \(2, 3, 5, 5\)\)"):
        step(x[:, :3], z)
    with pytest.raises(ValueError, match=r"z must be \[B, 2, H, W\]"):
        step(x, z[:, :1])
    with pytest.raises(ValueError, match="one height and width"):
        step(x, z[..., :4])
    with pytest.raises(ValueError, match=r"z must be \[B, 2, H, W\]"):
        FixedPointLayer(step)(z[:, :1])
    with pytest.raises(ValueError, match="both be a batch of images"):  # z's channels as its batch
        FixedPointLayer(step)(z[0])


def test_a_layer_with_ways_of_its_own_is_an_error():
    x, z = images(2, (5, 5), 4), images(2, (5, 5))
    for name, value in (("padding_mode", "circular"), ("stride", (2, 2)), ("dilation", (2, 2))):
        step = make()
        setattr(step.layers[1], name, value)
        with pytest.raises(
            RuntimeError, match="must keep stride 1, dilation 1, one group and zero"
        ):
            step(x, z)


def test_z_of_another_dtype_is_an_error():
    step = make()
    for z in (images(2, (5, 5)).float(), torch.ones(2, 2, 5, 5, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"weights' dtype, torch.float64 \(got"):
            step(images(2, (5, 5), 4), z)


def test_copies_and_checkpoints():
    step = make()
    layer = FixedPointLayer(step)
    z = images(2, (5, 6))
    wanted = layer(z)
    torch.testing.assert_close(copy.deepcopy(layer)(z), wanted)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(z), wanted)
    other = FixedPointLayer(make())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(z), wanted)
    assert set(layer.state_dict()) == {f"g.{name}" for name in step.state_dict()}


@pytest.mark.no_poison
def test_the_module_compiles_whole():
    step = make(dtype=torch.float32)
    x, z = images(2, (8, 8), 4, torch.float32), images(2, (8, 8), dtype=torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, z), step(x, z))
