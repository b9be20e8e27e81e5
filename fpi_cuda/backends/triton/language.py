"""What every kernel here needs beyond triton's language."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "bound"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def bound(n):
    """A loop's bound that is not a compile-time constant.

    Triton 3.6's interpreter has each scalar as an array of one entry, which numpy 2.4 and newer
    refuse as an index.
    """
    if INTERPRETED:
        return n.handle.data.item()  # assigned to a name, it would be an array again
    else:
        return n
