"""Fixtures: backend, solver and dtype, seeds, and memory that holds NaN until it is written."""

import os
import sys

# Before torch loads OpenMP: threads that wait sleep. By default they spin, which on busy cores
# costs many times the work, in the processor's time and in wall time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import budget
import hypothesis
import pytest
import torch
from helpers import DTYPES, SOLVERS
from products import perturbed

from fpi_cuda import backends
from fpi_cuda.backends import scratch
from fpi_cuda.drivers import graph
from fpi_cuda.solve import independence

# "soak" is what `make soak` asks for. No database and no random seed: a run is repeatable.
hypothesis.settings.register_profile(
    "default", max_examples=10, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("soak", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser, pluginmanager):
    pluginmanager.register(budget)
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        metavar="NAME[:DEVICE]",
        help="fail, instead of skipping its tests, where this build lacks the backend",
    )
    parser.addoption(
        "--plain-products",
        action="store_true",
        help="leave torch's products and convolutions as they are (tests/products.py)",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "no_poison: torch's own functions must stay what they are")
    config.addinivalue_line("markers", "plain_products: library products are not perturbed")
    for wanted in config.getoption("--require-backend"):
        name, _, device = wanted.partition(":")
        devices = backends.available().get(name, ())
        if not devices or (device and device not in devices and "any" not in devices):
            raise pytest.UsageError(
                f"--require-backend {wanted}: this build has {backends.available()}"
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """One of several processes whose CUDA context is lost ends: xdist starts another one.

    Else every test that it would still run fails, whatever it tests.
    """
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print(f"{item.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)
            os._exit(1)
    return report


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if "cpu" not in backends.available().get(request.param, ()) and request.param != "reference":
        pytest.skip(f"this build has no {request.param} kernels for the CPU")
    return request.param


@pytest.fixture(params=list(SOLVERS))
def solver(request):
    return SOLVERS[request.param]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def programs_take_the_cpu(monkeypatch):
    """On a machine with a GPU too: what a test runs of the benchmarks is about the CPU."""
    if "benchmarks.devices" in sys.modules:
        monkeypatch.setattr("benchmarks.devices.DEFAULT", "cpu")


@pytest.fixture(autouse=True)
def strict_captures(monkeypatch):
    """A fault of the package's own while it captures a graph is no reason to run eagerly."""
    monkeypatch.setattr(graph, "STRICT", True)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """No test learns from another one's solves whether samples depend on each other."""
    for memory in ("_known", "_kinds"):
        monkeypatch.setattr(independence, memory, {})


@pytest.fixture
def whole_batch(monkeypatch):
    """per_sample=True leaves no finished sample out: the bits of a product don't change then."""
    never = independence.Samples(compactable=False, certain=True)
    monkeypatch.setattr(independence, "INDEPENDENT", never)


@pytest.fixture
def one_thread():
    """Small tensors gain nothing from threads, and on busy cores wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler():
    """torch.compile has seen nothing yet."""
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def products(request):
    """A library product's last bit depends on the row's place: no test may rely on it."""
    plain = request.config.getoption("--plain-products")
    if plain or request.node.get_closest_marker("plain_products"):
        yield
    else:
        with perturbed():
            yield


def _poison(t):
    if t.is_floating_point():
        t.fill_(float("nan"))
    elif t.dtype != torch.bool:
        t.fill_(torch.iinfo(t.dtype).max)
    return t


def _poisoned(function):
    def empty(*args, **kwargs):
        t = function(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(t) if caller.startswith("fpi_cuda") else t

    return empty


@pytest.fixture(autouse=True)
def poison(request, monkeypatch):
    """Uninitialised memory that the library takes holds NaN, so that reading it shows."""
    if request.node.get_closest_marker("no_poison"):
        return
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
    taken = scratch.Scratch.empty
    monkeypatch.setattr(scratch.Scratch, "empty", lambda *a: _poison(taken(*a)))
