"""The generator of pairs for optical flow: exact, repeatable, resumable."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from flow_pairs import NAMES, a_pair, picture
from PIL import Image

from benchmarks.sources import ROOT
from experiments import images
from experiments.flow import chairs, files, scenes

SIZE = (64, 48)


def smooth_photographs(seed=0):
    """One in colour and one in gray, with detail of a few pixels."""
    rng = np.random.default_rng(seed)
    out = []
    for shape in ((14, 18, 3), (16, 12)):
        coarse = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        out.append(np.asarray(coarse.resize((shape[1] * 6, shape[0] * 6), Image.BICUBIC)))
    return out


@pytest.fixture(scope="module")
def album():
    return scenes.Album(smooth_photographs())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small data set of the generator's."""
    folder = tmp_path_factory.mktemp("made")
    chairs.generate(folder, 8, 4, SIZE, seed=3, photographs=smooth_photographs())
    return folder


@dataclass(frozen=True)
class Waves:
    """A smooth texture with a formula, at any point."""

    number: int

    def at(self, points):
        x, y = points
        k = 0.11 + 0.03 * self.number
        waves = (np.sin(k * x + 0.2 * y), np.cos(0.15 * x - k * y), np.sin(k * (x + y)))
        return 0.5 + 0.5 * np.stack(waves)


def seen_fully(covers, layer):
    """Where that layer [N] covers all, and none above it anything."""
    number = np.arange(len(covers))[:, None]
    above = np.where(number > layer, covers, 0).max(0)
    return (np.take_along_axis(covers, layer[None], 0)[0] == 1) & (above == 0)


@pytest.mark.parametrize("index", range(6))
def test_the_flow_is_exact(album, index):
    drawn = chairs.scene(album, SIZE, 5, index)
    layers = [replace(layer, texture=Waves(i)) for i, layer in enumerate(drawn.layers)]
    scene, points = scenes.Scene(tuple(layers)), scenes.pixels(SIZE)
    before = scene.covers(points, 1)
    flow = scene.pair(SIZE)[2].reshape(2, -1)
    there, top = points + flow, scenes.top_layer(before)
    after = scene.covers(there, 2)
    shown = seen_fully(before, top)
    both = shown & seen_fully(after, top)
    assert both.mean() > 0.5 and len(np.unique(top[both])) > 2
    first, second = scene.render(points, 1), scene.render(there, 2)
    assert abs(first - second)[:, both].max() < 1e-4
    # Without the flow they differ, and so they do where another layer comes before the point.
    assert abs(first - scene.render(points, 2))[:, both].mean() > 1e-3
    hidden = shown & (scenes.top_layer(after) > top)
    assert not hidden.any() or abs(first - second)[:, hidden].mean() > 0.05
    # There the flow is the layer's that the second picture hides.
    for i in np.unique(top[hidden]):
        at = hidden & (top == i)
        own = layers[i].texture.at(layers[i].source(there[:, at], 2))
        assert abs(own - first[:, at]).max() < 1e-4


def test_shapes_cover_their_area(album):
    """The pixels' shares add up to the polygon's area, in both pictures."""
    size = (200, 200)
    points = scenes.pixels(size)
    motion = scenes.about(np.array([100, 100]), 1.15 * scenes.turn(0.3), np.array([4, -7]))
    rng = np.random.default_rng(0)
    place = scenes.about(np.zeros(2), scenes.turn(0.4) @ np.diag([60, 45]), np.array([100.3, 99]))
    for draw in (scenes.smooth, scenes.cornered, scenes.smooth, scenes.cornered):
        part = draw(rng).placed(place)
        hole = replace(part, corners=0.7 * part.corners, hole=True)
        angle = np.arctan2(part.corners[1], part.corners[0]).argsort()
        x, y = part.corners[:, angle]
        area = 0.5 * abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())
        for parts, share in (((part,), 1), ((part, hole), 1 - 0.49)):
            layer = scenes.Layer(Waves(0), parts, motion)
            assert layer.cover(points, 1).sum() == pytest.approx(share * area, rel=0.01)
            assert layer.cover(points, 2).sum() == pytest.approx(share * area * 1.15**2, rel=0.01)


def test_a_thin_bar_is_as_wide_as_it_says():
    bar = scenes.bar(np.array([10.0, 12.3]), np.array([50.0, 12.3]), 3.0)
    layer = scenes.Layer(Waves(0), (bar,), np.eye(2, 3))
    cover = layer.cover(scenes.pixels(SIZE), 1).reshape(48, 64)
    assert cover[:, 20:40].sum(0) == pytest.approx(np.full(20, 3.0))
    assert cover[:10].max() == 0 and cover[:, :9].max() == 0


