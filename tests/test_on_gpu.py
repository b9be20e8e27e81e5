"""benchmarks/on_gpu.sh: no part keeps another from running, each ends with a line, and all in time.

Most tests put a shell script in Python's place: what is tested is what becomes of the parts.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch

import fpi_cuda
from benchmarks import devices, on_gpu

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
OPTIONS = (
    *("OUT", "PYTHON", "BUDGET", "LONGEST", "SLOW", "SMOKE", "TIMED", "REHEARSE"),
    *("DATA", "PYTHONPATH", "PYTEST_ADDOPTS"),
)

PYTHON = """#!/bin/bash
case "$*" in
  *"smoke --list") printf '%s\\n' 'Warning: no name' {names} ;;
  *"smoke bad "*) echo 'ok    bad/first'; echo 'FAIL  bad/second  why'; echo 'the end'; exit 7 ;;
  *"smoke crash "*) kill -SEGV $$ ;;
  *"smoke hang "*) trap '' TERM; echo waiting; while :; do sleep 1; done ;;
  *"smoke slow"*) sleep 1 ;;
  *"smoke long "*) head -c 9000000 /dev/zero | tr '\\0' x; echo; echo 'the end' ;;
  *"on_gpu packages") ;;
  *"on_gpu folder") exit 1 ;;
  *"on_gpu device") echo '{device}'; exit {device_code} ;;
  *"on_gpu carried") echo 'does not load'; exit {carried} ;;
  *" --json "*) while [ "$1" != --json ]; do shift; done; echo '{{}}' > "$2" ;;
