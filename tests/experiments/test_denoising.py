"""Denoising: photographs, the two nets, equal time, what is read and reported."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from benchmarks.sources import ROOT
from experiments import __main__ as program
from experiments import checkpoint, images, page, training
from experiments.denoising import photographs
from experiments.denoising.photographs import Noisy, Patches, psnr
from experiments.denoising.task import METHODS, Denoise, Denoiser
from experiments.layers import UnrolledConvolutions
from fpi_cuda import ConvStep, FixedPointLayer

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = ROOT.parent / "shared" / "data"
CPU = torch.device("cpu")
SMALL = ["--set", "channels=4", "hidden=6", "patches=40", "tests=1", "validation=1"]


@pytest.fixture
def data(tmp_path):
    """Smooth images of several sizes, in the folders' names."""
    rng = np.random.default_rng(0)
    for name, shapes in (
        ("Train400", [(48, 48)] * 6),
        ("BSD68", [(45, 61), (61, 45)]),
        ("Set12", [(40, 40)]),
    ):
        folder = tmp_path / "data" / "denoise" / name
        folder.mkdir(parents=True)
        for i, (height, width) in enumerate(shapes):
            y, x = np.mgrid[:height, :width]
            a, b = rng.uniform(0.05, 0.3, 2)
            pixels = 127 + 100 * np.sin(a * x) * np.cos(b * y)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return tmp_path / "data"


def options(**values):
    settings = Denoise().settings("FPI_NN-25").with_values(channels=4, hidden=6, **values)
    return settings.options


# --- photographs -----------------------------------------------------------------------------


def test_psnr_is_scikit_images():
    rng = np.random.default_rng(0)
    clean = rng.random((3, 1, 9, 14)).astype(np.float32)
    estimate = clean + rng.normal(0, 0.2, clean.shape).astype(np.float32)
    ours = psnr(torch.from_numpy(estimate), torch.from_numpy(clean)).tolist()
    for value, a, b in zip(ours, clean, estimate.clip(0, 1), strict=True):
        assert value == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-4)


def test_patches_are_of_their_photograph_in_all_orientations():
    image = torch.arange(30.0 * 40).reshape(30, 40)
    other = -1 - torch.arange(20.0 * 20).reshape(20, 20)
    patches = Patches.of([image, other], 400)
    cut = patches[torch.arange(0, 400, 2)].cut(8, torch.Generator().manual_seed(0))
    assert cut.shape == (200, 1, 8, 8)
    seen = set()
    for patch in cut[:, 0]:
        down, right = float(patch[1, 0] - patch[0, 0]), float(patch[0, 1] - patch[0, 0])
        assert {abs(down), abs(right)} == {1.0, 40.0}  # an upright piece of the first, turned
        assert patch.min() >= 0
        seen.add((down, right))
    assert len(seen) == 8
    assert (patches[torch.tensor([1, 3])].cut(8, torch.Generator().manual_seed(0)) < 0).all()
    rows, columns = (cut / 40).floor(), cut % 40
    for places, last in ((rows, 29), (columns, 39)):
        assert (int(places.min()), int(places.max())) == (0, last)  # the edges are reached


def test_the_noise_has_its_deviation_and_stays_the_same():
    clean = torch.zeros(300, 300)
    sample = Noisy.of("a", clean, 15.0, 3)
    assert float(sample.noisy.std()) * 255 == pytest.approx(15, rel=0.01)
    assert torch.equal(sample.noisy, Noisy.of("a", clean, 15.0, 3).noisy)
    task = Denoise()
    settings = task.settings("FPI_NN-15")
    flat = Patches.of([torch.full((50, 50), 0.5)], 400)
    clean, z = task.batch(flat, settings, torch.Generator().manual_seed(0))
    assert float((z - clean).std()) * 255 == pytest.approx(15, rel=0.01)


