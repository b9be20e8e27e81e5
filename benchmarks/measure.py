"""How a time is taken, what must be right before it counts, and what is known of the machine."""

from __future__ import annotations

import datetime
import gc
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fpi_cuda

from . import problems
from .methods import Solve, anderson, picard_compacted, plain
from .problems import Instance, Problem, Rule

ROOT = Path(__file__).resolve().parent.parent
FACTOR = 2.0  # residuals and gradient errors may differ by this and still be compared

# --- time ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds of repeated calls."""

    samples: tuple[float, ...]

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
        return Times(tuple(s / count for s in self.samples))

    def row(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {"median_s": self.median, "q1_s": low, "q3_s": high, "repeats": len(self.samples)}


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
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in tqdm(range(total), desc=label, leave=False, mininterval=0.5):
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                if (i + 1) * repeats[name] // total > i * repeats[name] // total:
                    samples[name].append(clock(lambda call=calls[name], i=i: call(i), device))
            gc.collect(0)
    finally:
        gc.enable()
    return {name: Times(tuple(s)) for name, s in samples.items()}


class Counting:
    """g that counts its calls, the rows in them and the seconds inside it."""

    def __init__(self, g: Callable[..., Tensor], device: str = "cpu") -> None:
        self.g, self.device = g, device
        self.reset()

    def reset(self) -> None:
        self.calls, self.rows, self.seconds = 0, 0, 0.0

    def __call__(self, x: Tensor, *rest: Tensor) -> Tensor:
        synchronize(self.device)
        start = time.perf_counter()
        y = self.g(x, *rest)
        synchronize(self.device)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        self.rows += len(x)
        return y


# --- correctness -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Correctness:
    """What one method got, judged in float64. The worst over all instances and samples."""

    residual: float  # ‖g(x) − x‖ / ‖g(x)‖, the worst sample's
    in_tolerances: float  # ‖g(x) − x‖ / (atol·√N + rtol·‖g(x)‖), the worst sample's
    gradient_error: float | None  # ‖dW − dW*‖ / ‖dW*‖; None: forward alone
    input_gradient_error: float | None  # the same for u

    def refusal(self) -> str | None:
        """Why no time may be reported, or None."""
        if not self.in_tolerances <= FACTOR:
            return f"worst residual {self.in_tolerances:.2g} times the tolerance"
        for name, error in (("W", self.gradient_error), ("u", self.input_gradient_error)):
            if error is not None and not error <= GRADIENT_LIMIT:
                return f"gradient of {name} off by {error:.2g}"
        return None


GRADIENT_LIMIT = 1e-2  # 1e-4 in the adjoint's residual, over 1 − k of the slowest sample


def incomparable(ours: Mapping[str, Any], rival: Mapping[str, Any]) -> str | None:
    """Why the times of two rows may not be divided, or None.

    One-sided: a rival that is less exact than ours only gains by being compared.
    """
    for row in (ours, rival):
        if row["refused"]:
            return f"{row['method']}: {row['refused']}"
    for key, what in (("worst_residual", "residual"), ("gradient_error", "gradient error")):
        a, b = ours[key], rival[key]
        if a is not None and b is not None and a > FACTOR * b:
            return f"{what} {a / b:.1f} times the rival's"
    return None


def gradients(solve: Solve, g: Callable[..., Tensor], instance: Instance) -> tuple[Tensor, ...]:
    """x̂, dL/dW and dL/du."""
    u = instance.u.detach().requires_grad_()
    weight = instance.weight.detach().requires_grad_()
    x = solve(g, instance.x0, u, instance.s, weight)
    return x.detach(), *torch.autograd.grad((instance.loss * x).sum(), (weight, u))


@dataclass(frozen=True)
class Exact:
    """The answer in float64, to 1e-12, by a plain loop that shares no code with the library."""

    x: Tensor
    dweight: Tensor
    du: Tensor


EXACT_RULE = Rule(rtol=1e-12, atol=0.0, adjoint_rtol=1e-12, max_iterations=20_000)


def exact(instance: Instance) -> Exact:
    # A net's iterations are dear, and Anderson needs fewer.
    loop = anderson if instance.weight.dim() == 1 else picard_compacted
    solve = plain(loop, (0.8, 0.5))(EXACT_RULE)
    return Exact(*gradients(solve, problems.g, instance.to(torch.float64)))


def judge(
    solve: Solve,
    g: Callable[..., Tensor],
    problem: Problem,
    truth: tuple[Exact, ...],
    *,
    backward: bool,
) -> Correctness:
    """Run a method on every instance and recompute its residual and gradients' errors."""
    rule = problem.rule
    worst = [0.0, 0.0, 0.0, 0.0]
    for instance, true in zip(problem.instances, truth, strict=True):
        dweight = du = None
        if backward:
            x, dweight, du = gradients(solve, g, instance)
        else:
            with torch.no_grad():
                x = solve(g, *instance.arguments)
        double = instance.to(torch.float64)
        value = problems.g(x.double(), double.u, double.s, double.weight)
        size = torch.linalg.vector_norm(value, dim=1)
        r = torch.linalg.vector_norm(value - x.double(), dim=1)
        threshold = rule.atol * math.sqrt(problem.size) + rule.rtol * size
        errors = [float((r / size).max()), float((r / threshold).max()), 0.0, 0.0]
        if dweight is not None and du is not None:
            errors[2] = relative_error(dweight, true.dweight)
            errors[3] = relative_error(du, true.du)
        # NaN must not vanish in a max.
        worst = [e if math.isnan(e) else max(e, w) for e, w in zip(errors, worst, strict=True)]
    return Correctness(
        worst[0], worst[1], worst[2] if backward else None, worst[3] if backward else None
    )


def relative_error(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b))


# --- the machine -----------------------------------------------------------------------------


def facts(device: str) -> dict[str, Any]:
    """What a reader must know to believe or repeat a run."""
    packages = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchdeq", "jax", "jaxopt", "optimistix"):
        version = installed(name)
        if version:
            packages[name] = version
    packages["fpi_cuda"] = fpi_cuda.__version__
    return {
        "command": "python -m benchmarks " + shlex.join(sys.argv[1:]),
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "device_name": device_name(device),
        "slug": slug(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "versions": packages,
        "build": {k: v for k, v in fpi_cuda.build_info().items() if k != "cuda_missing"},
    }


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit, with '+' where tracked files of the library or the harness differ from it."""
    name = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "fpi_cuda", "csrc", "benchmarks/*.py")
    return (name or "unknown") + ("+" if changed else "")


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {os.cpu_count()} cores"


def slug(device: str) -> str:
    """A folder's name for this device: cpu-amd-epyc-2-cores, cuda-nvidia-h200."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    name = re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b", " ", device_name(device))
    return re.sub(r"[^a-z0-9]+", "-", f"{kind} {name}".lower()).strip("-")
