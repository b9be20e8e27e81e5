"""How much a time changed beside a plain loop's, and how sure that is.

The standard error of a median log ratio is bootstrapped, in blocks of about n^(1/3) successive
rounds, since slow spells of a shared machine outlast a round. The interval is Student's, with the
blocks as the degrees of freedom (Welch's formula over the two files), and not the bootstrap's
percentiles: a chance of 5 % shared among a hundred cells is decided by tails that fifteen rounds do
not have.

Two runs of the same code differ by more than their rounds do: where memory lies, what neighbours
do meanwhile. How much, the plain loops tell, whose code is not ours: the changes of their ratios to
one another, beyond what their own errors explain, are the variance between runs that every interval
includes. It is never taken for less than (3 %)²: repeated runs of one build on a shared machine
differ by more than their rounds explain.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .records import Row

FEWEST_PAIRS = 5  # in each file; below, a spread cannot be told from luck
BETWEEN = 0.03  # of a ratio, between two runs of the same code: a deviation, at least
FEWEST_CONTROLS = 4  # changes of plain loops, for the variance between runs
SEED = 0
Cell = tuple[Any, ...]


def timed(row: Row | None) -> bool:
    return row is not None and "samples" in row and not row.get("refused")


@dataclass(frozen=True)
class Change:
    """Of one method in one cell, in the logarithm of its ratio."""

    cell: Cell
    method: str
    against: str
    pairs: tuple[int, int]
    value: float = math.nan
    error: float = math.nan  # standard
    freedom: float = math.nan  # degrees

    @property
    def enough(self) -> bool:
        return min(self.pairs) >= FEWEST_PAIRS


def log_ratios(row: Row, rival: Row) -> np.ndarray:
    """Of the rounds that both were timed in, in their order."""
    times = dict(zip(rival.get("rounds", ()), rival["samples"], strict=False))
    pairs = zip(row.get("rounds", ()), row["samples"], strict=False)
    ratios = [s / times[i] for i, s in pairs if i in times and s > 0 and times[i] > 0]
    return np.log(np.array(ratios, dtype=float))


def change(
    cell: Cell, method: str, was: Mapping[str, Row], now: Mapping[str, Row], resamples: int
) -> Change:
    loops = [row for row in was.values() if row["family"] == "plain" and timed(row)]
    fewest = (0, 0)
    # The fastest that has the rounds: a loop that sat most of them out tells nothing.
    for loop in sorted(loops, key=lambda row: float(np.median(row["samples"]))):
        rival = loop["method"]
        if not timed(now.get(rival)):
            continue
        old = log_ratios(was[method], loop)
        new = log_ratios(now[method], now[rival])
        fewest = max(fewest, (len(old), len(new)), key=min)
        if min(len(old), len(new)) >= FEWEST_PAIRS:
            return Change(
                cell, method, rival, (len(old), len(new)), *difference(old, new, resamples)
            )
    return Change(cell, method, "", fewest)


def difference(old: np.ndarray, new: np.ndarray, resamples: int) -> tuple[float, float, float]:
    """Of the medians, new less old: its value, standard error and degrees of freedom."""
    rng = np.random.default_rng(SEED)
    variances, freedoms = [], []
    for sample in (old, new):
        n = len(sample)
        block = max(1, round(n ** (1 / 3)))
        medians = np.median(sample[block_indices(rng, n, block, resamples)], axis=1)
        # n / (n − b): blocks vary less about their own mean than about the true one.
        variances.append(float(medians.var(ddof=1)) * n / (n - block))
        freedoms.append(n / block - 1)
    total = sum(variances)
    spread = sum(v * v / f for v, f in zip(variances, freedoms, strict=True))
    freedom = total * total / spread if spread > 0 else sum(freedoms)
    return float(np.median(new) - np.median(old)), math.sqrt(total), freedom


def block_indices(
    rng: np.random.Generator, n: int, block: int, resamples: int
) -> np.ndarray:  # [resamples, n]
    """Rounds drawn in runs of `block`, around the end to the beginning."""
    starts = rng.integers(0, n, size=(resamples, -(-n // block)))
    runs = (starts[:, :, None] + np.arange(block)) % n
    return runs.reshape(resamples, -1)[:, :n]


@functools.lru_cache(maxsize=1024)
def student(tail: float, freedom: float) -> float:
    """The t that is exceeded with this probability: scipy's, without scipy."""
    angle = np.linspace(0.0, np.pi / 2, 100_001)  # t = √ν tan(angle) has the density cos^(ν−1)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    beyond = 0.5 * (1 - below / below[-1])
    return math.sqrt(freedom) * math.tan(float(np.interp(-tail, -beyond, angle)))


@dataclass(frozen=True)
class Between:
    """The variance of log ratios between runs of the same code."""

    variance: float
    freedom: float = math.inf  # degrees
    count: int = 0  # of the changes that it was estimated from


def between_runs(controls: Sequence[Change]) -> Between:
    """What the plain loops' changes show beyond their own errors.

    By medians: a loop that another torch made twice as fast shall not hide what we did.
    """
    sure = [c for c in controls if c.enough and c.against != c.method]
    least = BETWEEN**2
    if len(sure) < FEWEST_CONTROLS:
        return Between(least)
    # 0.4549: the median of a squared standard normal.
    found = float(np.median([c.value**2 / 0.4549 - c.error**2 for c in sure]))
    return Between(max(found, least), len(sure) - 1 if found > least else math.inf, len(sure))
