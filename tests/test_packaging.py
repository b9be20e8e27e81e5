"""The build: what a wheel holds, what each FPI_CUDA_BUILD does, and what a broken install says."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fpi_cuda
from fpi_cuda.backends import native
from fpi_cuda.record import Limits, Progress

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("FPI_CUDA_BUILD", "FPI_CPU_CAPABILITY", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "DEBUG")

USE = """
import torch, fpi_cuda
x = torch.full((1, 1000), 0.25)
torch.ops.fpi_cuda._dense_map(torch.ones(1, 1), torch.zeros(1000, 1), None, x, False)
assert (x == 0).all()
info = fpi_cuda.build_info()
print(fpi_cuda._C.__file__, info["cuda_missing"], info["cpu_capability"], sep="|")
"""


def environment(**changes):
    kept = {k: v for k, v in os.environ.items() if k not in (*OPTIONS, "PYTHONPATH")}
    return kept | changes


def without_nvcc(tmp_path):
    """PATH with every program of the current one but nvcc."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).glob("*"):
            link = programs / program.name
            if program.name != "nvcc" and not link.exists() and not link.is_symlink():
                link.symlink_to(program)
    return str(programs)


def call(*command, cwd, **changes):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**changes),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def python(*arguments, cwd, **changes):
    return call(sys.executable, *arguments, cwd=cwd, **changes)


