"""What replay.py records of wrong arguments: the type and the text of each error."""

from functools import partial as part

import torch
from replay_cases import Net
from replay_record import each, grid
from torch import nn

from fpi_cuda import (
    Anderson,
    ConvStep,
    DenseEnergy,
    DenseStep,
    FixedPointLayer,
    GradientStep,
    ImplicitAdjoint,
    Picard,
    Tolerance,
    compat,
    contraction,
    fixed_point,
    operators,
)


def refuse(f, *args, **kwargs):
    return {"value": f"{f(*args, **kwargs)!r}"}


def halved(x, z):
    return 0.5 * x + z


def wrong(name, make, **options):
    for option, values in options.items():
        grid(f"refuse/{name}", part(refuse, make), each(**{option: values}))


NAN, Z = float("nan"), torch.ones(4, 3)
OPTIONS = {
    "solver": ("anderson", None, Anderson, Tolerance()),
    "adjoint": ("implicit", None, Picard()),
    "tolerance": (1e-4, None, "tight"),
    "max_iterations": (0, -1, 2.0, True, "many", None),
    "backend": ("cuda", None, "triton"),
    "on_failure": ("ignore", None),
    "per_sample": ("yes", None, 2),
    "driver": ("fast", None, "graph", "whole"),
}
wrong("fixed_point", part(fixed_point, halved, Z, Z), **OPTIONS)
wrong("layer", part(FixedPointLayer, Net()), **OPTIONS)
wrong("Picard", Picard, beta=(0, 2, -1, NAN, "a"))
wrong("Anderson", Anderson, history=(0, 1.5, True), beta=(0,), ridge=(-1, 1), restart=(1, NAN))
wrong("Tolerance", Tolerance, rtol=(-1, NAN, "a", 1e-3), atol=(-1, float("inf")))
wrong("Adjoint", ImplicitAdjoint, solver=("a",), tolerance=(1.0,), max_iterations=(0, True))
wrong("Adjoint", ImplicitAdjoint, failed=("a", None))
wrong("DenseStep", part(DenseStep, 5, 3), activation=("a",), hidden=(0,), residual=("a", 1))
wrong("DenseStep", part(DenseStep, 5, 3), output_activation=("tanh",))
wrong("DenseEnergy", part(DenseEnergy, 5, 3), hidden=(0, 2), curvature=(-1,))
wrong("ConvStep", part(ConvStep, 2, 1), kernel_size=(2, 9), hidden=(3, (0,), ()))
wrong("GradientStep", part(GradientStep, Net()), step_size=(0, -1.0, NAN))
wrong("compat", part(compat.FixedPointIteration, Net()), m_anderson=(-1, 2), eps=(-1,))
wrong("spectral_normalize", part(contraction.spectral_normalize, Net()), bound=(0, 0.5))
wrong("lipschitz", contraction.lipschitz, step=(nn.Identity(),))
wrong("partial", part(operators.partial, torch.sum), which=((3,),))
CALLS = {
    "g": (3, Z, Z),
    "x0-list": (halved, [], Z),
    "x0-int": (halved, Z.int(), Z),
    "x0-scalar": (halved, torch.tensor(1.0), Z),
    "x0-none": (halved, None, Z),
    "x0-parts": (halved, (Z, Z.double()), Z),
    "x0-batches": (halved, (Z, Z[:2]), Z),
    "x0-part": (halved, (Z, 3), Z),
    "x0-meta": (halved, Z.to("meta"), Z.to("meta")),
    "input-number": (halved, Z, 3.0),
    "input-batch": (halved, Z, Z[:2]),
    "input-scalar": (halved, Z, torch.tensor(1.0)),
    "input-meta": (halved, Z, Z.to("meta")),
    "none": (lambda x, z: None, Z, Z),
    "a-tuple": (lambda x, z: (x, x), Z, Z),
    "shape": (lambda x, z: x[:, :2], Z, Z),
    "rows": (lambda x, z: x[:2], Z, Z),
    "wider": (lambda x, z: x.double() / 2, Z, Z),
    "narrower": (lambda x, z: x.half() / 2, Z, Z),
    "integers": (lambda x, z: x.int(), Z, Z),
    "meta": (lambda x, z: x.to("meta"), Z, Z),
    "parts": (lambda x, z: x[:1], (Z, Z), Z),
    "part": (lambda x, z: (x[0], 3), (Z, Z), Z),
    "part-shape": (lambda x, z: (x[0], x[1][:, :1]), (Z, Z), Z),
    "no-tuple": (lambda x, z: x[0], (Z, Z), Z),
    "writes": (lambda x, z: x.mul_(0.5).add_(z), Z, Z),
    "same": (lambda x, z: x, Z, Z),
    "raises": (lambda x, z: 1 / 0, Z, Z),
    "arity": (lambda x: x, Z, Z),
    "energy": (GradientStep(lambda x, z: x.sum(), 0.1), Z, Z),
    "dense-z": (DenseStep(3, 2), Z, Z),
    "dense-x": (DenseStep(5, 3), Z, Z),
    "dense-dtype": (DenseStep(3, 3).double(), Z, Z),
    "conv": (ConvStep(3, 3), Z, Z),
}
grid("refuse", lambda args: refuse(fixed_point, *args), CALLS)
PARAMS = {"tensor": Z, "number": (3,), "meta": (Z.to("meta"),), "none": None}
grid("refuse/params", lambda params: refuse(fixed_point, halved, Z, params=params), PARAMS)
TUPLES = {"y": (Z, (Z,)), "x0": ((Z,), Z), "empty": ((Z,), ()), "int": ((Z,), (Z.int(),)),
          "dtypes": ((Z,), (Z, Z.half()))}  # fmt: skip
grid("refuse/compat", lambda a: refuse(compat.fixed_point_iteration, *a, lambda x, y: x), TUPLES)
OUT = {"none": None, "two": (Z, Z), "rows": (Z[:2],), "number": (3,), "tensor": Z}
answer = part(refuse, compat.fixed_point_iteration, (Z,), (Z,))
grid("refuse/compat-value", lambda out: answer(lambda x, y: out), OUT)
