"""Ratios and targets: only what may be compared, and what is asked of it."""

from benchmarks import ratios, tables, targets
from benchmarks.suites import convolutions


def row(name, family="plain", seconds=1.0, residual=1e-4, error=1e-4, **more):
    base = {"suite": "solve", "problem": "hard", "batch": 256, "size": 128, "mode": "forward"}
    return base | {
        "cell": "a cell",
        "dtype": "float32",
        "method": name,
        "family": family,
        "median_s": seconds,
        "worst_residual": residual,
        "gradient_error": error,
        "refused": None,
        **more,
    }


def test_no_ratio_against_a_more_exact_rival():
    mine = row("Anderson", "ours", 1.0, error=3e-4)
    exact, equal = row("exact", seconds=2.0), row("equal", seconds=4.0, error=2e-4)
    ratio = ratios.against_plain(mine, [mine, exact, equal])
    assert (ratio.value, ratio.against) == (0.25, "equal")
    assert "gradient error 3.0 times" in ratio.note
    assert ratios.against_plain(mine, [mine, exact]).value is None
    # A rival that is less exact gains by being compared.
    assert ratios.against(mine, [row("loose", error=1e-2, seconds=2.0)], "loose").value == 0.5
    tight = row("tight", seconds=2.0, residual=1e-5)
    assert ratios.against(mine, [tight], "tight").value is None
    assert "residual 10.0 times" in ratios.against(mine, [tight], "tight").note
    # More exact and faster: that ratio is against us, and stays.
    ratio = ratios.against_plain(mine, [mine, row("both", seconds=0.5, residual=1e-5), equal])
    assert (ratio.value, ratio.against) == (2.0, "both")


def test_targets():
    rows = [
        row("Picard", "ours", 1.05),
        row("Anderson", "ours", 1.2),
        row("plain loop", seconds=1.0),
    ]
    found = {v.what: v for v in targets.verdicts(rows)}
    assert found["Picard / best plain loop"].met is True
    assert found["Anderson / best plain loop"].met is False
    seldom = row("plain loop, compacted, test every 3rd", seconds=0.7)
    picard = {v.what: v for v in targets.verdicts([*rows, seldom])}["Picard / best plain loop"]
    assert picard.met is True, "that loop does not test in every iteration as Picard does"
    assert picard.note == "plain loop, compacted, test every 3rd: 1.50"
    other = [row("Picard", "ours", 3.0, cell="another"), row("plain loop", cell="another")]
    ratios_ = [v.measured for v in targets.verdicts(rows + other) if v.what.startswith("Picard")]
    assert ratios_ == ["1.05 (plain loop)", "3.00 (plain loop)"], "only within a cell"


def test_targets_against_other_libraries():
    rows = [
        row("Anderson", "ours", 1.0),
        row("Anderson, whole", "ours", 0.4),
        row("torchdeq Anderson", "torchdeq", 7.0),
        row("torchdeq fixed point", "torchdeq", 1.1),
        row("jaxopt fixed point", "jaxopt", 1.3),
    ]
    rows = [r | {"suite": "peers"} for r in rows]
    found = {v.what: v for v in targets.verdicts(rows)}
    assert found["torchdeq Anderson / Anderson"].measured == "7.0"
    assert found["torchdeq Anderson / Anderson, whole"].met is False  # 17.5 of 20
    assert found["fastest torchdeq / Anderson, whole"].met is False  # 2.75 of 3
    assert found["fastest jaxopt / Anderson, whole"].met is True
    rows[2] = {**rows[2], "skipped": "not installed"}
    del rows[2]["median_s"]
    assert "torchdeq Anderson / Anderson" not in {v.what for v in targets.verdicts(rows)}


def test_targets_of_whole_solves():
    rows = [
        row("Picard, whole", "ours", 0.6),
        row("Anderson, whole", "ours", 0.4),
        row("plain loop", seconds=1.0),
    ]
    found = {v.what: v for v in targets.verdicts(rows)}
    assert found["best plain loop / Anderson, whole"].measured == "2.5"
    rows = [r | {"problem": "easy", "mode": "forward+backward"} for r in rows]
    size = {"suite": "products", "batch": 256, "size": 128}
    for part, target in ((0.5, "≥ 1.3"), (0.9, "≥ 1")):
        products = [
            size | {"method": "product", "median_s": part},
            size | {"method": "plain loop's iteration", "median_s": 1.0},
            size | {"method": "whole solve's iteration", "median_s": 0.5},
        ]
        verdict = {v.what: v for v in targets.verdicts(rows + products)}
        fastest = verdict["fastest rival / Anderson, whole"]
        assert (str(fastest.target), fastest.measured, fastest.met) == (target, "2.5", True)


