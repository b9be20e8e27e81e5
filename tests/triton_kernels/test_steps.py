"""The Triton step operators against the float64 reference, memory poisoned first.

What test_primitives asks of every backend is asked here too, of rows that one program takes whole
and of rows cut into parts; on shapes that suit the interpreter.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import test_alternation as alternation
import test_primitives as primitives
import test_stop_rule
import test_window_guards as guards
import torch
from interpreted import INTERPRETED
from test_primitives import DTYPES, FOREVER, close, oracle_of, poisoned, same_bits

from fpi_cuda import Anderson, Picard, Status, backends, fixed_point
from fpi_cuda.backends import reference, triton
from fpi_cuda.backends.triton import anderson, rows
from fpi_cuda.record import HEAD, ITERATIONS, RESIDUAL, STATUS, WINDOW, Limits, Progress


def window(b, m, n, dtype):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        poisoned(b, m, n, dtype=dtype),
        poisoned(b, m, n, dtype=dtype),
        poisoned(b, m, m, dtype=acc),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (2, 33), (1, 64), (2, 129)], ids=str)
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_picard_step_matches_the_oracle(plan, shape, dtype, beta):
    primitives.test_picard_step_matches_the_oracle(triton, shape, dtype, beta)


@pytest.mark.parametrize(
    ("history", "shape", "dtype", "beta", "every"),
    [
        (1, (2, 7), torch.float32, 0.6, 2),
        (2, (1, 1), torch.float64, 1.0, 1),
        (2, (2, 65), torch.bfloat16, 0.6, 3),
        (3, (2, 33), torch.float16, 1.0, 1),
        (4, (1, 129), torch.float32, 1.0, 2),
        (5, (2, 64), torch.float64, 0.6, 3),
        (5, (1, 31), torch.bfloat16, 1.0, 1),
        (6, (1, 67), torch.float64, 1.0, 1),
        (6, (1, 130), torch.float16, 0.6, 4),
        (11, (1, 40), torch.float32, 0.6, 3),
    ],
    ids=str,
)
def test_anderson_step_matches_the_oracle(plan, history, shape, dtype, beta, every):
    primitives.test_anderson_step_matches_the_oracle(triton, shape, dtype, history, beta, every)


@pytest.mark.parametrize("n", [2048, 2049])
def test_the_plan_itself_matches_the_oracle(n):
    primitives.test_picard_step_matches_the_oracle(triton, (1, n), torch.float32, 0.6)
    primitives.test_anderson_step_matches_the_oracle(triton, (1, n), torch.float32, 2, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_covers_the_row_with_no_part_left_empty(dtype):
    for n in (0, 1, 31, 33, 1024, 1025, 2048, 2049, 40001, 2**21 - 1, 2**21 + 1, 3 * 2**24 + 5):
        block, chunks, parts, warps = rows.plan_of(n, dtype)
        assert (parts - 1) * chunks * block < max(n, 1) <= parts * chunks * block
        assert parts <= 1024 and block & (block - 1) == 0 and warps in (1, 2, 4)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_finish_freeze_and_follow_their_index(solver, dtype):
    primitives.test_rows_finish_freeze_and_follow_their_index(triton, solver, dtype)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_rows_in_parts_finish_freeze_and_follow_their_index(plan, solver):
    """A NaN lies in one part only; the rows before and after go on."""
    b, n, dtype = 5, 150, torch.float32
    held = torch.tensor([3, 0, 4])
    x, gx = torch.randn(3, n), torch.randn(3, n)
    gx[1, 140] = math.nan
    p = Progress(torch.empty(b, n), FOREVER)
    p.narrow(held)
    p.out.fill_(math.nan)
    before, memory = x.clone(), window(b, 2, n, dtype)

    def step(gx):
        if solver == "picard":
            triton.picard_step(p, x, gx, 1.0)
        else:
            triton.anderson_step(p, x, gx, 1.0, 1e-6, 10.0, *memory)

    step(gx)
    assert p.counters[:, STATUS].tolist() == [1 + Status.NONFINITE, 0, 0, 0, 0]
    assert p.counters[:, ITERATIONS].tolist() == [1, 0, 0, 1, 1]
    assert p.tally.tolist() == [2, 1, 1]
    assert torch.equal(x[1], before[1]) and torch.equal(p.out[0], before[1])
    assert torch.equal(x[::2], gx[::2]) and p.out[1:].isnan().all()
    kept = [
        t.clone() for t in (x[1], p.out[0], p.counters[0], p.scalars[0], *(w[0] for w in memory))
    ]
    step(torch.randn(3, n))
    now = [x[1], p.out[0], p.counters[0], p.scalars[0], *(w[0] for w in memory)]
    for old, new in zip(kept, now, strict=True):
        same_bits(old, new)
    assert p.tally.tolist() == [2, 1, 2]
    assert p.counters[held, ITERATIONS].tolist() == [2, 1, 2]


@pytest.mark.parametrize("floored", [False, True])
@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_every_status_is_the_oracles(plan, solver, floored):
    """Residuals that fall, stay, grow, turn infinite or wander, each sample to its own end.

    Anderson takes back the mixture at which one is infinite, and goes on.
    """
    n, steps_made, dtype = 70, 9, torch.float32
    limits = Limits(rtol=1e-3, offset=1e-4, rounding=1e-2, patience=5, max_iterations=steps_made)
    sizes = [
        [0.1**k for k in range(steps_made)],
        [0.05] * steps_made,
        [10.0 ** (k - 1) for k in range(steps_made)],
        [1.0, 1.0, math.inf] + [1.0] * steps_made,
        [1.0, 2.0] * steps_made,
        [0.05] * steps_made,
    ]
    b = len(sizes)
    floor = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 100.0]).to(dtype) if floored else None
    x = torch.randn(b, n, dtype=dtype)
    p = Progress(x, limits, floor)
    memory = window(b, 3, n, dtype)
    for k in range(steps_made):
        r = torch.nn.functional.normalize(torch.randn(b, n, dtype=dtype), dim=1)
        gx = x + r * torch.tensor([row[k] for row in sizes], dtype=dtype)[:, None]
        q, y = oracle_of(p), x.double().clone()
        oracles = [t.double().clone() for t in memory]
        if solver == "picard":
            triton.picard_step(p, x, gx, 0.5)
            reference.picard_step(q, y, gx.double(), 0.5)
        else:
            triton.anderson_step(p, x, gx, 0.5, 1e-3, 5.0, *memory)
            reference.anderson_step(q, y, gx.double(), 0.5, 1e-3, 5.0, *oracles)
        close(x, y, dtype, 30)
        close(p.out[p.counters[:, STATUS] > 0], q.out[p.counters[:, STATUS] > 0], dtype)
        assert torch.equal(p.counters, q.counters)
        assert torch.equal(p.tally, q.tally)
    expected = [
        Status.CONVERGED,
        Status.STALLED,
        Status.DIVERGED,
        Status.NONFINITE if solver == "picard" else Status.MAX_ITERATIONS,
        Status.MAX_ITERATIONS,
        Status.CONVERGED if floored else Status.STALLED,
    ]
    assert (p.counters[:, STATUS] - 1).tolist() == expected


@pytest.mark.parametrize("group", test_stop_rule.GROUPS)
@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_samples_end_where_the_rule_says(solver, group):
    dtype = {"picard": torch.float32, "anderson": torch.float64}[solver]
    test_stop_rule.test_samples_end_where_the_rule_says(triton, solver, group, dtype)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rows_end_at_bounds_of_their_own(plan, solver, dtype):
    primitives.test_rows_end_at_bounds_of_their_own(triton, solver, 70, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exponent", [-36, -20, 18, 37])
def test_norms_neither_underflow_nor_overflow(plan, dtype, exponent):
    primitives.test_norms_neither_underflow_nor_overflow(triton, dtype, exponent)


def test_anderson_measures_tiny_rows_too(plan):
    x, gx = torch.zeros(1, 100), torch.full((1, 100), 3e-30)
    p = Progress(x, FOREVER)
    triton.anderson_step(p, x, gx, 1.0, 1e-6, 10.0, *window(1, 2, 100, x.dtype))
    assert float(p.scalars[0, RESIDUAL]) == pytest.approx(3e-29, rel=1e-5)


@pytest.mark.parametrize("tiles", [1, 5, 1100])
def test_picard_takes_the_sums_that_a_kernel_left(plan, tiles):
    """However many, and where x and g(x) would say otherwise."""
    b, n = 3, 50
    x, gx = torch.randn(b, n), torch.randn(b, n)
    norms = torch.rand(b, tiles, 2)
    p = Progress(x, FOREVER)
    p.norms = norms
    triton.picard_step(p, x, gx, 0.6)
    close(p.scalars[:, RESIDUAL], norms[:, :, 0].double().sum(1).sqrt(), torch.float32)
    with pytest.raises(ValueError, match=r"norms must have shape \[3, tiles, 2\]"):
        p.norms = norms[:2]
        triton.picard_step(p, x, gx, 0.6)


@pytest.mark.parametrize("squares", [0.0, 1e-35, math.inf, math.nan])
def test_picard_measures_what_a_kernel_could_not(plan, squares):
    x, gx = torch.randn(2, 50), torch.randn(2, 50)
    expected = torch.linalg.vector_norm((gx - x).double(), dim=1)
    norms = torch.ones(2, 3, 2)
    norms[0] = squares
    p = Progress(x, FOREVER)
    p.norms = norms
    triton.picard_step(p, x, gx, 1.0)
    close(p.scalars[0, RESIDUAL], expected[0], torch.float32)
    assert float(p.scalars[1, RESIDUAL]) == pytest.approx(3**0.5)


def test_a_singular_window_takes_a_picard_step_alone(plan):
    primitives.test_a_singular_window_takes_a_picard_step_alone(triton, torch.float64)


def test_a_grown_residual_restarts_its_window_alone(plan):
    primitives.test_a_grown_residual_restarts_its_window_alone(triton)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_windows_guards_are_the_oracles(plan, dtype):
    guards.test_differences_up_to_two_roundings_of_the_value_say_nothing(triton, dtype, 32.0)
    guards.test_a_residual_more_than_restart_times_the_least_drops_what_was_before(triton, dtype)


@pytest.mark.parametrize(
    ("plan", "course", "starts_plain"),
    [
        ("whole", "grows for long", True),
        ("cut", "grows between", True),
        ("cut", "falls slowly", False),
    ],
    indirect=["plan"],
)
def test_alternating_steps_follow_the_oracles(plan, course, starts_plain):
    alternation.check_follows_the_oracle(triton, course, 3, starts_plain, m=3, n=70)


def test_residual_differences_of_rounding_size_are_not_trusted(plan):
    """Half a rounding of g(x) apart: the window restarts, a damped step is taken."""
    x = torch.zeros(1, 8)
    p = Progress(x, FOREVER)
    memory = window(1, 3, 8, x.dtype)
    for k in (0, 1):
        gx = x + torch.ones(1, 8) + k * 2**-24 * torch.randn(1, 8)
        triton.anderson_step(p, x, gx, 0.5, 1e-6, 10.0, *memory)
    assert p.counters[0, WINDOW] == 1
    close(x, torch.ones(1, 8), torch.float32)


def test_the_gram_matrix_holds_the_products_of_the_differences(plan):
    """By slot, so that a full ring moves nothing; the oldest iterate's row is the one unused."""
    m, n, made = 4, 70, 7
    x = torch.randn(1, n, dtype=torch.float64)
    p = Progress(x, FOREVER)
    memory = window(1, m, n, x.dtype)
    for _ in range(made):
        triton.anderson_step(p, x, torch.randn_like(x), 1.0, 1e-3, 1e9, *memory)
    _, residuals, gram = memory
    head = int(p.counters[0, HEAD])
    assert head == made % m
    slots = [(head - age) % m for age in range(m)]
    ordered = residuals[0, slots]
    d = ordered[:-1] - ordered[1:]
    close(gram[0][slots[:-1]][:, slots[:-1]], d @ d.mT, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sample_has_the_same_bits_in_any_batch(plan, dtype):
    b, n, m = 3, 150, 3
    start, values = torch.randn(b, n).to(dtype), torch.randn(4, b, n).to(dtype)

    def run(rows):
        x = start[rows].clone()
        p, memory = Progress(x, FOREVER), window(len(x), m, n, dtype)
        for gx in values:
            triton.anderson_step(p, x, gx[rows].clone(), 0.6, 1e-3, 1e9, *memory)
        return x, p.counters, p.scalars, *memory

    together = run(slice(None))
    alone = run(slice(2, 3))
    for t, a in zip(together, alone, strict=True):
        same_bits(t[2:], a)


def test_unaligned_values_give_the_bits_of_aligned_ones_and_stay(plan):
    x, memory = torch.randn(2, 101), torch.randn(203)
    gx = memory[1:].view(2, 101)
    kept, y = memory.clone(), x.clone()
    p, q = Progress(x, FOREVER), Progress(x, FOREVER)
    triton.picard_step(p, x, gx, 0.6)
    triton.picard_step(q, y, gx.clone(), 0.6)
    same_bits(x, y)
    same_bits(p.scalars, q.scalars)
    same_bits(memory, kept)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("n", [0, 9, 2100])
def test_a_step_without_values_is_counted(solver, n):
    primitives.test_a_step_without_values_is_counted(triton, solver, n)


def test_operators_say_what_a_tensor_must_be():
    x = torch.zeros(2, 3)
    p = Progress(x, FOREVER)
    with pytest.raises(ValueError, match=r"gx must have shape \[2, 3\] .*\(got shape \[2, 4\]"):
        triton.picard_step(p, x, torch.zeros(2, 4), 1.0)
    with pytest.raises(ValueError, match=r"gx must be torch.float32 .*\(got torch.float64"):
        triton.picard_step(p, x, x.double(), 1.0)
    with pytest.raises(ValueError, match=r"x must be .* contiguous"):
        triton.picard_step(p, x.mT, x.mT, 1.0)
    with pytest.raises(ValueError, match="index must be given"):
        triton.picard_step(p, x[:1].clone(), x[:1].clone(), 1.0)
    big = anderson.MAX_HISTORY + 1
    with pytest.raises(ValueError, match=rf"history of 1 to {big - 1} .*\[2, {big}, 3\]"):
        triton.anderson_step(p, x, x, 1.0, 0.0, 2.0, *window(2, big, 3, x.dtype))
    with pytest.raises(ValueError, match="gram must have shape"):
        triton.anderson_step(p, x, x, 1.0, 0.0, 2.0, *window(2, 2, 3, x.dtype)[:2], x)
    with pytest.raises(RuntimeError, match="not differentiable"):
        triton.picard_step(p, x, torch.zeros(2, 3, requires_grad=True), 1.0)


@pytest.mark.parametrize("solver", [Picard(), Anderson(history=3)], ids=["picard", "anderson"])
def test_a_solve_and_its_gradient_are_the_references(solver):
    """Mixed difficulty, so that samples finish apart and the batch is compacted."""
    a = torch.tensor([0.05, 0.1, 0.2, 0.6], dtype=torch.float64)[:, None]

    def g(x, z, a):
        return torch.tanh(a * x) + z

    def solve(backend):
        z = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5).requires_grad_()
        made = fixed_point(
            g, torch.zeros(4, 5, dtype=torch.float64), z, a, solver=solver, backend=backend
        )
        made.x.sum().backward()
        return made, z.grad

    (ours, gradient), (oracle, expected) = solve("triton"), solve("reference")
    assert ours.path.startswith("triton, eager, compacted" if INTERPRETED else "triton, eager")
    assert torch.equal(ours.iterations, oracle.iterations)
    assert torch.equal(ours.status, oracle.status)
    close(ours.x, oracle.x, torch.float64)
    close(gradient, expected, torch.float64)


