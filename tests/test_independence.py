"""A sample's answer does not depend on its batch-mates, nor on leaving finished ones out."""

import math
import warnings

import pytest
import torch
from helpers import SOLVERS, contraction, row_tanh
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fpi_cuda import Anderson, Picard, Tolerance, fixed_point
from fpi_cuda.solve import independence

pytestmark = pytest.mark.usefixtures("one_thread")

# Where no library product stands between: the oracle's Anderson solves its systems by torch's.
BITS = pytest.mark.parametrize(
    ("backend", "name"),
    [("reference", "picard"), ("native", "picard"), ("native", "anderson")],
)


def elementwise(x, z, s):
    """Row-invariant, and so is its derivative: no sum, only a shift along the row."""
    return torch.tanh(s * (0.6 * x + 0.4 * x.roll(1, 1)) + z)


def solve(g, z, s, solver, backend, **options):
    z = z.clone().requires_grad_()
    solution = fixed_point(
        g, torch.zeros_like(z), z, s, solver=solver, backend=backend, on_failure="return", **options
    )
    (gradient,) = torch.autograd.grad(solution.x.sin().sum(), z)
    adjoint = solution.adjoint  # None where every sample failed
    none = torch.zeros_like(solution.iterations)
    return {
        "x": solution.x.detach(),
        "status": solution.status,
        "iterations": solution.iterations,
        "residual_norm": solution.residual_norm,
        "gradient": gradient,
        "adjoint iterations": none if adjoint is None else adjoint.iterations,
    }, solution


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


