"""The harness: its problems are what they say, its gate refuses what is wrong, its page agrees."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

import fpi_cuda

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import measure, methods, problems, report, suites  # noqa: E402

RULE = problems.Rule()


@pytest.fixture(scope="module")
def tiny():
    problem = problems.make("hard", 16, 8, instances=2)
    return problem, tuple(measure.exact(instance) for instance in problem.instances)


@pytest.mark.parametrize("batch,size", problems.SIZES)
def test_iterations_of_the_problems(batch, size):
    run = methods.plain(methods.picard_compacted, (0.999, 0.5))(RULE)
    for kind, slowest, mean in (("easy", (9, 12), (8, 12)), ("hard", (80, 200), (12.5, 18))):
        problem = problems.make(kind, batch, size)
        norm = problems.spectral_norm(problem.instances[0].weight)
        assert norm == pytest.approx({"easy": 0.9, "hard": 0.99}[kind], rel=1e-5)
        for instance in problem.instances:
            g = measure.Counting(problems.g)
            with torch.no_grad():
                run(g, *instance.arguments)
            assert slowest[0] <= g.calls <= slowest[1]
            assert mean[0] <= g.rows / batch <= mean[1]
            problems.check_spread(problem, g.calls, g.rows / batch)


def test_a_hard_problem_without_spread_is_refused(tiny):
    with pytest.raises(RuntimeError, match="at least 4 times the mean"):
        problems.check_spread(tiny[0], 30, 10.0)


def test_the_truth_is_the_dense_solution(tiny):
    problem, truth = tiny
    for instance, true in zip(problem.instances, truth, strict=True):
        i = instance.to(torch.float64)
        x = true.x
        assert (problems.g(x, i.u, i.s, i.weight) - x).abs().max() < 1e-12
        slope = 1 - x**2
        jacobian = slope[:, :, None] * i.s[:, :, None] * i.weight
        c = torch.linalg.solve(torch.eye(problem.size) - jacobian.mT, i.loss)
        torch.testing.assert_close(true.du, c * slope, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(true.dweight, (i.s * c * slope).T @ x, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def tiny_net():
    problem = problems.make("denoise", 3, problems.CHANNELS * 6 * 6, instances=1)
    return problem, tuple(measure.exact(instance) for instance in problem.instances)


METHODS = [m for m in methods.all_methods() if m.name != methods.COMPILED]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_passes_the_gate(method, tiny):
    if method.missing:
        pytest.skip(method.missing)
    if method.name in methods.CONVOLUTIONS:
        pytest.skip("no net of convolutions")
    problem, truth = tiny
    correct = measure.judge(method.build(RULE), problems.g, problem, truth, backward=True)
    assert correct.refusal() is None
    assert correct.in_tolerances <= 1
    assert correct.gradient_error < 5e-3


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_solves_the_denoising_net(method, tiny_net):
    if method.missing:
        pytest.skip(method.missing)
    if method.name in methods.WHOLE:
        pytest.skip("no dense layers")
    problem, truth = tiny_net
    run = method.build(problem.rule)
    correct = measure.judge(run, problems.g, problem, truth, backward=True)
    assert correct.refusal() is None
    assert correct.gradient_error < 5e-3


def test_the_denoising_net_has_the_norm_it_says():
    instance = problems.make("denoise", 2, problems.CHANNELS * 12 * 12, instances=1).instances[0]
    first, _, second, _ = problems.layers(instance.weight)
    for weight in (first[:, : problems.CHANNELS], second):
        norm, _ = fpi_cuda.contraction.convolution_norm(weight, (12, 12), iterations=100)
        assert float(norm) == pytest.approx(0.95**0.5, rel=1e-3)


def early(g, x0, *rest):
    """Stops after 3 iterations."""
    for _ in range(3):
        x0 = g(x0, *rest)
    return x0


def nan_in_one_sample(g, x0, *rest):
    x = methods.plain(methods.picard)(RULE)(g, x0, *rest).clone()
    x[3] = torch.nan
    return x


def one_step_gradient(g, x0, *rest):
    with torch.no_grad():
        x = methods.plain(methods.picard)(RULE)(g, x0, *rest)
    return g(x, *rest)


@pytest.mark.parametrize(
    "wrong,reason",
    [(early, "residual"), (nan_in_one_sample, "residual"), (one_step_gradient, "gradient of W")],
)
def test_the_gate_refuses_a_wrong_method(wrong, reason, tiny, monkeypatch, capsys, tmp_path):
    problem, truth = tiny
    correct = measure.judge(wrong, problems.g, problem, truth, backward=True)
    assert reason in correct.refusal()

    # The same through the command: no time, no ratio, and the exit code says so where it is ours.
    (plain_loop,) = (m for m in METHODS if m.name == methods.PLAIN)
    entries = [methods.Method("Picard", "ours", lambda rule: wrong), plain_loop]
    monkeypatch.setattr(methods, "all_methods", lambda: entries)
    file = tmp_path / "out.json"
    arguments = ["solve", "--sizes", "16x8", "--kinds", "easy", "--budget", "0.001"]
    assert command.main([*arguments, "--json", str(file)]) == 1
    _, rows = report.load(file)
    mine = [row for row in rows if row["family"] == "ours"][1]
    assert reason in mine["refused"]
    assert "median_s" not in mine
    assert "WRONG: easy (16, 8) forward+backward Picard" in capsys.readouterr().err


def row(name, family="plain", seconds=1.0, residual=1e-4, error=1e-4, **more):
    base = {"suite": "solve", "problem": "hard", "batch": 256, "size": 128, "mode": "forward"}
    return base | {
        "method": name,
        "family": family,
        "median_s": seconds,
        "worst_residual": residual,
        "gradient_error": error,
        "refused": None,
        **more,
    }


def test_no_ratio_against_a_more_exact_rival():
    mine = row("Anderson", "ours", 1.0, error=3e-4)
    exact, equal = row("exact", seconds=2.0), row("equal", seconds=4.0, error=2e-4)
    ratio = report.against_plain(mine, [mine, exact, equal])
    assert (ratio.value, ratio.against) == (0.25, "equal")
    assert "gradient error 3.0 times" in ratio.note
    assert report.against_plain(mine, [mine, exact]).value is None
    # A rival that is less exact gains by being compared.
    assert report.against(mine, [row("loose", error=1e-2, seconds=2.0)], "loose").value == 0.5
    tight = row("tight", seconds=2.0, residual=1e-5)
    assert report.against(mine, [tight], "tight").value is None
    assert "residual 10.0 times" in report.against(mine, [tight], "tight").note
    # More exact and faster: that ratio is against us, and stays.
    ratio = report.against_plain(mine, [mine, row("both", seconds=0.5, residual=1e-5), equal])
    assert (ratio.value, ratio.against) == (2.0, "both")


def test_times_are_divided_only_within_one_run():
    rows = [
        row("Picard", "ours", 3.0),
        row("plain loop", seconds=2.0),
        row("Picard", "ours", 1.0),
        row("Anderson", "ours", 1.0),
        row("torchdeq Anderson", "torchdeq", 9.0),
    ]
    found = {v.what: v for v in report.verdicts(rows)}
    assert found["Picard / best plain loop"].measured == "1.50 (plain loop)"
    assert found["torchdeq Anderson / Anderson"].measured == "9.0"
    assert len(found) == 2


def test_targets():
    rows = [
        row("Picard", "ours", 1.05),
        row("Anderson", "ours", 1.2),
        row("plain loop", seconds=1.0),
        row("torchdeq Anderson", "torchdeq", 12.0),
    ]
    found = {v.what: v for v in report.verdicts(rows)}
    assert found["Picard / best plain loop"].met is True
    assert found["Anderson / best plain loop"].met is False
    assert found["torchdeq Anderson / Anderson"].measured == "10.0"
    seldom = row("plain loop, compacted, test every 3rd", seconds=0.7)
    picard = {v.what: v for v in report.verdicts([*rows, seldom])}["Picard / best plain loop"]
    assert picard.met is True, "that loop does not test in every iteration as Picard does"
    assert picard.note == "plain loop, compacted, test every 3rd: 1.50"
    rows[3] = {**rows[3], "skipped": "not installed"}
    del rows[3]["median_s"]
    assert {v.what: v for v in report.verdicts(rows)}["torchdeq Anderson / Anderson"].met is None


def test_targets_of_whole_solves():
    rows = [
        row("Picard, whole", "ours", 0.6),
        row("Anderson, whole", "ours", 0.4),
        row("plain loop", seconds=1.0),
        row("torchdeq Anderson", "torchdeq", 7.0),
        row("torchdeq fixed point", "torchdeq", 1.1),
    ]
    found = {v.what: v for v in report.verdicts(rows)}
    assert found["best plain loop / Anderson, whole"].measured == "2.5"
    assert found["torchdeq Anderson / Anderson, whole"].met is False  # 17.5 of 20
    assert found["torchdeq fixed point / Anderson, whole"].met is False  # 2.75 of 3
    rows = [r | {"problem": "easy", "mode": "forward+backward"} for r in rows]
    size = {"suite": "products", "batch": 256, "size": 128}
    for part, target in ((0.5, "≥ 1.3"), (0.9, "≥ 1")):
        products = [
            size | {"method": "product", "median_s": part},
            size | {"method": "plain loop's iteration", "median_s": 1.0},
            size | {"method": "whole solve's iteration", "median_s": 0.5},
        ]
        verdict = {v.what: v for v in report.verdicts(rows + products)}
        fastest = verdict["fastest rival / Anderson, whole"]
        assert (fastest.target, fastest.measured, fastest.met) == (target, "2.5", True)


def test_targets_of_nets():
    rows = [
        row("Picard, ConvStep", "ours", 0.6),
        row("Anderson, ConvStep", "ours", 0.4),
        row("plain loop, compacted", seconds=0.44),
        row("torchdeq Anderson", "torchdeq", 0.9),
        row("torchdeq fixed point", "torchdeq", 1.1),
    ]
    found = {v.what: v for v in report.verdicts([r | {"problem": "denoise"} for r in rows])}
    plain = found["plain loop, compacted / Anderson, ConvStep"]
    assert (plain.measured, plain.met) == ("1.1", False)
    assert found["torchdeq Anderson / Anderson, ConvStep"].met is True  # the faster one: 2.25


def test_targets_of_an_iteration_on_a_device():
    rows = [
        {
            "suite": "convolutions",
            "method": method,
            "widths": (16, 32, 16),
            "batch": 64,
            "side": 128,
            "dtype": "bfloat16",
            "finished": finished,
            "median_s": seconds,
            "flops_per_s": 1e12,
            "bytes_per_s": 1e12,
            "of_roofline": 0.5,
        }
        for finished, times in ((0, (1.0, 0.9, 1.4)), (32, (0.7, 0.5, 1.0)))
        for method, seconds in zip(
            ("ours, Triton step", "ours, native step", "cuDNN, compiled"), times, strict=True
        )
    ]
    found = [(v.measured, v.met) for v in report.verdicts(rows)]
    assert found == [("1.56", True), ("2.00", True), ("0.56", True)]
    assert "16 → 32 → 16" in report.render(rows, report.text_table, "")
    alone = [row for row in rows if not row["method"].startswith("ours")]
    assert [(v.measured, v.met) for v in report.verdicts(alone)] == [("wrong", False)]


def test_the_denoise_suite_runs_to_its_end(monkeypatch, capsys):
    monkeypatch.setattr(problems, "DENOISE", ((2, problems.CHANNELS * 5 * 5),))
    arguments = ["denoise", "convolutions", "--families", "ours", "plain", "--budget", "0.001"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "denoise, B = 2, N = 400, forward+backward" in printed
    assert "plain loop, compacted / " in printed


def test_the_dense_suite_runs_to_its_end(monkeypatch, capsys):
    monkeypatch.setattr(problems, "BIBTEX", ((8, 159),))
    monkeypatch.setattr(suites, "MOST", 20)
    arguments = ["dense", "--sizes", "16x8", "--families", "ours", "plain", "--budget", "0.001"]
    assert command.main([*arguments, "--without", methods.COMPILED]) == 0
    printed = capsys.readouterr().out
    assert "energy, B = 8, N = 159, forward+backward" in printed
    assert "refill: time" in printed and "product's part" in printed


def test_variants_take_turns():
    order = []
    calls = {name: lambda i, name=name: order.append((name, i)) for name in "abc"}
    times = measure.interleave(calls, rounds=(4, 4))
    timed = [name for name, _ in order[6:]]
    assert timed == list("abc" + "bca" + "cab" + "abc")
    assert all(len(t.samples) == 4 for t in times.values())
    assert measure.Times((3.0, 1.0, 2.0)).quartiles == (1.5, 2.5)


def test_the_command_on_a_tiny_size(tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = ["solve", "overhead", "scale", "--sizes", "64x32", "--families", "ours", "plain"]
    arguments += ["--without", methods.COMPILED, "torchdeq Broyden"]
    threads = torch.get_num_threads()
    code = command.main([*arguments, "--budget", "0.001", "--kinds", "easy", "--json", str(file)])
    facts, rows = report.load(file)
    assert code == 0
    assert facts["threads"] == threads
    assert facts["slug"].startswith("cpu-") and " " not in facts["slug"]
    assert {"commit", "versions", "command", "timestamp", "cpu"} <= facts.keys()
    done = [r for r in rows if r["suite"] == "solve" and "skipped" not in r]
    assert {r["mode"] for r in done} == {"forward", "forward+backward"}
    assert all(r["q1_s"] <= r["median_s"] <= r["q3_s"] for r in done)
    assert all(r["residual_in_tolerances"] <= 1 for r in done)
    assert all(r["difference"] <= 1 for r in rows if r["suite"] == "scale")
    printed = capsys.readouterr().out
    assert "Picard: iterations, state scaled" in printed
    assert "plain loop, compacted" in printed


def test_quick_runs_to_its_end(monkeypatch, capsys):
    for name in ("kernels", "importing"):  # their sizes are their own
        monkeypatch.setattr(suites, name, lambda _: [])
    size = ["64x32"]
    arguments = ["quick", "--sizes", *size, "--peers-at", *size, "--budget", "0.001"]
    assert command.main([*arguments, "--kinds", "easy"]) == 0
    printed = capsys.readouterr().out
    assert "plain loop, compacted" in printed
    assert ("torchdeq Anderson" in printed) == (methods.absent("torchdeq") is None)


def test_list_names_every_method(capsys):
    assert command.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(m.name in printed for m in methods.all_methods())
    assert all(name in printed for name in (*suites.SUITES, *suites.PRESETS))


def test_page_and_json_agree():
    page = report.PAGE.read_text()
    between = page.split(report.BEGIN)[1].split(report.END)[0]
    assert between.strip() == report.results(), "run python -m benchmarks report"
    assert str(Path.home()) not in page
    for path in report.committed():
        content = json.loads(path.read_text())
        assert content["facts"]["slug"] == path.parent.name
        assert os.sep + "tmp" not in content["facts"]["command"]
