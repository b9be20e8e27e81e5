"""Result files: pytest-benchmark's JSON. A row's facts are an entry's `extra_info`.

pytest-benchmark keeps only what has a time; rows that were skipped or refused stand under
"untimed", and each row's "index" tells its place among all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What is known of the machine and the run, and its rows in their order.

    A timed row has `samples`, seconds of each call, `rounds`, the turn each was taken in (samples
    of two rows of one cell in the same round are a pair), and `median_s`, `q1_s`, `q3_s`, `iqr_s`,
    `repeats`.
    """
    try:
        content = json.loads(path.read_text())
        facts = content["facts"]
        rows = [
            entry["extra_info"] | {"samples": entry["stats"]["data"]}
            for entry in content["benchmarks"]
        ]
        rows += content["untimed"]
        return facts, sorted(rows, key=lambda row: row["index"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"load: {path} must be a result file of `python -m benchmarks SUITE --json FILE` "
            f"(got {type(error).__name__}: {error})"
        ) from error


def save(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".part")
    whole.write_text(encode(content) + "\n")
    whole.replace(path)  # at no moment is there half a file


def encode(value: Any, indent: int = 0) -> str:
    """JSON that git can hold and diff: 6 digits, a key a line, a list of scalars on one."""
    pad = "\n" + " " * (indent + 1)
    if isinstance(value, Mapping) and value:
        items = (f"{pad}{json.dumps(k)}: {encode(v, indent + 1)}" for k, v in value.items())
        return "{" + ",".join(items) + "\n" + " " * indent + "}"
    if isinstance(value, list | tuple):
        nested = any(isinstance(v, Mapping | list | tuple) for v in value)
        items = (encode(v, indent + 1) for v in value)
        return f"[{', '.join(items)}]" if not nested else f"[{pad}{f',{pad}'.join(items)}]"
    if isinstance(value, float):
        value = float(f"{value:.6g}")
    return json.dumps(value, ensure_ascii=False)
