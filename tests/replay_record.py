"""How replay.py names a case, runs it, and takes down what it found."""

import functools
import itertools
import re
import warnings
import zlib
from functools import partial as part
from pathlib import Path

import torch

import fpi_cuda as fpi

CASES = {}
FIELDS = "status iterations residual_norm contraction error_estimate error_bound evaluations path"


def grid(name, f, *axes, **options):
    """A case a point: labels make its name; of their values dicts are options, others arguments."""
    for labels in itertools.product(*axes):
        values = [a[v] if isinstance(a, dict) else v for a, v in zip(axes, labels, strict=True)]
        args = [v for v in values if not isinstance(v, dict)]
        given = [v for v in values if isinstance(v, dict)]
        full = "/".join([name, *(str(v).removeprefix("torch.") for v in labels)])
        assert full not in CASES, full
        CASES[full] = part(f, *args, **functools.reduce(dict.__or__, given, options))


def each(**option):
    """An axis: one option at several values."""
    ((name, values),) = option.items()
    return {f"{name}={v}"[:60]: {name: v} for v in values}


def account(record, x=None):
    """Everything that a solution says; its adjoint's record too."""
    out = {field: getattr(record, field) for field in FIELDS.split()} | {"x": x}
    return out | {"adjoint": record.adjoint and account(record.adjoint)}


def leaves_of(prefix, value):
    """(name, leaf) of nested findings; tensors as plain copies, objects' addresses left out."""
    if isinstance(value, torch.Tensor):
        form = f"stride {value.stride()}{', attached' * value.requires_grad}"
        return [(prefix, value.detach().clone()), (f"{prefix}.form", form)]
    if value is None or isinstance(value, (int, float)):
        return [(prefix, value)]
    if not isinstance(value, (dict, tuple, list)):
        tree = str(Path(fpi.__file__).parent.parent)
        return [(prefix, re.sub("0x[0-9a-f]{6,}", "0x", str(value).replace(tree, "")))]
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, v in pairs for leaf in leaves_of(f"{prefix}/{key}".lstrip("/"), v)]


def run(name, f):
    torch.manual_seed(zlib.crc32(name.encode()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = f()
        except Exception as e:
            found = {"error": f"{type(e).__qualname__}: {e}"}
            if isinstance(e, fpi.FixedPointError):
                found["solution"] = account(e.solution, e.solution.x)
    found["warnings"] = [
        f"{w.category.__name__} at {Path(w.filename).name}: {w.message}" for w in caught
    ]
    return dict(leaves_of("", found))
