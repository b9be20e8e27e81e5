"""torch.export of solves: the program's answers, records and statuses are the eager ones."""

import re
import subprocess
import sys

import pytest
import torch
from helpers import Net
from torch import nn

import fpi_cuda
from fpi_cuda import (
    Anderson,
    ConvStep,
    DenseStep,
    FixedPointLayer,
    GradientStep,
    Picard,
    Status,
    Tolerance,
    fixed_point,
)

B = torch.export.Dim("B", min=1)
DYNAMIC = {"inputs": ({0: B},)}
DYNAMIC_Z = {"z": {0: B}}


class Model(nn.Module):
    """A layer between other modules, which returns its record too."""

    def __init__(self, g, before=None, after=None, **options):
        super().__init__()
        self.layer = FixedPointLayer(g, on_failure="return", **options)
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, *inputs):
        x = self.layer(self.before(inputs[0]), *inputs[1:])
        last = self.layer.last
        return self.after(x), last.status, last.iterations, last.residual_norm, last.error_estimate


def exported(model, *inputs, dynamic=None):
    if dynamic is None:
        dynamic = {"inputs": tuple({0: B} for _ in inputs)}
    return torch.export.export(model.eval(), inputs, dynamic_shapes=dynamic)


def assert_same(program, model, *inputs, rtol=1e-5):
    """X, statuses, counts, residuals and error estimates; the last two to what rounding leaves."""
    actual, expected = program(*inputs), model(*inputs)
    assert not any(t.requires_grad for t in actual)
    x, status, iterations, *measured = (t.detach() for t in expected)
    assert torch.equal(actual[1], status) and torch.equal(actual[2], iterations)
    torch.testing.assert_close(actual[0], x, rtol=rtol, atol=rtol / 10, equal_nan=True)
    for mine, other in zip(actual[3:], measured, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=rtol / 10, equal_nan=True)


def kinds(x, z):
    """Each sample another map: z's first column scales a rotated x, or a tanh of it."""
    scale, turned = z[:, :1], torch.stack((x[:, 1], -x[:, 0], x[:, 2]), 1)
    curved = torch.where(scale > 2, scale * x * x * x, scale * torch.tanh(turned))
    return torch.where(scale > 9, x + 1, curved) + z


def zoo(dtype):
    """Converging fast and slowly, from a solution, at the limit, growing, not finite."""
    z = torch.tensor(
        [
            [0.5, 0.3, 1],
            [0.0, 0, 0],
            [0.9, -0.2, 0.4],
            [1.0, 3, 1],
            [5.0, 2, 1],
            [0.3, torch.nan, 1],
        ],
        dtype=dtype,
    )
    return torch.cat((z, torch.tensor([[-0.99, 0.1, 0.2], [10.0, 1, 1]], dtype=dtype)))


@pytest.mark.parametrize(
    "solver, dtype, options",
    [
        (Picard(), torch.float32, {}),
        (Picard(0.6), torch.float64, {"tolerance": Tolerance(0, 0)}),
        (Anderson(), torch.float64, {"eval_factor": 0.5}),
    ],
    ids=str,
)
def test_a_program_ends_every_sample_as_the_eager_solve_does(solver, dtype, options):
    model = Model(kinds, solver=solver, max_iterations=60, per_sample=True, **options)
    z = zoo(dtype)
    program = exported(model, z[:2]).module()
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    if isinstance(solver, Anderson):
        # What grows is mixed with weights that rounding decides: that of the same formulas alone.
        grows = z[:, 0] == 5
        assert_same(program, model, z[~grows], rtol=rtol)
        assert torch.equal(program(z)[1], model(z)[1])
        assert torch.equal(program(z)[2], model(z)[2])
        model.layer.backend = "reference"
    assert_same(program, model, z, rtol=rtol)
    assert_same(program, model, z[2:3], rtol=1e-4)  # a batch of one
    found = set(model.layer.last.status.tolist()) | set(model(z)[1].tolist())
    assert Status.NONFINITE in found and Status.MAX_ITERATIONS in found
    if dtype == torch.float32:
        assert Status.CONVERGED in found


