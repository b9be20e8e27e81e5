"""The regression check: it sees what became slower, and not what chance or the machine did."""

import math

import pytest
from helpers import write_results

np = pytest.importorskip("numpy")

from benchmarks import changes, compare, records  # noqa: E402

FACTS = {"device_name": "a machine", "threads": 2, "versions": {"torch": "2.13.0"}}
ALIKE = changes.Between(0.0)  # runs that differ by nothing but their rounds


def timed(seconds, rounds=None):
    rounds = list(range(len(seconds))) if rounds is None else rounds
    return {"samples": list(seconds), "rounds": rounds, "median_s": float(np.median(seconds))}


def row(method, family, problem, seconds=None, **more):
    head = {"suite": "solve", "problem": problem, "batch": 256, "size": 128, "mode": "forward"}
    head |= {"dtype": "float32", "method": method, "family": family, "evaluations": 9}
    return head | {"refused": None} | (timed(seconds) if seconds is not None else {}) | more


def run(rng, cells, rounds=21, noise=0.05, ours=1.0, machine=None, correlation=0.0, **more):
    """The rows of a run: a library that takes `ours` times a plain loop's time, in every cell."""
    machine = np.ones(rounds) if machine is None else machine
    rows = []
    for cell in range(cells):
        for method, family, scale in (("Picard", "ours", ours), ("plain loop", "plain", 1.0)):
            e = rng.normal(size=rounds)
            for i in range(1, rounds):
                e[i] = correlation * e[i - 1] + math.sqrt(1 - correlation**2) * e[i]
            seconds = 1e-3 * scale * machine * np.exp(noise * e)
            of_ours = more if family == "ours" else {}
            rows.append(row(method, family, f"p{cell}", seconds, **of_ours))
    return FACTS, rows


def verdicts(found, *, of_cells=True):
    return [
        f.verdict
        for f in found
        if f.where.startswith("mean") != of_cells and f.verdict != "control"
    ]


def one(found):
    (f,) = (f for f in found if not f.where.startswith("mean"))
    return f


# --- chance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_no_change_is_flagged_no_more_often_than_it_says(correlation):
    """With no margin, nor variance between runs, to hide a wrong interval: 5 % may have a flag."""
    rng = np.random.default_rng(1)
    runs, cells = 60, 20
    flagged = alone = 0
    for _ in range(runs):
        old, new = (run(rng, cells, rounds=15, correlation=correlation) for _ in range(2))
        moved = [
            changes.change(cell, "Picard", was, now, 200)
            for (cell, was), now in zip(
                compare.cells(old[1]).items(), compare.cells(new[1]).values(), strict=True
            )
        ]
        assert all(c.enough for c in moved)
        flagged += any(f.verdict != "same" for f in compare.judged(moved, 0.0, ALIKE))
        alone += sum(compare.judged([c], 0.0, ALIKE)[0].verdict != "same" for c in moved)
    assert flagged <= 7  # of 60; more than 7 has a chance of 2 % at the nominal rate
    # Each cell alone at 95 % is no rarer than that by much: the intervals are not merely wide.
    assert 0.01 <= alone / (runs * cells) <= 0.07


def test_no_change_of_a_method_is_flagged_no_more_often_than_it_says():
    """The mean over cells, where each cell also has an offset of its own in each run."""
    rng = np.random.default_rng(2)
    flagged = 0
    for _ in range(400):
        moved = [
            changes.Change(("solve",) * 10, "Picard", "plain loop", (15, 15), value)
            for value in rng.normal(scale=0.04, size=8)
        ]
        (f,) = compare.over_cells(moved, 0.0, 0.0)
        flagged += f.verdict != "same"
    assert 8 <= flagged <= 34  # 20 of 400, give or take three deviations


