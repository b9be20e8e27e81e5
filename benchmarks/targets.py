"""DESIGN's targets, a line a cell: met, missed, or no ratio that may be shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .methods import COMPACTED, CONVOLUTIONS, PEERS, SAME_TASK, WHOLE
from .ratios import Ratio, against, against_plain, cells, compare, timed_rows
from .suites.convolutions import OURS, RIVALS

Row = Mapping[str, Any]
LONG_ROW = 32_000  # values from which on a device's steps are to be as fast as a copy


@dataclass(frozen=True)
class Verdict:
    what: str
    where: str
    target: str
    measured: str
    met: bool | None  # None: no ratio may be shown
    note: str = ""


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    found: list[Verdict] = []
    for group in cells(rows).values():
        first = group[0]
        kind, batch, size, mode = (first[key] for key in ("problem", "batch", "size", "mode"))
        where = f"{kind} ({batch}, {size}) {mode}"
        if first["suite"] == "whole":
            found += whole_verdicts(rows, group, f"{where}, {first['dtype']}")
            continue
        if first["suite"] in ("scaling", "convergence") or first["dtype"] != "float32":
            continue
        ours = {row["method"]: row for row in group if row["family"] == "ours"}
        picard, anderson = ours.get("Picard"), ours.get("Anderson")
        if first["suite"] != "peers" and kind in ("easy", "hard"):
            if picard and "median_s" in picard and batch * size >= 32_000:
                found.append(picard_verdict(picard, group, where))
            if anderson and "median_s" in anderson and size <= 256 and kind == "hard":
                ratio = against_plain(anderson, group)
                found.append(at_most("Anderson / best plain loop", where, ratio, 1.0))
        if kind == "stiff" and first["suite"] != "peers":
            found += stiff_verdicts(group, where)
        found += whole_verdicts(rows, group, where) + convolution_verdicts(group, where)
        found += peers_verdicts(group, where)
    found += refill_verdicts(rows) + convolutions_verdicts(rows) + memory_verdicts(rows)
    return found + overhead_verdicts(rows) + loop_verdicts(rows) + other_verdicts(rows)


def stiff_verdicts(group: Sequence[Row], where: str) -> list[Verdict]:
    """Anderson must win where a sample needs thousands of iterations."""
    by = {row["method"]: row for row in group if "median_s" in row}
    if "Anderson" not in by:
        return []
    rivals = [against(by["Anderson"], group, n) for n in ("Picard", *SAME_TASK) if n in by]
    worst = max(rivals, key=lambda ratio: ratio.value or 0.0)
    return [at_most("Anderson / fastest fixed-point iteration", where, worst, 1.0)]


def peers_verdicts(group: Sequence[Row], where: str) -> list[Verdict]:
    """Against other libraries, at their defaults or at their best settings, whichever is faster."""
    if group[0]["suite"] != "peers" or group[0]["problem"] not in ("easy", "hard"):
        return []
    hard, size = group[0]["problem"] == "hard", group[0]["size"]
    opaque = next((r for r in group if r["method"] == "Anderson" and "median_s" in r), None)
    whole = [row for row in timed_rows(group, family="ours") if row["method"] in WHOLE]
    found = []
    rivals = [row for family in PEERS for row in timed_rows(group, family=family)]
    if opaque is not None and size <= 256:
        for row in rivals:
            if row["method"].startswith("torchdeq Anderson"):
                what, least = f"{row['method']} / Anderson", 6.0 if hard else 3.0
                found.append(speedup(what, where, compare(opaque, row), least))
    if whole and hard:
        for family in PEERS:
            of_family = [row for row in rivals if row["family"] == family]
            ratios = [compare(whole[0], row) for row in of_family]
            shown = [ratio for ratio in ratios if ratio.value is not None]
            if ratios:
                best = max(shown, key=lambda ratio: ratio.value or 0.0) if shown else ratios[0]
                what = f"fastest {family} / {whole[0]['method']}"
                found.append(speedup(what, where, best, 3.0))
        for row in rivals:
            if row["method"].startswith("torchdeq Anderson"):
                least = 10.0 if (group[0]["batch"], size) == (64, 1024) else 20.0
                what = f"{row['method']} / {whole[0]['method']}"
                found.append(speedup(what, where, compare(whole[0], row), least))
    return found


def memory_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    flat: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        if row["suite"] != "memory" or "peak_bytes" not in row:
            continue
        where = f"({row['batch']}, {row['size']}) {row['mode']}"
        if "limit" in row:
            peak, most = (row[key] / row["state_bytes"] for key in ("peak_bytes", "limit"))
            what = f"{row['method']}: states held, g's value among them"
            found.append(Verdict(what, where, f"≤ {most:.0f}", f"{peak:.2f}", peak <= most))
        elif row["family"] == "ours":
            flat.setdefault((row["method"], where), []).append(row["peak_bytes"])
    for (method, where), peaks in flat.items():
        grown = max(peaks) / min(peaks)
        what = f"{method}: peak memory, 128 iterations / 8"
        found.append(Verdict(what, where, "≤ 1.01", f"{grown:.3f}", grown <= 1.01))
    return found


def picard_verdict(picard: Row, group: Sequence[Row], where: str) -> Verdict:
    """Against the loops that do the same task; faster ones of another kind stand in the note."""
    same = [row for row in group if row["method"] in SAME_TASK]
    verdict = at_most("Picard / best plain loop", where, against_plain(picard, same), 1.1)
    best = against_plain(picard, group)
    if best.value is None or best.against in SAME_TASK:
        return verdict
    note = f"{best.against}: {best.value:.2f}"
    return replace(verdict, note="; ".join(filter(None, [verdict.note, note])))


def whole_verdicts(rows: Sequence[Row], group: Sequence[Row], where: str) -> list[Verdict]:
    """The faster of our two whole solves against plain loops, on easy against all rivals."""
    whole = [row for row in timed_rows(group, family="ours") if row["method"] in WHOLE]
    if not whole:
        return []
    best = whole[0]
    name, size = best["method"], (best["batch"], best["size"])
    peers = [compare(best, row) for f in PEERS for row in timed_rows(group, family=f)]
    plain = against_plain(best, group)
    shown = [ratio for ratio in (plain, *peers) if ratio.value is not None]
    fastest = max(shown, key=lambda ratio: ratio.value or 0.0) if shown else plain
    found = []
    if best["problem"] == "hard" and best["suite"] != "peers":
        found.append(speedup(f"best plain loop / {name}", where, plain, 2.0))
    elif best["problem"] == "easy" and best["mode"] == "forward+backward":
        seconds = {
            row["method"]: row["median_s"]
            for row in rows
            if row["suite"] == "products"
            and (row["batch"], row["size"]) == size
            and "median_s" in row
        }
        if seconds:
            part = seconds["product"] / seconds["plain loop's iteration"]
            least = 1.3 if part < 0.75 else 0.9 / part
            noted = f"product: {part:.0%} of a plain loop's iteration"
            fastest = replace(fastest, note="; ".join(filter(None, [noted, fastest.note])))
            found.append(speedup(f"fastest rival / {name}", where, fastest, round(least, 2)))
    elif best["problem"] == "energy":
        found.append(speedup(f"best plain loop / {name}", where, plain, 1.0))
    return found


def convolution_verdicts(group: Sequence[Row], where: str) -> list[Verdict]:
    """The faster of our two solves of a net against the compacted loop and the best of torchdeq."""
    mine = [row for row in timed_rows(group, family="ours") if row["method"] in CONVOLUTIONS]
    if not mine:
        return []
    best = mine[0]
    found = [
        speedup(f"{COMPACTED} / {best['method']}", where, against(best, group, COMPACTED), 1.2)
    ]
    ratios = [compare(best, row) for row in timed_rows(group, family="torchdeq")]
    for ratio in ratios[:1]:
        found.append(speedup(f"{ratio.against} / {best['method']}", where, ratio, 2.0))
    return found


def convolutions_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """An iteration on a device, as `backend="auto"` has it, against the faster of cuDNN's."""
    found = []
    by_net: dict[tuple[Any, ...], dict[int, dict[str, Row]]] = {}
    for row in rows:
        if row["suite"] == "convolutions" and "skipped" not in row:
            net = (tuple(row["widths"]), row["batch"], row["side"], row["dtype"])
            by_net.setdefault(net, {}).setdefault(row["finished"], {})[row["method"]] = row
    for (widths, batch, side, dtype), by_finished in by_net.items():
        where = f"{widths}, {batch} × {side}², {dtype}"
        wrong = [by[OURS]["refused"] for by in by_finished.values() if by[OURS].get("refused")]
        if wrong:
            found.append(Verdict("g(x) by our kernels", where, "right", "wrong", False, wrong[0]))
            continue
        for finished, by in by_finished.items():
            rival = min((by[name] for name in RIVALS), key=lambda row: row["median_s"])
            times = rival["median_s"] / by[OURS]["median_s"]
            what = f"iteration, {finished} finished: faster cuDNN / ours"
            measured = f"{times:.2f} ({rival['method']})"
            found.append(Verdict(what, where, "≥ 1.5", measured, times >= 1.5))
        if batch > 1:
            part = by_finished[batch // 2][OURS]["median_s"] / by_finished[0][OURS]["median_s"]
            what = "iteration, half finished / none finished"
            found.append(Verdict(what, where, "≤ 0.6", f"{part:.2f}", part <= 0.6))
    return found


def refill_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    by = {r["method"]: r for r in rows if r["suite"] == "refill" and "skipped" not in r}
    if not by:
        return []
    mixed, same, tile = by["mixed"], by["all slowest"], by["one tile"]
    total, most, resident = mixed["iterations_sum"], mixed["iterations_max"], mixed["resident"]
    where = f"{mixed['batch']} samples of {mixed['iterations_min']} to {most} iterations, "
    where += f"{resident} slots"
    a_pass = tile["median_s"] / tile["iterations_max"]  # every slot once
    part = mixed["median_s"] / ((total / resident + most) * a_pass)
    occupied = total / resident * a_pass / mixed["median_s"]
    other = mixed["median_s"] / (total / same["iterations_sum"] * same["median_s"])
    return [
        Verdict(
            "refill: time / ((Σ/S + max) passes of a full tile)",
            where,
            "≤ 1.2",
            f"{part:.2f}",
            part <= 1.2,
            f"slots occupied {occupied:.0%} of the time",
        ),
        Verdict(
            "refill: time / (Σ/(B max) of a batch of slowest samples)",
            where,
            "≤ 1.2",
            f"{other:.2f}",
            other <= 1.2,
        ),
    ]


def at_most(what: str, where: str, ratio: Ratio, limit: float) -> Verdict:
    met = None if ratio.value is None else ratio.value <= limit
    measured = "-" if ratio.value is None else f"{ratio.value:.2f} ({ratio.against})"
    return Verdict(what, where, f"≤ {limit:g}", measured, met, ratio.note)


def speedup(what: str, where: str, ratio: Ratio, least: float) -> Verdict:
    if ratio.value is None:
        return Verdict(what, where, f"≥ {least:g}", "-", None, ratio.note)
    times = 1 / ratio.value
    return Verdict(what, where, f"≥ {least:g}", f"{times:.1f}", times >= least, ratio.note)


def overhead_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    grouped: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        if row["suite"] == "overhead":
            grouped.setdefault((row["batch"], row["size"]), {})[row["method"]] = row
    for (batch, size), by in grouped.items():
        if "torchdeq Anderson" in by and "ours Anderson" in by and size <= 256:
            ratio = by["torchdeq Anderson"]["median_s"] / by["ours Anderson"]["median_s"]
            what = "time outside g, torchdeq Anderson / Anderson"
            found.append(Verdict(what, f"({batch}, {size})", "≥ 8", f"{ratio:.1f}", ratio >= 8))
    return found


def loop_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    by_size: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        if row["suite"] == "loop" and "skipped" not in row:
            by_size.setdefault((row["batch"], row["size"]), {})[row["method"]] = row
    for (batch, size), by in by_size.items():
        where = f"({batch}, {size})"
        seconds = {name: row["seconds_an_iteration"] for name, row in by.items()}
        for solver in ("Picard", "Anderson"):
            graph, eager = seconds[f"{solver}, graph"], seconds[f"{solver}, eager"]
            least = (
                seconds["WHILE body of one tiny kernel"] + seconds[f"{solver}, nodes of a graph"]
            )
            part = graph / least
            what = f"{solver}, graph driver: an iteration / (WHILE body + nodes)"
            found.append(Verdict(what, where, "≤ 1.5", f"{part:.2f}", part <= 1.5))
            times = eager / graph
            what = f"{solver}: an iteration, eager / graph"
            found.append(Verdict(what, where, "≥ 5", f"{times:.1f}", times >= 5))
            syncs = by[f"{solver}, graph"]["syncs"]
            what = f"{solver}, graph driver: waits of the host in a solve"
            found.append(Verdict(what, where, "≤ 1, at its end", str(syncs), syncs <= 1))
    return found


def other_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for row in rows:
        if row["suite"] == "kernels" and "of_copy" in row:
            part = row["of_copy"]
            where = f"({row['batch']}, {row['size']}) {row.get('dtype', 'float32')}"
            cuda = row.get("device", "cpu").startswith("cuda")
            if cuda and row["size"] < LONG_ROW:
                continue
            least = 0.9 if cuda else 0.6
            found.append(
                Verdict(
                    f"{row['method']} / copy bandwidth",
                    where,
                    f"≥ {least:.0%}",
                    f"{part:.0%}",
                    part >= least,
                )
            )
        elif row["suite"] == "import":
            seconds = row["median_s"]
            what = "import fpi_cuda after torch"
            found.append(Verdict(what, "", "< 0.3 s", f"{seconds:.3f} s", seconds < 0.3))
    for method in ("Picard", "Anderson"):
        mine = [r for r in rows if r["suite"] == "scale" and r["method"] == method]
        state = [r["difference"] for r in mine if r["what"] == "state"]
        loss = [r["difference"] for r in mine if r["what"] == "loss"]
        if state:
            what = f"{method}: iterations, state scaled by 1e-3 to 1e3"
            worst = max(state)
            found.append(Verdict(what, "", "± 1", f"± {worst}", worst <= 1))
        if loss:
            what = f"{method}: gradient's change, loss scaled by 1e-5"
            worst = max(loss)
            found.append(Verdict(what, "", "rounding", f"{worst:.1e}", worst <= 1e-5))
    return found
