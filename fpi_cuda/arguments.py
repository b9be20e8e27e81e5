"""What a call gives g beside the state: the tensors taken out, all else as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["Arguments", "numbers"]

# What holds no tensor of one batch.
_NO_TENSORS = (
    *(type(None), bool, int, float, complex, str, bytes, Enum, type, FunctionType),
    *(BuiltinFunctionType, nn.Module, torch.dtype, torch.device, torch.Generator),
)


def numbers(t: Tensor) -> bool:
    """Whether a tensor may number samples, as edges do: in a part of the batch they are others."""
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool) and t.dim() > 0


def _untouched(v: Any) -> bool:
    """Whether it goes to g as the very object that it is: what g notes in a list stays there."""
    return not any(isinstance(leaf, Tensor) for leaf in tree_leaves(v))


class Arguments:
    """The arguments of one call g(x, *args, **kwargs), with every tensor taken out.

    Attributes:
        n_inputs: how many positional tensors there are.
        inputs: these: per sample.
        shared: those in the other arguments, in lists, tuples and dicts too, which g gets whole.
        plain: what the other arguments hold beside tensors.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._at = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        self.n_inputs = len(self._at)
        self.inputs: Sequence[Tensor] = [args[i] for i in self._at]
        others = [None if isinstance(a, Tensor) else a for a in args]
        leaves, self._nest = tree_flatten((others, dict(kwargs)), is_leaf=_untouched)
        self._places = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
        self.shared: Sequence[Tensor] = [leaves[i] for i in self._places]
        self.plain = [None if isinstance(v, Tensor) else v for v in leaves]

    @property
    def values(self) -> Any:
        """All that g reads of them in Python, for a captured graph."""
        return self.plain, self._at, str(self._nest)

    def release(self) -> None:
        """Let go of the tensors: a node keeps this, and they are its to save, or to give away."""
        self.inputs = self.shared = ()

    def of_samples(self, b: int) -> bool:
        """Whether what g gets whole may go by the places of b samples in the batch.

        A tensor with a dimension of b does, or an object that may hold one; see `numbers` too.
        """
        if b < 2:
            return False
        return any(t.is_nested or b in t.shape for t in self.shared) or not all(
            isinstance(v, _NO_TENSORS) for v in tree_leaves(self.plain)
        )

    def around(self, g: Callable[..., Any]) -> Callable[..., Any]:
        """What of these and g is no tensor by itself, to be looked into by name."""
        others, kwargs = tree_unflatten(self.plain, self._nest)
        return functools.partial(g, *others, **kwargs)

    def put(self, g: Callable[..., Any], shared: Sequence[Tensor]) -> Callable[..., Any]:
        """f(x, *inputs) by g with these.

        Args:
            g: the callable.
            shared: further positional arguments, then tensors in the place of `self.shared`.
        """
        leaves, n = list(self.plain), len(shared) - len(self._places)
        for i, t in zip(self._places, shared[n:], strict=True):
            leaves[i] = t
        others, kwargs = tree_unflatten(leaves, self._nest)
        params, at = shared[:n], self._at

        def f(x: Any, *inputs: Tensor) -> Any:
            args = list(others)
            for i, t in zip(at, inputs, strict=True):
                args[i] = t
            return g(x, *args, *params, **kwargs)

        return f
