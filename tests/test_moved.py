"""What older versions called by other paths is found: modules, attributes, classes in pickles."""

import pickle
import subprocess
import sys
import warnings

import pytest
import torch

import fpi_cuda
from fpi_cuda import ConvStep, DenseEnergy, DenseStep, FixedPointLayer, GradientStep, NeuralStep
from fpi_cuda._moved import MOVED
from fpi_cuda.contraction import Certified, spectral_normalize

# Where classes that users pickle stood, by where they stand.
BEFORE = {
    "fpi_cuda.contraction.certificate": "fpi_cuda.contraction",
    "fpi_cuda.contraction.held": "fpi_cuda.contraction",
    "fpi_cuda.steps.conv": "fpi_cuda.conv",
    "fpi_cuda.steps.dense": "fpi_cuda.dense",
    "fpi_cuda.steps.paper": "fpi_cuda.steps",
}


@pytest.fixture
def unseen(monkeypatch):
    """As in a process that has not met the old paths yet."""
    for old in MOVED:
        monkeypatch.delitem(sys.modules, old, raising=False)
        package, _, name = old.rpartition(".")
        monkeypatch.delattr(sys.modules[package], name, raising=False)


def parametrization(**options):
    step = spectral_normalize(DenseStep(4, 2), 0.5, **options)
    return step.parametrizations.state_weight[0]


THINGS = {
    "dense": lambda: DenseStep(4, 2),
    "conv": lambda: ConvStep(2, 1),
    "neural": lambda: NeuralStep(DenseStep(4, 2)),
    "descent": lambda: GradientStep(DenseEnergy(4, 2, hidden=3), 0.1),
    "layer": lambda: FixedPointLayer(NeuralStep(ConvStep(2, 1))),
    "certified": lambda: Certified(DenseStep(4, 2)),
    "estimated": parametrization,
    "held": lambda: parametrization(certified=True),
}


@pytest.mark.parametrize("name", THINGS)
def test_an_older_pickle_loads(name, unseen):
    thing = THINGS[name]()
    before = now = pickle.dumps(thing, protocol=0)
    for new, old in BEFORE.items():
        before = before.replace(b"c%b\n" % new.encode(), b"c%b\n" % old.encode())
    assert before != now
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loaded = pickle.loads(before)
    assert type(loaded) is type(thing)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in thing.modules()]
    for a, b in zip(loaded.state_dict().values(), thing.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("old", [old for old in MOVED if old.count(".") == 1])
def test_a_moved_module_is_an_attribute_too(old, unseen):
    with pytest.warns(DeprecationWarning, match=f"{old} is {MOVED[old]} now"):
        module = getattr(fpi_cuda, old.partition(".")[2])
    assert module is sys.modules[MOVED[old]]


def test_no_other_attribute_is_made_up():
    with pytest.raises(AttributeError, match="'fpi_cuda' has no attribute 'sparse'"):
        _ = fpi_cuda.sparse


def test_the_warning_is_at_the_line_that_asks(tmp_path):
    asking = tmp_path / "asking.py"
    asking.write_text(
        "import fpi_cuda\nfrom fpi_cuda import dense\nimport fpi_cuda.conv\n"
        "fpi_cuda.backends.progress\n"
    )
    code = ["-W", "always::DeprecationWarning", str(asking)]
    run = subprocess.run([sys.executable, *code], check=True, capture_output=True, text=True)
    for line in (2, 3, 4):
        assert f"{asking}:{line}: DeprecationWarning" in run.stderr
