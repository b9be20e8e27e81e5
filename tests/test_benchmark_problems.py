"""The problems are what they say, and every method solves them."""

import time
from pathlib import Path

import pytest
import torch

import fpi_cuda
from benchmarks import __main__ as command
from benchmarks import judge, methods, problems
from benchmarks.methods import plain
from benchmarks.problems import nets
from benchmarks.problems.problem import EXACT_NORM, lanczos_norm, spectral_norm

ROOT = Path(__file__).resolve().parent.parent
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
