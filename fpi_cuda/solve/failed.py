"""What is made of samples that failed: zero gradients of every order, whatever they hold.

To zero a failed sample's cotangent is not enough. Its derivative may be infinite, and zero times
infinity, like zero times NaN, is NaN, in a sum over the batch everybody's. So g is linearised with
a kept sample's row in the place of the failed one's, which gets no gradient itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import of_vmap
from .._torch_graphs import recording, unrecorded
from ..derivatives import Scalar
from ..operators import linear_in, partial_bound, taking
from .maps import LinearMap, Map, VmappedMap
from .problem import Problem
from .rows import stood, with_row

__all__ = ["Gradients", "every", "finite", "masked", "of_kept", "pairing", "pull", "pulled_back"]
__all__ += ["stand_in", "unmapped"]


class Gradients(NamedTuple):
    """What a backward finds."""

    of: Sequence[Tensor | None]  # of each tensor that is asked for
    c: Tensor | None = None  # the adjoint; None: under torch.func, or part of a higher order
    keep: Tensor | None = None  # the samples whose adjoint did not fail; None: all


# Of a problem, x, v and tensors that may be linearised at every sample; last, bool [B]: those for
# which no other one stands in (None: all).
Follow = Callable[[Problem, Tensor, Tensor, Sequence[Tensor], Tensor | None], Gradients]


def every(keep: Tensor) -> bool:
    """Whether all samples are kept; waits for the device."""
    if recording():
        with unrecorded():
            return bool(keep.all())
    return bool(keep.all())


def finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether nothing in them is NaN or Inf; waits for the device."""
    return all(t is None or bool(t.isfinite().all()) for t in gradients)


def masked(c: Tensor, keep: Tensor | None) -> Tensor:
    """C with zeros where it is not kept: bool [*batch], or None: all is."""
    return c if keep is None else torch.where(like(keep, c), c, 0)


def stand_in(keep: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, [B, ...], with a kept sample's row for those that are not, as a constant."""
    return [with_row(keep, t) for t in tensors]


def of_kept(
    problem: Problem,
    keep: Tensor,
    x: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    need: Sequence[int],
    follow: Follow,
) -> Gradients:
    """What `follow` gives, of the samples that are kept: bool [*batch].

    The others are replaced by one that is kept, and where there is none the value and every
    derivative are cut off.
    """
    alive: Tensor | None = None
    if of_vmap(keep):  # no host can look
        alive = keep.any()
    elif every(keep):
        return follow(problem, x, v, tensors, None)
    elif every(~keep):
        never = keep.new_zeros(())  # attached all the same: asked for again, they are zero again
        zeros = [torch.where(never, tensors[i], 0) for i in need]
        return Gradients(zeros, torch.zeros_like(x), keep)
    if problem.batch_dims > 1:  # samples of one slice stand in for its own alone
        return Gradients(_by_slices(problem, keep, x, v, tensors, need, follow))
    if alive is not None:
        x, *tensors = (torch.where(alive, t, t.detach()) for t in (x, *tensors))
    n = problem.map.n_inputs
    x, *inputs = stand_in(keep, (x, *tensors[:n]))
    found = follow(problem, x, masked(v, keep), [*inputs, *tensors[n:]], keep)
    # A tensor that g captures may hold Inf in the sample's own row.
    grads = [
        masked(g, keep) if g is not None and i < n else g
        for i, g in zip(need, found.of, strict=True)
    ]
    if alive is not None:
        grads = [g if g is None else torch.where(alive, g, 0) for g in grads]
    return found._replace(of=grads)


def pulled_back(
    problem: Problem,
    keep: Tensor,
    x: Tensor,
    c: Tensor,
    tensors: Sequence[Tensor],
    need: Sequence[int],
) -> Sequence[Tensor | None]:
    """`pull`, of the samples that are kept."""

    def follow(
        problem: Problem, x: Tensor, c: Tensor, tensors: Sequence[Tensor], keep: Tensor | None
    ) -> Gradients:
        grads = pull(problem, x, c, tensors, need)
        if keep is not None and not of_vmap(keep) and not finite(grads):
            other = stood(problem, keep, x, tensors)
            grads = grads if other is problem else pull(other, x, c, tensors, need)
        return Gradients(grads)

    return of_kept(problem, keep, x, c, tensors, need, follow).of


def pull(
    problem: Problem, x: Tensor, c: Tensor, tensors: Sequence[Tensor], need: Sequence[int]
) -> Sequence[Tensor]:
    """(∂g/∂tensor)ᵀ c at x (paper eq. 11), differentiable again."""
    return partial_bound(pairing(problem), [2 + i for i in need], x, c, *tensors)


def pairing(problem: Problem) -> Scalar:
    """h(x, c, *tensors) = ⟨c, g(x, *tensors)⟩ (paper eq. 11)."""

    def h(x: Tensor, c: Tensor, *tensors: Tensor) -> Tensor:
        with problem.context.autocast():
            return problem.map.paired(c, x, *tensors)

    return linear_in(taking(h, [2 + i for i in problem.map.taken]), [[1]])


def _by_slices(
    problem: Problem,
    keep: Tensor,
    x: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    need: Sequence[int],
    follow: Follow,
) -> list[Tensor]:
    """`of_kept` of the problem that torch.vmap mapped, mapped."""
    map, dims = unmapped(problem.map)
    one = problem._replace(map=map, batch_dims=problem.batch_dims - 1)

    def of_slice(keep: Tensor, x: Tensor, v: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(of_kept(one, keep, x, v, tensors, need, follow).of)  # type: ignore[arg-type]

    grads = torch.vmap(of_slice, in_dims=(0, 0, 0, *dims))(keep, x, v, *tensors)
    return [g.sum(0) if dims[i] is None else g for i, g in zip(need, grads, strict=True)]


def unmapped(map: Map) -> tuple[Map, Sequence[int | None]]:
    """What `Map.mapped` made the map of: the map before, and which of its tensors are mapped."""
    if isinstance(map, LinearMap):
        inner, dims = unmapped(map.inner)
        return LinearMap(inner, map.transpose), (0, 0, *dims)
    assert isinstance(map, VmappedMap)
    return map.inner, map.dims


def like(keep: Tensor, t: Tensor) -> Tensor:
    """[*batch] with a dimension of 1 for each of t that it lacks."""
    return keep.reshape(*keep.shape, *(1,) * (t.dim() - keep.dim()))