def test_the_backend_is_there_under_the_interpreter_only_on_request(monkeypatch):
    if not INTERPRETED:
        pytest.skip("there is a GPU")
    x = torch.zeros(2, 3)
    assert backends.available()["triton"] == ("cpu",)
    assert backends.choose("triton", x) is triton
    assert backends.choose("auto", x) is not triton
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backends.available()["triton"] == ()
    with pytest.raises(
        RuntimeError, match=r'"triton" does not run on device cpu.*use backend="auto"'
    ):
        backends.choose("triton", x)


@pytest.mark.parametrize(
    ("native_devices", "triton_runs", "expected"),
    [(("cpu", "cuda"), True, "native"), (("cpu",), True, "triton"), (("cpu",), False, "reference")],
)
def test_auto_on_cuda_is_the_fastest_that_runs(monkeypatch, native_devices, triton_runs, expected):
    class OnCuda:
        device = torch.device("cuda")

    monkeypatch.setattr(backends.native, "devices", lambda: native_devices)
    monkeypatch.setattr(backends.native, "_too_old", lambda _: None)
    monkeypatch.setattr(backends.triton, "missing", lambda _: None if triton_runs else "a reason")
    assert expected == backends.choose("auto", OnCuda()).NAME


def test_a_folder_called_triton_is_not_taken_for_it(monkeypatch, tmp_path):
    (tmp_path / "triton").mkdir()
    code = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p];"
        f"sys.path.append({str(tmp_path)!r});"
        "import importlib.util as u; spec = u.find_spec('triton'); assert spec.origin is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_imports_no_triton():
    code = (
        "import sys, fpi_cuda; fpi_cuda.backends.available();"
        "assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
