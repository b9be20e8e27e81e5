"""Pairs for optical flow: their files, layouts and colours."""

import gzip
import re
import struct

import numpy as np
import pytest
import torch
from flow_pairs import NAMES, a_pair, flow_of, picture
from PIL import Image, ImageFile

from benchmarks.sources import ROOT
from experiments.flow import files
from experiments.flow.colour import colours, wheel

DATA = ROOT.parent / "shared" / "data"


# --- .flo ------------------------------------------------------------------------------------


def test_flo_is_middleburys_format(tmp_path):
    path = tmp_path / "a.flo"
    values = [[(1.5, -2.0), (0.25, 3.0), (1e10, 0.0)], [(4.0, 5.0), (-6.0, 7.0), (0.0, -2e9)]]
    content = b"PIEH" + struct.pack("<ii", 3, 2)
    content += b"".join(struct.pack("<ff", *uv) for row in values for uv in row)
    path.write_bytes(content)
    flow = files.read_flo(path)
    assert flow.dtype == torch.float32
    assert torch.equal(flow, torch.tensor(values).permute(2, 0, 1))
    assert files.known(flow).tolist() == [[True, True, False], [True, True, False]]
    files.write_flo(path, flow)
    assert path.read_bytes() == content


@pytest.mark.parametrize("height,width", [(1, 1), (5, 7), (48, 64)])
def test_flo_round_trip_bit_for_bit(tmp_path, height, width):
    flow = flow_of(height, width) * 100
    flow[0, 0, 0] = -0.0
    files.write_flo(tmp_path / "a.flo", flow)
    packed = tmp_path / "a.flo.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.flo").read_bytes()))
    for path in (tmp_path / "a.flo", packed):
        assert torch.equal(files.read_flo(path).view(torch.int32), flow.view(torch.int32))


def damaged_flo():
    head, body = struct.pack("<fii", files.TAG, 4, 3), np.ones(24, "<f4").tobytes()

    def sized(width, height):
        return struct.pack("<fii", files.TAG, width, height) + body

    nan = np.ones(24, "<f4")
    nan[7] = np.nan
    return {
        "empty": (b"", "must be a .flo file"),
        "head": (head[:9], "must be a .flo file"),
        "tag": (b"PIEX" + head[4:] + body, "must be a .flo file"),
        "order": (struct.pack(">fii", files.TAG, 4, 3) + body, "must be a .flo file"),
        "short": (head + body[:-1], "must have 96 bytes of flow .*got 95"),
        "long": (head + body + b"\0", "must have 96 bytes of flow .*got more"),
        "negative": (sized(-4, 3), "must say a size .*got -4x3"),
        "nothing": (sized(4, 0), "must say a size .*got 4x0"),
        "huge": (sized(30_000, 30_000), "must say a size .*got 30000x30000"),
        "nan": (head + nan.tobytes(), "must hold numbers .*NaN"),
    }


@pytest.mark.parametrize("kind", damaged_flo())
def test_damaged_flo_is_named(tmp_path, kind):
    content, message = damaged_flo()[kind]
    path, packed = tmp_path / "bad.flo", tmp_path / "bad.flo.gz"
    path.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for one in (path, packed):
        with pytest.raises(ValueError, match=re.escape(str(one)) + f" {message}"):
            files.read_flo(one)


def test_damaged_gzip_is_named(tmp_path):
    path = tmp_path / "bad.flo.gz"
    files.write_flo(tmp_path / "good.flo", flow_of(6, 5))
    packed = gzip.compress((tmp_path / "good.flo").read_bytes())
    wrong_sum = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]
    other_block = packed[:10] + b"\xff" * 8 + packed[18:]
    for content in (packed[:-20], packed[:-4], b"no gzip at all", wrong_sum, other_block):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.flo\.gz must be a whole \.gz file"):
            files.read_flo(path)


def test_flow_that_is_none_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"a.flo: a flow must be \[2, H, W\] \(got \[3, 4, 5\]\)"):
        files.write_flo(tmp_path / "a.flo", torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"a.flo: .*NaN"):
        files.write_flo(tmp_path / "a.flo", torch.full((2, 2, 2), float("nan")))
    with pytest.raises(FileNotFoundError, match=r"a\.flo"):
        files.read_flo(tmp_path / "a.flo")


