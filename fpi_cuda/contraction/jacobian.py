"""Norm and spectral radius of ∂g/∂x at a point, by vector-Jacobian products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._torch import no_inference, normal
from ..derivatives import free, vjp
from ..norms import row_norms

Step = Callable[..., Tensor]


def jacobian_norm(
    g: Step, x: Tensor, *inputs: Tensor, v: Tensor | None = None, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """‖∂g/∂x‖₂ of every sample at x, by power iteration on (∂g/∂x)(∂g/∂x)ᵀ.

    The estimate is ‖(∂g/∂x)ᵀ v‖₂ at a v of length 1: never above the norm, and nearer to it with
    every iteration. Its derivative, with v held fixed, is the norm's own once v has converged.

    Args:
        g: a callable or module g(x, *inputs) that returns x's shape and treats samples apart.
        x: where to linearise, [B, ...], floating; often a solution's x. It gets no gradient.
        inputs: what g depends on besides x.
        v: where to start, shaped like x, of any length; a sample whose v is zero starts at random.
            None: all at random.
        iterations: power iterations, two vector-Jacobian products each.

    Returns:
        The estimates, [B], differentiable in `inputs` and in g's parameters; and the next v, shaped
        like x, of length 1: where the next call at the same or a nearby x goes on.

    Raises:
        TypeError: x is not a floating tensor, or g returns no tensor.
        ValueError: g's value or v is not shaped like x, or iterations < 1.

    Example:
        >>> x, z = torch.zeros(2, 3), torch.ones(2, 3)
        >>> norm, v = jacobian_norm(lambda x, z: 0.5 * torch.tanh(x) + z, x, z)
        >>> [round(n, 3) for n in norm.tolist()]
        [0.5, 0.5]
    """
    v, transposed = _linearise(g, x, inputs, v, iterations)
    with no_inference(), torch.enable_grad():
        for _ in range(iterations):
            v = unit(v).requires_grad_()
            u = transposed(v, True)
            size = _length(u)
            # u is (∂g/∂x)ᵀ v, linear in v: this is (∂g/∂x) u, at a length that no dtype is too
            # narrow for.
            v = vjp(u, v, u.detach() / _divisor(size.detach(), u))
    return size if torch.is_grad_enabled() else size.detach(), unit(v)


def jacobian_radius(
    g: Step, x: Tensor, *inputs: Tensor, v: Tensor | None = None, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """The spectral radius of ∂g/∂x for every sample at x, by power iteration on (∂g/∂x)ᵀ.

    The estimate is the growth of v in an iteration, ‖(∂g/∂x)ᵀ v‖₂ / ‖v‖₂, as the geometric mean
    over the last half of the iterations: a complex pair of eigenvalues makes single ones swing
    around it. Far from the converged v it may lie on either side; it is never above the norm.

    Args:
        g: as in `jacobian_norm`.
        x: where to linearise.
        inputs: what g depends on besides x.
        v: where to start, or None.
        iterations: power iterations, one vector-Jacobian product each.

    Returns:
        The estimates, [B], differentiable with v held fixed; and the next v, as in `jacobian_norm`.

    Raises:
        TypeError, ValueError: as in `jacobian_norm`.

    Example:
        >>> a = torch.tensor([[0.5, 100.0], [0.0, 0.4]])  # its norm is 100
        >>> radius, v = jacobian_radius(lambda x: x @ a.T, torch.zeros(1, 2), iterations=100)
        >>> round(radius.item(), 2)
        0.5
    """
    v, transposed = _linearise(g, x, inputs, v, iterations)
    growth = []
    for i in range(iterations):
        last = i >= iterations // 2  # only these are differentiated
        v = transposed(unit(v), last and torch.is_grad_enabled())
        if last:
            growth.append(_length(v))
    tiny = torch.finfo(v.dtype).tiny
    radius = torch.stack(growth).clamp_min(tiny).log().mean(0).exp()
    return radius, unit(v)


def jacobian_penalty(
    g: Step,
    x: Tensor,
    *inputs: Tensor,
    bound: float = 0.9,
    v: Tensor | None = None,
    measure: Callable[..., tuple[Tensor, Tensor]] = jacobian_radius,
) -> tuple[Tensor, Tensor]:
    """A loss term that keeps ∂g/∂x small at x: the mean over samples of max(0, measure − bound)².

    It is a soft constraint, seen only where it is evaluated: evaluate it at x̂, add a multiple of it
    to the loss, and hand v on from one training step to the next, so that one power iteration a
    step is enough. A few samples of a batch may be enough, too.

    Args:
        g: as in `jacobian_norm`.
        x: where to linearise.
        inputs: what g depends on besides x.
        bound: a measure up to this costs nothing; below 1.
        v: the one that the last call returned; None: random.
        measure: `jacobian_radius`, or `jacobian_norm` where g must contract in every step.

    Returns:
        The penalty, a scalar, differentiable in `inputs` and in g's parameters; and the next v.

    Raises:
        TypeError, ValueError: as in `jacobian_norm`, or bound is negative.

    Example:
        >>> net, v = torch.nn.Linear(3, 3), None
        >>> for z in torch.randn(5, 4, 3):
        ...     x = torch.zeros_like(z)
        ...     penalty, v = jacobian_penalty(lambda x, z: net(x) + z, x, z, bound=0.9, v=v)
        >>> penalty.shape, v.shape
        (torch.Size([]), torch.Size([4, 3]))
    """
    if not bound >= 0:
        raise ValueError(f"jacobian_penalty: bound must be >= 0 (got {bound!r})")
    size, v = measure(g, x, *inputs, v=v)
    return (size - bound).relu().square().mean(), v


def _linearise(
    g: Step, x: Tensor, inputs: tuple[Tensor, ...], v: Tensor | None, iterations: int
) -> tuple[Tensor, Callable[[Tensor, bool], Tensor]]:
    """V to start from, and v ↦ (∂g/∂x)ᵀ v, with its graph where that is asked for."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
        got = f"{x.dtype}, shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"∂g/∂x: x must be a floating tensor [B, ...] (got {got})")
    if v is not None and v.shape != x.shape:
        raise ValueError(
            f"∂g/∂x: v must have the shape of x, {tuple(x.shape)} (got {tuple(v.shape)}); "
            "where the shape changes from call to call, start with v=None"
        )
    if iterations < 1:
        raise ValueError(f"∂g/∂x: iterations must be >= 1 (got {iterations!r})")
    with no_inference(), torch.enable_grad():
        x = free(x)
        gx = g(x, *map(normal, inputs))
    if not isinstance(gx, Tensor):
        raise TypeError(f"∂g/∂x: g must return a tensor (got {type(gx).__name__})")
    if gx.shape != x.shape:
        raise ValueError(
            f"∂g/∂x: g must return the shape of x, {tuple(x.shape)} (got {tuple(gx.shape)})"
        )
    v = torch.randn_like(x) if v is None else v
    return v, lambda v, create_graph: vjp(gx, x, v, create_graph)


def _length(v: Tensor) -> Tensor:
    """[B]."""
    return row_norms(v.flatten(1), look=False).to(v.dtype)


def unit(v: Tensor) -> Tensor:
    """Each sample at length 1; a zero one, which no power iteration leaves, drawn anew."""
    v, shape = v.detach(), (-1, *(1,) * (v.dim() - 1))
    v = torch.where(_length(v).view(shape) > 0, v, torch.randn_like(v))
    return v / _length(v).view(shape)


def _divisor(lengths: Tensor, v: Tensor) -> Tensor:
    """Lengths, [B], to divide v by: a zero one stays."""
    return lengths.clamp_min(torch.finfo(v.dtype).tiny).view(-1, *(1,) * (v.dim() - 1))
