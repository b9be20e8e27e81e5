"""The smoke parts run to their end without a device, and tell what is wrong when something is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.smoke import __main__ as smoke
from benchmarks.smoke import check
from benchmarks.smoke.check import Error, Place
from benchmarks.smoke.parts import PARTS
from fpi_cuda.backends import native

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]


def run_under_the_stand_in(module, *arguments, path=ROOT):
    """Its exit code, and the lines it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.stand_in", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert lines and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.returncode, lines


@pytest.fixture(scope="module")
def rehearsed():
    """What all parts print on a device that is stood in for."""
    code, lines = run_under_the_stand_in("benchmarks.smoke", "all", "--device", "cuda")
    assert code == sum(line.startswith("FAIL") for line in lines)
    return lines


def test_a_stand_in_says_that_it_is_one(rehearsed):
    assert rehearsed[0].startswith("stand-in: no device")
    assert "no figure means anything" in rehearsed[0]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_to_its_end_under_the_stand_in(rehearsed, part):
    lines = [line for line in rehearsed if line[6:].startswith(f"{part}/")]
    if part.startswith(("triton", "conv")) and not lines:
        assert any(line.startswith(f"skip  {part}  triton is not installed") for line in rehearsed)
        return
    assert lines
    assert [line for line in lines if not line.startswith("ok    ")] == []