# --- photographs -----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "ppm"])
def test_photographs_are_read_as_they_are(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    pixels = picture(path)
    assert np.array_equal(files.read_image(path).permute(1, 2, 0).numpy(), pixels)
    gray = picture(path, mode="L")
    if ending == "png":
        assert np.array_equal(files.read_image(path).numpy(), np.stack([gray] * 3))


def test_damaged_photographs_are_named(tmp_path, monkeypatch):
    path = tmp_path / "good.png"
    picture(path, 60, 50)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :]
    broken = [("png", c) for c in (whole[:middle], whole[:-6], flipped, b"", b"\x89PNG garbage")]
    for ending in ("ppm", "jpg"):
        path = tmp_path / f"good.{ending}"
        picture(path, 60, 50)
        broken.append((ending, path.read_bytes()[:-400]))
    for ending, content in broken:
        path = tmp_path / f"bad.{ending}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad\.{ending} must be a whole image"):
            files.read_image(path)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep)
    with pytest.raises(ValueError, match=r"deep\.png must be .* of 8 bits .*I;16"):
        files.read_image(deep)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        files.read_image(tmp_path / "none.png")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match=r"good\.png .*LOAD_TRUNCATED_IMAGES"):
        files.read_image(tmp_path / "good.png")


# --- layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "data"])
@pytest.mark.parametrize("layout", NAMES)
def test_every_layout_is_found(tmp_path, layout, place):
    folder = tmp_path / place
    for old, new in (("", ""), ("2_", "1_"), ("2-", "1-"), ("Venus", "Army")):
        names = [name.replace(old, new) for name in NAMES[layout]]
        flow = a_pair(*(folder / name for name in names))
    (folder / "README.md").write_text("of something else")
    pairs = files.find_pairs(tmp_path)
    expected = {"middlebury": ["Army", "Venus"], "examples": ["0000001", "0000002"]}
    assert [p.name for p in pairs] == expected.get(layout, ["00001", "00002"])
    assert pairs[1] == files.Pair(pairs[1].name, *(folder / name for name in NAMES[layout]))
    first, second, read = files.read_pair(pairs[1])
    assert first.shape == second.shape == (3, 8, 10)
    assert not torch.equal(first, second)
    assert torch.equal(read, flow)


@pytest.mark.parametrize("layout", NAMES)
def test_a_missing_part_is_named(tmp_path, layout):
    paths = [tmp_path / name for name in NAMES[layout]]
    for gone in paths:
        a_pair(*paths)
        gone.unlink()
        stem = gone.name.split(".")[0]
        with pytest.raises(FileNotFoundError, match=rf"{stem}\.(png|flo) .*is missing"):
            files.find_pairs(tmp_path)


def test_a_folder_without_pairs_is_told_the_layouts(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"NAME_img1.*NAME-gt.*frame10") as raised:
            files.find_pairs(folder)
        assert str(folder) in str(raised.value)


def test_sizes_that_differ_are_named(tmp_path):
    pair = files.Pair("a", *(tmp_path / name for name in ("a.png", "b.png", "c.flo")))
    a_pair(pair.first, pair.second, pair.flow)
    picture(pair.second, 10, 9)
    with pytest.raises(ValueError, match=r"a\.png and .*b\.png .*got 10x8 and 10x9"):
        files.read_pair(pair)
    picture(pair.second)
    files.write_flo(pair.flow, flow_of(8, 11))
    with pytest.raises(ValueError, match=r"a\.png and .*c\.flo .*got 10x8 and 11x8"):
        files.read_pair(pair)


