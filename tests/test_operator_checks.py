"""What the native operators refuse on the CPU: they would else read or write beyond a tensor."""

import math
import re

import pytest
import torch
from torch import nn

from fpi_cuda import ConvStep, DenseStep, fixed_point
from fpi_cuda.backends import native
from fpi_cuda.drivers import whole
from fpi_cuda.forms import DenseForm
from fpi_cuda.record import HEAD, ITERATIONS, STATUS, WINDOW, Limits, Progress
from fpi_cuda.solvers import Anderson, Picard

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = Limits(rtol=0.0, offset=0.0, rounding=0.0, patience=9, max_iterations=9)
B, N, M = 6, 5, 3


def progress(limits=LIMITS, index=None):
    p = Progress(torch.zeros(B, N), limits)
    p.index = None if index is None else torch.tensor(index, dtype=torch.int64)
    return p


def window():
    return [torch.zeros(B, M, N), torch.zeros(B, M, N), torch.zeros(B, M, M)]


def step(p, solver, x=None, gx=None, parts=None):
    rows = B if p.index is None else len(p.index)
    x = torch.zeros(rows, N) if x is None else x
    gx = torch.ones(rows, N) if gx is None else gx
    if solver == "picard":
        native.picard_step(p, x, gx, 1.0)
    else:
        native.anderson_step(p, x, gx, 1.0, 1e-6, 10.0, *(parts or window()))


solvers = pytest.mark.parametrize("solver", ["picard", "anderson"])


@solvers
@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 1, 6], "index must hold numbers from 0 to 5 (got 6 in row 2)"),
        ([-1, 1, 2], "index must hold numbers from 0 to 5 (got -1 in row 0)"),
        ([4, 2**40, 2], f"index must hold numbers from 0 to 5 (got {2**40} in row 1)"),
        ([3, 3, 4], "index must name a sample once (got 3 again in row 1)"),
        ([5, 0, 5], "index must name a sample once (got 5 again in row 2)"),
    ],
)
def test_index_names_samples_once_each(solver, index, message):
    p = progress(index=index)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        step(p, solver)
    assert not p.counters.any(), "nothing was written"
    for good in ([0, 2, 5], [5, 0, 3], [], [4]):
        step(progress(index=good), solver)


@pytest.mark.parametrize(
    ("column", "value"),
    [(HEAD, M), (HEAD, -1), (WINDOW, M + 1), (WINDOW, -1), (ITERATIONS, -1), (HEAD, 2**31 - 1)],
)
def test_counters_are_what_kernels_index_by(column, value):
    p = progress(index=[0, 4, 5])
    p.counters[4, column] = value
    got = ", ".join(str(v) for v in p.counters[4, [ITERATIONS, WINDOW, HEAD]].tolist())
    wanted = "iterations from 0, a window of 0 to 3, a head of 0 to 2"
    with pytest.raises(RuntimeError, match=re.escape(f"{wanted} (got {got} for sample 4)")):
        step(p, "anderson")
    p.index = torch.tensor([0, 1, 5])  # no row holds it: nobody looks
    step(p, "anderson")


def test_a_whole_solve_begins_with_empty_windows():
    form = DenseForm(torch.zeros(N, N), torch.ones(B, N))
    for column, value in ((WINDOW, 1), (HEAD, M), (ITERATIONS, -5)):
        p = progress()
        p.counters[2, column] = value
        with pytest.raises(RuntimeError, match=r"a window of 0 to 0, a head of 0 to 2 .*sample 2"):
            native.dense_solve(p, torch.zeros(B, N), form, 1.0, M, 1e-6, 10.0)
    p = progress()
    p.counters[:, STATUS] = 1
    native.dense_solve(p, torch.zeros(B, N), form, 1.0, M, 1e-6, 10.0)


BEYOND = [("max_iterations", 2**31), ("max_iterations", 2**32 + 5), ("max_iterations", 0)]
BEYOND += [("patience", 2**31), ("patience", -1)]


@pytest.mark.parametrize(("name", "value"), BEYOND)
def test_limits_are_counted_in_int32(name, value):
    given = dict(patience=9, max_iterations=9) | {name: value}
    limits = Limits(0.0, 0.0, 0.0, **given)
    message = rf"{name} must be \d to 2147483647 \(got {value}\)"
    for solver in ("picard", "anderson"):
        with pytest.raises(RuntimeError, match=f"_{solver}_step: {message}"):
            step(progress(limits), solver)
    form, x0 = DenseForm(torch.zeros(N, N), torch.ones(B, N)), torch.zeros(B, N)
    with pytest.raises(RuntimeError, match=f"_dense_solve: {message}"):
        whole.solve(form, x0, Picard(), limits)


