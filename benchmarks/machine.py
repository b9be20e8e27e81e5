"""What a reader must know of the machine, the build and the run to believe or repeat it."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def facts(device: str, program: str = "benchmarks") -> dict[str, Any]:
    """What a reader must know to believe or repeat a run."""
    import fpi_cuda  # a device has its name before there is a library

    packages = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchdeq", "jax", "jaxopt", "optimistix"):
        version = installed(name)
        if version:
            packages[name] = version
    packages["fpi_cuda"] = fpi_cuda.__version__
    return {
        "command": f"python -m {program} " + shlex.join(sys.argv[1:]),
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
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit, with '+' where tracked files of the library or the harness differ from it.

    Where there is no repository, what COMMIT says.
    """
    name = git("rev-parse", "--short=12", "HEAD") or os.environ.get("COMMIT")
    changed = git(
        "status", "--porcelain", "--", "fpi_cuda", "csrc", "benchmarks/*.py", "experiments/*.py"
    )
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