def test_the_split_is_the_files(tmp_path):
    for i in range(1, 5):
        a_pair(*(tmp_path / "data" / f"0000{i}_{p}" for p in ("img1.png", "img2.png", "flow.flo")))
    text = tmp_path / files.SPLIT
    with pytest.raises(FileNotFoundError, match=r"FlyingChairs_train_val\.txt is missing"):
        files.split(tmp_path)
    text.write_text("1\n2\n1\n1\n")
    for folder in (tmp_path, tmp_path / "data"):
        train, test = files.split(folder)
        assert [p.name for p in train] == ["00001", "00003", "00004"]
        assert [p.name for p in test] == ["00002"]
    for wrong, message in (
        ("1\n2\n1\n", r"each of the 4 pairs .*got 3"),
        ("1\n2\n1\n1\n1\n", r"each of the 4 pairs .*got 5"),
        ("1\n2\n3\n1\n", r"must hold 1 for training .*got '3'"),
        ("", r"each of the 4 pairs .*got 0"),
    ):
        text.write_text(wrong)
        with pytest.raises(ValueError, match=rf"FlyingChairs_train_val\.txt .*{message}"):
            files.split(tmp_path)


# --- real pairs ------------------------------------------------------------------------------

LENGTHS = {
    "middlebury": {
        "Dimetrodon": 2.06,
        "Grove2": 3.09,
        "Grove3": 3.91,
        "Hydrangea": 3.73,
        "RubberWhale": 1.26,
        "Urban2": 8.39,
        "Urban3": 7.31,
        "Venus": 3.80,
    },
    "flyingchairs": dict(
        zip(
            [f"{i:07d}" for i in range(9)],
            (6.05, 4.51, 4.35, 6.00, 25.56, 30.80, 2.99, 9.34, 5.00),
            strict=True,
        )
    ),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_real_pairs_have_the_known_lengths(name):
    folder = DATA / "flow" / name
    if not folder.exists():
        pytest.skip("the data set is not here")
    found = {}
    for pair in files.find_pairs(folder):
        _, _, flow = files.read_pair(pair)
        found[pair.name] = float(flow.norm(dim=0)[files.known(flow)].mean())
    assert found == pytest.approx(LENGTHS[name], abs=0.01)


# --- colours ---------------------------------------------------------------------------------


def test_the_wheel_has_middleburys_colours():
    table = wheel()
    assert table.shape == (55, 3)
    # Red, yellow, green, cyan, blue and magenta, where Baker et al.'s arcs of 15, 6, 4, 11, 13 end.
    assert table[[0, 15, 21, 25, 36, 49]].tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [0, 1, 0],
        [0, 1, 1],
        [0, 0, 1],
        [1, 0, 1],
    ]
    assert (table.amax(1) == 1).all() and (table.amin(1) == 0).all()


def shown(u, v, largest=1.0):
    return colours(torch.tensor([u, v]).view(2, 1, 1), largest)[0, 0].tolist()


def test_colours_tell_direction_and_length():
    assert shown(0.0, 0.0) == [255, 255, 255]
    assert shown(1.0, 0.0) == [255, 0, 0]
    assert shown(0.5, 0.0) == [255, 127, 127]
    assert shown(2.0, 0.0) == [191, 0, 0]  # longer than the largest
    right, left, down, up = shown(1.0, 0.0), shown(-1.0, 0.0), shown(0.0, 1.0), shown(0.0, -1.0)
    assert left[0] == 0 and left[2] == 255  # opposite of red
    assert down[0] == 255 and down[1] > 200 and down[2] == 0  # yellow
    assert up[2] == 255 and up[0] < 128 and up[1] == 0  # violet
    assert len({tuple(c) for c in (right, left, down, up)}) == 4


def test_unknown_flow_is_black_and_counts_for_nothing():
    flow = torch.zeros(2, 2, 3)
    flow[0, 0, 0], flow[0, 0, 1] = 1e10, 3.0
    flow[1, 1, 2] = -2e9
    out = colours(flow)
    assert out.shape == (2, 3, 3) and out.dtype == torch.uint8
    assert out[0, 0].tolist() == out[1, 2].tolist() == [0, 0, 0]
    assert out[0, 1].tolist() == [255, 0, 0]  # the longest of what is known
    assert (out[1, :2] == 255).all()


def test_colours_of_what_is_no_flow():
    with pytest.raises(ValueError, match=r"must be \[2, H, W\] \(got \[3, 4, 4\]\)"):
        colours(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"largest must be above 0 \(got 0\)"):
        colours(torch.zeros(2, 4, 4), 0)
