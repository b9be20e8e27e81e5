"""What the steps measure of g, at any scale, and how mixtures are taken back: as the oracle does.

Rows that one program takes whole and rows cut into parts, on a few short ones for the interpreter.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_primitives import FOREVER, TOLERANCE, close, oracle_of, poisoned, same_bits
from test_steps import window

from fpi_cuda import Status
from fpi_cuda.backends import reference, triton
from fpi_cuda.record import (
    GAIN,
    HALVINGS,
    HEAD,
    ITERATIONS,
    MAX_HALVINGS,
    PLAIN,
    REFERENCE,
    REFERENCE_ITERATION,
    RESIDUAL,
    RETREATS,
    RING_START,
    SLOW_ITERATIONS,
    STATUS,
    TRAIL,
    VALUE,
    WINDOW,
    Progress,
    accumulate_dtype,
)

M = 3


def agree(p, q, dtype):
    """The whole record, the measurements a little apart."""
    assert torch.equal(p.counters, q.counters)
    assert torch.equal(p.tally, q.tally)
    rtol = 50 * TOLERANCE[accumulate_dtype(dtype)]
    torch.testing.assert_close(p.scalars.double(), q.scalars, rtol=rtol, atol=0, equal_nan=True)


def step(solver, p, x, gx, beta, memory, every=1):
    """One step by Triton and by the float64 oracle, from the same record, trail or window."""
    q, y, oracles = oracle_of(p), x.double().clone(), [t.double().clone() for t in memory]
    if solver == "picard":
        triton.picard_step(p, x, gx, beta, *memory)
        reference.picard_step(q, y, gx.double(), beta, *oracles)
    else:
        triton.anderson_step(p, x, gx, beta, 0.05, 1e9, *memory, every=every)
        reference.anderson_step(q, y, gx.double(), beta, 0.05, 1e9, *oracles, every=every)
    return q, y


# --- Picard's trail -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "dtype", "beta", "n", "scale"),
    [
        ("whole", torch.float64, 1.0, 33, 2.0**-900),
        ("cut", torch.float64, 0.5, 70, 2.0**900),
        ("whole", torch.float32, 0.5, 70, 2.0**100),
        ("cut", torch.float32, 1.0, 33, 2.0**-100),
        ("whole", torch.float16, 0.5, 7, 1.0),
        ("cut", torch.bfloat16, 1.0, 70, 2.0**-60),
    ],
    ids=str,
    indirect=["plan"],
)
def test_picard_keeps_its_last_iterates_and_measures_at_the_end(plan, dtype, beta, n, scale):
    """Samples that end at once, by their own limits, stalled, and from a trail of one or of two."""
    torch.manual_seed(0)
    b = 5
    acc = accumulate_dtype(dtype)
    # rtol, offset, patience, max_iterations, rounding
    own = [
        (0.0, -1.0, 9, 4, -1.0),
        (0.3, 0.0, 9, 9, -1.0),
        (0.0, -1.0, 9, 2, -1.0),
        (0.0, -1.0, 9, 1, -1.0),
        (0.0, -1.0, 2, 9, 1e3),
    ]
    x = (scale * torch.randn(b, n, dtype=torch.float64)).to(dtype)
    p = Progress(x, replace(FOREVER, own=torch.tensor(own, dtype=acc)))
    p.narrow(torch.tensor([2, 0, 4, 1, 3]))
    trail = poisoned(b, TRAIL, n, dtype=dtype)
    for k in range(4):
        turned = x.double().roll(1, 1)
        gx = (0.3 * turned + 0.5 * scale).to(dtype)
        gx[2] = x[2] + scale * (1 + k / 8)  # of the sample that stalls
        before, memory = x.clone(), trail.clone()
        active = p.counters[:, STATUS] == 0
        q, y = step("picard", p, x, gx, beta, [trail])
        agree(p, q, dtype)
        close(x / scale, y / scale, dtype)
        for row, sample in enumerate(p.index.tolist()):
            keeps = active[sample] and p.counters[sample, STATUS] == 0
            keeps = keeps and p.counters[sample, WINDOW] > 0
            slot = int(p.counters[sample, HEAD])
            if keeps:
                same_bits(trail[sample, slot], before[row])
                memory[sample, slot] = before[row]
        same_bits(trail, memory)
    assert (p.counters[:, STATUS] > 0).all()
    assert p.counters[4, STATUS] == 1 + Status.STALLED
    assert (p.scalars[[0, 1, 2], GAIN] > 0).all() and p.scalars[3, GAIN] == 0


@pytest.mark.parametrize(("beta", "rtol"), [(1.0, 1e-3), (0.5, 1e-2)])
def test_picard_keeps_x_only_near_the_end(beta, rtol):
    """Near by its residual, by its iterations, because the residual does not fall, or always."""
    torch.manual_seed(6)
    n, dtype = 3, torch.float64
    own = [(rtol, 0.0, 99, 99, -1.0), (0.0, 0.0, 99, 8, -1.0), (0.0, 0.0, 99, 8, -1.0)]
    own.append((0.0, -1.0, 99, 99, -1.0))  # ended from outside
    x = 1 + torch.rand(4, n, dtype=dtype)
    p = Progress(x, replace(FOREVER, own=torch.tensor(own, dtype=dtype)))
    trail, kept = poisoned(4, TRAIL, n, dtype=dtype), []
    for k in range(8):
        gx = 0.4 * x + 0.6
        if k == 4:
            gx[2] += 1
        q, _ = step("picard", p, x, gx, beta, [trail])
        agree(p, q, dtype)
        kept.append(p.counters[:, WINDOW].tolist())
    near, counted, risen, outside = zip(*kept, strict=True)
    assert near[:3] == (1, 2, 0) and near[-1] == TRAIL
    assert counted == (1, 2, 0, 0, 0, 1, 2, 2)
    assert risen[4] == 1
    assert outside == (1, 2, 2, 2, 2, 2, 2, 2)


def test_picard_measures_where_a_kernel_left_the_norms(plan):
    torch.manual_seed(1)
    n, dtype = 50, torch.float32
    x = torch.randn(2, n)
    p = Progress(x, replace(FOREVER, max_iterations=3))
    trail = poisoned(2, TRAIL, n, dtype=dtype)
    for _ in range(3):
        gx = 0.5 * x.roll(1, 1) + 1
        halves = (gx - x).square().sum(1) / 2, gx.square().sum(1) / 2
        p.norms = torch.stack([torch.stack(halves, 1)] * 2, 1)
        q, y = step("picard", p, x, gx, 0.7, [trail])
        agree(p, q, dtype)
        close(x, y, dtype)
    assert (p.scalars[:, GAIN] > 0).all() and (p.scalars[:, RING_START] > 0).all()
    with pytest.raises(ValueError, match=r"trail must have shape \[2, 2, 50\]"):
        triton.picard_step(p, x, x.clone(), 1.0, trail[:1])


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_a_norm_is_taken_again_by_itself(plan, solver):
    """‖g(x)‖ is ordinary, and ‖r‖ so small that its squares underflow; and the other way round."""
    n, dtype = 40, torch.float32
    x, gx = torch.zeros(2, n), torch.zeros(2, n)
    x[0], gx[0] = 2.0**-95, 2.0**-94  # of r alone; g's other entries are larger
    x[0, :3] = gx[0, :3] = torch.tensor([3.0, -2.0, 1.0])
    x[1], gx[1] = 2.0**70, 2.0**-3
    p = Progress(x, FOREVER)
    memory = [poisoned(2, TRAIL, n, dtype=dtype)] if solver == "picard" else window(2, M, n, dtype)
    q, _ = step(solver, p, x, gx, 1.0, memory)
    agree(p, q, dtype)
    assert p.scalars[0, RESIDUAL] == pytest.approx(37**0.5 * 2.0**-95, rel=1e-6)
    assert p.scalars[0, VALUE] == pytest.approx(14**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("plan", "dtype", "beta", "n", "scale"),
    [
        ("whole", torch.float64, 1.0, 33, 2.0**-900),
        ("cut", torch.float64, 0.6, 65, 2.0**900),
        ("whole", torch.float32, 0.6, 33, 2.0**100),
        ("cut", torch.float32, 1.0, 33, 2.0**-100),
        ("whole", torch.bfloat16, 1.0, 40, 2.0**-80),
    ],
    ids=str,
    indirect=["plan"],
)
def test_anderson_is_free_of_the_scale(plan, dtype, beta, n, scale):
    torch.manual_seed(2)
    b = 1
    x = (scale * torch.randn(b, n, dtype=torch.float64)).to(dtype)
    p, memory = Progress(x, FOREVER), window(b, M, n, dtype)
    for _ in range(4):
        gx = (scale * torch.randn(b, n, dtype=torch.float64)).to(dtype)
        q, y = step("anderson", p, x, gx, beta, memory)
        close(x / scale, y / scale, dtype, 30)
        assert torch.equal(p.counters, q.counters)
        rtol = max(50 * TOLERANCE[accumulate_dtype(dtype)], TOLERANCE[dtype])
        torch.testing.assert_close(p.scalars.double(), q.scalars, rtol=rtol, atol=0)
    assert (p.counters[:, WINDOW] == M).all() and (p.scalars[:, GAIN] > 0).all()


@pytest.mark.parametrize(
    "sizes",
    [(2.0**-45, 2.0**-45, 2.0**-20, 2.0**-20), (2.0**70, 2.0**70, 2.0**40, 2.0**40)],
    ids=["small", "large"],
)
def test_the_gram_matrix_is_kept_unscaled(plan, sizes):
    """From sums that can't be trusted to such that can: an older difference is the last to go."""
    torch.manual_seed(3)
    n, dtype = 40, torch.float32
    x = torch.empty(1, n)
    p, memory = Progress(x, FOREVER), window(1, M, n, dtype)
    for size in sizes:
        x.copy_(size * torch.randn(1, n))
        q, y = step("anderson", p, x, size * torch.randn(1, n), 1.0, memory)
        assert torch.equal(p.counters, q.counters)
        close(x / size, y / size, dtype, 30)
    assert p.counters[0, WINDOW] == M
    _, residuals, gram = memory
    head = int(p.counters[0, HEAD])
    slots = [(head - age) % M for age in range(M)]
    r = residuals[0, slots].double()
    expected = (r[:-1] - r[1:]) @ (r[:-1] - r[1:]).mT
    kept = gram[0][slots[:-1]][:, slots[:-1]]
    torch.testing.assert_close(kept, expected.float(), rtol=1e-4, atol=0)


