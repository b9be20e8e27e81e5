"""The public names and signatures are those of signatures.txt, and old import paths go on working.

After a change that is meant:  PYTHONPATH=. python tests/test_signatures.py > tests/signatures.txt
"""

import dataclasses
import enum
import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest

import fpi_cuda
from fpi_cuda import backends, compat, contraction, operators, record

SNAPSHOT = Path(__file__).with_name("signatures.txt")
# Where a public name can be imported from besides the package itself.
PATHS = {
    "fpi_cuda": fpi_cuda.__all__,
    "fpi_cuda.adjoint": fpi_cuda.adjoint.__all__,
    "fpi_cuda.compat": compat.__all__,
    "fpi_cuda.contraction": contraction.__all__,
    "fpi_cuda.conv": ["ConvStep"],
    "fpi_cuda.dense": ["DenseEnergy", "DenseStep"],
    "fpi_cuda.fixed_point": ["fixed_point"],
    "fpi_cuda.layer": ["FixedPointLayer"],
    "fpi_cuda.operators": operators.__all__,
    "fpi_cuda.backends": backends.__all__,
    "fpi_cuda.solution": [
        "FixedPointError",
        "FixedPointWarning",
        "Solution",
        "Status",
        "Tolerance",
    ],
    "fpi_cuda.solvers": ["Anderson", "Picard"],
    "fpi_cuda.solvers.anderson": ["Anderson"],
    "fpi_cuda.solvers.picard": ["Picard"],
    "fpi_cuda.steps": ["GradientStep", "NeuralStep"],
}
PATHS["fpi_cuda.solution"].append("Tolerance")


def signature(f):
    try:
        return re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(inspect.signature(f)))
    except ValueError:  # made in C, as a warning's is
        return "(...)"


def lines_of(name, thing):
    """A line for a name; for a class one more for each public member that the package gives it."""
    if not inspect.isclass(thing):
        return [name + signature(thing) if callable(thing) else f"{name}: {type(thing).__name__}"]
    base = next(c.__name__ for c in thing.__mro__[1:] if c.__name__[0] != "_")
    found = {"": f"{name}: class, a {base}"}
    if issubclass(thing, enum.Enum):
        found |= {member.name: f"{name}.{member.name} = {int(member)}" for member in thing}
    else:
        found["()"] = name + signature(thing)
    if dataclasses.is_dataclass(thing):
        frozen = "frozen " * thing.__dataclass_params__.frozen
        fields = dataclasses.fields(thing)
        found |= {f.name: f"{name}.{f.name}: {frozen}field {f.type}" for f in fields}
    for cls in thing.__mro__:
        own = vars(cls) if cls.__module__.startswith("fpi_cuda") else {}
        for key in sorted(k for k in own if k[0] != "_" and k not in found):
            value = getattr(thing, key)
            if isinstance(value, property):
                found[key] = f"{name}.{key}: property {signature(value.fget)}"
            else:
                found[key] = f"{name}.{key}" + (signature(value) if callable(value) else "")
    return list(found.values())


def snapshot():
    found = []
    for module in (fpi_cuda, backends, compat, contraction, operators):
        prefix = module.__name__.partition(".")[2]
        for name in sorted(module.__all__):
            found += lines_of(f"{prefix}.{name}".lstrip("."), getattr(module, name))
    return found


def test_no_public_signature_changes_unnoticed():
    then, now = SNAPSHOT.read_text().splitlines(), snapshot()
    gone = "".join(f"\n  - {line}" for line in then if line not in now)
    new = "".join(f"\n  + {line}" for line in now if line not in then)
    assert not gone, (
        f"public lines changed or went:{gone}{new}\nA line that changes or goes needs an entry in "
        "CHANGELOG.md and, for a release, a forwarding name or argument that warns with "
        "DeprecationWarning. Then refresh tests/signatures.txt:\n"
        "  PYTHONPATH=. python tests/test_signatures.py > tests/signatures.txt"
    )
    assert not new, f"new public lines, not in tests/signatures.txt yet (see its test's top):{new}"


@pytest.mark.parametrize("path", PATHS)
def test_an_import_path_goes_on_working(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(path)
        names = PATHS[path]
        found = {name: getattr(module, name) for name in names}
    public = {name: getattr(fpi_cuda, name) for name in names if name in fpi_cuda.__all__}
    assert found | public == found  # the very objects


def test_a_changed_line_is_seen(monkeypatch):
    now = snapshot()
    monkeypatch.delattr(record.Account, "converged")
    monkeypatch.setattr(operators, "partial", lambda r, *s: None)
    assert set(now) - set(snapshot()) == {
        "Solution.converged: property (self) -> 'Tensor'",
        next(line for line in now if line.startswith("operators.partial(")),
    }


if __name__ == "__main__":
    print(*snapshot(), sep="\n")
