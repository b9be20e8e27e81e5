"""`Solution.residual_at_x`: g once more at the x that a solve returned, when somebody asks."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import Counter, contraction
from tape import tape_fixture  # noqa: F401
from torch import nn

from fpi_cuda import (
    Anderson,
    DenseStep,
    FixedPointError,
    FixedPointLayer,
    Picard,
    Tolerance,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")

GONE = r"residual_at_x evaluates g once more at x, but {} is gone: .*Hold on to them"
WRITTEN = r"residual_at_x evaluates .*, but {} was written to since .*ask for it before"


def sine(x, z):
    return 0.8 * torch.sin(x) + z


def inputs(b=3, n=4):
    return torch.rand(b, n, dtype=torch.float64)


def norm(y, x):
    return (y - x).flatten(1).norm(dim=1)


def test_it_is_that_of_x_itself_and_costs_one_call(backend, solver, dtype):
    z = inputs().to(dtype)
    g = Counter(sine)
    s = fixed_point(g, torch.zeros_like(z), z, solver=solver, backend=backend)
    calls = g.calls
    assert s.evaluations == calls
    found = s.residual_at_x
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    torch.testing.assert_close(found, norm(sine(s.x, z).to(acc), s.x.to(acc)), rtol=1e-5, atol=0)
    assert found.dtype == s.residual_norm.dtype and not found.requires_grad
    assert s.residual_at_x is found and s.detach().residual_at_x is found
    assert g.calls == s.evaluations == s.record.evaluations == calls + 1


def test_where_g_expands_it_is_above_the_residual_that_passed():
    a = torch.full((2, 1), -2.5, dtype=torch.float64)

    def g(x, a):
        return a * x + 1

    s = fixed_point(g, torch.full_like(a, 0.29), a, tolerance=Tolerance(0.2), solver=Picard())
    assert s.converged.all()
    torch.testing.assert_close(s.residual_at_x, 2.5 * s.residual_norm)


def test_it_shares_nothing_with_the_driver_that_solved(tape, solver):
    def kept(x, z):  # graphs are kept with it
        return sine(x, z)

    z, step = inputs(), DenseStep(4, None).double()
    with torch.no_grad():
        step.state_weight.copy_(contraction(4, 0.9))
    for g, options in (
        (kept, {"driver": "graph", "per_sample": True}),
        (step, {"driver": "whole"}),
        (sine, {"driver": "eager", "per_sample": False}),
    ):
        s = fixed_point(g, torch.zeros_like(z), z, solver=solver, **options)
        assert options["driver"] in s.path or "one system" in s.path
        torch.testing.assert_close(s.residual_at_x, norm(g(s.x, z), s.x).detach())


def test_of_one_system_it_is_on_the_whole_batch():
    z = inputs()

    def g(x, z):
        return 0.5 * torch.sin(x) + 0.2 * x.mean(0) + z

    s = fixed_point(g, torch.zeros_like(z), z, per_sample=False)
    torch.testing.assert_close(s.residual_at_x, norm(g(s.x, z), s.x))


def test_tuples_and_shared_tensors():
    z, w = inputs(), contraction(4, 0.7)

    def g(x, z, w):
        y = torch.tanh(torch.cat([x[0], x[1].flatten(1)], 1) @ w.mT + z)
        return y[:, :3], y[:, 3:].reshape(-1, 1, 1)

    x0 = (torch.zeros(3, 3).double(), torch.zeros(3, 1, 1).double())
    s = fixed_point(g, x0, z, params=[w])
    y = torch.cat([t.flatten(1) for t in g(s.x, z, w)], 1)
    torch.testing.assert_close(s.residual_at_x, norm(y, torch.cat([t.flatten(1) for t in s.x], 1)))
    w.mul_(2)
    assert s.residual_at_x is s.residual_at_x
    s = fixed_point(g, x0, z, params=[w / 2])
    with pytest.raises(RuntimeError, match=GONE.format(r"params\[0\]")):
        _ = s.residual_at_x


def test_empty_and_failed_samples():
    assert fixed_point(torch.sin, torch.zeros(0, 3)).residual_at_x.shape == (0,)
    assert fixed_point(torch.sin, torch.zeros(2, 0)).residual_at_x.tolist() == [0, 0]
    z = torch.tensor([[1.0], [torch.nan]])
    s = fixed_point(sine, torch.zeros(2, 1), z, on_failure="return")
    assert s.residual_at_x[1].isnan() and s.residual_at_x[0] < 1e-3


# --- what a layer's call gives g ----------------------------------------------------------------


def test_arguments_of_every_kind():
    inner, z, scale = nn.Linear(4, 4).double(), inputs(), inputs()[:1]

    class Held:
        shift = 0.25

    def g(x, z, kind, w, *, scale, parts, net, held):
        assert kind == "tanh" and parts["n"] == 2
        return 0.3 * scale * torch.tanh(net(x) @ w) + z + parts["t"][0] + held.shift

    w, more, held = contraction(4, 0.5), [torch.ones(4).double()], Held()
    named = {"scale": scale, "parts": {"t": more, "n": 2}, "net": inner, "held": held}
    layer = FixedPointLayer(g)
    with torch.no_grad():
        layer(z, "tanh", params=(w,), **named)
        last = layer.last
        torch.testing.assert_close(
            last.residual_at_x, norm(g(last.x, z, "tanh", w, **named), last.x)
        )
        layer(z, "tanh", params=(w,), **named | {"held": Held()})
        with pytest.raises(RuntimeError, match=GONE.format("an argument of g")):
            _ = layer.last.residual_at_x


class Norms(nn.Module):
    """Buffers that move, computed weights, modes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x, z):
        return 0.3 * torch.tanh(self.norm(self.linear(x))) + z + self.shift