def test_what_differs_between_runs_is_no_regression():
    """Each run shifts every ratio by 6 % once; the plain loops among themselves show it."""
    rng = np.random.default_rng(14)

    def with_shifts(ours=1.0):
        rows = []
        for cell in range(12):
            for method, scale in (("Picard", ours), ("loop a", 1.0), ("loop b", 1.1), ("c", 1.3)):
                shift = math.exp(0.06 * rng.normal())
                seconds = 1e-3 * scale * shift * np.exp(0.01 * rng.normal(size=31))
                family = "ours" if method == "Picard" else "plain"
                rows.append(row(method, family, f"p{cell}", seconds))
        return FACTS, rows

    flagged = blind = 0
    for _ in range(20):
        old, new = with_shifts(), with_shifts()
        found = compare.compare(old, new, resamples=200)
        (control,) = (f for f in found if f.verdict == "control")
        assert 1.05 < control.ratio < 1.25  # 6 %, of two loops in two files
        flagged += any(f.bad for f in found if not f.where.startswith("mean"))
        only = [[r for r in rows if r["method"] in ("Picard", "loop a")] for _, rows in (old, new)]
        found = compare.compare((FACTS, only[0]), (FACTS, only[1]), resamples=200)
        blind += any(f.bad for f in found if not f.where.startswith("mean"))
    assert flagged <= 2
    assert blind >= 15  # without the loops to compare with
    found = compare.compare(with_shifts(), with_shifts(ours=1.8), resamples=200)
    assert verdicts(found).count("worse") >= 6
    # A plain loop that became faster in a few cells hides nothing.
    a, b = (run(rng, 8, 31, 0.01, ours=scale)[1] for scale in (1.0, 1.2))
    for rows, scale in ((a, 3.0), (b, 1.0)):
        for cell in range(8):
            speed = scale if cell < 3 else 3.0
            seconds = speed * 1e-3 * np.exp(0.01 * rng.normal(size=31))
            rows.append(row("other loop", "plain", f"p{cell}", seconds))
    found = compare.compare((FACTS, a), (FACTS, b), resamples=200)
    assert verdicts(found).count("worse") == 8


@pytest.mark.parametrize("rounds", [15, 31])
def test_a_slowdown_by_a_fifth_is_flagged(rounds):
    """Of every cell of a suite, with rows that vary by 5 % each: by its mean, surely."""
    rng = np.random.default_rng(3)
    cells = 0
    for _ in range(10):
        old, new = run(rng, 8, rounds), run(rng, 8, rounds, ours=1.2)
        found = compare.compare(old, new, resamples=300)
        assert verdicts(found, of_cells=False) == ["worse"]
        cells += verdicts(found).count("worse")
    assert cells >= {15: 20, 31: 60}[rounds]  # of 80, each with the chance of error of eight


@pytest.mark.parametrize("rounds", [15, 21, 31])
def test_a_slowdown_by_a_fifth_of_a_single_cell_is_flagged(rounds):
    rng = np.random.default_rng(4)
    noise = 0.05 / math.sqrt(2)  # of the ratio: 5 %
    found = []
    for _ in range(20):
        old, new = run(rng, 1, rounds, noise), run(rng, 1, rounds, noise, ours=1.2)
        found.append(one(compare.compare(old, new)))
    assert [f.verdict for f in found].count("worse") >= 18
    assert all(f.low < 1.2 < f.high for f in found[:5])


def test_a_speedup_is_better_and_a_change_within_the_margin_is_nothing():
    rng = np.random.default_rng(5)
    old, faster, nearly = (run(rng, 1, 31, 0.01, ours=scale) for scale in (1.0, 0.8, 1.1))
    assert one(compare.compare(old, faster)).verdict == "better"
    assert one(compare.compare(faster, old)).verdict == "worse"
    assert one(compare.compare(old, nearly)).verdict == "same"
    assert one(compare.compare(old, nearly, margin=0.01)).verdict == "worse"
    with pytest.raises(ValueError, match="margin must be at least 0"):
        compare.compare(old, old, margin=-0.1)


def test_what_slows_the_machine_down_for_both_is_not_flagged():
    """Twice as slow in half of the new rounds, and all of them three times: paired, nothing."""
    rng = np.random.default_rng(6)
    machine = np.where(np.arange(21) % 7 < 4, 6.0, 3.0)
    old, new = run(rng, 8), run(rng, 8, machine=machine)
    found = compare.compare(old, new)
    assert verdicts(found) == ["same"] * 8
    assert all(f.high / f.low < 1.5 for f in found)
    # Taken by position and not by round, the same numbers are noise.
    shifted = [r | {"rounds": [(i + 4) % 21 for i in r["rounds"]]} for r in new[1][1::2]]
    mixed = [r for pair in zip(new[1][::2], shifted, strict=True) for r in pair]
    assert all(f.high / f.low > 1.5 for f in compare.compare(old, (FACTS, mixed)) if f.pairs)