def test_edges_are_a_pixel_wide_and_half_covered_is_not_covered():
    """In both pictures, though the second's shape is 1.5 times as large."""
    motion = np.array([[1.5, 0, 2], [0, 1.5, 0]])
    bar = scenes.bar(np.array([10.0, 20]), np.array([30.0, 20]), 8)
    scene = scenes.Scene(
        (scenes.Layer(Waves(0), (), np.eye(2, 3)), scenes.Layer(Waves(1), (bar,), motion))
    )
    out = np.array([-0.6, -0.4, -0.1, 0.1, 0.4, 0.6])  # pixels beyond the lower edge
    for view, x, edge in ((1, 20, 24), (2, 32, 36)):
        points = np.stack([np.full(6, float(x)), edge + out])
        covers = scene.covers(points, view)
        assert covers[1] == pytest.approx(np.array([1, 0.9, 0.6, 0.4, 0.1, 0]))
        if view == 1:
            flow = scene.flow(points, covers)
            assert flow[:, 3:].tolist() == np.zeros((2, 3)).tolist()
            assert flow[0, :3] == pytest.approx(0.5 * 20 + 2)
            assert flow[1, :3] == pytest.approx(0.5 * points[1, :3])


def test_a_chair_has_no_seams():
    """Where a leg or the back meets the seat, all of a pixel is covered."""
    place = scenes.about(np.zeros(2), np.diag([70, 90]), np.array([100, 100]))
    along = np.linspace(0.02, 0.95, 200)[:, None]
    closed = 0
    for seed in range(10):
        parts = [p.placed(place) for p in scenes.chair(np.random.default_rng(seed), 0.05)]
        layer = scenes.Layer(Waves(0), tuple(parts), np.eye(2, 3))
        seat, *legs = ((p.centre[:, None] + p.corners).T for p in parts[-5:])
        joints = []
        if not any(p.hole for p in parts):
            # A back that leans leaves the ends of the seat's edge free.
            joints.append(seat[0] + (0.25 + along / 2) * (seat[1] - seat[0]))
            closed += 1
        for leg in legs:
            start, end = (leg[0] + leg[3]) / 2, (leg[1] + leg[2]) / 2
            joints.append(start + along * (end - start))
        for points in joints:
            assert layer.cover(points.T, 1).min() > 0.99
    assert closed


def test_a_crop_is_the_photograph(album):
    identity = np.eye(2, 3)
    for i, photograph in enumerate(smooth_photographs()):
        height, width = photograph.shape[:2]
        crop = scenes.crop(album, i, identity, np.zeros(3), np.array([1, 0.5, 0.25]))
        seen = crop.at(scenes.pixels((width, height))).reshape(3, height, width)
        expected = np.broadcast_to(np.atleast_3d(photograph), (height, width, 3)) / 255
        expected = (expected * [1, 0.5, 0.25]).transpose(2, 0, 1)
        assert seen == pytest.approx(expected, abs=1e-3)
        beyond = crop.at(np.array([[-3.0, width + 4], [5, -2]]))
        assert beyond[:, 0] == pytest.approx(expected[:, 5, 3], abs=1e-3)
        assert beyond[:, 1] == pytest.approx(expected[:, 2, width - 6], abs=1e-3)


def test_a_small_crop_is_of_the_right_place():
    """Of halved photographs too: a ramp stays where it is."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (160, 200))
    album = scenes.Album([np.ascontiguousarray(ramp)])
    for step in (1.0, 2.0, 3.5, 6.0):
        frame = np.array([[step, 0, 40], [0, step, 30]])
        crop = scenes.crop(album, 0, frame, np.zeros(3), np.ones(3))
        x = np.arange(3.0, 15)
        seen = crop.at(np.stack([x, np.full(12, 4.0)]))
        # torch's bicubic is off a ramp by up to 0.05 of a sample; half a sample would be seen.
        assert seen[0] * 255 == pytest.approx(40 + step * x, abs=0.08 * step)


def warped(second, flow):
    """The second photographs [B, 3, H, W] where the first's pixels went, and which stay inside."""
    height, width = flow.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = x + flow[:, 0], y + flow[:, 1]
    grid = torch.stack([x * 2 / (width - 1) - 1, y * 2 / (height - 1) - 1], -1)
    inside = (grid.abs() <= 1).all(-1)
    out = torch.nn.functional.grid_sample(second.float(), grid, align_corners=True)
    return out, inside[:, None]


def test_the_flow_takes_the_second_photograph_back(made):
    pairs = files.Pairs(files.find_pairs(made))
    first, second, flow = pairs[torch.arange(len(pairs))]
    back, inside = warped(second, flow)
    apart = ((first.float() - second).abs() * inside).mean((1, 2, 3))
    left = ((first.float() - back).abs() * inside).mean((1, 2, 3))
    assert (left < apart).all()
    assert left.mean() < apart.mean() / 3


