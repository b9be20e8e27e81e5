"""The problems: each kind is a map g(x, u, s, *weights), opaque to every method, and its inputs.

Nobody knows what the weights are. u, what g takes of z, does not depend on x and is hoisted out of
the loop for all methods, as a per-sample input; so is s, a factor a sample.
"""

from __future__ import annotations

from pathlib import Path

import torch

from . import dense, nets
from .problem import Instance, Make, Problem, Rule, Step, rule_of

__all__ = ["KINDS", "SIZES", "Instance", "Problem", "Rule", "Step", "at", "make", "rule_of"]

SIZES = ((256, 128), (1024, 256), (64, 1024), (4096, 64))
BIBTEX = ((32, 159), (512, 159), (2515, 159))  # labels of that data set, three batches
DENOISE = (32, 16 * 64 * 64)  # 32 images of 64 × 64, a state of 16 channels
INSTANCES = 3  # inputs of one problem that the timed calls rotate over

KINDS: dict[str, Make] = {
    "easy": dense.easy,
    "hard": dense.hard,
    "two-layer": dense.two_layer,
    "energy": dense.energy,
    "linear": dense.linear,
    "stiff": dense.stiff,
    "conv": nets.conv,
    "denoise": nets.denoise,
    "expanding": dense.expanding,
}
DENSE = ("easy", "hard")
# The other kinds and where they are solved.
ALSO = {
    "two-layer": (256, 128),
    "energy": (256, 128),
    "linear": (256, 128),
    "stiff": (64, 128),
    "conv": (256, 256),
}


def make(
    kind: str,
    batch: int,
    size: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    instances: int = INSTANCES,
    data: Path | None = None,
    **more: float,
) -> Problem:
    """The problem with its inputs, the same for the same arguments.

    Args:
        kind: one of KINDS.
        batch, size: B samples of N values.
        device, dtype: of all tensors; they are drawn in float32 on the CPU.
        instances: inputs, with the same weights.
        data: a folder of real data: images for "denoise", label features for sizes of N = 159.
        more: what the kind takes besides.
    """
    if kind not in KINDS:
        raise ValueError(f"make: kind must be one of {', '.join(KINDS)} (got {kind!r})")
    random = torch.Generator().manual_seed(0)
    problem = KINDS[kind](random, batch, size, instances, data, **more)
    return problem.to(device, dtype)


def at(kind: str) -> tuple[int, int]:
    """Where a kind is solved that is not solved at all SIZES."""
    return DENOISE if kind == "denoise" else ALSO[kind]


def check_spread(problem: Problem, longest: int, mean: float) -> None:
    """A hard problem must be one where finished samples matter, in plain Picard iterations."""
    if problem.kind == "hard" and longest < 4 * mean:
        raise RuntimeError(
            f"{problem.name}: the slowest sample must take at least 4 times the mean "
            f"(got {longest} and {mean:.1f}): this problem does not exercise finished samples"
        )
