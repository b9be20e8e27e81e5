"""A signal during a whole solve: its handler runs at once, and what it raises ends the solve."""

import gc
import os
import signal
import threading
import time
import weakref

import pytest
import torch

from fpi_cuda import DenseStep, ImplicitAdjoint, Picard, Tolerance, fixed_point
from fpi_cuda.backends import native

SECONDS = 0.06  # until the signal
LATE = 1.0  # seconds; on a quiet machine a twentieth

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(),
    reason="Python runs handlers in its main thread alone",
)


class Rung(Exception):
    pass


class Alarm:
    """Rings once, SECONDS after it is entered; notes how late the exception came."""

    def __init__(self, handler):
        self.handler, self.rung, self.late = handler, 0.0, 0.0

    def ring(self, number, frame):
        self.rung = time.perf_counter()
        self.handler(number, frame)

    def __enter__(self):
        self.before = signal.signal(signal.SIGALRM, self.ring)
        self.begin = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        return self

    def __exit__(self, *error):
        self.late = time.perf_counter() - self.begin - SECONDS
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def raising(number, frame):
    raise Rung("the handler's own") from KeyError("its cause")


def turning():
    """A step that never converges, but that a sample of z = 0 begins at its fixed point."""
    g = DenseStep(32, None, activation="identity", bias=False)
    with torch.no_grad():
        g.state_weight.copy_(torch.linalg.qr(torch.randn(32, 32)).Q)
    return g, torch.zeros(16, 32), torch.randn(16, 32)


def solve(g, x0, z, iterations=4 * 10**6, backward=1):
    """Its forward takes about five seconds by default."""
    return fixed_point(
        g, x0, z, solver=Picard(), tolerance=Tolerance(0.0, 0.0), max_iterations=iterations,
        adjoint=ImplicitAdjoint(tolerance=Tolerance(0.0, 0.0), max_iterations=backward),
        on_failure="return",
    )  # fmt: skip


@pytest.fixture(name="threads", params=[1, 2])
def threads_fixture(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_a_handler_raises_ends_the_solve(direction, threads):
    g, x0, z = turning()
    right = solve(g, x0, z, 20)
    assert right.path == "native, whole"
    if direction == "forward":

        def call():
            return solve(g, x0, z)
    else:
        x = solve(g, x0, z.clone().requires_grad_(), 2, backward=4 * 10**6).x

        def call():
            return x.sum().backward()

    with pytest.raises(Rung, match="the handler's own") as caught, Alarm(raising) as alarm:
        call()
    assert alarm.late < LATE
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__context__ is None
    again = solve(g, x0, z, 20)
    assert torch.equal(again.x, right.x)


def test_control_c_is_a_keyboard_interrupt():
    g, x0, z = turning()
    kill = threading.Timer(SECONDS, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        kill.start()
        begin = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            solve(g, x0, z)
        assert time.perf_counter() - begin < SECONDS + LATE
    finally:
        kill.join()
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_returns_lets_the_solve_go_on():
    g, x0, z = turning()
    seen = []
    with Alarm(lambda *_: seen.append(solve(g, x0, z, 20).x)) as alarm:
        x = solve(g, x0, z, 800_000).x
        end = time.perf_counter()
    assert len(seen) == 1, "it ran, and solved another problem meanwhile"
    assert torch.equal(seen[0], solve(g, x0, z, 20).x)
    assert torch.equal(x, solve(g, x0, z, 800_000).x)
    assert SECONDS <= alarm.rung - alarm.begin < end - alarm.begin - 0.02, "not only at the end"


@pytest.mark.parametrize("slow", [0, 1])
def test_a_thread_that_has_ended_its_samples_asks_for_the_others(slow):
    """Of two threads with a sample each one is done at once: it may be the caller's."""
    g, x0, z = turning()
    x0, z = x0[:2], z[:2]
    z[1 - slow] = 0
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(Rung), Alarm(raising) as alarm:
            solve(g, x0, z, 2 * 10**7)
    finally:
        torch.set_num_threads(before)
    assert alarm.late < LATE


@pytest.mark.usefixtures("one_thread")
def test_another_threads_solve_goes_on():
    g, x0, z = turning()
    right = solve(g, x0, z, 20_000).x
    found = []
    other = threading.Thread(target=lambda: found.append(solve(g, x0, z, 20_000).x))
    with pytest.raises(Rung), Alarm(raising):
        other.start()
        solve(g, x0, z)
    other.join()
    assert torch.equal(found[0], right)


@pytest.mark.usefixtures("one_thread")
def test_nothing_is_left_of_a_solve_that_ended_so():
    g, x0, z = turning()
    gone = [weakref.ref(t) for t in (x0, z)]
    gc.collect()
    gc.disable()
    try:
        try:
            with Alarm(raising):
                solve(g, x0, z)
        except Rung as error:
            kept = weakref.ref(error)
        del x0, z
        assert [ref() for ref in (*gone, kept)] == [None] * 3
    finally:
        gc.enable()
    assert native._build.take_raised() is None


@pytest.mark.usefixtures("one_thread")
def test_a_long_product_ends_too():
    x = torch.ones(4096, 4096)
    with pytest.raises(Rung), Alarm(raising) as alarm:
        native.dense_map(x, x, None)  # three seconds
    assert alarm.late < LATE
