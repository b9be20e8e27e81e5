"""Ragged batches padded to the longest: a padded sample stops as it would alone (`sizes`)."""

import functools

import pytest
import torch
from helpers import contraction
from helpers_limits import same
from tape import captures, tape_fixture  # noqa: F401

from fpi_cuda import (
    Anderson,
    DenseStep,
    FixedPointLayer,
    ImplicitAdjoint,
    Picard,
    Status,
    Tolerance,
    fixed_point,
)
from fpi_cuda.solve import coupling

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES, B, N = [2, 5, 1, 9], 4, 9 + 99
BOTH = Tolerance(1e-6, 1e-4)
OPTIONS = {"adjoint": ImplicitAdjoint(tolerance=BOTH), "tolerance": BOTH, "on_failure": "return"}


def sine(x, z):
    """No product of torch's, and zeros stay zeros."""
    return 0.8 * torch.sin(x) + z


def padded(rows, n=N):
    out = rows[0].new_zeros(len(rows), n)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def ragged(dtype=torch.float64):
    random = torch.Generator().manual_seed(1)
    return [torch.rand(n, generator=random).to(dtype) * 0.04 + 0.01 for n in SIZES]


def account(s, z, n=N):
    """Iterations and statuses, both ways; then values. The loss reads no padding."""
    (grad,) = torch.autograd.grad((s.x * (z != 0)).sum(), z)
    counts = [t for r in (s, s.adjoint) for t in (r.iterations, r.status)]
    return counts, [s.x, grad, s.residual_norm, s.adjoint.residual_norm]


def alone(rows, solve):
    """Each sample's account without the others and without padding."""
    counts, values = [], []
    for row in rows:
        z = row[None].clone().requires_grad_()
        of = account(solve(z), z)
        counts.append([t[0] for t in of[0]])
        values.append([padded([t[0]])[0] if t.dim() > 1 else t[0] for t in of[1]])
    return [[torch.stack(t) for t in zip(*of, strict=True)] for of in (counts, values)]


def check(found, expected, slack):
    same(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=slack)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("per_sample", [True, "auto"])
def test_a_padded_sample_ends_as_the_bare_one_does(backend, solver, dtype, per_sample):
    rows, sizes = ragged(dtype), torch.tensor(SIZES)
    options = OPTIONS | {"solver": solver, "backend": backend, "per_sample": per_sample}

    def solve(z, **more):
        return fixed_point(sine, torch.zeros_like(z), z, **options, **more)

    expected = alone(rows, solve)
    z = padded(rows).requires_grad_()
    # Alone, torch's factors of a window with more iterates than entries have other bits.
    slack = 1e-4 if (backend, solver) == ("reference", Anderson()) else 0.0
    check(account(solve(z, sizes=sizes), z), expected, slack + 64 * torch.finfo(dtype).eps)
    assert (expected[0][1] == Status.CONVERGED).all()
    without = account(solve(z), z)[0]
    if solver == Picard():
        assert (without[0] < expected[0][0] - 3).all(), "the padding counted"
        assert (without[2] < expected[0][2] - 3).all()


def test_the_whole_driver_too(solver):
    """Weights of the padding are zero, forward and backward."""
    n, wide = 5, 5 + 99
    rows = [torch.rand(n, generator=torch.Generator().manual_seed(i)) + 0.1 for i in range(3)]
    found = []
    for size in (n, wide):
        step = DenseStep(size, None)
        with torch.no_grad():
            step.state_weight.zero_()[:n, :n] = contraction(n, 0.9)
        z = padded(rows, size).requires_grad_()
        given = {} if size == n else {"sizes": torch.full((3,), n)}
        options = OPTIONS | {"solver": solver, "driver": "whole"}
        s = fixed_point(step, torch.zeros_like(z), z, **options, **given)
        assert s.path == "native, whole"
        counts, values = account(s, z)
        assert s.adjoint.path == "native, whole"
        found.append((counts, [t[:, :n] if t.dim() > 1 else t for t in values]))
    check(found[1], found[0], 1e-5)