esac
"""
TIMED = ("kernels", "loop", "whole", "convolutions")
TOOLS = ("nvidia-smi", "compute-sanitizer", "ncu")


class Run:
    """What a run printed, and its parts' exit codes ("skipped", where they are) and notes."""

    def __init__(self, code, said):
        self.code, self.said = code, said
        found = re.findall(r"^(\S+) +(?:(skipped)|(\d+) +\d+ s) *(.*)$", self.said, re.MULTILINE)
        self.parts = {name: skipped or int(code) for name, skipped, code, _ in found}
        self.notes = {name: note for name, *_, note in found}
        self.skipped = [name for name, code in self.parts.items() if code == "skipped"]
        self.failed = {n: code for n, code in self.parts.items() if code not in (0, "skipped")}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def first(tmp_path, out):
    """Runs the script. names: of smoke parts; tools: those of a device that are found."""

    def run(*stages, names=("good",), tools=TOOLS, device="fine", device_code=0, carried=0, **env):
        programs = tmp_path / "bin"
        programs.mkdir()
        made = {tool: "#!/bin/bash\necho used\n" for tool in tools}
        listed = " ".join(f"'{name}  about it'" for name in names)
        made["python"] = PYTHON.format(
            names=listed, device=device, device_code=device_code, carried=carried
        )
        for name, text in made.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        given = {"PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
        given |= {"PYTHON": str(programs / "python"), "OUT": str(out)} | env
        return call(*(stages or ("first",)), cwd=tmp_path, **given)

    return run


def call(*stages, cwd=ROOT, signal_after=None, **env):
    kept = {k: v for k, v in os.environ.items() if k not in OPTIONS}
    options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    said = ""
    with subprocess.Popen(["bash", SCRIPT, *stages], env=kept | env, cwd=cwd, **options) as run:
        for line in run.stdout:
            said += line
            if signal_after and line.startswith(signal_after):
                run.terminate()
    return Run(run.returncode, said)


def logs(out):
    with tarfile.open(out / "logs.tar.gz") as archive:
        return {Path(m.name).stem: m.size for m in archive.getmembers() if m.isfile()}


def test_every_part_runs_and_is_written_down(first, out):
    run = first()
    assert run.code == 0 and not run.failed, run.said
    assert run.skipped == ["libraries-built"]
    assert run.said == (out / "summary").read_text()
    assert run.said.splitlines()[-1].startswith("0 failed, 1 skipped, ")
    assert set(logs(out)) == set(run.parts) - set(run.skipped)
    timed = {f"{name}.json" for name in TIMED}
    assert {path.name for path in out.iterdir()} == {"summary", "logs.tar.gz", *timed}
    assert not list(out.parent.glob("tmp.*"))
    order = list(run.parts)
    for earlier, later in (
        ("device", "libraries-carried"),
        ("libraries-carried", "smoke-good"),
        ("smoke-good", "tests"),
        ("tests-triton", "time-kernels"),
        ("time-convolutions", "memcheck"),
    ):
        assert order.index(earlier) < order.index(later)


def test_the_second_call_keeps_to_eight_files_and_is_rehearsed_at_tiny_sizes(first, out):
    run = first("bench", device="fine")
    assert run.code == 0 and {"time-solve", "time-nets", "time-peers"} < set(run.parts), run.said
    assert len(list(out.iterdir())) <= 8
    shutil.rmtree(out.parent / "bin")
    run = first("bench", REHEARSE="1", PYTHON="echo", TIMED="solve peers")
    assert "solve training --kinds easy hard --device cuda" in run.notes["time-solve"]
    assert "peers --device cuda" in run.notes["time-peers"]
    assert "--tiny" in run.notes["time-peers"]


def test_parts_that_fail_crash_or_hang_hide_nothing(first, out):
    names = ("bad", "crash", "hang", "long", "good")
    run = first(names=names, tools=(), LONGEST="4")
    codes = {"nvidia-smi": 127, "smoke-bad": 7, "smoke-crash": 139, "smoke-hang": 137}
    assert run.failed == codes and run.code == len(codes), run.said
    assert run.notes["smoke-bad"] == "FAIL  bad/second  why"
    assert run.notes["smoke-hang"] == "ended after its 4 s; waiting"
    assert run.notes["smoke-long"] == "the end" and logs(out)["smoke-long"] < 4e6
    assert run.parts["smoke-good"] == run.parts["tests"] == run.parts["time-kernels"] == 0
    for name in ("memcheck", "racecheck", "ncu"):
        assert "was not found in PATH" in run.notes[name] and name in run.skipped


def test_where_time_is_short_parts_get_less_or_are_skipped_by_name(first, out):
    names = [f"slow{i}" for i in range(60)]
    run = first(names=names, BUDGET="16", LONGEST="6")
    # A part that was given less may have been ended by that.
    assert run.code == len(run.failed) and set(run.failed.values()) <= {124}, run.said
    assert all(run.notes[name].startswith("(given ") for name in run.failed)
    assert set(run.parts) > {f"smoke-{name}" for name in names}
    assert any(re.match(r"\(given [345] s of 6\)", note) for note in run.notes.values()), run.said
    assert {*run.skipped} > {"smoke-slow59", "tests", "time-whole", "ncu"}
    assert run.notes["tests"].startswith("it may take 6 s, and of BUDGET = 16 s too little is left")
    assert run.said == (out / "summary").read_text()


def test_where_the_carried_libraries_do_not_load_they_are_built(first):
    run = first("build", carried=1)
    assert run.failed == {"libraries-carried": 1} and run.parts["libraries-built"] == 0
    assert run.notes["libraries-carried"] == "does not load"


def test_without_a_device_every_part_says_so(first, out):
    why = "torch sees no CUDA device. Do this"
    run = first(device=why, device_code=on_gpu.UNUSABLE)
    assert run.failed == {"device": on_gpu.UNUSABLE} and run.code == 1
    assert {run.notes[name] for name in run.skipped} == {why}
    assert {"facts", "libraries-built", "smoke-good", "tests", "time-whole", "ncu"} < {*run.skipped}
    assert run.said == (out / "summary").read_text()


def test_a_device_check_that_breaks_stops_nothing(first):
    run = first(device="Traceback", device_code=1)
    assert run.failed == {"device": 1} and run.skipped == ["libraries-built"]


def test_a_signal_ends_what_runs_and_keeps_what_is_known(first, out):
    run = first(names=("good", "hang"), signal_after="smoke-good")
    assert run.code == 130
    assert run.failed == {"smoke-hang": 137}, run.said
    assert "stopped by a signal" in run.said.splitlines()[-1]
    assert run.said == (out / "summary").read_text() and "smoke-hang" in logs(out)


@pytest.mark.parametrize("kind", ["file", "full"])
def test_where_out_cannot_be_written_the_terminal_has_the_summary(kind, first, out, request):
    if kind == "file":
        out.write_text("")
    else:
        out.mkdir()
        full_file_system(out, request)
    run = first("build", "smoke")
    assert run.code == 0 and run.parts["smoke-good"] == 0
    (line,) = [line for line in run.said.splitlines() if line.startswith("on_gpu.sh:")]
    assert f"OUT={out}" in line and "name a folder with room" in line
    assert ("File exists" if kind == "file" else "No space left on device") in line
    kept = Path(line.rpartition(" ")[2])
    assert "smoke-good" in (kept / "summary").read_text()
    assert (kept / "logs" / "smoke-good.log").exists()


def full_file_system(folder, request):
    """Mounts one of 16 KiB there, and fills it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    done = shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False)
    if not done or done.returncode != 0:
        pytest.skip("a full file system can be made by root alone")
    request.addfinalizer(lambda: subprocess.run(["umount", str(folder)], check=True))
    with pytest.raises(OSError, match="No space left"):
        (folder / "other").write_bytes(bytes(2**15))


def test_a_missing_out_is_made_and_an_unset_one_is_told(first, tmp_path):
    run = first("build", OUT=str(tmp_path / "a" / "b"))
    assert "OUT" not in run.said
    assert (tmp_path / "a" / "b" / "summary").read_text() == run.said


@pytest.mark.parametrize("stages", [(), ("frist",), ("first", "all")])
def test_an_unknown_stage_is_an_error_before_anything_runs(stages):
    run = call(*stages)
    assert run.code == 2 and not run.parts
    assert "each argument must be one of: first build smoke tests" in run.said


# --- what it asks of Python -------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The command's folders, all of them empty."""
    for name, folder in (("ROOT", ""), ("CARRY", "gpu-carry"), ("PACKAGE", "fpi_cuda")):
        monkeypatch.setattr(on_gpu, name, tmp_path / folder)
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("a")
    (tmp_path / "CMakeLists.txt").write_text("b")
    return tmp_path


@pytest.mark.parametrize(
    ("available", "cuda", "capability", "said"),
    [
        (False, None, None, "has no CUDA; install a torch that has"),
        (False, "13.0", None, "torch sees no CUDA device; see what nvidia-smi says"),
        (True, "13.0", (7, 5), "Tesla T4 is too old: compute capability 7.5"),
    ],
)
def test_a_device_that_cannot_be_used_is_told_with_what_to_do(
    available, cuda, capability, said, monkeypatch, capsys
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    assert on_gpu.device() == on_gpu.UNUSABLE
    (line,) = capsys.readouterr().out.splitlines()
    assert said in line and "Name in PYTHON an interpreter whose torch" in line


def test_carried_libraries_must_be_of_these_sources(here, capsys, monkeypatch):
    assert on_gpu.carried() == 1
    assert "`make gpu-carry` makes them" in capsys.readouterr().out
    (here / "gpu-carry" / "_C.so").write_text("new")
    (here / "fpi_cuda" / "_C.old.so").write_text("old")
    (here / "gpu-carry" / "sources").write_text(on_gpu.sources() + "\n")
    monkeypatch.setattr(on_gpu, "loaded", lambda origin: 0)
    (here / "csrc" / "a.cu").write_text("changed")
    assert on_gpu.carried() == 1
    assert "are of other sources: repeat `make gpu-carry`" in capsys.readouterr().out
    (here / "csrc" / "a.cu").write_text("a")
    assert on_gpu.carried() == 0
    assert [path.name for path in (here / "fpi_cuda").glob("*.so")] == ["_C.so"]


def test_libraries_without_cuda_do_not_pass(capsys):
    if torch.cuda.is_available():
        pytest.skip("this build has CUDA")
    assert on_gpu.loaded("carried") == 1
    assert "the carried libraries don't load: " in capsys.readouterr().out


def test_libraries_must_solve_to_pass(capsys, monkeypatch):
    monkeypatch.setattr(fpi_cuda, "build_info", lambda: {"cuda_loaded": True})
    assert on_gpu.loaded("carried", "cpu") == 0
    wrong = types.SimpleNamespace(x=torch.full((4, 250), 3.0))
    monkeypatch.setattr(fpi_cuda, "fixed_point", lambda *_, **__: wrong)
    assert on_gpu.loaded("carried", "cpu") == 1
    assert "x = x / 2 + 1 at 3.0" in capsys.readouterr().out


@pytest.mark.parametrize("nvcc", [None, "/opt/nvcc"])
def test_a_build_that_fails_still_makes_what_triton_needs(nvcc, here, monkeypatch, capsys):
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(on_gpu, "find", lambda tool: nvcc)
    built = []

    def run(command, env, **_):
        built.append((env["FPI_CUDA_BUILD"], env["TORCH_CUDA_ARCH_LIST"], env.get("CUDACXX")))
        return types.SimpleNamespace(returncode=1)

    monkeypatch.setattr(on_gpu.subprocess, "run", run)
    assert on_gpu.build() == 1
    said = capsys.readouterr().out
    if nvcc:
        assert built == [("cuda", "9.0", nvcc), ("cpu", "9.0", nvcc)]
        assert "the build for CUDA failed" in said
    else:
        assert built == [("cpu", "9.0", None)]
        assert "nvcc was not found in PATH" in said and "`make gpu-carry`" in said


def test_packages_that_are_installed_are_not_taken_from_the_carried(here, capsys):
    for name in ("torch", "no-such-package"):
        (here / "gpu-carry" / "packages" / name).mkdir(parents=True)
    assert on_gpu.packages() == 0
    assert capsys.readouterr().out == f"{here / 'gpu-carry' / 'packages' / 'no-such-package'}\n"


def test_what_is_too_large_to_be_carried_is_refused(here, monkeypatch, capsys):
    git = ["git", "-c", "init.defaultBranch=main", "init", "--quiet", str(here)]
    subprocess.run(git, check=True)
    (here / ".gitignore").write_text("/gpu-carry/\n")
    (here / "gpu-carry" / "_C.so").write_bytes(bytes(on_gpu.MIB))
    assert on_gpu.seal() == 0
    assert (here / "gpu-carry" / "sources").read_text() == on_gpu.sources() + "\n"
    assert "gpu-carry: 1.0 MiB (at most 20); with the tree 1.0 MiB" in capsys.readouterr().out
    (here / "untracked").write_bytes(bytes(on_gpu.MIB))
    monkeypatch.setattr(on_gpu, "TREE_AT_MOST", 2 * on_gpu.MIB)
    assert on_gpu.seal() == 1
    assert "that is too large" in capsys.readouterr().out


# --- rehearsals -------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_on_this_machine_without_a_device_the_summary_is_whole(out):
    run = call("first", OUT=str(out), PYTHON=sys.executable, SLOW="10")
    assert run.failed.keys() <= {"nvidia-smi", "device"} and run.code == len(run.failed)
    assert run.failed["device"] == on_gpu.UNUSABLE
    assert {run.notes[name] for name in run.skipped} == {run.notes["device"]}
    assert run.notes["device"].startswith(devices.refusal())
    assert {"smoke-picard", "tests", "time-whole", "memcheck"} < {*run.skipped}


def rehearse(out, **some):
    run = call("first", OUT=str(out), PYTHON=sys.executable, REHEARSE="1", SLOW="20", **some)
    assert run.code == 0 and not run.failed, run.said
    for name in ("nvidia-smi", "libraries-carried", "libraries-built"):
        assert run.notes[name] == "only a device can do it" and name in run.skipped
    for name, most in (("memcheck", 8), ("racecheck", 3), ("ncu", 3)):
        assert 0 < int(re.match(r"(\d+)/\d+ tests collected", run.notes[name])[1]) <= most
    return run


def test_a_rehearsal_comes_to_its_end(out):
    run = rehearse(out, SMOKE="load picard", TIMED="kernels")
    assert len(run.skipped) == 3 + len(TIMED) - 1
    assert (out / "kernels.json").stat().st_size > 1000


@pytest.mark.slow
def test_a_rehearsal_of_all_comes_to_its_end(out):
    assert len(rehearse(out).skipped) == 3
    assert all((out / f"{name}.json").stat().st_size > 1000 for name in TIMED)


LOST = """
import torch

def test_lost(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = synchronize
    assert "what went" == "wrong"

def test_next():
    raise AssertionError("of the lost context")
"""


@pytest.mark.parametrize("worker", [True, False])
def test_a_process_of_many_ends_where_its_cuda_context_is_lost(worker, tmp_path):
    (tmp_path / "test_lost.py").write_text(LOST)
    folders = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    env = os.environ | {"PYTHONPATH": folders} | ({"PYTEST_XDIST_WORKER": "gw0"} if worker else {})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "what went" in done.stderr + done.stdout
    assert ("of the lost context" in done.stdout) != worker
