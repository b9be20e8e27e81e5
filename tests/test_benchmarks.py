"""The harness: its problems are what they say, its gate refuses what is wrong, its page agrees."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

import fpi_cuda
from fpi_cuda.backends import native

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    clock,
    judge,
    memory,
    methods,
    page,
    problems,
    ratios,
    records,
    suites,
    tables,
    targets,
)
from benchmarks.methods import plain  # noqa: E402
from benchmarks.problems import nets  # noqa: E402
from benchmarks.problems.problem import EXACT_NORM, lanczos_norm, spectral_norm  # noqa: E402
from benchmarks.suites import cell as cells  # noqa: E402
from benchmarks.suites import (  # noqa: E402
    convergence,
    convolutions,
    failing,
    importing,
    kernels,
    scale,
    scaling,
)
from benchmarks.suites import dense as dense_suite  # noqa: E402
from benchmarks.suites import memory as memory_suite  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
RULE = problems.Rule()


@pytest.fixture(scope="module")
def tiny():
    return problems.make("hard", 16, 8, instances=2)


@pytest.mark.parametrize("batch,size", problems.SIZES)
def test_iterations_of_the_problems(batch, size):
    run = plain.plain(plain.picard_compacted, (0.999, 0.5))
    for kind, slowest, mean in (("easy", (9, 12), (8, 12)), ("hard", (80, 200), (12.5, 18))):
        problem = problems.make(kind, batch, size, instances=2)
        norm = spectral_norm(problem.instances[0].weights[0])
        assert norm == pytest.approx({"easy": 0.9, "hard": 0.99}[kind], rel=1e-5)
        evaluations, iterations = methods.Solver(problem, run).count()
        assert slowest[0] <= evaluations <= slowest[1]
        assert mean[0] <= iterations <= mean[1]
        problems.check_spread(problem, evaluations, iterations)


@pytest.mark.parametrize(
    "kind,slowest", [("two-layer", (15, 30)), ("energy", (25, 60)), ("linear", (60, 200))]
)
def test_iterations_of_the_other_problems(kind, slowest):
    problem = problems.make(kind, *problems.at(kind), instances=1)
    evaluations, _ = methods.Solver(problem, plain.plain(plain.picard)).count()
    assert slowest[0] <= evaluations <= slowest[1]


def test_the_stiff_problem_has_its_spectral_radius_and_needs_thousands_of_iterations():
    problem = problems.make("stiff", 4, 128, instances=1)
    (weight,) = problem.instances[0].weights
    values = torch.linalg.eigvalsh(weight.double())
    assert float(values.abs().max()) == pytest.approx(0.999, abs=1e-6)
    evaluations, _ = methods.Solver(problem, plain.plain(plain.picard)).count()
    assert 2000 < evaluations < problem.rule.max_iterations


@pytest.mark.parametrize("shape", [(1, 5), (64, 64), (200, 159), (159, 200), (600, 600)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_power_iteration_finds_the_norm_to_what_it_says(shape, symmetric):
    weight = torch.randn(shape)
    weight = weight @ weight.T if symmetric else weight
    assert lanczos_norm(weight) == pytest.approx(spectral_norm(weight), rel=1e-4)


def test_a_large_problem_is_made_in_seconds_and_the_others_stay_what_they_were():
    """The dense solver takes minutes at N = 8192; it is exact where results are committed."""
    start = time.process_time()
    problem = problems.make("hard", 2, 4096, instances=1)
    assert time.process_time() - start < 20
    (weight,) = problem.instances[0].weights
    assert lanczos_norm(weight, 1e-5) == pytest.approx(0.99, rel=1e-4)
    assert max(n for _, n in problems.SIZES) <= EXACT_NORM


def test_half_of_the_expanding_problem_expands():
    problem = problems.make("expanding", 8, 16, instances=1)
    s, (weight,) = problem.instances[0].s, problem.instances[0].weights
    assert spectral_norm(weight) == pytest.approx(1.0, rel=1e-5)
    assert s.squeeze(1).tolist() == [0.5, 1.5] * 4


def test_jacobis_iteration_solves_its_linear_system():
    problem = problems.make("linear", 4, 16, instances=1, dtype=torch.float64)
    i = problem.instances[0]
    (weight,) = i.weights
    assert not weight.diagonal().any()
    assert float(weight.abs().sum(1).max()) == pytest.approx(0.95)
    (true,) = judge.truth(problem)
    exact = torch.linalg.solve(torch.eye(16) - weight, i.u.mT).mT
    torch.testing.assert_close(true.x, exact, rtol=1e-9, atol=1e-12)


def test_a_hard_problem_without_spread_is_refused(tiny):
    with pytest.raises(RuntimeError, match="at least 4 times the mean"):
        problems.check_spread(tiny, 30, 10.0)


def test_the_truth_is_the_dense_solution(tiny):
    for instance, true in zip(tiny.instances, judge.truth(tiny), strict=True):
        i = instance.to(torch.float64)
        x, (weight,) = true.x, i.weights
        assert (tiny.g(x, i.u, i.s, weight) - x).abs().max() < 1e-12
        slope = 1 - x**2
        jacobian = slope[:, :, None] * i.s[:, :, None] * weight
        c = torch.linalg.solve(torch.eye(tiny.size) - jacobian.mT, i.loss)
        torch.testing.assert_close(true.du, c * slope, rtol=1e-9, atol=1e-12)
        wanted = (i.s * c * slope).T @ x
        torch.testing.assert_close(true.dweights[0], wanted, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def tiny_net():
    return problems.make("denoise", 3, nets.CHANNELS * 6 * 6, instances=1)


OURS = ("ours", "plain", "replaced")  # the others: test_benchmark_peers.py
METHODS = [m for m in methods.all_methods() if m.name != methods.COMPILED and m.family in OURS]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_passes_the_gate(method, tiny):
    if method.reason(tiny):
        pytest.skip(method.reason(tiny))
    correct = judge.judge(method.build(tiny), backward=True)
    assert correct.refusal(1e-2) is None
    assert correct.in_tolerances <= 1
    assert correct.gradient_error < 5e-3


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_solves_the_denoising_net(method, tiny_net):
    if method.reason(tiny_net):
        pytest.skip(method.reason(tiny_net))
    correct = judge.judge(method.build(tiny_net), backward=True)
    assert correct.refusal(1e-2) is None
    assert correct.gradient_error < 5e-3


@pytest.mark.parametrize("kind", ["two-layer", "energy", "linear", "conv"])
@pytest.mark.parametrize("name", ["Anderson", "Anderson, whole", "plain loop"])
def test_methods_on_the_other_kinds(kind, name):
    problem = problems.make(kind, 6, 16, instances=1)
    (method,) = (m for m in METHODS if m.name == name)
    if method.reason(problem):
        pytest.skip(method.reason(problem))
    assert judge.judge(method.build(problem), backward=True).refusal(1e-2) is None


def test_the_denoising_net_has_the_norm_it_says():
    problem = problems.make("denoise", 2, nets.CHANNELS * 12 * 12, instances=1)
    first, _, second, _ = problem.instances[0].weights
    for weight in (first[:, : nets.CHANNELS], second):
        norm, _ = fpi_cuda.contraction.convolution_norm(weight, (12, 12), iterations=100)
        assert float(norm) == pytest.approx(0.95**0.5, rel=1e-3)


@pytest.mark.parametrize("kind,size", [("easy", 159), ("denoise", nets.CHANNELS * 16 * 16)])
def test_real_data_are_another_problem(kind, size):
    if not DATA.is_dir():
        pytest.skip("no data sets beside this repository")
    made, real = (problems.make(kind, 4, size, instances=2, data=d) for d in (None, DATA))
    assert not torch.equal(made.instances[0].u, real.instances[0].u)
    assert not torch.equal(real.instances[0].u, real.instances[1].u)
    assert real.instances[0].u.isfinite().all()


def test_a_folder_without_the_data_is_an_error(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="must be a folder that holds multilabel"):
        problems.make("easy", 4, 159, data=tmp_path)
    with pytest.raises(SystemExit):
        command.main(["solve", "--data", str(tmp_path / "no")])
    assert "must be a folder" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_pass_the_gate(dtype):
    problem = problems.make("two-layer", 16, 32, instances=1, dtype=dtype)
    for name in ("Picard", "Anderson"):
        (method,) = (m for m in METHODS if m.name == name)
        correct = judge.judge(method.build(problem), backward=True)
        assert correct.refusal(problem.rule.gradient_error) is None


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
    (plain_loop,) = (m for m in METHODS if m.name == methods.PLAIN)
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


def row(name, family="plain", seconds=1.0, residual=1e-4, error=1e-4, **more):
    base = {"suite": "solve", "problem": "hard", "batch": 256, "size": 128, "mode": "forward"}
    return base | {
        "cell": "a cell",
        "dtype": "float32",
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
    ratio = ratios.against_plain(mine, [mine, exact, equal])
    assert (ratio.value, ratio.against) == (0.25, "equal")
    assert "gradient error 3.0 times" in ratio.note
    assert ratios.against_plain(mine, [mine, exact]).value is None
    # A rival that is less exact gains by being compared.
    assert ratios.against(mine, [row("loose", error=1e-2, seconds=2.0)], "loose").value == 0.5
    tight = row("tight", seconds=2.0, residual=1e-5)
    assert ratios.against(mine, [tight], "tight").value is None
    assert "residual 10.0 times" in ratios.against(mine, [tight], "tight").note
    # More exact and faster: that ratio is against us, and stays.
    ratio = ratios.against_plain(mine, [mine, row("both", seconds=0.5, residual=1e-5), equal])
    assert (ratio.value, ratio.against) == (2.0, "both")


def test_targets():
    rows = [
        row("Picard", "ours", 1.05),
        row("Anderson", "ours", 1.2),
        row("plain loop", seconds=1.0),
    ]
    found = {v.what: v for v in targets.verdicts(rows)}
    assert found["Picard / best plain loop"].met is True
    assert found["Anderson / best plain loop"].met is False
    seldom = row("plain loop, compacted, test every 3rd", seconds=0.7)
    picard = {v.what: v for v in targets.verdicts([*rows, seldom])}["Picard / best plain loop"]
    assert picard.met is True, "that loop does not test in every iteration as Picard does"
    assert picard.note == "plain loop, compacted, test every 3rd: 1.50"
    other = [row("Picard", "ours", 3.0, cell="another"), row("plain loop", cell="another")]
    ratios_ = [v.measured for v in targets.verdicts(rows + other) if v.what.startswith("Picard")]
    assert ratios_ == ["1.05 (plain loop)", "3.00 (plain loop)"], "only within a cell"


def test_targets_against_other_libraries():
    rows = [
        row("Anderson", "ours", 1.0),
        row("Anderson, whole", "ours", 0.4),
        row("torchdeq Anderson", "torchdeq", 7.0),
        row("torchdeq fixed point", "torchdeq", 1.1),
        row("jaxopt fixed point", "jaxopt", 1.3),
    ]
    rows = [r | {"suite": "peers"} for r in rows]
    found = {v.what: v for v in targets.verdicts(rows)}
    assert found["torchdeq Anderson / Anderson"].measured == "7.0"
    assert found["torchdeq Anderson / Anderson, whole"].met is False  # 17.5 of 20
    assert found["fastest torchdeq / Anderson, whole"].met is False  # 2.75 of 3
    assert found["fastest jaxopt / Anderson, whole"].met is True
    rows[2] = {**rows[2], "skipped": "not installed"}
    del rows[2]["median_s"]
    assert "torchdeq Anderson / Anderson" not in {v.what for v in targets.verdicts(rows)}


def test_targets_of_whole_solves():
    rows = [
        row("Picard, whole", "ours", 0.6),
        row("Anderson, whole", "ours", 0.4),
        row("plain loop", seconds=1.0),
    ]
    found = {v.what: v for v in targets.verdicts(rows)}
    assert found["best plain loop / Anderson, whole"].measured == "2.5"
    rows = [r | {"problem": "easy", "mode": "forward+backward"} for r in rows]
    size = {"suite": "products", "batch": 256, "size": 128}
    for part, target in ((0.5, "≥ 1.3"), (0.9, "≥ 1")):
        products = [
            size | {"method": "product", "median_s": part},
            size | {"method": "plain loop's iteration", "median_s": 1.0},
            size | {"method": "whole solve's iteration", "median_s": 0.5},
        ]
        verdict = {v.what: v for v in targets.verdicts(rows + products)}
        fastest = verdict["fastest rival / Anderson, whole"]
        assert (str(fastest.target), fastest.measured, fastest.met) == (target, "2.5", True)


def test_targets_of_memory():
    base = {"suite": "memory", "batch": 8, "size": 4, "mode": "forward", "state_bytes": 10}
    flat = [
        base | {"method": m, "family": f, "iterations": k, "peak_bytes": b}
        for m, f, growth in (("Picard", "ours", 0), ("unrolled", "replaced", 1))
        for k, b in ((8, 50), (128, 50 + growth * 500))
    ]
    held = base | {"method": "Picard", "family": "ours", "peak_bytes": 61, "limit": 60}
    found = [(v.measured, v.met) for v in targets.verdicts([*flat, held])]
    assert found == [("6.10", False), ("1.000", True)]


def test_anderson_must_win_where_it_is_stiff():
    rows = [row("Anderson", "ours", 2.0), row("plain loop", seconds=1.5)]
    rows = [r | {"problem": "stiff"} for r in rows]
    (found,) = targets.verdicts(rows)
    assert (found.measured, found.met) == ("1.33 (plain loop)", False)


def test_targets_of_nets():
    rows = [
        row("Picard, ConvStep", "ours", 0.6),
        row("Anderson, ConvStep", "ours", 0.4),
        row("plain loop, compacted", seconds=0.44),
        row("torchdeq Anderson", "torchdeq", 0.9),
        row("torchdeq fixed point", "torchdeq", 1.1),
    ]
    found = {v.what: v for v in targets.verdicts([r | {"problem": "denoise"} for r in rows])}
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
            "refused": None,
            "median_s": seconds,
            "flops_per_s": 1e12,
            "bytes_per_s": 1e12,
            "of_roofline": 0.5,
        }
        for finished, times in ((0, (1.0, 0.8, 1.4, 1.6)), (32, (0.5, 0.4, 1.1, 1.0)))
        for method, seconds in zip(
            (convolutions.OURS, "ours, native step", *convolutions.RIVALS), times, strict=True
        )
    ]
    found = [(v.measured, v.met) for v in targets.verdicts(rows)]
    # As `auto` does it, not the faster of two ways; against the faster rival.
    hoisted, concatenating = convolutions.RIVALS
    assert found == [
        (f"1.40 ({hoisted})", False),
        (f"2.00 ({concatenating})", True),
        ("0.50", True),
    ]
    assert "16 → 32 → 16" in tables.render(rows, tables.text_table, "")
    for row in rows:
        if row["method"] == convolutions.OURS:
            row["refused"] = "g(x) is off by 0.1"
            del row["median_s"]
    (wrong,) = targets.verdicts(rows)
    assert (wrong.measured, wrong.met, wrong.note) == ("wrong", False, "g(x) is off by 0.1")
    assert "is off by" in tables.render(rows, tables.text_table, "")


def test_only_long_rows_on_a_device_are_judged_against_a_copy():
    base = {"suite": "kernels", "method": "Picard step", "batch": 8, "of_copy": 0.5}
    rows = [
        base | {"device": device, "size": size}
        for device in ("cpu", "cuda")
        for size in (1024, 32768)
    ]
    found = [(v.where, str(v.target)) for v in targets.verdicts(rows)]
    short, long = ("(8, 1024) float32", "≥ 60%"), ("(8, 32768) float32", "≥ 60%")
    assert found == [short, long, ("(8, 32768) float32", "≥ 90%")]


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
    (method,) = (m for m in METHODS if m.name == "Anderson")
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
    (other,) = (m for m in METHODS if m.name == methods.COMPACTED)
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
    by_name = {m.name: m for m in METHODS}
    entries = [by_name[name] for name in ("Picard, whole", methods.PLAIN)]
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
    text = page.PAGE.read_text()
    between = text.split(page.BEGIN)[1].split(page.END)[0]
    assert between.strip() == page.results(), "run python -m benchmarks report"
    assert str(Path.home()) not in text
    for path in page.committed():
        content = json.loads(path.read_text())
        assert content["facts"]["slug"] == path.parent.name
        assert os.sep + "tmp" not in content["facts"]["command"]