def test_a_graph_serves_all_sizes(tape, solver):
    def g(x, z):  # graphs are kept with it
        return sine(x, z)

    rows = ragged()
    z = padded(rows).requires_grad_()
    options = OPTIONS | {"solver": solver, "per_sample": True}
    for sizes in (SIZES, [N] * B, [1] * B):
        accounts = []
        for driver in ("graph", "eager"):
            s = fixed_point(
                g, torch.zeros_like(z), z, **options, driver=driver, sizes=torch.tensor(sizes)
            )
            counts, values = account(s, z)
            accounts.append(counts + values)
            assert driver in s.path and driver in s.adjoint.path
        same(*accounts)
    assert captures() == 2


def test_sizes_and_limits_of_samples_together(backend):
    """And any dtype of integers, any memory."""
    rows, b = ragged(), torch.arange(B)
    rtol, atol, most = 1e-7 * (b + 1).double(), 1e-4 * (b % 3).double(), 25 + 9 * b
    z = padded(rows).requires_grad_()

    def solve(z, i=slice(None), **more):
        own = {"tolerance": Tolerance(rtol[i], atol[i]), "max_iterations": most[i]}
        own |= {"adjoint": ImplicitAdjoint(**own), "solver": Picard(), "backend": backend}
        return fixed_point(sine, torch.zeros_like(z), z, **own, on_failure="return", **more)

    samples = iter(b)
    expected = alone(rows, lambda z: solve(z, next(samples)[None]))
    assert set(expected[0][1].tolist()) == {Status.CONVERGED, Status.MAX_ITERATIONS}
    sizes = torch.tensor(SIZES, dtype=torch.uint8).repeat_interleave(2)[::2]
    check(account(solve(z, sizes=sizes), z), expected, 1e-14)


def test_the_rounding_level_is_that_of_the_valid_entries(backend):
    """A cycle of 40 roundings: STALLED among 100 entries, not of one."""
    unit = torch.finfo(torch.float32).eps / 2

    def g(x):
        y = torch.zeros_like(x)
        y[:, 0] = torch.where(x[:, 0] > 1, 1 - 20 * unit, 1 + 20 * unit)
        return y

    def status(n, **given):
        options = {"tolerance": Tolerance(1e-9, 0.0), "solver": Picard(), "backend": backend}
        s = fixed_point(g, torch.zeros(3, n), on_failure="return", **options, **given)
        return s.status.tolist(), s

    stuck, stalled = Status.MAX_ITERATIONS, Status.STALLED
    assert status(1)[0] == [stuck] * 3
    assert status(100)[0] == [stalled] * 3
    found, s = status(100, sizes=torch.tensor([1, 99, 2]))
    assert found == [stuck, stalled, stuck]
    y = torch.zeros(3, 100)
    y[:, 0] = 1
    met = coupling._met(y * (1 + 40 * unit), y, s.record, None)
    assert met.tolist() == [False, True, False]
    s.record.lipschitz = 0.0
    assert torch.allclose(s.error_bound, 16 * unit * torch.tensor([1.0, 99.0, 2.0]).sqrt())


def test_entries_of_a_tuple_count_together():
    rows = [torch.rand(4).double() + 0.1 for _ in range(2)]
    z = padded(rows)

    def pair(x, z):
        y = sine(torch.cat(x, 1), z)
        return y[:, :1], y[:, 1:]

    options = OPTIONS | {"solver": Picard()}
    bare = fixed_point(sine, torch.zeros(2, 4).double(), torch.stack(rows), **options)
    x0 = torch.zeros(2, 1).double(), torch.zeros(2, N - 1).double()
    s = fixed_point(pair, x0, z, sizes=torch.tensor([4, 4]), **options)
    assert torch.equal(s.iterations, bare.iterations)
    with pytest.raises(ValueError, match=f"sizes must be from 1 to {N}, .*got {N + 1}"):
        fixed_point(pair, x0, z, sizes=torch.tensor([4, N + 1]), **options)