@solvers
@pytest.mark.parametrize(
    ("patience", "most"), [(1e10, 9), (9, 1e10), (math.nan, 9), (9, 0), (-1, 9)]
)
def test_so_are_limits_of_samples_own(solver, patience, most):
    own = torch.tensor([[0.0, 0.0, 9.0, 9.0, 0.0]]).repeat(B, 1)
    own[3, 2:4] = torch.tensor([patience, most])
    with pytest.raises(RuntimeError, match=r"limits of its own in int32.* for sample 3"):
        step(progress(Limits(0.0, 0.0, 0.0, 9, 9, own=own)), solver)


# --- memory that was freed -------------------------------------------------------------------


def freed(*shape, offset=0):
    """A tensor of this shape without memory; behind an offset, as a part of a flat parameter."""
    t = torch.ones(offset + math.prod(shape))[offset:].view(shape)
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.parametrize("name", ["x", "gx", "values", "gram", "scalars", "tally"])
def test_operators_refuse_freed_memory(name, offset):
    p, parts, given = progress(), window(), {}
    if name in ("x", "gx"):
        given[name] = freed(B, N, offset=offset)
    elif name == "values":
        parts[0] = freed(B, M, N, offset=offset)
    elif name == "gram":
        parts[2] = freed(B, M, M, offset=offset)
    else:
        shape = getattr(p, name).shape
        setattr(p, name, freed(*shape, offset=offset).view(getattr(p, name).dtype))
    with pytest.raises(RuntimeError, match=rf"_anderson_step: {name} of .*storage was freed"):
        step(p, "anderson", parts=parts, **given)


@pytest.mark.parametrize("name", ["weight", "u", "hidden_weight", "hidden_u", "x0"])
def test_a_whole_solve_refuses_freed_memory(name):
    given = dict(
        weight=torch.zeros(N, 4), u=torch.zeros(N), hidden_weight=torch.zeros(4, N),
        hidden_u=torch.zeros(B, 4), x0=torch.zeros(B, N),
    )  # fmt: skip
    given[name] = freed(*given[name].shape, offset=3)
    x0 = given.pop("x0")
    for solver in (Picard(), Anderson()):
        with pytest.raises(RuntimeError, match=f"{name.removesuffix('0')} of shape .*was freed"):
            whole.solve(DenseForm(**given), x0, solver, LIMITS)
    with pytest.raises(RuntimeError, match=r"_dense_map: weight of shape .*storage was freed"):
        native.dense_map(torch.ones(2, 4), freed(3, 4), None)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, z):
        return torch.tanh(0.3 * self.layer(x) + z)


STEPS = {
    "dense": (lambda: DenseStep(4, 4), (4,)),
    "exact": (lambda: DenseStep(4, 4, 3, exact=True), (4,)),
    "convolution": (lambda: ConvStep(2, 2), (2, 3, 3)),
    "plain": (Plain, (4,)),
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_solve_refuses_freed_tensors(kind):
    """State, inputs, params; a step's own where the library itself reads them; any in backward."""
    make, shape = STEPS[kind]

    def solved(free=(), later=()):
        torch.manual_seed(0)
        g = make()
        given = dict(x0=torch.zeros(3, *shape), z=torch.randn(3, *shape).requires_grad_())
        given |= {"weight": next(g.parameters()), "bias": list(g.parameters())[-1]}
        for name in free:
            given[name].untyped_storage().resize_(0)
        x = fixed_point(g, given["x0"], given["z"]).x
        v = torch.ones_like(x)
        given["v"] = v
        for name in later:
            given[name].untyped_storage().resize_(0)
        return torch.autograd.grad(x, given["z"], v)

    wanted = "must have its values in memory"
    for name in ("x0", "z", *(("weight", "bias") if kind != "plain" else ())):
        with pytest.raises(ValueError, match=wanted):
            solved(free=(name,))
    for name in ("z", "weight", "bias", "v"):
        with pytest.raises(ValueError, match=wanted):
            solved(later=(name,))
    solved(later=("x0",))  # the derivative does not depend on it
    z = torch.zeros(3, *shape)
    with pytest.raises(ValueError, match="inputs or params must have its values in memory"):
        fixed_point(lambda x, z, w: 0.5 * x * w + z, z, z, params=(freed(1),))
