"""What a graph would not see change is refused; ordinary modules are not."""

import enum
import functools
import gc
import importlib
import logging
import random
import re
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from kinds import SHIFT, Config, Joined, Shifted, follows, of_a_global, solve
from tape import TapeRecorder, captures, problem, tape_fixture  # noqa: F401
from torch import nn
from torch.nn.utils import prune

import fpi_cuda
from fpi_cuda import FixedPointLayer, fixed_point
from fpi_cuda.drivers import graph, kind

pytestmark = pytest.mark.usefixtures("tape")


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


def refused(g, place):
    with pytest.warns(UserWarning, match="no CUDA graph for this solve") as caught:
        for _ in range(2):
            s = solve(g)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert place in message, message
    assert "eager (" in s.path
    assert captures() == 0


def generator_of_numbers():
    numbers = iter([0.1] * 1000)
    return lambda x, z: 0.5 * x + next(numbers) + z


def slots_in_a_closure(*more):
    class Slots:
        __slots__ = ("shift", *more)

    slots = Slots()
    slots.shift = 0.1
    return lambda x, z: 0.5 * x + slots.shift + z


def lock_of_an_object():
    config = Config(threading.Lock())
    net = nn.Linear(3, 3).double()
    net.register_forward_pre_hook(lambda m, a: (a[0] * (config.shift is not None),))
    return Joined(net)


def nested_too_deeply():
    deep = [0.1]
    for _ in range(5000):
        deep = [deep]
    return lambda x, z: 0.5 * x + len(deep) + z


def many_values():
    table = list(range(kind.MOST_VALUES))
    return lambda x, z: 0.5 * x + table[1] + z


class Silent:
    """Says nothing of itself."""

    def __repr__(self):
        raise ValueError("no")

    __hash__ = object.__hash__

    def __eq__(self, other):
        raise ValueError("no")


class Unhashable(type):
    __hash__ = None

    def __eq__(cls, other):
        return cls is other


class OfUnhashable(metaclass=Unhashable):
    shift = 0.1


def blindly(x, z):
    return 0.5 * x + globals()["SHIFT"] + z


def importing(x, z):
    return 0.5 * x + importlib.import_module("math").pi + z


def reading(x, z):
    with open(__file__) as file:
        return 0.5 * x + len(file.read(1)) + z


def compiled():
    @torch.compile
    def half(x):
        return 0.5 * x

    return lambda x, z: half(x) + z


def scripted():
    return Joined(torch.jit.script(nn.Linear(3, 3).double()))


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: Shifted(iter([0.1]), lambda c: 0.1), "g.at is an object of class list_iterator"),
        (lambda: Joined(Shifted(iter([0.1]), lambda c: 0.1).with_z()), "g.net.at is an object"),
        (lambda: Shifted([[iter("a")]], lambda v: 0.1), "g.at[0][0] is an object"),
        (lambda: Shifted({"a": Config(iter("a"))}, lambda v: 0.1), "g.at['a'].shift is an object"),
        (lambda: Shifted({Silent(): iter("a")}, lambda v: 0.1), "g.at[...] is an object"),
        (lambda: Shifted({Silent(), 1}, lambda v: 0.1), "g.at raised ValueError"),
        (lambda: Shifted({"a": 0.1}.values(), lambda v: 0.1), "an object of class dict_values"),
        (lambda: Shifted(OfUnhashable, lambda v: v.shift), "class with a hash of its own"),
        (slots_in_a_closure, "slots is an object of class Slots"),
        (lambda: slots_in_a_closure("__dict__"), "slots is an object of class Slots"),
        (lock_of_an_object, "config.shift is an object of class lock"),
        (generator_of_numbers, "numbers is an object of class list_iterator"),
        (nested_too_deeply, "is nested too deeply"),
        (many_values, f"more than {kind.MOST_VALUES} Python values"),
        (lambda: blindly, "blindly calls globals()"),
        (lambda: importing, "importing calls import_module()"),
        (lambda: reading, "reading calls open()"),
        (compiled, "half was made by torch.compile"),
        (scripted, "g.net was made by torch.jit"),
    ],
)
def test_objects_that_cant_be_looked_into_are_refused(make, place):
    refused(make(), place)