def test_samples_with_limits_of_their_own():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = FixedPointLayer(Net(3, 2), state_shape=(3,), on_failure="return")

        def forward(self, z, rtol, most, sizes, x0):
            limits = {"tolerance": Tolerance(rtol, rtol), "max_iterations": most, "sizes": sizes}
            x, last = self.layer(z, x0=x0, **limits), self.layer.last
            return x, last.status, last.iterations, last.residual_norm, last.error_estimate

    def inputs(b):
        rtol = torch.logspace(-9, -2, b, dtype=torch.float64)
        rtol[0] = 0  # a fixed count
        z, x0 = torch.randn(b, 2, dtype=torch.float64), torch.randn(b, 3, dtype=torch.float64)
        return z, rtol, torch.arange(b) + 3, torch.full((b,), 3), x0

    model = Given().eval()
    of_batch = {name: {0: B} for name in ("z", "rtol", "most", "sizes", "x0")}
    program = torch.export.export(model, inputs(3), dynamic_shapes=of_batch).module()
    assert_same(program, model, *inputs(6), rtol=1e-7)


@pytest.mark.parametrize("solver", [Picard(0.8), Anderson()], ids=str)
def test_a_batch_that_is_one_system(solver):
    model = Model(lambda x, z: 0.5 * torch.tanh(x + x.mean(0)) + z, solver=solver, per_sample=False)
    program = exported(model, torch.randn(3, 4)).module()
    assert_same(program, model, torch.randn(5, 4))


def test_structures_keywords_and_what_g_captures():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.w = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3) / 5)

        def forward(self, z):
            h = self.inside(z).mean(1)  # [B, 3] of [B, T, 3]

            def g(x, scale, w, *, t):
                u = {"v": 0.4 * torch.tanh(x["u"].real @ w) + h}
                u["u"] = scale * (0.5j * x["u"] + x["v"] * t / z.shape[1])
                return u, (u["v"].sum(1), "name")

            x0 = {"u": torch.zeros(z.shape[0], 3, dtype=torch.complex64), "v": h * 0}
            layer = FixedPointLayer(g, has_aux=True)
            x, aux = layer(z[:, 0, :1], x0=x0, params=(self.w,), t=0.3)
            return x["u"], x["v"], aux[0], layer.last.iterations, layer.last.evaluations

    model = Whole()
    dynamic = {"z": {0: B, 1: torch.export.Dim("T", min=2)}}
    program = torch.export.export(model, (torch.randn(3, 4, 3),), dynamic_shapes=dynamic).module()
    z = torch.randn(2, 7, 3)
    u, v, aux, iterations, _ = model(z)
    actual = program(z)
    for mine, eager in zip(actual, (u, v, aux), strict=False):
        torch.testing.assert_close(mine, eager.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(actual[3], iterations) and int(actual[4]) == int(iterations.max()) + 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Programs in files: their inputs and the eager answers beside them, and the models."""
    folder = tmp_path_factory.mktemp("programs")
    norm = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh())
    energy = GradientStep(lambda x, z: (x - z).square().sum(1) + x.cos().sum(1), 0.3)
    images, sides = torch.randn(2, 2, 5, 6), [torch.export.Dim(n, min=2) for n in "HW"]
    models = {
        "net": (Model(lambda x, z: 0.5 * norm(x) + z, norm, norm), torch.randn(2, 4), None),
        "energy": (Model(energy, solver=Picard()), torch.randn(2, 4), None),
        "conv": (
            Model(ConvStep(3, 2, (8,)), solver=Picard()),
            images,
            {"inputs": ({0: B, 2: sides[0], 3: sides[1]},)},
        ),
        "dense": (Model(DenseStep(4, 4, hidden=8), norm), torch.randn(2, 4), None),
    }
    others = {"conv": torch.randn(3, 2, 7, 4)}
    kept = {}
    for name, (model, z, dynamic) in models.items():
        program = exported(model, z, dynamic=dynamic)
        torch.export.save(program, folder / f"{name}.pt2")
        other = others.get(name, torch.randn(5, 4))
        torch.save((other, [t.detach() for t in model(other)]), folder / f"{name}.pt")
        kept[name] = program, model, other
    return folder, kept


LOADED = """
import sys, torch
folder, library, *names = sys.argv[1:]
if library:
    torch.ops.load_library(library)
for name in names:
    z, (x, status, iterations, *_) = torch.load(f"{folder}/{name}.pt")
    found = torch.export.load(f"{folder}/{name}.pt2").module()(z)
    torch.testing.assert_close(found[0], x, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], status) and torch.equal(found[2], iterations), name
