"""`fpi_cuda.bridges.torchdeq`: torchdeq's answers by our solvers, under its options."""

import importlib
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import Counter
from torch import nn

import fpi_cuda
from benchmarks import suites
from benchmarks.suites import bridge as zoo

torchdeq = pytest.importorskip("torchdeq")
bridge = importlib.import_module("fpi_cuda.bridges.torchdeq")

NAMES = ("fpi_anderson", "fpi_picard")
THEIRS = {"fpi_anderson": "anderson", "fpi_picard": "fixed_point_iter"}
TIGHT = {"f_tol": 1e-11, "b_tol": 1e-11, "f_max_iter": 400, "b_max_iter": 400}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch 2.11's, of any sparse tensor: the graph's edges
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


@pytest.fixture(autouse=True)
def nothing_known_of_shapes(monkeypatch):
    monkeypatch.setattr(bridge, "_coupled", {})


def deq_of(solver, **options):
    return torchdeq.get_deq(f_solver=solver, b_solver=solver, **options)


class Tanh(nn.Module):
    """A contraction, and what it depends on."""

    def __init__(self, batch=4, n=6, rate=0.7):
        super().__init__()
        w = torch.randn(n, n, dtype=torch.float64)
        self.w = nn.Parameter(w * (rate / torch.linalg.matrix_norm(w, 2)))
        self.u = torch.randn(batch, n, dtype=torch.float64)
        self.x0 = torch.zeros_like(self.u)

    def forward(self, z):
        return torch.tanh(z @ self.w + self.u)


@torch.no_grad()
def residual(f, z):
    return (f(z) - z).flatten(1).norm(dim=1)