def contents(folder):
    """Of the whole files; a program that was killed may leave a part of one."""
    whole = [p for p in folder.rglob("*.*") if p.suffix != ".part"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in whole}


def test_generate_writes_the_published_layout(made):
    assert {p.name for p in made.iterdir()} == {"data", "made.json", files.SPLIT}
    assert len(list((made / "data").iterdir())) == 36
    train, test = files.split(made)
    assert [p.name for p in train] == [f"{i:05d}" for i in range(1, 9)]
    assert [p.name for p in test] == [f"{i:05d}" for i in range(9, 13)]
    flows = [files.read_pair(pair)[2] for pair in (*train, *test)]
    assert all(flow.shape == (2, 48, 64) and files.known(flow).all() for flow in flows)
    assert len({flow.numpy().tobytes() for flow in flows}) == 12


def test_pairs_depend_on_the_seed_and_their_index_alone(made, tmp_path):
    """Not on how many there are, nor on the number of processes."""
    chairs.generate(tmp_path / "a", 3, 2, SIZE, 3, smooth_photographs(), workers=2)
    for mine, other in ((1, 1), (3, 3), (4, 9), (5, 10)):
        for path, whole in zip(
            chairs.paths(tmp_path / "a", mine), chairs.paths(made, other), strict=True
        ):
            assert path.read_bytes() == whole.read_bytes()
    chairs.generate(tmp_path / "b", 1, 0, SIZE, 4, smooth_photographs())
    for a, b in zip(chairs.paths(tmp_path / "a", 1), chairs.paths(tmp_path / "b", 1), strict=True):
        assert a.read_bytes() != b.read_bytes()


def test_generate_goes_on_where_it_was(made, tmp_path, monkeypatch):
    folder, drawn = tmp_path / "set", []
    shutil.copytree(made, folder)
    whole = contents(folder)
    (folder / files.SPLIT).unlink()
    (folder / "data" / "00003_img2.png").unlink()
    (folder / "data" / "00010_flow.flo").rename(folder / "data" / "00010_flow.flo.part")
    scene = chairs.scene
    monkeypatch.setattr(chairs, "scene", lambda *given: drawn.append(given[-1]) or scene(*given))
    chairs.generate(folder, 8, 4, SIZE, 3, smooth_photographs())
    assert contents(folder) == whole
    assert drawn == [2, chairs.FIRST_TEST + 1]


def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch):
    monkeypatch.setattr(chairs, "write_flo", lambda path, flow: path.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chairs.generate(tmp_path / "set", 1, 0, SIZE, 3, smooth_photographs())
    assert not chairs.paths(tmp_path / "set", 1)[2].exists()
    assert not (tmp_path / "set" / files.SPLIT).exists()
    monkeypatch.undo()
    chairs.generate(tmp_path / "set", 1, 0, SIZE, 3, smooth_photographs())
    assert len(files.split(tmp_path / "set")[0]) == 1
    assert not list((tmp_path / "set").rglob("*.part"))


def test_a_folder_of_other_values_is_refused(made, tmp_path):
    photographs, whole = smooth_photographs(), contents(made)
    others = smooth_photographs(seed=1)
    for arguments, message in (
        ((8, 4, SIZE, 4, photographs), r"made\.json, seed 3 \(got seed 4\)"),
        ((9, 4, SIZE, 3, photographs), r"made\.json, train 8 \(got train 9\)"),
        ((8, 4, (64, 50), 3, photographs), r"size \[64, 48\] \(got size \[64, 50\]\)"),
        ((8, 4, SIZE, 3, others), r"sha256"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            chairs.generate(made, *arguments)
        assert str(made) in str(raised.value)
    assert contents(made) == whole
    a_pair(*(tmp_path / "data" / name for name in NAMES["published"]))
    with pytest.raises(ValueError, match=r"data must be empty or made by this program"):
        chairs.generate(tmp_path, 8, 4, SIZE, 3, photographs)
    (tmp_path / "made.json").write_text("{")
    with pytest.raises(ValueError, match=r"made\.json must tell"):
        chairs.generate(tmp_path, 8, 4, SIZE, 3, photographs)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"train": 0}, "train of at least 1"),
        ({"test": -1}, "test of at least 0"),
        ({"train": 100_000}, "99,999 pairs at most"),
        ({"size": (128, 8)}, "sides of at least 16"),
        ({"seed": -1}, "seed at least 0"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"photographs": []}, "photographs must be one at least"),
        ({"photographs": [np.zeros((20, 20, 2), np.uint8)]}, "photographs must be uint8"),
        ({"photographs": [np.zeros((20, 20))]}, "photographs must be uint8"),
    ],
)
def test_impossible_values_are_refused(tmp_path, arguments, message):
    given = {"train": 1, "test": 0, "photographs": smooth_photographs()} | arguments
    with pytest.raises(ValueError, match=message):
        chairs.generate(tmp_path / "set", **given)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("size", [(128, 96), (512, 384)])
