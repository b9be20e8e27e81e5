"""What a captured graph has built in is seen, whatever g keeps it in."""

import copy
import functools
from collections import OrderedDict, deque

import kinds
import pytest
import torch
from kinds import (
    SETTINGS,
    Frozen,
    Joined,
    Pair,
    Shifted,
    follows,
    of_a_cached_function,
    of_a_global,
    of_a_helper,
    of_a_python_module,
    with_an_inner_function,
)
from tape import captures, tape_fixture  # noqa: F401
from torch import nn

from fpi_cuda.drivers import kind

pytestmark = pytest.mark.usefixtures("tape")

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


@pytest.mark.parametrize(
    "g", [of_a_global, of_a_helper, with_an_inner_function, Shifted()], ids=str
)
def test_globals_are_seen_that_functions_name(monkeypatch, g):
    assert follows(g, lambda: monkeypatch.setattr(kinds, "SHIFT", 0.3))


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
