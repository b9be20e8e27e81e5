"""What benchmarks/on_gpu.sh asks of Python: `python -m benchmarks.on_gpu COMMAND`.

device: whether there is one that fpi_cuda can use. facts: versions, copy and product rates.
carried: takes the libraries that `make gpu-carry` made. build: builds them here. packages: the
folders of carried packages that are not installed here. folder: where the device's results belong.
seal: ends `make gpu-carry`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from .sources import ROOT, digest

CARRY = ROOT / "gpu-carry"
PACKAGE = ROOT / "fpi_cuda"
TOOLKIT = Path("/usr/local/cuda/bin")  # where it is often, without being in PATH
MIB = 1 << 20
CARRIED_AT_MOST, TREE_AT_MOST = 20 * MIB, 64 * MIB
UNUSABLE = 3  # exit code of `device`


def fail(why: str) -> int:
    print(why)
    return 1


def device() -> int:
    try:
        import torch
    except ImportError as error:
        print(f"torch can't be imported: {error}; name the interpreter that has it in PYTHON")
        return UNUSABLE
    from .devices import refusal

    reason = refusal()
    if reason:
        print(f"{reason}. Name in PYTHON an interpreter whose torch can use a CUDA device")
        return UNUSABLE
    total = float(torch.ones(1000, device="cuda").sum())
    print(f"{torch.cuda.get_device_name()}: 1000 ones add up to {total:.0f}")
    return int(total != 1000)


def facts(tiny: bool = False) -> int:
    """What is here, line by line; the last is what the device's memory and matrix units do."""
    import torch

    from . import ceilings

    print(f"python {platform.python_version()} {sys.executable}, {platform.platform()}")
    print(f"{os.cpu_count()} cores, {shutil.disk_usage(ROOT).free / 2**30:.0f} GiB of disk free")
    print(f"Python.h here: {Path(sysconfig.get_path('include'), 'Python.h').exists()}")
    for name in ("torch", "triton", "numpy", "pytest", "pytest-xdist", "hypothesis", "jax"):
        print(f"{name}: {version(name) or 'not installed'}")
    for tool in ("gcc", "g++", "nvcc", "cmake", "ninja", "git", "compute-sanitizer", "ncu"):
        print(f"{tool}: {find(tool) or 'not found'}")
    print(f"CUDA of torch {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    print(torch.cuda.get_device_properties("cuda"))
    copied, _ = ceilings.copy("cuda", (1 if tiny else 4096) * MIB)
    rate, _ = ceilings.product("cuda", torch.bfloat16, 0.01 if tiny else 0.5, tiny=tiny)
    print(f"copy {copied / 1e12:.3g} TB/s read and written", end=", ")
    print(f"bfloat16 product {rate / 1e12:.3g} TFLOP/s")
    return 0


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def find(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path=str(TOOLKIT))


def sources() -> str:
    """A hash of all that the libraries are built from."""
    files = [*(ROOT / "csrc").rglob("*"), ROOT / "CMakeLists.txt"]
    return digest((str(p.relative_to(ROOT)), p.read_bytes()) for p in files if p.is_file())


def carried() -> int:
    libraries = sorted(CARRY.glob("*.so"))
    if not libraries:
        return fail("no libraries were carried here: `make gpu-carry` makes them")
    if (CARRY / "sources").read_text().strip() != sources():
        return fail("the carried libraries are of other sources: repeat `make gpu-carry`")
    for stale in PACKAGE.glob("*.so"):
        stale.unlink()
    for library in libraries:
        shutil.copy(library, PACKAGE)
    return loaded("carried")


def loaded(origin: str, device: str = "cuda") -> int:
    """Loads the libraries, and solves x = x / 2 + 1 by a kernel of theirs."""
    try:
        import torch

        import fpi_cuda
    except ImportError as error:
        return fail(f"the {origin} libraries don't load: {error}")
    info = fpi_cuda.build_info()
    for key, value in info.items():
        print(f"{key}: {value}")
    if not info["cuda_loaded"]:
        return fail(f"the {origin} libraries don't load: {info['cuda_missing']}")
    try:
        x = torch.zeros(4, 250, device=device)
        x = fpi_cuda.fixed_point(lambda x: x / 2 + 1, x, backend="native").x.cpu()
    except RuntimeError as error:
        return fail(f"no kernel of the {origin} libraries runs: {str(error).splitlines()[0]}")
    if not bool(((x - 2).abs() < 1e-2).all()):
        return fail(f"the {origin} libraries say that x = x / 2 + 1 at {float(x[0, 0])}")
    print(f"the {origin} libraries: loaded, and a kernel runs")
    return 0


def build() -> int:
    """Builds for this device alone; where that fails, for the CPU, all that Triton needs."""
    import torch

    nvcc = os.environ.get("CUDACXX") or find("nvcc")
    env = os.environ | {"FPI_CUDA_BUILD": "cuda"}
    env.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code = 1
    if nvcc:
        env["CUDACXX"] = nvcc
        code = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
    if code == 0:
        return loaded("built")
    subprocess.run(command, cwd=ROOT, env=env | {"FPI_CUDA_BUILD": "cpu"}, check=False)
    if not nvcc:
        return fail(
            f"nvcc was not found in PATH, CUDACXX or {TOOLKIT}: put it into PATH, or run `make "
            "gpu-carry` where it is and bring the folder gpu-carry along"
        )
    return fail("the build for CUDA failed; the lines before say why")


def packages() -> int:
    for folder in sorted(CARRY.glob("packages/*")):
        if version(folder.name) is None:
            print(folder)
    return 0


def folder() -> int:
    from .machine import slug

    print(f"benchmarks/results/{slug('cuda')}")
    return 0


def seal() -> int:
    """Notes what the libraries were built from, and refuses what is too large to be carried."""
    (CARRY / "sources").write_text(sources() + "\n")
    for library in sorted(CARRY.glob("*.so")):
        print(f"{library.relative_to(ROOT)}: {library.stat().st_size / MIB:.1f} MiB")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    tree = size(ROOT / os.fsdecode(name) for name in names if name)
    of_carry = size(CARRY.rglob("*"))
    print(
        f"gpu-carry: {of_carry / MIB:.1f} MiB (at most {CARRIED_AT_MOST // MIB}); with the tree "
        f"{(tree + of_carry) / MIB:.1f} MiB (at most {TREE_AT_MOST // MIB})"
    )
    if of_carry > CARRIED_AT_MOST or tree + of_carry > TREE_AT_MOST:
        return fail("gpu-carry: that is too large; remove or ignore what need not come along")
    return 0


def size(paths) -> int:
    return sum(path.lstat().st_size for path in paths if path.is_file())


COMMANDS = {
    f.__name__: f for f in (device, facts, carried, build, packages, folder, seal)
}  # fmt: skip

if __name__ == "__main__":
    name, *options = sys.argv[1:] or ["none"]
    if name not in COMMANDS:
        raise SystemExit(f"on_gpu: the command must be one of {', '.join(COMMANDS)} (got {name})")
    sys.exit(COMMANDS[name](*(option == "--tiny" for option in options)))