@pytest.mark.parametrize("training", [True, False])
def test_modules_buffers_are_those_that_the_solve_left(training):
    g = Norms().double().train(training)
    z = inputs(8).requires_grad_()
    layer = FixedPointLayer(g, per_sample=not training)
    layer(z)
    before = copy.deepcopy(g.state_dict())
    found = layer.last.residual_at_x
    for name, t in g.state_dict().items():
        assert torch.equal(t, before[name]), "as they were"
    with torch.no_grad():
        torch.testing.assert_close(found, norm(g(layer.last.x, z), layer.last.x))


def forget(g):
    g.shift = g.shift.clone()


CHANGES = {
    "parameter": (lambda g: g.norm.weight.detach().add_(1), "a parameter or buffer .* was written"),
    "buffer": (lambda g: g.shift.add_(1), "a parameter or buffer .* was written"),
    "mode": (lambda g: g.train(), "other modules, modes or tensors"),
    "other": (forget, "other modules, modes or tensors"),
    "module": (lambda g: setattr(g, "norm", nn.Identity()), "other modules, modes or tensors"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_module_that_changed_is_refused(name):
    g, z = Norms().double().eval(), inputs()
    change, message = CHANGES[name]
    s = fixed_point(g, torch.zeros_like(z), z)
    change(g)
    with pytest.raises(RuntimeError, match=f"{message}.*ask for it before"):
        _ = s.residual_at_x


def test_autocast_is_the_solves():
    net, z = nn.Linear(4, 4), torch.rand(3, 4)

    def g(x, z):
        return 0.3 * torch.tanh(net(x)) + z

    with torch.no_grad():
        plain = fixed_point(g, torch.zeros_like(z), z)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            s = fixed_point(g, torch.zeros_like(z), z, tolerance=Tolerance(0.3))
            expected = norm(g(s.x, z).float(), s.x)
            assert plain.residual_at_x.max() < 1e-3
        assert not torch.equal(expected, norm(g(s.x, z), s.x))
        torch.testing.assert_close(s.residual_at_x, expected)


# --- nothing is kept alive, and nothing is silently wrong ---------------------------------------


@pytest.mark.parametrize("graph", [False, True])
def test_a_solution_keeps_no_more_alive_than_its_graph_does(graph):
    def solve(layer):
        z, big = inputs().requires_grad_(graph), torch.ones(4)

        def g(x, z):
            return sine(x, z) + 0 * big

        held = [weakref.ref(t) for t in (z, big, g)]
        if layer is None:
            return fixed_point(g, torch.zeros_like(z), z), held
        layer.g = None
        layer.g = g
        layer(z)
        layer.g = None
        return layer.last, held

    gc.disable()
    try:
        s, held = solve(None)
        alive = [graph] * 3
        assert [t() is not None for t in held] == alive
        if graph:
            assert s.residual_at_x.max() < 1e-3
            return
        with pytest.raises(RuntimeError, match=GONE.format("g")):
            _ = s.residual_at_x
        kept, held = solve(FixedPointLayer(sine))
        assert [t() for t in held] == [None] * 3
        with pytest.raises(RuntimeError, match=GONE.format("g")):
            _ = kept.residual_at_x
    finally:
        gc.enable()


def test_a_layer_keeps_no_input_alive():
    layer = FixedPointLayer(sine)
    z = inputs()
    layer(z)
    assert layer.last.residual_at_x.max() < 1e-3
    layer(z)
    gone = weakref.ref(z)
    del z
    assert gone() is None
    with pytest.raises(RuntimeError, match=GONE.format(r"inputs\[0\]")):
        _ = layer.last.residual_at_x


def test_methods_and_temporaries_of_a_graph_are_found():
    class Owner:
        rate = 0.8

        def g(self, x, z):
            return self.rate * torch.sin(x) + z

    owner, z = Owner(), inputs().requires_grad_()
    s = fixed_point(owner.g, torch.zeros_like(z), z * 1)
    torch.testing.assert_close(s.residual_at_x, norm(owner.g(s.x, z), s.x).detach())
    s.x.sum().backward()  # which frees what the graph had saved
    s = fixed_point(owner.g, torch.zeros_like(z), z * 1)
    s.x.sum().backward()
    with pytest.raises(RuntimeError, match=GONE.format(r"inputs\[0\]")):
        _ = s.residual_at_x


@pytest.mark.parametrize("what", [r"inputs\[0\]", r"params\[0\]", "x"])
def test_a_write_since_the_solve_is_no_wrong_answer(what):
    z, w = inputs(), torch.ones(4).double()

    def g(x, z, w):
        return sine(x, z) * w

    s = fixed_point(g, torch.zeros_like(z), z, params=(w,))
    {"x": s.x}.get(what, z if "inputs" in what else w).mul_(1)
    with pytest.raises(RuntimeError, match=WRITTEN.format(what)):
        _ = s.residual_at_x
    with pytest.raises(RuntimeError, match=WRITTEN.format(what)):
        _ = s.detach().residual_at_x


def test_the_output_of_a_layer_may_be_written_to():
    z, layer = inputs(), FixedPointLayer(sine)
    layer(z).zero_()
    torch.testing.assert_close(layer.last.residual_at_x, norm(sine(layer.last.x, z), layer.last.x))


def test_an_error_carries_it():
    z = inputs()
    for solver in (Picard(), Anderson()):
        with pytest.raises(FixedPointError) as error:
            fixed_point(
                sine,
                torch.zeros_like(z),
                z,
                solver=solver,
                max_iterations=2,
                on_failure="raise",
            )
        s = error.value.solution
        torch.testing.assert_close(s.residual_at_x, norm(sine(s.x, z), s.x))


def test_in_inference_mode_nobody_counts():
    with torch.inference_mode():
        z = inputs()
        s = fixed_point(sine, torch.zeros_like(z), z)
    torch.testing.assert_close(s.residual_at_x, norm(sine(s.x, z), s.x))


def test_under_transforms_it_is_refused():
    kept, z = [], inputs()

    def solve(z):
        kept.append(fixed_point(sine, torch.zeros_like(z), z))
        with pytest.raises(RuntimeError, match=r"ran under no torch.func transform"):
            _ = kept[-1].residual_at_x
        return kept[-1].x.sum()

    torch.vmap(solve)(z[None])
    torch.func.grad(solve)(z)
    for s in (*kept, fixed_point(torch.sin, torch.zeros(2, 3, device="meta"))):
        with pytest.raises(RuntimeError, match="not on the meta device"):
            _ = s.residual_at_x


def test_a_copy_has_what_was_found():
    z = inputs()
    for asked in (False, True):
        s = fixed_point(sine, torch.zeros_like(z), z)
        found = asked and s.residual_at_x
        for again in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
            assert torch.equal(again.x, s.x)
            if asked:
                assert torch.equal(again.residual_at_x, found)
            else:
                with pytest.raises(RuntimeError, match="before a copy was made"):
                    _ = again.residual_at_x


def test_compiled_code_may_ask():
    layer = FixedPointLayer(sine)

    def of_layer(z):
        return layer(z) + layer.last.residual_at_x[:, None]

    def of_solve(z):
        return 2 * fixed_point(sine, torch.zeros_like(z), z).residual_at_x

    z = inputs()
    for f in (of_layer, of_solve):
        assert torch.equal(torch.compile(f, backend="eager")(z), f(z))
