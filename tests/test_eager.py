"""The eager driver reads late: slots that arrive late on purpose."""

import types
import warnings

import pytest
import torch
from helpers import contraction, row_tanh
from helpers_drivers import Tardy, solved, uneven

from fpi_cuda import Picard, Tolerance, fixed_point
from fpi_cuda.drivers import eager


@pytest.fixture
def tardy(monkeypatch):
    def install(lag, polls):
        def reader(x, max_iterations):
            return eager.LateRead([Tardy(polls) for _ in range(lag + 1)], len(x), max_iterations)

        monkeypatch.setattr(eager, "reader", reader)

    return install


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("polls", [0, 1, 3, 50])
@pytest.mark.parametrize("lag", [1, 2, 5])
def test_a_late_read_changes_no_bit(tardy, solver, lag, polls, per_sample):
    g, x0, z = uneven()
    options = {"solver": solver, "per_sample": per_sample, "tolerance": Tolerance(1e-9)}
    at_once, gradient = solved(g, x0, z, **options)
    tardy(lag, polls)
    late, late_gradient = solved(g, x0, z, **options)
    assert torch.equal(late.x, at_once.x)
    assert torch.equal(late.status, at_once.status)
    assert torch.equal(late.iterations, at_once.iterations)
    assert torch.equal(late.residual_norm, at_once.residual_norm)
    torch.testing.assert_close(late_gradient, gradient, rtol=1e-12, atol=1e-14)
    assert at_once.evaluations <= late.evaluations <= at_once.evaluations + lag
    assert ("compacted" in late.path) == ("compacted" in at_once.path) == per_sample


def test_a_late_read_calls_g_no_more_than_max_iterations(tardy, solver):
    tardy(3, 50)
    g, x0, z = uneven()
    s = fixed_point(g, x0, z, solver=solver, tolerance=Tolerance(0, 0), max_iterations=7)
    assert s.evaluations == 7
    assert (s.iterations == 7).all()


def test_a_late_read_knows_of_failures(tardy):
    tardy(2, 50)
    z = torch.ones(4, 3)
    with pytest.warns(UserWarning, match="4 of 4 samples MAX_ITERATIONS"):
        fixed_point(lambda x, z: 0.99 * x + z, z * 0, z, solver=Picard(), max_iterations=5)


@pytest.mark.parametrize("polls", [0, 1, 2, 50])
def test_late_read_returns_the_newest_arrival_and_waits_for_the_last(polls):
    read = eager.LateRead([Tardy(polls) for _ in range(3)], 9, 5)
    tallies = [torch.tensor([9 - k, k, k]) for k in range(1, 6)]
    seen = [read(t) for t in tallies]
    assert seen[0][:2] == ((8, 1) if polls == 0 else (9, 0))  # what has arrived by then
    assert max(k + 1 - failed for k, (_, failed, _) in enumerate(seen)) <= 2
    assert seen[-1][:2] == (4, 5)  # nothing can follow
    assert [rest for *_, rest in seen] == [9, 9, 8, 7, 6]  # two steps ago, whatever has arrived


@pytest.mark.parametrize("lag", [1, 2])
def test_late_read_waits_for_no_step_that_is_not_more_than_its_lag_behind(lag):
    """A step earlier, and the device would be idle while the host goes on."""
    waits = []

    class Awaited(Tardy):
        def wait(self):
            waits.append(self.copy[2])
            super().wait()

    read = eager.LateRead([Awaited(50) for _ in range(lag + 1)], 9, 5)
    for k in range(1, 5):
        read(torch.tensor([9, 0, k]))
        assert waits == list(range(1, k - lag + 1))
    read(torch.tensor([9, 0, 5]))
    assert waits == [1, 2, 3, 4, 5]  # nothing can follow


def test_a_device_is_never_more_than_two_steps_ahead(monkeypatch):
    """What has not arrived by then is waited for; each step more may be an evaluation too many."""
    monkeypatch.setattr(eager, "refuse_capture", lambda: None)
    monkeypatch.setattr(eager, "PinnedSlot", lambda: Tardy(50))
    on_device = types.SimpleNamespace(device=torch.device("cuda"), shape=(9, 2))
    read = eager.reader(on_device, 99)
    seen = [read(torch.tensor([9 - k, 0, k])) for k in range(1, 6)]
    assert seen == [(9, 0, 9), (9, 0, 9), (8, 0, 8), (7, 0, 7), (6, 0, 6)]


class Sizes:
    """A row-wise g that notes the size of each batch it is given."""

    def __init__(self, w):
        self.w, self.seen = w, []

    def __call__(self, x, z):
        self.seen.append(len(x))
        return row_tanh(x, z, self.w)


def test_when_samples_are_left_out_does_not_depend_on_timing(tardy, solver):
    """A library's product has other bits in a smaller batch: arrivals must not choose it."""
    _, x0, z = uneven(b=64)
    runs = []
    for polls in (0, 1, 2, 50):
        tardy(2, polls)
        g = Sizes(contraction(4, 0.97, seed=1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            s = fixed_point(g, x0, z, solver=solver, per_sample=True, tolerance=Tolerance(1e-9))
        runs.append(g.seen[: int(s.iterations.max())])  # later ones are on finished samples
    assert len(set(runs[0])) > 2
    assert all(run == runs[0] for run in runs)


def test_first_rows_puts_the_active_first():
    x = torch.zeros(5, 2)
    from fpi_cuda.record import STATUS, Limits, Progress

    progress = Progress(x, Limits(0, 0, 0, 1, 1))
    progress.counters[:, STATUS] = torch.tensor([1, 0, 2, 0, 1])
    assert progress.first_rows(2).tolist() == [1, 3]
    assert progress.first_rows(4).tolist() == [1, 3, 0, 2]
    progress.narrow(torch.tensor([0, 1, 3]))
    assert progress.first_rows(2).tolist() == [1, 2]
