"""What the tests of states of several tensors share: one problem in every structure."""

import dataclasses
import functools
from collections import OrderedDict, deque
from typing import NamedTuple

import torch
from helpers import unroll
from helpers_derivatives import close, double
from helpers_layers import EXACT

from fpi_cuda import fixed_point
from fpi_cuda.tree import flatten

B = 3
Z, W = double(B, 3, scale=0.5), double(3, 3, seed=1, scale=0.2)


@dataclasses.dataclass
class Part:
    """Not registered with torch."""

    a: torch.Tensor
    b: torch.Tensor
    seen: int = dataclasses.field(default=0, init=False)


class Named(NamedTuple):
    u: object
    part: object


# A state of three tensors made in each structure, and these out of it.
KINDS = {
    "a tuple": (lambda u, a, b: (u, a, b), lambda x: x),
    "a dict": (lambda u, a, b: {"u": u, 7: a, "b": b}, lambda x: (x["u"], x[7], x["b"])),
    "an OrderedDict": (
        lambda u, a, b: OrderedDict(b=b, u=u, a=a),
        lambda x: (x["u"], x["a"], x["b"]),
    ),
    "a list within a dict": (
        lambda u, a, b: {"u": [u], "rest": [a, (b,)], "none": ()},
        lambda x: (x["u"][0], x["rest"][0], x["rest"][1][0]),
    ),
    "a dataclass within a named tuple": (
        lambda u, a, b: Named(u, {"part": Part(a, b)}),
        lambda x: (x.u, x.part["part"].a, x.part["part"].b),
    ),
    "a type that torch's pytree knows": (
        lambda u, a, b: deque([u, (a, b)]),
        lambda x: (x[0], *x[1]),
    ),
}
NESTED = KINDS["a dataclass within a named tuple"]
DICT = KINDS["a dict"]


def start(make, b=B, dtype=torch.float64):
    return make(*(torch.zeros(b, *s, dtype=dtype) for s in ((3,), (2, 2), ())))


@functools.cache  # residual_at_x asks for the g of the solve
def step(kind):
    """g(x, z, w) that couples the three."""
    make, of = kind

    def g(x, z, w):
        u, a, b = of(x)
        return make(
            0.5 * torch.tanh(u @ w.mT + z) + 0.1 * b[:, None],
            0.3 * a.sin() + u[:, :2, None] * 0.2,
            0.2 * b + 0.3 * (a * z[:, :1, None]).sum((1, 2)),
        )

    return g


def solved(kind, z, w, **options):
    return fixed_point(step(kind), start(kind[0], len(z)), z, params=(w,), **{**EXACT, **options})


def loop(kind, z, w):
    """Unrolled."""
    return unroll(step(kind), start(kind[0], len(z)), z, w, steps=60)


def loss(kind, x):
    u, a, b = kind[1](x)
    return u.sin().sum() + (a.square() * b[:, None, None]).sum() + b.cos().sum()


def alike(mine, true):
    a, b = flatten(mine), flatten(true)
    assert [type(mine)] == [type(true)] and len(a[0]) == len(b[0])
    for t, s in zip(a[0], b[0], strict=True):
        close(t, s)


def solved_as_one_tensor(z, w, scales=(1, 1, 1), **options):
    """The same by hand: x is the three side by side, each times its scale."""

    def split(x):
        u, a, b = (t / s for t, s in zip(x.split([3, 4, 1], 1), scales, strict=True))
        return u, a.view(-1, 2, 2), b[:, 0]

    def g(x, z, w):
        parts = step(KINDS["a tuple"])(split(x), z, w)
        rows = zip(parts, scales, strict=True)
        return torch.cat([t.reshape(len(x), -1) * s for t, s in rows], 1)

    return fixed_point(g, torch.zeros(len(z), 8, dtype=z.dtype), z, params=(w,), **options)