def test_what_validates_does_not_train(data):
    task = Denoise()
    for seed in (0, 1):
        settings = task.settings("FPI_NN-25").with_values(seed=seed, validation=2)
        parts = task.load(data, settings, data)
        held = [sample.clean for sample in parts.validation]
        assert (len(parts.train.photographs), len(held)) == (5, 1)  # a fifth at most
        assert not any(torch.equal(a, b) for a in parts.train.photographs for b in held)
    assert [len(samples) for samples in parts.test.values()] == [2, 1]
    assert torch.equal(
        parts.test["Set12"][0].noisy, task.load(data, settings, data).test["Set12"][0].noisy
    )


TURNS = [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in range(1, 8))]


@pytest.mark.skipif(not (DATA / "denoise").is_dir(), reason="the data sets are not here")
@pytest.mark.parametrize("turn", TURNS)
def test_no_piece_of_a_training_photograph_is_in_a_test_photograph(turn):
    """Varied pieces of 16 pixels of a row, of all over each, against every place in every row.

    Of the test photographs in each of their eight orientations.
    """
    found = photographs.read(DATA)
    assert (len(found.train), [len(some) for some in found.tests.values()]) == (399, [68, 12])
    shared = images.read(DATA / "denoise" / "Train400" / f"{photographs.SHARED}.png", "L")
    tests = [to_bytes(image) for some in found.tests.values() for image in some.values()]
    tests = [np.rot90(pixels[::-1] if turn >= 4 else pixels, turn % 4) for pixels in tests]
    assert not hits([to_bytes(image) for image in found.train.values()], tests)
    assert bool(hits([shared], tests)) == (turn in (0, 4))  # its rows are whole in these


def to_bytes(image):
    return (image * 255).round().to(torch.uint8).numpy()


def windows(pixels):
    return np.lib.stride_tricks.sliding_window_view(np.ascontiguousarray(pixels), 16, axis=1)


def hits(train, tests):
    """How many places of the tests hold a piece of the others."""
    needles = set()
    for pixels in train:
        for row in windows(pixels[6::12]):
            for part in np.array_split(row, 3):
                varied = part.std(1)
                if varied.max() > 8:
                    needles.add(part[varied.argmax()].tobytes())
    assert needles
    heads = np.unique([np.frombuffer(needle[:8], np.uint64)[0] for needle in needles])
    count = 0
    for pixels in tests:
        pieces = windows(pixels)
        likely = np.isin(np.ascontiguousarray(pieces[..., :8]).view(np.uint64)[..., 0], heads)
        count += sum(piece.tobytes() in needles for piece in pieces[likely])
    return count


def test_bad_images_are_named(data, tmp_path):
    path = data / "denoise" / "Train400" / "03.png"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"text", whole[:60] + b"\0" * 30 + whole[90:]):
        path.write_bytes(broken)
        photographs.read.cache_clear()
        with pytest.raises(ValueError, match=r"03.png must be a whole image of 8 bits"):
            photographs.read(data)
    path.unlink()
    assert len(photographs.read(data).train) == 5
    with pytest.raises(FileNotFoundError, match=r"gone.png"):
        images.read(data / "gone.png")
    for file in (data / "denoise" / "Set12").iterdir():
        file.unlink()
    photographs.read.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"Set12 must hold images"):
        photographs.read(data)
    with pytest.raises(FileNotFoundError, match=r"must hold the folders Train400, BSD68 and Set12"):
        photographs.read(tmp_path)
    (tmp_path / "Train400").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must hold BSD68 or Set12 beside Train400"):
        photographs.read(tmp_path)


# --- the nets --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_from_zero_are_those_of_g(steps):
    g = ConvStep(4, 1, hidden=(6,))
    z = torch.randn(2, 1, 11, 8)
    x = torch.zeros(2, 4, 11, 8)
    for _ in range(steps):
        x = g(x, z)
    assert torch.allclose(UnrolledConvolutions(g, steps)(z), x, atol=1e-6)


