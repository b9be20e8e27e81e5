"""The arrows of docs/design.md: nothing imports what is above it, and no files form a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import fpi_cuda

PACKAGE = Path(fpi_cuda.__file__).parent

# The floors, from the ground up. A room imports from floors below its own, and from itself.
FLOORS = (
    ("_uncompiled",),
    ("_check", "_moved", "_torch", "_version", "layout", "norms", "record"),
    ("_build", "arguments", "forms", "modules", "options", "tree"),
    ("captures",),
    ("derivatives",),
    ("backends", "operators", "solution", "state"),
    ("drivers", "solvers", "warm"),
    ("solve",),
    ("adjoint", "compiled", "export"),
    ("fixed_point", "steps"),
    ("bridges", "compat", "contraction", "layer"),
    ("__init__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> set[Path]:
    """Files of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = (node.module or "").split(".") if node.module else []
        if node.level:
            base = path.parents[node.level - 1]
        elif module[0] == "fpi_cuda":
            base, module = PACKAGE, module[1:]
        else:
            continue
        place = base.joinpath(*module)
        for name in node.names:
            for file in (place / f"{name.name}.py", place / name.name / "__init__.py"):
                if file.exists():
                    found.add(file)
                    break
            else:
                file = place.with_suffix(".py")
                found.add(file if file.exists() else place / "__init__.py")
    return {file for file in found if file.exists()}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


ARROWS = {path: imports(path) for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_room_has_a_floor():
    assert {room(path) for path in ARROWS} == set(FLOOR)


def test_nothing_imports_a_room_above_it_or_beside_it():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {there.relative_to(PACKAGE)}"
        for path, those in ARROWS.items()
        for there in those
        if room(there) != room(path) and FLOOR[room(there)] >= FLOOR[room(path)]
    ]
    assert not wrong


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter(ARROWS).prepare()
    except CycleError as circle:
        raise AssertionError(" -> ".join(str(p) for p in circle.args[1])) from None


def test_the_walk_sees_imports():
    def named(path):
        return {room(p) for p in ARROWS[PACKAGE / path]}

    assert named("layer.py") >= {"fixed_point", "solution"}
    assert PACKAGE / "record.py" in ARROWS[PACKAGE / "drivers" / "eager.py"]
    assert PACKAGE / "backends" / "native.py" in ARROWS[PACKAGE / "drivers" / "whole.py"]
