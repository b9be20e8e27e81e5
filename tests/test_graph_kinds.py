"""What a captured graph has built in is seen, whatever g keeps it in, or the graph is refused."""

import copy
import dataclasses
import enum
import functools
import gc
import importlib
import logging
import os
import random
import re
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
from tape import TapeRecorder, captures, problem, tape_fixture  # noqa: F401
from torch import nn
from torch.nn.utils import prune

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
    return ", graph" in after.path


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


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
        (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        (torch.backends, "fp32_precision", "tf32"),
        (torch.backends.cudnn, "deterministic", True),
    ],
)
def test_switches_of_torch_are_seen(place, name, value):
    before, old = kind.precision(), getattr(place, name)
    try:
        setattr(place, name, value)
        assert kind.precision() != before
    finally:
        setattr(place, name, old)


def test_the_choice_of_attention_is_seen():
    before = kind.precision()
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        assert kind.precision() != before


def test_hooks_of_all_modules_are_seen():
    g, handles = Joined(nn.Linear(3, 3).double()), []

    def add():
        hook = torch.nn.modules.module.register_module_forward_hook
        handles.append(hook(lambda m, a, out: 0.5 * out if type(m) is nn.Linear else None))

    try:
        assert follows(g, add)
    finally:
        handles[0].remove()
    assert captures() == 2


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


# Where g finds what it reads by other ways than an attribute of its own: g, and a change.
WAYS = []


def way(make):
    WAYS.append(make)
    return make


class Child(nn.Module):
    factor = 0.5

    def forward(self, x):
        return x


def times(m, x):
    return m.factor * x


def module(forward, **members):
    """An instance of a class of its own."""
    return type("Made", (nn.Module,), {"forward": forward, **members})()


@way
def a_classs_value_by_a_function():
    g = module(lambda self, x, z: times(self, x) + z, factor=0.5)
    return g, lambda: setattr(type(g), "factor", 0.25)


@way
def a_classs_value_of_a_child():
    class Own(Child):
        pass

    g = Shifted(0.1)
    g.child = Own()
    g.find = lambda at: g.child.factor
    return g, lambda: setattr(Own, "factor", 0.25)


@way
def a_classs_value_by_a_bound_method():
    g = module(lambda self, x, z: self.factor * x + z, factor=0.5)
    return g.forward, lambda: setattr(type(g), "factor", 0.25)


@way
def a_classs_value_by_a_string():
    g = module(lambda self, x, z: getattr(self, "factor") * x + z, factor=0.5)  # noqa: B009
    return g, lambda: setattr(type(g), "factor", 0.25)


@way
def a_method_that_another_value_names():
    g = module(
        lambda self, x, z: getattr(self, self.mode)(x) + z,
        mode="half",
        half=lambda self, x: 0.5 * x + SETTINGS.shift,
    )
    return g, lambda: setattr(SETTINGS, "shift", 0.3)


@way
def a_method_of_a_base_class():
    class Base(nn.Module):
        def half(self, x):
            return 0.5 * x + SETTINGS.shift

    class Derived(Base):
        def half(self, x):
            return super().half(x)

        def forward(self, x, z):
            return self.half(x) + z

    return Derived(), lambda: setattr(SETTINGS, "shift", 0.3)


@way
def an_attribute_that_is_made_up():
    class Own(nn.Module):
        def __getattr__(self, name):
            return SETTINGS.shift if name == "made_up" else super().__getattr__(name)

        def __getitem__(self, i):
            return SETTINGS.shift

        def forward(self, x, z):
            return 0.5 * x + self.made_up + self[0] + z

    return Own(), lambda: setattr(SETTINGS, "shift", 0.3)


@way
def a_property_of_a_metaclass():
    class Meta(type):
        @property
        def shift(cls):
            return SETTINGS.shift

    class Own(metaclass=Meta):
        pass

    return lambda x, z: 0.5 * x + Own.shift + z, lambda: setattr(SETTINGS, "shift", 0.3)


@way
def a_descriptor():
    class Descriptor:
        def __get__(self, *_):
            return SETTINGS.shift

    g = module(lambda self, x, z: 0.5 * x + self.shift + z, shift=Descriptor())
    return g, lambda: setattr(SETTINGS, "shift", 0.3)


@way
def a_cached_property():
    cached = functools.cached_property(lambda self: SETTINGS.shift)
    cached.__set_name__(None, "shift")
    g = module(lambda self, x, z: 0.5 * x + self.shift + z, shift=cached)
    return g, lambda: setattr(SETTINGS, "shift", 0.3)


@way
def a_cached_function_that_is_cleared():
    cached = functools.lru_cache(lambda: SETTINGS.shift)

    def g(x, z):
        return 0.5 * x + cached() + z

    def change():
        SETTINGS.shift = 0.3
        solve(g)
        cached.cache_clear()

    return g, change


@way
def an_attribute_of_a_function():
    def g(x, z):
        return g.factor * x + z

    g.factor = 0.5
    return g, lambda: setattr(g, "factor", 0.25)


@way
def a_property_of_a_frozen_dataclass():
    class Own(Frozen):
        @property
        def more(self):
            return SETTINGS.shift

    own = Own()
    return lambda x, z: 0.5 * x + own.more + z, lambda: setattr(SETTINGS, "shift", 0.3)


