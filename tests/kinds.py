"""Maps that read Python values, and whether a graph follows when these change."""

import dataclasses
import functools
import types
from collections import namedtuple

import torch
from tape import problem
from torch import nn

from fpi_cuda import fixed_point

Pair = namedtuple("Pair", "a b")
SHIFT = 0.1
SETTINGS = types.ModuleType("settings_of_a_user")
SETTINGS.shift = 0.1


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
    return fixed_point(g, z * 0, z, driver="graph", per_sample=True, **options)


def follows(g, change):
    """Whether a solve by a graph after a change is what an eager one gives."""
    solve(g)
    change()
    after = solve(g)
    z = problem()
    expected = fixed_point(g, z * 0, z, driver="eager", per_sample=True)
    assert torch.equal(after.x, expected.x)
    return ", graph" in after.path


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


class Joined(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, z):
        return 0.3 * self.net(x) + z