def test_motions_are_like_flying_chairs(album, size):
    """In pixels of a width of 512: the nine examples have a mean of 10, a median of 5."""
    every = scenes.pixels(size)[:, :: size[0] * size[1] // 1500]
    means, longest, lengths = [], [], []
    for index in range(100):
        scene = chairs.scene(album, size, 0, index)
        length = np.hypot(*scene.flow(every, scene.covers(every, 1))) * 512 / size[0]
        means.append(length.mean())
        longest.append(length.max())
        lengths.append(length)
    assert 7 < np.mean(means) < 15
    assert 3 < np.median(lengths) < 9
    assert 30 < np.mean(longest) < 90
    assert 70 < max(longest) < 300
    assert np.quantile(means, 0.1) < 4


def test_shapes_move_against_the_background(album):
    for index in range(10):
        ground, *shapes = chairs.scene(album, SIZE, 0, index).layers
        assert scenes.FEWEST <= len(shapes) <= scenes.MOST
        for layer in shapes:
            assert not np.allclose(layer.motion, ground.motion, atol=1e-6)


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(chairs, "photographs", lambda data: smooth_photographs())
    arguments = [str(tmp_path / "set"), "--train", "2", "--test", "1", "--size", "32", "24"]
    chairs.main(arguments)
    train, test = files.split(tmp_path / "set")
    assert (len(train), len(test)) == (2, 1)
    assert files.read_pair(test[0])[0].shape == (3, 24, 32)
    with pytest.raises(SystemExit, match=r"seed 0 \(got seed 1\)"):
        chairs.main([*arguments, "--seed", "1"])


def test_two_programs_may_make_one_folder_at_once(tmp_path):
    command = [sys.executable, "-m", "experiments.flow.chairs", str(tmp_path / "set")]
    command += ["--train", "12", "--test", "2", "--size", "48", "32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    programs = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for program in programs:
        _, errors = program.communicate()
        assert program.returncode == 0, errors
    train, test = files.split(tmp_path / "set")
    assert (len(train), len(test)) == (12, 2)
    assert not [path for path in (tmp_path / "set").rglob("*") if path.suffix == ".part"]


def test_photographs_are_scikit_images_and_the_folders(tmp_path):
    pytest.importorskip("skimage")
    alone = chairs.photographs()
    assert len(alone) == len(images.bundled()) - 1
    assert {p.ndim for p in alone} == {2, 3}
    folder = tmp_path / "denoise" / "Train400"
    folder.mkdir(parents=True)
    gray = picture(folder / "b.png", 20, 30, mode="L")
    colour = picture(folder / "a.png", 20, 30)
    *others, first, second = chairs.photographs(tmp_path)
    assert len(others) == len(alone)
    assert np.array_equal(first, colour) and np.array_equal(second, gray)
    scenes.Album(chairs.photographs(tmp_path))
    os.truncate(folder / "a.png", 100)
    with pytest.raises(ValueError, match=r"a\.png must be a whole image"):
        chairs.photographs(tmp_path)


@pytest.mark.parametrize("keep", [False, True])
def test_pairs_are_read_in_the_rows_order(made, keep, monkeypatch):
    found, reads = files.find_pairs(made), []
    read_pair = files.read_pair
    monkeypatch.setattr(files, "read_pair", lambda pair: reads.append(pair) or read_pair(pair))
    pairs = files.Pairs(found, keep=keep)
    assert len(pairs) == 12 and not reads
    rows = [7, 0, 7, 3]
    for _ in range(2):
        first, second, flow = pairs[torch.tensor(rows)]
        assert (first.dtype, second.dtype, flow.dtype) == (torch.uint8, torch.uint8, torch.float32)
        for i, row in enumerate(rows):
            for part, expected in zip((first, second, flow), read_pair(found[row]), strict=True):
                assert torch.equal(part[i], expected)
    assert {pair.name for pair in reads} == {"00008", "00001", "00004"}
    assert len(reads) <= 4 if keep else len(reads) == 8
    with pytest.raises(ValueError, match=r"rows must be \[B\]"):
        pairs[torch.tensor([], dtype=torch.int64)]


def test_a_batch_has_one_size(made, tmp_path):
    a_pair(*(tmp_path / name for name in NAMES["published"]))
    pairs = files.Pairs([*files.find_pairs(made), *files.find_pairs(tmp_path)])
    assert pairs[torch.tensor([12])][2].shape == (1, 2, 8, 10)
    with pytest.raises(ValueError, match=r"one size \(got 64x48 of .*00003.* 10x8 of .*00002_img1"):
        pairs[torch.tensor([2, 12])]