@way
def a_property_of_a_named_tuple():
    class Own(Pair):
        @property
        def more(self):
            return SETTINGS.shift

    own = Own(0.1, 0)
    return lambda x, z: 0.5 * x + own.a + own.more + z, lambda: setattr(SETTINGS, "shift", 0.3)


@way
def a_pattern_of_attributes():
    class Own(Config):
        extra = 0.1

    own = Own()

    def g(x, z):
        match own:
            case Own(extra=shift):
                return 0.5 * x + shift + z

    return g, lambda: setattr(Own, "extra", 0.3)


def own_attribute(value):
    value.shift = 0.1
    return lambda x, z: 0.5 * x + value.shift + z, lambda: setattr(value, "shift", 0.3)


@way
def an_attribute_of_a_dict():
    return own_attribute(type("Own", (dict,), {})(a=1))


@way
def an_attribute_of_a_number():
    return own_attribute(type("Own", (int,), {})(1))


@way
def an_attribute_of_an_object():
    return own_attribute(Config())


@way
def an_attribute_of_a_namespace():
    return own_attribute(types.SimpleNamespace())


@way
def a_method_of_an_object():
    config = Config()
    return Shifted(0.1, types.MethodType(lambda self, at: self.shift, config)), lambda: setattr(
        config, "shift", 0.3
    )


@way
def the_default_of_a_dict():
    table = defaultdict(lambda: SETTINGS.shift)
    return lambda x, z: 0.5 * x + table.default_factory() + z, lambda: setattr(
        SETTINGS, "shift", 0.3
    )


@way
def the_list_in_an_enum():
    class Own(enum.Enum):
        A = [0.1]  # noqa: RUF012

    return lambda x, z: 0.5 * x + Own.A.value[0] + z, lambda: Own.A.value.append(
        Own.A.value.pop() * 3
    )


@way
def a_private_attribute_of_a_layer():
    g = Joined(nn.Linear(3, 3).double())
    g.net._scale = 0.5
    g.net.forward = lambda x: g.net._scale * x
    return g, lambda: setattr(g.net, "_scale", 0.25)


@way
def a_private_list_of_a_parametrised_module():
    class Own(nn.Linear):
        def forward(self, x):
            return self._scale[0] * super().forward(x)

    own = Own(3, 3).double()
    own._scale = [0.5]
    nn.utils.parametrizations.weight_norm(own)
    return Joined(own), lambda: own._scale.__setitem__(0, 0.25)


@way
def a_list_on_the_host():
    pair = torch.tensor([0.5, 0.1])

    def g(x, z):
        factor, shift = pair.tolist()
        return factor * x + shift + z

    return g, lambda: pair.mul_(0.5)


@way
def the_environment(name="SHIFT_OF_A_TEST"):
    os.environ[name] = "0.1"
    return lambda x, z: 0.5 * x + float(os.environ[name]) + z, lambda: os.environ.update(
        {name: "0.3"}
    )


def two_tensors(register):
    """One of them None: which one decides."""
    g = module(lambda self, x, z: 0.5 * x + z + (0 if self.a is None else 1))
    register(g, "a", torch.zeros(3).double())
    register(g, "b", None)
    return g, lambda: [g.__setattr__(*to) for to in (("b", g.a), ("a", None))]


@way
def which_buffer_there_is():
    return two_tensors(nn.Module.register_buffer)


@way
def which_parameter_there_is():
    return two_tensors(
        lambda g, n, t: g.register_parameter(n, None if t is None else nn.Parameter(t))
    )


@way
def which_parameter_is_shared():
    g = module(lambda self, x, z: 0.5 * x + self.a + 2 * self.b + 4 * self.c + z)
    g.a, g.b = (nn.Parameter(torch.full((3,), v).double()) for v in (0.1, 0.2))
    g.c = g.a
    return g, lambda: setattr(g, "c", g.b)


@way
def which_child_is_shared():
    g = module(lambda self, x, z: 0.2 * (self.a(x) + self.c(x)) + 0.1 * self.b(x) + z)
    g.a, g.b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    g.c = g.a
    return g, lambda: setattr(g, "c", g.b)


@way
def a_module_called_like_one_of_pythons():
    found = types.ModuleType("sched")
    found.__file__ = __file__
    found.shift = 0.1
    sys.modules["sched"] = found
    kind._of_library.cache_clear()
    return lambda x, z: 0.5 * x + found.shift + z, lambda: setattr(found, "shift", 0.3)


@way
def a_relative_import():
    package, inner = (types.ModuleType(name) for name in ("package_of_a_test", "inner"))
    package.__package__, package.__path__, inner.shift = "package_of_a_test", [], 0.1
    sys.modules.update({"package_of_a_test": package, "package_of_a_test.inner": inner})
    text = "def g(x, z):\n    from .inner import shift\n    return 0.5 * x + shift + z"
    exec(text, vars(package))
    return package.g, lambda: setattr(inner, "shift", 0.3)


@pytest.mark.parametrize("make", WAYS, ids=lambda make: make.__name__)
def test_values_are_seen_whatever_way_leads_to_them(monkeypatch, make):
    monkeypatch.setattr(SETTINGS, "shift", 0.1)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    monkeypatch.setenv("SHIFT_OF_A_TEST", "")
    try:
        assert follows(*make())
        assert captures() > 1
    finally:
        kind._of_library.cache_clear()  # the names of Python modules


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
    layer = FixedPointLayer(g, driver="graph", per_sample=False)
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
