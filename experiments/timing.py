"""What a training step takes: methods in turns, so that the machine's moods meet all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

import torch

from .solves import Solves, mean
from .training import Place, Run

WARM, ROUNDS = 3, 15


def rows(runs: Mapping[str, Run], where: Place) -> list[dict[str, str]]:
    """A row a method: the median over rounds, its ratio to the first method's, the iterations.

    Fresh nets that train on the same rows; reading and drawing the batch is not in the time.
    """
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    solves = {method: Solves() for method in runs}
    for i in range(WARM + ROUNDS):
        for method, run in runs.items():
            generator = torch.Generator().manual_seed(i)
            count = min(run.settings.batch, len(run.parts.train))
            chosen = torch.randperm(len(run.parts.train), generator=generator)[:count]
            batch = run.task.batch(run.parts.train[chosen], run.settings, generator)
            batch = where.share(batch)
            run.model.train()
            synchronize(where)
            start = time.perf_counter()
            run.step(run.model, batch, count)
            synchronize(where)
            if i >= WARM:
                seconds[method].append(time.perf_counter() - start)
                solves[method].add(run.model)
    first = median(next(iter(seconds.values())))
    found = []
    for method, times in seconds.items():
        counted = solves[method].row()
        found.append(
            {
                "method": method,
                "ms, median": f"{1e3 * median(times):.1f}",
                "of the first": f"{median(times) / first:.2f}",
                "iterations": f"{mean(counted['iterations']):.1f}" if counted else "",
                "backward": f"{mean(counted['backward_iterations']):.1f}" if counted else "",
                "not converged": str(counted["failed"]) if counted else "",
            }
        )
    return found


def synchronize(where: Place) -> None:
    if where.device.type == "cuda":
        torch.cuda.synchronize(where.device)
