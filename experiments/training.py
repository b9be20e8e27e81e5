"""The loop over epochs: resumable, stopped early, on one process or several."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from tqdm import tqdm

from benchmarks import records, sources

from . import checkpoint
from .solves import Solves
from .task import Batch, Figures, Parts, Settings, Task

Log = list[dict[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where a run computes."""

    device: torch.device
    amp: bool = False  # bfloat16 autocast
    rank: int = 0
    world: int = 1

    def share(self, batch: Batch) -> Batch:
        """This process's rows of a batch."""
        mine = (t[self.rank :: self.world] if self.world > 1 else t for t in batch)
        return tuple(t.to(self.device, non_blocking=True) for t in mine)


@contextmanager
def place(device: str, amp: bool) -> Iterator[Place]:
    """The place of this process; under torchrun, one of several."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Place(torch.device(device), amp)
        return
    cuda = device.startswith("cuda")
    here = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device(device)
    if cuda:
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Place(here, amp, dist.get_rank(), world)
    finally:
        dist.destroy_process_group()


class Run:
    """One training run, in a folder of its own: log.jsonl, last.pt, best.pt, result.json.

    Every epoch ends with a checkpoint and draws its random numbers from (seed, epoch) alone, so a
    run that was killed goes on from its last epoch and, on the CPU, ends with the same bits.
    """

    def __init__(
        self, task: Task, settings: Settings, parts: Parts, folder: Path, where: Place
    ) -> None:
        self.task, self.settings, self.parts = task, settings, parts
        self.folder, self.where = folder, where
        torch.manual_seed(settings.seed)
        self.model = task.model(settings, parts).to(where.device)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=(0.9, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        self.average = AveragedModel(self.model, avg_fn=get_ema_avg_fn(settings.average))
        self.log: Log = []
        self.best: dict[str, Any] = {"epoch": -1, "validation": {}}

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.where.rank == 0

    def finish(self) -> dict[str, Any]:
        """Train to the end, from the last checkpoint where there is one.

        Returns:
            The result, which result.json holds.
        """
        done = self.folder / "result.json"
        if done.exists():
            result = read(done)
            self._must_agree(done, result["settings"])
            return result
        self.folder.mkdir(parents=True, exist_ok=True)
        self._must_share()
        self._resume()
        parallel = DistributedDataParallel(self.model) if self.where.world > 1 else self.model
        name = f"{self.settings.method}, seed {self.settings.seed}"
        total = None if self.settings.seconds else self.settings.epochs
        with tqdm(total=total, initial=len(self.log), desc=name, disable=not self.first) as bar:
            while self._progress(len(self.log)) < 1 and not self._stale():
                entry = self._epoch(parallel)
                self._validate(entry)
                bar.update()
                bar.set_postfix({self.task.score: f"{entry[self.task.score]:.4g}"})
        return self._result()

    def _progress(self, epochs: float, seconds: float = 0.0) -> float:
        """From 0 to 1 where the run is, after so many epochs and seconds more than are logged."""
        if self.settings.seconds:
            return (sum(entry["seconds"] for entry in self.log) + seconds) / self.settings.seconds
        return epochs / self.settings.epochs

    def _stale(self) -> bool:
        return len(self.log) - 1 - int(self.best["epoch"]) >= self.settings.patience > 0

    def _rate(self, progress: float) -> float:
        """The learning rate of a step."""
        settings, steps = self.settings, int(self.average.n_averaged) + 1
        rate = settings.learning_rate * min(1.0, steps / max(1, settings.warmup))
        if settings.schedule == "cosine":
            rate *= 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress))
        return rate

    def _epoch(self, parallel: nn.Module) -> dict[str, Any]:
        epoch, settings, where = len(self.log), self.settings, self.where
        generator = torch.Generator().manual_seed(1_000_003 * settings.seed + epoch)
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        batches = torch.randperm(len(self.parts.train), generator=generator).split(settings.batch)
        self.model.train()
        start, total, seen, steps, solves = clock(where), 0.0, 0, 0, Solves()
        drawn = (self.task.batch(self.parts.train[rows], settings, generator) for rows in batches)
        for rows, batch in zip(batches, ahead(drawn, where), strict=True):
            elapsed = same(clock(where) - start, where)
            progress = self._progress(epoch + steps / len(batches), elapsed)
            if steps and progress >= 1:
                break  # the time is up
            self.optimizer.param_groups[0]["lr"] = self._rate(progress)
            losses = self.step(parallel, where.share(batch), len(rows))
            total += float(losses.sum())
            seen += len(rows)
            steps += 1
            solves.add(self.model)
        total, solves = gathered(total, solves, where)
        entry = {
            "epoch": epoch,
            "steps": steps,
            "loss": total / seen,
            "seconds": same(clock(where) - start, where),
        }
        return entry | solves.row()

    def step(self, parallel: nn.Module, batch: Batch, count: int) -> Tensor:
        """Train on this process's rows of a batch of `count` samples; the loss of each row."""
        with torch.autocast(self.where.device.type, torch.bfloat16, enabled=self.where.amp):
            losses = self.task.losses(parallel, batch, self.settings)
        # Processes' gradients are averaged; the batch's last rows may be uneven among them.
        loss = losses.sum() * (self.where.world / count)
        self.optimizer.zero_grad()
        loss.backward()
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        return losses.detach()

    def _validate(self, entry: dict[str, Any]) -> None:
        """Score the epoch, log it, save: the best first, since the last says that it is there."""
        figures: Figures = {}
        if self.first:
            figures = self.task.validate(
                self.average.module.eval(), self.parts.validation, self.where.device
            )
        figures = agreed(figures, self.where)
        entry |= figures
        sign = -1 if self.task.lower_is_better else 1
        before = self.best["validation"].get(self.task.score)
        better = before is None or sign * figures[self.task.score] > sign * before
        if better:
            self.best = {"epoch": entry["epoch"], "validation": figures}
        self.log.append(entry)
        if not self.first:
            return
        common = {"task": self.task.name, "settings": asdict(self.settings), "best": self.best}
        if better:
            checkpoint.save(
                self.folder / "best.pt", common | {"model": self.average.module.state_dict()}
            )
        checkpoint.save(
            self.folder / "last.pt",
            common
            | {
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "log": self.log,
            },
        )
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _resume(self) -> None:
        path = self.folder / "last.pt"
        if path.exists():
            state = checkpoint.load(path)
            self._must_agree(path, state["settings"])
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.log, self.best = state["log"], state["best"]
        if self.first:  # a kill may have come between the checkpoint and its line
            lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
            (self.folder / "log.jsonl").write_text(lines)

    def _must_share(self) -> None:
        """Every process must have a row of every batch."""
        batch, count = self.settings.batch, len(self.parts.train)
        smallest = min(batch, count % batch or batch)
        if smallest < self.where.world:
            raise ValueError(
                f"{self.settings.method}: every batch must have a sample for each process (got "
                f"{smallest} for {self.where.world}); use fewer processes, or --set batch="
            )

    def _must_agree(self, path: Path, settings: dict[str, Any]) -> None:
        mine = asdict(self.settings)
        other = [
            f"{k} {settings.get(k)!r}, not {v!r}" for k, v in mine.items() if settings.get(k) != v
        ]
        if other:
            raise ValueError(
                f"{path} must be of a run with the same settings (it has {'; '.join(other)}); "
                "give this run another --out, or delete that folder"
            )

    def _result(self) -> dict[str, Any]:
        if self.where.world > 1:
            dist.barrier()  # best.pt is the first process's
        state = checkpoint.load(self.folder / "best.pt")
        self.model.load_state_dict(state["model"])
        model = self.model.eval()
        test = self.task.test(
            model, self.parts.test, self.where.device, state["best"]["validation"]
        )
        measured = sources.here()
        result = {
            "task": self.task.name,
            "settings": asdict(self.settings),
            "best": state["best"],
            "test": test,
            "parameters": sum(p.numel() for p in model.parameters()),
            "processes": self.where.world,
            "threads": torch.get_num_threads(),
            "commit": measured["commit"],
            "sources": measured,
            "log": self.log,
        }
        if self.first:
            records.save(self.folder / "result.json", result)
        if self.where.world > 1:
            dist.barrier()  # another run may look for it
        return result


