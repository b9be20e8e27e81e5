"""How a time is taken: variants in turns, inputs rotated."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Times:
    """Seconds of repeated calls, and the round that each was timed in."""

    samples: tuple[float, ...]
    rounds: tuple[int, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def over(self, count: int) -> Times:
        """Of one where each call made so many."""
        return Times(tuple(s / count for s in self.samples), self.rounds)

    def row(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {
            "median_s": self.median,
            "q1_s": low,
            "q3_s": high,
            "iqr_s": high - low,
            "repeats": len(self.samples),
            "samples": list(self.samples),
            "rounds": list(self.rounds),
        }


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleave(
    calls: Mapping[str, Callable[[int], Any]],
    *,
    device: str = "cpu",
    budget: float = 3.0,
    rounds: tuple[int, int] = (3, 15),
    label: str = "",
    clock: Callable[[Callable[[], Any], str], float] = timed,
) -> dict[str, Times]:
    """Time calls in turns, in one process, in an order that rotates from round to round.

    Args:
        calls: call(i) runs the variant on the i-th input; warmed up by two calls each.
        device: synchronised around each call where it is a CUDA device.
        budget: seconds that each variant may take about, on the timed calls.
        rounds: least (3 for the very slow) and most repeats; slow variants sit rounds out, evenly.
        label: of the progress bar.
        clock: seconds of one call.
    """
    names = list(calls)
    if not names:
        return {}
    repeats = {}
    for name in names:
        once = min(timed(lambda call=calls[name], i=i: call(i), device) for i in range(2))
        least = rounds[0] if rounds[0] * once < 10 * budget else min(rounds[0], 3)
        repeats[name] = max(least, min(rounds[1], int(budget / max(once, 1e-9))))
    total = max(repeats.values())
    samples: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in tqdm(range(total), desc=label, leave=False, mininterval=0.5):
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                if (i + 1) * repeats[name] // total > i * repeats[name] // total:
                    seconds = clock(lambda call=calls[name], i=i: call(i), device)
                    samples[name].append((i, seconds))
            gc.collect(0)
    finally:
        gc.enable()
    return {
        name: Times(tuple(s for _, s in taken), tuple(i for i, _ in taken))
        for name, taken in samples.items()
    }


def captured(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call as one launch of a CUDA graph, so that launches from Python are not timed.

    It must read and write the same tensors in every call, and not wait for the device.
    """
    index = torch.device(device)
    side = torch.cuda.Stream(index)
    side.wait_stream(torch.cuda.current_stream(index))
    with torch.cuda.stream(side):
        for _ in range(3):  # what compiles, is looked up or measured at first calls
            call()
    torch.cuda.current_stream(index).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
