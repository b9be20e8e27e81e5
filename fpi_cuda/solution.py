"""What a solve returns, and how it says that samples failed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from ._torch import stripped, transforming, tree_map
from ._torch_graphs import apart
from .options import Tolerance
from .record import Account, Record
from .status import Status
from .tree import build, flatten, paths

__all__ = ["FixedPointError", "FixedPointWarning", "Record", "Solution", "Status", "Tolerance"]

State = Any  # a tensor, or a tuple, list, dict or dataclass of them, nested


def each(f: Callable[[Tensor], Tensor], x: State) -> State:
    """The function of every tensor of a state, in the same structure.

    f is written in Python: of torch's own functions torch.compile takes one for another, where its
    graph breaks in here.
    """
    if isinstance(x, Tensor):
        return f(x)
    leaves, tree = flatten(x)
    return build(tree, map(f, leaves))


class FixedPointWarning(UserWarning):
    """Some samples did not converge."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside this package and torch that led here."""
    level, frame = 1, sys._getframe()
    while frame is not None and _of_ours(frame):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=level)


def _of_ours(frame: FrameType) -> bool:
    file, module = frame.f_code.co_filename, frame.f_globals.get("__name__")
    compiled = isinstance(module, str) and module.startswith("torch.")
    return compiled or file.startswith(_OURS)


_OURS = ("<eval_with_key>", *(str(Path(file).parent) for file in (__file__, str(torch.__file__))))


class FixedPointError(RuntimeError):
    """Some samples did not converge and `on_failure="raise"`; `solution` holds the whole record."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


@dataclass(eq=False, repr=False)
class Solution(Account):
    """The fixed point and the per-sample record of the solve that found it.

    Attributes:
        x: the fixed point x̂ = g(x, ·) of the last iterate, shaped like x0, attached to autograd.
            Where the status is NONFINITE: the plain iterate at which g was not finite.
        status: int8 [B], members of `Status`.
        iterations: int32 [B].
        residual_norm: [B], ‖g(x) − x‖₂ of the iterate whose g is returned, over all tensors of x,
            and weighted where `norm_weights` were given; likewise what else is a norm here.
        residual_at_x: [B], the same of x itself, evaluated when it is asked for.
        retreats: int32 [B], Anderson's mixtures that were taken back.
        contraction, error_estimate: [B]; see `docs/math.md`. `error_bound`: [B] or None.
        evaluations: calls of g, those included by which "auto" looks at how samples depend, and two
            by which a solve that did not converge sees whether g is random.
        path: which backend and driver ran, and why.
        adjoint: the record of the last backward solve, or None before one.
        tangent: likewise of forward mode.
        trace: [T, B] where `trace=True` asked for it, else None: each sample's residual_norm by
            iteration, NaN after its own last one; trace_iterations: int32 [T], which those are.
        aux: with `has_aux=True` what g returned beside x̂, attached; else None.
        checkpoints: with `checkpoints=` g of each iterate asked for, shaped like x0 and attached by
            that call of g; else ().

    Under `torch.vmap` the record's tensors are plain and carry the mapped dimension first (a trace
    behind T).
    """

    x: State
    record: Record
    aux: Any = None
    checkpoints: tuple[State, ...] = ()
    _again = cast(Any, None)  # of an instance: what calls g once more; see `solve.again`

    def __repr__(self) -> str:
        leaves, tree = flatten(self.x)
        shapes = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in leaves]
        if not isinstance(self.x, (Tensor, tuple)):
            named = zip(paths(tree), shapes, strict=True)
            shapes = [f"{place} {shape}" for place, shape in named]
        return f"Solution(x {', '.join(shapes)}; {self.record.summary()})"

    @property
    def evaluations(self) -> int:
        """Calls of g; in an exported program a tensor without dimensions."""
        return self.record.evaluations  # type: ignore[no-any-return]

    @property
    def residual_at_x(self) -> Tensor:
        """[B], ‖g(x̂) − x̂‖₂ at the x̂ returned: one call of g when first asked for, then kept.

        The test was of the iterate before, of which x̂ is g's value: where g expands, this may be
        larger than `residual_norm` and than the tolerance. On the whole batch, in the accumulate
        dtype, under the solve's autocast; g's Python values are those of now, and buffers those
        that the solve left. Every process asks, where `fully_shard` spreads parameters.

        Raises:
            RuntimeError: g or a tensor that the solve was given is gone, since a solution keeps
                none of them alive; or one, x or a parameter was written to since, or a module's
                mode changed (a write through .data is seen by nobody); or the solve ran under a
                torch.func transform, in torch.export, on the meta device or of fake tensors, or
                this is the copy of a solution that was not asked.
        """
        again = self._again
        if again is None:
            raise RuntimeError(
                "Solution.residual_at_x needs a solve of this process that ran under no torch.func "
                "transform, not in torch.export, not on the meta device and not of fake tensors, "
                "or its value from before a copy was made; compute it from g"
            )
        if again.value is None:
            again.value = apart(again, self.x)
            self.record.evaluations += 1
        return again.value  # type: ignore[no-any-return]

    @property
    def path(self) -> str:
        """Which backend and driver ran."""
        return self.record.path

    @property
    def adjoint(self) -> Record | None:
        """The record of the last backward solve."""
        return self.record.adjoint

    @property
    def tangent(self) -> Record | None:
        """The record of the last solve for a tangent."""
        return self.record.tangent

    @property
    def trace(self) -> Tensor | None:
        """[T, B], `residual_norm` after each of trace_iterations; NaN where a sample had ended.

        `plt.semilogy(s.trace_iterations, s.trace)` draws a line a sample. Of a long solve 513 to
        1024 iterations are kept: the first, and every 2nd, 4th, ... after it. Where Anderson took a
        mixture back (`retreats`), the residual before it stands once more. None: not asked for.
        """
        return self.record.trace

    @property
    def trace_iterations(self) -> Tensor | None:
        """Int32 [T], the iterations of `trace`, counted from 1."""
        return self.record.trace_iterations

    def detach(self) -> Solution:
        """The same with x, checkpoints and aux's tensors cut from the graph: keeps none alive.

        What torch's pytrees do not look into (an object of your own) is left out of aux.
        """
        cut = self._without_aux()
        if self.aux is not None:
            cut.aux = tree_map(_cut, self.aux)
        cut.checkpoints = tuple(each(lambda t: t.detach(), x) for x in self.checkpoints)
        return cut

    def _without_aux(self) -> Solution:
        cut = Solution(each(lambda t: t.detach(), self.x), self.record)
        if self._again is not None:
            cut._again = self._again
        return cut


def _cut(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach()
    return leaf if isinstance(leaf, _PLAIN) else None


_PLAIN = (bool, int, float, complex, str, bytes)


def kept(solution: Solution) -> Solution:
    """The same for a layer to keep: detached, without aux and the wrappers of torch.func.

    Those end with their transform. Mapped dimensions come first, as in the record.
    """
    kept = solution._without_aux()
    if not torch.compiler.is_compiling() and transforming():
        kept.x = each(lambda t: stripped(t, lambda t, dim: t.movedim(dim, 0)), kept.x)
    return kept
