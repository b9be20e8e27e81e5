"""Optical flow: warping and batches, loss and error, runs, the study."""

import math

import pytest
import torch
from PIL import Image

from benchmarks.sources import ROOT
from experiments.flow import files, flownet, study
from experiments.flow import task as flow_task
from experiments.flow.task import KINDS, NET, REFINED, Flow
from experiments.training import Place, Run

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = ROOT.parent / "shared" / "data"
CPU = torch.device("cpu")


def moved(rows, columns, u, v):
    """A smooth pattern, moved by (u, v) whole pixels: both images, and their flow."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")

    def pattern(x, y):
        waves = [torch.sin(x * a + y * b + c) for a, b, c in ((0.3, 0.1, 0), (0.1, 0.4, 1))]
        return torch.stack((waves[0], waves[1], waves[0] * waves[1])) / 4 + 0.5

    flow = torch.stack((torch.full((rows, columns), u), torch.full((rows, columns), v)))
    return pattern(x, y)[None], pattern(x - u, y - v)[None], flow[None].float()


def test_warping_by_the_flow_gives_the_first_image():
    first, second, flow = moved(40, 60, 5, -3)
    inside = (..., slice(6, -6), slice(6, -6))
    torch.testing.assert_close(
        flownet.warped(second, flow)[inside], first[inside], atol=1e-5, rtol=0
    )
    assert (second - first)[inside].abs().max() > 0.1
    assert flownet.warped(second[..., :1, :1], flow[..., :1, :1]).shape == (1, 3, 1, 1)


def test_flipped_pairs_keep_their_flow():
    parts = [
        torch.cat(part) for part in zip(*(moved(40, 60, 5, -3) for _ in range(32)), strict=True)
    ]
    first, second, flow = parts
    generator = torch.Generator().manual_seed(0)
    pair, turned = flow_task.flipped(torch.stack((first, second), 1), flow, generator)
    inside = (..., slice(6, -6), slice(6, -6))
    back = flownet.warped(pair[:, 1], turned)
    torch.testing.assert_close(back[inside], pair[:, 0][inside], atol=1e-5, rtol=0)
    seen = {tuple(f[:, 0, 0].tolist()) for f in turned}
    assert seen == {(5, -3), (-5, -3), (5, 3), (-5, 3)}


def test_a_batch_is_the_generators_alone():
    first, second, flow = moved(48, 64, 2, 1)
    samples = [(255 * i).round().to(torch.uint8).expand(6, -1, -1, -1) for i in (first, second)]
    samples.append(flow.expand(6, -1, -1, -1))
    task = Flow()
    settings = task.settings(NET)
    batches = []
    for seed, other in ((1, 0), (1, 9), (2, 0)):
        torch.manual_seed(other)
        batches.append(task.batch(samples, settings, torch.Generator().manual_seed(seed)))
    assert all(torch.equal(a, b) for a, b in zip(*batches[:2], strict=True))
    assert not torch.equal(batches[0][0], batches[2][0])
    assert all(len(t) == 6 and t.dtype == torch.float32 for t in batches[0])
    # Both images are recoloured nearly alike: what moved can still be found.
    back = flownet.warped(batches[0][1], batches[0][2])
    inside = (..., slice(6, -6), slice(6, -6))
    assert (back - batches[0][0])[inside].abs().mean() < 0.1


# --- loss and error --------------------------------------------------------------------------


def test_the_loss_is_zero_at_the_true_flow_alone():
    truth = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(2, 2, 75, 100).clone()
    there = truth.clone()
    truth[0, :, :40] = 1e10  # unknown
    flows = [there[..., : math.ceil(75 / s), : math.ceil(100 / s)].clone() for s in flownet.SCALES]
    assert flow_task.loss(flows, truth).abs().max() < 1e-4
    for i, (scale, weight) in enumerate(zip(flownet.SCALES, flow_task.WEIGHTS, strict=True)):
        off = [f + torch.tensor([3.0, 4.0]).view(2, 1, 1) * (j == i) for j, f in enumerate(flows)]
        pixels = torch.tensor([35 * 100, 75 * 100]) / scale**2  # the known ones
        torch.testing.assert_close(flow_task.loss(off, truth), weight * 5 / 20 * pixels)


def test_the_target_is_the_mean_of_the_known_flow():
    truth = torch.zeros(1, 2, 4, 8)
    truth[0, 0] = torch.arange(8.0)
    truth[0, :, :, 6] = 2e9
    there = files.known(truth)[:, None]
    target, share = flow_task.pooled(torch.where(there, truth, 0), there, 4)
    torch.testing.assert_close(target[0, 0, 0], torch.tensor([1.5, (4 + 5 + 7) / 3]))
    torch.testing.assert_close(share[0, 0], torch.tensor([1.0, 0.75]))


def test_the_error_is_of_known_pixels():
    truth = torch.zeros(2, 2, 5, 6)
    truth[0, 0, 0] = 1e10
    flow = torch.zeros(2, 2, 5, 6)
    flow[0, :, 0] = 77  # where nobody knows
    flow[0, :, 1] = torch.tensor([3.0, 4.0]).view(2, 1)
    flow[1, 0] = 2
    torch.testing.assert_close(flow_task.end_point_error(flow, truth), torch.tensor([5 / 4, 2.0]))
    with pytest.raises(ValueError, match="known flow"):
        flow_task.end_point_error(flow, torch.full_like(truth, 1e10))


class Constant(torch.nn.Module):
    """Finds this flow everywhere."""

    def __init__(self, u, v):
        super().__init__()
        self.flow = torch.tensor([u, v]).view(1, 2, 1, 1)

    def forward(self, first, second):
        assert first.max() <= 1 and first.is_floating_point()
        rows, columns = (math.ceil(n / 4) for n in first.shape[-2:])
        return [self.flow.expand(len(first), 2, rows, columns)], None


def test_a_reduced_images_flow_is_enlarged():
    first = torch.randint(256, (3, 300, 512), dtype=torch.uint8)
    flow = flow_task.real_flow(Constant(2.0, -1.0), first, first, 128, CPU)
    assert flow.shape == (2, 300, 512)
    torch.testing.assert_close(flow[0], torch.full((300, 512), 8.0))
    torch.testing.assert_close(flow[1], torch.full((300, 512), -4.0))
    whole = flow_task.real_flow(Constant(2.0, -1.0), first, first, 600, CPU)
    torch.testing.assert_close(whole[0], torch.full((300, 512), 2.0))


# --- runs ------------------------------------------------------------------------------------


def published(folder, train=12, test=4, rows=48, columns=64):
    """A data set in the layout of Flying Chairs, of moved patterns."""
    place = folder / "FlyingChairs_release"
    (place / "data").mkdir(parents=True)
    for i in range(train + test):
        first, second, flow = moved(rows, columns, i % 5 - 2, i % 3 - 1)
        for name, image in (("img1", first), ("img2", second)):
            pixels = (255 * image[0]).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(place / "data" / f"{i:05d}_{name}.png")
        files.write_flo(place / "data" / f"{i:05d}_flow.flo", flow[0])
    (place / "FlyingChairs_train_val.txt").write_text("1\n" * train + "2\n" * test)
    return folder


def little(task, method, **values):
    return task.quick(task.settings(method)).with_values(**values)


def test_the_seed_decides_what_validates(tmp_path):
    data, task = published(tmp_path), Flow()
    held = []
    for seed in (0, 0, 1):
        settings = little(task, NET, source="flyingchairs", seed=seed)
        parts = task.load(data, settings, tmp_path)
        names = [
            {p.name for p in pairs.pairs}
            for pairs in (parts.train, parts.validation.chosen, parts.validation.test)
        ]
        assert [len(n) for n in names] == [11, 1, 4]
        assert not names[0] & names[1] and not (names[0] | names[1]) & names[2]
        assert parts.test.real == {}
        held.append(names[1])
    assert held[0] == held[1]
    assert held[0] != held[2]


@pytest.mark.parametrize("method", list(KINDS))
def test_every_method_trains_on_published_pairs(method, tmp_path):
    data, task = published(tmp_path), Flow()
    settings = little(task, method, source="flyingchairs", epochs=4, learning_rate=2e-3)
    parts = task.load(data, settings, tmp_path)
    result = Run(task, settings, parts, tmp_path / "run", Place(CPU)).finish()
    log = result["log"]
    assert log[-1]["loss"] < log[0]["loss"]
    assert all({"EPE", "test EPE"} <= entry.keys() for entry in log)
    best = min(log, key=lambda entry: entry["EPE"])
    assert result["best"]["epoch"] == best["epoch"]
    assert result["test"]["EPE"] == pytest.approx(best["test EPE"], rel=1e-5)
    assert ("iterations" in result["test"]) == (method == REFINED)
    if method == REFINED:
        assert result["test"]["failed"] == 0
        assert result["test"]["iterations"] >= 1
        assert all(entry["failed"] == entry["failed_backward"] == 0 for entry in log)


def test_a_resumed_run_ends_as_if_it_had_not_stopped(tmp_path):
    data, task = published(tmp_path), Flow()
    settings = little(task, REFINED, source="flyingchairs", epochs=3, penalty=10.0)
    parts = task.load(data, settings, tmp_path)
    whole = Run(task, settings, parts, tmp_path / "whole", Place(CPU)).finish()

    class Stopped(Run):
        def _validate(self, entry):
            super()._validate(entry)
            if len(self.log) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stopped(task, settings, parts, tmp_path / "stopped", Place(CPU)).finish()
    resumed = Run(task, settings, parts, tmp_path / "stopped", Place(CPU)).finish()
    for a, b in zip(whole["log"], resumed["log"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_generated_pairs_train_and_are_studied(tmp_path):
    task = Flow()
    for method in KINDS:
        settings = little(task, method, epochs=1)
        parts = task.load(None, settings, tmp_path)
        assert (tmp_path / "pairs-64x48-16-8").is_dir()
        result = Run(task, settings, parts, tmp_path / method / "seed-0", Place(CPU)).finish()
        assert 0 < result["test"]["EPE"] < 20
    tables = study.study(task, tmp_path, None, CPU)
    assert len(tables) == 2  # there are no photographs
    gives, radius = tables.values()
    assert [row["flow"] for row in gives][-2:] == ["16 iterations", "converged"]
    assert float(gives[-1]["EPE"]) == pytest.approx(float(gives[-2]["EPE"]), abs=2e-3)
    assert 0 < float(radius[0]["worst"]) < 1
    with Image.open(tmp_path / "published" / "pictures.jpg") as picture:
        assert picture.width == 4 * (study.TILE + 4) - 4
    assert not (tmp_path / "pictures.jpg").exists()


def test_nothing_trained_gives_no_tables(tmp_path):
    assert study.study(Flow(), tmp_path, None, CPU) == {}


def test_the_error_of_a_picture_is_of_its_pixels(tmp_path):
    """A tile of no motion is white, and the true flow has its colours."""
    _, _, flow = moved(48, 64, 5, -3)
    first = torch.zeros(3, 48, 64, dtype=torch.uint8)
    shown = study.row(first, flow[0], {NET: torch.zeros(2, 48, 64), REFINED: flow[0]})
    assert [name for name, _ in shown] == [
        "first image",
        "true flow",
        f"{NET}: {math.hypot(5, 3):.2f} px",
        f"{REFINED}: 0.00 px",
    ]
    assert (shown[2][1] == 255).all()
    assert torch.equal(shown[1][1], shown[3][1])


@pytest.mark.skipif(not (DATA / "flow").is_dir(), reason="the data sets are not here")
def test_the_real_pairs_are_evaluated(tmp_path):
    task = Flow()
    settings = little(task, REFINED, epochs=1)
    parts = task.load(DATA, settings, tmp_path)
    assert {name: len(pairs) for name, pairs in parts.test.real.items()} == {
        "chairs": 9,
        "Middlebury": 8,
    }
    result = Run(task, settings, parts, tmp_path / REFINED / "seed-0", Place(CPU)).finish()
    for name in ("EPE, chairs", "EPE, Middlebury"):
        assert 1 < result["test"][name] < 50
    rows = next(iter(study.study(task, tmp_path, DATA, CPU).values()))
    assert len(rows) == 17
    # The mean lengths that the data's own page tells.
    still = {row["pair"]: float(row["no motion"]) for row in rows}
    assert still["Middlebury Urban2"] == pytest.approx(8.39, abs=0.01)
    assert still["chairs 0000005"] == pytest.approx(30.80, abs=0.01)
    assert all(row["converged"] == "yes" for row in rows)
    with Image.open(tmp_path / "pictures.jpg") as picture:
        assert picture.height > 6 * 100


def test_bad_settings_say_what_must_hold(tmp_path):
    task = Flow()
    with pytest.raises(ValueError, match="name its folder by --data"):
        task.load(None, little(task, NET, source="flyingchairs"), tmp_path)
    with pytest.raises(ValueError, match=r"source must be .* \(got 'sintel'\)"):
        task.load(None, little(task, NET, source="sintel"), tmp_path)
