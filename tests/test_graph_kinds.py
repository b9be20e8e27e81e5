"""What a captured graph has built in is seen, whatever g keeps it in, or the graph is refused."""

import copy
import dataclasses
import enum
import functools
import gc
import types
import weakref
from collections import OrderedDict, deque, namedtuple

import pytest
import torch
from tape import captures, problem, tape_fixture  # noqa: F401
from torch import nn

import fpi_cuda
from fpi_cuda import FixedPointLayer, Picard, fixed_point
from fpi_cuda.drivers import graph, kind

pytestmark = pytest.mark.usefixtures("tape")

Pair = namedtuple("Pair", "a b")
SHIFT = 0.1
SETTINGS = types.ModuleType("settings_of_a_user")
SETTINGS.shift = 0.1


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Frozen:
    shift: object = 0.1


class Config:
    def __init__(self, shift=0.1):
        self.shift = shift


class Shifted(nn.Module):
    """x/2 + what `self.at` holds, found by the function `find`."""

    factor = 0.5

    def __init__(self, at=0.1, find=None):
        super().__init__()
        self.at = at
        self.find = find or float

    def forward(self, x, z):
        return self.half(x) + self.find(self.at) + self.bias + z

    def half(self, x):
        return self.factor * x

    def with_z(self):
        """The same as a map of x alone."""
        self.forward = lambda x: self.half(x) + self.find(self.at)
        return self

    @property
    def bias(self):
        return SHIFT - 0.1


def solve(g, **options):
    z = problem()
    return fixed_point(g, z * 0, z, driver="graph", per_sample=False, **options)


def follows(g, change):
    """Whether a solve by a graph after a change is what an eager one gives."""
    solve(g)
    change()
    after = solve(g)
    z = problem()
    expected = fixed_point(g, z * 0, z, driver="eager", per_sample=False)
    assert torch.equal(after.x, expected.x)
    return "graph" in after.path


