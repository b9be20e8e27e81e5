"""Only fpi_cuda/_torch*.py use names that torch does not promise to keep."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import fpi_cuda

PACKAGE = Path(fpi_cuda.__file__).parent


def private(name):
    return name.startswith("_") and not name.endswith("__")


# What counts, beside every dotted name that starts at an import of torch and has a part with an
# underscore in front: attributes of torch's objects, also as strings ...
ATTRIBUTES = {
    name
    for owner in (torch.Tensor, torch.UntypedStorage, nn.Module(), nn.GRU(1, 1))
    for name in dir(owner)
    if private(name)
} | {"_orig_mod", "_torchdynamo_orig_callable", "__signature__"}
# ... and names without an underscore that may go all the same.
UNSTABLE = ("torch.jit", "torch.ops.aten")
STRINGS = ATTRIBUTES | {"FuncTorchDynamicLayerFrontMode"}


def dotted(node):
    """a.b.c as a string; "" where it is no plain chain of names."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def uses(source):
    """(line, name) of every use in a file's text."""
    tree = ast.parse(source)
    found, of_torch = set(), {}  # a name in the file -> what of torch it stands for

    def look(line, name):
        if any(map(private, name.split("."))) or name.startswith(UNSTABLE):
            found.add((line, name))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in (a for a in node.names if a.name.split(".")[0] == "torch"):
                look(node.lineno, alias.name)
                of_torch[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                look(node.lineno, whole)
                of_torch[alias.asname or alias.name] = whole
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = dotted(node).partition(".")
            if root in of_torch:
                look(node.lineno, f"{of_torch[root]}.{rest}")
            elif node.attr in ATTRIBUTES and root not in ("self", "cls"):  # a class's own names
                found.add((node.lineno, node.attr))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            path = node.value.split(".")
            a_path = path[0] == "torch" and any(map(private, path)) and " " not in node.value
            if node.value in STRINGS or a_path:
                found.add((node.lineno, node.value))
    parts = {(line, name.rpartition(".")[0]) for line, name in found}
    return sorted(found - parts)  # torch._C.f is one use, and torch._C in it none of its own


# Take the mark away when the last use has moved: this then fails as an unexpected success.
def test_private_names_stand_in_one_file():
    found = {
        str(path.relative_to(PACKAGE)): uses(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("_torch.py", "_torch_graphs.py")
    }
    wrong = [f"{file}:{line}: {name}" for file, some in found.items() for line, name in some]
    assert not wrong, "to be taken from fpi_cuda._torch:\n" + "\n".join(sorted(wrong))


@pytest.mark.parametrize(
    "text, name",
    [
        ("import torch\ntorch._C._functorch.get_unwrapped(x)", "torch._C._functorch.get_unwrapped"),
        ("import torch\ntorch._foreach_copy_(a, b)", "torch._foreach_copy_"),
        ("import torch\ntorch.jit.script(f)", "torch.jit.script"),
        ("import torch\ntorch.ops.aten.add.Tensor", "torch.ops.aten.add.Tensor"),
        ("import torch as t\nt._C.f()", "torch._C.f"),
        ("import torch.nn.modules.module as m\nm._global_f", "torch.nn.modules.module._global_f"),
        ("from torch.utils import _pytree", "torch.utils._pytree"),
        ("from torch._C import f", "torch._C.f"),
        (
            "from torch.autograd import forward_ad as f\nf._level",
            "torch.autograd.forward_ad._level",
        ),
        ("x._version", "_version"),
        ("m.untyped_storage()._cdata", "_cdata"),
        ("getattr(m, '_forward_hooks')", "_forward_hooks"),
        ("f.__signature__ = 3", "__signature__"),
        ("{'torch._ops'}", "torch._ops"),
        (
            "library.impl('f', f, 'FuncTorchDynamicLayerFrontMode')",
            "FuncTorchDynamicLayerFrontMode",
        ),
    ],
)
def test_a_use_is_seen(text, name):
    assert name in [found for _, found in uses(text)]


@pytest.mark.parametrize(
    "text",
    [
        "self._parameters",
        "import torch\ntorch.func.grad(f)",
        "from ._torch import version\nversion(x)",
        "problem._iterate(x)",
        '"torch.compile is what it says, _version too"',
        "say('torch.jit')",
    ],
)
def test_other_names_are_left_alone(text):
    assert uses(text) == []
