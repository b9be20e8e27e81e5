"""What a reader must know of the machine, the build and the run to believe or repeat it."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import sources


def facts(device: str, program: str = "benchmarks") -> dict[str, Any]:
    """What a reader must know to believe or repeat a run."""
    import fpi_cuda  # a device has its name before there is a library

    measured = sources.here()
    packages = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchdeq", "jax", "jaxopt", "optimistix"):
        version = installed(name)
        if version:
            packages[name] = version
    packages["fpi_cuda"] = fpi_cuda.__version__
    return {
        "command": f"python -m {program} " + shlex.join(sys.argv[1:]),
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": measured["commit"],
        "sources": [measured],
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