def test_slices_of_vmap_share_them():
    z = torch.stack([padded(ragged()) * scale for scale in (1.0, 0.5)])
    options, kept = OPTIONS | {"solver": Picard(), "sizes": torch.tensor(SIZES)}, []

    def value(z):
        kept.append(fixed_point(sine, torch.zeros_like(z), z, **options))
        return kept[-1].x

    torch.vmap(value)(z)
    for i, each in enumerate(z):
        assert torch.equal(kept[0].iterations[i], value(each).new_tensor(0) + kept[-1].iterations)
    with pytest.raises(ValueError, match="sizes must not be mapped"):
        torch.vmap(lambda z, t: fixed_point(sine, z, z, sizes=t).x)(z, torch.ones(2, B).long())


def test_of_one_system_each_sample_is_judged_by_its_own(backend, solver):
    z, seen, sizes = padded(ragged()), [], torch.tensor(SIZES)

    def g(x, z):
        y = 0.6 * torch.sin(x) + 0.3 * (x.sum(0, keepdim=True) / B) * (z != 0) + z
        seen.append((x.clone(), y))
        return y

    options = OPTIONS | {"solver": solver, "backend": backend, "per_sample": False}
    s = fixed_point(g, torch.zeros_like(z), z, **options, sizes=sizes)
    limit = [1e-4 * sizes.sqrt() + 1e-6 * y.norm(dim=1) for _, y in seen]
    met = [((y - x).norm(dim=1) <= t).all() for (x, y), t in zip(seen, limit, strict=True)]
    assert met == [False] * (len(met) - 1) + [True]
    assert s.converged.all()


def test_a_layers_call_takes_them():
    """Of the layer's own options none is kept, in eval mode too; and compiled."""
    z, sizes = padded(ragged()), torch.tensor(SIZES)
    layer = FixedPointLayer(sine, eval_factor=2.0, **OPTIONS)
    for mode in (layer.train, layer.eval):
        mode()
        factor = 1 if layer.training else 2
        tolerance = Tolerance(BOTH.rtol / factor, BOTH.atol / factor)
        options = OPTIONS | {"tolerance": tolerance, "sizes": sizes}
        expected = fixed_point(sine, torch.zeros_like(z), z, **options)
        assert torch.equal(layer(z, sizes=sizes), expected.x)
        assert torch.equal(layer.last.iterations, expected.iterations)
    compiled = torch.compile(layer, backend="eager")
    assert torch.equal(compiled(z, sizes=sizes), expected.x)


X0 = torch.zeros(2, 3)
WRONG = [
    ([1, 2], TypeError, r"tensor \[B\] of whole numbers.*\(got list\); write sizes=torch.tensor"),
    (2, TypeError, r"sizes must be a tensor \[B\] .*\(got int\)"),
    (X0 == 0, TypeError, r"got a mask of torch.bool\).*write mask.flatten\(1\).sum\(1\)"),
    (torch.ones(2), TypeError, "sizes must be a tensor of whole numbers .got one of torch.float32"),
    (torch.ones(2, 1).long(), ValueError, r"sizes must have one value a sample, shape \[B\]"),
    (torch.tensor(3), ValueError, r"each of the 2 samples of x0, shape \[2\] \(got shape \[\]\)"),
    (torch.ones(3).long(), ValueError, r"each of the 2 samples of x0.*\(got shape \[3\]\)"),
    (torch.tensor([3, 0]), ValueError, r"from 1 to 3, the entries .*\(got 0 for sample 1\); count"),
    (torch.tensor([4, 3]), ValueError, r"sizes must be from 1 to 3.*\(got 4 for sample 0\)"),
    (torch.ones(2).long().to("meta"), ValueError, "sizes must be a dense tensor with values"),
]


@pytest.mark.parametrize(("sizes", "error", "message"), WRONG)
def test_wrong_sizes_are_refused(sizes, error, message):
    for call in (
        functools.partial(fixed_point, torch.sin, X0),
        functools.partial(FixedPointLayer(lambda x, z: z), X0),
    ):
        with pytest.raises(error, match=message):
            call(sizes=sizes)


def test_an_empty_batch_has_none():
    assert fixed_point(torch.sin, X0[:0], sizes=torch.ones(0).long()).x.shape == (0, 3)
