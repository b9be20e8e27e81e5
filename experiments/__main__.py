"""The paper's experiments: train, tune, evaluate, report.

    python -m experiments TASK train [--methods M ...] [--seeds 0 1 2 3 4] --data DIR
    torchrun --nproc-per-node 2 -m experiments TASK train --data DIR
    python -m experiments TASK tune --data DIR
    python -m experiments TASK eval --data DIR
    python -m experiments TASK study --data DIR    # of the trained nets: gradients, minima
    python -m experiments TASK time --data DIR     # a training step of each method, in turns
    python -m experiments TASK report

A run that was interrupted goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import devices, records
from benchmarks.machine import facts
from benchmarks.tables import text_table

from . import checkpoint, page, timing
from .denoising import study as of_denoising
from .denoising.task import Denoise
from .flow import study as of_flow
from .flow.task import Flow
from .multilabel import study as of_multilabel
from .multilabel.bibtex import Multilabel
from .task import Parts, Settings, Task
from .trained import Trained
from .training import Place, Run, place, read

TASKS: dict[str, Task] = {
    task.name: task for task in (Multilabel("bibtex"), Multilabel("enron"), Denoise(), Flow())
}
STUDIES: dict[type[Task], Callable[..., Mapping[str, Any]]] = {
    Multilabel: of_multilabel.study,
    Denoise: of_denoising.study,
    Flow: of_flow.study,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("task", choices=list(TASKS))
    add("action", choices=("train", "tune", "eval", "study", "time", "report"))
    add("--data", type=folder, metavar="DIR", help="data sets, as the docs say")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="of the runs; default: runs")
    add("--methods", nargs="+", metavar="METHOD", help="default: all of the task's")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings other than the recipe")
    add("--quick", action="store_true", help="two epochs, one seed: does it run?")
    add(
        "--device",
        default=devices.DEFAULT,
        help="cpu, cuda or cuda:N; default auto: CUDA where torch and this build can use it",
    )
    add("--amp", action="store_true", help="bfloat16 autocast, on a GPU")
    add("--threads", type=int, help="torch's threads; default: torch's own")
    given = parser.parse_args(arguments)
    task = TASKS[given.task]
    for method in given.methods or ():
        if method not in task.methods:
            parser.error(f"--methods: {given.task} has {', '.join(task.methods)} (got {method!r})")
    try:
        given.device, about = devices.resolve(given.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    print(about)
    if given.amp and not given.device.startswith("cuda"):
        parser.error(f"--amp: is for a GPU; name it by --device cuda ({about})")
    if given.action != "report" and given.data is None and task.needs_data:
        parser.error(f"{given.action}: needs the data; name its folder by --data")
    given.methods = given.methods or list(task.methods)
    try:
        given.set = dict(pair.split("=", 1) for pair in given.set)
        for method in given.methods:
            settings(task, method, 0, given)
    except ValueError as error:
        parser.error(f"--set: NAME=VALUE ({error})")
    return given


def folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir() or not any(path.iterdir()):
        raise argparse.ArgumentTypeError(f"must be a folder of data sets (got {text!r})")
    return path


def settings(task: Task, method: str, seed: int, given: argparse.Namespace) -> Settings:
    chosen = replace(task.settings(method), seed=seed).with_values(**given.set)
    return task.quick(chosen) if given.quick else chosen


def timed(task: Task, settings: Settings, given: argparse.Namespace, where: Place) -> Settings:
    """With the time that another method's run took, where the task says whose."""
    other = task.as_long_as(settings.method)
    if other is None or settings.seconds:
        return settings
    path = home(given, other, settings.seed) / "result.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{settings.method}: is trained as long as {other}, and {path} must be its result; "
            "train that first, or give a time by --set seconds=60"
        )
    result = read(path)
    here = {"threads": torch.get_num_threads(), "processes": where.world}
    for name, value in here.items():
        if result[name] != value:
            raise ValueError(
                f"{settings.method}: must compute as {path} did, whose time it is given, with "
                f"{name} {result[name]} (got {value}); see --threads and torchrun"
            )
    total = sum(entry["seconds"] for entry in result["log"])
    return replace(settings, seconds=float(f"{total:.6g}"))  # as a result keeps numbers


def loaded(task: Task, chosen: Settings, given: argparse.Namespace, where: Place) -> Parts:
    """The data; the first of several processes may make them, the others wait for it."""
    if where.rank > 0:
        dist.barrier()
    parts = task.load(given.data, chosen, work(task, given))
    if where.rank == 0 and where.world > 1:
        dist.barrier()
    return parts


def work(task: Task, given: argparse.Namespace) -> Path:
    path: Path = given.out / task.name
    return path


def train(task: Task, given: argparse.Namespace, where: Place) -> None:
    for method, seed in itertools.product(given.methods, given.seeds[: 1 if given.quick else None]):
        chosen = timed(task, settings(task, method, seed, given), given, where)
        parts = loaded(task, chosen, given, where)
        run = Run(task, chosen, parts, home(given, method, seed), where)
        result = run.finish()
        if run.first:
            print(f"{method}, seed {seed}: {shown(result['test'])}")


def home(given: argparse.Namespace, method: str, seed: int) -> Path:
    path: Path = given.out / given.task / method / f"seed-{seed}"
    return path


