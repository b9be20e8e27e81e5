"""The denoising example: its parts, and a run of it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
from examples import denoise

ROOT = Path(__file__).parents[1]


def test_no_column_is_shared():
    for width in (354, 355, 384, 512, 640, 741):
        used = [i for part in denoise.columns(width) for i in range(width)[part]]
        assert len(used) == len(set(used))
        train, validation, test = denoise.columns(width)
        assert validation.start - train.stop >= 8
        assert test.start - validation.stop >= 8
        assert test.stop == width
    with pytest.raises(SystemExit, match="at least 354 pixels wide"):
        denoise.columns(353)


def test_photographs_are_cut_where_columns_says():
    ramp = torch.arange(400).expand(300, 400) / 400
    photos = denoise.Photographs.split({"a": ramp, "b": ramp[:290]})
    seen = [
        set(t.unique().tolist()) for t in (photos.train[0], photos.validation[0], photos.test[0])
    ]
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]
    assert photos.test[0].shape == (2, 1, 288, 96)


def test_noise_and_patches_repeat():
    clean = torch.zeros(2, 1, 64, 64)
    a, b, other = denoise.noisy(clean, 1), denoise.noisy(clean, 1), denoise.noisy(clean, 2)
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert abs(float(a.std()) - denoise.SIGMA) < 0.05 * denoise.SIGMA
    images = [torch.rand(50, 60), torch.rand(45, 80)]
    first, second = (denoise.Patches(images, 4, 40, seed=3) for _ in range(2))
    for _ in range(3):
        for s, t in zip(first(), second(), strict=True):
            assert s.shape == (4, 1, 40, 40)
            assert torch.equal(s, t)


def test_psnr():
    clean = torch.full((2, 1, 8, 8), 0.5)
    estimate = clean + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert denoise.psnr(estimate, clean) == pytest.approx([20, 40], abs=1e-3)
    # Beyond [0, 1] there is no light.
    assert denoise.psnr(torch.full((1, 1, 2, 2), 1.5), torch.ones(1, 1, 2, 2)) == [math.inf]


def test_nets_start_alike_and_take_any_size():
    nets = []
    for fixed_point in (False, True):
        torch.manual_seed(0)
        nets.append(denoise.Denoiser(denoise.RECIPE, fixed_point=fixed_point).eval())
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    feedforward, fixed_point = nets
    for shape in ((1, 1, 17, 30), (2, 1, 40, 40)):
        z = torch.rand(shape)
        assert feedforward(z).shape == fixed_point(z).shape == shape
        # The feedforward net is g applied once from 0.
        zero = torch.zeros(shape[0], denoise.RECIPE.channels, *shape[2:])
        once = z + feedforward.readout(feedforward.layer.g(zero, feedforward.lift(z)))
        torch.testing.assert_close(feedforward(z), once)


def test_bad_photographs(tmp_path):
    with pytest.raises(SystemExit, match=r"no file in .* ends in one of \.png"):
        denoise.photographs(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no photograph")
    with pytest.raises(SystemExit, match=r"'broken' can't be read .*remove or replace the file"):
        denoise.photographs(tmp_path)


def test_run(tmp_path):
    """One second a training: everything is printed, drawn and written."""
    record = tmp_path / "figures" / "denoise.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "examples.denoise", "--seconds", "0.5", "--seeds", "3", "4"),
            *("--out", tmp_path / "pictures", "--json", record),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = done.stdout.splitlines()[-1]
    for path in (tmp_path / "pictures/denoise.png", tmp_path / "pictures/convergence.png", record):
        assert path.stat().st_size > 0
        assert str(path) in last
    assert "margin" in done.stdout
    figures = json.loads(record.read_text())
    assert [seed["seed"] for seed in figures["seeds"]] == [3, 4]
    assert figures["summary"]["margin"]["std"] >= 0
    assert all(len(seed["converged"]) == len(denoise.BUNDLED) for seed in figures["seeds"])
    summary = figures["summary"]
    assert summary["NLM"]["mean"] > summary["noisy"]["mean"] + 5


def test_bad_options(capsys):
    for arguments in (["--seconds", "0"], ["--data", "no/such/folder"], ["--second", "x"]):
        with pytest.raises(SystemExit):
            denoise.main(arguments)
    assert "--data: no folder" in capsys.readouterr().err
