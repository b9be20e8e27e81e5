"""The recorded solves of replay.py: steps, solvers, failures, derivatives, the layer, compat."""

import copy
import pickle
from functools import partial as part

import torch
from replay_record import account, each, grid
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from fpi_cuda import (
    Anderson,
    ConvStep,
    DenseEnergy,
    DenseStep,
    FixedPointLayer,
    GradientStep,
    ImplicitAdjoint,
    NeuralStep,
    Picard,
    Tolerance,
    contraction,
    fixed_point,
)

F64, F32 = torch.float64, torch.float32
TWO = {"picard": {"solver": Picard()}, "anderson": {"solver": Anderson()}}
SOLVERS = TWO | {
    "picard.5": {"solver": Picard(0.5)},
    "anderson2.7": {"solver": Anderson(2, beta=0.7)},
    "anderson1": {"solver": Anderson(1)},
}

# ---- problems: g, x0, inputs, params, and what to differentiate by ----


class Net(nn.Module):
    def __init__(self, n=5, d=3, norm=None):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(n, 4), nn.Linear(d, 4), nn.Linear(4, n)
        self.norm = norm or nn.Identity()
        with torch.no_grad():
            self.a.weight.mul_(0.8), self.c.weight.mul_(0.5)

    def forward(self, x, z):
        return self.c(torch.tanh(self.norm(self.a(x)) + self.b(z)))


def spectral(norm=nn.utils.parametrizations.spectral_norm):
    net = Net()
    norm(net.a)
    return net


def pair(x, z):
    a, b = x
    return 0.4 * torch.tanh(b.flatten(1)[:, :3]) + z, 0.3 * b.cos() + 0.2 * a[:, :2, None]


def quadratic(x, z):
    return (0.5 * x.square() + 0.3 * torch.cos(x)).sum(1) - (x[:, :3] * z).sum(1)


def product(x, z, w):
    return torch.tanh(x @ w.mT + z.sum(1, keepdim=True))


def leaf(*shape, dtype=F32, scale=1.0):
    return (scale * torch.randn(*shape, dtype=F64)).to(dtype).requires_grad_()


def fresh(g):
    """A g of which nothing is known yet."""
    return lambda *args: g(*args)  # noqa: PLW0108


# Makers: every case has a g of its own.
MODULES = {
    "net": Net,
    "neural": lambda: NeuralStep(Net()),
    "neural-dense": lambda: NeuralStep(DenseStep(5, 3)),
    "dense": lambda: DenseStep(5, 3),
    "dense-relu": lambda: DenseStep(5, 3, activation="relu", residual=0.1, bias=False),
    "dense2": lambda: DenseStep(5, 3, hidden=4),
    "dense2-exact": lambda: DenseStep(5, 3, 4, "softplus", output_activation="tanh", exact=True),
    "gain": lambda: DenseStep(5, 3),
    "energy": lambda: GradientStep(DenseEnergy(5, 3, hidden=4), 0.2),
    "energy-learnt": lambda: GradientStep(DenseEnergy(5, 3, 4), nn.Parameter(torch.tensor(0.2))),
    "spectral": spectral,
    "spectral-dense": lambda: contraction.spectral_normalize(DenseStep(5, 3), 0.7),
    "certified": lambda: contraction.Certified(contraction.spectral_normalize(DenseStep(5, 3))),
    "certified-conv": lambda: contraction.spectral_normalize(ConvStep(2, 1), 0.7, certified=True),
    "norm-train": lambda: Net(norm=nn.BatchNorm1d(4)),
    "norm-eval": lambda: Net(norm=nn.BatchNorm1d(4)).eval(),
    "conv": lambda: ConvStep(2, 1, hidden=(4,)),
    "conv1": lambda: ConvStep(2, 1, hidden=(), activation="tanh"),
}
FUNCTIONS = {
    "rows": lambda: lambda x, z, s: s * torch.tanh(x.roll(1, -1)) + z.sum(1, keepdim=True),
    "product": part(fresh, product),
    "captured": lambda w: lambda x, z: product(x, z, w),
    "descent": lambda: GradientStep(fresh(quadratic), 0.5),
    "tuple": part(fresh, pair),
    "coupled": lambda: lambda x, z: 0.3 * x + 0.2 * x.mean(0) + z.sum(),
}
KINDS = (*MODULES, *FUNCTIONS)


