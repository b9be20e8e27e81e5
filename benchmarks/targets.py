"""What this library sets itself: a line a cell, met, missed, or no ratio that may be shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .methods import COMPACTED, CONVOLUTIONS, PEERS, SAME_TASK, WHOLE
from .ratios import Ratio, against, against_plain, cells, compare, timed_rows
from .suites.convolutions import OURS, RIVALS

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A bound on a number, and why it is where it is."""

    sign: str  # "≤" or "≥"
    limit: float
    why: str
    form: str = ".2f"  # of the number
    unit: str = ""

    def __str__(self) -> str:
        shown = f"{self.limit:.0%}" if self.form.endswith("%") else f"{self.limit:g}"
        return f"{self.sign} {shown}{self.unit}"

    def of(self, what: str, where: str, value: float, note: str = "", by: str = "") -> Verdict:
        met = value <= self.limit if self.sign == "≤" else value >= self.limit
        measured = f"{value:{self.form}}{self.unit}" + (f" ({by})" if by else "")
        return Verdict(what, where, self, measured, met, note)

    def of_ratio(self, what: str, where: str, ratio: Ratio) -> Verdict:
        """Of our time over a rival's; of the rival's over ours where that must be large."""
        if ratio.value is None:
            return Verdict(what, where, self, "-", None, ratio.note)
        if self.sign == "≤":
            return self.of(what, where, ratio.value, ratio.note, ratio.against)
        return self.of(what, where, 1 / ratio.value, ratio.note)


@dataclass(frozen=True)
class Verdict:
    what: str
    where: str
    target: Target
    measured: str
    met: bool | None  # None: no ratio may be shown
    note: str = ""


PICARD = Target("≤", 1.1, "g and the tests are the loop's own; a tenth is for records and checks")
ANDERSON = Target("≤", 1.0, "mixing may not cost more than the iterations that it saves")
STIFF = Target("≤", 1.0, "it needs a hundredth of the iterations")
WHOLE_HARD = Target(
    "≥", 2.0, "a sample that ends makes room at once, and tests find a row in the cache", ".1f"
)
WHOLE_EASY = Target(
    "≥",
    1.3,
    "all samples end together: only what is not the product can be saved, and of that nine tenths "
    "where the product takes 75 % and more of a plain loop's iteration",
    ".1f",
)
WHOLE_ENERGY = Target("≥", 1.0, "nearly all of an iteration is its two products", ".1f")
TORCHDEQ_EASY = Target("≥", 3.0, "it mixes and tests by many operators of torch's", ".1f")
TORCHDEQ_HARD = Target(
    "≥", 6.0, "as on easy, and it iterates all samples until the slowest has ended", ".1f"
)
TORCHDEQ_WHOLE = Target(
    "≥", 20.0, "what Anderson on an opaque g and a whole solve gain, together", ".1f"
)
TORCHDEQ_LONG = Target(
    "≥", 10.0, "the same for 64 rows of 1024 values, where the products weigh more", ".1f"
)
PEERS_WHOLE = Target("≥", 3.0, "they compute all samples until the slowest has ended", ".1f")
CONV_PLAIN = Target("≥", 1.2, "z's part of the first convolution is computed once", ".1f")
CONV_TORCHDEQ = Target(
    "≥", 2.0, "as beside a plain loop, which leaves samples out as torchdeq does not", ".1f"
)
CONV_STEP = Target("≥", 1.5, "layers and step pass on what cuDNN's write and read again")
CONV_HALF = Target("≤", 0.6, "time should follow the samples that still iterate")
REFILL = Target("≤", 1.2, "a slot is filled when its sample ends; only the last ones stand empty")
STATES = Target("≤", 0.0, "what the method has to hold, as said under *States held*")
FLAT = Target("≤", 1.01, "nothing of an iteration is kept for the backward", ".3f")
OVERHEAD = Target("≥", 8.0, "one step operator does the work of many of torch's", ".1f")
GRAPH_NODES = Target("≤", 1.5, "the kernels and the loop's condition are all that must run")
GRAPH_EAGER = Target("≥", 5.0, "launches of small kernels from Python take longer than they", ".1f")
WAITS = Target("≤", 1, "the host needs nothing before the end", "d")
COPY_CPU = Target("≥", 0.6, "a copy does not compute", ".0%")
COPY_CUDA = Target("≥", 0.9, "arithmetic hides behind memory in rows of 32,000 values", ".0%")
LONG_ROW = 32_000
IMPORT = Target("≤", 0.3, "little beside torch's own", ".3f", " s")
STATE_SCALE = Target("≤", 1, "tolerances are relative; rounding may move a count by one", "d")
LOSS_SCALE = Target("≤", 1e-5, "the adjoint is linear: what remains is rounding", ".1e")


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    found: list[Verdict] = []
    for group in cells(rows).values():
        first = group[0]
        kind, batch, size, mode = (first[key] for key in ("problem", "batch", "size", "mode"))
        where = f"{kind} ({batch}, {size}) {mode}"
        if first["suite"] == "whole":
            found += of_whole(rows, group, f"{where}, {first['dtype']}")
        elif first["suite"] not in ("scaling", "convergence") and first["dtype"] == "float32":
            peers = first["suite"] == "peers"
            found += () if peers else of_loops(group, where)
            found += (*of_whole(rows, group, where), *of_convolutions(group, where))
            found += of_peers(group, where) if peers else ()
    for judge in (of_refill, of_iterations, of_memory, of_overhead, of_graphs, of_others):
        found += judge(rows)
    return found


