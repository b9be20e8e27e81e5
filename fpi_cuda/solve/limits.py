"""When the samples of a solve stop: its tolerances and limits as the step operators take them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import Tolerance
from ..record import Limits, accumulate_dtype
from .problem import Problem

__all__ = ["check_values", "limits_of", "of_numbers", "own_limits"]

MOST = 2**24  # of a sample's own limit: the kernels take it as float32, which skips numbers above


class Cut(Limits):
    """Of a solve that may end before it converges: as with a fixed count, that is no failure."""

    @property
    def counted(self) -> bool:
        """All do what was asked."""
        return True


def limits_of(
    problem: Problem, start: Tensor, *, adjoint: bool, rounded: torch.dtype | None = None
) -> Limits:
    """The stop rule of a solve that begins at start, [*batch, *sample].

    Under autocast default tolerances, and what counts as the rounding level, are those of the dtype
    that g computes in.

    Args:
        problem: what is solved.
        start: where.
        adjoint: whether it is a linear problem, whose test is relative to ‖v‖.
        rounded: the dtype that g's values are rounded to; None: the one that it computes in.

    Raises:
        ValueError: a sample's own tolerance or limit is out of range, or there is not one a sample.
    """
    options, dims, dtype = problem.options, problem.batch_dims, start.dtype
    computed = dtype
    if problem.context.autocast_dtype is not None:
        computed = problem.context.precision(dtype)
    rounded = rounded or computed
    size = start.shape[dims:].numel()
    tolerance, most, sizes = options.tolerance, options.max_iterations, options.sizes
    patience = MOST if problem.cut else options.solver.patience
    rtol, atol = tolerance.resolve(computed, adjoint=adjoint)
    if type(most) is not int and isinstance(most, Tensor) and most.dim() == 0:
        most = int(most)
    if type(most) is int and not tolerance.own and sizes is None:
        return of_numbers(rtol, atol, size, rounded, patience, most, problem.cut)
    batch = start.shape[:dims]
    check_values(problem.name, options.tolerance, most, batch[-1])
    if sizes is not None:
        _check_sizes(problem.name, sizes, size, batch[-1])
    if not batch.numel():
        return of_numbers(0.0, 0.0, size, rounded, patience, 1)

    root: float | Tensor = math.sqrt(size)  # of the entries that a sample has
    if sizes is not None:
        root = sizes.to(start.device, torch.float64).sqrt()
    given = (rtol, atol), most, root, patience, start, batch[-1:]
    own = own_limits(*given, rounded, coupled=problem.samples.coupled)
    least, longest = torch.stack((own[:, 0].amin(), own[:, 3].amax())).tolist()
    slices = own.expand(*batch, 5).reshape(-1, 5)  # of torch.vmap, which share them
    grows = _grows(rounded)
    level, spread = _rounding(rounded, size if grows else 1), 1.0 if grows else root
    if isinstance(spread, Tensor):
        spread = spread.to(own.dtype).expand(batch).reshape(-1)
    more: Any = {"precision": rounded, "spread": spread}
    return _kind(problem.cut)(least, 0.0, level, patience, int(longest), slices, **more)


def own_limits(
    tolerance: tuple[float | Tensor, float | Tensor],
    most: int | Tensor,
    root: float | Tensor,
    patience: int,
    start: Tensor,
    batch: Sequence[int],
    rounded: torch.dtype,
    *,
    coupled: bool,
) -> Tensor:
    """What each sample is told of its own, [B, 5]: see `Limits`; its values are not looked at.

    Args:
        tolerance: rtol and atol, numbers or [B].
        most: iterations, likewise.
        root: √N of the entries that a sample has, likewise.
        patience: the solver's.
        start: a state of the solve.
        batch: (B,).
        rounded: the dtype that g's values are rounded to.
        coupled: whether the batch is one system.
    """
    acc = accumulate_dtype(start.dtype)

    def column(value: float | Tensor, factor: float | Tensor = 1.0) -> Tensor:
        if isinstance(value, Tensor):
            wide = value.to(start.device, torch.float64)
        else:
            wide = torch.full(batch, value, dtype=torch.float64, device=start.device)
        least = torch.finfo(acc).tiny * wide.sign()  # what rounds to 0 is no fixed count
        return torch.maximum(factor * wide, least).to(acc)

    rtol, offset = column(tolerance[0]), column(tolerance[1], root)
    limit = column(most if isinstance(most, Tensor) else min(most, 2**30))
    counted = (rtol == 0) & (offset == 0)
    if coupled:  # one system: it may take what any sample may; one's count is all's
        limit, counted = limit.amax().expand_as(limit), counted.any().expand_as(counted)
        rtol, offset = (torch.where(counted, 0, t) for t in (rtol, offset))
    rounding = column(_rounding(rounded, 1), root if _grows(rounded) else 1.0)
    return torch.stack((rtol, offset, torch.where(counted, limit, patience), limit, rounding), 1)


@functools.lru_cache(maxsize=64)
def of_numbers(
    rtol: float,
    atol: float,
    size: int,
    dtype: torch.dtype,
    patience: int,
    max_iterations: int,
    cut: bool = False,
) -> Limits:
    """The stop rule of samples that share it, of so many entries each."""
    if rtol == atol == 0:  # a fixed count runs to its end, at the rounding level too
        patience = max_iterations
    root, grows = math.sqrt(size), _grows(dtype)
    level, spread = _rounding(dtype, size if grows else 1), 1.0 if grows else root
    own = rtol, atol * root, level, patience, max_iterations
    return _kind(cut)(*own, precision=dtype, spread=spread)


def _kind(cut: bool) -> type[Limits]:
    return Cut if cut else Limits


def _grows(dtype: torch.dtype) -> bool:
    """Whether a solve is stalled below 16 u √N ‖g(x)‖; else below 16 u ‖g(x)‖.

    In a half type the first is soon above ‖g(x)‖, and any solve that falls late would be stalled.
    """
    return torch.finfo(dtype).bits > 16


def _rounding(dtype: torch.dtype, size: int) -> float:
    return 8 * torch.finfo(dtype).eps * math.sqrt(size)  # 16 roundings


def check_values(owner: str, tolerance: Tolerance | None, most: Any, b: int) -> None:
    """Raise unless what is said of each sample is so, in tensors [B], and in range.

    Raises:
        ValueError: it is not.
    """
    if tolerance is not None:
        for name in ("rtol", "atol"):
            t, top = getattr(tolerance, name), torch.finfo(torch.float64).max
            if isinstance(t, Tensor):
                _check(owner, f"tolerance.{name}", t, 0, top, "finite and >= 0", b)
    if isinstance(most, Tensor) and most.dim() == 1:
        _check(owner, "max_iterations", most, 1, MOST, f"from 1 to {MOST}", b)


def _check_sizes(owner: str, sizes: Tensor, n: int, b: int) -> None:
    what = f"from 1 to {n}, the entries of a padded sample,"
    advice = "; count entries: of a sequence, its length times its features"
    _check(owner, "sizes", sizes, 1, n, what, b, advice)


def _check(
    owner: str, name: str, t: Tensor, least: float, top: float, what: str, b: int, advice: str = ""
) -> None:
    if t.shape != (b,):
        raise ValueError(
            f"{owner}: {name} must have one value for each of the {b} samples of x0, shape [{b}] "
            f"(got shape {list(t.shape)}){advice}"
        )
    if t.is_meta or t.layout != torch.strided:
        place = "on the meta device" if t.is_meta else f"of layout {t.layout}"
        raise ValueError(f"{owner}: {name} must be a dense tensor with values (got one {place})")
    wide = t.double()  # some dtypes can't be compared
    good = (wide >= least) & (wide <= top)
    if not bool(good.all()):
        i = int(good.to(torch.uint8).argmin())
        got = t[i].item()
        raise ValueError(f"{owner}: {name} must be {what} (got {got} for sample {i}){advice}")