def problem(kind, dtype=F64, b=6):
    z, x0 = leaf(b, 3, dtype=dtype), torch.zeros(b, 5, dtype=dtype)
    rate = torch.linspace(0.1, 0.9, b, dtype=F64)[:, None].to(dtype).requires_grad_()
    w = leaf(5, 5, dtype=dtype, scale=0.25)
    inputs, params = (z, rate) if kind in ("rows", "gain") else (z,), ()
    if "conv" in kind:
        inputs, x0 = (leaf(b, 1, 5, 4, dtype=dtype),), torch.zeros(b, 2, 5, 4, dtype=dtype)
    elif kind == "tuple":
        x0 = (x0[:, :3], x0[:, :4].reshape(b, 2, 2))
    elif kind == "product":
        params = (w,)
    if kind in MODULES:
        g = MODULES[kind]().to(dtype)
        return g, x0, inputs, params, (*inputs, *g.parameters())
    g = FUNCTIONS[kind](w) if kind == "captured" else FUNCTIONS[kind]()
    return g, x0, inputs, params, (*inputs, w) if kind in ("captured", "product") else inputs


def loss(x):
    parts = x if isinstance(x, tuple) else (x,)
    weigh = lambda p: torch.arange(1.0, p.numel() + 1, dtype=F64).cos().view(p.shape)  # noqa: E731
    return sum((p.to(F64) * weigh(p)).sum() for p in parts)


def derivatives(y, leaves, order):
    """Gradients, those of their squared norm, and so on."""
    found = []
    for _ in range(order):
        found.append(torch.autograd.grad(y, leaves, create_graph=order > 1, allow_unused=True))
        more = [t.to(F64).square().sum() for t in found[-1] if t is not None and t.requires_grad]
        if not more:
            break
        y = sum(more)
    return found


def solve(
    kind,
    dtype=F64,
    order=1,
    b=6,
    x0=None,
    context=torch.enable_grad,
    backward=torch.enable_grad,
    change=None,
    **options,
):
    g, start, inputs, params, leaves = problem(kind, dtype, b)
    if change:
        change(g, inputs)
    with context():
        start = x0(start) if x0 else start
        solution = fixed_point(g, start, *inputs, params=params, **options)
    y = loss(solution.x)
    found = {"forward": account(solution, solution.x), "node": str(y.grad_fn)}
    with backward():
        found["orders"] = derivatives(y, leaves, order) if y.requires_grad else None
    found["adjoint"] = account(solution)
    return found | {"buffers": dict(g.named_buffers()) if isinstance(g, nn.Module) else {}}


