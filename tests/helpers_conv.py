"""What the tests of convolutional steps share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fpi_cuda import ConvStep
from fpi_cuda.forms import ACTIVATIONS

SIZES = [(1, 1), (1, 5), (2, 3), (7, 9), (17, 16)]
HIDDEN = [(), (5,), (3, 6)]


def make(hidden=(5,), dtype=torch.float64, channels=4, inputs=2, **options):
    step = ConvStep(channels, inputs, hidden=hidden, **options).to(dtype)
    with torch.no_grad():
        for layer in step.layers:
            if layer.bias is not None:
                layer.bias.uniform_(-0.5, 0.5)
    return step


def images(batch, size, channels=2, dtype=torch.float64, **options):
    return torch.randn(batch, channels, *size, dtype=dtype, **options)


def written_out(step):
    """The stack on [x, z] side by side, as one would write it, and its parameters."""

    def g(x, z, *params):
        weights, biases = list(params[: len(step.layers)]), list(params[len(step.layers) : -1])
        weights[0] = torch.cat([weights[0], params[-1]], 1)
        h = torch.cat([x, z], 1)
        for i, w in enumerate(weights):
            h = F.conv2d(h, w, biases[i] if biases else None, padding=w.shape[-1] // 2)
            if i + 1 < len(weights):
                h = ACTIVATIONS[step.activation](h)
        return ACTIVATIONS[step.output_activation](step.residual * x + h)

    weights = [layer.weight for layer in step.layers]
    biases = [layer.bias for layer in step.layers if layer.bias is not None]
    return g, (*weights, *biases, step.input_weight)
