"""Names that torch does not promise to keep (fpi_cuda/_torch.py) exist and do what they should.

What these tests are about is torch: `make matrix` runs them under each that is supported.
"""

import contextlib
import inspect
import re
import subprocess
import sys
import warnings
import weakref
from collections import deque

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function, forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fpi_cuda import _torch, _torch_graphs

pytestmark = pytest.mark.no_poison


def seen_in(transform, look):
    """What `look` says of the tensor inside a transform of a function."""
    found = []

    def f(x):
        found.append(look(x))
        return x.sum()

    transform(f)(torch.ones(3))
    return found[0]


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_a_transform_is_seen(transform):
    assert not _torch.transforming()
    assert seen_in(transform, lambda _: _torch.transforming())


def test_forward_mode_is_seen_wherever_the_tangent_is():
    assert not _torch.forward_mode()
    with forward_ad.dual_level():
        assert _torch.forward_mode()
    assert not _torch.forward_mode()
    seen = []
    torch.func.jvp(
        lambda x: seen.append(_torch.forward_mode()) or x, (torch.ones(2),) * 1, (torch.ones(2),)
    )
    assert seen == [True]


def test_no_level_of_forward_mode_is_open_in_a_nodes_forward():
    class Node(Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(_torch.forward_mode())
            return x.clone()

    seen = []
    with forward_ad.dual_level():
        Node.apply(torch.ones(2))
        seen.append(_torch.forward_mode())
    assert seen == [False, True]


@pytest.mark.parametrize("switched_on", [True, False])
def test_forward_mode_is_off_in_a_nodes_rule_for_tangents_until_it_is_switched_on(switched_on):
    """The second derivative of x³ by two levels: 0 where the inner rule loses the outer tangent."""

    class Cube(Function):
        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx, dx):
            (x,) = ctx.saved_tensors
            x = forward_ad.unpack_dual(x).primal
            assert _torch.forward_level() and not _torch.forward_mode()
            with _torch.following() if switched_on else contextlib.nullcontext():
                return 3 * x * x * dx

    def tangent(f):
        return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    x = torch.tensor(2.0)
    assert not _torch.forward_level()
    assert tangent(Cube.apply)(x) == 12
    assert tangent(tangent(Cube.apply))(x) == (12 if switched_on else 0)


def test_a_function_is_one_call_in_a_graph_that_is_recorded():
    def looking(x):
        seen.append(_torch_graphs.recording())
        return x * (2 if x.sum() > 0 else 3), x + 1  # recorded as it runs, this would raise

    def f(x):
        assert _torch_graphs.recording()
        y, z = _torch_graphs.as_one_call(looking, x)
        with _torch_graphs.unrecorded():
            assert y.sum() == 4
        return y * z

    seen = []
    assert not _torch_graphs.recording()
    graph = make_fx(f)(torch.ones(2))
    names = [getattr(n.target, "__name__", "") for n in graph.graph.nodes]
    assert names.count("solve") == 1
    assert not any("sum" in name or "add" in name for name in names)
    assert graph(-torch.ones(2)).tolist() == [0, 0]
    assert graph(2 * torch.ones(2)).tolist() == [12, 12]
    assert seen == [False] * 3


def test_what_wraps_a_tensor_is_seen_and_taken_off():
    assert not _torch.wrapped(torch.ones(3))
    assert seen_in(torch.func.grad, _torch.wrapped)
    assert seen_in(torch.vmap, _torch.wrapped)
    assert seen_in(torch.vmap, _torch.mapped)
    assert not seen_in(torch.func.grad, _torch.mapped)
    assert seen_in(torch.vmap, _torch.unwrapped).shape == (3,)
    inside = seen_in(torch.vmap, lambda x: _torch.wrapped(_torch.unwrapped(x)))
    assert not inside


def test_levels_are_stripped_whatever_is_nested():
    x, found = torch.arange(24.0).view(2, 3, 4), []

    def look(x):
        found.append(_torch.stripped(x, lambda t, dim: t.movedim(dim, 0)))
        found.append(_torch.stripped(x, lambda t, dim: t.select(dim, 0)))
        found.append(_torch.of_vmap(x))
        return x.sum()

    mapped = torch.vmap(torch.func.grad(lambda x: torch.vmap(look, in_dims=1)(x).sum()), in_dims=2)
    mapped(x)
    whole, first, batched = found
    assert not _torch.wrapped(whole) and not _torch.wrapped(first)
    assert torch.equal(whole, x.permute(2, 1, 0))
    assert torch.equal(first, x[:, 0, 0])
    assert batched
    assert not _torch.of_vmap(x)
    assert not seen_in(torch.func.grad, _torch.of_vmap)
    assert seen_in(torch.func.grad, lambda x: _torch.stripped(x, None)).shape == (3,)