CONTAINERS = {
    "list": ([0.1, [0.2]], lambda v: v[1][0], lambda v: v[1].__setitem__(0, 0.3)),
    "dict": ({"a": 0.1}, lambda v: v["a"], lambda v: v.update(a=0.3)),
    "ordered": (OrderedDict(a=0.1), lambda v: v["a"], lambda v: v.update(a=0.3)),
    "deque": (deque([0.1]), lambda v: v[0], lambda v: v.append(v.popleft() + 0.2)),
    "set": ({1, 2}, lambda v: len(v) / 10, lambda v: v.add(3)),
    "in a frozen dataclass": (Frozen([0.1]), lambda v: v.shift[0], lambda v: v.shift.append(0)),
    "in a named tuple": (Pair([0.1], 0), lambda v: v.a[0], lambda v: v.a.__setitem__(0, 0.3)),
    "in a partial": (
        functools.partial(max, [0.1]),
        lambda v: v(),
        lambda v: v.args[0].append(0.3),
    ),
    "in a module": (nn.Dropout(0.1), lambda v: v.p, lambda v: setattr(v, "p", 0.3)),
    "a number on the host": (torch.tensor(0.1), lambda v: v, lambda v: v.fill_(0.3)),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("place", ["attribute", "closure", "default", "global"])
def test_values_are_seen_wherever_they_are_kept(monkeypatch, name, place):
    value, find, change = CONTAINERS[name]
    value = copy.deepcopy(value)

    def of_the_closure(x, z):
        return 0.5 * x + find(value) + z

    def of_a_default(x, z, value=value):
        return 0.5 * x + find(value) + z

    monkeypatch.setitem(globals(), "KEPT", value)
    monkeypatch.setitem(globals(), "FIND", find)
    g = {
        "attribute": Shifted(value, find),
        "closure": of_the_closure,
        "default": of_a_default,
        "global": from_globals,
    }[place]
    assert follows(g, lambda: change(value))


def from_globals(x, z):
    return 0.5 * x + FIND(KEPT) + z  # noqa: F821 - put there by a test


def of_a_global(x, z):
    return 0.5 * x + SHIFT + z


def of_a_helper(x, z):
    return 0.5 * x + helper() + z


def helper():
    return SHIFT


def of_a_python_module(x, z):
    return 0.5 * x + SETTINGS.shift + z


def with_an_inner_function(x, z):
    def inner(y):
        return 0.5 * y + SHIFT

    return inner(x) + z


@functools.lru_cache
def cached():
    return 0.1


def of_a_cached_function(x, z):
    return 0.5 * x + cached() + z


@pytest.mark.parametrize(
    "g", [of_a_global, of_a_helper, with_an_inner_function, Shifted()], ids=str
)
def test_globals_are_seen_that_functions_name(monkeypatch, g):
    assert follows(g, lambda: monkeypatch.setitem(globals(), "SHIFT", 0.3))


def test_a_python_modules_values_are_seen(monkeypatch):
    assert follows(of_a_python_module, lambda: monkeypatch.setattr(SETTINGS, "shift", 0.3))


def test_a_classs_values_and_methods_are_seen(monkeypatch):
    g = Shifted()
    assert follows(g, lambda: monkeypatch.setattr(Shifted, "factor", 0.25))
    assert follows(g, lambda: monkeypatch.setattr(Shifted, "half", lambda self, x: 0.3 * x))
    assert follows(of_a_cached_function, lambda: None)


def test_hooks_are_looked_into():
    factor = [0.5]
    g = nn.Sequential(nn.Linear(3, 3).double())
    g[0].register_forward_hook(lambda m, a, out: factor[0] * out)
    step = Joined(g)
    assert follows(step, lambda: factor.__setitem__(0, 0.25))


class Joined(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, z):
        return 0.3 * self.net(x) + z


def refused(g, place):
    with pytest.warns(UserWarning, match="no CUDA graph for this solve") as caught:
        for _ in range(2):
            s = solve(g)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert place in message, message
    assert "eager (" in s.path
    assert captures() == 0


def config_in_a_closure():
    config = Config()
    return lambda x, z: 0.5 * x + config.shift + z


def config_in_a_list():
    return Shifted([Config()], lambda v: v[0].shift)


def config_behind_a_hook():
    config = Config()
    net = nn.Linear(3, 3).double()
    net.register_forward_pre_hook(lambda m, a: (a[0] * config.shift,))
    return Joined(net)


def generator_of_numbers():
    numbers = iter([0.1] * 1000)
    return lambda x, z: 0.5 * x + next(numbers) + z


def method_of_an_object():
    return Shifted(0.1, Holder(0.1).read)


class Holder:
    def __init__(self, value):
        self.value = value

    def read(self, _):
        return self.value


class Called:
    def __call__(self, x, z):
        return 0.5 * x + z


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: Shifted(Config(), lambda c: c.shift), "g.at is an object of class Config"),
        (lambda: Joined(Shifted(Config(), lambda c: c.shift).with_z()), "g.net.at is an object"),
        (lambda: Shifted(types.SimpleNamespace(a=0.1), lambda c: c.a), "class SimpleNamespace"),
        (config_in_a_closure, "config is an object of class Config"),
        (config_in_a_list, "g.at[0] is an object of class Config"),
        (config_behind_a_hook, "config is an object of class Config"),
        (generator_of_numbers, "numbers is an object of class list_iterator"),
        (method_of_an_object, "g.find's object is an object of class Holder"),
        (Called, "g is an object of class Called"),
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
        request = graph.Request(
            g=of_a_global, options=(), **tensors, solver=Picard(), limits=None, begin=None,
            backend=fpi_cuda.backends.native,
        )  # fmt: skip
        monkeypatch.setattr(graph._Cache, "everyone", weakref.WeakKeyDictionary())
        with pytest.warns(UserWarning, match=r"of shape \(\) that g takes .* move it to cpu"):
            assert "is on meta" in graph.solve(request)


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
            s = fixed_point(g, z * 0, z, params=params, driver="graph", per_sample=False)
            torch.testing.assert_close(s.x, z / (1 - value), rtol=1e-5, atol=1e-5)
            assert "eager" in s.path


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x, z):
        return self.factor * x + z


ORDINARY = {
    "layers": lambda: nn.Sequential(
        nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 3)
    ),
    "attention": lambda: nn.TransformerEncoderLayer(3, 1, 8, 0.0, batch_first=True),
    "recurrent": lambda: Last(nn.GRU(3, 3, batch_first=True)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
    "old weight norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
    "list": lambda: Each(nn.ModuleList(nn.Linear(3, 3) for _ in range(2))),
    "of this package": lambda: Pinned(fpi_cuda.DenseStep(3, 3)),
}


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


def test_a_layer_with_a_config_is_right_after_a_change():
    g = Shifted(Config(), lambda c: c.shift)
    layer = FixedPointLayer(g, driver="graph", per_sample=False)
    with pytest.warns(UserWarning, match="g.at is an object of class Config"):
        first = layer(problem())
    g.at.shift = 0.4
    assert torch.allclose(layer(problem()) - first, torch.full_like(first, 0.6), atol=1e-4)
    assert captures() == 0
