"""Values are seen whatever way leads from g to them."""

import enum
import functools
import os
import sys
import types
from collections import defaultdict

import pytest
import torch
from kinds import SETTINGS, Config, Frozen, Joined, Pair, Shifted, follows, solve
from tape import captures, tape_fixture  # noqa: F401
from torch import nn

from fpi_cuda.drivers import kind

pytestmark = pytest.mark.usefixtures("tape")

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
