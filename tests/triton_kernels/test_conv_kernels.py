"""Convolution steps in Triton against float64 conv2d: every size, dtype, activation and pattern."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from interpreted import INTERPRETED, interpreter

from fpi_cuda.backends.triton import configs, conv, tune
from fpi_cuda.backends.triton.configs import Config, Shape
from fpi_cuda.forms.activations import ACTIVATIONS
from fpi_cuda.forms.conv import ConvForm
from fpi_cuda.record import ACTIVE, STATUS, Limits, Progress

# Of the largest value; the interpreter rounds to bfloat16 by cutting bits off.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
TF32 = 5e-3
# Small tiles and blocks: several of each in a small image, none of them filled.
SMALL = {
    "fused": Config(True, (4, 8), pixels=32, blocks=1),
    "by layer": Config(False, (4, 8), outputs=32, blocks=1),
}
# One pixel; smaller than a tile; a tile; one more each way.
SIZES = [(1, 1), (3, 5), (4, 8), (5, 9)]
NETS = {
    "16-32-16": ((16, 32, 16), (3, 3)),
    "1-32-32-1": ((1, 32, 32, 1), (3, 3, 3)),
    "3-20-7-3": ((3, 20, 7, 3), (5, 1, 3)),
    "1-1-1": ((1, 1, 1), (3, 5)),
    "6-40-6": ((6, 40, 6), (1, 5)),
}
ALL_CONFIGS = pytest.mark.parametrize("config", [*SMALL.values(), None], ids=[*SMALL, "rule"])
BOTH = pytest.mark.parametrize("config", list(SMALL.values()), ids=list(SMALL))


def name_of(value):
    return str(value).removeprefix("torch.")


def dense(t):
    return t.contiguous(memory_format=torch.channels_last)


def state(*shape, dtype=torch.float64):
    return dense(torch.randn(shape, dtype=torch.float64).to(dtype))


def make(net, size, dtype=torch.float64, b=2, slopes=None, scale=False, u=(0,), **options):
    """A form with random tensors of the dtype, and a state. u: layers that have one."""
    channels, kernels = net
    layers = range(len(kernels))
    kinds = {"bits": torch.bool, "tensor": dtype}
    return (
        ConvForm(
            tuple(
                (torch.randn(o, i, k, k, dtype=torch.float64) / (i * k * k) ** 0.5).to(dtype)
                for i, o, k in zip(channels, channels[1:], kernels, strict=False)
            ),
            tuple(torch.randn(o, dtype=torch.float64).to(dtype) for o in channels[1:]),
            tuple(
                state(b, channels[at + 1], *size, dtype=dtype) if at in u else None for at in layers
            ),
            scale=state(b, channels[0], *size, dtype=dtype) if scale else None,
            slopes=tuple(dense((state(b, o, *size) > 0).to(kinds[slopes])) for o in channels[1:-1])
            if slopes
            else None,
            **options,
        ),
        state(b, channels[0], *size, dtype=dtype),
    )


def double(form):
    """The same in float64."""

    def cast(t):
        return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    def each(ts):
        return None if ts is None else tuple(map(cast, ts))

    return ConvForm(
        each(form.weights),
        each(form.biases),
        each(form.u),
        form.activation,
        form.hidden_activation,
        form.residual,
        cast(form.scale),
        each(form.slopes),
    )


def run(form, x, config=None, active=None, tf32=False):
    """What the kernels make of x, and the chain's partial norms; NaN where nothing is written."""
    status = torch.full((len(x), 5), ACTIVE + 1, dtype=torch.int32)
    status[list(range(len(x))) if active is None else active, STATUS] = ACTIVE
    chain = conv.Chain(form, x, tf32=tf32, config=config)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.full_like(x, math.nan)
    norms = torch.full((len(x), chain.tiles, 2), math.nan, dtype=acc)
    chain(x, out, *conv.active_samples(status[:, STATUS]), norms)
    return out, norms


def check(form, x, config=None, active=None, tf32=False):
    out, norms = run(form, x, config, active, tf32)
    listed = list(range(len(x))) if active is None else active
    others = [b for b in range(len(x)) if b not in listed]
    assert out[others].isnan().all(), "samples that are not listed keep every bit"
    assert norms[others].isnan().all()
    expected = double(form)(x.double())[listed]
    tolerance = TF32 if tf32 else TOLERANCE[x.dtype]
    largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    error = (out[listed].double() - expected).abs()
    assert (error <= tolerance * largest).all(), f"{float(error.max())} of {largest}"
    # The norms are of what was stored, so they are right to their own rounding.
    exact = 1e-12 if x.dtype == torch.float64 else 1e-5
    for part, value in ((0, out.double() - x.double()), (1, out.double())):
        square = value[listed].flatten(1).square().sum(1)
        torch.testing.assert_close(
            norms[listed, :, part].double().sum(1), square, rtol=exact, atol=exact
        )
    return out