# --- retreats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "dtype", "every"),
    [
        ("whole", torch.float64, 3),
        ("cut", torch.float32, 1),
        ("whole", torch.float16, 1),
        ("cut", torch.bfloat16, 2),
    ],
    ids=str,
    indirect=["plan"],
)
def test_a_mixture_is_taken_back(plan, dtype, every):
    """Bad values at mixtures, at the plain steps after them, too often, and at a last iteration."""
    torch.manual_seed(4)
    n, b, inf = 40, 5, math.inf
    most = torch.tensor([99.0, 99.0, 99.0, 3.0, 99.0])
    never = torch.tensor([0.0, -1.0, 1e6, 0.0, -1.0])
    own = never.repeat(b, 1)
    own[:, 3] = most
    x = torch.randn(b, n).to(dtype)
    p = Progress(x, replace(FOREVER, own=own.to(accumulate_dtype(dtype))))
    p.narrow(torch.tensor([3, 1, 0, 4, 2]))
    p.out.fill_(math.nan)
    memory = window(b, M, n, dtype)
    bad = {  # by sample, the iterations at which g is not finite
        0: (),
        1: (3, 4, 5),
        2: (3, 4, 5, 6),
        3: (3,),
        4: (1,),
    }
    for k in range(1, 8):
        gx = torch.randn(b, n).to(dtype)
        for row, sample in enumerate(p.index.tolist()):
            if k in bad[sample]:
                gx[row, n - 2] = (inf, math.nan)[k % 2]
        if k == 3:
            x[1, 5] = inf  # row 1: the mixture itself has overflowed
        kept = p.scalars.clone()
        retreats = p.counters[:, RETREATS].clone()
        q, y = step("anderson", p, x, gx, 0.75, memory, every)
        agree(p, q, dtype)
        close(x, y, dtype, 30)
        ended = p.counters[:, STATUS] > 0
        close(p.out[ended], q.out[ended], dtype)
        went_back = p.counters[:, RETREATS] > retreats
        same_bits(p.scalars[went_back], kept[went_back])
    assert p.counters[:, RETREATS].tolist() == [0, 3, 3, 1, 0]
    statuses = [-1, -1, Status.NONFINITE, Status.MAX_ITERATIONS, Status.NONFINITE]
    assert (p.counters[:, STATUS] - 1).tolist() == statuses
    assert p.counters[:, ITERATIONS].tolist() == [7, 7, 6, 3, 1]
    assert p.counters[1, WINDOW] == 1  # after three retreats plain steps alone
    assert x.isfinite().all() and p.out[[2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("beta", [1.0, 0.8])
def test_beta_is_halved_where_the_residual_has_grown_for_long(plan, beta):
    """Mixtures, a step back and a plain step have it; of that sample alone."""
    n, dtype = 70, torch.float32
    draws, turned = torch.randn(2, n), torch.randn(7, 2, n) / 8
    x = torch.zeros(2, n)
    p, memory = Progress(x, FOREVER), window(2, M, n, dtype)
    kept = []
    for k, size in enumerate([1.0, 5.0, 2.5, 1.2, 60.0, 3.0, 2.5]):
        if k in (1, 4):  # as if the first sample had been so for long
            p.counters[0, REFERENCE_ITERATION] -= SLOW_ITERATIONS
            p.scalars[0, REFERENCE] = 0.5
            p.scalars[0, RING_START:] = 9.0
        gx = x + torch.tensor([[size], [0.9**k]]) * (draws + turned[k])
        if k == 5:
            gx[0, -1] = math.nan
        q, y = step("anderson", p, x, gx, beta, memory, 3)
        agree(p, q, dtype)
        close(x, y, dtype, 30)
        kept.append(p.counters[0, [HALVINGS, PLAIN]].tolist())
    most = MAX_HALVINGS
    latched = [[1 + (k == 3), 1 - 2 * M + k] for k in range(4)]  # it grew after a plain step
    assert kept == [[0, 1], *latched, [most, 0], [most, 1]]
    assert p.counters[1, HALVINGS] == 0
    assert p.counters[:, RETREATS].tolist() == [1, 0]


# --- limits of a sample's own ---------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_a_sample_stalls_at_its_own_rounding(plan, solver):
    torch.manual_seed(5)
    n, dtype = 40, torch.float32
    own = torch.tensor([[0.0, -1.0, 1.0, 99.0, 1e-3], [0.0, -1.0, 1.0, 99.0, 1e3]])
    x = torch.randn(2, n)
    p = Progress(x, replace(FOREVER, own=own))
    memory = [poisoned(2, TRAIL, n, dtype=dtype)] if solver == "picard" else window(2, M, n, dtype)
    for _ in range(2):
        r = torch.nn.functional.normalize(torch.randn(2, n), dim=1)
        q, _ = step(solver, p, x, x + r, 0.5, memory)
        agree(p, q, dtype)
    assert (p.counters[:, STATUS] - 1).tolist() == [-1, Status.STALLED]


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_a_damped_step_beyond_the_dtype_is_an_undamped_one(plan, solver):
    n, dtype = 70, torch.float16
    x, gx = torch.full((1, n), -3e4, dtype=dtype), torch.full((1, n), 3e4, dtype=dtype)
    gx[0, 1::2] = -2e4
    p = Progress(x, FOREVER)
    memory = [poisoned(1, TRAIL, n, dtype=dtype)] if solver == "picard" else window(1, M, n, dtype)
    step(solver, p, x, gx, 1.8, memory)
    assert (x[0, ::2] == 3e4).all() and (x[0, 1::2] == -1.2e4).all()
