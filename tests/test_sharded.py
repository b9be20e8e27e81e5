"""g whose parameters fully_shard spreads over processes, against a twin that holds them whole."""

import copy
import datetime
import multiprocessing
import os

import pytest
import torch
from helpers import TIGHT, TIGHT_ADJOINT, Energy, Net
from torch import distributed, nn
from torch.autograd import grad

from fpi_cuda import DenseStep, FixedPointLayer, GradientStep, fixed_point

EXACT = {"tolerance": TIGHT, "adjoint": TIGHT_ADJOINT, "max_iterations": 500}


def double(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def begin(rank, size, folder):
    """The mesh of processes."""
    distributed.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=20),
    )
    return distributed.device_mesh.init_device_mesh("cpu", (size,))


@pytest.fixture(name="mesh")
def mesh_fixture(tmp_path):
    yield begin(0, 1, tmp_path)
    distributed.destroy_process_group()


class Scaled(nn.Module):
    """With a buffer that moves, and parameters of its own beside those of its parts."""

    def __init__(self):
        super().__init__()
        self.net = Net(d=3)
        self.register_buffer("calls", torch.zeros(()))
        self.scale = nn.Parameter(torch.full((3,), 0.9, dtype=torch.float64))

    def forward(self, x, z):
        self.calls += 1
        return self.scale * self.net(x, z)


def around(layer):
    """A model with parameters in front of the layer and after it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        ends = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(2)]
    return nn.Sequential(ends[0], layer, ends[1])


def gathered(tensors):
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


# What is sharded of the model, innermost first.
SPLITS = {
    "g": ["1.g"],
    "part": ["1.g.net.a"],
    "parts and g": ["1.g.net.a", "1.g.net", "1.g"],
    "layer": ["1"],
    "g and model": ["1.g", ""],
    "all": ["0", "1.g.net", "1.g", "1", "2", ""],
}


def compare(mesh, names, inputs, mine):
    """Two steps of training of a sharded model by inputs[mine] and of its twin by all inputs."""
    from torch.distributed.fsdp import fully_shard

    model = around(FixedPointLayer(Scaled(), **EXACT))
    twins = [copy.deepcopy(model) for _ in inputs]
    for name in names:
        fully_shard(model.get_submodule(name), mesh=mesh)
    iterations = []
    for _ in range(2):
        outs = [twin(z) for twin, z in zip(twins, inputs, strict=True)]
        for out in outs:
            out.sin().square().sum().backward()
        out = model(inputs[mine])
        close(out, outs[mine])
        out.sin().square().sum().backward()
        iterations.append([int(twin[1].last.iterations.max()) for twin in twins])
        whole = list(zip(*(twin.parameters() for twin in twins), strict=True))
        for p, each in zip(model.parameters(), whole, strict=True):
            mean = sum(q.grad for q in each) / len(each)
            if hasattr(p.grad, "full_tensor"):  # others are not reduced by anybody
                close(p.grad.full_tensor(), mean)
            else:
                close(p.grad, each[mine].grad)
    assert model[1].g.calls == twins[mine][1].g.calls
    return iterations


@pytest.mark.parametrize("split", SPLITS)
def test_training_in_one_process(mesh, split):
    compare(mesh, SPLITS[split], [double(4, 3)], 0)


def of_two(rank, folder):
    """Process `rank` of two, whose samples take other numbers of iterations."""
    torch.set_num_threads(1)
    mesh = begin(rank, 2, folder)
    try:
        inputs = [double(4, 3), 30 * double(4, 3, seed=1)]
        for split in ("parts and g", "all"):
            iterations = compare(mesh, SPLITS[split], inputs, rank)
            assert any(a != b for a, b in iterations), iterations
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def child(folder):
    of_two(1, folder)
    os._exit(0)  # without the end of gloo's threads, which now and then aborts


def test_two_processes_that_stop_after_other_numbers_of_iterations(tmp_path):
    other = multiprocessing.get_context("spawn").Process(target=child, args=(tmp_path,))
    other.start()
    try:
        of_two(0, tmp_path)
        other.join(20)
        assert other.exitcode == 0
    finally:
        other.kill()


def test_derivatives_of_higher_order(mesh):
    from torch.distributed.fsdp import fully_shard

    net, z = Net(d=3), double(4, 3).requires_grad_()
    twin = copy.deepcopy(net)
    fully_shard(net, mesh=mesh)

    def orders(g):
        wanted = [*g.parameters(), z]
        y, found = FixedPointLayer(g, **EXACT)(z).sin().sum(), []
        for _ in range(3):
            grads = grad(y, wanted, create_graph=True)
            found += gathered(grads)
            y = sum(gathered(t.sin().sum() for t in grads))
        return found

    for a, b in zip(orders(net), orders(twin), strict=True):
        close(a, b)


def test_known_layers_are_solved_whole_and_energies_found(mesh):
    from torch.distributed.fsdp import fully_shard

    z = double(4, 3)
    for g in (DenseStep(3, 3).double(), GradientStep(Energy(d=3), 0.3)):
        twin = copy.deepcopy(g)
        fully_shard(g if isinstance(g, DenseStep) else g.energy, mesh=mesh)
        solutions = [fixed_point(g, torch.zeros_like(z), z, **EXACT) for g in (g, twin)]
        assert solutions[0].path == solutions[1].path
        grads = [
            gathered(grad(s.x.sin().sum(), list(g.parameters())))
            for g, s in zip((g, twin), solutions, strict=True)
        ]
        for a, b in zip(*grads, strict=True):
            close(a, b)


def test_under_a_transform(mesh):
    from torch.distributed.fsdp import fully_shard

    net, z = Net(d=3), double(2, 4, 3)
    true = torch.func.vmap(FixedPointLayer(copy.deepcopy(net), **EXACT))(z)
    layer = FixedPointLayer(fully_shard(net, mesh=mesh), **EXACT)
    x = torch.func.vmap(layer)(z)
    close(x, true)
    x.sin().sum().backward()
    twin = FixedPointLayer(Net(d=3), **EXACT)
    twin(z.flatten(0, 1)).sin().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        close(p.grad.full_tensor(), q.grad)


def test_sharded_states_and_inputs_are_refused_with_a_way_out(mesh):
    from torch.distributed.tensor import distribute_tensor

    z = distribute_tensor(double(4, 3), mesh)
    with pytest.raises(TypeError, match=r"x0 must be a plain.*DTensor.*x0\.to_local\(\)"):
        fixed_point(lambda x: 0.5 * x, z)
    with pytest.raises(TypeError, match=r"inputs\[0\] must be a plain.*inputs\[0\]\.full_tensor"):
        FixedPointLayer(lambda x, z: 0.5 * x + z)(z)