grid("step", solve, KINDS, SOLVERS, (F64, F32))
grid("backend", solve, KINDS, TWO, each(backend=("native", "reference")), dtype=F32)
HALF = (torch.float16, torch.bfloat16)
grid("half", solve, ("rows", "net", "dense", "energy", "tuple"), HALF, TWO)
SOME = ("rows", "net", "dense", "dense2", "energy", "gain", "conv", "neural-dense", "tuple")
DRIVERS = each(driver=("auto", "eager"))
grid("driver", solve, SOME, each(driver=("eager", "whole")), TWO)
grid("driver", solve, ("rows", "dense"), each(driver=("graph",)))
ORDERS = each(order=(2, 3))
grid("order", solve, SOME, ORDERS, tolerance=Tolerance(1e-10))
grid(
    "order", solve, ("product", "descent", "captured", "coupled", "norm-train", "spectral"), ORDERS
)
PER_SAMPLE = each(per_sample=("auto", True, False))
grid("per_sample", solve, ("rows", "coupled", "norm-train", "dense"), PER_SAMPLE, b=12)
grid("batch", solve, ("rows", "net", "dense", "energy", "conv", "tuple"), each(b=(0, 1, 40)))
COUNT, BACKENDS = each(max_iterations=(7, 60)), each(backend=("auto", "reference"))
grid("count", solve, ("rows", "dense", "conv"), TWO, BACKENDS, COUNT, tolerance=Tolerance(0, 0))
ADJOINTS = {
    "picard": ImplicitAdjoint(Picard()),
    "loose": ImplicitAdjoint(tolerance=Tolerance(1e-2)),
    "atol": ImplicitAdjoint(tolerance=Tolerance(0.0, 1e-3)),
    "two": ImplicitAdjoint(max_iterations=2),
    "all": ImplicitAdjoint(Anderson(3, 0.9), Tolerance(1e-8), 30, "use"),
}
ADJOINT = {name: {"adjoint": a} for name, a in ADJOINTS.items()}
FAILURE = each(on_failure=("warn", "raise", "return"))
grid("adjoint", solve, ("rows", "net", "dense", "conv"), ADJOINT, FAILURE)
STARTS = {
    "random": torch.randn_like,
    "grad": lambda x: torch.ones_like(x).requires_grad_(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x[:, ::1],
    "nan": lambda x: x.index_fill(0, torch.tensor([1]), float("nan")),
}
X0 = {name: {"x0": start} for name, start in STARTS.items()}
grid("x0", solve, ("rows", "dense", "conv"), X0)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


UNDER = {c.__name__: {"context": c} for c in (torch.no_grad, torch.inference_mode, autocast)}
grid("under", solve, ("rows", "net", "dense", "conv", "energy", "norm-train", "captured"), UNDER)
AFTER = {"one": {"backward": autocast}, "both": {"context": autocast, "backward": autocast}}
WIDE = ("rows", "net", "dense", "gain", "conv", "energy", "spectral", "spectral-dense")
grid("backward", solve, WIDE, AFTER, DRIVERS, b=40, dtype=F32)


def shaped(shape, form=torch.contiguous_format, **options):
    z = torch.randn(shape, dtype=F64)
    z = (z.to(memory_format=form) if z.dim() == 4 else z).requires_grad_()
    solution = fixed_point(lambda x, z: 0.6 * x.cos() + z, z.detach() * 0, z, **options)
    grads = derivatives(loss(solution.x), (z,), 1)
    return {"forward": account(solution, solution.x), "grads": grads}


SHAPES = ((7,), (7, 3), (4, 3, 2), (3, 2, 4, 5), (2, 0), (0, 3))
grid("shape", shaped, SHAPES, TWO, DRIVERS)
grid("shape", shaped, ((3, 2, 4, 5),), (torch.channels_last,), TWO)


# ---- solves that fail ----


def failing(how, **options):
    dtype = F32 if how == "stalled" else F64
    s, z = torch.full((6, 1), 0.5, dtype=dtype), torch.randn(6, 12, dtype=dtype)
    if how == "diverged":
        s[1:3] = 9.0
    elif how == "max":
        options |= {"max_iterations": 3, "tolerance": Tolerance(1e-12)}
    elif how == "stalled":
        s, options = s * 1.9, options | {"tolerance": Tolerance(1e-12, 0.0)}
    else:
        z[slice(2, 4) if how == "some" else slice(None)] = float("nan")
    s.requires_grad_(), z.requires_grad_()
    slope = torch.linspace(0.3, 1, 12, dtype=dtype)
    f = torch.cos if how == "stalled" else torch.clone
    solution = fixed_point(
        lambda x, z, s: slope * s * f(x) + z, torch.ones_like(z), z, s, **options
    )
    found = {"forward": account(solution, solution.x)}
    return found | {"grads": derivatives(loss(solution.x), (z, s), 1), "adjoint": account(solution)}


def noisy(**options):
    """Residuals that end at levels around the one below which a sample counts as stalled."""
    size, z = torch.logspace(-16, -13, 200, dtype=F64)[:, None], torch.randn(200, 12, dtype=F64)

    def g(x, z, size):
        return 0.5 * x.cos() + z + size * (1e17 * x).sin()

    options = {"tolerance": Tolerance(1e-17, 0.0), "max_iterations": 60} | options
    solution = fixed_point(g, torch.zeros_like(z), z, size, **options)
    return {"forward": account(solution, solution.x)}


FAILS = ("diverged", "some", "all", "stalled", "max")
MASK = {name: {"adjoint": ImplicitAdjoint(failed=name)} for name in ("mask", "use")}
MASK_PICARD = {m: {"adjoint": ImplicitAdjoint(Picard(), failed=m)} for m in ("mask", "use")}
grid("fail", failing, FAILS, FAILURE, MASK, TWO)
grid("fail", failing, FAILS, each(backend=("native", "reference")), PER_SAMPLE)


grid("noisy", noisy, each(backend=("native", "reference")), TWO)


def broken(g, inputs):
    with torch.no_grad():
        inputs[0][1] = float("nan")


def grown(g, inputs):
    with torch.no_grad():
        next(g.parameters()).mul_(9)


def steep(g, inputs):
    """Derivatives above 1 for some samples: there Anderson converges, and Picard's adjoint not."""
    with torch.no_grad():
        inputs[0].mul_(0.03), inputs[1].mul_(8 if isinstance(g, DenseStep) else 2)


CHANGE = {f.__name__: {"change": f} for f in (broken, grown)}
STEPS = ("net", "dense", "dense2", "energy", "conv")
grid("fail-step", solve, STEPS, CHANGE, MASK, max_iterations=40)
grid(
    "fail-adjoint",
    solve,
    ("rows", "gain"),
    MASK_PICARD,
    DRIVERS,
    each(order=(1, 2)),
    b=12,
    change=steep,
)
grid("fail-step", solve, (*FUNCTIONS, "norm-train"), MASK, change=broken)


# ---- derivatives by other ways ----


def zero_cotangents(kind, **options):
    g, x0, inputs, params, leaves = problem(kind)
    solution = fixed_point(g, x0, *inputs, params=params, **options)
    v = torch.ones_like(solution.x)
    v[::2] = 0
    one = v.clone()
    one[1] = float("nan")
    grads = [torch.autograd.grad(solution.x, leaves, c, retain_graph=True, allow_unused=True)
             for c in (v, v * 0, v * 1e30, v * float("nan"), one)]  # fmt: skip
    return {"grads": grads, "adjoint": account(solution)}


def transformed(kind, how):
    g, x0, inputs, params, leaves = problem(kind)
    named = {k: v.detach() for k, v in g.named_parameters()} if isinstance(g, nn.Module) else {}
    z, *rest = (t.detach() for t in inputs)

    def x(z, named=None):
        if not named:
            return fixed_point(g, x0, z, *rest, params=[p.detach() for p in params]).x
        n, call = (
            2 + len(rest),
            lambda *a: functional_call(g, dict(zip(named, a[n:], strict=True)), a[:n]),
        )
        return fixed_point(call, x0, z, *rest, params=tuple(named.values())).x

    def total(*a):
        return loss(x(*a))

    stack, cotangents = torch.stack([z, 0.5 * z, -z]), torch.randn(3, *x0.shape, dtype=F64)
    ways = {
        "grad": lambda: grad(total)(z),
        "grad-grad": lambda: grad(lambda z: grad(total)(z).square().sum())(z),
        "vjp": lambda: vjp(x, z)[1](cotangents[0]),
        "jacrev": lambda: jacrev(x)(z),
        "jvp": lambda: jvp(x, (z,), (z,)),
        "vmap": lambda: vmap(x)(stack),
        "vmap-grad": lambda: vmap(grad(total))(stack),
        "named": lambda: grad(total, argnums=1)(z, named),
        "batched": lambda: torch.autograd.grad(fixed_point(g, x0, *inputs, params=params).x, leaves,
                                               cotangents, is_grads_batched=True),
    }  # fmt: skip
    return {"value": ways[how]()}


def forward_mode(hidden):
    x0, z = torch.zeros(4, 3), torch.randn(4, 3)
    with forward_ad.dual_level():
        z = forward_ad.make_dual(z, torch.ones_like(z))
        g = (lambda x: x.cos() / 2 + z) if hidden else (lambda x, z: x.cos() / 2 + z)
        return {"x": fixed_point(g, x0, *(() if hidden else (z,))).x}


def hidden(transform):
    def f(z):
        return loss(fixed_point(lambda x: x.cos() / 2 + z.sum(), torch.zeros(4, 3)).x)

    return {"value": transform(f)(torch.ones(4, 3))}


grid("forward-mode", forward_mode, (False, True))
grid("hidden", hidden, {"grad": grad, "vmap": vmap})
WAYS = ["grad", "grad-grad", "vjp", "jacrev", "jvp", "vmap", "vmap-grad", "named", "batched"]
grid("zero-cotangents", zero_cotangents, ("rows", "product", *STEPS, "captured"), TWO)
grid("func", transformed, ("rows", "product", "net", "dense", "conv", "captured"), WAYS)


# ---- the layer ----


def layer(make, shape=None, move=copy.deepcopy, **options):
    g = make()
    f = FixedPointLayer(g, state_shape=shape, **options)
    z, found = leaf(4, 3), {"before": f.last, "repr": repr(f), "keys": list(f.state_dict())}
    found["grads"] = derivatives(loss(f(z)), (z, *f.parameters()), 1)
    found |= {
        "last": account(f.last, f.last.x),
        "warm": f(z, x0=f.last.x),
        "again": account(f.last),
    }
    twin = move(f)
    return found | {"fresh": twin.last, "twin": twin(z)}


def layer_compiled():
    f = nn.Sequential(nn.Linear(3, 3), FixedPointLayer(Net(d=3), state_shape=(5,)))
    x = torch.compile(f, backend="eager")(leaf(4, 3))
    return {"x": x, "grads": derivatives(loss(x), tuple(f.parameters()), 1)}


KINDS_OF_SHAPE = {
    "tuple": (5,),
    "size": torch.Size([5]),
    "function": lambda z: (z.shape[1] + 2,),
    "wrong": (4,),
    "none": None,
}
OWN = {k: MODULES[k] for k in ("net", "dense", "dense2", "energy", "neural-dense", "spectral")}
MOVES = {"copied": copy.deepcopy, "pickled": lambda f: pickle.loads(pickle.dumps(f))}
grid("layer/shape", part(layer, Net), KINDS_OF_SHAPE)
grid("layer/none", layer, {"": part(Net, 3)})
grid("layer/tuple", layer, {"": part(fresh, pair)}, (((3,), (2, 2)),))
grid("layer/own", lambda make, move: layer(make, (5,), move), OWN, MOVES)
grid("layer/no-input", FixedPointLayer(Net()))
grid("layer/compiled", layer_compiled)


# These run in a process of their own, where Triton interprets.
grid("triton", solve, ("rows", "conv", "net"), TWO, dtype=F32, b=2, backend="triton")
