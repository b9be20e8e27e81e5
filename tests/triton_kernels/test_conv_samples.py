"""Which samples a chain computes and lists, and that its programs keep out of each other's way."""

from __future__ import annotations

import math

import pytest
import torch
from conv_chains import ALL_CONFIGS, BOTH, NETS, SMALL, check, dense, make, run
from interpreted import INTERPRETED, interpreter

from fpi_cuda.backends.triton import conv
from fpi_cuda.forms.conv import ConvForm
from fpi_cuda.record import STATUS, Limits, Progress


@BOTH
@pytest.mark.parametrize("active", [[], [0], [4], [0, 1, 2, 3, 4], [0, 2, 4], [1, 3], [2]], ids=str)
def test_samples_that_are_not_listed_are_left_alone(active, config):
    form, x = make(((2, 20, 2), (3, 3)), (5, 3), b=5, slopes="bits", scale=True, u=(0, 1))
    check(form, x, config, active)


@BOTH
def test_a_sample_has_the_same_bits_in_any_batch(config):
    form, x = make(((2, 20, 2), (3, 3)), (5, 3), torch.float32, b=5)
    whole, whole_norms = run(form, x, config)
    for active in ([3], [0, 3], [3, 4]):
        some, norms = run(form, x, config, active)
        assert torch.equal(some[3], whole[3])
        assert torch.equal(norms[3], whole_norms[3])
    alone = ConvForm(form.weights, form.biases, (dense(form.u[0][3:4]), None))
    assert torch.equal(run(alone, dense(x[3:4]), config)[0][0], whole[3])


@ALL_CONFIGS
@pytest.mark.parametrize("b", [0, 1, 5])
def test_any_batch_size(b, config):
    form, x = make(((2, 20, 2), (3, 3)), (3, 5), b=b, slopes="bits")
    check(form, x, config)


@BOTH
def test_an_image_without_pixels_has_no_tiles(config):
    out, norms = run(*make(((2, 20, 2), (3, 3)), (0, 5)), config)
    assert out.shape == (2, 2, 0, 5)
    assert norms.shape == (2, 0, 2)


@BOTH
def test_norms_need_not_be_asked_for(config):
    form, x = make(((2, 20, 2), (3, 3)), (5, 9))
    chain = conv.Chain(form, x, tf32=False, config=config)
    out = torch.full_like(x, math.nan)
    chain(x, out, *conv.active_samples(torch.zeros(2, dtype=torch.int32)))
    assert torch.equal(out, run(form, x, config)[0])


@pytest.mark.parametrize("b", [0, 1, 5, 1023, 1024, 1025, 4099])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_list_has_the_active_samples_in_order(b, share):
    p = Progress(torch.empty(b, 1), Limits(0, 0, 0, 1, 1))
    p.counters[:, STATUS] = (torch.rand(b) >= share).int() * 3
    into = (torch.full((b,), -1, dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32))
    index, count = conv.active_samples(p.counters[:, STATUS], into)
    assert index is into[0]
    expected = p.active_rows()
    assert int(count) == len(expected)
    assert torch.equal(index[: len(expected)].long(), expected)
    assert (index[len(expected) :] == -1).all()


class Races:
    """Watches a chain's hidden layers: what one thread reads, another wrote before a barrier.

    The interpreter runs a program's threads in step, so their races show in no result.
    """

    def __init__(self, monkeypatch, chain, per_tile, omitted):
        builder = interpreter.interpreter_builder
        self.first = chain._workspace[0].data_ptr()
        self.end = self.first + chain._workspace[0].nbytes
        self.read, self.written, self.found, self.met = set(), set(), [], 0
        load, store = builder.create_masked_load, builder.create_masked_store

        def watched_load(ptrs, mask, *rest):
            at = self.addresses(ptrs, mask)
            self.found += ["read before it is there"] * bool(at & self.written)
            self.read |= at
            return load(ptrs, mask, *rest)

        def watched_store(ptrs, value, mask, *rest):
            at = self.addresses(ptrs, mask)
            self.found += ["written while it is read"] * bool(at & self.read)
            self.found += ["written twice"] * bool(at & self.written)
            self.written |= at
            return store(ptrs, value, mask, *rest)

        def barrier():
            self.met += 1
            if (self.met - 1) % per_tile != omitted:
                self.read.clear()
                self.written.clear()

        monkeypatch.setattr(builder, "create_masked_load", watched_load, raising=False)
        monkeypatch.setattr(builder, "create_masked_store", watched_store, raising=False)
        monkeypatch.setattr(builder, "create_barrier", barrier, raising=False)

    def addresses(self, ptrs, mask):
        at = ptrs.data[mask.data]
        return set(at[(at >= self.first) & (at < self.end)].tolist())


@pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter")
@pytest.mark.parametrize("net", [((1, 16, 1), (3, 3)), ((1, 16, 16, 1), (3, 3, 3))], ids=str)
@pytest.mark.parametrize("omitted", [None, 0, 1])
def test_each_barrier_of_a_tile_keeps_threads_from_racing(net, omitted, monkeypatch):
    form, x = make(net, (5, 9), b=1)
    chain = conv.Chain(form, x, tf32=False, config=SMALL["fused"])
    active = conv.active_samples(torch.zeros(1, dtype=torch.int32))
    races = Races(monkeypatch, chain, 2, omitted)
    chain(x, torch.empty_like(x), *active)
    assert chain.tiles == 4, "several a program"
    assert races.met == 2 * chain.tiles
    assert bool(races.found) == (omitted is not None)


@pytest.mark.cuda
@BOTH
def test_a_chain_can_be_made_and_run_in_a_graph(config):
    if INTERPRETED:
        pytest.skip("no CUDA device")
    form, x = make(NETS["16-32-16"], (17, 19), torch.bfloat16, slopes="bits", residual=0.5)
    status = torch.zeros(2, dtype=torch.int32)
    expected, _ = run(form, x, config)
    out = torch.full_like(x, math.nan)

    def step():
        conv.Chain(form, x, tf32=False, config=config)(x, out, *conv.active_samples(status))

    step()  # without norms it is compiled by itself, and a capture allows no loading of kernels
    out.fill_(math.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("net", ["16-32-16", "1-32-32-1"])
def test_programs_of_a_full_device_do_not_race_for_their_scratch(net):
    """Every sample is right, and keeps its bits over many runs on memory that holds NaN."""
    if INTERPRETED:
        pytest.skip("no CUDA device")
    form, x = make(
        NETS[net], (128, 128), torch.bfloat16, 64, hidden_activation="relu", residual=0.5
    )
    out = check(form, x)
    chain = conv.Chain(form, x, tf32=False)
    active = conv.active_samples(torch.zeros(len(x), dtype=torch.int32))
    assert chain.config.fused
    for _ in range(50):
        chain._workspace[0].fill_(math.nan)
        again = torch.full_like(x, math.nan)
        chain(x, again, *active)
        assert torch.equal(again, out)
