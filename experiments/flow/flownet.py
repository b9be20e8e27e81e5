"""FlowNetS (Dosovitskiy et al., ICCV 2015), and a small fixed-point layer that refines its flow.

All flows are in pixels of the full resolution, to the right and down, whatever their own size: the
net predicts them in units of 20 pixels, and what is returned is multiplied by that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpi_cuda import Anderson, ConvStep, FixedPointLayer, ImplicitAdjoint, Tolerance
from fpi_cuda.contraction import jacobian_penalty

from ..layers import UnrolledConvolutions

UNIT = 20.0  # pixels
SCALES = (4, 8, 16, 32, 64)  # of the flows, finest first
SLOPE = 0.1  # of LeakyReLU below 0
FINE = 4.0  # pixels: one at 1/4 of the resolution, the unit of flow in the layer
CONTRAST = 4.0  # images are multiplied by it for the layer, so that all it gets is about 1
# Of the layer. Training solves and differentiates loosely, for many steps a second.
STATE, HIDDEN, INPUTS = 8, 16, 8
TRAIN_RTOL, TRAIN_ITERATIONS = 3e-2, 20
ADJOINT_RTOL, ADJOINT_ITERATIONS = 1e-1, 20
RTOL, ITERATIONS = 1e-3, 200
BOUND = 0.7  # of the spectral radius of ∂g/∂x, above which there is a penalty


# --- the net ---------------------------------------------------------------------------------


class FlowNetS(nn.Module):
    """FlowNetSimple: both images into one stack of convolutions, refined from 1/64 to 1/4.

    Without batch norm, as in the paper.

    Args:
        width: the channels, as a part of the paper's; 1 is the paper's net.

    Raises:
        ValueError: width is not above 0.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        if not width > 0:
            raise ValueError(f"FlowNetS: width must be above 0 (got {width!r}); 1 is full size")

        def channels(n: int) -> int:
            return max(4, round(n * width))

        c1, c2, c3, c4, c5, c6 = map(channels, (64, 128, 256, 512, 512, 1024))
        d5, d4, d3, d2 = map(channels, (512, 256, 128, 64))
        self.stages = nn.ModuleList(
            (
                stage((6, c1, 7, 2), (c1, c2, 5, 2)),  # to 1/4
                stage((c2, c3, 5, 2), (c3, c3, 3, 1)),
                stage((c3, c4, 3, 2), (c4, c4, 3, 1)),
                stage((c4, c5, 3, 2), (c5, c5, 3, 1)),
                stage((c5, c6, 3, 2), (c6, c6, 3, 1)),  # to 1/64
            )
        )
        # From 1/64 to 1/4: what a scale holds is its stage's, what came up, and the flow.
        held = (c6, c5 + d5 + 2, c4 + d4 + 2, c3 + d3 + 2, c2 + d2 + 2)
        self.predict = nn.ModuleList(nn.Conv2d(n, 2, 3, padding=1) for n in held)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(n, d, 4, 2, 1)
            for n, d in zip(held[:4], (d5, d4, d3, d2), strict=True)
        )
        self.up_flow = nn.ModuleList(nn.ConvTranspose2d(2, 2, 4, 2, 1, bias=False) for _ in "5432")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As He et al. for what a LeakyReLU follows; small flows, enlarged bilinearly."""
        for module in (*self.stages.modules(), *self.up):
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                o, i, *kernel = module.weight.shape
                inputs = i * kernel[0] * kernel[1]
                if isinstance(module, nn.ConvTranspose2d):
                    inputs = o * kernel[0] * kernel[1] // 4  # that reach a pixel
                nn.init.normal_(module.weight, std=(2 / (1 + SLOPE**2) / inputs) ** 0.5)
                nn.init.zeros_(module.bias)
        for module in self.predict:
            nn.init.normal_(module.weight, std=0.1 / (9 * module.weight.shape[1]) ** 0.5)
            nn.init.zeros_(module.bias)
        tent = torch.tensor([0.25, 0.75, 0.75, 0.25])
        with torch.no_grad():
            for module in self.up_flow:
                module.weight.copy_(torch.eye(2)[..., None, None] * torch.outer(tent, tent))

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Flows from the first image to the second, at 1/4, 1/8, ..., 1/64.

        Args:
            first, second: [B, 3, H, W] each, about 0 to 1; any H and W.

        Returns:
            Five flows [B, 2, ⌈H / s⌉, ⌈W / s⌉] of the scales s, in pixels of the full resolution.
        """
        rows, columns = first.shape[-2:]
        pair = padded(torch.cat((first, second), 1), SCALES[-1])
        # The brightness says nothing about the motion.
        mean = pair.unflatten(1, (2, 3)).mean((1, 3, 4)).repeat(1, 2)
        held, levels = pair - mean[..., None, None], []
        for layers in self.stages:
            held = layers(held)
            levels.append(held)
        flows = [self.predict[0](held)]
        for i, level in enumerate(reversed(levels[:-1])):
            above = F.leaky_relu(self.up[i](held), SLOPE)
            held = torch.cat((level, above, self.up_flow[i](flows[-1])), 1)
            flows.append(self.predict[i + 1](held))
        return [
            UNIT * flow[..., : -(-rows // scale), : -(-columns // scale)]
            for flow, scale in zip(reversed(flows), SCALES, strict=True)
        ]


def stage(*layers: tuple[int, int, int, int]) -> nn.Sequential:
    """Convolutions with LeakyReLU, of inputs, outputs, kernel and stride."""
    parts: list[nn.Module] = []
    for inputs, outputs, kernel, stride in layers:
        parts += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*parts)


# --- images and flows ------------------------------------------------------------------------


def padded(images: Tensor, multiple: int) -> Tensor:
    """[B, C, H, W] with its last row and column repeated until both sides are a multiple."""
    rows, columns = (-n % multiple for n in images.shape[-2:])
    return F.pad(images, (0, columns, 0, rows), mode="replicate") if rows or columns else images


def quarter(images: Tensor) -> Tensor:
    """Means over 4 × 4 pixels, [B, C, ⌈H / 4⌉, ⌈W / 4⌉]."""
    return F.avg_pool2d(padded(images, 4), 4)


def enlarged(flow: Tensor, rows: int, columns: int, scale: int = 4) -> Tensor:
    """A flow [B, 2, ⌈H / scale⌉, ⌈W / scale⌉] at H × W, its values as they are; bilinear."""
    big = F.interpolate(flow, scale_factor=scale, mode="bilinear", align_corners=False)
    return big[..., :rows, :columns]


def warped(second: Tensor, flow: Tensor) -> Tensor:
    """The second image where the flow leads: second(x + u, y + v) at (x, y), bilinear.

    Args:
        second: [B, C, H, W]; beyond it is what is at its border.
        flow: [B, 2, H, W], in pixels of this size.
    """
    rows, columns = second.shape[-2:]
    flow = flow.to(second.dtype)  # in bfloat16 there are no places between pixels
    x = torch.arange(columns, device=flow.device) + flow[:, 0]
    y = torch.arange(rows, device=flow.device)[:, None] + flow[:, 1]
    # From 0, ..., n - 1 to -1, ..., 1.
    places = [2 * t / max(1, n - 1) - 1 for t, n in ((x, columns), (y, rows))]
    grid = torch.stack(places, -1)
    return F.grid_sample(second, grid, padding_mode="border", align_corners=True)


# --- the layer behind it ---------------------------------------------------------------------


class Refined(nn.Module):
    """FlowNetS, and R x̂ added to its finest flow, x̂ = g(x̂, z) at 1/4 of the resolution.

    z is that flow, the first image and its difference from the second one warped back. g is a
    convolution and a deconvolution (paper section 4.2), which without a stride is a convolution
    with the kernel turned around: a `ConvStep`. R is zero at first, so that every kind starts as
    the net alone; that is made first, so that one seed gives it the same weights.

    Args:
        width: of the net.
        kind: "net": nothing behind it; "once": g(0, z) for x̂; "fixed point".
        size: H and W in training, which what the penalty keeps from step to step depends on.

    Attributes:
        evaluated: tolerance and most iterations of a solve outside training.
        v: where the power iteration of the penalty is, [1, 8, ⌈H / 4⌉, ⌈W / 4⌉]; with the weights
            in a checkpoint, so that a resumed run goes on with it.

    Raises:
        ValueError: kind is another.
    """

    v: Tensor

    def __init__(self, width: float, kind: str, size: tuple[int, int]) -> None:
        super().__init__()
        if kind not in ("net", "once", "fixed point"):
            raise ValueError(f"Refined: kind must be 'net', 'once' or 'fixed point' (got {kind!r})")
        self.net = FlowNetS(width)
        self.kind = kind
        self.evaluated = Tolerance(rtol=RTOL), ITERATIONS
        if kind == "net":
            return
        g = ConvStep(STATE, INPUTS, hidden=(HIDDEN,))
        self.layer = UnrolledConvolutions(g, 1) if kind == "once" else layer_of(g)
        self.read = nn.Conv2d(STATE, 2, 3, padding=1)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)
        if kind == "fixed point":
            self.register_buffer("v", torch.randn(1, STATE, *(-(-n // 4) for n in size)))

    def forward(self, first: Tensor, second: Tensor) -> tuple[list[Tensor], Tensor]:
        """The net's flows, the finest one refined, and the penalty.

        Args:
            first, second: as of `FlowNetS`; in training of the size that was said.

        Returns:
            The flows as of `FlowNetS`; a scalar, zero but in training a fixed point.
        """
        flows = self.net(first, second)
        nothing = flows[0].new_zeros(())
        if self.kind == "net":
            return flows, nothing
        z = self.inputs(flows[0], first, second)
        if self.kind == "fixed point":
            self.set_tolerance()
        x = self.layer(z)
        flows[0] = flows[0] + FINE * self.read(x)
        penalised = self.kind == "fixed point" and self.training
        return flows, self.penalty(x, z) if penalised else nothing

    def inputs(self, flow: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """z, [B, 8, ⌈H / 4⌉, ⌈W / 4⌉]; of the flow, the warped image is no function to autograd."""
        first, second = quarter(first), quarter(second)
        change = warped(second, flow.detach() / FINE) - first
        images = torch.cat((first - first.mean((2, 3), keepdim=True), change), 1)
        return torch.cat((flow / FINE, CONTRAST * images), 1)

    def set_tolerance(self) -> None:
        """Loose in training."""
        trained = Tolerance(rtol=TRAIN_RTOL), TRAIN_ITERATIONS
        chosen = trained if self.training else self.evaluated
        self.layer.tolerance, self.layer.max_iterations = chosen

    def penalty(self, x: Tensor, z: Tensor) -> Tensor:
        """Of the first sample: max(0, spectral radius of ∂g/∂x − BOUND)²."""
        penalty, v = jacobian_penalty(
            self.layer.g, x[:1].detach(), z[:1].detach(), bound=BOUND, v=self.v
        )
        self.v.copy_(v)
        return penalty


def layer_of(g: ConvStep) -> FixedPointLayer:
    """The layer around a step; `Refined.set_tolerance` has the rest."""
    return FixedPointLayer(
        g,
        solver=Anderson(history=5),
        adjoint=ImplicitAdjoint(
            tolerance=Tolerance(rtol=ADJOINT_RTOL), max_iterations=ADJOINT_ITERATIONS
        ),
        on_failure="return",  # the log counts what did not converge
    )
