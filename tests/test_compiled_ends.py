"""Compiled layers: derivatives, what leaves the graph, and what lives how long."""

import contextlib
import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
from helpers import Net
from helpers_compiled import LAYER, MARKS, NET, STEPS, Z, compiled, layer_of, same
from helpers_layers import EXACT, close, double
from torch.autograd import grad

from fpi_cuda import (
    FixedPointLayer,
    ImplicitAdjoint,
    Picard,
    Tolerance,
    fixed_point,
)

pytestmark = MARKS


# --- derivatives -----------------------------------------------------------------------------


def test_a_second_derivative_is_right_or_refused():
    z = Z.clone().requires_grad_()

    def second(f):
        (first,) = grad(f(z).sin().sum(), z, create_graph=True)
        return grad(first.square().sum(), z)[0]

    close(second(compiled(LAYER, "eager")), second(LAYER))
    with pytest.raises(RuntimeError, match="double backward"):
        second(compiled(LAYER))


@pytest.mark.parametrize("step", ["module", "energy"])
def test_kernels_that_are_called_below_autograd_go_back_above(step):
    """There a g evaluated as it is has no gradient, and a step made of one is none."""
    from fpi_cuda import _torch
    from fpi_cuda.compiled.given import registered, taken
    from fpi_cuda.compiled.operators import _adjoint_of, solve
    from fpi_cuda.compiled.plan import plan

    layer = layer_of(STEPS[step]())
    z = Z.clone().requires_grad_()
    x = layer(z)
    parameters = [*layer.parameters()]
    true = grad(x.sin().sum(), (z, *parameters))
    plan(layer)
    own = [m._parameters[name] for m, name in layer._plan.params]
    names = "tolerance", "max_iterations", "sizes", "key"
    given = {"inputs": (Z,), "params": (), **dict.fromkeys(names), "keywords": {}}
    number = registered(taken(given, [], [], []))
    rest = [], [], [], number, 0, True, True, None
    for below in (contextlib.nullcontext, _torch.below_autograd):
        with torch.no_grad(), below():
            found, ticket = solve([torch.zeros_like(Z)], [Z], own, layer._plan.handle, *rest)
            gradients = _adjoint_of([x.cos()], [Z, *own], ticket, [*range(1 + len(own))])
        close(found, x)
        by = dict(zip(map(id, own), gradients[1:], strict=True))
        close(gradients[0], true[0])
        for p, right in zip(parameters, true[1:], strict=True):
            close(by[id(p)], right)


@pytest.mark.filterwarnings("ignore")  # dynamo's, of what it can't trace
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_leave_the_graph(transform):
    def f(z):
        if transform == "grad":
            return torch.func.grad(lambda z: LAYER(z).sin().sum())(z)
        if transform == "vmap":
            return torch.vmap(lambda z: LAYER(z[None])[0])(z)
        return torch.func.jvp(LAYER, (z,), (torch.cos(z),))[1]

    close(torch.compile(f, backend="aot_eager")(Z), f(Z))


def test_checkpoints():
    def f(z):
        from torch.utils.checkpoint import checkpoint

        return checkpoint(LAYER, z, use_reentrant=False).square()

    same(f, [Z], [*NET.parameters()])


def test_gradients_share_no_memory():
    """Of f(x) + y + z both are the adjoint's solution; the graph adds to one in place."""
    layer = layer_of(lambda x, y, z: 0.5 * torch.tanh(x) + y + z)
    same(lambda y, z: layer(y * 1, z * 1) + layer(z * 1, y * 1), [Z, Z + 1])


def test_a_custom_adjoint_keeps_its_tolerance():
    layer = FixedPointLayer(NET, adjoint=ImplicitAdjoint(Picard(), Tolerance(1e-2), failed="use"))
    z, seen = Z.clone().requires_grad_(), []
    for f in (compiled(layer), layer):
        f(z).sum().backward()
        seen.append(layer.last.adjoint.iterations.tolist())
    assert seen[0] == seen[1]


# --- what leaves the graph, and lives ----------------------------------------------------------


@contextlib.contextmanager
def leaves():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fpi_cuda leaves the graph here"):
        yield


def test_what_leaves_the_graph_says_so_and_is_right():
    b = double(3).requires_grad_()
    captured = layer_of(lambda x, z: 0.5 * torch.tanh(x) + z + b)
    for f in (captured, lambda z: fixed_point(NET, torch.zeros_like(z), z, **EXACT).x):
        with leaves():
            compiled(f)(Z)
        (mine,), (true,) = (
            grad(g(Z).sum(), b if f is captured else NET.a.weight)
            for g in (torch.compile(f, backend="aot_eager"), f)
        )
        close(mine, true)
    odd = layer_of(lambda x, z, o: 0.5 * x + z)
    with leaves():
        compiled(lambda z: odd(z, object))(Z)


def test_a_tensor_that_g_comes_to_capture_is_refused():
    held = {"b": torch.zeros(3, dtype=torch.float64)}
    layer = layer_of(lambda x, z: 0.5 * torch.tanh(x) + z + held["b"])
    call = compiled(layer)
    call(Z)
    held["b"] = held["b"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="must not capture a tensor that needs gradients"):
        call(Z)


def test_copies_and_pickles_have_their_own_g():
    layer = layer_of(Net(d=3))
    call = compiled(layer)
    before = call(Z)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        if next(twin.parameters()) is not next(layer.parameters()):
            with torch.no_grad():
                for p in twin.parameters():
                    p.mul_(0.5)
        close(compiled(twin)(Z), twin(Z))
        close(call(Z), before)


def test_a_layer_lives_as_long_as_it_is_held_and_its_gradient_longer():
    import fpi_cuda.compiled  # noqa: F401

    operators = sys.modules["fpi_cuda.compiled.operators"]

    layer = layer_of(Net(d=3))
    z = Z.clone().requires_grad_()
    (true,) = grad(layer(z).sum(), z)
    x = compiled(layer)(z).sum()
    gone = weakref.ref(layer)
    del layer
    torch.compiler.reset()
    gc.collect()
    assert gone() is None
    close(grad(x, z)[0], true)
    kept = len(operators._all_kept)
    y = compiled(LAYER)(z)
    assert len(operators._all_kept) == kept + 1
    del x, y
    gc.collect()
    assert len(operators._all_kept) < kept + 1


def test_shapes_are_known_without_a_solve():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fpi_cuda.compiled.operators import _fake, _fake_adjoint

    with FakeTensorMode():
        x0, ticket, moved = _fake([torch.empty(2, 3)], [], [torch.empty(4)], None, [], [], [0])
        assert (x0.shape, ticket.shape, moved.shape) == ((2, 3), (1,), (4,))
        (g,) = _fake_adjoint([None], [torch.empty(2), torch.empty(3)], ticket, [1])
        assert g.shape == (3,)
