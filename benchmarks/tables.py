"""Rows as tables: for the terminal, and for the page in docs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .ratios import CONTESTS, Ratio, against_plain, cells
from .targets import Verdict, verdicts

Row = Mapping[str, Any]
Table = list[list[str]]
Columns = dict[str, Callable[[Row], str]]


def key(name: str, form: str = "", scale: float = 1.0) -> Callable[[Row], str]:
    """A row's value, or nothing where it has none."""

    def text(row: Row) -> str:
        value = row.get(name)
        if value is None:
            return ""
        return format(value * scale if scale != 1.0 else value, form)

    return text


def quartiles(scale: float, form: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        if "q1_s" not in row:
            return ""
        return f"{row['q1_s'] * scale:{form}}-{row['q3_s'] * scale:{form}}"

    return text


def of_suite(rows: Sequence[Row], suite: str, columns: Columns) -> Table:
    """A line for each row of a suite that was run."""
    kept = [row for row in rows if row["suite"] == suite and "skipped" not in row]
    return [list(columns), *([text(row) for text in columns.values()] for row in kept)]


SIZE: Columns = {"B": key("batch"), "N": key("size")}


def most(name: str) -> Callable[[Row], str]:
    """The largest of a row's counts."""
    return lambda row: str(max(row[name]))


SIMPLE: dict[str, tuple[str, Columns]] = {
    "dropin": (
        "the old layer's demonstration: training steps",
        {
            "net": key("problem"),
            "data": key("data"),
            "method": key("method"),
            "steps": key("steps"),
            "ms a step": key("median_s", ".0f", 1e3),
            "quartiles": quartiles(1e3, ".0f"),
            "old layer's / this": key("of_old", ".1f"),
            "all steps, s": key("total_s", ".2f"),
            "most evaluations": most("forward"),
            "backward": most("backward"),
            "steps cut off": key("at_limit"),
            "worst residual": key("worst_residual", ".1e"),
            "loss at the end": key("loss", ".3f"),
            "refused": key("refused"),
        },
    ),
    "overhead": (
        "time outside g, an evaluation",
        {"method": key("method")}
        | SIZE
        | {"µs": key("median_s", ".0f", 1e6), "quartiles": quartiles(1e6, ".0f")},
    ),
    "ceilings": (
        "roofs of the machine",
        {
            "what": key("what"),
            "dtype": key("dtype"),
            "working set, MiB": key("working_set", ".0f", 2**-20),
            "10⁹ a second": key("value", ".1f", 1e-9),
        },
    ),
    "kernels": (
        "step kernels",
        {"kernel": key("method")}
        | SIZE
        | {
            "dtype": key("dtype"),
            "ms": key("median_s", ".2f", 1e3),
            "GB/s": key("bytes_per_s", ".1f", 1e-9),
            "copy GB/s": key("copy_bytes_per_s", ".1f", 1e-9),
            "of copy": key("of_copy", ".0%"),
        },
    ),
    "convolutions": (
        "convolutions: one iteration on the device",
        {
            "net": lambda row: " → ".join(map(str, row["widths"])),
            "batch": key("batch"),
            "side": key("side"),
            "dtype": key("dtype"),
            "finished": key("finished"),
            "method": key("method"),
            "refused": key("refused"),
            "µs": key("median_s", ".1f", 1e6),
            "TFLOP/s": key("flops_per_s", ".1f", 1e-12),
            "GB/s": key("bytes_per_s", ".0f", 1e-9),
            "of roofline": key("of_roofline", ".0%"),
        },
    ),
    "loop": (
        "loop on the device",
        {"loop": key("method")}
        | SIZE
        | {
            "µs an iteration": key("seconds_an_iteration", ".2f", 1e6),
            "syncs a solve": key("syncs"),
        },
    ),
    "scale": (
        "scale of the state and of the loss",
        {
            "solver": key("method"),
            "scaled": key("what"),
            "by": key("scale", "g"),
            "atol": key("atol", "g"),
            "most iterations": key("iterations_max"),
            "mean": key("iterations_mean", ".2f"),
            "difference to 1": key("difference", ".2g"),
        },
    ),
    "failing": (
        "failing: the map contracts on 128 samples and expands on 128",
        {
            "method": key("method"),
            "solved of the 128": key("solved"),
            "finite states of 256": key("finite"),
            "g calls": key("evaluations"),
            "mean": key("iterations_mean", ".1f"),
            "ms": key("once_s", ".1f", 1e3),
            "says": lambda row: (
                row.get("raised")
                or ", ".join(f"{name} {count}" for name, count in row.get("statuses", {}).items())
                or "nothing"
            ),
        },
    ),
    "grid": (
        "settings of other libraries that were tried; the fastest right one was timed in turns",
        {"method": key("method"), "problem": key("problem")}
        | SIZE
        | {
            "mode": key("mode"),
            "ms": key("screened_s", ".2f", 1e3),
            "compile, s": key("compile_s", ".1f"),
            "g calls": key("evaluations"),
            "residual": key("worst_residual", ".1e"),
            "dW error": key("gradient_error", ".1e"),
            "refused": key("refused"),
        },
    ),
    "import": (
        "import",
        {
            "what": key("method"),
            "s": key("median_s", ".3f"),
            "torch before it, s": key("torch_s", ".2f"),
        },
    ),
    "bridge": (
        "torchdeq with its solvers and with ours",
        {
            "net": key("problem"),
            "mode": key("mode"),
            "method": key("method"),
            "ms": key("median_s", ".1f", 1e3),
            "quartiles": quartiles(1e3, ".1f"),
            "f calls": key("evaluations"),
            "residual": key("worst_residual", ".1e"),
            "gradient error": key("gradient_error", ".1e"),
            "torchdeq's / this": key("of_namesake", ".2f"),
            "torchdeq's fastest / this": key("of_fastest", ".2f"),
        },
    ),
}


def contest_table(rows: Sequence[Row]) -> Table:
    """The methods of one cell."""
    head = ["method", "ms", "quartiles", "/ plain", "g calls", "mean", "residual", "dW error"]
    table = [[*head, "peak MiB", "compile, s"]]
    for row in rows:
        name = f"**{row['method']}**" if row["family"] == "ours" else row["method"]
        if "skipped" in row:
            table.append([name, "-", row["skipped"], *[""] * 7])
            continue
        ratio = against_plain(row, rows) if "median_s" in row else Ratio(None, "", row["refused"])
        table.append(
            [
                name,
                key("median_s", ".2f", 1e3)(row) or "refused",
                quartiles(1e3, ".2f")(row) or row["refused"] or "",
                "-" if ratio.value is None else f"{ratio.value:.2f}",
                key("evaluations")(row),
                key("iterations_mean", ".1f")(row),
                key("worst_residual", ".1e")(row),
                key("gradient_error", ".1e")(row),
                key("peak_bytes", ".2f", 2**-20)(row),
                key("compile_s", ".1f")(row) if row.get("compile_s", 0) > 0.05 else "",
            ]
        )
    return table


def matrix(rows: Sequence[Row], across: Callable[[Row], str], value: Callable[[Row], str]) -> Table:
    """A line a method, a column for each value of `across`."""
    columns = list(dict.fromkeys(across(row) for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        name = f"**{row['method']}**" if row["family"] == "ours" else row["method"]
        lines.setdefault(name, {})[across(row)] = value(row)
    return [
        ["method", *columns],
        *([name, *(line.get(column, "") for column in columns)] for name, line in lines.items()),
    ]


def done(row: Row) -> bool:
    return not row.get("refused") and "skipped" not in row


def milliseconds(row: Row) -> str:
    return key("median_s", ".2f", 1e3)(row) or ("-" if "skipped" in row else "refused")


def matrices(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """What depends on one number."""
    found = []
    for axis in ("batch", "size", "spread", "iterations"):
        some = [row for row in rows if row["suite"] == "scaling" and row["axis"] == axis]
        if some:
            mode = f"{some[0]['problem']}, {some[0]['mode']}"
            table = matrix(some, lambda row: f"{row['value']:g}", milliseconds)
            found.append((f"scaling: ms against {axis} ({mode})", table))
    precise = [row for row in rows if row.get("curve") == "work-precision"]
    for kind in dict.fromkeys(row["problem"] for row in precise):
        some = [row for row in precise if row["problem"] == kind]
        table = matrix(some, lambda row: f"rtol {row['rtol']:g}", milliseconds)
        found.append((f"work and precision: ms of a forward, {kind}", table))
    memory = [r for r in rows if r["suite"] == "memory" and "limit" not in r]
    for cell in dict.fromkeys(row["cell"] for row in memory):
        some = [row for row in memory if row["cell"] == cell]
        state = some[0]["state_bytes"]
        table = matrix(
            some,
            lambda row: f"{row['iterations']} iterations",
            lambda row: f"{row['peak_bytes'] / row['state_bytes']:.1f}" if done(row) else "-",
        )
        what = f"({some[0]['batch']}, {some[0]['size']}) {some[0]['mode']}"
        found.append((f"peak memory {what}, in states of {state / 2**20:.2f} MiB", table))
    return found


def products_table(rows: Sequence[Row]) -> Table:
    names = ("product", "plain loop's iteration", "whole solve's iteration")
    table = [["B", "N", *(f"{name}, µs" for name in names), "product's part"]]
    by_size: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        if row["suite"] == "products":
            place = by_size.setdefault((row["batch"], row["size"]), {})
            place[row["method"]] = row.get("median_s", math.nan)
    for (batch, size), by in by_size.items():
        part = by[names[0]] / by[names[1]]
        micro = ("-" if math.isnan(by[name]) else f"{by[name] * 1e6:.0f}" for name in names)
        table.append([str(batch), str(size), *micro, f"{part:.0%}"])
    return table


def verdict_table(found: Sequence[Verdict]) -> Table:
    table = [["what", "where", "target", "measured", "met?", "note"]]
    for v in found:
        met = "no ratio" if v.met is None else "yes" if v.met else "NO"
        table.append([v.what, v.where, str(v.target), v.measured, met, v.note])
    return table


def reasons(found: Sequence[Verdict]) -> Table:
    """A line a target, as it stands in its first verdict."""
    first: dict[str, Verdict] = {}
    for v in found:
        first.setdefault(v.target.why, v)
    lines = ([v.what, str(v.target), why] for why, v in first.items())
    return [["for example", "target", "why"], *lines]


def text_table(table: Table) -> str:
    plain = [[value.replace("**", "") for value in line] for line in table]
    widths = [max(len(line[i]) for line in plain) for i in range(len(plain[0]))]
    lines = ["  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)) for line in plain]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def markdown_table(table: Table) -> str:
    escaped = [[value.replace("|", "\\|") for value in line] for line in table]
    lines = ["| " + " | ".join(line) + " |" for line in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def sections(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Every table and its heading, but that of the targets."""
    found = []
    for group in cells(rows).values():
        first = group[0]
        if first["suite"] in CONTESTS and first["suite"] not in ("scaling", "convergence"):
            where = f"B = {first['batch']}, N = {first['size']}, {first['mode']}"
            dtype = "" if first["dtype"] == "float32" else f", {first['dtype']}"
            title = f"{first['suite']}: {first['problem']}, {where}{dtype}"
            found.append((title, contest_table(group)))
    found += matrices(rows)
    found.append(("products: iterations of the easy problem by Picard", products_table(rows)))
    found += [(name, of_suite(rows, suite, columns)) for suite, (name, columns) in SIMPLE.items()]
    return [(name, table) for name, table in found if len(table) > 1]


def render(rows: Sequence[Row]) -> str:
    """For the terminal, the targets last."""
    found = verdicts(rows)
    parts = [*sections(rows), *([("targets", verdict_table(found))] if found else [])]
    return "\n\n".join(f"\n{name}\n\n{text_table(content)}" for name, content in parts)
