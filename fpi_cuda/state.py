"""The user's state as the solver's one tensor, and what a solve demands of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._torch import exporting, jit_tracing
from .tree import Mismatch, Tree, build, flatten, leaves_like, paths, signature


class State(NamedTuple):
    """A state, and the way there and back."""

    packed: Tensor
    pack: Callable[[Any], Tensor]
    unpack: Callable[[Tensor], Any]
    structure: Hashable = ()  # of one that is not packed as it is: what tells it from others


def state_of(x0: Any, weights: Any = None) -> State:
    """The state like x0: a tensor [B, ...], or a tree of them; see `fixed_point`.

    One real tensor is packed as it is. Else the rows of all leaves, [B, n_i], stand side by side, a
    complex number as two real ones, and those of a leaf with the weight w_i times √w_i: then ‖·‖ of
    a packed row is the norm asked for, and nobody else needs to know.
    """
    if isinstance(x0, Tensor):
        _check_part("x0", x0)
        if weights is not None:
            raise ValueError(
                "fixed_point: norm_weights weigh the tensors of a state against each other, and x0 "
                "is one tensor; leave them out (atol alone says what is small)"
            )
        if not x0.is_complex():
            return State(x0, same, same)
    if type(x0) is list:
        x0 = tuple(x0)
    parts, tree = flatten(x0)
    if tree is None and not isinstance(x0, Tensor):
        raise TypeError(
            "fixed_point: x0 must be a tensor or a tuple, list, dict or dataclass of tensors (got "
            f"{type(x0).__name__})"
        )
    if not parts:
        raise ValueError(
            f"fixed_point: x0 must hold at least one tensor (got an empty {type(x0).__name__})"
        )
    places = paths(tree)
    _check_parts([f"x0{place}" for place in places], parts)
    dtype = parts[0].dtype.to_real()
    scales = [1.0] * len(parts) if weights is None else _scales(tree, places, weights, dtype)
    leaves = [
        _Leaf(place, tuple(part.shape[1:]), part.dtype, scale, _size(part))
        for place, part, scale in zip(places, parts, scales, strict=True)
    ]
    sizes = [leaf.size for leaf in leaves]

    def pack(x: Any) -> Tensor:
        try:
            parts = leaves_like(tree, x)
        except Mismatch as error:
            at = f" at {error.place}" if error.place else ""
            raise TypeError(
                f"fixed_point: g must return {error.node} like x0{at} (got {error.got})"
            ) from None
        alone = len(parts) == 1
        rows = [leaf.row(part, alone) for leaf, part in zip(leaves, parts, strict=True)]
        for leaf, row in zip(leaves, rows, strict=True):
            if row.shape[0] != rows[0].shape[0]:
                raise ValueError(
                    "fixed_point: g must return one batch size, that of x, in all tensors (got "
                    f"{rows[0].shape[0]} at {places[0]} and {row.shape[0]} at {leaf.place})"
                )
            if row.device != rows[0].device:
                raise ValueError(
                    "fixed_point: g must return all tensors on x's device (got "
                    f"{rows[0].device} at {places[0]} and {row.device} at {leaf.place})"
                )
        return rows[0] if alone else torch.cat(rows, 1)

    def unpack(x: Tensor) -> Any:
        alone = len(sizes) == 1
        rows = (x,) if alone else x.split(sizes, 1)
        return build(tree, [leaf.part(row, alone) for leaf, row in zip(leaves, rows, strict=True)])

    return State(pack(x0), pack, unpack, (signature(tree), tuple(leaves)))


class _Leaf(NamedTuple):
    """One tensor of a state: its place, a sample's shape, its dtype, what scales its row."""

    place: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: float
    size: int  # real numbers of a sample

    def row(self, part: Any, alone: bool) -> Tensor:
        """[B, size] of what g returned there; alone: it is all of the state.

        Beside others a row, and its gradient, may begin where in memory no complex number can: a
        view of it as one, or as pairs of real numbers, would fail.
        """
        if not isinstance(part, Tensor):
            raise TypeError(
                f"fixed_point: g must return tensors (got {type(part).__name__}{self._at})"
            )
        shape = part.shape
        if not shape or shape[1:] != self.shape:
            raise ValueError(
                f"fixed_point: g must return shape [{', '.join(map(str, ('B', *self.shape)))}]"
                f"{self._at} (got {tuple(shape)})"
            )
        if part.dtype != self.dtype:
            part = self._converted(part)
        if self.dtype.is_complex and alone:
            part = torch.view_as_real(part.resolve_conj())
        elif self.dtype.is_complex:
            part = torch.stack((part.real, part.imag), -1)
        row: Tensor = part.reshape(shape[0], self.size)
        return row if self.scale == 1 else row * self.scale

    def part(self, row: Tensor, alone: bool) -> Tensor:
        """The tensor of such a row."""
        if self.scale != 1:
            row = row / self.scale
        if not self.dtype.is_complex:
            return row.reshape(row.shape[0], *self.shape)
        pairs = row.reshape(row.shape[0], *self.shape, 2)
        if not alone:
            return torch.complex(pairs[..., 0], pairs[..., 1])
        # Cloned, since torch.compile takes no complex view of a real tensor that is flat.
        return torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format))

    @property
    def _at(self) -> str:
        return f" at {self.place}" if self.place else ""

    def _converted(self, part: Tensor) -> Tensor:
        real = part.is_floating_point() and self.dtype.is_floating_point
        if real and not part.is_meta and torch.is_autocast_enabled(part.device.type):
            return part.to(self.dtype)
        advice = "convert x0, the inputs or the parameters to one dtype"
        if self.dtype.is_complex and not part.is_complex():
            advice = f"write .to({self.dtype})"
        elif part.is_complex() and not self.dtype.is_complex:
            advice = f"take its real part, or start from a complex one, x0{self.place} + 0j"
        raise TypeError(
            f"fixed_point: g must return x's dtype, {self.dtype}{self._at and ',' + self._at} (got "
            f"{part.dtype}); {advice}"
        )


