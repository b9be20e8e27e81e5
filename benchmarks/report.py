"""From rows to tables: on the terminal, in the JSON, and in docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .measure import ROOT, incomparable
from .methods import COMPACTED, CONVOLUTIONS, SAME_TASK, WHOLE
from .problems import BIBTEX, SIZES

Row = Mapping[str, Any]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

# --- JSON ------------------------------------------------------------------------------------


def save(path: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"facts": facts, "rows": rows}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    content = json.loads(path.read_text())
    return content["facts"], content["rows"]


def committed() -> list[Path]:
    """The result files of this harness, over all devices."""
    return sorted(
        path for name in ("full", "nets", "conv") for path in RESULTS.glob(f"*/{name}.json")
    )


# --- comparing -------------------------------------------------------------------------------


def cell(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("problem", "batch", "size", "mode"))


def cells(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows that were timed in turns: by kind, B, N, mode and the number of the run.

    A suite may time a cell again beside other rivals; ours is then in both runs, first of all. A
    time is divided only by one of its own run.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    runs: dict[tuple[Any, ...], int] = {}
    for row in rows:
        if row["suite"] != "solve":
            continue
        key = cell(row)
        run = runs.setdefault(key, 0)
        if any(r["method"] == row["method"] for r in found.get((*key, run), ())):
            runs[key] = run = run + 1
        found.setdefault((*key, run), []).append(row)
    return found


def timed_rows(rows: Iterable[Row], **where: str) -> list[Row]:
    """Those that have a time, of the family or method asked for; fastest first."""
    found = [
        row
        for row in rows
        if "median_s" in row and all(row[key] == value for key, value in where.items())
    ]
    return sorted(found, key=lambda row: row["median_s"])


@dataclass(frozen=True)
class Ratio:
    """time / time of the rival, or why there is none."""

    value: float | None
    against: str
    note: str = ""  # why there is no ratio, or which faster rivals were left out


def compare(row: Row, rival: Row) -> Ratio:
    """The row's time over the rival's.

    A rival that is more exact did more: the ratio is then shown only where it is against us.
    """
    if row["refused"] or rival["refused"]:
        return Ratio(None, rival["method"], incomparable(row, rival) or "")
    why = incomparable(row, rival)
    value = row["median_s"] / rival["median_s"]
    if why is None:
        return Ratio(value, rival["method"])
    return Ratio(value if value > 1 else None, rival["method"], f"{rival['method']}: {why}")


def against_plain(row: Row, rows: Sequence[Row]) -> Ratio:
    """The row's time over that of the fastest plain loop that it may be compared with."""
    left_out = []
    for rival in timed_rows(rows, family="plain"):
        ratio = compare(row, rival)
        if ratio.value is not None:
            notes = [ratio.note] if ratio.note else []
            return Ratio(ratio.value, ratio.against, "; ".join(notes + left_out))
        left_out.append(f"not against {ratio.note}")
    return Ratio(None, "no plain loop", "; ".join(left_out) or "no plain loop was timed")


def against(row: Row, rows: Sequence[Row], method: str) -> Ratio:
    """The row's time over that of one rival."""
    rival = next((r for r in rows if r["method"] == method), None)
    if rival is None or "skipped" in rival:
        return Ratio(None, method, rival["skipped"] if rival else "not run")
    return compare(row, rival)


