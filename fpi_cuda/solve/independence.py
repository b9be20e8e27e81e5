"""Whether g treats the samples of a batch independently, so that finished ones may be left out."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..solution import warn

# Found out once a g (and a training state of it); an entry goes with its g.
_PER_SAMPLE: weakref.WeakKeyDictionary[Any, dict[Any, bool]] = weakref.WeakKeyDictionary()


class PerSample:
    """Whether finished samples may be left out of the batch given to one g."""

    def __init__(self, setting: bool | str, g: Any) -> None:
        self.known: bool | None = None if setting == "auto" else bool(setting)
        self._g = g
        if self.known is not None:
            return
        modules = g.modules() if isinstance(g, torch.nn.Module) else ()
        self._key = tuple(m.training for m in modules)
        with contextlib.suppress(TypeError):  # g takes no weak reference: look each time
            self.known = _PER_SAMPLE.get(g, {}).get(self._key)

    def learn(self, part: Callable[[], Tensor], whole: Tensor, dtype: torch.dtype | None) -> bool:
        """Compare g on the compacted rows with those rows of g on the whole batch.

        dtype is autocast's: g's products have the rounding of that, whatever the state's.
        """
        try:
            rows = part()
        except Exception:
            self.known = False
        else:
            self.known = self._agree(rows, whole, dtype or whole.dtype)
        with contextlib.suppress(TypeError):
            _PER_SAMPLE.setdefault(self._g, {})[self._key] = self.known
        if not self.known:
            warn(
                "fpi_cuda: g does not treat the samples of a batch independently (batch norm, "
                "attention across it, or a captured tensor with the batch dimension?): finished "
                "samples are frozen but stay in the batch given to g. Pass captured tensors as "
                "inputs, or per_sample=False to say so and silence this.",
                UserWarning,
            )
        return self.known

    @staticmethod
    def _agree(part: Tensor, whole: Tensor, dtype: torch.dtype) -> bool:
        eps = max(torch.finfo(part.dtype).eps, torch.finfo(dtype).eps)
        # A library GEMM's or convolution's rows differ in the last bits with the batch's size.
        slack = (16 if eps > 1e-5 else 256) * eps
        part, whole = (t.reshape(len(t), -1).double() for t in (part, whole))
        scale = torch.maximum(torch.linalg.vector_norm(whole, dim=1), part.new_tensor(1e-300))
        worst = torch.linalg.vector_norm(part - whole, dim=1) / scale
        # Rows that hold NaN or Inf say nothing.
        return not bool((worst > slack).any())
