"""Drives CMake, which is the build description; pyproject.toml holds the metadata.

Environment: FPI_CUDA_BUILD=auto|cpu|cuda, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1.
"""

import importlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str, folder: str) -> str:
    """Path of a build tool: from its package if this Python has it, else from PATH."""
    try:
        search = getattr(importlib.import_module(name), folder)
    except (ImportError, AttributeError):
        search = None
    found = shutil.which(name, path=search) or shutil.which(name)
    if found is None:
        raise SystemExit(f"fpi_cuda: {name} was not found; try `pip install {name}`")
    return found


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package folder: the build's, or the tree's own."""

    def run(self) -> None:
        cuda = os.environ.get("FPI_CUDA_BUILD", "auto")
        debug = os.environ.get("DEBUG", "0") not in ("", "0")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "fpi_cuda"
        # One folder a configuration, kept between builds, so that a rebuild compiles only changes.
        variant = (sys.implementation.cache_tag, f"torch{version('torch')}", cuda)
        folder = ROOT / "build" / "-".join(variant + ("debug",) * debug)
        # The cache is forgotten: it holds paths of an environment that may be gone.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            *(cmake, "-S", ROOT, "-B", folder, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFPI_CUDA_BUILD={cuda}",
        ]
        self.call(configure)
        commands = ROOT / "build" / "compile_commands.json"  # where clangd looks
        commands.unlink(missing_ok=True)
        commands.symlink_to(folder / commands.name)
        self.call([cmake, "--build", folder, "--parallel", jobs])
        for stale in package.glob("*.so"):  # of another configuration
            stale.unlink()
        self.call([cmake, "--install", folder, "--prefix", package])

    def call(self, command: list[str | Path]) -> None:
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"fpi_cuda: build failed in: {' '.join(map(str, command))}")


setup(ext_modules=[Extension("fpi_cuda._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
