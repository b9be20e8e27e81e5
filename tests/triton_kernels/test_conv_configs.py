"""Configs of the convolution kernels: the rule, the table, and the tuner that writes it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conv_chains import NETS, SMALL
from interpreted import INTERPRETED

from fpi_cuda.backends.triton import configs, tune
from fpi_cuda.backends.triton.configs import Config, Shape


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
