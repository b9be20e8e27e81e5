"""The route of a solve: solvers, adjoints and drivers are whatever has the methods."""

import dataclasses
import pickle

import pytest
import torch
from tape import problem, tape_fixture  # noqa: F401

from fpi_cuda import DenseStep, FixedPointLayer, ImplicitAdjoint, Picard, Tolerance, fixed_point
from fpi_cuda._torch import tree_leaves
from fpi_cuda.drivers import Support, captured, eager, graph
from fpi_cuda.record import TRAIL, Limits
from fpi_cuda.solve import linear, node, route
from fpi_cuda.solve.problem import Report


class Mine:
    """A solver of a user's: damped, and no subclass of anything."""

    history, patience = 1, 10
    started = 0

    def start(self, backend, progress, x):
        type(self).started += 1
        trail = x.new_empty(len(x), TRAIL, x.shape[1])
        return lambda x, gx: backend.picard_step(progress, x, gx, 0.8, trail)

    def contraction(self, ring, iterations):
        return Picard(0.8).contraction(ring, iterations)


class Truncated:
    """An adjoint of a user's: so many terms of the Neumann series, by an ordinary object."""

    failed = "mask"

    def __init__(self, terms):
        self.terms = terms

    def attach(self, problem, x0, tensors, report):
        return node.attach(problem, x0, tensors, report)

    def transposed(self, problem):
        options = ImplicitAdjoint(Picard(), Tolerance(0, 0), self.terms)
        return options.transposed(problem)


def g(x, z):
    return 0.5 * torch.tanh(x) + z


def test_a_solver_is_what_has_its_methods():
    z = problem().requires_grad_()
    before = Mine.started
    ours, expected = (fixed_point(g, z.detach() * 0, z, solver=s) for s in (Mine(), Picard(0.8)))
    assert torch.equal(ours.x, expected.x)
    assert torch.equal(ours.contraction, expected.contraction)
    grads = [torch.autograd.grad(s.x.sum(), z)[0] for s in (ours, expected)]
    assert torch.equal(*grads)
    assert Mine.started == before + 2  # forward, and the adjoint by the forward's solver
    with pytest.raises(TypeError, match="solver must be Picard"):
        fixed_point(g, z.detach() * 0, z, solver=Mine)  # the class


def test_a_kernel_refuses_a_solver_that_it_does_not_know():
    layer = FixedPointLayer(DenseStep(3, 3), solver=Mine())
    layer(torch.randn(2, 3))
    assert layer.last.path == "native, eager (not whole: the kernel has no Mine), whole batch"


@pytest.mark.parametrize("terms", [1, 3])
def test_an_adjoint_is_what_has_its_methods(terms):
    z = problem().requires_grad_()
    s = fixed_point(g, z.detach() * 0, z, adjoint=Truncated(terms), tolerance=Tolerance(1e-12, 0))
    (grad,) = torch.autograd.grad(s.x.sum(), z)
    slope = 0.5 * (1 - torch.tanh(s.x.detach()) ** 2)
    torch.testing.assert_close(grad, sum(slope**k for k in range(terms + 1)))


def test_the_path_says_why_an_earlier_driver_did_not_take_the_solve():
    asked = []

    class Never:
        def support(self, solve, because):
            asked.append(type(solve).__name__)
            return Support(reason="not today")

    made = []

    class Noting(ImplicitAdjoint):
        def attach(self, problem, x0, tensors, report):
            made.append(problem._replace(drivers=(Never(), eager)))
            return super().attach(made[0], x0, tensors, report)

    z = problem().requires_grad_()
    s = fixed_point(g, z.detach() * 0, z, adjoint=Noting())
    s.x.sum().backward()
    assert asked == ["Forward", "Backward"]
    for record in (s, s.adjoint):
        assert record.path.startswith("native, eager (not today), ")
    with pytest.raises(AttributeError):
        made[0].name = "another"  # frozen


def test_a_problem_is_the_same_after_its_solve():
    held = []

    class Holding(ImplicitAdjoint):
        def attach(self, problem, x0, tensors, report):
            held.append((problem, x0, tensors))
            return super().attach(problem, x0, tensors, report)

    z = problem()
    first = fixed_point(g, z * 0, z, adjoint=Holding())
    again = route.solve(linear.direction_of(*held[0]), Report())
    assert torch.equal(first.x, again[0])


@pytest.mark.parametrize("strict", [True, False])
def test_a_fault_of_the_package_while_capturing_is_raised_where_asked(tape, monkeypatch, strict):
    def broken(*_):
        raise TypeError("a fault")

    monkeypatch.setattr(graph, "STRICT", strict)
    monkeypatch.setattr(captured.Request, "around", broken)
    monkeypatch.setattr(graph, "_of_this_package", lambda error: "a fault" in str(error))
    z = problem()

    def step(x, z):
        return 0.5 * x + z

    if strict:
        with pytest.raises(TypeError, match="a fault"):
            fixed_point(step, z * 0, z, driver="graph")
    else:
        with pytest.warns(UserWarning, match="runs eagerly: a fault"):
            fixed_point(step, z * 0, z, driver="graph")


def test_only_lines_of_the_package_count_as_its_own():
    try:
        dataclasses.fields(3)
    except TypeError as error:
        assert not graph._of_this_package(error)
    try:
        Picard(beta=5)
    except ValueError as error:
        assert graph._of_this_package(error)


def test_torch_func_sees_one_object_where_a_node_takes_a_problem():
    """A tuple would be walked into by each of its transforms, at each call."""
    call = node._Call(None, Report())
    assert tree_leaves(call) == [call]


def test_a_record_of_an_older_pickle_loads():
    """Limits were made without arguments and then filled in."""
    limits = object.__new__(Limits)
    vars(limits).update(rtol=0.1, offset=0.0, rounding=0.0, patience=1, max_iterations=2)
    assert pickle.loads(pickle.dumps(limits)) == limits == Limits(0.1, 0.0, 0.0, 1, 2)


@pytest.mark.parametrize("way", [torch.func.grad, torch.func.jacrev])
def test_a_closure_tensor_that_needs_gradients_is_refused_by_name_under_torch_func(way):
    w = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)

    def f(z):
        return fixed_point(lambda x, z: torch.tanh(w * x) + z, z * 0, z).x.square().sum()

    with pytest.raises(RuntimeError, match=r"needs gradients .* torch\.func"):
        way(f)(problem())
