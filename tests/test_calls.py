"""What a layer's call may give g beside its inputs: shared tensors, keywords, None, anything."""

import functools
import gc
import types
import warnings
import weakref

import pytest
import torch
from helpers import unroll
from helpers_layers import EXACT, close, double
from tape import captures, tape_fixture  # noqa: F401
from torch import nn
from torch.autograd import grad

from fpi_cuda import (
    FixedPointLayer,
    GradientStep,
    NeuralStep,
    Picard,
    Tolerance,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Listening(nn.Module):
    """A g that takes all that people give a g."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3).double()

    def forward(self, x, z, scale, weight, u=None, *, mask=None, extra=None, t=1.0):
        y = 0.3 * torch.tanh(self.inner(x) @ weight) + t * z
        if scale is not None:
            y = scale * y
        if u is not None:
            y = y + u
        if mask is not None:
            y = y * mask
        if extra is not None:
            y = y + extra["shift"][0]
        return y


def second(x, tensors):
    first = grad(x.sin().sum(), tensors, create_graph=True, allow_unused=True)
    total = sum(t.square().sum() for t in first if t is not None)
    return first, grad(total, tensors, allow_unused=True)


@pytest.mark.parametrize("per_sample", ["auto", True, False])
def test_all_that_a_call_gives_reaches_g_and_gets_its_gradients(per_sample):
    g = Listening()
    z, mask = double(5, 3).requires_grad_(), torch.rand(5, 3).double().requires_grad_()
    weight, shift = double(3, 3).requires_grad_(), double(3).requires_grad_()
    named = {"mask": mask, "extra": {"shift": [shift, 7], "none": None}, "t": 0.5}
    x = FixedPointLayer(g, per_sample=per_sample, **EXACT)(z, None, params=(weight,), **named)
    true = unroll(lambda x: g(x, z, None, weight, **named), torch.zeros(5, 3).double(), steps=80)
    close(x, true)
    tensors = (z, mask, weight, shift, *g.parameters())
    for mine, right in zip(second(x, tensors), second(true, tensors), strict=True):
        for a, b in zip(mine, right, strict=True):
            close(a, b)


def test_positional_values_keep_their_places_between_the_inputs():
    seen = []

    def g(x, *args):
        seen.append([a if not isinstance(a, torch.Tensor) else tuple(a.shape) for a in args])
        return 0.5 * x + args[0]

    z = torch.ones(4, 2)
    FixedPointLayer(g)(z, "mean", torch.zeros(4, 7), None, params=(torch.zeros(5),))
    assert all(args == [(4, 2), "mean", (4, 7), None, (5,)] for args in seen)
    assert seen


def test_samples_that_ended_are_left_out_unless_a_named_tensor_has_a_row_for_each():
    """Edges and masks of any other size cost nothing; one with B rows is never cut."""
    b = 16
    rate = torch.linspace(0.05, 0.95, b)[:, None]
    sizes = []

    def g(x, z, rate=None, shift=None, mask=None):
        sizes.append(len(x))
        y = (rate if mask is None else mask) * x + z
        return y if shift is None else y + shift

    z = torch.ones(b, 2)
    layer = FixedPointLayer(g, solver=Picard(), per_sample=True, max_iterations=500)
    layer(z, rate, shift=torch.zeros(3, 2).sum(0))
    assert min(sizes) < b
    by_position = layer.last.x
    sizes.clear()
    layer(z, mask=rate)
    assert set(sizes) == {b}
    close(layer.last.x, by_position)
    assert layer.last.converged.all()


def test_a_graph_by_its_edges():
    """The commonest second argument of a graph layer: integers, [2, edges], by name."""
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    w = nn.Linear(3, 3).double()

    def g(x, z, edge_index, norm=None):
        pulled = torch.zeros_like(x).index_add(0, edge_index[1], w(x)[edge_index[0]])
        return 0.4 * torch.tanh(pulled) + z

    z = double(4, 3).requires_grad_()
    layer = FixedPointLayer(g, per_sample=False, **EXACT)
    x = layer(z, edge_index=edges)
    true = unroll(lambda x: g(x, z, edges), torch.zeros(4, 3).double(), steps=80)
    for a, b in zip(
        grad(x.sin().sum(), (z, *w.parameters())),
        grad(true.sin().sum(), (z, *w.parameters())),
        strict=True,
    ):
        close(a, b)
    with pytest.raises(ValueError, match=r"inputs\[1\] must have the batch size 4 .* by its name"):
        layer(z, edges)


@pytest.mark.parametrize("given", ["name", "params", "object"])
@pytest.mark.parametrize("per_sample", ["auto", True])
def test_integers_that_number_samples_keep_all_in_the_batch(given, per_sample):
    """In a part of it they number others, which are there: no error says so."""

    def g(x, z, edges):
        if isinstance(edges, types.SimpleNamespace):
            edges = edges.of
        pulled = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
        return z * torch.tanh(x) + 0.03 * torch.tanh(pulled) + 1

    z = torch.full((16, 2), 0.9).double()
    z[:6] = 0.01  # these end first
    layer = FixedPointLayer(g, solver=Picard(), per_sample=per_sample, **EXACT)
    none = torch.zeros(2, 0, dtype=torch.long)
    for edges in (none, none, none, none, none, torch.tensor([[0, 1, 2], [0, 1, 2]])):
        if given == "params":
            x = layer(z, params=(edges,))
        else:
            x = layer(z, edges=edges if given == "name" else types.SimpleNamespace(of=edges))
        close(x, unroll(lambda x: g(x, z, edges), torch.zeros(16, 2).double(), steps=400))  # noqa: B023


def test_named_tensors_are_mapped_by_vmap():
    layer = FixedPointLayer(lambda x, z, *, w: 0.5 * torch.tanh(x @ w) + z, **EXACT)
    z, w = double(3, 2), double(4, 2, 2) / 3
    together = torch.vmap(lambda w: layer(z, w=w))(w)
    close(together, torch.stack([layer(z, w=each) for each in w]))
    mine = torch.func.jacrev(lambda w: layer(z, w=w).sum())(w[0])
    close(mine, torch.autograd.functional.jacobian(lambda w: layer(z, w=w).sum(), w[0]))


def test_a_tensor_in_an_object_of_the_users_gets_first_derivatives_and_no_more():
    class Graph:
        def __init__(self, weight):
            self.weight = weight

    w = (double(3, 3) / 4).requires_grad_()
    z = double(2, 3)
    layer = FixedPointLayer(lambda x, z, graph: torch.tanh(x @ graph.weight) + z, **EXACT)
    x = layer(z, graph=Graph(w))
    true = unroll(lambda x: torch.tanh(x @ w) + z, torch.zeros(2, 3).double(), steps=100)
    close(grad(x.sin().sum(), w)[0], grad(true.sin().sum(), w)[0])
    named = r"captures a tensor that needs gradients \(graph.weight of shape \(3, 3\)\)"
    with pytest.raises(RuntimeError, match=named):
        grad(layer(z, graph=Graph(w)).sum(), w, create_graph=True)


@pytest.mark.parametrize("step", [False, True])
def test_a_node_holds_what_a_call_named_as_saved_tensors_alone(step):
    """So that a backward frees them, and saved_tensors_hooks may move them elsewhere."""

    def energy(x, z, none, *, m):
        return (x**2 / 2 - x * z * m).sum(1)

    g = GradientStep(energy, 0.5) if step else lambda x, z, none, *, m: 0.5 * torch.tanh(x) * m + z
    z, m = (double(4, 3).requires_grad_().clone() for _ in range(2))
    alive = weakref.ref(z), weakref.ref(m)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        x = FixedPointLayer(g)(z, None, m=m)
    del z, m
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    x.sum().backward()


def test_a_buffer_moves_once_a_call_with_keywords_too():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x, z, *, scale):
            self.seen = scale
            return scale * torch.tanh(x) + self.norm(z)

    layer = FixedPointLayer(Counting())
    layer(torch.randn(6, 3), scale=0.3)
    assert layer.g.norm.num_batches_tracked == 1
    assert layer.g.seen == 0.3


def test_a_module_by_keyword_is_gs_own_in_that_call():
    """Its weights and mode are those of the call, whatever happens to it before the backward."""
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    z = double(6, 3).requires_grad_()
    layer = FixedPointLayer(lambda x, z, *, net: 0.1 * torch.tanh(net(x)) + z, **EXACT)
    twin = FixedPointLayer(lambda x, z: 0.1 * torch.tanh(net(x)) + z, **EXACT)
    tensors = (z, *net.parameters())

    def solved(layer, **named):
        net.train()
        before = int(net[1].num_batches_tracked)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # batch norm couples the samples
            x = layer(z, **named)
        assert net[1].num_batches_tracked == before + 1
        net.eval()
        return second(x, tensors)

    for mine, right in zip(solved(layer, net=net), solved(twin), strict=True):
        for a, b in zip(mine, right, strict=True):
            close(a, b)


def test_a_container_without_tensors_is_the_callers_own():
    notes, z = [], torch.ones(2, 3)

    def g(x, z, *, notes, weights):
        notes.append(len(x))
        return 0.5 * x + weights["w"] * z

    FixedPointLayer(g)(z, notes=notes, weights={"w": torch.tensor(2.0)})
    assert set(notes) == {2}


def test_a_solver_style_call_says_how_a_layer_is_called():
    with pytest.raises(
        TypeError, match=r"got the callable 'func'\); give g where the layer is made"
    ):

        def func(x):
            return x

        FixedPointLayer(func)(func, torch.zeros(2, 3))


def test_fixed_point_takes_no_keywords_for_g():
    with pytest.raises(TypeError, match="edge_index"):
        fixed_point(lambda x, edge_index: x, torch.zeros(2, 3), edge_index=torch.zeros(2, 3))
    g = functools.partial(lambda x, *, t: t * x + 1, t=0.5)
    assert torch.allclose(fixed_point(g, torch.zeros(2, 3)).x, torch.full((2, 3), 2.0), atol=1e-3)


def test_a_tuple_state_taken_one_by_one_says_that_it_is_one_argument():
    with pytest.raises(TypeError) as caught:
        fixed_point(lambda a, b: (a, b), [torch.zeros(2, 3), torch.zeros(2, 1)])
    assert "one tuple of 2 tensors" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match=r"lambda x, \*u: g\(x, u\)"):
        fixed_point(lambda x, u: x, torch.zeros(2, 3), (torch.zeros(2, 3),))


def test_a_graph_follows_what_a_call_names(tape):
    def g(x, z, *, t, w):
        return t * torch.tanh(x) + w + z

    z, w, v = double(4, 3), double(3), double(3)
    eager, layer = (
        FixedPointLayer(g, driver=driver, per_sample=True, **EXACT) for driver in ("eager", "graph")
    )
    for named, captured in (
        ({"t": 0.5, "w": w}, 1),
        ({"t": 0.5, "w": v}, 1),
        ({"t": 0.25, "w": v}, 2),
    ):
        close(layer(z, **named), eager(z, **named))
        assert ", graph" in layer.last.path
        assert captures() == captured


# --- tolerance and limit of one call, and of eval mode -----------------------------------------


def test_a_call_may_have_a_tolerance_and_a_limit_of_its_own():
    layer = FixedPointLayer(lambda x, z: 0.9 * x + z, solver=Picard(), on_failure="return")
    z = torch.ones(3, 2)
    layer(z, tolerance=Tolerance(1e-2))
    few = layer.last.iterations.max()
    layer(z, tolerance=Tolerance(1e-4))
    assert layer.last.iterations.min() > few
    layer(z, max_iterations=3)
    assert layer.last.iterations.tolist() == [3, 3, 3]
    layer(z)
    assert layer.last.converged.all()


def test_eval_mode_iterates_longer_to_a_tighter_tolerance():
    layer = FixedPointLayer(
        lambda x, z: 0.9 * x + z,
        solver=Picard(),
        max_iterations=50,
        tolerance=Tolerance(1e-2, 0),
        eval_factor=100,
    )
    z = torch.ones(3, 2).double()
    layer(z)
    trained = layer.last
    layer.eval()(z)
    evaluated = layer.last
    assert trained.converged.all()
    assert evaluated.converged.all()
    # The residual falls by 0.9 an iteration: by 100 in ln 100 / ln (1 / 0.9) = 43.7.
    assert set((evaluated.iterations - trained.iterations).tolist()) <= {43, 44}
    layer(z, tolerance=Tolerance(1e-2, 0))  # what a call says holds as it is
    assert torch.equal(layer.last.iterations, trained.iterations)
    for wrong in (0, -1, float("inf"), "2", torch.tensor(2.0)):
        with pytest.raises(ValueError, match=r"eval_factor must be a finite number > 0"):
            FixedPointLayer(torch.tanh, eval_factor=wrong)


def test_eval_mode_says_what_is_wrong_as_training_does():
    layer, z = FixedPointLayer(lambda x, z: 0.9 * x + z, eval_factor=2).eval(), torch.ones(3, 2)
    with pytest.raises(TypeError, match=r"x0 must be a tensor or a tuple, .* \(got set\)"):
        layer(z, x0={z})
    with pytest.raises(TypeError, match=r"x0 must be float64, .* \(got torch.int64\)"):
        layer(z, x0=z.long())
    layer.tolerance = 1e-3
    with pytest.raises(TypeError, match=r"tolerance must be a Tolerance \(got 0.001\)"):
        layer(z)


@pytest.mark.parametrize("kind", ["net", "energy"])
def test_the_papers_steps_hand_on_what_a_call_gives(kind):
    w = (double(3, 3) / 4).requires_grad_()
    z, mask = double(4, 3).requires_grad_(), torch.rand(4, 3).double().requires_grad_()

    class Net(nn.Module):
        def forward(self, x, z, power, *, mask, w):
            return mask * torch.tanh(x @ w) ** power + z

    def attracted(x, z, power, *, mask, w):
        return (x**power / power - mask * (x @ w).cos().mean(1, keepdim=True) - x * z).sum(1)

    if kind == "net":
        step, power = NeuralStep(Net()), 1
        true = unroll(lambda x: mask * torch.tanh(x @ w) + z, torch.zeros(4, 3).double(), steps=100)
    else:
        step, power = GradientStep(attracted, 0.5), 2

        def descend(x):
            energy = attracted(x, z, 2, mask=mask, w=w).sum()
            return x - 0.5 * grad(energy, x, create_graph=True)[0]

        true = unroll(descend, torch.zeros(4, 3).double().requires_grad_(), steps=100)
    x = FixedPointLayer(step, **EXACT)(z, power, mask=mask, w=w)
    close(x, true)
    tensors = (z, mask, w)
    for mine, right in zip(second(x, tensors), second(true, tensors), strict=True):
        for a, b in zip(mine, right, strict=True):
            close(a, b)