@BOTH
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("net", list(NETS))
def test_a_step_is_the_float64_convolutions(net, size, config):
    form, x = make(NETS[net], size, b=1, hidden_activation="relu", residual=0.5)
    check(form, x, config)


@pytest.mark.parametrize("tile", [(8, 16), (6, 10)], ids=str)
@pytest.mark.parametrize("net", ["16-32-16", "1-32-32-1"])
def test_many_tiles_make_an_image(net, tile):
    form, x = make(NETS[net], (17, 19), b=1, hidden_activation="relu")
    fused = check(form, x, Config(True, tile, pixels=128))
    if tile == (8, 16):
        by_layer = check(form, x, Config(False, tile))
        torch.testing.assert_close(fused, by_layer, rtol=1e-12, atol=1e-12)


@BOTH
def test_the_widest_kernel(config):
    check(*make(((1, 1, 1), (7, 7)), (5, 9), b=1), config)


@ALL_CONFIGS
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=name_of)
@pytest.mark.parametrize("net", ["16-32-16", "1-32-32-1"])
def test_every_dtype_is_right_within_its_rounding(net, dtype, config):
    form, x = make(NETS[net], (5, 9), dtype, 1, hidden_activation="relu", residual=0.5)
    check(form, x, config)


@BOTH
def test_tf32_is_right_within_its_rounding(config):
    form, x = make(NETS["16-32-16"], (5, 9), torch.float32, hidden_activation="relu")
    check(form, x, config, tf32=True)


@pytest.mark.parametrize("net", [((5, 70, 5), (3, 3)), ((70, 70), (3,)), ((4, 4), (1,))], ids=str)
def test_wide_and_single_layers_run_one_at_a_time(net):
    form, x = make(net, (3, 5), b=1, residual=0.5, activation="tanh")
    out = check(form, x, SMALL["by layer"])
    assert not conv.Chain(form, x, tf32=False).config.fused
    torch.testing.assert_close(check(form, x), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("config", list(SMALL.values()), ids=list(SMALL))
def test_operands_loaded_ahead_or_not_give_the_same_bits(config, stages):
    form, x = make(NETS["3-20-7-3"], (5, 9), b=1, scale=True)
    out = check(form, x, dataclasses.replace(config, stages=stages))
    assert torch.equal(out, run(form, x, config)[0])


@BOTH
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_activations_are_right_near_zero_far_out_and_not_finite(activation, dtype, config):
    """Alone: all weights are 0, so the values are φ(u), and relatively right."""
    values = [10.0**e for e in range(-12, 3)] + [0.1 * k for k in range(1, 60)] + [0.0, math.inf]
    values = torch.tensor(values + [-v for v in values] + [math.nan], dtype=torch.float64)
    u = values.to(dtype).reshape(1, 1, 1, -1)
    zeros = torch.zeros(1, 1, 3, 3, dtype=dtype)
    form = ConvForm((zeros, zeros), (None, None), (None, u), activation)
    out, _ = run(form, torch.zeros_like(u), config)
    # Four units in the last place; a device's exponential and division have a few of their own.
    single = 4 * torch.finfo(torch.float32).eps if INTERPRETED else 2e-6
    rtol = 1e-12 if dtype == torch.float64 else single
    # Where φ itself is a difference of 1s, as torch's is.
    atol = {"gelu": 4 * torch.finfo(dtype).eps}.get(activation, torch.finfo(dtype).tiny)
    expected = ACTIVATIONS[activation](u.double())
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol, equal_nan=True)


@BOTH
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_hidden_layers_have_their_own_activation(activation, config):
    """Outside the image it is 0 and not φ(0)."""
    form, x = make(NETS["3-20-7-3"], (3, 5), b=1, hidden_activation=activation, activation="tanh")
    check(form, x, config)


@BOTH
@pytest.mark.parametrize("slopes", ["bits", "tensor"])
@pytest.mark.parametrize("net", [((16, 32, 16), (3, 3)), ((2, 33, 64, 2), (3, 1, 3))], ids=str)
def test_slopes_take_the_activations_place(net, slopes, config):
    form, x = make(net, (5, 9), b=1, slopes=slopes, scale=True, u=(len(net[1]) - 1,), residual=0.7)
    check(form, x, config)


@BOTH
def test_slopes_as_bits_and_as_numbers_give_the_same_bits(config):
    form, x = make(((2, 33, 40, 2), (3, 1, 3)), (3, 5), b=1, slopes="bits")
    numbers = dataclasses.replace(form, slopes=tuple(dense(s.double()) for s in form.slopes))
    assert torch.equal(run(form, x, config)[0], run(numbers, x, config)[0])


