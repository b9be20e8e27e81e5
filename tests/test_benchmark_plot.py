"""Figures from result files: made where their rows are, the same bytes each time, words as text."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers import write_results

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

from benchmarks import plot, records  # noqa: E402
from benchmarks.figures import page, roofline  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FACTS = {
    "command": "python -m benchmarks full --json full.json",
    "timestamp": "2030-01-02T03:04:05+00:00",
    "commit": "0123456789ab",
    "device": "cpu",
    "device_name": "Some(R) Processor, 2 cores",
    "threads": 2,
    "versions": {"torch": "2.13.0"},
}
TIMES = {  # of a solve, over the plain loop's, and the family
    "Picard": (0.81, "ours"),
    "Anderson": (0.62, "ours"),
    "Picard, whole": (0.22, "ours"),
    "Anderson, whole": (0.25, "ours"),
    "compat layer": (0.9, "ours"),
    "plain loop": (2.4, "plain"),
    "plain loop, compacted": (1.0, "plain"),
    "plain loop, compacted, test every 3rd": (0.96, "plain"),
    "plain Anderson, compacted": (2.1, "plain"),
    "old layer, pure Python": (4.4, "replaced"),
    "unrolled": (3.1, "replaced"),
    "torchdeq fixed point": (5.2, "torchdeq"),
    "torchdeq Anderson": (13.3, "torchdeq"),
    "jaxopt AndersonAcceleration": (9.1, "jaxopt"),
    "optimistix FixedPointIteration": (3.3, "optimistix"),
}
RNG = np.random.default_rng(0)


def timed(seconds, n=15):
    samples = seconds * np.exp(0.06 * RNG.normal(size=n))
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    row = {"median_s": middle, "q1_s": low, "q3_s": high, "iqr_s": high - low, "repeats": n}
    return row | {"samples": samples.tolist(), "rounds": list(range(n))}


def head(suite, method, family, batch=256, size=128, problem="hard", mode="forward", **more):
    row = {"suite": suite, "problem": problem, "batch": batch, "size": size, "mode": mode}
    row |= {"dtype": "float32", "method": method, "family": family, "refused": None}
    return row | {"worst_residual": 5e-5, "gradient_error": None} | more


def solves(suite="solve", mode="forward", places=((256, 128), (1024, 256), (64, 1024), (4096, 64))):
    rows = []
    for batch, size in places:
        for method, (scale, family) in TIMES.items():
            row = head(suite, method, family, batch, size, mode=mode)
            if method == "torchdeq Anderson" and size == 1024:
                row["refused"] = "worst residual 3.1 times the tolerance"
            elif method == "jaxopt AndersonAcceleration":
                row |= {"skipped": "jaxopt is not installed"}
            else:
                less = {"worst_residual": 3e-4} if method == "compat layer" else {}
                row |= timed(1e-8 * batch * size * scale) | less
            rows.append(row)
    return rows


def scalings():
    axes = {
        "batch": (16, 64, 256, 1024, 4096, 16384),
        "size": (16, 32, 64, 128, 256, 512, 1024),
        "spread": (0.5, 0.8, 0.9, 0.95, 0.98, 0.99),
        "iterations": (10, 30, 100, 300),
    }
    rows = []
    for axis, values in axes.items():
        for value in values:
            for method, (scale, family) in TIMES.items():
                at = {axis: value} if axis in ("batch", "size") else {}
                row = head("scaling", method, family, **at, axis=axis, value=value)
                cost = {"batch": 20 + value, "size": 20 + value, "spread": 1 / (1 - value)}
                if axis == "spread" and value > 0.97 and "optimistix" in method:
                    row["refused"] = "gradient of W off by 0.012"
                else:
                    row |= timed(1e-5 * scale * cost.get(axis, value))
                rows.append(row)
    return rows


def memories():
    state, rows = 256 * 128 * 4, []
    for method, (scale, family) in TIMES.items():
        for count in (8, 16, 32, 64, 128):
            states = 3 * count + 8 if method == "unrolled" else 6 + 2 * round(3 * scale)
            more = {"iterations": count, "peak_bytes": states * state, "state_bytes": state}
            rows.append(head("memory", method, family, mode="forward+backward", **more))
    limit = {"iterations": 20, "peak_bytes": 4 * state, "state_bytes": state, "limit": 6 * state}
    return [*rows, head("memory", "Picard", "ours", problem="half", **limit)]


def kernels():
    rows = [
        {"suite": "ceilings", "method": "copy", "what": "copy bytes/s", "dtype": "float32"}
        | {"working_set": size << 20, "value": value}
        | timed(1e-3)
        for size, value in ((1, 55e9), (8, 31e9), (256, 14e9))
    ]
    product = {"suite": "ceilings", "method": "product", "what": "flop/s", "dtype": "float32"}
    rows.append(product | {"value": 142e9} | timed(0.1))
    for method, vectors, flops in (("Anderson step", 14, 37), ("Picard step", 3, 5)):
        for batch, size in ((4096, 1024), (65536, 64)):
            row = {"suite": "kernels", "method": method, "batch": batch, "size": size}
            row |= {"dtype": "float32", "bytes": 4 * vectors * batch * size}
            row |= {"flops": flops * batch * size, "working_set": 8 * batch * size}
            row["copy_bytes_per_s"] = 13.8e9
            rows.append(row | timed(row["bytes"] / 13e9))
    return rows


def convergences():
    rows = []
    for method, (scale, family) in TIMES.items():
        rate = 0.7 if "Anderson" in method else 0.93
        residuals = [*(rate ** np.arange(1, 9 / (1 - rate) ** 0.9)).tolist()]
        more = {"curve": "history", "rtol": 1e-4, "residuals": residuals}
        rows.append(head("convergence", method, family, **more))
        for rtol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            row = head("convergence", method, family, curve="work-precision", rtol=rtol)
            row["worst_residual"] = 0.7 * rtol
            refused = {"refused": "worst residual 9 times the tolerance"}
            bad = rtol < 1e-5 and family == "torchdeq"
            rows.append(row | (refused if bad else timed(-scale * 1e-3 * np.log(rtol))))
    return rows


def everything():
    rows = solves() + solves("training", "forward+backward", ((256, 128), (64, 1024)))
    rows += solves("peers", places=((256, 128),))
    return rows + scalings() + memories() + kernels() + convergences()


def write(path, rows, facts=FACTS):
    return write_results(path, facts, rows)


SVG = "{http://www.w3.org/2000/svg}"


def words(path):
    """An SVG's texts."""
    return ["".join(e.itertext()).strip() for e in ElementTree.parse(path).iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Everything, in the default folder: name → path of its SVG."""
    path = write(tmp_path_factory.mktemp("result") / "full.json", everything())
    written = plot.plot(path)
    assert {p.parent for p in written} == {path.parent / "plots"}
    assert all(p.with_suffix(".png") in written for p in written)
    return {p.stem.removeprefix("full-"): p for p in written if p.suffix == ".svg"}


def test_every_figure_is_made(drawn):
    assert set(drawn) == {
        "solve-hard-forward-float32",
        "training-hard-forward-backward-float32",
        "peers-hard-forward-float32",
        *(f"scaling-{a}-hard-forward-float32" for a in ("batch", "size", "spread", "iterations")),
        "memory-hard-256x128-forward-backward-float32",
        "roofline",
        "convergence-hard-256x128-float32",
        "work-precision-hard-256x128-forward-float32",
    }


def test_methods_are_named_in_words_and_the_run_below(drawn):
    skipped = {"jaxopt AndersonAcceleration"}
    for name, path in drawn.items():
        texts = words(path)
        contest = name.startswith(("solve", "training", "peers"))
        wanted = set(TIMES) - (skipped if contest else set())
        if name == "roofline":
            wanted = {"1", "2", "3", "4"}
        assert wanted <= set(texts), name
        assert any("commit 0123456789ab" in t and FACTS["device_name"] in t for t in texts)
        assert FACTS["command"] in texts
        png = path.with_suffix(".png").read_bytes()
        assert png[:4] == b"\x89PNG" and int.from_bytes(png[16:20]) == 1600  # 800 at 2 a pixel


def test_what_was_refused_or_skipped_is_named_and_has_no_point(drawn):
    text = " ".join(words(drawn["solve-hard-forward-float32"]))
    assert "torchdeq Anderson at 64x1024 (refused: worst residual 3.1 times the tolerance)" in text
    assert "(skipped: jaxopt is not installed)" in text
    assert "0.9" in text and "*" in text  # the compat layer's residual is six times the loop's
    text = " ".join(words(drawn["scaling-spread-hard-forward-float32"]))
    assert "optimistix FixedPointIteration at 0.98, 0.99 (refused: gradient of W off by" in text
    text = " ".join(words(drawn["work-precision-hard-256x128-forward-float32"]))
    assert "torchdeq Anderson at 10⁻⁶ (refused" in text


def test_the_roofline_says_how_near(drawn):
    text = " ".join(words(drawn["roofline"]))
    assert "Anderson step, 4096x1024, float32" in text and "% of its roof" in text
    assert "product, float32: 142 GFLOP/s" in text and "256 MiB: 14 GB/s" in text


def test_roofs():
    bound = roofline.roofs(kernels())
    row = {"dtype": "float32", "bytes": 10, "flops": 1, "working_set": 9 << 20}
    assert bound.over(row) == pytest.approx(31e9 / 10)
    assert bound.over(row | {"working_set": None}) == pytest.approx(14e9 / 10)
    assert bound.over(row | {"copy_bytes_per_s": 20e9}) == pytest.approx(20e9 / 10)
    assert bound.over(row | {"flops": 1000}) == 142e9
    assert roofline.Roofs({}, {}).over(row) is None


def test_values_are_drawn_where_they_are():
    """Not only that there is a figure: the numbers in it."""
    rows = [head("scaling", "Picard", "ours", axis="batch", value=b, batch=b) for b in (4, 1, 16)]
    rows = [row | timed(1e-3 * row["value"]) for row in rows]
    (picture,) = plot.figures(FACTS, rows)
    (line,) = picture.figure.axes[0].lines
    assert line.get_xdata().tolist() == [1, 4, 16]
    wanted = sorted(row["median_s"] * 1e3 for row in rows)
    assert line.get_ydata().tolist() == pytest.approx(wanted)

    (picture,) = plot.figures(FACTS, solves(places=((256, 128),)))
    ax = picture.figure.axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    ends = {round(b.get_y() + b.get_height() / 2): b.get_x() + b.get_width() for b in ax.patches}
    assert ends[names.index("Anderson")] == pytest.approx(0.62 / 0.96, rel=0.1)
    assert ends[names.index("torchdeq fixed point")] == pytest.approx(5.2 / 0.96, rel=0.1)


def test_a_method_looks_the_same_everywhere():
    assert page.look("Picard", "ours").colour == page.look("Picard step", "ours").colour
    assert page.look("Picard, whole", "ours").colour == page.look("Picard", "ours").colour
    looks = [page.look(m, f) for m, (_, f) in TIMES.items()]
    assert len({(s.colour, s.marker, s.dashes) for s in looks}) == len(looks)
    assert page.look("x", "torchdeq") == page.look("x", "torchdeq")


def test_the_same_json_gives_the_same_bytes(tmp_path, drawn):
    """In another process too: no date, no random names, no order of a set."""
    path = next(iter(drawn.values())).parent.parent / "full.json"
    command = [sys.executable, "-m", "benchmarks.plot", str(path), "--out", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = [Path(line) for line in done.stdout.splitlines()]
    assert len(printed) == 2 * len(drawn)
    for new in printed:
        assert new.read_bytes() == (path.parent / "plots" / new.name).read_bytes(), new.name


def test_no_torch_is_needed():
    code = "import sys, benchmarks.plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_only_what_has_rows_is_made():
    assert [p.name for p in plot.figures(FACTS, memories())] == [
        "memory-hard-256x128-forward-backward-float32"
    ]
    no_plain = [row for row in solves() if row["family"] != "plain"]
    assert plot.figures(FACTS, no_plain) == []


def test_optional_keys_may_be_missing():
    """Only what makes a row that row; times without quartiles, one point, odd values."""
    timing = {"samples": [1e-3], "median_s": 1e-3}
    rows = [
        {"suite": "solve", "method": "plain loop", "family": "plain"} | timing,
        {"suite": "solve", "method": "Picard"} | timing,
        {"suite": "solve"},
        {"suite": "scaling", "method": "Picard", "axis": "batch", "value": 1} | timing,
        {"suite": "scaling", "method": "Anderson", "axis": "batch", "value": 1, "median_s": None},
        {"suite": "scaling", "axis": "batch"},
        {"suite": "kernels", "method": "Picard step", "bytes": 8, "flops": 2} | timing,
        {"suite": "memory", "method": "Picard", "iterations": 1, "peak_bytes": 0},
        {"suite": "memory", "method": "Picard", "iterations": 2, "peak_bytes": 9},
        {"suite": "memory", "method": "Picard", "iterations": 4, "peak_bytes": 9},
        {"suite": "convergence", "method": "Picard", "residuals": [1.0, float("nan"), 0.0]},
        {"suite": "convergence", "method": "Picard", "residuals": []},
        {"suite": "convergence", "method": "P", "rtol": 0.1, "worst_residual": 0.1} | timing,
        {},
    ]
    names = [p.name for p in plot.figures({}, rows)]
    made = ["solve", "scaling-batch", "memory", "roofline", "convergence", "work-precision"]
    assert names == made


def test_labels_move_apart_and_no_further():
    assert page.apart([1.0, 3.0], 0.5, 4.0) == [1.0, 3.0]
    assert page.apart([1.0, 1.0], 0.5, 4.0) == [0.75, 1.25]
    assert page.apart([0.0, 0.0, 3.9, 4.0], 0.5, 4.0) == [0.0, 0.5, 3.5, 4.0]
    places = page.apart([2.0, 0.1, 2.1, 2.2], 0.4, 4.0)
    assert np.diff(sorted(places)).min() >= 0.4 - 1e-12
    assert np.argsort(places).tolist() == [1, 0, 2, 3]


def test_numbers_as_people_write_them():
    values = {0.02: "0.02", 500: "500", 1e-5: "10⁻⁵", 3e-6: "3·10⁻⁶", 1e6: "10⁶", 16384: "16384"}
    assert {v: page.number(v) for v in values} == values


def test_results_of_one_name_do_not_overwrite_each_other(tmp_path, capsys):
    paths = []
    for device in ("cpu-a", "cpu-b"):
        (tmp_path / device).mkdir()
        paths.append(str(write(tmp_path / device / "full.json", memories())))
    assert plot.main([*paths, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(set(printed)) == 4 and all(Path(p).is_file() for p in printed)
    assert "cpu-a-full-memory" in printed[0] and "cpu-b-full-memory" in printed[2]


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "which does not exist"),
        ("", "must be a result file"),
        ("not JSON", "must be a result file"),
        ("[]", "must be a result file"),
        ('{"facts": {}, "rows": []}', "must be a result file"),
        ('{"facts": [], "benchmarks": [], "untimed": []}', "must have an object under 'facts'"),
        ('{"facts": {}, "benchmarks": [], "untimed": []}', "0 rows, of no suite"),
        (
            '{"facts": {}, "benchmarks": [], "untimed": [{"index": 0, "suite": "import"}]}',
            "1 rows, of import): run one of these suites with --json",
        ),
    ],
)
def test_bad_input_is_told(tmp_path, capsys, content, message):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    assert plot.main([str(path)]) == 2
    told = capsys.readouterr().err
    assert message in told and str(path) in told and "Traceback" not in told
    assert not (tmp_path / "plots").exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path, capsys):
    path = write(tmp_path / "full.json", memories())
    assert plot.main([str(path), "--out", str(path / "plots")]) == 2
    assert "full.json" in capsys.readouterr().err


def test_files_are_as_the_harness_writes_them(tmp_path):
    rows = kernels()
    _, loaded = records.load(write(tmp_path / "full.json", rows))
    assert [{k: v for k, v in row.items() if k != "index"} for row in loaded] == rows