def of_loops(group: Sequence[Row], where: str) -> Iterator[Verdict]:
    """Picard and Anderson, of a g that they know nothing of, against plain loops."""
    by = {row["method"]: row for row in group if "median_s" in row}
    kind, batch, size = (group[0][key] for key in ("problem", "batch", "size"))
    if "Picard" in by and kind in ("easy", "hard") and batch * size >= 32_000:
        # Against the loops that do the same task; faster ones of another kind stand in the note.
        same = [row for row in group if row["method"] in SAME_TASK]
        ratio = against_plain(by["Picard"], same)
        found = PICARD.of_ratio("Picard / best plain loop", where, ratio)
        best = against_plain(by["Picard"], group)
        if best.value is not None and best.against not in SAME_TASK:
            faster = f"{best.against}: {best.value:.2f}"
            found = replace(found, note="; ".join(filter(None, [found.note, faster])))
        yield found
    if "Anderson" in by and kind == "hard" and size <= 256:
        ratio = against_plain(by["Anderson"], group)
        yield ANDERSON.of_ratio("Anderson / best plain loop", where, ratio)
    if "Anderson" in by and kind == "stiff":
        rivals = [against(by["Anderson"], group, n) for n in ("Picard", *SAME_TASK) if n in by]
        worst = max(rivals, key=lambda ratio: ratio.value or 0.0)
        yield STIFF.of_ratio("Anderson / fastest fixed-point iteration", where, worst)


def of_peers(group: Sequence[Row], where: str) -> Iterator[Verdict]:
    """Against other libraries, at their defaults or at their best settings, whichever is faster."""
    kind, batch, size = (group[0][key] for key in ("problem", "batch", "size"))
    opaque = next((r for r in group if r["method"] == "Anderson" and "median_s" in r), None)
    whole = [row for row in timed_rows(group, family="ours") if row["method"] in WHOLE]
    rivals = [row for family in PEERS for row in timed_rows(group, family=family)]
    same = [row for row in rivals if row["method"].startswith("torchdeq Anderson")]
    if opaque is not None and size <= 256 and kind in ("easy", "hard"):
        target = TORCHDEQ_HARD if kind == "hard" else TORCHDEQ_EASY
        for row in same:
            yield target.of_ratio(f"{row['method']} / Anderson", where, compare(opaque, row))
    if not whole or kind != "hard":
        return
    best = whole[0]
    for family in PEERS:
        ratios = [compare(best, row) for row in rivals if row["family"] == family]
        if ratios:
            what = f"fastest {family} / {best['method']}"
            yield PEERS_WHOLE.of_ratio(what, where, largest(ratios) or ratios[0])
    target = TORCHDEQ_LONG if (batch, size) == (64, 1024) else TORCHDEQ_WHOLE
    for row in same:
        yield target.of_ratio(f"{row['method']} / {best['method']}", where, compare(best, row))


