"""Where a layer starts by itself: zeros, in the shapes that it was told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._torch import attribute
from .arguments import Arguments
from .derivatives import differentiable
from .layout import joined
from .modules import Binding
from .solution import State
from .tree import Tree, build, flatten

__all__ = ["shapes_of", "start_of", "tree_of"]


def start_of(
    layer: Any, tensors: Sequence[Tensor], inputs: Sequence[Any], params: Any, keywords: Any
) -> State:
    """Zeros of the state's shapes.

    Args:
        layer: a `FixedPointLayer`.
        tensors: the inputs that are tensors.
        inputs: all of them.
        params: as the layer is given them.
        keywords: likewise.

    Raises:
        TypeError: there is no input, or no shape.
        ValueError: state_shape holds the batch.
    """
    if not tensors:
        given = [*(type(v).__name__ for v in inputs), *(f"{name}=" for name in keywords or ())]
        raise TypeError(
            "FixedPointLayer: needs an input or x0 to know the batch size: a tensor [B, ...] "
            f"by position (got {', '.join(given) or 'nothing'})"
        )
    z = tensors[0]
    if z.is_nested:
        raise TypeError(
            "FixedPointLayer: an input must be a plain tensor [B, ...] (got a nested one); pad "
            "it, torch.nested.to_padded_tensor(z, 0.0), give g the lengths by name, and the "
            "valid entries of each sample as sizes="
        )
    shape, shapes, tree = shapes_of(layer, z)
    dtype = torch.real(z).dtype if differentiable(z) else torch.get_default_dtype()
    if not z.is_meta and torch.is_autocast_enabled(z.device.type):
        dtype = torch.promote_types(dtype, torch.float32)  # the state stays wide

    def zeros(*batch: int, skip: int = 0) -> State:
        d = z.device
        of = [torch.zeros(*batch, *s[skip:], dtype=dtype, device=d) for s in shapes]
        return of[0] if tree is None else build(tree, of)

    b = z.shape[0]
    if shape is layer.state_shape and b > 1 and not torch.compiler.is_compiling():
        doubtful = all(s and s[0] == b for s in shapes)
        if doubtful and layer._fits != (shape, b):
            _check_shape(layer, shape, zeros, inputs, params, keywords)
            layer._fits = shape, b
    return zeros(b)


def shapes_of(layer: Any, z: Tensor) -> tuple[Any, list[Any], Tree]:
    """The shape of one sample's state for a first input z: as given, and taken apart."""
    shape: Any = layer.state_shape
    if shape is None:
        shape = attribute(layer.g, "state_shape")
    if callable(shape):
        shape = shape(z)
    if shape is None:
        shape = tuple(z.shape[1:])
    if _is_shape(shape):
        return shape, [shape], None
    shapes, tree = flatten(shape, _is_shape)
    if not shapes or not all(map(_is_shape, shapes)):
        raise TypeError(
            "FixedPointLayer: state_shape must be the shape of one sample's state, or a "
            "tuple, list, dict or dataclass of shapes, nested, where a shape is a tuple "
            f"(got {shape!r}); write state_shape=(n,)"
        )
    return shape, shapes, tree


def tree_of(layer: Any, inputs: Sequence[Any]) -> Tree:
    """The structure of the layer's own start for these inputs."""
    return shapes_of(layer, next(t for t in inputs if isinstance(t, Tensor)))[2]


def _check_shape(
    layer: Any,
    shape: Any,
    zeros: Callable[..., State],
    inputs: Sequence[Any],
    params: Any,
    keywords: Any,
) -> None:
    """Raise where state_shape holds the batch too, which a g that broadcasts would hide.

    Such a g takes it as the shape of the whole batch, and takes no batch of another size.
    """
    g = layer.g
    binding = Binding.of(g)
    if binding is not None:  # on copies of the buffers
        g = binding.bind(binding.own(), watch=False)
    arguments = Arguments(inputs, keywords or {})
    g, inputs = arguments.put(g, (*params, *arguments.shared)), arguments.inputs

    def takes(x0: State, *inputs: Tensor) -> bool:
        try:
            gx = g(x0, *inputs)
            if layer.has_aux:
                gx = gx[0]
            of_gx, of_x0 = flatten(gx)[0], flatten(x0)[0]
            return [t.shape for t in of_gx] == [t.shape for t in of_x0]
        except Exception:
            return False

    b = inputs[0].shape[0]
    with torch.no_grad():
        more = [joined([t, t[:1]]) for t in inputs]
        whole = takes(zeros(), *inputs) and not takes(zeros(b + 1), *more)
        if whole and takes(zeros(b + 1, skip=1), *more):
            raise ValueError(
                "FixedPointLayer: state_shape must be the shape of one sample's state, without "
                f"the batch (got {shape!r} for a batch of {b}, and g returns that shape "
                "for the whole batch); leave its first number out"
            )


def _is_shape(v: Any) -> bool:
    """Whether it is the shape of one tensor: a tuple of whole numbers."""
    return isinstance(v, (tuple, list)) and all(
        [isinstance(n, int) or hasattr(n, "__index__") for n in v]  # what the compiler knows: int
    )