def test_the_two_nets_have_one_g_and_one_readout():
    nets = []
    for more in ({}, METHODS["feedforward-25"]):
        torch.manual_seed(0)
        nets.append(Denoiser(options() | more))
    for (name, a), (other, b) in zip(
        nets[0].named_parameters(), nets[1].named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    assert sum(p.numel() for p in nets[0].parameters()) == sum(
        p.numel() for p in nets[1].parameters()
    )


@pytest.mark.parametrize("method", ["FPI_NN-25", "feedforward-25", "unrolled-25"])
def test_autocast_trains_too(method):
    torch.manual_seed(0)
    net = Denoiser(options() | METHODS[method])
    with torch.autocast("cpu", torch.bfloat16):
        estimate, penalty = net(torch.rand(2, 1, 40, 40))
        ((estimate - 0.5).square().mean() + penalty).backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (8, 130)])
def test_images_of_any_size(size):
    net = Denoiser(options()).eval()
    with torch.no_grad():
        estimate, penalty = net(torch.rand(2, 1, *size))
    assert estimate.shape == (2, 1, *size)
    assert bool(net.layer.last.converged.all())
    assert float(penalty) == 0


def test_the_penalty_pulls_a_wild_step_back():
    torch.manual_seed(0)
    net = Denoiser(options(penalty=1.0))
    with torch.no_grad():
        for layer in net.layer.g.layers:
            layer.weight.mul_(3)
    optimizer, penalties = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(60):
        _, penalty = net(torch.rand(2, 1, 40, 40))
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        penalties.append(float(penalty.detach()))
    assert max(penalties[:20]) > 0.1
    assert max(penalties[-5:]) < 0.05 * max(penalties[:20])


# --- runs ------------------------------------------------------------------------------------


def run(task, folder, data, **values):
    small = {"channels": 4, "hidden": 6, "patches": 24, "tests": 1, "validation": 1}
    settings = task.settings("FPI_NN-25").with_values(**small | values)
    place = training.Place(CPU)
    return training.Run(task, settings, task.load(data, settings, folder), folder, place)