def test_arguments_elsewhere_are_refused(monkeypatch):
    """A tensor on the host becomes an argument of a kernel, with its value in the capture."""
    elsewhere = torch.zeros((), device="meta")
    for name in ("given", "own"):
        tensors = {"given": [problem()], "own": []}
        tensors[name].append(elsewhere)
        request = types.SimpleNamespace(
            map=types.SimpleNamespace(g=of_a_global), **tensors, backend=fpi_cuda.backends.native
        )
        monkeypatch.setattr(graph._Cache, "everyone", weakref.WeakKeyDictionary())
        with pytest.warns(UserWarning, match=r"of shape \(\) that g takes .* move it to cpu"):
            assert "is on meta" in graph.find(request)


@pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in fpi_cuda.backends.available()["native"],
    reason="needs a CUDA device and the native kernels for it",
)
@pytest.mark.parametrize("kept", ["params", "parameter"])
def test_cuda_numbers_on_the_host_may_change(kept):
    z = problem().cuda()
    factor = nn.Parameter(torch.tensor(0.5, dtype=z.dtype))
    g = Scaled(factor) if kept == "parameter" else lambda x, z, k: k * x + z
    params = () if kept == "parameter" else (factor,)
    with pytest.warns(UserWarning, match="is on cpu, where a graph would not see its value"):
        for value in (0.5, 0.25, 0.125):
            factor.data.fill_(value)
            s = fixed_point(g, z * 0, z, params=params, driver="graph", per_sample=True)
            torch.testing.assert_close(s.x, z / (1 - value), rtol=1e-5, atol=1e-5)
            assert "eager" in s.path


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x, z):
        return self.factor * x + z


class Recurrent(nn.GRU):
    pass


class Configured(nn.Module):
    def __init__(self, *configs):
        super().__init__()
        self.configs, self.log = configs, logging.getLogger("of a user")
        self.net, self.pattern = nn.Linear(3, 3), re.compile("ge.*")

    def forward(self, x):
        self.log.debug("called")
        return self.net(x) if self.pattern.match(self.configs[1].act) else x


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(3, 1), nn.Linear(1, 3)
        self.scaling = {"default": 2.0}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * self.scaling["default"]


MISSING = object()


class Applied(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x, more=MISSING):
        return self.f(x) if more is MISSING else more


class Decorated(nn.Module):
    @torch.no_grad()
    def scale(self):
        return 0.5

    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return self.scale() * x


class Last(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x[:, None])[0][:, 0]


class Each(Last):
    def forward(self, x):
        for net in self.net:
            x = net(x)
        return x


class Pinned(Last):
    def forward(self, x):
        return self.net(x, torch.zeros_like(x))


