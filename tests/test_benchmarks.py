"""The harness: its gate refuses what is wrong, its suites run, its page agrees."""

import json
import os
from pathlib import Path

import pytest
import torch

import fpi_cuda
from benchmarks import __main__ as command
from benchmarks import (
    clock,
    judge,
    memory,
    methods,
    page,
    problems,
    records,
    sources,
    suites,
    tables,
)
from benchmarks.methods import plain
from benchmarks.problems import nets
from benchmarks.suites import cell as cells
from benchmarks.suites import convergence, failing, importing, kernels, scale, scaling
from benchmarks.suites import dense as dense_suite
from benchmarks.suites import memory as memory_suite
from fpi_cuda.backends import native

ROOT = Path(__file__).resolve().parent.parent
RULE = problems.Rule()


@pytest.fixture(scope="module")
def tiny():
    return problems.make("hard", 16, 8, instances=2)


METHODS = {m.name: m for m in methods.all_methods()}


def early(g, x0, *rest):
    """Stops after 3 iterations."""
    for _ in range(3):
        x0 = g(x0, *rest)
    return x0


def nan_in_one_sample(g, x0, *rest):
    x = plain.plain(plain.picard)(RULE)(g, x0, *rest).clone()
    x[3] = torch.nan
    return x


def one_step_gradient(g, x0, *rest):
    with torch.no_grad():
        x = plain.plain(plain.picard)(RULE)(g, x0, *rest)
    return g(x, *rest)


@pytest.mark.parametrize(
    "wrong,reason",
    [(early, "residual"), (nan_in_one_sample, "residual"), (one_step_gradient, "gradient of W")],
)
def test_the_gate_refuses_a_wrong_method(wrong, reason, tiny, monkeypatch, capsys, tmp_path):
    runner = methods.Solver(tiny, lambda rule: wrong)
    assert reason in judge.judge(runner, backward=True).refusal(1e-2)

    # The same through the command: no time, no ratio, and the exit code says so where it is ours.
    plain_loop = METHODS[methods.PLAIN]
    entries = [methods.torch_method("Picard", "ours", lambda rule: wrong), plain_loop]
    monkeypatch.setattr(cells, "all_methods", lambda *_, **__: entries)
    file = tmp_path / "out.json"
    arguments = ["training", "--sizes", "16x8", "--kinds", "easy", "--budget", "0.001"]
    assert command.main([*arguments, "--json", str(file)]) == 1
    _, rows = records.load(file)
    (mine,) = (row for row in rows if row["family"] == "ours")
    assert reason in mine["refused"]
    assert "median_s" not in mine and "samples" not in mine
    assert "easy-16x8-float32-forward+backward Picard: " in capsys.readouterr().out