def test_a_run_that_was_stopped_ends_with_the_same_bits(data, tmp_path, monkeypatch):
    run(Denoise(), tmp_path / "a", data, epochs=3).finish()
    task, calls = Denoise(), []

    def stop(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return Denoise.validate(task, *given)

    monkeypatch.setattr(task, "validate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(task, tmp_path / "b", data, epochs=3).finish()
    run(Denoise(), tmp_path / "b", data, epochs=3).finish()
    a, b = (checkpoint.load(tmp_path / name / "last.pt")["model"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_learning_rate_falls_to_nothing(data, tmp_path):
    going = run(Denoise(), tmp_path / "run", data, epochs=2)
    rates = []
    going.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    going.finish()
    assert len(rates) == 12
    assert rates[0] == pytest.approx(4e-3 / 20)  # the first of the steps that warm up
    assert max(rates) < 4e-3
    assert rates[-1] < rates[-2] < rates[-3]


def test_a_time_ends_a_run_and_is_not_given_twice(data, tmp_path):
    task = Denoise()
    result = run(task, tmp_path / "run", data, seconds=0.5, patches=2000).finish()
    assert 0.5 <= sum(entry["seconds"] for entry in result["log"]) < 1.5
    assert result["log"][-1]["steps"] < 500
    (tmp_path / "run" / "result.json").unlink()
    assert len(run(task, tmp_path / "run", data, seconds=0.5, patches=2000).finish()["log"]) == len(
        result["log"]
    )


def test_the_feedforward_net_is_given_the_same_time(data, tmp_path, monkeypatch, capsys):
    out, docs = tmp_path / "runs", tmp_path / "docs"
    docs.mkdir()
    monkeypatch.setattr(page, "PAGE", docs / "experiments.md")
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    page.PAGE.write_text(f"{page.BEGIN}\n{page.END}\n")
    methods = ["FPI_NN-25", "feedforward-25", "feedforward-25-steps", "unrolled-25"]
    given = ["--data", str(data), "--out", str(out), "--seeds", "0", *SMALL, "epochs=2"]
    assert program.main(["denoise", "train", *given, "--methods", "feedforward-25"]) == 1
    assert "train that first" in capsys.readouterr().err
    given += ["--methods", *methods]
    assert program.main(["denoise", "train", *given]) == 0
    results = {
        m: json.loads((out / f"denoise/{m}/seed-0/result.json").read_text()) for m in methods
    }
    seconds = {m: sum(e["seconds"] for e in r["log"]) for m, r in results.items()}
    steps = {m: sum(e["steps"] for e in r["log"]) for m, r in results.items()}
    assert seconds["FPI_NN-25"] <= seconds["feedforward-25"] < 1.5 * seconds["FPI_NN-25"] + 0.1
    assert steps["feedforward-25-steps"] == steps["FPI_NN-25"] == 20 < steps["feedforward-25"]
    assert {"BSD68", "Set12", "iterations", "failed"} == results["FPI_NN-25"]["test"].keys()
    for action in ("time", "study", "report"):
        assert program.main(["denoise", action, *given]) == 0
    text = page.PAGE.read_text()
    content = json.loads(next((tmp_path / "results").glob("*/denoise.json")).read_text())
    a, b = (results[m]["test"]["BSD68"] for m in methods[:2])
    assert f"| FPI_NN-25 | feedforward-25 | 1 | {a - b:+.2f} |" in text
    assert "Noise that was not trained on" in text
    (timed,) = json.loads((out / "denoise" / "times.json").read_text()).values()
    assert [row["method"] for row in timed] == methods
    assert timed[0]["of the first"] == "1.00" and float(timed[0]["iterations"]) > 1
    assert all(row["weights"].startswith("epoch") for row in timed)
    assert "A training step, in turns" in text
    assert content["pictures"] == ["pictures.jpg"]
    names = {p.name.split("-denoise-")[1] for p in (docs / "plots").glob("*")}
    wanted = {"loss-25.svg", "score-25.svg", "solves-25.svg", "pictures.jpg"}
    assert wanted <= names
    assert not any("-15" in name for name in names)


def test_a_finished_run_of_equal_time_is_not_done_again(data, tmp_path, capsys):
    out = tmp_path / "runs"
    given = ["--data", str(data), "--out", str(out), "--seeds", "0", *SMALL, "epochs=2"]
    assert program.main(["denoise", "train", *given, "--methods", "FPI_NN-25"]) == 0
    path = out / "denoise/FPI_NN-25/seed-0/result.json"
    result = json.loads(path.read_text())
    for entry, seconds in zip(result["log"], (0.1437641, 0.1437642), strict=True):
        entry["seconds"] = seconds
    path.write_text(json.dumps(result))
    given += ["--methods", "feedforward-25"]
    for _ in range(2):
        assert program.main(["denoise", "train", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = (line for line in lines if line.startswith("feedforward-25, seed 0:"))
    assert first == second
    path.write_text(json.dumps(result | {"threads": 64}))
    assert program.main(["denoise", "train", *given]) == 1
    assert "with threads 64 (got 1)" in capsys.readouterr().err


def test_without_data_scikit_images_photographs_are_denoised(tmp_path):
    given = ["--out", str(tmp_path), "--methods", "FPI_NN-25", "--quick"]
    assert program.main(["denoise", "train", *given]) == 0
    result = json.loads((tmp_path / "denoise/FPI_NN-25/seed-0/result.json").read_text())
    assert result["test"]["scikit-image"] > 24  # noisy: 20.4
    assert result["test"]["failed"] == 0
    assert FixedPointLayer.__name__ in repr(
        Denoise().model(Denoise().settings("FPI_NN-25"), parts=None)
    )


@pytest.mark.skipif(not (DATA / "denoise").is_dir(), reason="the data sets are not here")
def test_the_real_photographs_quickly(tmp_path):
    given = ["--data", str(DATA), "--out", str(tmp_path), "--methods", "FPI_NN-25", "--quick"]
    assert program.main(["denoise", "train", *given, "--set", "epochs=2"]) == 0
    result = json.loads((tmp_path / "denoise/FPI_NN-25/seed-0/result.json").read_text())
    assert min(result["test"]["BSD68"], result["test"]["Set12"]) > 23  # noisy: 20.4
    assert result["test"]["failed"] == 0
