"""Stand-ins for `FixedPointLayer` around the same g, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpi_cuda import ConvStep


class Unrolled(nn.Module):
    """So many steps of g from zero, differentiated through: what SPEN and its like do."""

    def __init__(self, g: nn.Module, steps: int) -> None:
        super().__init__()
        self.g, self.steps = g, steps

    def forward(self, z: Tensor, *more: Tensor) -> Tensor:
        x = z.new_zeros(len(z), *self.g.state_shape)
        for _ in range(self.steps):
            x = self.g(x, z, *more)
        return x


class UnrolledConvolutions(nn.Module):
    """The same of convolutions with relu; one step is the feedforward net, g(0, z)."""

    def __init__(self, g: ConvStep, steps: int) -> None:
        super().__init__()
        self.g, self.steps = g, steps
        if steps == 1:  # multiplies 0 alone
            g.layers[0].weight.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        g = self.g
        form = g.form(z.new_empty(len(z), g.state_channels, *z.shape[2:]), z)
        # The first step's convolution of x = 0 would be a waste of its time.
        x = form.u[0]
        for layer in g.layers[1:]:
            x = layer(torch.relu(x))
        for _ in range(self.steps - 1):
            x = form(x)
        return x


class TorchDeq(nn.Module):
    """torchdeq's Anderson solver, implicit both ways, to the same relative tolerance."""

    def __init__(self, g: nn.Module, rtol: float = 1e-4, most: int = 200) -> None:
        super().__init__()
        from torchdeq import get_deq

        self.g, self.rtol = g, rtol
        self.deq = get_deq(
            f_solver="anderson",
            b_solver="anderson",
            f_max_iter=most,
            b_max_iter=most,
            f_tol=rtol,
            b_tol=rtol,
            f_stop_mode="rel",
            b_stop_mode="rel",
            ift=True,
        )
        self.info: dict[str, Tensor] = {}

    def forward(self, z: Tensor, *more: Tensor) -> Tensor:
        self.deq.train(torch.is_grad_enabled())
        x0 = z.new_zeros(len(z), *self.g.state_shape)
        out, self.info = self.deq(lambda x: self.g(x, z, *more), x0)
        x: Tensor = out[-1]
        return x

    def counted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Iterations, relative residuals and whether that met the tolerance, [B] each."""
        residual = self.info["rel_lowest"].flatten()
        return self.info["nstep"].flatten().int(), residual, residual <= self.rtol