def largest(ratios: Sequence[Ratio]) -> Ratio | None:
    shown = [ratio for ratio in ratios if ratio.value is not None]
    return max(shown, key=lambda ratio: ratio.value or 0.0) if shown else None


def of_whole(rows: Sequence[Row], group: Sequence[Row], where: str) -> Iterator[Verdict]:
    """The faster of our two whole solves against plain loops, on easy against all rivals."""
    whole = [row for row in timed_rows(group, family="ours") if row["method"] in WHOLE]
    if not whole:
        return
    best = whole[0]
    plain = against_plain(best, group)
    if best["problem"] == "hard" and best["suite"] != "peers":
        yield WHOLE_HARD.of_ratio(f"best plain loop / {best['method']}", where, plain)
    elif best["problem"] == "energy":
        yield WHOLE_ENERGY.of_ratio(f"best plain loop / {best['method']}", where, plain)
    elif best["problem"] == "easy" and best["mode"] == "forward+backward":
        size = (best["batch"], best["size"])
        products = [r for r in rows if r["suite"] == "products" and "median_s" in r]
        by = {r["method"]: r["median_s"] for r in products if (r["batch"], r["size"]) == size}
        if by:
            part = by["product"] / by["plain loop's iteration"]
            target = replace(WHOLE_EASY, limit=1.3 if part < 0.75 else round(0.9 / part, 2))
            peers = [compare(best, r) for f in PEERS for r in timed_rows(group, family=f)]
            fastest = largest([plain, *peers]) or plain
            noted = f"product: {part:.0%} of a plain loop's iteration"
            fastest = replace(fastest, note="; ".join(filter(None, [noted, fastest.note])))
            yield target.of_ratio(f"fastest rival / {best['method']}", where, fastest)


def of_convolutions(group: Sequence[Row], where: str) -> Iterator[Verdict]:
    """The faster of our two solves of a net against the compacted loop and the best of torchdeq."""
    mine = [row for row in timed_rows(group, family="ours") if row["method"] in CONVOLUTIONS]
    if mine:
        best, name = mine[0], mine[0]["method"]
        plain = against(best, group, COMPACTED)
        yield CONV_PLAIN.of_ratio(f"{COMPACTED} / {name}", where, plain)
        for row in timed_rows(group, family="torchdeq")[:1]:
            yield CONV_TORCHDEQ.of_ratio(f"{row['method']} / {name}", where, compare(best, row))


def of_refill(rows: Sequence[Row]) -> Iterator[Verdict]:
    by = {r["method"]: r for r in rows if r["suite"] == "refill" and "skipped" not in r}
    if not by:
        return
    mixed, same, tile = by["mixed"], by["all slowest"], by["one tile"]
    total, most, resident = mixed["iterations_sum"], mixed["iterations_max"], mixed["resident"]
    where = f"{mixed['batch']} samples of {mixed['iterations_min']} to {most} iterations, "
    where += f"{resident} slots"
    a_pass = tile["median_s"] / tile["iterations_max"]  # every slot once
    part = mixed["median_s"] / ((total / resident + most) * a_pass)
    occupied = total / resident * a_pass / mixed["median_s"]
    other = mixed["median_s"] / (total / same["iterations_sum"] * same["median_s"])
    note = f"slots occupied {occupied:.0%} of the time"
    yield REFILL.of("refill: time / ((Σ/S + max) passes of a full tile)", where, part, note)
    yield REFILL.of("refill: time / (Σ/(B max) of a batch of slowest samples)", where, other)


