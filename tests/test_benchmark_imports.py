"""The arrows of benchmarks/ and experiments/: the second imports the first, and none goes round."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("benchmarks", "experiments")


def graph(root, packages):
    """Which files of the packages a file imports, anywhere in it, by the names of modules."""
    paths = {}
    for path in (p for package in packages for p in (root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        paths[name.removesuffix(".__init__")] = path
    return {name: imported(name, path, paths) for name, path in paths.items()}


def imported(name, path, known):
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in known else base)
    # A module's packages are imported before it; those that the importer is in are there already.
    parts = (module.split(".") for module in found)
    before = {".".join(p[:i]) for p in parts for i in range(1, len(p))}
    found |= {module for module in before if not name.startswith(f"{module}.")}
    return found & known.keys() - {name}


def circle(arrows):
    """Files of which each imports the next and the last the first, or nothing."""
    done, way = set(), []

    def visit(name):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        way.append(name)
        found = next(filter(None, map(visit, sorted(arrows[name]))), None)
        way.pop()
        done.add(name)
        return found

    return next(filter(None, map(visit, arrows)), None)


def test_benchmarks_import_no_experiment_and_nothing_goes_round():
    arrows = graph(ROOT, PACKAGES)
    down = {name for name, there in arrows.items() if any(m.startswith("bench") for m in there)}
    assert {"experiments.__main__", "benchmarks.__main__"} <= down, "the walk sees imports"
    for name, there in arrows.items():
        if name.startswith("benchmarks"):
            assert not [module for module in there if module.startswith("experiments")], name
    assert circle(arrows) is None


def test_a_circle_is_found_also_through_a_package_and_inside_a_function(tmp_path):
    (tmp_path / "benchmarks" / "inner").mkdir(parents=True)
    files = {
        "benchmarks/__init__.py": "",
        "benchmarks/top.py": "from .inner.leaf import x",
        "benchmarks/inner/__init__.py": "def late():\n    from . import other",
        "benchmarks/inner/leaf.py": "x = 1",
        "benchmarks/inner/other.py": "from ..top import x",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = circle(graph(tmp_path, ["benchmarks"]))
    assert set(found or ()) == {f"benchmarks.{n}" for n in ("inner", "inner.other", "top")}