class _Doubled(Function):
    """y = 2x, whose backward takes a batch of cotangents apart and puts it together again."""

    seen: list

    @staticmethod
    def forward(x, factor=2):
        return factor * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Doubled.seen = [inputs]

    @staticmethod
    def backward(ctx, c):
        batched = _torch.legacy_batched(c)
        _Doubled.seen = [batched]
        if not batched:
            return 2 * c, None
        level = _torch.legacy_level()
        whole = _torch.legacy_unbatched(c, level)
        _Doubled.seen += [whole, _torch.legacy_level() == level, _torch.legacy_batched(whole)]
        return _torch.legacy_rebatched(2 * whole, level), None


def test_a_batch_of_cotangents_is_taken_apart_and_put_together():
    x, v = torch.ones(2, requires_grad=True), torch.randn(3, 2)
    (batch,) = torch.autograd.grad(_Doubled.apply(x), x, v, is_grads_batched=True)
    batched, whole, same_level, still = _Doubled.seen
    assert batched and same_level and not still
    assert torch.equal(whole, v) and torch.equal(batch, 2 * v)
    torch.autograd.grad(_Doubled.apply(x), x, v[0])
    assert _Doubled.seen == [False]
    assert not _torch.legacy_batched(3)


def test_a_node_binds_no_defaults():
    class Node(_Doubled):
        @staticmethod
        def forward(x, factor=2):
            return 2 * x

    x = torch.ones(2, requires_grad=True)
    Node.apply(x)
    assert len(_Doubled.seen[0]) == 2  # the default was bound: what it costs to look for it
    _torch.bind_no_defaults(Node)
    y = Node.apply(x)
    assert len(_Doubled.seen[0]) == 1
    assert torch.equal(y, 2 * x)
    assert torch.equal(torch.func.grad(lambda x: _Kept.apply(x).sum())(x), 2 * x)


class _Kept(Function):
    """y = 2x with no default, under torch.func too."""

    of = staticmethod(torch.clone)

    @staticmethod
    def forward(x):
        return 2 * _Kept.of(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, c):
        return 2 * c


_torch.bind_no_defaults(_Kept)


def test_a_write_is_counted():
    x = torch.zeros(3)
    before = _torch.version(x)
    x[:1].add_(1)  # through a view
    assert _torch.version(x) == before + 1
    with torch.inference_mode(), pytest.raises(RuntimeError):
        _torch.version(torch.zeros(3))


def test_a_tensor_that_a_graph_alone_holds_is_had_from_a_weak_reference():
    t = torch.ones(2, requires_grad=True) * 3
    reference, y = weakref.ref(t), t.square()
    del t
    again = _torch.held(reference())
    assert again.tolist() == [3, 3]
    del y, again
    assert reference() is None
    t = torch.ones(2)
    reference = weakref.ref(t)
    assert _torch.held(reference()) is t


def test_a_storage_is_told_from_others():
    x = torch.zeros(3)
    assert _torch.storage_id(x) == _torch.storage_id(x[1:]) == _torch.storage_id(x.detach())
    empty, other = torch.empty(0), torch.empty(0)
    assert empty.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    assert _torch.storage_id(empty) != _torch.storage_id(other)


