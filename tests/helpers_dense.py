"""What the tests of dense steps share."""

import dataclasses

import pytest
import torch

from fpi_cuda import DenseStep, Tolerance, fixed_point
from fpi_cuda.backends import native
from fpi_cuda.record import Limits

NEAR = {torch.float64: (1e-9, 1e-11)}  # of solves that stop at the same iteration
LAYERS = {"one layer": None, "two layers": 11}
on_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in native.dense_devices(),
    reason="needs a CUDA device and a build with CUDA",
)
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])


def step(n, d=3, hidden=None, dtype=torch.float64, seed=0, **options):
    """A contraction of rate about 0.6, whatever the activation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if hidden is not None:
            options.setdefault("output_activation", "tanh")
        made = DenseStep(n, d, hidden, **options).double()
        with torch.no_grad():
            for weight in filter(lambda w: w is not None, (made.state_weight, made.output_weight)):
                weight.mul_(0.7 / torch.linalg.matrix_norm(weight, 2).clamp(min=1e-9))
            for bias in filter(lambda b: b is not None, (made.bias, made.output_bias)):
                bias.normal_()
    return made.to(dtype)


def solve(g, z, *more, n=None, backward=True, **options):
    """x̂, its record, and the gradients of a loss that weighs every value differently."""
    n = g.state_shape[0] if n is None else n
    z = z.clone().requires_grad_()
    x0 = z.new_zeros(len(z), n)
    solution = fixed_point(g, x0, z, *more, on_failure="return", **options)
    gradients = ()
    if backward:
        loss = (solution.x * torch.linspace(-1, 1, n, dtype=z.dtype, device=z.device)).sum()
        wanted = (z, *g.parameters())
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return solution, gradients


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def assert_same_record(a, b):
    assert a.iterations.tolist() == b.iterations.tolist()
    assert a.status.tolist() == b.status.tolist()


def limits(dtype, n, max_iterations=40):
    rtol, atol = Tolerance().resolve(dtype)
    return Limits(rtol, atol * n**0.5, 0.0, 10**6, max_iterations)


def taken(form, rows):
    """The same for these samples only."""
    names = ("u", "hidden_u", "gain", "scale", "hidden_scale", "output_scale")
    tensors = {name: getattr(form, name) for name in names}
    parts = {k: t[rows] for k, t in tensors.items() if t is not None and t.dim() == 2}
    return dataclasses.replace(form, **parts)


@pytest.fixture(name="matmul")
def matmul_fixture():
    """torch's settings of CUDA's products; monkeypatch can't put them back."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before