def test_pairs_are_of_the_same_round():
    ours = row("Picard", "ours", "p", [1.0, 2.0, 8.0], rounds=[0, 2, 5])
    loop = row("plain loop", "plain", "p", [7.0, 1.0, 4.0, 1.0], rounds=[1, 2, 5, 0])
    assert np.exp(changes.log_ratios(ours, loop)).tolist() == pytest.approx([1.0, 2.0, 2.0])


def test_few_pairs_are_not_judged():
    rng = np.random.default_rng(7)
    f = one(compare.compare(run(rng, 1, 4), run(rng, 1, 21, ours=3.0)))
    assert (f.verdict, f.pairs) == ("too few pairs", (4, 21))
    assert "--budget" in f.note
    f = one(compare.compare(run(rng, 1, 5, 0.001), run(rng, 1, 21, 0.001, ours=3.0)))
    assert f.verdict == "worse"


def test_the_loop_is_the_fastest_old_one_that_both_have():
    rng = np.random.default_rng(8)

    def rows(compiled, **more):
        others = (("fast", 0.5, 21), ("compiled", compiled, 21), ("rare", 0.1, 3))
        loops = [
            row(name, "plain", "p", 1e-3 * s * np.exp(0.01 * rng.normal(size=n)), **more)
            for name, s, n in others
        ]
        return [row("Picard", "ours", "p", 1e-3 * np.exp(0.01 * rng.normal(size=21))), *loops]

    old, new = rows(0.7), rows(0.3)  # faster than "fast", but not in the old file
    f = one(compare.compare((FACTS, old), (FACTS, new)))
    assert (f.against, f.verdict) == ("fast", "same")
    without = [r for r in new if r["method"] != "fast"]
    f = one(compare.compare((FACTS, old), (FACTS, without)))
    assert (f.against, f.verdict) == ("compiled", "worse")


def test_students_quantiles():
    """From printed tables."""
    for tail, freedom, t in ((0.025, 1.0, 12.706), (0.025, 10.0, 2.2281), (0.0005, 4.0, 8.610)):
        assert changes.student(tail, freedom) == pytest.approx(t, rel=1e-4)
    assert changes.student(0.025, 1e4) == pytest.approx(1.9602, rel=1e-4)


def test_verdicts():
    """By the whole interval, on either side of the margin."""
    for low, high, wanted in (
        (0.05, 0.1, "worse"),
        (0.04, 0.1, "same"),
        (-0.01, 0.01, "same"),
        (-0.1, -0.04, "same"),
        (-0.1, -0.05, "better"),
    ):
        assert compare.verdict(low, high, 0.05) == wanted


def test_blocks_are_of_successive_rounds():
    found = changes.block_indices(np.random.default_rng(0), 9, 3, 50).reshape(50, 3, 3)
    assert ((found[:, :, 1:] - found[:, :, :-1]) % 9 == 1).all()
    assert set(found.ravel().tolist()) == set(range(9))


# --- what is no matter of chance -------------------------------------------------------------


def test_changes_of_correctness_are_told():
    rng = np.random.default_rng(9)
    old = run(rng, 1)
    refused = [r | {"refused": "gradient of W off by 0.1"} for r in old[1][:1]] + old[1][1:]
    del refused[0]["samples"], refused[0]["rounds"]
    f = one(compare.compare(old, (FACTS, refused)))
    assert f.verdict == "refused" and f.bad and f.note == "gradient of W off by 0.1"
    f = one(compare.compare((FACTS, refused), old))
    assert f.verdict == "right again" and not f.bad
    more = [r | {"evaluations": 11} for r in old[1]]
    found = compare.compare(old, (FACTS, more))
    assert [(f.verdict, f.note) for f in found] == [
        ("evaluations", "9 before, 11 now"),
        ("same", ""),
    ]
    skipped = [{k: v for k, v in old[1][0].items() if k != "samples"} | {"skipped": "why"}]
    f = one(compare.compare(old, (FACTS, skipped + old[1][1:])))
    assert (f.verdict, f.note, f.bad) == ("missing", "why", False)