def read(path: Path) -> dict[str, Any]:
    """A result.json.

    Raises:
        ValueError: it is damaged.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        if not {"settings", "best", "test", "log"} <= result.keys():
            raise ValueError("something is missing")
        return result
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} must be the result of a run (got {error}); delete it, and the same command "
            "makes it anew from the checkpoints"
        ) from error


def ahead(batches: Iterator[Batch], where: Place) -> Iterator[Batch]:
    """The same batches; for a GPU, each is made while the one before trains."""
    if where.device.type == "cpu":
        yield from batches
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def clock(where: Place) -> float:
    """Seconds: of the processor where one thread computes, which another program can't take."""
    alone = where.device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def same(seconds: float, where: Place) -> float:
    """The first process's, for all: they must end their epochs together."""
    if where.world == 1:
        return seconds
    shared = torch.tensor(seconds, dtype=torch.float64, device=where.device)
    dist.broadcast(shared, src=0)
    return float(shared)


def gathered(total: float, solves: Solves, where: Place) -> tuple[float, Solves]:
    """Sums over all processes."""
    if where.world == 1:
        return total, solves
    found: list[Any] = [None] * where.world
    dist.all_gather_object(found, (total, solves))
    return sum(t for t, _ in found), sum((s for _, s in found), Solves())


def agreed(figures: Figures, where: Place) -> Figures:
    """The first process's, for all."""
    if where.world == 1:
        return figures
    shared = [figures]
    dist.broadcast_object_list(shared, src=0, device=where.device)
    return shared[0]