def configure(tmp_path, **changes):
    """Output of the configuration of a build, without line breaks, and whether it succeeded."""
    copy = tmp_path / "source"
    if not copy.exists():
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        shutil.copy(ROOT / "CMakeLists.txt", copy)
    done = call(
        *("cmake", "-S", copy, "-B", copy / "build", "-G", "Ninja"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DFPI_CUDA_BUILD={changes.pop('FPI_CUDA_BUILD', 'auto')}",
        cwd=tmp_path,
        PATH=str(Path(sys.executable).parent)
        + os.pathsep
        + changes.pop("PATH", os.environ["PATH"]),
        **changes,
    )
    return " ".join(done.stdout.split()), done.returncode == 0


def test_sdist_gives_a_wheel_that_works_without_nvcc(tmp_path):
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    done = python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    (sdist,) = tmp_path.glob("*.tar.gz")

    installed = tmp_path / "installed"
    pip = ("-m", "pip", "--disable-pip-version-check")
    alone = ("--no-deps", "--no-index")
    done = python(
        *(*pip, "wheel", *alone, "--no-build-isolation", "-v", "-w", tmp_path, sdist),
        cwd=tmp_path,
        PATH=without_nvcc(tmp_path),
        FPI_CUDA_BUILD="cpu",
        DEBUG="1",  # compiles in half the time
    )
    assert done.returncode == 0, done.stdout
    assert "fpi_cuda builds: CPU" in done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"fpi_cuda/_C\..*\.so", name) for name in names)
    assert "fpi_cuda/py.typed" in names
    assert [name for name in names if not re.match(r"fpi_cuda(/|-.*dist-info/)", name)] == []

    done = python(*pip, "install", *alone, "--target", installed, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    done = python("-c", USE, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stdout
    file, cuda_missing, _ = done.stdout.splitlines()[-1].split("|")
    assert Path(file).is_relative_to(installed)
    assert cuda_missing == "FPI_CUDA_BUILD=cpu"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_auto_builds_no_cuda_for_a_torch_without_it(tmp_path):
    said, good = configure(tmp_path)
    assert good, said
    assert re.search(r"fpi_cuda builds: CPU \(\S+\) with torch \S+; no CUDA, because torch", said)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_demanded_of_a_torch_without_it_fails(tmp_path):
    said, good = configure(tmp_path, FPI_CUDA_BUILD="cuda")
    assert not good
    assert f"FPI_CUDA_BUILD=cuda can't be done: torch {torch.__version__} has no CUDA" in said
    assert "set FPI_CUDA_BUILD=cpu" in said


def test_cuda_demanded_without_nvcc_fails(tmp_path):
    said, good = configure(tmp_path, FPI_CUDA_BUILD="cuda", PATH=without_nvcc(tmp_path))
    assert not good
    assert "nvcc was not found" in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc in PATH")
def test_nvcc_of_another_cuda_than_torchs_fails(tmp_path):
    other = tmp_path / "other" / "torch"  # all that the configuration reads of a torch
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    (other / "version.py").write_text("__version__ = '2.10.0+cu110'\ncuda = '11.0'\n")
    said, good = configure(tmp_path, PYTHONPATH=str(other.parent))
    assert not good
    assert "can't build for torch 2.10.0+cu110, whose CUDA is 11.0" in said


def test_unknown_choice_fails(tmp_path):
    said, good = configure(tmp_path, FPI_CUDA_BUILD="gpu")
    assert not good
    assert "FPI_CUDA_BUILD must be auto, cpu or cuda (got gpu)" in said


def test_unreadable_architectures_fail(tmp_path):
    said, good = configure(tmp_path, FPI_CUDA_BUILD="cuda", TORCH_CUDA_ARCH_LIST="Hopper")
    assert not good
    assert "TORCH_CUDA_ARCH_LIST must list numbers like 8.0;9.0+PTX (got Hopper)" in said


def test_missing_native_library_is_an_import_error_with_the_reason(tmp_path):
    package = Path(fpi_cuda.__file__).parent
    shutil.copytree(package, tmp_path / "fpi_cuda", ignore=shutil.ignore_patterns("*.so"))
    # An editable install of this tree would lend its own library.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "
        "import fpi_cuda"
    )
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "ImportError: fpi_cuda's native library could not be loaded: No module" in done.stdout
    assert "pip install --no-build-isolation ." in done.stdout


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_cpu_capability_can_be_lowered(tmp_path, capability):
    package = Path(fpi_cuda.__file__).parent.parent
    done = python("-c", USE, cwd=tmp_path, PYTHONPATH=str(package), FPI_CPU_CAPABILITY=capability)
    if capability in fpi_cuda.build_info()["cpu_capabilities_available"]:
        assert done.returncode == 0, done.stdout
        assert done.stdout.strip().endswith(f"|{capability}")
    else:
        assert "FPI_CPU_CAPABILITY must be one of default" in done.stdout


def test_no_kernel_leaves_an_inline_function_to_the_linker():
    folders = [
        folder
        for folder in (ROOT / "build").glob("*/CMakeFiles/cpu_avx*.dir")
        if "debug" not in folder.parent.parent.name
    ]
    if not folders:
        pytest.skip("no build folder with AVX kernels in this tree")
    for folder in folders:
        for file in folder.rglob("*.o"):
            listed = call("nm", "--defined-only", file, cwd=ROOT).stdout
            weak = re.findall(r"^\S+ [WVu] (\S+)$", listed, re.MULTILINE)
            assert [name for name in weak if folder.stem not in name] == [], file


def test_build_info_agrees_with_torch():
    info = fpi_cuda.build_info()
    assert info["version"] == fpi_cuda.__version__
    assert info["torch_running"] == torch.__version__
    assert info["cpu_capability"] in info["cpu_capabilities_built"]
    assert (info["cuda_missing"] is None) == info["cuda_loaded"]
    if torch.version.cuda is None:
        assert not info["cuda_loaded"]


def operate(x, gx):
    forever = Limits(rtol=0.0, offset=0.0, rounding=0.0, patience=9, max_iterations=9)
    native.picard_step(Progress(x, forever), x, gx, 0.5)
    return x


ROW = torch.ones(1, 3)


@pytest.mark.parametrize(
    ("x", "gx", "message"),
    [
        (ROW, torch.ones(1, 4), "gx must have shape [1, 3] (got [1, 4])"),
        (ROW, ROW.double(), "gx must have the dtype of x, Float (got Double)"),
        (torch.ones(3, 2).t(), torch.ones(2, 3), "x must be contiguous (got shape [2, 3]"),
        (ROW.int(), ROW.int(), "x must be float16, bfloat16, float32 or"),
        (ROW, torch.ones(1, 3, requires_grad=True), "internal operator, not differentiable"),
    ],
    ids=["shape", "dtype", "strides", "integer", "requires-grad"],
)
def test_operator_refuses_with_its_name_first(x, gx, message):
    with pytest.raises(RuntimeError, match=f"^{re.escape('_picard_step: ' + message)}"):
        operate(x, gx)


def test_operator_refuses_a_tangent():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(ROW, torch.ones(1, 3))
        with pytest.raises(RuntimeError, match="_picard_step: internal operator"):
            operate(torch.zeros(1, 3), dual)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.vmap])
def test_operator_refuses_transforms(transform):
    with pytest.raises(RuntimeError, match="_picard_step: internal operator"):
        transform(lambda gx: operate(torch.zeros(1, 3), gx).sum())(ROW)
