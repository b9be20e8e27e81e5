"""The recorded calls of replay.py of compat, operators and contraction."""

from functools import partial as part

import torch
from replay_cases import F64, MODULES, Net, derivatives, leaf, loss, problem
from replay_record import grid
from torch import nn
from torch.func import vmap

import fpi_cuda as fpi
from fpi_cuda import (
    ConvStep,
    compat,
    contraction,
    fixed_point,
    operators,
)


class OfTuples(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(4, 4).double()

    def forward(self, x, y):
        return (self.net(x[0], y[0]),)


def compatible(how, m, order, **options):
    y, w = leaf(3, 4, dtype=F64), leaf(4, 4, dtype=F64, scale=0.2)
    x0 = (torch.zeros(3, 4, dtype=F64), torch.ones(2, dtype=F64))
    g, leaves = (lambda x, y: (torch.tanh(x[0] @ w + y[0]), 0.5 * x[1].cos() + y[0].sum())), (y, w)
    if how == "module":
        g, x0 = OfTuples(), x0[:1]
        leaves = (y, *g.parameters())
    elif how == "nan":
        g = lambda x, y: (x[0] * float("nan") + y[0] @ w, x[1])  # noqa: E731
    elif how == "growing":
        g, options = (
            (lambda x, y: (3 * x[0] + y[0] @ w, x[1])),
            {"forward_cond": lambda k, *_: k < 60},
        )
    f = compat.FixedPointIteration(g, m_anderson=m, param=(w,) if how == "param" else (), **options)
    x = f((y,), x0)
    return {"x": x, "orders": derivatives(loss(x), leaves, order)}


tight = part(compat.default_term_cond, threshold=1e-20)
TIGHT = {"forward_cond": tight, "backward_cond": tight, "eps": 1e-10}
grid("compat", compatible, ("module", "param", "captured", "nan", "growing"), (0, 5), (1, 2))
grid("compat-tight", compatible, ("module", "param"), (0, 5), (1, 2), **TIGHT)
grid("compat-accelerated", compatible, ("module",), (0, 5), (1, 2), accelerate=True, **TIGHT)
grid("compat-vmap", lambda m: {"x": vmap(lambda y: compat.fixed_point_iteration(
    (y,), (torch.zeros(3),), lambda x, y: (0.5 * x[0].cos() + y[0],), m_anderson=m))(
    torch.randn(4, 3))}, (0, 5))  # fmt: skip


def condition(value, **options):
    x, old = torch.tensor([value, 1.0], dtype=F64), torch.ones(2, dtype=F64)
    return {"go": compat.default_term_cond(3, (x,), (old,), **options)}


TERMS = ({}, {"threshold": 0.1}, {"normalized": False}, {"minIter": 9}, {"maxIter": 3})
grid("compat-cond", condition, (1.0, 1.001, float("nan"), 1e200), {str(t): t for t in TERMS})


def partials():
    x, z = leaf(3, 4, dtype=F64), leaf(3, 4, dtype=F64)
    (d,) = operators.partial(lambda x, z: (x * z).sin().sum(), x, z, which=(0,))
    (e,) = compat.partial(lambda x, y: (x[0].square() * y[0]).sum(), (x,), (z,))
    h = operators.inner_product((x, z), lambda a, b: (a * b, a + b))
    return {"d": d, "e": e, "h": h(z, x), "orders": derivatives(d.sum() + e.sum(), (x, z), 2)}


def contractions():
    g, x0, inputs, _, _ = problem("dense")
    x, conv = fixed_point(g, x0, *inputs).x.detach(), ConvStep(2, 1, hidden=(4,)).double()
    ways = (contraction.jacobian_norm, contraction.jacobian_radius, contraction.jacobian_penalty)
    found, w = {f.__name__: f(g, x, *inputs) for f in ways}, conv.layers[0].weight
    found["norms"] = contraction.convolution_norm(w, (5, 4)), contraction.convolution_bound(w)
    found["lipschitz"] = [contraction.lipschitz(s) for s in (g, conv, MODULES["energy"]())]
    return found | {"kept": contraction.spectral_normalize(conv, 0.5).layers[0].weight}


grid("operators", partials)
grid("contraction", contractions)
grid("names", lambda: {"backends": fpi.backends.NAMES, "status": [s.message for s in fpi.Status]})