def tune(task: Task, given: argparse.Namespace, where: Place) -> None:
    """Try every setting of the grid with every seed; validation alone says which is best."""
    for method in given.methods:
        grid, tried = task.grid(method), []
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            name, scores = ",".join(f"{k}={v}" for k, v in point.items()), []
            for seed in given.seeds:
                chosen = settings(task, method, seed, given).with_values(**point)
                chosen = timed(task, chosen, given, where)
                path = given.out / given.task / "tune" / method / name / f"seed-{seed}"
                parts = loaded(task, chosen, given, where)
                result = Run(task, chosen, parts, path, where).finish()
                scores.append(result["best"]["validation"][task.score])
            length = {"seconds" if chosen.seconds else "epochs": chosen.seconds or chosen.epochs}
            tried.append(
                {"settings": point | length, "seeds": len(scores), task.score: mean(scores)}
            )
        tried.sort(key=lambda row: row[task.score], reverse=not task.lower_is_better)
        if where.rank == 0:
            path = given.out / given.task / "tune" / f"{method}.json"
            here = facts(given.device, "experiments")
            records.save(path, {"facts": here, "tried": tried})
            for row in tried:
                print(f"{method}: {task.score} {row[task.score]:.2f}, {row['settings']}")


def evaluate(task: Task, given: argparse.Namespace, where: Place) -> None:
    """The test figures of the best checkpoint of each run."""
    found = 0
    for method, seed in itertools.product(given.methods, given.seeds):
        path = home(given, method, seed) / "best.pt"
        if not path.exists():
            continue
        found += 1
        net = Trained.load(task, path, given.data, work(task, given), where.device)
        figures = task.test(net.model, net.parts.test, where.device, net.best["validation"])
        print(f"{method}, seed {seed}, epoch {net.best['epoch']}: {shown(figures)}")
    if not found:
        raise FileNotFoundError(
            f"eval: {given.out / given.task} must hold METHOD/seed-N/best.pt of a run; train "
            "first, or name its folder by --out"
        )


def examine(task: Task, given: argparse.Namespace, where: Place) -> None:
    """Tables about the trained nets of seed 0."""
    tables = STUDIES[type(task)](task, given.out / given.task, given.data, where.device)
    if not tables:
        raise FileNotFoundError(
            f"study: {given.out / given.task} must hold seed-0/best.pt of a method that solves; "
            "train first, or name its folder by --out"
        )
    records.save(given.out / given.task / "study.json", tables)
    for title, rows in tables.items():
        print(f"{title}\n\n{text_table(page.table(rows))}\n")


def clocked(task: Task, given: argparse.Namespace, where: Place) -> None:
    """Time a training step of each method, at the best weights of seed 0 where there are some.

    Fresh weights contract more, and take fewer iterations.
    """
    runs, epochs = {}, {}
    for method in given.methods:
        chosen = settings(task, method, 0, given)
        run = Run(task, chosen, loaded(task, chosen, given, where), home(given, method, 0), where)
        runs[method], epochs[method] = run, "fresh"
        path = run.folder / "best.pt"
        if path.exists():
            state = checkpoint.load(path)
            if state["settings"]["options"] == asdict(chosen)["options"]:
                run.model.load_state_dict(state["model"])
                epochs[method] = f"epoch {state['best']['epoch']}"
    rows = [row | {"weights": epochs[row["method"]]} for row in timing.rows(runs, where)]
    path = work(task, given) / "times.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    title = f"A training step, in turns ({given.device}, {torch.get_num_threads()} threads)"
    if given.set:
        title += ": " + " ".join(f"{name}={value}" for name, value in given.set.items())
    records.save(path, known | {title: rows})
    print(f"{title}\n\n{text_table(page.table(rows))}")


def report(task: Task, given: argparse.Namespace) -> None:
    """Gather the results of the runs, where there are any, and rebuild the page."""
    paths = sorted((given.out / task.name).glob("*/seed-*/result.json"))
    tuned = sorted((given.out / task.name / "tune").glob("*.json"))
    tables = {}
    for path in (given.out / task.name / name for name in ("times.json", "study.json")):
        tables |= json.loads(path.read_text()) if path.exists() else {}
    if paths:
        results = [read(path) for path in paths]
        here = facts(given.device, "experiments") | {"sources": page.sources_of(results)}
        content: dict[str, Any] = {
            "facts": here,
            "task": task.name,
            "groups": task.groups,
            "pairs": task.pairs,
            "curves": task.curves,
            "runs": [page.summary(result) for result in results],
            "tables": tables,
            "tuned": {path.stem: json.loads(path.read_text())["tried"] for path in tuned},
        }
        path = page.RESULTS / here["slug"] / f"{task.name}.json"
        content["pictures"] = page.publish(sorted(work(task, given).glob("published/*.jpg")), path)
        records.save(path, content)
        print(f"written: {path}")
    print(f"{page.PAGE.name}:", "changed" if page.rebuild() else "up to date")


def shown(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    task = TASKS[given.task]
    try:
        if given.action == "report":
            report(task, given)
            return 0
        with place(given.device, given.amp) as where:
            actions = {"train": train, "tune": tune, "eval": evaluate, "study": examine}
            actions["time"] = clocked
            actions[given.action](task, given, where)
    except (OSError, ValueError) as error:  # of the user's files: their messages say what to do
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