@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_to_its_end_on_the_cpu(part, capsys):
    assert smoke.main([part, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert {line[:6] for line in lines} in ({"ok    "}, {"skip  "})


def test_the_list_has_the_parts_alone(capsys):
    assert smoke.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(PARTS)


def test_an_unknown_part_names_the_known(capsys):
    assert smoke.main(["picard", "picards"]) == smoke.UNKNOWN == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "load, picard, anderson" in said.err and "(got picards)" in said.err
    assert smoke.main([]) == smoke.UNKNOWN


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_one_line_says_what_to_do(capsys):
    assert smoke.main(["picard"]) == smoke.NO_DEVICE == 101
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert "CUDA" in said.err and "benchmarks.stand_in" in said.err


# --- what is wrong shows ------------------------------------------------------------------------


def shift_x(p, x, *_):
    x[0, -1] += 1e-3


def forget_a_row(p, *_):
    p.tally[0] -= 1


def write_out(p, *_):
    p.out[0, 0] = 0


def leave_residual(p, *_):
    p.scalars[0, 0] *= 1 + 1e-4


def leave_window(p, x, gx, beta, ridge, restart, values, *_):
    values[0, p.counters[0, 4], -1] = float("nan")


def shift_product(out):
    out[-1, -1] += 1e-3 * out[-1, -1].abs() + 1e-2


def failures(part, capsys):
    code = smoke.main([part, "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAIL  ")]
    assert code == min(len(failed), smoke.MOST_FAILED) > 0
    return failed


@pytest.mark.parametrize(
    ("part", "name", "wrong", "where"),
    [
        ("picard", "picard_step", shift_x, ": x)"),
        ("picard", "picard_step", forget_a_row, "tally"),
        ("picard", "picard_step", write_out, "out"),
        ("picard", "picard_step", leave_residual, "residual"),
        ("anderson", "anderson_step", leave_window, "values"),
    ],
)
def test_a_wrong_step_fails(part, name, wrong, where, monkeypatch, capsys):
    right = getattr(native, name)

    def off(p, x, *rest, **more):
        right(p, x, *rest, **more)
        if x.dtype == torch.float32:  # of the others nothing is wrong
            wrong(p, x, *rest)

    monkeypatch.setattr(native, name, off)
    failed = failures(part, capsys)
    assert any(where in line for line in failed), failed
    assert all("float32" in line or "finish" in line or "history" in line for line in failed)


def test_a_wrong_product_fails(monkeypatch, capsys):
    right = native.dense_map

    def off(x, *rest):
        out = right(x, *rest)
        if x.dtype == torch.float32:
            shift_product(out)
        return out

    monkeypatch.setattr(native, "dense_map", off)
    failed = failures("dense_map", capsys)
    assert all("-float32 " in line or "-tf32 " in line or "/exact " in line for line in failed)
    assert any("-float32 " in line for line in failed)


def test_a_wrong_solve_fails(monkeypatch, capsys):
    right = native.dense_solve

    def off(p, *rest):
        right(p, *rest)
        p.out[-1] *= 1.01

    monkeypatch.setattr(native, "dense_solve", off)
    failed = failures("dense_solve", capsys)
    assert any("float64" in line for line in failed) and any("float32" in line for line in failed)


def run(part, device="cpu"):
    return check.run("part", part, Place(device, tiny=True))


def test_an_exception_is_told_with_its_place_and_the_next_check_runs(capsys):
    def broken():
        raise ValueError("first line\nsecond line")

    def late():
        yield Error("right", 0.0, 1.0)
        raise KeyError("in the middle")

    def part(place):
        yield "broken", broken
        yield "late", late
        yield "right", lambda: [Error("x", 1e-8, 1e-6)]
        raise RuntimeError("no more checks")

    assert run(part) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAIL  part/broken  ValueError: first line  at test_smoke.py:")
    assert lines[1].startswith("FAIL  part/late  KeyError: 'in the middle'  at test_smoke.py:")
    assert lines[2] == "ok    part/right  error 1.0e-08 of 1e-06  (x)"
    assert lines[3].startswith("FAIL  part/setup  RuntimeError: no more checks")
    assert len(lines) == 4


def test_a_lost_context_ends_its_part(monkeypatch, capsys):
    lost = []

    def synchronize():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(check, "poison", lambda device: None)

    def part(place):
        yield "right", lambda: "as it should be"
        yield "illegal", lambda: lost.append(1) or "the kernel was launched"
        yield "after", lambda: "never"

    assert run(part, "cuda") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["part/right", "part/illegal", "part"]
    assert "illegal memory access" in lines[1] and "the CUDA context is lost" in lines[2]


@pytest.mark.parametrize(
    "error",
    [Error("", 2e-6, 1e-6), Error("", float("nan"), 1.0), Error("", float("inf"), 1.0)],
)
def test_the_worst_error_is_told(error, capsys):
    assert run(lambda place: iter([("x", lambda: [Error("", 0.0, 0.0), error])])) == 1
    assert capsys.readouterr().out.startswith("FAIL  part/x  error ")


def test_nothing_compared_is_no_success(capsys):
    assert run(lambda place: iter([("x", list)])) == 1
    assert "nothing was compared" in capsys.readouterr().out


def test_the_exit_code_stops_at_a_hundred(monkeypatch, capsys):
    many = iter([(str(i), list) for i in range(300)])
    monkeypatch.setitem(PARTS, "load", lambda place: many)
    assert smoke.main(["load", "--device", "cpu"]) == smoke.MOST_FAILED == 100


def test_norms_see_what_was_not_written():
    nan = float("nan")
    right = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert check.norm_error(right, right) == 0
    assert check.norm_error(right + torch.tensor([[0.5, 0], [0, 0]]), right, rows=True) == 0.1
    assert check.norm_error(right + torch.tensor([[0, 0], [0.5, 0]]), right, rows=True) == 0.5
    assert check.norm_error(torch.tensor([[3.0, nan], [0.0, 1.0]]), right) == float("inf")
    assert check.norm_error(right[:1], right) == float("inf")
    assert check.same("", torch.tensor([nan, 1.0]), torch.tensor([nan, 2.0])).found == 1


# --- the stand-in -------------------------------------------------------------------------------

DEVICE = """
import threading, warnings
import torch

x = torch.zeros(3, device="cuda")
assert x.is_cuda and (x + 1).device == torch.device("cuda", 0) and x[1:].is_cuda
assert x.cuda() is x and not x.cpu().is_cuda and torch.tensor([1.0], device="cuda").is_cuda
assert torch.nn.Linear(2, 3).to("cuda").weight.is_cuda and x.to(torch.zeros(1)).device.type == "cpu"

def raises(call, said):
    try:
        call()
    except RuntimeError as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)

raises(lambda: x + torch.zeros(3), "at least two devices")
found = []
def work():
    try:
        torch.ones(3, device="cuda") + torch.zeros(3)
    except RuntimeError as error:
        found.append(str(error))
thread = threading.Thread(target=work)
thread.start(); thread.join()
assert "at least two devices" in found[0]

torch.cuda.set_sync_debug_mode("error")
for wait in (x[0].item, x.cpu, x.nonzero, x.tolist, lambda: x[x > 0], lambda: torch.equal(x, x)):
    raises(wait, "synchronizing CUDA operation")
x.to("cpu", non_blocking=True)
torch.cuda.set_sync_debug_mode("default")

graph, number = torch.cuda.CUDAGraph(), torch.tensor(2.0)
with torch.cuda.graph(graph):
    y = x * number + x.square().sum()
x.fill_(1.0)
number.fill_(5.0)
graph.replay()
assert y.tolist() == [5.0, 5.0, 5.0]  # what lies on the device is read anew, a number is built in

def waits():
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
raises(waits, "previous error during capture")
assert not torch.cuda.is_current_stream_capturing()
print("device")
"""


def test_the_stand_in_tells_devices_apart_and_waits_and_what_a_graph_keeps(tmp_path):
    (tmp_path / "script_for_a_device.py").write_text(DEVICE)
    code, lines = run_under_the_stand_in("script_for_a_device", path=tmp_path)
    assert (code, lines[-1]) == (0, "device")


def test_the_stand_in_hands_on_the_exit_code(tmp_path):
    (tmp_path / "script_that_fails.py").write_text("import sys; sys.exit(7)")
    assert run_under_the_stand_in("script_that_fails", path=tmp_path)[0] == 7
