"""Which sources a result was measured with, and which commit was the first to change them since.

    python -m benchmarks.sources

says for each committed result whether the library has changed since it was measured, and fails
where its page does not say so; `python -m benchmarks report` and `python -m experiments TASK
report` write that. A comment's change is one too: which of the sources a number depends on can't
be told.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "fpi_cuda", "benchmarks", "experiments")
LIBRARY = ("CMakeLists.txt", "csrc", "fpi_cuda")
Sources = Mapping[str, str]


def of_library(path: str) -> bool:
    kept = path.startswith("fpi_cuda/") and path.endswith((".py", ".json"))
    return kept or path.startswith("csrc/") or path == "CMakeLists.txt"


def of_harness(path: str) -> bool:
    return path.startswith(("benchmarks/", "experiments/")) and path.endswith(".py")


def digest(files: Iterable[tuple[str, bytes]]) -> str:
    """A hash of names and contents, in the order of the names."""
    found = hashlib.sha256()
    for name, content in sorted(files):
        found.update(f"{name}\0".encode() + content + b"\0")
    return found.hexdigest()


def both(commit: str, files: Mapping[str, bytes]) -> dict[str, str]:
    """What a result keeps: the library makes a number old, the harness two runs hard to compare."""
    kinds = {"library": of_library, "harness": of_harness}
    hashes = {
        kind: digest((name, files[name]) for name in files if of(name))[:16]
        for kind, of in kinds.items()
    }
    return {"commit": commit} | hashes


def here() -> dict[str, str]:
    """Of the files as they are."""
    paths = [ROOT / "CMakeLists.txt", *(p for name in FOLDERS for p in (ROOT / name).rglob("*"))]
    named = ((path.relative_to(ROOT).as_posix(), path) for path in paths)
    wanted = {n: p for n, p in named if p.is_file() and (of_library(n) or of_harness(n))}
    return both(commit(), {name: path.read_bytes() for name, path in wanted.items()})


@functools.cache
def at(commit: str) -> Sources:
    """Of a commit."""
    listed = git("ls-tree", "-r", "--name-only", "--full-tree", commit).split("\n")
    names = [name for name in listed if of_library(name) or of_harness(name)]
    asked = "".join(f"{commit}:{name}\n" for name in names).encode()
    command = ["git", "cat-file", "--batch"]
    rest = subprocess.run(command, cwd=ROOT, input=asked, capture_output=True, check=True).stdout
    files = {}
    for name in names:
        head, _, rest = rest.partition(b"\n")
        size = int(head.split()[2])
        files[name], rest = rest[:size], rest[size + 1 :]
    return both(commit, files)


def git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit, with '+' where tracked files of the library or the harness differ from it.

    Where there is no repository, what COMMIT says.
    """
    name = git("rev-parse", "--short=12", "HEAD") or os.environ.get("COMMIT")
    changed = git("status", "--porcelain", "--", *LIBRARY, "benchmarks/*.py", "experiments/*.py")
    return (name or "unknown") + ("+" if changed else "")


def no_history() -> str | None:
    """Why the commits since can't be looked through, or None."""
    if not git("rev-parse", "HEAD"):
        return "there is no git repository"
    shallow = git("rev-parse", "--is-shallow-repository") == "true"
    return "this clone is shallow; git fetch --unshallow" if shallow else None


def changed(path: Path, facts: Mapping[str, Any]) -> str | None:
    """The first commit with another library than a result was measured with; None: none yet."""
    found, now = [], here()["library"]
    for measured in facts["sources"]:
        start = git("rev-parse", "--verify", measured["commit"].rstrip("+") + "^{commit}")
        # Else the one before the file's own.
        start = start or git("log", "-1", "--format=%h^", "--diff-filter=AM", "--", str(path))
        later = git("rev-list", "--reverse", "--ancestry-path", f"{start}..HEAD", "--", *LIBRARY)
        others = (c for c in later.split() if at(c)["library"] != measured["library"])
        found += [next(others, "")] if measured["library"] != now else []
    known = [commit for commit in found if commit]
    return git("rev-list", "--no-walk=sorted", "--reverse", *known)[:12] if known else None


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def said(path: Path, facts: Mapping[str, Any]) -> str:
    """A page's sentence about a result, with a space before it, or nothing."""
    first = None if no_history() else changed(path, facts)
    if first is None:
        return ""
    guess = any("assumed" in measured for measured in facts["sources"])
    why = " (at which one was not recorded: the one before the file was added is taken)"
    return f" `{named(path)}`: measured before commit `{first}`{why if guess else ''}."


def without(page: str) -> str:
    """A page but for these sentences, which depend on the history."""
    return re.sub(r" `[^`\n]*`: measured before commit [^\n]*", "", page)


def main() -> int:
    why = no_history()
    if why:
        print(f"sources: skipped, which results are of older code can't be told: {why}")
        return 0
    wrong, head = 0, git("rev-parse", "HEAD")[:12]
    for package in ("benchmarks", "experiments"):
        page = ROOT / "docs" / f"{package}.md"
        for path in sorted((ROOT / package / "results").glob("*/*.json")):
            first = changed(path, json.loads(path.read_text())["facts"])
            pattern = f"`{re.escape(named(path))}`: measured before commit `([0-9a-f]+)`"
            told = re.search(pattern, page.read_text())
            now = f"measured before commit {first}" if first else "of these sources"
            # The commit that changes the library can't name itself.
            if (told and told[1]) != first and not (told is None and first == head):
                now += f", and {page.relative_to(ROOT)} must say so: run its report"
                wrong += 1
            print(f"{path.relative_to(ROOT)}: {now}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