def test_the_denoise_suite_runs_to_its_end(capsys):
    size = f"2x{nets.CHANNELS * 5 * 5}"
    arguments = ["denoise", "--sizes", size, "--families", "ours", "plain", "--budget", "0.001"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "denoise: denoise, B = 2, N = 400, forward+backward" in printed
    assert "plain loop, compacted / " in printed


def test_the_dense_suite_runs_to_its_end(monkeypatch, capsys):
    monkeypatch.setattr(problems, "BIBTEX", ((8, 159),))
    monkeypatch.setattr(dense_suite, "MOST", 20)
    arguments = ["dense", "--sizes", "16x8", "--families", "ours", "plain", "--budget", "0.001"]
    assert command.main([*arguments, "--without", methods.COMPILED]) == 0
    printed = capsys.readouterr().out
    assert "energy, B = 8, N = 159, forward+backward" in printed
    assert "refill: time" in printed and "product's part" in printed


def test_variants_take_turns():
    order = []
    calls = {name: lambda i, name=name: order.append((name, i)) for name in "abc"}
    times = clock.interleave(calls, rounds=(4, 4))
    timed = [name for name, _ in order[6:]]
    assert timed == list("abc" + "bca" + "cab" + "abc")
    assert all(t.rounds == (0, 1, 2, 3) for t in times.values())
    assert clock.Times((3.0, 1.0, 2.0)).quartiles == (1.5, 2.5)


def test_peak_memory_is_what_lives_at_once():
    def call():
        a = torch.empty(1000)
        b = torch.empty(3000)
        del a
        return b, torch.empty(500)

    assert memory.peak(call, "cpu") == pytest.approx(4 * 4000, abs=256)


def test_peak_memory_counts_no_free_of_what_an_earlier_call_allocated():
    kept = []

    def call():
        kept.clear()
        kept.append(torch.empty(1000))
        return torch.empty(2000)

    assert [memory.peak(call, "cpu") for _ in range(3)] == [4 * 3000] * 3


def test_memory_kept_between_solves_counts():
    problem = problems.make("easy", 64, 32, instances=1)
    method = METHODS["Anderson"]
    window = 2 * methods.HISTORY * 64 * 32 * 4
    runner = method.build(problem)
    runner.forward(0)
    assert runner.peak_bytes(backward=False) > window


def test_the_command_on_a_tiny_size(tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = ["solve", "training", "overhead", "scale", "failing", "--sizes", "64x32"]
    arguments += ["--families", "ours", "plain", "replaced", "--without", methods.COMPILED]
    threads = torch.get_num_threads()
    code = command.main([*arguments, "--budget", "0.001", "--kinds", "easy", "--json", str(file)])
    facts, rows = records.load(file)
    assert code == 0
    assert facts["threads"] == threads
    assert facts["slug"].startswith("cpu-") and " " not in facts["slug"]
    assert {"commit", "versions", "command", "timestamp", "cpu"} <= facts.keys()
    done = [r for r in rows if r["suite"] in ("solve", "training")]
    assert {r["mode"] for r in done} == {"forward", "forward+backward"}
    for r in done:
        assert r["q1_s"] <= r["median_s"] <= r["q3_s"]
        assert len(r["samples"]) == len(r["rounds"]) == r["repeats"]
        assert r["residual_in_tolerances"] <= 1
        assert r["peak_bytes"] > 0 and r["evaluations"] > 0
    assert all(r["difference"] <= 1 for r in rows if r["suite"] == "scale")
    printed = capsys.readouterr().out
    assert "Picard: iterations, state scaled" in printed
    assert "CONVERGED 128, DIVERGED 128" in printed
    # It is pytest-benchmark's format: its own tools read it.
    content = json.loads(file.read_text())
    assert {"machine_info", "commit_info", "benchmarks", "datetime", "version"} <= content.keys()
    stats = content["benchmarks"][0]["stats"]
    assert {"min", "max", "mean", "median", "iqr", "rounds", "data"} <= stats.keys()


def test_a_failing_claim_is_wrong(monkeypatch):
    """The suite of failures must not pass whatever the library says."""
    options = suites.Options(families=("ours",))
    good = failing.failing_rows(options)
    assert all(r["refused"] is None for r in good)
    real = fpi_cuda.fixed_point

    class Boast:
        def __init__(self, solution):
            self.solution = solution
            self.converged = torch.ones_like(solution.converged)

        def __getattr__(self, name):
            return getattr(self.solution, name)

    def boasting(*args, **kwargs):
        return Boast(real(*args, **kwargs))

    monkeypatch.setattr(fpi_cuda, "fixed_point", boasting)
    said = failing.failing_rows(options)
    assert any("called converged that is not" in (r["refused"] or "") for r in said)


def test_scaling_memory_and_convergence_run_to_their_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(scaling, "BATCHES", (2, 4))
    monkeypatch.setattr(scaling, "SIZES", (4, 8))
    monkeypatch.setattr(scaling, "SLOWEST", (0.5,))
    monkeypatch.setattr(scaling, "COUNTS", (2, 4))
    monkeypatch.setattr(memory_suite, "ITERATIONS", (4, 8))
    monkeypatch.setattr(convergence, "TOLERANCES", (1e-2, 1e-3))
    arguments = ["scaling", "memory", "convergence", "--families", "ours", "plain", "replaced"]
    arguments += ["--kinds", "easy", "--sizes", "32x16", "--budget", "0.001"]
    file = tmp_path / "out.json"
    assert command.main([*arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    for part in ("scaling: ms against spread", "work and precision: ms of a forward, easy"):
        assert part in printed
    _, rows = records.load(file)
    curve = next(r["residuals"] for r in rows if r.get("curve") == "history")
    assert curve[0] > 0.5
    assert curve[-1] <= 1e-4
    unrolled = [
        r["peak_bytes"]
        for r in rows
        if r["suite"] == "memory" and r["method"] == "unrolled" and r["mode"] != "forward"
    ]
    assert unrolled[1] >= unrolled[0] + 4 * 32 * 16 * 4, "unrolling keeps an iterate an iteration"


def test_quick_runs_to_its_end(monkeypatch, capsys):
    for module in (kernels, importing, memory_suite, failing):  # their sizes are their own
        monkeypatch.setattr(module, "cells", lambda _: [])
    arguments = ["quick", "--sizes", "64x32", "--budget", "0.001", "--kinds", "easy"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "plain loop, compacted" in printed
    assert ("torchdeq Anderson" in printed) == (methods.absent("torchdeq") is None)


def test_a_cell_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    def broken(options):
        raise RuntimeError("broken on purpose")

    def two(options):
        yield suites.Cell("broken", lambda: broken(options))
        yield from scale.cells(options)

    monkeypatch.setitem(suites.SUITES, "scale", two)
    assert command.main(["scale"]) == 1
    printed = capsys.readouterr().out
    assert "broken on purpose" in printed and "state scaled" in printed


def test_list_names_every_method_and_cell(capsys):
    assert command.main(["--list", "solve"]) == 0
    printed = capsys.readouterr().out
    assert all(m.name in printed for m in methods.all_methods(grid=True))
    assert all(name in printed for name in suites.SUITES)
    assert "solve/hard-256x128-float32-forward" in printed
    assert suites.SUITES.keys() == suites.ABOUT.keys()


def test_an_unknown_method_is_an_error(capsys):
    with pytest.raises(SystemExit):
        command.main(["solve", "--without", "no such method"])
    assert "no method is called 'no such method'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--backend", "natife"], "invalid choice: 'natife'"),
        (["--json", "."], "must be a file that can be written"),
        (["--sizes", "256"], "a size is written BxN"),
        (["--compare", "no such file.json"], "--compare"),
    ],
)
def test_a_bad_option_is_an_error_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["solve", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--backend", "reference"], ["--dtype", "float64"]])
def test_other_backends_and_dtypes_run(options, capsys):
    arguments = ["training", "--sizes", "16x32", "--kinds", "two-layer", "--families", "ours"]
    assert command.main([*arguments, *options, "--budget", "0.001"]) == 0
    printed = capsys.readouterr().out
    assert "training: two-layer, B = 16, N = 32, forward+backward" in printed
    assert ("Picard, whole" in printed) == ("reference" not in options)


def raising(error):
    def build(problem):
        raise error

    return build


@pytest.mark.parametrize("suite", ["training", "memory"])
@pytest.mark.parametrize(
    "family,error,code,says",
    [
        ("ours", methods.NotForThis("weights too large"), 0, ("skipped", "weights too large")),
        ("jaxopt", MemoryError(), 0, ("skipped", "MemoryError: ")),
        ("ours", RuntimeError("broken"), 1, ("refused", "raised RuntimeError: broken")),
        ("plain", RuntimeError("broken"), 1, ("refused", "raised RuntimeError: broken")),
    ],
)
def test_a_method_that_raises_keeps_the_others(
    suite, family, error, code, says, monkeypatch, tmp_path, capsys
):
    """Skipped where it is not for the case, and a peer; else wrong, in the row and exit code."""
    other = METHODS[methods.COMPACTED]
    if family == "jaxopt" and suite == "training":
        suite = "peers"
    name = "plain Anderson"  # which all of these suites take
    entries = [methods.Method(name, family, raising(error)), other]
    monkeypatch.setattr(cells, "all_methods", lambda *_, **__: entries)
    monkeypatch.setattr(memory_suite, "ITERATIONS", (4, 8))
    file = tmp_path / "out.json"
    arguments = [suite, "--sizes", "16x8", "--kinds", "easy", "--budget", "0.001"]
    assert command.main([*arguments, "--device", "cpu", "--json", str(file)]) == code
    _, rows = records.load(file)
    stops, others = ([r for r in rows if (r["method"] == name) == on] for on in (True, False))
    key, text = says
    assert stops and all(row[key] == text for row in stops)
    assert all("median_s" not in row and "peak_bytes" not in row for row in stops)
    assert others and all("peak_bytes" in row for row in others)
    assert ("WRONG" in capsys.readouterr().err) == bool(code)


def test_a_whole_solve_that_the_library_leaves_to_another_driver_is_skipped(monkeypatch):
    monkeypatch.setitem(native.MOST_WEIGHTS, "cpu", 0)
    problem = problems.make("easy", 4, 8, instances=1)
    entries = [METHODS[name] for name in ("Picard, whole", methods.PLAIN)]
    options = suites.Options(budget=0.001)
    whole, plain_loop = cells.contest("solve", problem, entries, options, backward=False)
    assert "not solved whole: weights beyond any cache" in whole["skipped"]
    assert "median_s" in plain_loop
    rows = dense_suite.products(options, 4, 8)
    assert ["median_s" in row for row in rows] == [True, True, False]
    assert "weights beyond any cache" in rows[-1]["skipped"]
    assert tables.products_table(rows)[1][-2] == "-"


def test_a_file_that_is_no_result_is_an_error(tmp_path):
    file = tmp_path / "other.json"
    for text in ("{}", "not JSON", '{"facts": {}, "benchmarks": [1], "untimed": []}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="must be a result file"):
            records.load(file)


def test_result_files_keep_what_they_are_given(tmp_path):
    content = {"facts": {"a": [1, 2.5], "b": None}, "benchmarks": [], "untimed": [{"index": 0}]}
    file = tmp_path / "out.json"
    records.save(file, content)
    assert json.loads(file.read_text()) == content
    assert '"a": [1, 2.5]' in file.read_text()


def test_the_page_says_which_numbers_were_taken_otherwise():
    row = {"suite": "kernels", "method": "Picard step", "batch": 4, "size": 8, "dtype": "float32"}
    now = kernels.working_set("Picard step", 4 * 8 * 4, methods.HISTORY)
    assert page.stale([row | {"working_set": now}]) == []
    (note,) = page.stale([row | {"working_set": 2 * 4 * 8 * 4}])
    assert "was not measured again" in note


def test_page_and_json_agree():
    for path, text in page.pages().items():
        kept = path.read_text()
        assert sources.without(kept) == sources.without(text), "run python -m benchmarks report"
        assert str(Path.home()) not in kept
    written = (page.PAGE.with_suffix("")).rglob("*.md")
    assert set(written) == page.pages().keys() - {page.PAGE}
    for path in page.committed():
        content = json.loads(path.read_text())
        assert content["facts"]["slug"] == path.parent.name
        assert os.sep + "tmp" not in content["facts"]["command"]
