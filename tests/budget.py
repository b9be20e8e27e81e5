"""What a run of the tests costs in the processor's seconds, and a bound on it.

Wall time says how busy the machine is. Processor time is that of all threads, and of all processes
that a test started and waited for; so it is the same, nearly, when other programs run.
"""

import collections
import os

import pytest


def spent():
    """Processor seconds of this process and of those that it has waited for, user and system."""
    return sum(os.times()[:4])


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


def pytest_collection_finish():
    _costs[""] = _passed()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    report.processor_seconds = _passed()  # a report of pytest-xdist brings it to the first process
    return report


def pytest_runtest_logreport(report):
    _costs[report.nodeid] += getattr(report, "processor_seconds", 0.0)


def _over(config):
    limit = config.getoption("--processor-budget")
    return limit is not None and _costs.total() > limit


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
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
    bound = "" if limit is None else f" of {limit:.0f} s"
    write = terminalreporter.write_line
    write(f"processor time: {folders.total():.0f} s{bound} ({figures})")
    if _over(config):
        dear = (f"{test or 'collection'} {s:.1f} s" for test, s in _costs.most_common(10))
        write(f"OVER ITS BUDGET of processor time; most went to {', '.join(dear)}", red=True)