# --- targets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    what: str
    where: str
    target: str
    measured: str
    met: bool | None  # None: no ratio may be shown
    note: str = ""


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """The targets that concern an opaque g, one line a cell."""
    found: list[Verdict] = []
    for key, group in cells(rows).items():
        kind, batch, size, mode, _ = key
        where = f"{kind} ({batch}, {size}) {mode}"
        ours = {row["method"]: row for row in group if row["family"] == "ours"}
        picard, anderson = ours.get("Picard"), ours.get("Anderson")
        plain = any(row["family"] == "plain" for row in group)
        if plain and picard and "median_s" in picard and batch * size >= 32_000:
            found.append(picard_verdict(picard, group, where))
        found += whole_verdicts(rows, group, where)
        found += convolution_verdicts(group, where)
        if anderson and "median_s" in anderson and size <= 256:
            if plain and kind == "hard":
                ratio = against_plain(anderson, group)
                found.append(at_most("Anderson / best plain loop", where, ratio, 1.0))
            if any(row["family"] == "torchdeq" for row in group):
                ratio = against(anderson, group, "torchdeq Anderson")
                least = 6.0 if kind == "hard" else 3.0
                found.append(speedup("torchdeq Anderson / Anderson", where, ratio, least))
    found += refill_verdicts(rows) + convolutions_verdicts(rows)
    return found + overhead_verdicts(rows) + loop_verdicts(rows) + other_verdicts(rows)


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
    """The faster of our two whole solves against each kind of rival."""
    whole = [row for row in timed_rows(group, family="ours") if row["method"] in WHOLE]
    if not whole:
        return []
    best = whole[0]
    name, size = best["method"], (best["batch"], best["size"])
    plain = against_plain(best, group)
    peers = [compare(best, row) for row in timed_rows(group, family="torchdeq")]
    shown = [ratio for ratio in peers if ratio.value is not None]
    found = []
    if best["problem"] == "hard":
        found.append(speedup(f"best plain loop / {name}", where, plain, 2.0))
        for ratio in peers:
            least = 3.0
            if ratio.against == "torchdeq Anderson":
                least = 10.0 if size == (64, 1024) else 20.0
            found.append(speedup(f"{ratio.against} / {name}", where, ratio, least))
    elif best["problem"] == "easy" and best["mode"] == "forward+backward":
        fastest = max([plain, *shown], key=lambda r: -1 if r.value is None else r.value)
        seconds = {
            row["method"]: row["median_s"]
            for row in rows
            if row["suite"] == "products" and (row["batch"], row["size"]) == size
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


def convolutions_table(rows: Sequence[Row]) -> Table:
    table = [["net", "batch", "side", "dtype", "finished", "method", "µs", "TFLOP/s", "GB/s"]]
    table[0].append("of roofline")
    for row in rows:
        if row["suite"] == "convolutions" and "skipped" not in row:
            table.append(
                [
                    " → ".join(map(str, row["widths"])),
                    str(row["batch"]),
                    str(row["side"]),
                    row["dtype"],
                    str(row["finished"]),
                    row["method"],
                    f"{row['median_s'] * 1e6:.1f}",
                    f"{row['flops_per_s'] / 1e12:.1f}",
                    f"{row['bytes_per_s'] / 1e9:.0f}",
                    f"{row['of_roofline']:.0%}",
                ]
            )
    return table


def convolutions_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """An iteration on a device against compiled cuDNN, and with half of the samples finished."""
    found = []
    by_net: dict[tuple[Any, ...], dict[tuple[int, str], float]] = {}
    for row in rows:
        if row["suite"] == "convolutions" and "skipped" not in row:
            key = (tuple(row["widths"]), row["batch"], row["side"], row["dtype"])
            by_net.setdefault(key, {})[row["finished"], row["method"]] = row["median_s"]
    for (widths, batch, side, dtype), by in by_net.items():
        where = f"{widths}, {batch} × {side}², {dtype}"
        if not any(name.endswith("step") for _, name in by):
            found.append(Verdict("g(x) by our kernels", where, "right", "wrong", False))
            continue
        ours = {
            finished: min(
                seconds
                for (f, name), seconds in by.items()
                if f == finished and name.endswith("step")
            )
            for finished, _ in by
        }
        for finished, seconds in ours.items():
            times = by[finished, "cuDNN, compiled"] / seconds
            what = f"iteration, {finished} finished: compiled cuDNN / ours"
            found.append(Verdict(what, where, "≥ 1.5", f"{times:.2f}", times >= 1.5))
        if batch > 1:
            part = ours[batch // 2] / ours[0]
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
            least = 0.9 if row.get("device", "cpu").startswith("cuda") else 0.6
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


def failures(rows: Sequence[Row]) -> list[str]:
    """What of ours is wrong; times, and what a peer gets wrong, are no failures."""
    return [
        f"{row['problem']} ({row['batch']}, {row['size']}) {row['mode']} {row['method']}: "
        f"{row['refused']}"
        for row in rows
        if row["suite"] == "solve" and row["family"] == "ours" and row.get("refused")
    ]


# --- tables ----------------------------------------------------------------------------------

Table = list[list[str]]


def solve_table(rows: Sequence[Row]) -> Table:
    head = ["method", "ms", "quartiles", "/ plain", "g calls", "mean", "residual", "dW error"]
    table = [head]
    for row in rows:
        name = f"**{row['method']}**" if row["family"] == "ours" else row["method"]
        if row.get("skipped", "").startswith("no "):  # this problem is not for it
            continue
        if "skipped" in row:
            table.append([name, "-", row["skipped"], *[""] * 5])
            continue
        ratio = against_plain(row, rows) if "median_s" in row else Ratio(None, "", row["refused"])
        error = row["gradient_error"]
        table.append(
            [
                name,
                f"{row['median_s'] * 1e3:.2f}" if "median_s" in row else "refused",
                f"{row['q1_s'] * 1e3:.2f}-{row['q3_s'] * 1e3:.2f}" if "q1_s" in row else "",
                "-" if ratio.value is None else f"{ratio.value:.2f}",
                str(row["evaluations"]),
                f"{row['iterations_mean']:.1f}",
                f"{row['worst_residual']:.1e}",
                "" if error is None else f"{error:.1e}",
            ]
        )
    return table


def overhead_table(rows: Sequence[Row]) -> Table:
    table = [["method", "B", "N", "µs outside g an evaluation", "quartiles"]]
    for row in rows:
        if row["suite"] == "overhead":
            low, high = row["q1_s"] * 1e6, row["q3_s"] * 1e6
            table.append(
                [
                    row["method"],
                    str(row["batch"]),
                    str(row["size"]),
                    f"{row['median_s'] * 1e6:.0f}",
                    f"{low:.0f}-{high:.0f}",
                ]
            )
    return table


def kernels_table(rows: Sequence[Row]) -> Table:
    table = [["kernel", "B", "N", "dtype", "ms", "GB/s", "copy GB/s", "of copy"]]
    for row in rows:
        if row["suite"] == "kernels" and "skipped" not in row:
            table.append(
                [
                    row["method"],
                    str(row["batch"]),
                    str(row["size"]),
                    row.get("dtype", "float32"),
                    f"{row['median_s'] * 1e3:.2f}",
                    f"{row['bytes_per_s'] / 1e9:.1f}",
                    f"{row['copy_bytes_per_s'] / 1e9:.1f}",
                    f"{row['of_copy']:.0%}",
                ]
            )
    return table


def products_table(rows: Sequence[Row]) -> Table:
    names = ("product", "plain loop's iteration", "whole solve's iteration")
    table = [["B", "N", *(f"{name}, µs" for name in names), "product's part"]]
    by_size: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        if row["suite"] == "products":
            by_size.setdefault((row["batch"], row["size"]), {})[row["method"]] = row["median_s"]
    for (batch, size), by in by_size.items():
        part = by[names[0]] / by[names[1]]
        micro = (f"{by[name] * 1e6:.0f}" for name in names)
        table.append([str(batch), str(size), *micro, f"{part:.0%}"])
    return table


def loop_table(rows: Sequence[Row]) -> Table:
    table = [["loop", "B", "N", "µs an iteration", "syncs a solve"]]
    for row in rows:
        if row["suite"] == "loop" and "skipped" not in row:
            micro = f"{row['seconds_an_iteration'] * 1e6:.2f}"
            table.append(
                [
                    row["method"],
                    str(row["batch"]),
                    str(row["size"]),
                    micro,
                    str(row.get("syncs", "")),
                ]
            )
    return table


def scale_table(rows: Sequence[Row]) -> Table:
    table = [["solver", "scaled", "by", "atol", "most iterations", "mean", "difference to 1"]]
    for row in rows:
        if row["suite"] == "scale":
            state = row["what"] == "state"
            table.append(
                [
                    row["method"],
                    row["what"],
                    f"{row['scale']:g}",
                    f"{row['atol']:g}" if state else "",
                    str(row["iterations_max"]) if state else "",
                    f"{row['iterations_mean']:.2f}" if state else "",
                    str(row["difference"]) if state else f"{row['difference']:.1e}",
                ]
            )
    return table


def verdict_table(found: Sequence[Verdict]) -> Table:
    table = [["what", "where", "target", "measured", "met?", "note"]]
    for v in found:
        met = "no ratio" if v.met is None else "yes" if v.met else "NO"
        table.append([v.what, v.where, v.target, v.measured, met, v.note])
    return table


def text_table(table: Table) -> str:
    plain = [[value.replace("**", "") for value in line] for line in table]
    widths = [max(len(line[i]) for line in plain) for i in range(len(plain[0]))]
    lines = ["  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)) for line in plain]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def markdown_table(table: Table) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def render(rows: Sequence[Row], table: Callable[[Table], str], heading: str) -> str:
    """All tables, the targets last."""
    parts = []
    order = {size: i for i, size in enumerate((*SIZES, *BIBTEX))}
    groups = sorted(
        cells(rows).items(),
        key=lambda item: (item[0][0], order.get(item[0][1:3], len(order)), item[0][3:]),
    )
    for (kind, batch, size, mode, run), group in groups:
        again = ", again beside other rivals" if run else ""
        parts.append(f"{heading}{kind}, B = {batch}, N = {size}, {mode}{again}")
        parts.append(table(solve_table(group)))
    for name, make in (
        ("Anderson, time outside g", overhead_table),
        ("products: iterations of the easy problem by Picard", products_table),
        ("step kernels", kernels_table),
        ("convolutions: one iteration on the device", convolutions_table),
        ("loop on the device", loop_table),
        ("scale of the state and of the loss", scale_table),
    ):
        content = make(rows)
        if len(content) > 1:
            parts += [heading + name, table(content)]
    found = verdicts(rows)
    if found:
        parts += [heading + "targets", table(verdict_table(found))]
    return "\n\n".join(parts)


# --- docs/benchmarks.md ----------------------------------------------------------------------


def section(path: Path) -> str:
    facts, rows = load(path)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    threads = facts["threads"]
    head = (
        f"## {facts['device_name']}\n\n"
        f"`{facts['command']}` at commit `{facts['commit']}`, {facts['timestamp']}, "
        f"{threads} thread{'s' if threads != 1 else ''}, "
        f"{facts['build']['cpu_capability']} kernels; {versions}; load average at the start "
        f"{facts['load_average'][0]:.1f}. "
        f"From `{path.relative_to(ROOT).as_posix()}`."
    )
    return head + "\n\n" + render(rows, markdown_table, "### ")


def results() -> str:
    """The part of the page that is made from the committed JSON."""
    return "\n\n".join(section(path) for path in committed()) or "No results are committed yet."


def rebuild(page: Path = PAGE) -> bool:
    """Rewrite the page's results.

    Returns:
        Whether anything changed.
    """
    old = page.read_text()
    before, rest = old.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n\n{results()}\n\n{END}{after}"
    page.write_text(new)
    return new != old
