"""Other libraries in the harness: they solve the problems it poses, at each committed setting."""

import sys

import pytest
import torch

from benchmarks import judge, methods, problems
from benchmarks.methods import jax as of_jax
from benchmarks.methods import jax_runner
from benchmarks.methods import torchdeq as of_torchdeq

JAX = [m for m in ("jax", "jaxopt", "optimistix") if methods.absent(m)]
needs_jax = pytest.mark.skipif(bool(JAX), reason=f"not installed: {', '.join(JAX)}")
PEERS = methods.peers(grid=True)
WRONG = "torchdeq as it comes"
CUDA = "torchdeq fixed point, hook, g in CUDA graphs"
# torch.compile takes many seconds.
QUICK = [m for m in PEERS if m.name not in (WRONG, CUDA) and "g compiled" not in m.name]

SIZES = {"denoise": 16 * 6 * 6, "conv": 36}


@pytest.fixture(scope="module")
def tiny():
    return problems.make("hard", 16, 8, instances=1)


@needs_jax
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", jax_runner.KINDS)
def test_a_map_in_jax_is_the_map_in_torch(kind, dtype):
    problem = problems.make(kind, 5, SIZES.get(kind, 12), dtype=dtype, instances=1)
    i, jax = problem.instances[0], jax_runner.jax()
    x = torch.randn_like(i.x0)
    wanted = problem.g(x, i.u, i.s, *i.weights)
    with jax.enable_x64(dtype == torch.float64):
        x, u, s, *weights = (jax_runner.to_jax(t) for t in (x, i.u, i.s, *i.weights))
        g = jax_runner.STEPS[problem.g]
        batched = g(x, u, s, *weights)
        one_by_one = jax.vmap(g, in_axes=(0, 0, 0, *(None for _ in weights)))(x, u, s, *weights)
        for y in (batched, one_by_one):
            close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else {}
            torch.testing.assert_close(jax_runner.to_torch(y), wanted, **close)


def test_names_are_unique_and_every_peer_has_a_default_and_a_grid():
    assert len({m.name for m in PEERS}) == len(PEERS)
    for family in methods.PEERS:
        assert {m.default for m in PEERS if m.family == family} == {True, False}


@pytest.mark.parametrize("method", QUICK, ids=lambda m: m.name)
def test_every_peer_passes_the_gate(method, tiny, one_thread):
    if method.reason(tiny):
        pytest.skip(method.reason(tiny))
    runner = method.build(tiny)
    correct = judge.judge(runner, backward=True)
    if "× 8" in method.name:  # meant for batches whose samples finish together
        assert "worst residual" in correct.refusal(1e-2)
        return
    assert correct.refusal(1e-2) is None
    assert correct.in_tolerances <= (1.6 if "tolerance" in method.name else 1.05)
    assert correct.gradient_error < 5e-3
    evaluations, mean = runner.count()
    assert 1 < mean <= evaluations <= tiny.rule.max_iterations


@pytest.mark.skipif(bool(methods.absent("torchdeq")), reason=str(methods.absent("torchdeq")))
def test_torchdeq_as_it_comes_has_another_gradient():
    problem = problems.make("easy", 16, 8, instances=1)
    (method,) = (m for m in PEERS if m.name == WRONG)
    correct = judge.judge(method.build(problem), backward=True)
    assert "gradient" in correct.refusal(1e-2)


@pytest.mark.skipif(bool(methods.absent("torchdeq")), reason=str(methods.absent("torchdeq")))
def test_torchdeq_takes_the_options_of_a_solver_forward_and_backward(monkeypatch, tiny):
    from torchdeq.solver import get_solver

    seen = []

    def spy(*args, m=6, **options):
        seen.append(m)
        return get_solver("anderson")(*args, m=m, **options)

    monkeypatch.setitem(sys.modules["torchdeq.solver"]._solvers, "spy", spy)
    methods.Solver(tiny, of_torchdeq.torchdeq("spy", m=3)).gradients(0)
    assert seen == [3, 3]


def test_cuda_graphs_say_that_they_need_a_cuda_device(tiny):
    (method,) = (m for m in PEERS if m.name == CUDA)
    with pytest.raises(ValueError, match="need a CUDA device"):
        method.build(tiny)


def test_code_that_is_compiled_is_not_shared():
    def g(x, u, s, weight):
        return x

    first, second = of_torchdeq.copied(g), of_torchdeq.copied(g)
    assert first(1, 2, 3, 4) == 1
    assert len({id(f.__code__) for f in (g, first, second)}) == 3


@needs_jax
@pytest.mark.parametrize(
    "setting", [of_jax.jaxopt(of_jax.PICARD), of_jax.optimistix()], ids=["jaxopt", "optimistix"]
)
def test_second_derivatives_in_jax(setting):
    problem = problems.make("hard", 4, 5, dtype=torch.float64, instances=1)
    i = problem.instances[0]
    rule = problems.Rule(1e-12, 0.0, 1e-10, max_iterations=5000)
    runner = jax_runner.Jax(problems.Problem("hard", problem.g, 4, 5, (i,), rule), setting)
    u, weight = (t.clone().requires_grad_() for t in (i.u, i.weights[0]))
    x = i.x0
    for _ in range(600):
        x = problem.g(x, u, i.s, weight)
    (du,) = torch.autograd.grad((i.loss * x).sum(), u, create_graph=True)
    (wanted,) = torch.autograd.grad((du**2).sum(), weight)
    torch.testing.assert_close(runner.tensors(runner.second(0)), wanted, rtol=1e-3, atol=1e-3)


@needs_jax
def test_a_dense_adjoint_that_is_too_large_is_an_error_not_a_crash(monkeypatch, tiny):
    monkeypatch.setattr(jax_runner, "MOST_BYTES", 1000)
    runner = jax_runner.Jax(tiny, of_jax.optimistix())
    runner.forward(0)
    with pytest.raises(MemoryError, match="Jacobians of the samples"):
        runner.gradients(0)


@needs_jax
def test_memory_is_that_of_the_plan(tiny):
    runner = jax_runner.Jax(tiny, of_jax.jaxopt(of_jax.PICARD))
    forward, backward = (runner.peak_bytes(backward=b) for b in (False, True))
    assert tiny.instances[0].x0.nbytes < forward < backward
    assert runner.compile_s > 0