def test_tensors_are_copied_into_others():
    into, source = [torch.zeros(2), torch.zeros(3, 1)], [torch.ones(2), torch.full((1, 3), 2.0).mT]
    kept = list(into)
    _torch.copy_all(into, source)
    assert all(a is b for a, b in zip(into, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(into, source, strict=True))


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_a_constant_made():
    with _Calls() as seen:
        x = torch.tensor(1.0)
        _ = x + x
    assert seen.calls == [_torch.lift_fresh, torch.ops.aten.add.Tensor]
    assert _torch.TorchDispatchMode is TorchDispatchMode


def test_containers_are_walked():
    a, b = torch.zeros(1), torch.ones(1)
    leaves = _torch.tree_leaves(((a, [b]), {"k": 3}))
    assert leaves[0] is a and leaves[1] is b and leaves[2] == 3
    mapped = _torch.tree_map(lambda t: t + 1 if t is a else t, ((a,), {"b": b}))
    assert torch.equal(mapped[0][0], b) and mapped[1]["b"] is b


def test_a_registered_container_is_opened_by_one_level():
    a, b = torch.zeros(1), torch.ones(1)
    x, y = deque([a, (b,)]), deque([b, (a,)])
    parts, spec = _torch.tree_flatten(x, is_leaf=lambda v: v is not x)
    assert parts[0] is a and parts[1] == (b,)
    again = _torch.tree_unflatten([b, a], spec)
    assert type(again) is deque and again[0] is b and again[1] is a
    _, other = _torch.tree_flatten(y, is_leaf=lambda v: v is not y)
    assert spec == other and isinstance(str(spec), str)
    assert spec != _torch.tree_flatten(deque([a]))[1]
    for leaf in (a, None, 3, {1}):
        assert _torch.tree_flatten(leaf)[0][0] is leaf


def test_kernels_are_found_and_transforms_kept_from_an_operator(monkeypatch):
    library = torch.library.Library("of_torch_names", "FRAGMENT")
    library.define("f(Tensor x) -> Tensor")
    assert not _torch.has_kernel("of_torch_names::f", "cpu")
    library.impl("f", lambda x: x.clone(), "CPU")
    assert _torch.has_kernel("of_torch_names::f", "cpu")
    assert not _torch.has_kernel("of_torch_names::f", "cuda")
    assert _torch.with_cpu_kernel("of_torch_names") == ["f"]

    def refuse(*_):
        raise RuntimeError("refused")

    library.impl("f", refuse, _torch.TRANSFORMS_KEY)
    f = torch.ops.of_torch_names.f
    assert torch.equal(f(torch.ones(2)), torch.ones(2))
    with pytest.raises(RuntimeError, match="refused"):
        torch.func.grad(lambda x: f(x).sum())(torch.ones(2))
    monkeypatch.setattr(
        _Kept, "of", f.default
    )  # a call from a node's forward is below the transforms
    torch.func.grad(lambda x: _Kept.apply(x).sum())(torch.ones(2))
    assert {type(f).__module__, type(f.default).__module__} <= _torch.OPERATOR_MODULES
    own = torch.library.custom_op("of_torch_names::g", lambda x: x.clone(), mutates_args=(),
                                  schema="(Tensor x) -> Tensor")  # fmt: skip
    assert type(own).__module__ in _torch.OPERATOR_MODULES


def test_a_module_is_what_its_dicts_hold():
    m = nn.Sequential(nn.BatchNorm1d(2, affine=True), nn.Identity())
    norm = m[0]
    names = (_torch.PARAMETERS, _torch.BUFFERS, _torch.CHILDREN, _torch.PRE_HOOKS)
    ways = (_torch.parameters, _torch.buffers, _torch.children, _torch.pre_hooks)
    for name, way in zip(names, ways, strict=True):
        assert way(norm) is vars(norm)[name]
    weight, mean = torch.full((2,), 3.0), torch.ones(2)
    _torch.parameters(norm)["weight"] = weight
    _torch.buffers(norm)["running_mean"] = mean
    assert norm.weight is weight and norm.running_mean is mean
    _torch.children(m)["1"] = nn.ReLU()
    assert isinstance(m[1], nn.ReLU)
    seen = []
    handle = norm.register_forward_pre_hook(lambda *_: seen.append(1))
    (key,) = _torch.pre_hooks(norm)
    m(torch.ones(3, 2))
    assert seen == [1]
    del _torch.pre_hooks(norm)[key]
    m(torch.ones(3, 2))
    assert seen == [1] and handle.id == key


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_a_hook_is_seen(kind):
    m = nn.Linear(2, 2)
    assert not _torch.hooked(m)
    handle = getattr(m, f"register_{kind}_hook")(lambda *_: None)
    assert _torch.hooked(m)
    assert _torch.hooked(m, _torch.FORWARD_HOOKS) == ("forward" in kind)
    handle.remove()
    assert not _torch.hooked(m)


def test_hooks_of_all_modules_are_listed():
    before, after = lambda *_: None, lambda *_: None
    of_all = torch.nn.modules.module
    assert _torch.global_hooks() == [] and not _torch.any_global_hook()
    handles = [of_all.register_module_forward_hook(after)]
    handles.append(of_all.register_module_forward_pre_hook(before))
    try:
        assert [hook for _, hook in _torch.global_hooks()] == [before, after]
        assert _torch.any_global_hook()
    finally:
        for handle in handles:
            handle.remove()
    handle = of_all.register_module_full_backward_hook(lambda *_: None)
    assert _torch.global_hooks() == [] and _torch.any_global_hook()
    handle.remove()


def test_a_recurrent_layer_uses_the_weights_it_is_given():
    m, x = nn.GRU(2, 3), torch.ones(1, 1, 2)
    before = m(x)[0]
    for name in list(_torch.parameters(m)):
        _torch.parameters(m)[name] = torch.zeros_like(getattr(m, name))
    _torch.renew_flat_weights(m)
    assert before.abs().sum() > 0 and m(x)[0].abs().sum() == 0
    _torch.renew_flat_weights(nn.Linear(2, 2))  # has none


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm"])
def test_an_older_norm_is_known_and_computes_the_weight(norm):
    m = getattr(nn.utils, norm)(nn.Linear(2, 2))
    (hook,) = _torch.pre_hooks(m).values()
    assert _torch.computes_weight(hook) and not _torch.computes_weight(print)
    del m.weight
    hook(m, ())
    assert m.weight.shape == (2, 2)


COMPILED = """
import sys, torch
assert "torch._subclasses.fake_tensor" in sys.modules  # which costs us nothing then
from fpi_cuda import _torch_graphs
m = torch.nn.Linear(2, 2)
assert not _torch_graphs.compiled_module(m) and not _torch_graphs.compiled_function(print)
assert "torch._dynamo" not in sys.modules  # the question loads no compiler
assert _torch_graphs.compiled_module(torch.compile(m, backend="eager"))
f = lambda x: x
compiled = torch.compile(f, backend="eager")
assert _torch_graphs.compiled_function(compiled) and _torch_graphs.before_compile(compiled) is f
m.compile(backend="eager")  # it keeps what it calls as an attribute
(call,) = filter(_torch_graphs.compiled_function, vars(m).values())
before = _torch_graphs.before_compile(call)  # a method of m, or from 2.14 on the class's function
assert getattr(before, "__self__", m) is m and before.__name__ == "_call_impl"
"""


def test_hooks_by_which_parameters_are_gathered_are_known(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import FSDPModule, fully_shard

    alone, *group = (nn.Linear(2, 2) for _ in range(3))
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(alone, mesh=mesh)
        fully_shard(group, mesh=mesh)
    finally:
        distributed.destroy_process_group()
    for m in (alone, *group):
        assert isinstance(m, FSDPModule)
        m.register_forward_hook(lambda *_: None)
        hooks = [list(vars(m)[kind].values()) for kind in _torch.FORWARD_HOOKS]
        assert [list(map(_torch.of_fsdp, of_kind)) for of_kind in hooks] == [[True], [True, False]]


def test_a_tensor_without_values_is_seen_behind_transforms():
    with FakeTensorMode() as mode:
        x, w = torch.ones(3), nn.Parameter(torch.ones(2))
    plain = torch.ones(2)
    for t in (x, w):
        assert _torch_graphs.fake_mode(plain, t) is mode  # outside of the mode too
        assert _torch_graphs.valueless(t)
        assert _torch_graphs.fake_world(plain, t) is mode
    assert _torch_graphs.fake_world(plain) is None
    assert [t is w for t in _torch_graphs.odd([plain, nn.Parameter(plain), w])] == [True]
    with mode:
        assert _torch_graphs.fake_world(plain) is mode
    assert _torch_graphs.fake_mode(plain, nn.Parameter(plain)) is None
    assert seen_in(torch.vmap, _torch_graphs.fake_mode) is None

    def look(x):
        found.append(_torch_graphs.fake_mode(plain, x))
        return x.sum()

    found = []
    torch.vmap(torch.func.grad(look))(x)
    assert found == [mode]
    assert _torch_graphs.valueless(plain.to("meta")) and not _torch_graphs.valueless(plain)
    real = mode.from_tensor(plain)
    assert _torch_graphs.fake_mode(real) is mode and real.shape == (2,)
    assert not mode.allow_non_fake_inputs


def test_what_compile_made_is_seen():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


def test_what_jit_made_is_seen():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, in some versions aloud
        module, f = torch.jit.script(nn.Linear(2, 2)), torch.jit.trace(torch.abs, torch.ones(1))
    assert isinstance(module, _torch_graphs.ScriptModule) and isinstance(
        f, _torch_graphs.ScriptFunction
    )
    assert not isinstance(nn.Linear(2, 2), _torch_graphs.ScriptModule)


def test_a_graph_can_be_taken_raw():
    """Public, but young."""
    assert "keep_graph" in inspect.signature(torch.cuda.CUDAGraph.__new__).parameters
    assert callable(torch.cuda.CUDAGraph.raw_cuda_graph)


CUDA_ONLY = sorted(set(re.findall(r"torch\._C\.(_cuda_\w+)", inspect.getsource(_torch))))


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
@pytest.mark.parametrize("name", CUDA_ONLY)
def test_cuda_has_what_captures_need(name):
    assert callable(getattr(torch._C, name))


def test_names_of_cuda_are_found_in_the_source():
    assert "_cuda_clearCublasWorkspaces" in CUDA_ONLY


def test_inference_mode_is_seen_within_transforms_and_can_be_switched_off():
    """Where torch.is_inference_mode_enabled() says no, and yet no graph is recorded."""

    class Node(Function):
        @staticmethod
        def forward(x):
            seen.append(_torch.graphless())
            with _torch.no_inference(), torch.enable_grad():
                y = _torch.normal(x.detach()).requires_grad_()
                (slope,) = torch.autograd.grad(y**3, y, torch.ones_like(y))
                assert not torch._C._is_fwd_grad_enabled()
            return slope

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, t):
            return t

    seen, x = [], torch.full((2,), 2.0)
    assert not _torch.graphless()
    with torch.inference_mode():
        for given in (x, x.clone()):
            found = torch.func.jvp(Node.apply, (given,), (given,))[0]
            assert found.tolist() == [12.0, 12.0]
            with _torch.no_inference():
                assert not torch.is_inference_mode_enabled()
                assert not torch.is_grad_enabled()
    assert seen == [True, True]
    assert _torch.normal(x) is x


def test_hooks_on_what_autograd_saves_are_seen_and_can_be_left_out():
    def refuse(t):
        raise AssertionError("a hook ran")

    x = torch.ones(2, requires_grad=True)
    assert _torch.unhooked() is _torch.no_inference()
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        with pytest.raises(AssertionError):
            x**2
        with _torch.unhooked():
            y = x**2
    y.sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_a_function_is_traced_into_a_graph_of_operators():
    held, examples = torch.ones(2), (torch.zeros(2), torch.zeros(2))
    graph = _torch_graphs.make_fx(lambda x, y: x.mul(2).add_(y) + held)(*examples)
    kinds = [n.op for n in graph.graph.nodes]
    assert kinds.count("placeholder") == 2 and kinds.count("get_attr") == 1
    written = [n.target for n in graph.graph.nodes if getattr(n.target, "_schema", None)]
    assert [t._schema.is_mutable for t in written] == [False, True, False]
    assert torch.equal(graph(held, held), 4 * held)


def test_torch_jit_tells_that_it_traces():
    seen = []

    def f(x):
        seen.append(_torch_graphs.jit_tracing())
        return x + 1

    f(torch.ones(1))
    torch.jit.trace(f, torch.ones(1), check_trace=False)
    assert seen == [False, True]


def test_tensors_with_values_can_be_made_while_fake_ones_are():
    with torch._subclasses.FakeTensorMode():
        fake = torch.zeros(2)
        with _torch_graphs.real_tensors():
            real = torch.zeros(2)
    assert type(real) is torch.Tensor and type(fake) is not torch.Tensor


def test_a_marked_function_is_a_constant_to_the_compiler():
    @torch.compiler.assume_constant_result
    def marked():
        return 1

    @_torch_graphs.constant_in_graphs
    def ours():
        return 1

    assert vars(ours) == vars(marked)


@pytest.mark.no_poison
def test_what_a_graph_writes_to_late_is_told():
    cell, told = 1, []
    items, t, quiet = [1], torch.ones(2), torch.ones(2).mul_(1)

    class Plain:
        pass

    o = Plain()

    class Asked:
        def __init__(self):
            self.ask = _torch_graphs.constant_in_graphs(
                lambda: told.append(_torch_graphs.unwritten()) or True
            )

    asked = Asked()

    def f(z):
        nonlocal cell
        z = z + t + quiet
        asked.ask()
        cell = cell + 1
        o.a = 2
        items[0] = 2
        t.mul_(2)
        asked.ask()
        return z

    torch.compile(f, backend="eager", fullgraph=True)(torch.ones(2))
    first, last = told
    cells = dict(zip(f.__code__.co_freevars, f.__closure__, strict=True))
    written = {id(o), id(items), id(t), id(cells["cell"])}
    assert not first & written
    assert written <= last
    assert id(quiet) not in last and id(asked) not in last