batches = st.fixed_dictionaries(
    {
        "b": st.integers(1, 7),
        "n": st.integers(1, 19),
        "seed": st.integers(0, 10**6),
        "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    }
)


def draw(case):
    """Samples of very different difficulty, one of them bad."""
    g = torch.Generator().manual_seed(case["seed"])
    z = torch.randn(case["b"], case["n"], generator=g, dtype=torch.float64).to(case["dtype"])
    s = 0.9 * torch.rand(case["b"], 1, generator=g, dtype=torch.float64).to(case["dtype"])
    if case["seed"] % 3 == 0:
        z[case["seed"] % case["b"], 0] = float("nan")
    return z, s


@BITS
@given(case=batches, data=st.data())
def test_any_order_and_any_part_of_the_batch_give_the_same_bits(backend, name, case, data):
    z, s = draw(case)
    rows = data.draw(st.permutations(range(case["b"])))
    rows = torch.tensor(rows[: data.draw(st.integers(1, case["b"]))])
    whole, _ = solve(elementwise, z, s, SOLVERS[name], backend)
    part, _ = solve(elementwise, z[rows], s[rows], SOLVERS[name], backend)
    for key, value in part.items():
        assert same_bits(value, whole[key][rows]), key


@pytest.mark.parametrize("name", list(SOLVERS))
@given(case=batches)
def test_a_sample_alone_gives_the_same_bits(name, case):
    z, s = draw(case)
    whole, _ = solve(elementwise, z, s, SOLVERS[name], "native")
    for i in range(case["b"]):
        alone, _ = solve(elementwise, z[i : i + 1], s[i : i + 1], SOLVERS[name], "native")
        for key, value in alone.items():
            assert same_bits(value, whole[key][i : i + 1]), key


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("b", [1, 2, 3, 17, 64])
def test_row_sums_in_a_fixed_order_give_the_same_bits_alone(name, b):
    """One native row in any batch, with sums inside g: forward only, as its backward sums too."""
    w = contraction(9, 0.9, dtype=torch.float32)
    z = torch.randn(b, 9)
    with torch.no_grad():
        whole, alone = (
            fixed_point(
                row_tanh,
                torch.zeros_like(t),
                t,
                params=(w,),
                solver=SOLVERS[name],
                backend="native",
            )
            for t in (z, z[b // 2 : b // 2 + 1].clone())
        )
    assert torch.equal(whole.x[b // 2], alone.x[0])
    assert whole.iterations[b // 2] == alone.iterations[0]
    assert torch.equal(whole.residual_norm[b // 2], alone.residual_norm[0])


@pytest.mark.parametrize("kind", ["gemm", "convolution"])
def test_library_gemms_and_convolutions_agree_to_tolerance_in_any_batch(kind, backend, solver):
    """Values within tolerance, counts within 1, status equal off the threshold."""
    if kind == "gemm":
        z, w = torch.randn(33, 32), contraction(32, 0.9, dtype=torch.float32)

        def g(x, z, w):
            return torch.tanh(x @ w.mT + z)
    else:
        z, w = torch.randn(9, 3, 6, 6), 0.06 * torch.randn(3, 3, 3, 3)

        def g(x, z, w):
            return torch.tanh(nn.functional.conv2d(x, w, padding=1) + z)

    def run(z):
        return fixed_point(
            g,
            torch.zeros_like(z),
            z,
            params=(w,),
            solver=solver,
            backend=backend,
            on_failure="return",
            max_iterations=60,
        )

    whole = run(z)
    rtol, atol = Tolerance().resolve(torch.float32)
    for part in ([0], [5, 3], list(range(7, -1, -1))):
        some = run(z[part])
        assert (some.iterations - whole.iterations[part]).abs().max() <= 1
        flat, other = some.x.flatten(1), whole.x[part].flatten(1)
        allowed = 20 * (rtol * flat.norm(dim=1) + atol * flat.shape[1] ** 0.5)
        assert ((flat - other).norm(dim=1) <= allowed).all()
        threshold = atol * flat.shape[1] ** 0.5 + rtol * flat.norm(dim=1)
        near = (some.residual_norm / threshold - 1).abs() < 0.01
        assert ((some.status == whole.status[part]) | near).all()


@BITS
def test_one_thread_and_many_give_the_same_bits(backend, name):
    z, s = spread(b=700, n=33)
    options = {"solver": SOLVERS[name], "backend": backend}
    with torch.no_grad():
        one = fixed_point(elementwise, torch.zeros_like(z), z, s, **options)
        torch.set_num_threads(4)  # one_thread sets it back
        many = fixed_point(elementwise, torch.zeros_like(z), z, s, **options)
    assert torch.equal(one.x, many.x)
    assert torch.equal(one.iterations, many.iterations)
    assert torch.equal(one.residual_norm, many.residual_norm)


# --- compaction ------------------------------------------------------------------------------


def rows_given(g):
    seen = []

    def counting(x, *rest):
        seen.append(len(x))
        return g(x, *rest)

    return counting, seen


def spread(b=32, n=6, dtype=torch.float32):
    """Samples whose difficulty is spread from trivial to hard."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(b, n, generator=g, dtype=torch.float64).to(dtype) * 0.2
    s = torch.linspace(0.0, 0.97, b, dtype=torch.float64)[torch.randperm(b, generator=g)]
    return z, s[:, None].to(dtype)


def unsplit(monkeypatch, *given):
    """The same solve on the whole batch to its end."""
    with monkeypatch.context() as patch:
        never = independence.Samples(compactable=False, certain=True)
        patch.setattr(independence, "INDEPENDENT", never)
        return solve(*given, per_sample=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_compaction_changes_no_bit_and_saves_rows(backend, solver, dtype, monkeypatch):
    z, s = spread(dtype=dtype)
    g, rows = rows_given(elementwise)
    whole, masked = unsplit(monkeypatch, g, z, s, solver, backend)
    rows_masked, counts = sum(rows), masked.iterations
    rows.clear()
    part, compacted = solve(g, z, s, solver, backend, per_sample=True)
    for key, value in whole.items():
        assert torch.equal(value, part[key]), key
    assert "compacted" in compacted.path
    assert "compacted" not in masked.path
    assert sum(rows) < rows_masked
    # Finished samples cost at most a quarter more than those that iterate.
    assert compacted.evaluations == masked.evaluations
    forward = rows[: compacted.evaluations]
    assert sum(forward) <= 1.25 * counts.sum() + len(z)


def test_auto_compacts_an_independent_g_without_a_warning(backend, solver, monkeypatch):
    z, s = spread()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result, solution = solve(elementwise, z, s, solver, backend)
    assert "compacted" in solution.path
    expected, _ = unsplit(monkeypatch, elementwise, z, s, solver, backend)
    for key, value in expected.items():
        assert torch.equal(value, result[key]), key


@pytest.mark.parametrize(
    ("z", "s"),
    [
        ([[0.3, -0.8], [9, -9]], [0.9, 0.2]),  # two rows: one that is left fits any tensor
        ([[0.3, -0.8], [9, -9], [9, 9], [-9, 9]], [[0.9, 0.4], [0.2, 0.4], [0.1, 0.2], [0.3, 0]]),
    ],
)
def test_that_a_tensor_is_not_the_samples_may_matter_to_the_first_alone(z, s, backend):
    """The others are at their ends, where nothing matters."""

    def g(x, z, s):
        return torch.tanh(x * (s if s.dim() == 1 else s.mean(0)) + z)

    z, s = torch.tensor(z), torch.tensor(s)
    with pytest.warns(UserWarning, match="part of the batch"):
        x = fixed_point(g, torch.zeros_like(z), z, s, backend=backend).x
    torch.testing.assert_close(g(x, z, s), x, rtol=1e-3, atol=1e-3)


def test_a_rush_of_endings_is_not_compacted_until_the_rest_goes_on(backend):
    """Most samples end in one iteration: the others are given one more in the whole batch."""
    z = torch.full((32, 6), 0.2)
    s = torch.full((32, 1), 0.1)

    def solved(rate):
        s[::4] = rate
        g, rows = rows_given(elementwise)
        with torch.no_grad():
            given = (torch.zeros_like(z), z, s)
            solution = fixed_point(g, *given, solver=Picard(), backend=backend, per_sample=True)
        return solution.iterations, solution.path, rows

    counts, path, rows = solved(0.12)
    assert int(counts.max() - counts.min()) == 1
    assert "compacted" not in path
    assert rows == [32] * len(rows)
    counts, path, rows = solved(0.9)
    assert "compacted" in path
    easy, hard = int(counts.min()), int(counts.max())
    assert hard > easy + 2
    assert rows == [32] * (easy + 1) + [8] * (hard - easy - 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_auto_takes_gemms_and_convolutions_for_independent(dtype, backend):
    b = 64
    s = torch.linspace(0.05, 0.95, b)[torch.randperm(b)].to(dtype)
    w = contraction(48, 1.0, dtype=dtype)
    kernel = (0.1 * torch.randn(4, 4, 3, 3)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gemm = fixed_point(
            lambda x, z, s, w: torch.tanh(s * (x @ w.mT) + z),
            torch.zeros(b, 48, dtype=dtype),
            torch.randn(b, 48).to(dtype),
            s[:, None],
            params=(w,),
            backend=backend,
            solver=Picard(),
            on_failure="return",
        )
        convolution = fixed_point(
            lambda x, z, s, k: torch.tanh(s * nn.functional.conv2d(x, k, padding=1) + z),
            torch.zeros(b, 4, 5, 5, dtype=dtype),
            torch.randn(b, 4, 5, 5).to(dtype),
            s[:, None, None, None],
            params=(kernel,),
            backend=backend,
            solver=Picard(),
            on_failure="return",
        )
    assert "compacted" in gemm.path
    assert "compacted" in convolution.path


def test_rows_that_hold_nan_do_not_decide_whether_g_mixes_samples(backend):
    z, s = spread()
    z[::2] = float("nan")
    result, _ = solve(elementwise, z, s, Picard(), backend)  # a warning is an error here
    expected, _ = solve(elementwise, z[1::2], s[1::2], Picard(), backend)
    assert torch.equal(result["x"][1::2], expected["x"])


@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
@pytest.mark.parametrize("roundings", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_agree_up_to_roundings_of_their_dtype(dtype, roundings, scale):
    """In a half type as many as asked for; else 256, as products differ from batch to batch."""
    eps = torch.finfo(dtype).eps
    slack = roundings if dtype.itemsize == 2 else 256
    scale = scale if dtype != torch.float16 else 1.0
    whole = torch.full((4, 3), scale, dtype=dtype)
    part = whole.clone()
    part[:3] *= torch.tensor([1, 1 + slack * eps, 1 + (slack + 1) * eps], dtype=dtype)[:, None]
    part[3] = math.nan
    agreed = independence.agree(part, whole, dtype, roundings)
    assert agreed.tolist() == [True, True, False, True]


def test_values_of_products_in_a_half_type_agree_up_to_its_roundings():
    """Autocast's dtype, whatever the state's."""
    whole = torch.ones(2, 3)
    eps = torch.finfo(torch.bfloat16).eps
    part = whole * torch.tensor([[1 + 4 * eps], [1 + 5 * eps]])
    assert independence.agree(part, whole, torch.bfloat16, 4).tolist() == [True, False]
    part, whole = part.bfloat16(), whole.bfloat16()
    assert independence.agree(part, whole, torch.float32, 4).tolist() == [True, False]


# --- a g that can't take a part of the batch, or mixes samples --------------------------------


def test_a_captured_per_sample_tensor_keeps_the_batch_whole(backend):
    z, s = spread()

    def captured():
        return fixed_point(
            lambda x: elementwise(x, z, s), torch.zeros_like(z), backend=backend, solver=Anderson()
        )

    with pytest.warns(UserWarning, match="Pass such tensors as inputs") as caught:
        first = captured()
    assert len(caught) == 1
    passed = fixed_point(elementwise, torch.zeros_like(z), z, s, backend=backend, solver=Anderson())
    for solution in (first, captured()):  # known by now: silent
        assert "whole batch" in solution.path
        assert torch.equal(solution.x, passed.x)
        assert torch.equal(solution.iterations, passed.iterations)


class Normalised(nn.Module):
    """Batch norm inside g: its rows depend on the others of the batch."""

    def __init__(self, n=6):
        super().__init__()
        self.norm = nn.BatchNorm1d(n)

    def forward(self, x, z, s):
        return torch.tanh(s * self.norm(x + z)) + z


def test_batch_norm_in_eval_mode_is_independent_and_judged_anew(backend):
    z, s = spread()
    z, s = 5 * z, 0.8 * s
    g = Normalised()
    with pytest.warns(UserWarning, match="per_sample=False"):
        _, solution = solve(g, z, s, Picard(), backend)
    assert solution.iterations.unique().numel() == 1
    _, solution = solve(g.eval(), z, s, Picard(), backend)
    assert "compacted" in solution.path
    _, solution = solve(g.train(), z, s, Picard(), backend)  # known: silent
    assert solution.iterations.unique().numel() == 1