def _size(t: Tensor) -> int:
    return t.shape[1:].numel() * (2 if t.is_complex() else 1)


def _check_parts(names: Sequence[str], parts: Sequence[Any]) -> None:
    """Raise unless the tensors of x0 make one state."""
    for name, part in zip(names, parts, strict=True):
        _check_part(name, part)
        first = parts[0]
        real = part.dtype.to_real(), first.dtype.to_real()
        if real[0] != real[1]:
            like = f"{real[1]}, or be complex of it" if part.is_complex() else f"{real[1]}"
            raise ValueError(
                f"fixed_point: {name} must have the dtype of {names[0]}, {like} (got {part.dtype})"
                "; a state has one norm in one precision, so convert one of them"
            )
        if part.device != first.device:
            raise ValueError(
                f"fixed_point: {name} must have the device of {names[0]}, {first.device} (got "
                f"{part.device})"
            )
        if part.shape[0] != first.shape[0]:
            raise ValueError(
                f"fixed_point: {name} must have the batch size of {names[0]}, {first.shape[0]} "
                f"(got {part.shape[0]})"
            )


def _scales(tree: Tree, places: Sequence[str], weights: Any, dtype: torch.dtype) -> Sequence[float]:
    """The square root of each leaf's weight."""
    try:
        given = leaves_like(tree, weights)
    except Mismatch as error:
        raise TypeError(
            "fixed_point: norm_weights must be numbers in the structure of x0, "
            f"{error.node}{error.place and ' at ' + error.place} (got {error.got})"
        ) from None
    least = torch.finfo(dtype).tiny
    scales = []
    for place, w in zip(places, given, strict=True):
        if not isinstance(w, Real) or isinstance(w, bool):
            raise TypeError(
                f"fixed_point: norm_weights{place} must be a number > 0 (got {type(w).__name__})"
            )
        scale = math.sqrt(w) if 0 < float(w) < math.inf else math.nan
        if not least <= scale <= 1 / least:
            raise ValueError(
                f"fixed_point: norm_weights{place} must be a finite number > 0 whose square root "
                f"and its inverse {dtype} holds (got {w!r})"
            )
        scales.append(scale)
    return scales


def same(x: Tensor) -> Tensor:
    """A tensor is its own state."""
    return x


def check_tuple(owner: str, x: Any, n: int) -> None:
    """Raise unless g's value is a tuple of n."""
    if not isinstance(x, (tuple, list)) or len(x) != n:
        got = f"{len(x)} items" if isinstance(x, (tuple, list)) else type(x).__name__
        raise TypeError(f"{owner}: g must return a tuple of {n} tensors like x0 (got {got})")


_REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = frozenset({*_REAL, torch.complex128, torch.complex64})