ORDINARY = {
    "layers": lambda: nn.Sequential(
        nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 3)
    ),
    "attention": lambda: nn.TransformerEncoderLayer(3, 1, 8, 0.0, batch_first=True),
    "recurrent": lambda: Last(nn.GRU(3, 3, batch_first=True)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
    "old weight norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
    "list": lambda: Each(nn.ModuleList(nn.Linear(3, 3) for _ in range(2))),
    "a subclass of a recurrent one": lambda: Last(Recurrent(3, 3, batch_first=True)),
    "with a config": lambda: Configured(Config(0.1), types.SimpleNamespace(act="gelu")),
    "low-rank": lambda: LowRank(nn.Linear(3, 3)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.3),
    "functions": lambda: nn.Sequential(
        Applied(torch.tanh),
        Applied(functools.partial(nn.functional.leaky_relu, negative_slope=0.1)),
    ),
    "decorated": Decorated,
    "of this package": lambda: Pinned(fpi_cuda.DenseStep(3, 3)),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_modules_are_seen_through(name):
    g = Joined(ORDINARY[name]().double().eval())
    key = kind.python_values(g)
    assert hash(key) == hash(kind.python_values(g))
    assert key == kind.python_values(g)
    assert key != kind.python_values(g.train())


def test_functions_of_torch_are_taken_as_they_are():
    def g(x, z):
        return torch.nn.functional.gelu(torch.special.expit(x)) + torch.ops.aten.relu(z)

    softly = nn.functional.softplus
    pool = nn.functional.max_pool2d  # dispatches by closures of its own
    at = torch.ops.aten.relu.default

    def h(x, z):
        return softly(x) + at(z) + pool(x)

    for f in (g, h, torch.vmap(g), functools.partial(g, z=1.0), torch.tanh):
        assert kind.python_values(f) == kind.python_values(f)


def test_equal_numbers_of_other_kinds_are_told_apart():
    def kinds(*values):
        return len({kind.python_values(Shifted(v)) for v in values})

    assert kinds(1, 1.0, True, "1") == 4
    assert kinds(0.0, -0.0) == 2
    assert kinds(float("nan"), float("nan")) == 1
    assert kinds(Colour.RED, Colour.BLUE) == 2
    assert kinds([1], (1,), {1}, {1: 1}) == 4
    assert kinds(torch.float32, torch.float64) == 2


def test_a_key_keeps_nothing_of_g():
    g = Shifted([0.1, Shifted()], lambda v: v[0])
    key = kind.python_values(g)
    gone = weakref.ref(g), weakref.ref(g.at[1])
    del g
    gc.collect()
    assert [ref() for ref in gone] == [None, None], key


@pytest.mark.parametrize("base", [nn.Module, object])
def test_a_class_may_close_over_what_is_made_of_it(base):
    def make():
        class Own(base):
            def __call__(self, x, z):
                return 0.5 * x + 0 * len(str(own)) + z

        own = Own()
        assert ", graph" in solve(own).path
        return weakref.ref(own)

    gone = make()
    gc.collect()
    assert gone() is None
    assert not [made() for made in TapeRecorder.made if made() is not None]


def test_a_layer_with_a_config_is_right_after_a_change():
    g = Shifted(Config(), lambda c: c.shift)
    layer = FixedPointLayer(g, driver="graph", per_sample=True)
    first = layer(problem())
    g.at.shift = 0.4
    assert torch.allclose(layer(problem()) - first, torch.full_like(first, 0.6), atol=1e-4)
    assert captures() == 2


def test_what_g_keeps_from_its_first_call_is_part_of_its_kind():
    kept = {}

    def g(x, z):
        if "shift" not in kept:
            kept["shift"] = SHIFT
        return 0.5 * x + kept["shift"] + z

    assert follows(g, lambda: None)
    assert captures() == 1
    assert follows(g, kept.clear)


def test_a_tensor_that_g_keeps_from_its_first_call_is_refused():
    """The graph would go on with the memory that it had."""
    kept = {}

    def g(x, z):
        if "shift" not in kept:
            kept["shift"] = torch.full((3,), 0.1, dtype=x.dtype)
        return 0.5 * x + kept["shift"] + z

    with pytest.warns(UserWarning, match=r"g captures a tensor of shape \(3,\)"):
        assert not follows(g, kept.clear)


def test_values_that_g_changes_are_refused():
    calls = [0]

    def g(x, z):
        calls[0] += 1
        return 0.5 * x + z

    with pytest.warns(UserWarning, match="g changes Python values") as caught:
        for _ in range(6):
            assert "g changes Python values" in solve(g).path
    assert len(caught) == 1
    assert captures() == 3  # each costs some calls of g


def drawn_by_python(x, z):
    return 0.5 * x + (0.1 if random.random() < 2 else 0.2) + z


def drawn_by_numpy(x, z):
    return 0.5 * x + (0.1 if np.random.rand() < 2 else 0.2) + z


@pytest.mark.parametrize("g", [drawn_by_python, drawn_by_numpy], ids=["python", "numpy"])
def test_random_numbers_of_the_host_are_refused(g):
    with pytest.warns(UserWarning, match="random numbers were drawn on the host"):
        assert "eager" in solve(g).path