# --- the answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ift", "hook_ift"])
@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("kind", zoo.NETS)
def test_nets_of_the_zoos_kinds_have_torchdeqs_state_and_gradient(kind, solver, mode):
    f = zoo.net(kind, torch.float64, tiny=True)
    tight = {"tol": 1e-12, "cap": 1000, "ift": False, mode: True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the graph's rows, told of below
        z = zoo.by_torchdeq(f, solver, **tight)
    true = zoo.by_torchdeq(f, "fixed_point_iter", **tight)
    for part, wanted in zip(z, true, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-9, atol=1e-10)
    wanted = zoo.gradient(f, true)
    torch.testing.assert_close(zoo.gradient(f, z), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", [{"grad": 3, "tau": 0.5}, {"grad": 5, "sup_gap": 2}, {}])
def test_phantom_gradients_are_taken_on_top(options):
    f, out = Tanh(), {}
    for solver in ("fixed_point_iter", "fpi_anderson"):
        z, _ = deq_of(solver, **TIGHT | options)(f, f.x0)
        loss = sum((part**2).sum() for part in z)
        out[solver] = len(z), *torch.autograd.grad(loss, f.w)
    (n, wanted), (m, found) = out.values()
    assert m == n
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("solver", NAMES)
def test_a_sliced_or_indexed_core_gets_its_states(core, solver):
    """Each with a gradient; of Picard, which makes the same iterates, torchdeq's to the bit."""
    f, out = Tanh(rate=0.99), {}
    for name in (solver, THEIRS[solver]):
        deq = deq_of(name, core=core, n_states=3, f_max_iter=12, f_tol=0.0)
        z, _ = deq(f, f.x0)
        assert len(z) == 3 and all(part.requires_grad for part in z)
        out[name] = torch.stack(z)
    if solver == "fpi_picard":
        torch.testing.assert_close(*out.values(), rtol=1e-12, atol=1e-13)
    first, second, third = (float(residual(f, part).max()) for part in out[solver])
    assert first > second > third


def test_in_eval_mode_the_factor_counts():
    f = Tanh(rate=0.99)
    deq = deq_of("fpi_picard", f_max_iter=4, f_tol=0.0, eval_factor=2.0).eval()
    counted = Counter(f)
    with torch.no_grad():
        z, info = deq(counted, f.x0, sradius_mode=True)
    assert info["abs_trace"].shape == (4, 9)
    assert info["sradius"].shape == (4,)
    (wanted,), _ = deq_of("fixed_point_iter", f_max_iter=8, f_tol=0.0).eval()(f, f.x0)
    torch.testing.assert_close(z[0], wanted)


def test_a_tuple_state_without_statistics_is_one_of_tensors():
    f = zoo.net("multi-scale", torch.float64, tiny=True)
    x0 = [torch.zeros_like(u) for u in f.u]
    z, _ = deq_of("fpi_anderson", no_stat=True, grad=2, tau=0.5, **TIGHT)(
        lambda *z: list(f(z, f.u)), x0
    )
    true = zoo.by_torchdeq(f, "fixed_point_iter", 1e-12, 400)
    for part, wanted in zip(z[-1], true, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("x0", [torch.tensor(1.0), torch.tensor([1.0, 3.0, 0.2])])
def test_each_value_of_a_state_without_a_batch_is_a_sample(x0):
    solve = torchdeq.solver.get_solver("fpi_anderson")
    x, _, info = solve(lambda z: 0.5 * (z + 2 / z), x0, tol=1e-5)
    torch.testing.assert_close(x, torch.full_like(x0, 2**0.5))
    assert info["nstep"].shape == (x0.numel(),)


# --- when it stops, and what is told of it ------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_there_may_be_nothing_to_solve(shape):
    x0 = torch.zeros(shape)
    x, (state,), info = torchdeq.solver.get_solver("fpi_picard")(lambda z: z / 2, x0, indexing=[9])
    assert x.shape == state.shape == shape and info["nstep"].shape == shape[:1]


@pytest.mark.parametrize("mode", ["abs", "rel"])
@pytest.mark.parametrize("solver", NAMES)
def test_the_tolerance_is_of_a_samples_norm(mode, solver):
    """Scaled samples: all meet it; those of Picard at the first iterate that does."""
    f, tol = Tanh(batch=3, n=50), 1e-3
    scale = torch.tensor([[1e-2], [1.0], [1e2]], dtype=torch.float64)

    def scaled(z):
        return scale * f(z / scale)

    solve = torchdeq.solver.get_solver(solver)
    x, _, info = solve(scaled, f.x0, tol=tol, stop_mode=mode, per_sample=True)
    lowest = info[f"{mode}_lowest"]
    assert (lowest <= tol).all()
    steps, trace = info["nstep"].long(), info[f"{mode}_trace"]
    rows = torch.arange(3)
    torch.testing.assert_close(trace[rows, steps], lowest)
    assert (trace[rows, steps - 1] > tol).all()  # no iteration more than needed
    assert (steps.max() - steps.min() > 3) == (mode == "abs")
    # What is returned is g of the iterate with that residual: its own is smaller.
    value = scaled(x).norm(dim=1)
    own = residual(scaled, x) / (value if mode == "rel" else 1)
    assert (own < lowest).all()


def test_traces_are_those_of_torchdeq():
    """Picard makes the same iterates, so that shape and numbers are the same."""
    f, told = Tanh(), {}
    for solver in NAMES[1], THEIRS[NAMES[1]]:
        _, _, told[solver] = torchdeq.solver.get_solver(solver)(f, f.x0, 20, 1e-4)
    ours, theirs = told.values()
    assert ours.keys() == theirs.keys()
    for name in ("abs_trace", "rel_trace"):
        assert ours[name].shape == theirs[name].shape == (4, 21)
        for sample, steps in enumerate(ours["nstep"].long().tolist()):
            assert steps < 21
            upto = slice(0, steps + 1)  # afterwards torchdeq iterates on until all have ended
            torch.testing.assert_close(ours[name][sample, upto], theirs[name][sample, upto])
            assert (ours[name][sample, steps:] == ours[name][sample, steps]).all()


def test_indexed_states_are_the_iterates_of_a_state_in_any_layout():
    """Of convolutions channels last: a state of an early step, and the last one after the end."""
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False).double().to(memory_format=torch.channels_last)
    with torch.no_grad():
        conv.weight.mul_(0.1)
    u = torch.randn(2, 3, 5, 4, dtype=torch.float64).to(memory_format=torch.channels_last)

    def f(z):
        return torch.tanh(conv(z) + u)

    solve = torchdeq.solver.get_solver("fpi_picard")
    with torch.no_grad():
        x, states, info = solve(f, torch.zeros(u.shape).double(), 30, 1e-8, indexing=[1, 2, 25, 30])
        second = f(f(torch.zeros_like(u)))
    assert info["nstep"].max() < 25
    assert len(states) == 4
    torch.testing.assert_close(states[0], torch.tanh(u))
    torch.testing.assert_close(states[1], second)
    assert torch.equal(states[2], x) and torch.equal(states[3], x)
    assert not states[0].requires_grad


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_no_iterations_give_back_where_it_starts(core):
    f = Tanh()
    counted, x0 = Counter(f), torch.randn_like(f.u)
    deq = deq_of("fpi_anderson", core=core, f_max_iter=0, grad=1)
    z, info = deq(counted, x0)
    assert counted.calls == 1  # the gradient's
    torch.testing.assert_close(z[-1], f(x0))
    assert info["abs_trace"].shape == (4, 1) and not info["nstep"].any()
    x, states, _ = torchdeq.solver.get_solver("fpi_anderson")(f, x0, 0, indexing=[0])
    assert torch.equal(x, x0) and len(states) == 1


@pytest.mark.parametrize("mode", ["abs", "rel"])
def test_without_convergence_the_state_of_the_lowest_residual_comes_back(mode):
    """A sample that comes near a fixed point and is then driven away, beside one that converges."""
    rate = torch.tensor([[0.5], [-1.8]], dtype=torch.float64)
    calls = []

    def f(z):
        calls.append(z)
        pull = torch.where(rate < 0, 0.2 if len(calls) < 6 else 3.0, 0.5)
        return pull * z + 1

    solve = torchdeq.solver.get_solver("fpi_picard")
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    x, states, info = solve(f, x0, 60, 1e-9, mode, indexing=[5, 60], per_sample=True)
    assert info["nstep"].tolist()[1] == 5
    near = sum(0.2**k for k in range(5))
    torch.testing.assert_close(x[1], torch.full_like(x[1], near))
    torch.testing.assert_close(x[0], torch.full_like(x[0], 2.0), rtol=1e-8, atol=0)
    assert all(torch.equal(state[1], x[1]) for state in states)
    calls.clear()
    last, _, info = solve(f, x0, 8, 1e-9, mode, return_final=True, per_sample=True)
    assert len(calls) == 8 and info["nstep"].tolist() == [8, 8]
    assert (last[1] > 10).all()
    assert info["abs_lowest"][1] > 10


@pytest.mark.parametrize(("mode", "step", "value"), [("abs", 1, 1.0), ("rel", 3, 4.75)])
def test_the_lowest_residual_is_that_of_the_stop_mode(mode, step, value):
    """It grows here, and relative to the state it falls."""
    solve = torchdeq.solver.get_solver("fpi_picard")
    x, _, info = solve(lambda z: 1.5 * z + 1, torch.zeros(2, 1), 3, 1e-3, mode)
    assert info["nstep"].tolist() == [step, step]
    assert (x == value).all()


def test_the_final_state_is_that_of_all_iterations():
    counted = Counter(Tanh())
    _, _, info = torchdeq.solver.get_solver("fpi_picard")(
        counted, counted.f.x0, 12, 10.0, return_final=True
    )
    assert counted.calls >= 12 and (info["nstep"] == 12).all()


def test_nan_is_never_the_lowest():
    f, calls = Tanh(), []

    def g(z):
        calls.append(z)
        return f(z) if len(calls) < 4 else torch.full_like(z, torch.nan)

    x, _, info = torchdeq.solver.get_solver("fpi_picard")(g, f.x0, 10, 1e-9, per_sample=True)
    assert info["nstep"].tolist() == [3.0] * 4
    torch.testing.assert_close(x, f(f(f(f.x0))))
    assert info["abs_lowest"].isfinite().all()


# --- samples that depend on each other ----------------------------------------------------------


def chain(n=8):
    """Nodes as rows; only the first knows something, so that at first all others rest at zero."""
    a = torch.diag(torch.ones(n - 1, dtype=torch.float64), -1).mul(0.5).requires_grad_()
    z = torch.zeros(n, 1, dtype=torch.float64)
    z[0] = 1.0
    return a, lambda x: a @ x + z


def chain_gradient(a):
    """Of the last node's value."""
    a = a.detach().requires_grad_()
    eye = torch.eye(len(a), dtype=a.dtype)
    return torch.autograd.grad(torch.linalg.solve(eye - a, eye[:, :1])[-1].sum(), a)[0]


def test_rows_that_depend_are_found_and_solved_as_one_system():
    a, f = chain()
    deq = deq_of("fpi_picard", ift=True, f_tol=1e-6)
    with pytest.warns(UserWarning, match="depend on each other"):
        z, info = deq(f, torch.zeros(8, 1, dtype=torch.float64))
    exact = 0.5 ** torch.arange(8, dtype=torch.float64)[:, None]
    torch.testing.assert_close(z[-1], exact)
    # Of each row, not of the batch: the last one hears of it in the eighth step.
    assert info["abs_trace"].shape == (8, 41)
    torch.testing.assert_close(info["abs_trace"][7, 1:9], exact[7] * (torch.arange(8) == 7))
    # A loss on one row only, of which the others' gradients are: found as forward, without a word.
    torch.testing.assert_close(*torch.autograd.grad(z[-1][7].sum(), a), chain_gradient(a))


def test_modes_of_modules_decide_whether_samples_depend():
    """What was learned of batch norm in eval mode says nothing of it in train mode."""
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).double().eval()
    u = torch.randn(4, 6, dtype=torch.float64)
    deq, x0 = deq_of("fpi_picard"), torch.zeros_like(u)

    def solve():
        deq(lambda z: 0.1 * torch.tanh(net(z)) + u, x0)

    for _ in range(6):
        solve()
    net.train()
    with pytest.warns(UserWarning, match="depend on each other"):
        solve()


@pytest.mark.parametrize("by", ["call", "name"])
def test_that_they_depend_can_be_said(by):
    """Of one call, which holds for its backward too, or of a name; no word, no call more."""
    a, f = chain()
    counted = Counter(f)
    bridge.register("one system", fpi_cuda.Picard(), per_sample=False)
    deq = deq_of("one system" if by == "name" else "fpi_picard", ift=True, f_tol=1e-6)
    said = {"per_sample": False} if by == "call" else {}
    z, info = deq(counted, torch.zeros(8, 1, dtype=torch.float64), solver_kwargs=said)
    assert counted.calls == info["nstep"].max() + 1 == 10
    torch.testing.assert_close(*torch.autograd.grad(z[-1][7].sum(), a), chain_gradient(a))


def test_a_function_over_the_whole_batch_is_given_the_whole_batch():
    """Whatever has finished; and independent samples cause no warning."""
    f = Tanh(batch=6)
    f.w.data.mul_(1.3)
    f.u[1:] *= 1e-3
    shapes = set()

    def g(z):
        shapes.add(z.shape)
        return f(z)

    z, info = deq_of("fpi_picard", ift=True, f_tol=1e-2)(g, f.x0)
    z[-1].sum().backward()
    assert shapes == {(6, 6)}
    assert len(set(info["nstep"].tolist())) > 1


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's, of what torchdeq does
def test_a_compiled_caller_gets_the_same():
    f = Tanh()
    deq = deq_of("fpi_anderson", ift=True, **TIGHT)

    def loss():
        return (2 * deq(f, f.x0)[0][-1]).square().sum()

    found, wanted = torch.compile(loss, backend="eager")(), loss()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(t, f.w)[0] for t in (found, wanted)))