def _check_part(name: str, part: Any) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"fixed_point: {name} must be a tensor (got {type(part).__name__})")
    if type(part) is not Tensor:
        refuse_sharded(name, part)
    if part.is_nested:
        raise TypeError(
            f"fixed_point: {name} must have one shape for all samples (got a nested tensor); write "
            f"torch.nested.to_padded_tensor({name}, 0.0), and let g leave the padding at zero"
        )
    if part.layout != torch.strided:
        raise TypeError(
            f"fixed_point: {name} must be dense (got {part.layout}); write {name}.to_dense()"
        )
    if part.dtype not in _DTYPES:
        if part.is_complex():
            raise TypeError(
                f"fixed_point: {name} must be complex64 or complex128 (got {part.dtype}); write "
                f"{name}.to(torch.complex64), or start from torch.view_as_real({name}) and take "
                "torch.view_as_complex(x) in g"
            )
        raise TypeError(
            f"fixed_point: {name} must be float64, float32, float16 or bfloat16 (got "
            f"{part.dtype}); write {name}.float()"
        )
    refuse_freed("fixed_point", name, part)
    if part.dim() == 0:
        raise ValueError(
            f"fixed_point: {name} must have a batch dimension first (got a scalar); write "
            f"{name}.reshape(1, 1)"
        )


_PLAIN = frozenset({Tensor, nn.Parameter})


def refuse_freed(owner: str, name: str, *tensors: Tensor) -> None:
    """Raise where a storage was freed: a tensor keeps its shape then, and torch may read null."""
    for t in tensors:
        try:
            if type(t) not in _PLAIN or (t.data_ptr() and not t.storage_offset()):
                continue  # no question of the storage, which costs more
            if t.untyped_storage().nbytes() or not t.numel():
                continue
        except RuntimeError:  # sparse, or inside a transform of torch.func: no memory of its own
            continue
        raise ValueError(
            f"{owner}: {name} must have its values in memory (got shape {tuple(t.shape)} whose "
            "storage was freed, as untyped_storage().resize_(0) does); fill it again before the "
            "solve, and free it after the backward"
        )


def refuse_sharded(name: str, t: Tensor) -> None:
    """Raise where a tensor is spread over processes, each of which would stop by its own part."""
    if type(t) is not Tensor and hasattr(type(t), "full_tensor"):
        raise TypeError(
            f"fixed_point: {name} must be a plain tensor (got {type(t).__name__}); write "
            f"{name}.to_local() for this process's samples, or {name}.full_tensor() for all, and "
            "solve in each process"
        )


def check_inputs(g: Any, inputs: Sequence[Any], params: Sequence[Any], x: Tensor) -> None:
    """Raise unless g and its tensors are such as a solve for x takes."""
    if not callable(g):
        raise TypeError(f"fixed_point: g must be callable (got {type(g).__name__})")
    if not isinstance(params, (tuple, list)):
        raise TypeError(
            "fixed_point: params must be a tuple or list of tensors (got "
            f"{type(params).__name__}); write params=(w,)"
        )
    device = x.device
    for name, group in (("inputs", inputs), ("params", params)):
        for i, t in enumerate(group):
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"fixed_point: {name}[{i}] must be a tensor (got {type(t).__name__}); "
                    + _instead(t)
                )
            if type(t) is not Tensor:
                refuse_sharded(f"{name}[{i}]", t)
            if t.device != device and not (t.dim() == 0 and group is params):
                raise ValueError(
                    f"fixed_point: {name}[{i}] must be on x0's device, {device} (got {t.device}); "
                    f"write {name}[{i}].to(x0.device)"
                )
    refuse_freed("fixed_point", "a tensor of inputs or params", *inputs, *params)
    b = x.shape[0]
    for i, t in enumerate(inputs):
        if t.dim() == 0 or t.shape[0] != b:
            raise ValueError(
                f"fixed_point: inputs[{i}] must have the batch size {b} as first dimension (got "
                f"shape {tuple(t.shape)}); a tensor that the batch shares goes into params=(...), "
                "or to a layer by its name in g"
            )


def _instead(value: Any) -> str:
    """How a value that is no tensor reaches g."""
    if isinstance(value, (tuple, list)) and value and all(isinstance(t, Tensor) for t in value):
        return "pass its tensors one by one, and take them together: lambda x, *u: g(x, u)"
    return "bind other values to g with functools.partial"


def refuse_recorders(owner: str) -> None:
    """Raise where a recorder of programs runs a loop that asks Python whether to go on."""
    refuse_jit(owner)
    if exporting():
        raise RuntimeError(
            f"{owner}: can't be exported, since its conditions are asked in Python; export a "
            "fpi_cuda.FixedPointLayer around the same g (docs/deploy.md)"
        )


def refuse_jit(owner: str) -> None:
    """Raise under torch.jit.trace, which would keep this call's number of iterations for good."""
    if jit_tracing():
        raise RuntimeError(
            f"{owner}: torch.jit.trace records as many iterations as its example takes, and would "
            "repeat those for every input; use torch.export.export, which keeps the loop "
            "(docs/deploy.md)"
        )