def of_iterations(rows: Sequence[Row]) -> Iterator[Verdict]:
    """An iteration on a device, as `backend="auto"` has it, against the faster of cuDNN's."""
    by_net: dict[tuple[Any, ...], dict[int, dict[str, Row]]] = {}
    for row in rows:
        if row["suite"] == "convolutions" and "skipped" not in row:
            net = (tuple(row["widths"]), row["batch"], row["side"], row["dtype"])
            by_net.setdefault(net, {}).setdefault(row["finished"], {})[row["method"]] = row
    for (widths, batch, side, dtype), by_finished in by_net.items():
        where = f"{widths}, {batch} × {side}², {dtype}"
        wrong = [by[OURS]["refused"] for by in by_finished.values() if by[OURS].get("refused")]
        if wrong:
            yield Verdict("g(x) by our kernels", where, CONV_STEP, "wrong", False, wrong[0])
            continue
        for finished, by in by_finished.items():
            rival = min((by[name] for name in RIVALS), key=lambda row: row["median_s"])
            times = rival["median_s"] / by[OURS]["median_s"]
            what = f"iteration, {finished} finished: faster cuDNN / ours"
            yield CONV_STEP.of(what, where, times, by=rival["method"])
        if batch > 1:
            part = by_finished[batch // 2][OURS]["median_s"] / by_finished[0][OURS]["median_s"]
            yield CONV_HALF.of("iteration, half finished / none finished", where, part)


def of_memory(rows: Sequence[Row]) -> Iterator[Verdict]:
    flat: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        if row["suite"] != "memory" or "peak_bytes" not in row:
            continue
        where = f"({row['batch']}, {row['size']}) {row['mode']}"
        if "limit" in row:
            peak, most = (row[key] / row["state_bytes"] for key in ("peak_bytes", "limit"))
            what = f"{row['method']}: states held, g's value among them"
            yield replace(STATES, limit=most).of(what, where, peak)
        elif row["family"] == "ours":
            flat.setdefault((row["method"], where), []).append(row["peak_bytes"])
    for (method, where), peaks in flat.items():
        what = f"{method}: peak memory, 128 iterations / 8"
        yield FLAT.of(what, where, max(peaks) / min(peaks))


def of_suite(rows: Sequence[Row], suite: str) -> dict[str, dict[str, Row]]:
    """The rows that were not skipped, by size and method."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["suite"] == suite and "skipped" not in row:
            found.setdefault(f"({row['batch']}, {row['size']})", {})[row["method"]] = row
    return found


def of_overhead(rows: Sequence[Row]) -> Iterator[Verdict]:
    for where, by in of_suite(rows, "overhead").items():
        theirs, ours = by.get("torchdeq Anderson"), by.get("ours Anderson")
        if theirs and ours and ours["size"] <= 256:
            what = "time outside g, torchdeq Anderson / Anderson"
            yield OVERHEAD.of(what, where, theirs["median_s"] / ours["median_s"])


def of_graphs(rows: Sequence[Row]) -> Iterator[Verdict]:
    for where, by in of_suite(rows, "loop").items():
        seconds = {name: row["seconds_an_iteration"] for name, row in by.items()}
        for solver in ("Picard", "Anderson"):
            graph, eager = seconds[f"{solver}, graph"], seconds[f"{solver}, eager"]
            least = (
                seconds["WHILE body of one tiny kernel"] + seconds[f"{solver}, nodes of a graph"]
            )
            what = f"{solver}, graph driver: an iteration / (WHILE body + nodes)"
            yield GRAPH_NODES.of(what, where, graph / least)
            yield GRAPH_EAGER.of(f"{solver}: an iteration, eager / graph", where, eager / graph)
            what = f"{solver}, graph driver: waits of the host in a solve"
            yield WAITS.of(what, where, by[f"{solver}, graph"]["syncs"])


def of_others(rows: Sequence[Row]) -> Iterator[Verdict]:
    for row in rows:
        if row["suite"] == "kernels" and "of_copy" in row:
            where = f"({row['batch']}, {row['size']}) {row.get('dtype', 'float32')}"
            cuda = row.get("device", "cpu").startswith("cuda")
            if not cuda or row["size"] >= LONG_ROW:
                target = COPY_CUDA if cuda else COPY_CPU
                yield target.of(f"{row['method']} / copy bandwidth", where, row["of_copy"])
        elif row["suite"] == "import":
            yield IMPORT.of("import fpi_cuda after torch", "", row["median_s"])
    scaled = [row for row in rows if row["suite"] == "scale"]
    for method in ("Picard", "Anderson"):
        for of, target, what in (
            ("state", STATE_SCALE, "iterations, state scaled by 1e-3 to 1e3"),
            ("loss", LOSS_SCALE, "gradient's change, loss scaled by 1e-5"),
        ):
            mine = [r["difference"] for r in scaled if (r["method"], r["what"]) == (method, of)]
            if mine:
                yield target.of(f"{method}: {what}", "", max(mine))