assert "fpi_cuda" not in sys.modules
"""


@pytest.mark.parametrize(
    "library, names",
    [("", ["net", "energy", "conv"]), (fpi_cuda.build_info()["libraries"][0], ["dense"])],
    ids=["alone", "library"],
)
def test_a_saved_program_runs_where_the_package_is_not(saved, library, names):
    command = [sys.executable, "-c", LOADED, str(saved[0]), library, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=saved[0], check=False)
    assert done.returncode == 0, done.stderr


def operators(program, body=False):
    """The operators of a program, those of its loops' bodies or all others."""
    graphs = [m for n, m in program.graph_module.named_modules() if ("body" in n) == body]
    return [str(n.target) for m in graphs for n in m.graph.nodes]


def test_what_the_programs_hold(saved):
    programs = {name: program for name, (program, _, _) in saved[1].items()}
    dense = operators(programs["dense"])
    assert any("_dense_solve" in t for t in dense) and not any("while_loop" in t for t in dense)
    # What z gives is outside of the loop, and so is a parametrisation.
    assert sum("conv" in t for t in operators(programs["conv"], body=True)) == 2
    assert not any(
        ".mv." in t or "linalg_vector_norm.default_1" in t
        for t in operators(programs["net"], body=True)
    )


def test_no_gradient_flows_and_nothing_traced_stays(saved):
    for name in ("net", "dense"):
        program, model, z = saved[1][name]
        z = z.clone().requires_grad_()
        for p in (program, program.run_decompositions()):
            x, *_ = p.module()(z)
            # Of what is around the layer alone.
            assert x.requires_grad == (name == "net")
            if name == "net":
                (gradient,) = torch.autograd.grad(x.sum(), z, allow_unused=True)
                assert gradient is None
        assert type(model.layer.last.x) is torch.Tensor  # of the eager call after
    fresh = Model(DenseStep(4, 4), warm=True)
    exported(fresh, torch.randn(2, 4))
    assert fresh.layer.last is None and not fresh.layer.warm.hits + fresh.layer.warm.misses


def test_attention_without_dropout_draws_no_random_numbers():
    heads = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
    heads.eval()
    g = lambda x, z: 0.2 * heads(x, x, x, need_weights=False)[0] + z  # noqa: E731
    model = Model(g, solver=Picard())
    dynamic = {"inputs": ({0: B, 1: torch.export.Dim("T", min=2)},)}
    program = exported(model, torch.randn(2, 3, 4), dynamic=dynamic).module()
    assert_same(program, model, torch.randn(3, 5, 4))


def test_each_export_begins_with_the_last_eager_solution():
    class Continued(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = FixedPointLayer(STEP)

        def forward(self, z):
            last = self.layer.last
            return self.layer(z, x0=None if last is None else last.x)

    model, z = Continued(), torch.randn(2, 4)
    for _ in range(2):  # not with what the export before traced
        torch.export.export(model, (z,))
    assert model.layer.last is None


def test_a_model_on_the_meta_device():
    layer = FixedPointLayer(DenseStep(4, 4).to("meta"), solver=Picard())
    program = torch.export.export(layer, (torch.empty(2, 4, device="meta"),))
    assert any("while_loop" in t or "_dense_solve" in t for t in operators(program))


class Dropped(nn.Module):
    def forward(self, x, z):
        return 0.5 * nn.functional.dropout(x, 0.1, training=True) + z


class Branching(nn.Module):
    def forward(self, x, z):
        return 0.5 * x + z if x.sum() > 0 else z


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x, z):
        return 0.5 * torch.tanh(self.norm(x)) + z