@BOTH
@pytest.mark.parametrize("u", [(0, 1, 2), ()], ids=str)
def test_every_layer_may_have_a_u(u, config):
    form, x = make(NETS["3-20-7-3"], (5, 9), b=1, u=u, scale=True, residual=-0.3)
    check(form, x, config)


@BOTH
def test_what_is_added_and_weights_may_lie_in_any_order(config):
    form, x = make(((2, 20, 2), (3, 3)), (3, 5), slopes="bits", scale=True)
    strided = dataclasses.replace(
        form,
        weights=tuple(w.mT.contiguous().mT for w in form.weights),
        u=tuple(u if u is None else u.contiguous() for u in form.u),
        scale=form.scale.contiguous(),
        slopes=tuple(s.contiguous() for s in form.slopes),
    )
    assert torch.equal(run(strided, x, config)[0], run(form, x, config)[0])


@BOTH
@pytest.mark.parametrize("hidden", ["relu", "tanh"])
def test_the_adjoint_form_is_the_vector_jacobian_product(hidden, config):
    net = NETS["3-20-7-3"]
    form, x = make(net, (5, 9), b=1, hidden_activation=hidden, activation="tanh", residual=0.4)
    x.requires_grad_()
    y, adjoint = form.linearised(x)
    c, v = state(*x.shape), state(*x.shape)
    (expected,) = torch.autograd.grad(y, x, c)
    out, _ = run(adjoint.plus(v), c, config)
    torch.testing.assert_close(out, expected + v, rtol=1e-10, atol=1e-12)


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


