"""The suite that trains the old layer's demonstration, and what it is compared with."""

from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import suites
from benchmarks.problems.labels import Shape, batches
from benchmarks.suites import dropin


def test_the_dropin_suite_runs_to_its_end(capsys):
    assert command.main(["dropin", "--tiny", "--device", "cpu", "-k", "FPI_NN"]) == 0
    printed = capsys.readouterr().out
    assert "the old layer's demonstration" in printed
    assert all(name in printed for name in dropin.METHODS)


def test_the_nets_start_alike_and_take_the_same_steps():
    rows = dropin.rows(suites.Options(tiny=True), "FPI_NN")
    old, compat, accelerated, layer = rows
    assert old["forward"] == compat["forward"]
    assert old["backward"] == compat["backward"]
    assert compat["losses"] == pytest.approx(old["losses"], rel=1e-5)
    assert accelerated["losses"] == pytest.approx(old["losses"], rel=1e-3)
    assert [r["refused"] for r in (compat, accelerated, layer)] == [None] * 3
    assert all(0 < r["gradient_difference"] < 1e-2 for r in (accelerated, layer))
    assert len(old["samples"]) == old["steps"] == 3


@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_steps_that_the_limit_cut_off_are_counted():
    old, compat, accelerated, _ = dropin.rows(suites.Options(tiny=True), "FPI_GD")
    assert old["forward"] == compat["forward"] == [31] * 3
    assert (old["at_limit"], accelerated["at_limit"]) == (3, 0)


def test_another_gradient_is_refused(monkeypatch):
    def scaled(self, given):
        solve = original(self, given)
        return lambda z: 1.1 * solve(z)

    original = dropin.Training.compat
    monkeypatch.setattr(dropin.Training, "compat", scaled)
    options = suites.Options(tiny=True, without=(dropin.ACCELERATED, dropin.LAYER))
    _, compat = dropin.rows(options, "FPI_NN")
    assert "off the old layer's" in compat["refused"]


def test_made_texts_are_like_bibtexs():
    made = list(batches(Shape(), 10, None))
    words, labels = (torch.cat(part) for part in zip(*made, strict=True))
    assert words.shape == (400, 1836) and labels.shape == (400, 159)
    assert 50 < words.sum(1).mean() < 100
    assert 2 < labels.sum(1).mean() < 3
    assert labels.sum(1).min() >= 1
    again = next(batches(Shape(), 10, None))
    assert all(torch.equal(a, b) for a, b in zip(again, made[0], strict=True))


def test_bibtex_is_needed_where_it_is_asked_for(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"bibtex_train\.npz"):
        next(batches(Shape(), 1, tmp_path))