def test_targets_of_memory():
    base = {"suite": "memory", "batch": 8, "size": 4, "mode": "forward", "state_bytes": 10}
    flat = [
        base | {"method": m, "family": f, "iterations": k, "peak_bytes": b}
        for m, f, growth in (("Picard", "ours", 0), ("unrolled", "replaced", 1))
        for k, b in ((8, 50), (128, 50 + growth * 500))
    ]
    held = base | {"method": "Picard", "family": "ours", "peak_bytes": 61, "limit": 60}
    found = [(v.measured, v.met) for v in targets.verdicts([*flat, held])]
    assert found == [("6.10", False), ("1.000", True)]


def test_anderson_must_win_where_it_is_stiff():
    rows = [row("Anderson", "ours", 2.0), row("plain loop", seconds=1.5)]
    rows = [r | {"problem": "stiff"} for r in rows]
    (found,) = targets.verdicts(rows)
    assert (found.measured, found.met) == ("1.33 (plain loop)", False)


def test_targets_of_nets():
    rows = [
        row("Picard, ConvStep", "ours", 0.6),
        row("Anderson, ConvStep", "ours", 0.4),
        row("plain loop, compacted", seconds=0.44),
        row("torchdeq Anderson", "torchdeq", 0.9),
        row("torchdeq fixed point", "torchdeq", 1.1),
    ]
    found = {v.what: v for v in targets.verdicts([r | {"problem": "denoise"} for r in rows])}
    plain = found["plain loop, compacted / Anderson, ConvStep"]
    assert (plain.measured, plain.met) == ("1.1", False)
    assert found["torchdeq Anderson / Anderson, ConvStep"].met is True  # the faster one: 2.25


def test_targets_of_an_iteration_on_a_device():
    rows = [
        {
            "suite": "convolutions",
            "method": method,
            "widths": (16, 32, 16),
            "batch": 64,
            "side": 128,
            "dtype": "bfloat16",
            "finished": finished,
            "refused": None,
            "median_s": seconds,
            "flops_per_s": 1e12,
            "bytes_per_s": 1e12,
            "of_roofline": 0.5,
        }
        for finished, times in ((0, (1.0, 0.8, 1.4, 1.6)), (32, (0.5, 0.4, 1.1, 1.0)))
        for method, seconds in zip(
            (convolutions.OURS, "ours, native step", *convolutions.RIVALS), times, strict=True
        )
    ]
    found = [(v.measured, v.met) for v in targets.verdicts(rows)]
    # As `auto` does it, not the faster of two ways; against the faster rival.
    hoisted, concatenating = convolutions.RIVALS
    assert found == [
        (f"1.40 ({hoisted})", False),
        (f"2.00 ({concatenating})", True),
        ("0.50", True),
    ]
    assert "16 → 32 → 16" in tables.render(rows)
    for row in rows:
        if row["method"] == convolutions.OURS:
            row["refused"] = "g(x) is off by 0.1"
            del row["median_s"]
    (wrong,) = targets.verdicts(rows)
    assert (wrong.measured, wrong.met, wrong.note) == ("wrong", False, "g(x) is off by 0.1")
    assert "is off by" in tables.render(rows)


def test_only_long_rows_on_a_device_are_judged_against_a_copy():
    base = {"suite": "kernels", "method": "Picard step", "batch": 8, "of_copy": 0.5}
    rows = [
        base | {"device": device, "size": size}
        for device in ("cpu", "cuda")
        for size in (1024, 32768)
    ]
    found = [(v.where, str(v.target)) for v in targets.verdicts(rows)]
    short, long = ("(8, 1024) float32", "≥ 60%"), ("(8, 32768) float32", "≥ 60%")
    assert found == [short, long, ("(8, 32768) float32", "≥ 90%")]
