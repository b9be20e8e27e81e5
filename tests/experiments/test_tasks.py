"""The experiments: files, metric, checkpoints, resuming, two processes, the page."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks import sources
from benchmarks.sources import ROOT
from experiments import __main__ as program
from experiments import checkpoint, page, training
from experiments.multilabel import samples as multilabel
from experiments.multilabel.bibtex import Multilabel
from experiments.task import Settings

FEATURES, LABELS = 30, 7
DATA = ROOT.parent / "shared" / "data"


def samples(b, seed):
    """Labels that depend on the features, and on one another."""
    rng = np.random.default_rng(seed)
    x = (rng.random((b, FEATURES)) < 0.3).astype(np.uint8)
    weight = np.random.default_rng(7).normal(size=(FEATURES, LABELS))
    y = (x @ weight > 1).astype(np.uint8)
    y[:, 1] |= y[:, 0]
    y[y.sum(1) == 0, 2] = 1
    return x, y


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for part, b, seed in (("train", 200, 0), ("test", 80, 1)):
        x, y = samples(b, seed)
        np.savez_compressed(folder / f"small_{part}.npz", X=x, Y=y)
    return folder


@pytest.fixture
def small(monkeypatch):
    """A task like Bibtex with sizes of its own."""
    task = Multilabel("small")
    monkeypatch.setitem(program.TASKS, "small", task)
    return task


# --- the metric ------------------------------------------------------------------------------


def test_f1_is_scikit_learns(data):
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for density in (0.0, 0.1, 0.5, 1.0):
        p = (rng.random((50, LABELS)) < density).astype(np.float32)
        y = (rng.random((50, LABELS)) < 0.3).astype(np.float32)
        expected = sklearn.f1_score(y, p, average="samples", zero_division=0)
        ours = multilabel.example_f1(torch.from_numpy(p), torch.from_numpy(y)).mean()
        assert float(ours) == pytest.approx(expected, abs=1e-6)


def test_the_threshold_is_the_best_of_all():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(100, LABELS, generator=g)
    labels = (scores > 0.4 + 0.1 * torch.randn(100, LABELS, generator=g)).float()
    chosen, value = multilabel.best_threshold(scores, labels)
    for t in (0.05, 0.2, 0.3, 0.45, 0.6):
        assert value >= float(multilabel.example_f1((scores > t).float(), labels).mean())
    assert 0.3 < chosen < 0.5


# --- files -----------------------------------------------------------------------------------


def arff(path, x, y):
    names = [f"f{i}" for i in range(FEATURES)] + [f"l{i}" for i in range(LABELS)]
    lines = ["@relation small", *(f"@attribute {name} {{0,1}}" for name in names), "@data"]
    for row in np.concatenate([x, y], 1):
        lines.append("{" + ",".join(f"{i} 1" for i in row.nonzero()[0]) + "}")
    path.write_text("\n".join(lines) + "\n")


def test_mulans_files_hold_what_the_npz_hold(data, tmp_path):
    pytest.importorskip("arff")
    folder = tmp_path / "mulan"
    folder.mkdir()
    for part, b, seed in (("train", 200, 0), ("test", 80, 1)):
        arff(folder / f"small-{part}.arff", *samples(b, seed))
    labels = "".join(f'<label name="l{i}"></label>' for i in range(LABELS))
    (folder / "small.xml").write_text(
        f'<labels xmlns="http://mulan.sourceforge.net/labels">{labels}</labels>'
    )
    for a, b in zip(multilabel.read(folder, "small"), multilabel.read(data, "small"), strict=True):
        assert torch.equal(a.features, b.features)
        assert torch.equal(a.labels, b.labels)
    (folder / "small.xml").write_text('<labels><label name="missing"/></labels>')
    with pytest.raises(ValueError, match=r"small-train.arff must have every label .*missing"):
        multilabel.read(folder, "small")
    (folder / "small.xml").write_text("<labels>")
    with pytest.raises(ValueError, match=r"small.xml must be Mulan's list"):
        multilabel.read(folder, "small")


def test_damaged_data_is_named(data):
    train = data / "small_train.npz"
    whole = train.read_bytes()
    for broken in (
        whole[: len(whole) // 2],
        b"",
        b"PK nothing",
        whole[:200] + b"\0" * 40 + whole[240:],
    ):
        train.write_bytes(broken)
        with pytest.raises(ValueError, match=r"small_train.npz must be a .npz file"):
            multilabel.read(data, "small")
    np.savez(train, X=np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"small_train.npz .* KeyError"):
        multilabel.read(data, "small")
    np.savez(train, X=np.zeros((3, 4)), Y=np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"small_train.npz must hold X"):
        multilabel.read(data, "small")
    np.savez(train, X=np.full((3, 4), 2), Y=np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"small_train.npz: the features must all be 0 or 1"):
        multilabel.read(data, "small")
    np.savez(train, X=np.zeros((3, FEATURES)), Y=np.zeros((3, LABELS + 1)))
    with pytest.raises(
        ValueError, match=rf"small_test.npz must have {FEATURES} features and 8 labels"
    ):
        multilabel.read(data, "small")
    train.unlink()
    with pytest.raises(FileNotFoundError, match=r"small_train.npz"):
        multilabel.read(data, "small")


def test_another_set_under_a_known_name_is_found_out(data):
    for part in ("train", "test"):
        (data / f"small_{part}.npz").rename(data / f"bibtex_{part}.npz")
    with pytest.raises(ValueError, match=rf"bibtex_train.npz .* 159 labels \(got .* {LABELS}\)"):
        multilabel.read(data, "bibtex")


# --- checkpoints -----------------------------------------------------------------------------


def test_a_checkpoint_is_whole_or_said_to_be_damaged(tmp_path):
    path = tmp_path / "last.pt"
    state = {"model": {"w": torch.randn(1000)}, "log": [{"epoch": 0, "loss": 0.5}]}
    checkpoint.save(path, state)
    again = checkpoint.load(path)
    assert torch.equal(again["model"]["w"], state["model"]["w"])
    assert again["log"] == state["log"]
    whole = bytearray(path.read_bytes())
    flipped = bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    for broken in (bytes(whole[: len(whole) // 2]), b"", b"text", flipped):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"last.pt must be a checkpoint .* delete it"):
            checkpoint.load(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_costs_no_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})
    (tmp_path / "last.pt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"last.pt could not be written .* still the last good one"):
        checkpoint.save(path, {"epoch": 2, "w": torch.zeros(10_000)})
    assert checkpoint.load(path) == {"epoch": 1}
    checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path) == {"epoch": 2}


# --- runs ------------------------------------------------------------------------------------


def recipe(**values):
    return (
        Multilabel("small")
        .settings("FPI_NN")
        .with_values(**{"epochs": 4, "batch": 48, "hidden": 16, "state": 6} | values)
    )


def run(folder, data, settings, where=None):
    task = Multilabel("small")
    parts = task.load(data, settings, folder)
    where = where or training.Place(torch.device("cpu"))
    return training.Run(task, settings, parts, folder, where)


def same(a, b):
    """Results are equal in all but their times."""
    for result in (a, b):
        for entry in result["log"]:
            entry.pop("seconds", None)
    return a == b


@pytest.mark.parametrize("method", Multilabel.methods)
def test_every_method_trains_and_is_scored(method, data, tmp_path):
    if "torchdeq" in method:
        pytest.importorskip("torchdeq")
    little = {"epochs": 2, "hidden": 16, "state": 6, "dropout": 0.1, "input_dropout": 0.0}
    settings = Multilabel("small").settings(method).with_values(batch=16, **little)
    result = run(tmp_path / "run", data, settings).finish()
    assert len(result["log"]) == 2
    assert result["log"][1]["loss"] < result["log"][0]["loss"]
    assert 0 < result["test"]["F1"] <= 100
    written = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in written] == [0, 1]


def test_the_epochs_stop_when_the_score_stays(data, tmp_path):
    result = run(tmp_path / "run", data, recipe(patience=1, learning_rate=1e-9)).finish()
    assert len(result["log"]) < 4


def test_a_run_with_other_settings_is_not_gone_on_with(data, tmp_path):
    run(tmp_path / "run", data, recipe()).finish()
    with pytest.raises(ValueError, match=r"result.json must be of a run .* learning_rate"):
        run(tmp_path / "run", data, recipe(learning_rate=0.5)).finish()
    result = tmp_path / "run/result.json"
    result.write_text(result.read_text()[:100])
    with pytest.raises(ValueError, match=r"result.json must be the result of a run .* delete it"):
        run(tmp_path / "run", data, recipe()).finish()
    result.unlink()
    with pytest.raises(ValueError, match=r"last.pt must be of a run .* learning_rate"):
        run(tmp_path / "run", data, recipe(learning_rate=0.5)).finish()


SCRIPT = """
import sys
from experiments import __main__ as program
from experiments.multilabel.bibtex import Multilabel
program.TASKS["small"] = Multilabel("small")
sys.exit(program.main())
"""


def command(data, out, *more, python=(sys.executable,)):
    script = out.parent / "small.py"
    script.write_text(SCRIPT)
    given = ["small", "train", "--data", data, "--out", out, "--methods", "FPI_NN", "--seeds", "0"]
    given += [
        "--set",
        "hidden=16",
        "state=6",
        "batch=59",
        *more,
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return [*python, str(script), *map(str, given)], environment


def test_a_killed_run_ends_as_if_it_had_not_been(data, tmp_path):
    out = tmp_path / "runs"
    line, environment = command(data, out, "epochs=40", "patience=40")
    log = out / "small/FPI_NN/seed-0/log.jsonl"
    killed = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = log.read_text().count("\n")
    assert not (log.parent / "result.json").exists()
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resumed = json.loads((log.parent / "result.json").read_text())
    assert before <= len(resumed["log"])
    other = tmp_path / "other"
    line, environment = command(data, other, "epochs=40", "patience=40")
    subprocess.run(line, env=environment, capture_output=True, check=True)
    assert same(resumed, json.loads((other / "small/FPI_NN/seed-0/result.json").read_text()))
    a, b = (checkpoint.load(p / "small/FPI_NN/seed-0/best.pt") for p in (out, other))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_every_process_must_have_a_row_of_each_batch(data, tmp_path):
    where = training.Place(torch.device("cpu"), world=25)
    with pytest.raises(ValueError, match=r"a sample for each process \(got 24 for 25\)"):
        run(tmp_path / "run", data, recipe(batch=26), where).finish()  # 180 = 6 * 26 + 24


def test_batches_made_ahead_are_the_same_ones():
    batches = [(torch.tensor(i),) for i in range(5)]
    where = training.Place(torch.device("cuda"))
    assert list(training.ahead(iter(batches), where)) == batches
    taken = training.ahead(iter(batches), where)
    assert next(taken) is batches[0]
    taken.close()


def test_two_processes_end_as_one_does(data, tmp_path):
    results = []
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    )
    for name, python in (("one", (sys.executable,)), ("two", torchrun)):
        out = tmp_path / name / "runs"
        out.mkdir(parents=True)
        line, environment = command(data, out, "epochs=3", python=python)
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads((out / "small/FPI_NN/seed-0/result.json").read_text()))
    one, two = results
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["log"], two["log"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert sum(b["iterations"].values()) == sum(a["iterations"].values())
    assert two["test"]["F1"] == pytest.approx(one["test"]["F1"], abs=0.5)


# --- the commands ----------------------------------------------------------------------------


def test_the_commands_in_turn(small, data, tmp_path, monkeypatch, capsys):
    out, docs = tmp_path / "runs", tmp_path / "docs"
    docs.mkdir()
    monkeypatch.setattr(page, "PAGE", docs / "experiments.md")
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    page.PAGE.write_text(f"before\n{page.BEGIN}\n{page.END}\nafter\n")
    common = ["--data", str(data), "--out", str(out), "--methods", "MLP", "FPI_NN", "--quick"]
    for action in ("train", "eval", "study", "report"):
        monkeypatch.setitem(program.TASKS, "small", Multilabel("small"))  # another process's
        assert program.main(["small", action, *common]) == 0
    printed = capsys.readouterr().out
    assert printed.count("FPI_NN, seed 0") == 2
    text = page.PAGE.read_text()
    assert text.startswith("before") and text.endswith("after\n")
    content = json.loads(next((tmp_path / "results").glob("*/small.json")).read_text())
    f1 = content["runs"][0]["test"]["F1"]
    assert f"{f1:.2f}" in text
    for name in ("loss", "score", "solves"):
        assert len(list((docs / "plots").glob(f"*-small-{name}.*"))) == 2
    assert not page.rebuild(draw=False)


def test_tuning_tries_the_grid_and_chooses_by_validation(small, data, tmp_path, capsys):
    out = tmp_path / "runs"
    given = ["--data", str(data), "--out", str(out), "--methods", "MLP", "--quick"]
    small.grid = lambda method: {"dropout": (0.0, 0.9), "batch": (64,)}
    assert program.main(["small", "tune", *given, "--seeds", "0", "1"]) == 0
    tried = json.loads((out / "small/tune/MLP.json").read_text())["tried"]
    assert {row["settings"]["dropout"] for row in tried} == {0.0, 0.9}
    assert tried[0]["F1"] >= tried[1]["F1"]
    runs = sorted(out.glob("small/tune/MLP/*/seed-*/result.json"))
    assert len(runs) == 4
    results = [json.loads(path.read_text()) for path in runs]
    scores = [r["best"]["validation"]["F1"] for r in results if r["settings"]["options"]["dropout"]]
    assert tried[[row["settings"]["dropout"] for row in tried].index(0.9)]["F1"] == pytest.approx(
        sum(scores) / 2, rel=1e-5
    )
    assert "0.9" in capsys.readouterr().out


@pytest.mark.skipif(not (DATA / "multilabel").is_dir(), reason="the data sets are not here")
def test_bibtex_itself_quickly(tmp_path, capsys):
    given = ["--data", str(DATA), "--out", str(tmp_path), "--methods", "FPI_NN", "--quick"]
    assert program.main(["bibtex", "train", *given]) == 0
    result = json.loads(next(tmp_path.glob("bibtex/FPI_NN/seed-0/result.json")).read_text())
    assert result["test"]["F1"] > 10
    assert result["log"][-1]["failed"] == 0


def test_the_committed_page_is_that_of_the_committed_json(tmp_path):
    copy = tmp_path / "experiments.md"
    copy.write_text(page.PAGE.read_text())
    page.rebuild(copy, draw=False)
    assert sources.without(copy.read_text()) == sources.without(page.PAGE.read_text())


def test_bad_commands_say_what_must_hold(small, data, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for given, message in (
        (["train"], "needs the data"),
        (["train", "--data", str(empty)], "must be a folder of data sets"),
        (["train", "--data", str(data), "--methods", "SVM"], "small has MLP"),
        (["train", "--data", str(data), "--set", "depth=3"], "no setting is called 'depth'"),
        (["train", "--data", str(data), "--set", "depth"], "NAME=VALUE"),
        (["train", "--data", str(data), "--amp"], "is for a GPU"),
        (["train", "--data", str(data), "--device", "gpu"], "must be auto, cpu, cuda or cuda:N"),
    ):
        with pytest.raises(SystemExit) as caught:
            program.main(["small", *given])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert program.main(["small", "eval", "--data", str(data), "--out", str(empty)]) == 1
    assert "train first" in capsys.readouterr().err
    assert program.main(["bibtex", "train", "--data", str(data), "--out", str(empty)]) == 1
    assert "must hold bibtex_train.npz" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["benchmarks.tasks", "benchmarks.tasks.flow.chairs"])
def test_the_former_names_still_run(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0 and f"python -m {module}" not in done.stdout, done.stderr
    assert module.replace("benchmarks.tasks", "experiments") in done.stdout
    assert done.stderr == "benchmarks.tasks has moved: use `python -m experiments`\n"


def test_settings_keep_their_types():
    settings = Settings("MLP", options={"dropout": 0.5, "hidden": 500})
    changed = settings.with_values(dropout="0.25", hidden="64", epochs="3")
    assert changed.options == {"dropout": 0.25, "hidden": 64}
    assert changed.epochs == 3
    assert settings.epochs == 40