NORM = nn.BatchNorm1d(4)
STEP = DenseStep(4, 4)
REFUSED = {
    "trace": ({"trace": True}, None, "trace=True can't be exported"),
    "callback": ({"callback": print}, None, "can't call Python"),
    "raise": ({"on_failure": "raise"}, None, "return layer.last.status"),
    "graph": ({"driver": "graph"}, None, 'export with driver="auto"'),
    "triton": ({"backend": "triton"}, None, 'export with backend="auto"'),
    "training": ({}, lambda x, z: 0.5 * NORM.train()(x) + z, "call model.eval"),
    "writing": ({}, lambda x, z: x.mul_(0.5) + z, "write x \\* 2"),
    "random": ({}, Dropped(), "must not draw random numbers"),
    "branching": ({}, Branching(), "write torch.where or torch.cond"),
    "nested": (
        {},
        lambda x, z: fixed_point(lambda y, x: 0.1 * y + x, x, x).x * 0.5 + z,
        "a loop within a loop|no loop within",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_exported_says_so(name):
    options, g, message = REFUSED[name]
    model = FixedPointLayer(g or STEP, **options)
    with pytest.raises(Exception) as caught:
        torch.export.export(model, (torch.randn(2, 4),), strict=False)
    said = "\n".join((str(caught.value), *getattr(caught.value, "__notes__", ())))
    assert re.search(message, said), said
    assert "RecursionError" not in said


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # `last`
@pytest.mark.parametrize("g", [STEP, Normed()], ids=["dense", "net"])
def test_strict_export_takes_a_layer(g):
    model = Model(g, solver=Picard()).eval()
    inputs = (torch.randn(2, 4),)
    program = torch.export.export(model, inputs, dynamic_shapes=DYNAMIC, strict=True).module()
    assert model.layer.last is None
    assert_same(program, model, torch.randn(5, 4))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_strict_export_sees_autocast():
    class Cast(Model):
        def forward(self, z):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(z)

    model, inputs = Cast(STEP, solver=Picard(0.8)).eval(), (torch.randn(2, 4),)
    program = torch.export.export(model, inputs, dynamic_shapes=DYNAMIC_Z, strict=True).module()
    z = torch.randn(5, 4)
    (x, status, _, _, error), expected = program(z), model(z)
    torch.testing.assert_close(x, expected[0].detach(), rtol=0.02, atol=0.02)
    # Where it ends is bfloat16's tolerance, and what the estimate covers its rounding.
    assert torch.equal(status, expected[1])
    rounding = torch.finfo(torch.bfloat16).eps / 2 * torch.linalg.vector_norm(x, dim=1)
    for estimate in (error, expected[4]):
        assert (estimate >= 0.9 * rounding).all()


def test_strict_export_refuses_the_function_by_name():
    class Direct(nn.Module):
        def forward(self, z):
            return fixed_point(lambda x, z: 0.5 * x + z, z, z).x

    with pytest.raises(Exception, match="strict=False"):
        torch.export.export(Direct(), (torch.randn(2, 4),), strict=True)


def test_jit_trace_is_refused_by_name():
    frozen = FixedPointLayer(STEP).requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"use torch\.export\.export"):
        torch.jit.trace(frozen, torch.randn(2, 4))
    old = fpi_cuda.compat.FixedPointIteration(lambda x, y: (0.5 * x[0] + y[0],))
    with pytest.raises(RuntimeError, match=r"use torch\.export\.export"):
        torch.jit.trace(lambda z: old((z,), (z,))[0], torch.randn(2, 4))
