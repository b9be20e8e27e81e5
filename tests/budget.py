"""What a run of the tests costs in the processor's seconds, and a bound on it.

Wall time says how busy the machine is. Processor time is that of all threads, and of all processes
that a test started and waited for; so it is the same, nearly, when other programs run.

Processors differ too: limits are for one that makes the step of `_yardstick` in REFERENCE seconds,
and a run on a slower one may cost as many times more.
"""

import collections
import os
import statistics
import time

import pytest


def spent():
    """Processor seconds of this process and of those that it has waited for, user and system."""
    return sum(os.times()[:4])


REFERENCE = 143e-6  # docs/compile.md: no layer, 4 x 4, train, eager


def _yardstick():
    """Processor seconds of a training step of the small model of `benchmarks.compiled`."""
    import torch

    from benchmarks.compiled import LAYERS, Model, train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.random.get_rng_state()
    model, t, taken = Model(4, LAYERS["no layer"](4)), torch.randn(4, 4), []
    for _ in range(50):
        start = time.process_time()
        for _ in range(8):
            train(model, t, model)
        taken.append((time.process_time() - start) / 8)
    torch.random.set_rng_state(generator)
    torch.set_num_threads(threads)
    return statistics.median(taken)


def allowed(limit, step):
    """What a run may cost where the yardstick takes so many seconds."""
    return limit * max(1.0, step / REFERENCE)


_steps = []  # what it took at the run's begin and end: a machine's speed may change between
_before = 0.0  # what all up to the last report had cost
_costs = collections.Counter()  # seconds by test; under "" those before the first


def pytest_addoption(parser):
    parser.addoption(
        "--processor-budget",
        type=float,
        metavar="SECONDS",
        help="fail a run that costs more processor time, and name its most costly tests",
    )


def _passed():
    global _before
    now = spent()
    cost, _before = now - _before, now
    return cost


def pytest_collection_finish(session):
    _costs[""] = _passed()
    _look(session.config)


def _look(config):
    global _before  # noqa: PLW0603
    if config.getoption("--processor-budget") is not None:
        _steps.append(_yardstick())
        _before = spent()  # which is no test's


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    report.processor_seconds = _passed()  # a report of pytest-xdist brings it to the first process
    return report


def pytest_runtest_logreport(report):
    _costs[report.nodeid] += getattr(report, "processor_seconds", 0.0)


def _over(config):
    limit = config.getoption("--processor-budget")
    return limit is not None and _costs.total() > allowed(limit, max(_steps, default=0.0))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    _look(session.config)
    if _over(session.config) and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    """The folders' figures beside the limit, and what costs most where it is passed."""
    folders = collections.Counter()
    for test, seconds in _costs.items():
        folders[test.partition("::")[0].rpartition("/")[0] if test else "collection"] += seconds
    if folders.total() < 10 and not _over(config):
        return
    figures = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in sorted(folders.items()))
    limit = config.getoption("--processor-budget")
    bound = ""
    if limit is not None:
        slower = allowed(1.0, max(_steps, default=0.0))
        bound = f" of {limit * slower:.0f} s"
        if slower > 1:
            bound += f", which are {limit:.0f} s of a processor {slower:.2f} times as fast"
    write = terminalreporter.write_line
    write(f"processor time: {folders.total():.0f} s{bound} ({figures})")
    if _over(config):
        dear = (f"{test or 'collection'} {s:.1f} s" for test, s in _costs.most_common(10))
        write(f"OVER ITS BUDGET of processor time; most went to {', '.join(dear)}", red=True)
