"""The arrows of docs/design.md: nothing imports what is above it."""

import ast
from pathlib import Path

import fpi_cuda

PACKAGE = Path(fpi_cuda.__file__).parent

# A room may import from rooms of a lower rank, and from itself.
RANK = {
    "_version": 0,
    "_check": 0,
    "_moved": 0,
    "layout": 0,
    "record": 0,
    "_build": 1,
    "forms": 1,
    "solution": 3,  # reads the record that backends fill
    "backends": 2,
    "modules": 2,
    "operators": 3,
    "solvers": 4,
    "evaluation": 5,
    "drivers": 5,
    "dense": 7,
    "conv": 7,
    "adjoint": 6,
    "fixed_point": 7,
    "_uncompiled": 8,
    "steps": 8,
    "layer": 8,
    "contraction": 9,
    "compat": 9,
    "__init__": 10,
}
# The reference backend names the statuses that the record's codes stand for.
ALLOWED = {("backends", "solution"), ("fixed_point", "_uncompiled")}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms of the package that a file imports."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if node.level == depth or module[0] == "fpi_cuda":
                module = module if node.level else module[1:]
                names = [a.name for a in node.names]
                found.update([module[0]] if module and module[0] else names)
    return {name for name in found if name in RANK}


def test_nothing_imports_a_room_above_it():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        here = room(path)
        for there in imported(path):
            if there != here and RANK[there] >= RANK[here] and (here, there) not in ALLOWED:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {there}")
    assert not wrong


def test_the_walk_sees_imports():
    assert imported(PACKAGE / "layer.py") >= {"fixed_point", "solution"}
    assert imported(PACKAGE / "solvers" / "iterate.py") >= {"backends", "solution"}
