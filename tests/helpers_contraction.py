"""What the tests of `fpi_cuda.contraction` share."""

import torch
import torch.nn.functional as F


def dense(g, x, z) -> torch.Tensor:
    """[B, N, N]."""
    n = x[0].numel()
    rows = [
        torch.autograd.functional.jacobian(
            lambda q, i=i: g(q[None], z[i : i + 1])[0], x[i], create_graph=True
        ).view(n, n)
        for i in range(len(x))
    ]
    return torch.stack(rows)


def matrix(weight, size) -> torch.Tensor:
    """[I H W, O H W], the zero-padded convolution."""
    i = weight.shape[1]
    n = i * size[0] * size[1]
    images = torch.eye(n, dtype=weight.dtype).view(n, i, *size)
    return F.conv2d(images, weight, padding=tuple(k // 2 for k in weight.shape[2:])).flatten(1)