def test_what_a_function_leaves_on_its_modules_stays():
    """A mask that is drawn in the first call of a solve is the gradient's too."""
    net = nn.Sequential(nn.Linear(6, 6), torchdeq.dropout.VariationalDropout(0.5)).double()
    u = torch.randn(4, 6, dtype=torch.float64)
    z, _ = deq_of("fpi_anderson", ift=True, **TIGHT)(
        lambda z: 0.3 * torch.tanh(net(z)) + u, torch.zeros_like(u)
    )
    with torch.no_grad():
        assert residual(lambda z: 0.3 * torch.tanh(net(z)) + u, z[-1]).max() < 1e-10


def test_the_benchmark_judges_and_times_every_method():
    """The nets and options are those of the tests above."""
    options = suites.Options(tiny=True, budget=1e-3)
    rows = zoo.rows_of(options, "representation")
    assert len(rows) == 2 * (len(zoo.RIVALS) + len(zoo.OURS) + 1)
    assert not any(row["refused"] for row in rows)
    assert all(row["gradient_error"] < 1e-3 and row["of_namesake"] > 0 for row in rows)


# --- keywords -----------------------------------------------------------------------------------


def test_solver_kwargs_are_taken_or_refused_by_name():
    f = Tanh(rate=0.95)
    deq = deq_of("fpi_anderson", f_max_iter=100)
    told = {}
    for name, kwargs in {
        "m": {"m": 1},
        "tau": {"m": 1, "tau": 0.5},
        "f": {"f_max_iter": 3},
    }.items():
        told[name] = float(deq(f, f.x0, solver_kwargs=kwargs)[1]["nstep"].max())
    assert told["m"] < told["tau"] < 100
    assert told["f"] == 3
    with pytest.raises(TypeError, match=r"fpi_anderson: .* m, tau, .*\(got 'lam'\).*register"):
        deq(f, f.x0, solver_kwargs={"lam": 1e-4})
    with pytest.raises(TypeError, match="got 'm'"):
        deq_of("fpi_picard")(f, f.x0, solver_kwargs={"m": 3})
    with pytest.raises(ValueError, match=r'stop_mode must be "abs" or "rel" \(got .max.\)'):
        deq_of("fpi_picard", f_stop_mode="max")(f, f.x0)
    with pytest.raises(ValueError, match="max_iter must be a whole number >= 0"):
        deq_of("fpi_picard", f_max_iter=-1)(f, f.x0)
    with pytest.raises(ValueError, match="per_sample"):
        deq(f, f.x0, solver_kwargs={"per_sample": "no"})
    with pytest.raises(ValueError, match="per_sample"):
        bridge.register("wrong", fpi_cuda.Picard(), per_sample="no")


def test_that_samples_fail_is_said_on_request():
    f = Tanh(rate=0.99)
    deq = deq_of("fpi_picard", f_max_iter=3, f_tol=1e-9)
    deq(f, f.x0)
    with pytest.warns(fpi_cuda.FixedPointWarning, match="fpi_picard: 4 of 4 samples MAX_ITER"):
        deq(f, f.x0, solver_kwargs={"on_failure": "warn"})


def test_without_torchdeq_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    monkeypatch.setitem(sys.modules, "torchdeq.solver", None)
    monkeypatch.delitem(sys.modules, "fpi_cuda.bridges.torchdeq")
    with pytest.raises(ImportError, match="pip install torchdeq"):
        importlib.import_module("fpi_cuda.bridges.torchdeq")


def test_the_package_imports_neither():
    code = (
        "import sys, fpi_cuda; "
        "sys.exit(any(m.startswith(('torchdeq', 'fpi_cuda.bridges')) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
