"""The numbers that a solve's samples stop by: what tolerances and a solver make of them."""

import math

import pytest
import torch

from fpi_cuda import Anderson, FixedPointWarning, Picard, Status, Tolerance, fixed_point
from fpi_cuda.solvers.coupled import Coupled

pytestmark = pytest.mark.usefixtures("one_thread")


def limits_of(n=3, dtype=torch.float32, g=torch.cos, **options):
    options = {"on_failure": "return", "max_iterations": 2, **options}
    return fixed_point(g, torch.ones(2, n, dtype=dtype), **options).record.progress.limits


@pytest.mark.parametrize("n", [1, 100])
def test_the_rounding_level_is_16_roundings_of_each_value(dtype, n):
    """In half types of the state's norm: √N roundings would soon be all of it. Bounds have √N."""
    info = torch.finfo(dtype)
    shared = limits_of(n, dtype)
    spread = 1 if info.bits > 16 else math.sqrt(n)
    assert shared.roundings == pytest.approx(8 * info.eps * math.sqrt(n))
    assert shared.rounding == pytest.approx(shared.roundings / spread)
    for sizes in (None, torch.full((2,), n)):
        own = limits_of(n, dtype, tolerance=Tolerance(torch.full((2,), 0.1)), sizes=sizes)
        assert own.rounding == shared.rounding
        assert own.own[:, 4].tolist() == pytest.approx([shared.rounding] * 2)
        assert own.roundings.tolist() == pytest.approx([shared.roundings] * 2)


def test_patience_is_ten_iterations_or_two_windows():
    assert Picard().patience == 10
    assert [Anderson(m).patience for m in (1, 5, 6, 30)] == [10, 10, 12, 60]
    assert Coupled(Anderson(6), samples=2).patience == 12
    for per_sample in (True, False):
        assert limits_of(solver=Anderson(6), per_sample=per_sample).patience == 12
    rtol = torch.tensor([0.1, 0.0])
    own = limits_of(solver=Anderson(6), tolerance=Tolerance(rtol, 0.0), max_iterations=50).own
    assert own[:, 2].tolist() == [12, 50]  # the second's count is fixed


class Cycle:
    """Ends in a cycle of two values, one rounding apart: a residual that falls no more."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return torch.full_like(x, 1 + (self.calls % 2) * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("tolerance", [(0.0, 1e-30), (1e-30, 0.0), (1e-30, 1e-30)])
def test_one_tolerance_of_zero_is_no_fixed_count(backend, solver, tolerance):
    """At the rounding level it is stalled, before it it has failed; both are told."""
    given = torch.zeros(2, 3)
    options = {"backend": backend, "solver": solver, "tolerance": Tolerance(*tolerance)}
    with pytest.warns(FixedPointWarning, match="2 of 2 samples STALLED"):
        s = fixed_point(Cycle(), given, max_iterations=40, **options)
    assert s.iterations.tolist() == [12, 12]  # it fell last in the second of them
    with pytest.warns(FixedPointWarning, match="2 of 2 samples MAX_ITERATIONS"):
        fixed_point(torch.cos, given, max_iterations=3, **options)


def test_a_fixed_count_runs_on_at_the_rounding_level(backend, solver):
    s = fixed_point(
        Cycle(),
        torch.zeros(2, 3),
        max_iterations=40,
        backend=backend,
        solver=solver,
        tolerance=Tolerance(0, 0),
        per_sample=True,
        on_failure="raise",
    )
    assert s.iterations.tolist() == [40, 40]
    assert s.status.tolist() == [Status.MAX_ITERATIONS] * 2


@pytest.mark.parametrize("own", [False, True])
def test_a_fixed_count_tells_of_other_failures(backend, own):
    slope = torch.tensor([[0.5], [20.0], [0.5]])
    z = torch.tensor([[1.0], [1.0], [math.nan]])
    rtol = torch.zeros(3) if own else 0
    options = {"solver": Picard(), "backend": backend, "max_iterations": 9}
    with pytest.warns(FixedPointWarning) as caught:
        fixed_point(
            lambda x, s, z: s * x + z,
            torch.zeros(3, 1),
            slope,
            z,
            tolerance=Tolerance(rtol, 0),
            **options,
        )
    (message,) = (str(w.message) for w in caught)
    assert "1 of 3 samples DIVERGED (samples 1)" in message
    assert "1 of 3 samples NONFINITE (samples 2)" in message
    assert "MAX_ITERATIONS" not in message