@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 5), (1, 31, 7, 1), (2, 32, 9, 8), (3, 33, 5, 9)], ids=str
)
def test_bits_are_the_slopes(shape):
    slopes = dense(torch.rand(shape) < 0.5)
    packed = conv.pack_bits(slopes)
    b, o, h, w = shape
    assert packed.shape == (b, h, w, -(-o // 32))
    assert packed.dtype == torch.int32
    channel = torch.arange(packed.shape[-1] * 32)
    bits = (packed[..., channel // 32] >> (channel % 32).int()) & 1
    assert torch.equal(bits[..., :o].bool().permute(0, 3, 1, 2), slopes)
    assert not bits[..., o:].any()


def test_no_slopes_are_no_bits():
    assert conv.pack_bits(dense(torch.ones(0, 5, 3, 3, dtype=torch.bool))).shape == (0, 3, 3, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": (torch.ones(2, 2, 2, 2), torch.ones(2, 2, 3, 3))}, "odd"),
        ({"weights": (torch.ones(2, 2, 9, 9), torch.ones(2, 2, 3, 3))}, "at most 7"),
        ({"weights": (torch.ones(2, 2, 3, 1), torch.ones(2, 2, 3, 3))}, "square"),
        ({"activation": "sine"}, "sine"),
        ({"hidden_activation": "sine"}, "sine"),
        ({"dtype": torch.int32}, "int32"),
        ({"dtype": torch.float64}, "another tensor torch.float32"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take_is_said(change, said):
    form, x = make(((2, 2, 2), (3, 3)), (3, 5), torch.float32)
    assert conv.refusal(form, x) is None
    x = x.to(change.pop("dtype", x.dtype))
    form = dataclasses.replace(form, **change)
    assert said in conv.refusal(form, x)
    with pytest.raises(ValueError, match=said):
        conv.Chain(form, x, tf32=False)


def test_a_state_of_another_layout_shape_or_place_is_an_error():
    form, x = make(((2, 2, 2), (3, 3)), (3, 5))
    chain = conv.Chain(form, x, tf32=False)
    active = conv.active_samples(torch.zeros(2, dtype=torch.int32))
    out = torch.empty_like(x)
    with pytest.raises(ValueError, match="channels-last"):
        chain(x.contiguous(), out, *active)
    with pytest.raises(ValueError, match="channels-last"):
        chain(x, out.contiguous(), *active)
    with pytest.raises(ValueError, match="other memory"):
        chain(x, x, *active)
    with pytest.raises(ValueError, match="must be as the state"):
        chain(x[:1], out, *active)
    with pytest.raises(ValueError, match="must be as the state"):
        chain(x.float(), out, *active)


def test_registers_are_shared_out_among_the_planned_programs():
    known = {(8, 2): 128, (4, 3): 168, (4, 2): None, (8, 3): 80, (4, 4): 128}
    for (warps, blocks), registers in known.items():
        config = Config(True, (8, 16), warps=warps, blocks=blocks)
        assert config.registers == registers
        most = registers or configs.MOST_REGISTERS + 1  # which are given in eights
        assert most * 32 * warps * blocks <= configs.REGISTERS


def test_the_table_is_read_as_it_was_written_and_goes_before_the_rule(tmp_path, monkeypatch):
    shape = Shape((16, 32, 16), (3, 3))
    rule, other = configs.rule(shape, "bfloat16"), SMALL["by layer"]
    assert rule != other
    file = tmp_path / "configs.json"
    table = {(shape, "bfloat16", 90): other, (shape, "tf32", 80): rule}
    configs.write(file, table)
    assert configs.read(file) == table
    monkeypatch.setattr(configs, "_table", lambda: table)
    assert configs.choose(shape, "bfloat16", 90) == other
    assert configs.choose(shape, "bfloat16", 80) == rule
    assert configs.choose(shape, "bfloat16", None) == rule


def test_the_packaged_table_can_be_read():
    for (shape, precision, _), config in configs.read(configs.TABLE).items():
        assert precision in configs.PRECISIONS
        assert configs.can_fuse(shape) or not config.fused


def test_halos_are_counted():
    shape = Shape((1, 32, 20, 1), (3, 3, 5))
    assert configs.scratch_values(shape, (8, 16)) == 14 * 22 * 32 + 12 * 20 * 32
    assert configs.recomputed(shape, (8, 16)) == 14 * 22 / 128


def test_tiles_and_scratch_are_those_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "floors.md").read_text()
    shapes = [Shape(*NETS[name]) for name in ("16-32-16", "1-32-32-1")]
    tiles, scratch = [], []
    for precision in ("bfloat16", "tf32"):
        for shape in shapes:
            tile = configs.rule(shape, precision).tile
            values = configs.scratch_values(shape, tile) * configs.PRECISIONS[precision]
            tiles.append(f"{tile[0]} × {tile[1]}")
            scratch.append(f"{values / 1024:.1f}")
    assert f"| tile | {' | '.join(tiles)} |" in page
    assert f"| scratch a program, KiB | {' | '.join(scratch)} |" in page


@pytest.mark.parametrize("precision", list(configs.PRECISIONS))
def test_candidates_are_many_and_all_of_them_can_run(precision):
    for case in tune.CASES:
        found = tune.candidates(case.shape, precision)
        assert 2 * tune.NEAREST + 1 >= len(found) == len(set(found)) > 20
        assert configs.rule(case.shape, precision) == found[0]
        assert {c.fused for c in found} == {True, False}
        for c in found:
            if c.fused:
                size = configs.scratch_values(case.shape, c.tile) * configs.PRECISIONS[precision]
                assert size * c.blocks <= configs.MOST_SCRATCH
            else:
                assert all(n & (n - 1) == 0 for n in c.tile)


def test_a_dry_run_of_the_tuner_names_what_it_would_measure(capsys):
    tune.main(["--dry-run"])
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(tune.CASES) * len(tune.TUNED)
    assert all("candidates" in line for line in told)


@pytest.fixture
def tuned(monkeypatch):
    """The tuner on a small image and two candidates, by a clock of its own."""
    two = [SMALL["fused"], SMALL["by layer"]]
    briefly, longer = iter([2.0, 1.0]), iter([1.5, 3.0])  # the second seems faster at first
    monkeypatch.setattr(tune, "candidates", lambda *_: two)

    def milliseconds(step, *, briefly, short=briefly, long=longer):
        step()
        return next(short if briefly else long)

    monkeypatch.setattr(tune, "_milliseconds", milliseconds)
    case = tune.Case(Shape((2, 16, 2), (3, 3)), 1, 3, 5)

    def best(seconds=math.inf):
        return tune.best(case, "float64", torch.device("cpu" if INTERPRETED else "cuda"), seconds)

    return two, best


def test_the_tuner_takes_the_fastest_of_those_that_it_measures_again(tuned):
    two, best = tuned
    assert best() == (two[1], 1.5, 2)  # measured again first


def test_when_the_tuners_time_is_up_the_rule_has_been_tried(tuned):
    two, best = tuned
    assert best(0) == (two[0], 1.5, 1)


@pytest.mark.parametrize(
    ("said", "refused"),
    [("PassManager::run failed", True), ("CUDA error: an illegal memory access", False)],
)
def test_the_tuner_goes_on_after_a_config_that_does_not_compile(tuned, monkeypatch, said, refused):
    two, best = tuned
    plain = tune._step

    def step(form, x, config, tf32):
        if config == two[0]:
            raise RuntimeError(said)
        return plain(form, x, config, tf32)

    monkeypatch.setattr(tune, "_step", step)
    if refused:
        assert best()[::2] == (two[1], 2)
    else:
        with pytest.raises(RuntimeError, match=said):
            best()


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
