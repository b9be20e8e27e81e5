"""The user's state as the solver's one tensor, and what a solve demands of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class State(NamedTuple):
    """A state, and the way there and back."""

    packed: Tensor
    pack: Callable[[Any], Tensor]
    unpack: Callable[[Tensor], Any]
    tuple_state: tuple[tuple[int, ...], ...] = ()  # shapes of a tuple's parts, a sample each


def state_of(x0: Any) -> State:
    """The state like x0: a tensor [B, ...], or a tuple of them."""
    if not isinstance(x0, (tuple, list)):
        _check_part("x0", x0)
        return State(x0, same, same)
    parts = tuple(x0)
    if not parts:
        raise ValueError("fixed_point: x0 must hold at least one tensor (got an empty tuple)")
    for i, part in enumerate(parts):
        name = f"x0[{i}]"
        _check_part(name, part)
        for what in ("dtype", "device"):
            if getattr(part, what) != getattr(parts[0], what):
                raise ValueError(
                    f"fixed_point: {name} must have the {what} of x0[0], "
                    f"{getattr(parts[0], what)} (got {getattr(part, what)})"
                )
        if part.shape[0] != parts[0].shape[0]:
            raise ValueError(
                f"fixed_point: {name} must have the batch size of x0[0], {parts[0].shape[0]} "
                f"(got {part.shape[0]})"
            )
    shapes = tuple(tuple(part.shape[1:]) for part in parts)
    sizes = [part.shape[1:].numel() for part in parts]

    def pack(x: Any) -> Tensor:
        check_tuple("fixed_point", x, len(shapes))
        for i, (part, shape) in enumerate(zip(x, shapes, strict=True)):
            if not isinstance(part, Tensor):
                raise TypeError(
                    f"fixed_point: g must return tensors (got {type(part).__name__} at {i})"
                )
            if part.shape[1:] != shape:
                raise ValueError(
                    f"fixed_point: g must return shape [B, {', '.join(map(str, shape))}] at {i} "
                    f"(got {tuple(part.shape)})"
                )
            if part.shape[0] != x[0].shape[0]:
                raise ValueError(
                    "fixed_point: g must return one batch size, that of x, in all tensors (got "
                    f"{x[0].shape[0]} at 0 and {part.shape[0]} at {i})"
                )
        return torch.cat([part.reshape(part.shape[0], part.shape[1:].numel()) for part in x], 1)

    make = getattr(type(x0), "_make", tuple)  # a named tuple stays one

    def unpack(x: Tensor) -> Any:
        rows = x.shape[0]
        return make(
            part.reshape(rows, *shape)
            for part, shape in zip(x.split(sizes, 1), shapes, strict=True)
        )

    return State(pack(parts), pack, unpack, shapes)


def same(x: Tensor) -> Tensor:
    """A tensor is its own state."""
    return x


def check_tuple(owner: str, x: Any, n: int) -> None:
    """Raise unless g's value is a tuple of n."""
    if not isinstance(x, (tuple, list)) or len(x) != n:
        got = f"{len(x)} items" if isinstance(x, (tuple, list)) else type(x).__name__
        raise TypeError(f"{owner}: g must return a tuple of {n} tensors like x0 (got {got})")


_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def _check_part(name: str, part: Any) -> None:
    if not isinstance(part, Tensor):
        what = "a tensor or a tuple of tensors" if name == "x0" else "a tensor"
        advice = ""
        if isinstance(part, dict):
            advice = (
                "; write tuple(d.values()), and in g put the dict together and take it apart: "
                "lambda x, *z: tuple(g(dict(zip(d, x)), *z).values())"
            )
        raise TypeError(f"fixed_point: {name} must be {what} (got {type(part).__name__}){advice}")
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
                f"fixed_point: {name} must be real (got {part.dtype}); start from "
                f"torch.view_as_real({name}), and take torch.view_as_complex(x) in g"
            )
        raise TypeError(
            f"fixed_point: {name} must be float64, float32, float16 or bfloat16 (got "
            f"{part.dtype}); write {name}.float()"
        )
    refuse_freed("fixed_point", name, part)
    if part.dim() == 0:
        raise ValueError(
            f"fixed_point: {name} must have a batch dimension first (got a scalar); write "
            "x0.reshape(1, 1)"
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