def test_cells_that_one_file_lacks_are_told():
    rng = np.random.default_rng(10)
    two, one_cell = run(rng, 2), run(rng, 1)
    assert sorted(verdicts(compare.compare(two, one_cell))) == ["missing", "same"]
    assert sorted(verdicts(compare.compare(one_cell, two))) == ["new", "same"]


def test_points_of_one_axis_are_cells_of_their_own():
    """A suite that varies the spread has the same sizes everywhere."""
    rng = np.random.default_rng(11)

    def rows(scales):
        found = []
        for value, scale in scales.items():
            point = run(rng, 1, 21, 0.01, ours=scale)[1]
            found += [r | {"suite": "scaling", "axis": "spread", "value": value} for r in point]
        return FACTS, found

    found = compare.compare(rows({0.5: 1.0, 0.99: 1.0}), rows({0.5: 1.0, 0.99: 1.5}))
    assert [(f.verdict, "spread 0.99" in f.where) for f in found] == [
        ("worse", True),
        ("same", False),
    ]


def test_rows_without_optional_keys_and_other_suites_do_not_matter():
    rows = [
        {"suite": "kernels", "method": "Picard step", "samples": [1.0], "rounds": [0]},
        {"suite": "memory", "method": "Picard", "family": "ours", "peak_bytes": 3},
        {"suite": "ceilings", "what": "flop/s", "value": 1e9},
        {"suite": "solve", "method": "plain loop", "family": "plain", "samples": [1.0]},
        {"suite": "solve", "method": "Picard", "family": "ours", "samples": [1.0]},
        {"suite": "solve", "method": "Anderson", "family": "ours", "skipped": "no"},
    ]
    (f,) = compare.compare((FACTS, rows), (FACTS, rows))
    assert (f.verdict, f.method) == ("too few pairs", "Picard")
    assert "Picard" in compare.render([f])


# --- the command -----------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    rng = np.random.default_rng(12)
    (facts, a), (_, b) = run(rng, 2, 21, 0.01), run(rng, 2, 21, 0.01, ours=1.5)
    old = write_results(tmp_path / "old.json", facts, a)
    new = write_results(
        tmp_path / "new.json", facts | {"threads": 4, "versions": {"torch": "3"}}, b
    )
    assert records.load(old)[1][0]["samples"] == a[0]["samples"]
    assert compare.main([str(old), str(old)]) == 0
    text = capsys.readouterr().out
    assert "WARNING" not in text and "2 same" in text
    assert compare.main([str(old), str(new)]) == 1
    text = capsys.readouterr().out
    assert text.index("WORSE") < text.index("2 worse")
    assert "threads was 2, is 4" in text and "versions: torch was 2.13.0, is 3" in text
    assert "solve p0 256x128 forward float32" in text
    assert compare.main([str(old), str(new), "--margin", "0.7"]) == 0
    assert compare.show(old, facts, b) == 1
    assert compare.main([str(new), str(old)]) == 0


def test_command_says_what_is_wrong(tmp_path, capsys):
    rng = np.random.default_rng(13)
    facts, rows = run(rng, 1)
    good = write_results(tmp_path / "good.json", facts, rows)
    other = write_results(tmp_path / "other.json", facts, [r | {"size": 64} for r in rows])
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    for arguments, message in (
        ((good, tmp_path / "none.json"), "No such file"),
        ((tmp_path / "none.json", good), "No such file"),
        ((bad, good), "must be a result file"),
        ((good, other), "a cell of ours and a plain loop in common"),
    ):
        assert compare.main([str(a) for a in arguments]) == 2
        assert message in capsys.readouterr().err
    assert compare.main([str(good), str(good), "--margin", "-1"]) == 2
    assert "margin must be at least 0" in capsys.readouterr().err
