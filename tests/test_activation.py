"""csrc/math/activation.h in ulps of the exact value, and its vectors against its scalars."""

from __future__ import annotations

import ctypes
import decimal
import functools
import math
import os
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

COMPILER = os.environ.get("CXX", "c++")
SOURCE = Path(__file__).with_name("activation.cpp")
FLAGS = ["-std=c++20", "-O2", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
ISAS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")] + ["-mfma", "-mf16c"],
}
RUNNABLE = {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512"]}  # by torch's name of a machine
NAMES = ["identity", "tanh", "relu", "sigmoid", "softplus", "gelu"]
TYPES = [np.float32, np.float64]
ULPS = 4
LANES = 16  # a multiple of every vector's


@pytest.fixture(scope="module", params=ISAS)
def library(request, tmp_path_factory):
    machine = torch.backends.cpu.get_cpu_capability()
    if request.param not in ("plain", *RUNNABLE.get(machine, ())):
        pytest.skip(f"no {request.param} on this machine: torch calls it {machine}")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler {COMPILER}")
    path = tmp_path_factory.mktemp("activation") / f"{request.param}.so"
    command = [COMPILER, *FLAGS, *WARNINGS, *ISAS[request.param]]
    subprocess.run([*command, str(SOURCE), "-o", str(path)], check=True, timeout=120)
    return ctypes.CDLL(str(path))


def run(library, name, x, form="vector"):
    c_type = {np.float32: "float", np.float64: "double"}[x.dtype.type]
    padded = np.concatenate([x, np.zeros(-len(x) % LANES, x.dtype)])
    y = np.full_like(padded, math.nan)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (padded, y)]
    getattr(library, f"{name}_{c_type}_{form}")(*pointers, ctypes.c_int64(len(padded)))
    return y[: len(x)]


@functools.cache
def points(dtype):
    """Every exponent, both signs; densely where something happens; and random ones."""
    info = np.finfo(dtype)
    bits = np.uint32 if dtype == np.float32 else np.uint64
    last = info.max.view(bits)
    grid = np.linspace(0, int(last), 150_000).astype(bits)  # so many steps in each octave
    grid = np.minimum(grid, last).view(dtype)
    generator = np.random.default_rng(0)
    count = 500_000 if dtype == np.float32 else 100_000
    octaves = 2.0 ** generator.uniform(-12, 8, count // 2)
    linear = np.concatenate([generator.uniform(0, high, count // 4) for high in (2, 20)])
    x = np.concatenate([grid, octaves.astype(dtype), linear.astype(dtype)])
    return np.concatenate([x, -x])


def exact(name, x):
    """More precise than x's type, where the machine has such a one; gelu only for float32."""
    if name == "gelu":
        t = torch.from_numpy(x.astype(np.float64))
        y = 0.5 * t * torch.special.erfc(t * -math.sqrt(0.5))
        return torch.where(t > -50, y, 0.0).numpy()  # not −inf · 0
    x = x.astype(np.longdouble)
    e = np.exp(-abs(x))
    formulas = {
        "identity": lambda: x,
        "tanh": lambda: np.tanh(x),
        "relu": lambda: np.maximum(x, 0),
        "sigmoid": lambda: np.where(x < 0, e, 1) / (1 + e),
        "softplus": lambda: np.maximum(x, 0) + np.log1p(e),
    }
    return formulas[name]()


def arccot(n):
    """By its series, to decimal's precision."""
    total, power, k = Decimal(0), 1 / Decimal(n), 1
    while total + power / k != total:
        total, power, k = total + power / k, -power / (n * n), k + 2
    return total


def exact_gelu(xs):
    """As decimals: Φ(−a) = 1/2 − φ(a) Σ a^(2k + 1) / (2k + 1)!!, which cancels in the tail."""
    with decimal.localcontext(prec=400):
        root = (8 * (4 * arccot(5) - arccot(239))).sqrt()  # √(2π)
        for x in map(Decimal, xs.tolist()):
            a, square = abs(x), x * x
            total, term, k = Decimal(0), a, 1
            while total + term != total:
                total, k = total + term, k + 2
                term *= square / k
            tail = Decimal("0.5") - (-square / 2).exp() / root * total
            yield x * (tail if x < 0 else 1 - tail)


def worst_ulps(error, expected, x, what):
    """Of results with this error. One below the smallest normal number may be flushed."""
    tiny = np.finfo(x.dtype).tiny
    normal = abs(expected) >= tiny
    assert (error[~normal] <= tiny).all()
    ulps = np.where(normal, error / np.spacing(abs(expected.astype(x.dtype))), 0)
    worst = int(np.argmax(ulps))
    print(f"{what}: {float(ulps[worst]):.3f} ulp at {x[worst]!r}")
    return ulps[worst]


@functools.cache
def gelu_points():
    x = np.concatenate([np.linspace(-37.4, 9, 300), -np.logspace(-300, 1, 100)])
    return x, list(exact_gelu(x))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", NAMES)
@np.errstate(all="ignore")
def test_close_to_exact_and_vectors_are_scalars(library, name, dtype):
    x = points(dtype)
    y = run(library, name, x)
    bits = np.uint32 if dtype == np.float32 else np.uint64
    assert (y.view(bits) == run(library, name, x, "scalar").view(bits)).all()
    if name == "gelu" and dtype == np.float64:
        x, decimals = gelu_points()
        expected = np.array([float(e) for e in decimals])
        y = run(library, name, x).tolist()
        error = np.array([float(abs(Decimal(a) - e)) for a, e in zip(y, decimals, strict=True)])
    else:
        expected = exact(name, x)
        error = abs(y - expected)
    assert worst_ulps(error, expected, x, f"{name} {dtype.__name__}") <= ULPS


@pytest.mark.parametrize("dtype", TYPES)
def test_special_values(library, dtype):
    inf = math.inf
    x = np.array([0.0, -0.0, inf, -inf, math.nan], dtype)
    half, log2 = dtype(0.5), dtype(math.log(2))
    expected = {
        "identity": x,
        "tanh": [0.0, -0.0, 1.0, -1.0, math.nan],
        "relu": [0.0, -0.0, inf, 0.0, math.nan],
        "sigmoid": [half, half, 1.0, 0.0, math.nan],
        "softplus": [log2, log2, inf, 0.0, math.nan],
        "gelu": [0.0, -0.0, inf, 0.0, math.nan],
    }
    for name in NAMES:
        y = run(library, name, x)
        np.testing.assert_allclose(y, np.array(expected[name], dtype), rtol=2e-7)
        if name in ("identity", "tanh", "gelu"):
            np.testing.assert_array_equal(np.signbit(y[:2]), [False, True])


@pytest.mark.parametrize("dtype", TYPES)
def test_tanh_saturates(library, dtype):
    x = np.linspace(8.5, 20, 200_000).astype(dtype)
    y = run(library, "tanh", np.concatenate([x, -x])).reshape(2, -1)
    assert (abs(y) <= 1).all()
    assert (y[:, x >= (9.1 if dtype == np.float32 else 19.1)] == [[1], [-1]]).all()


def test_the_float64_reference_of_gelu():
    x = np.linspace(-14, 3, 100)
    for reference, value in zip(exact("gelu", x).tolist(), exact_gelu(x), strict=True):
        assert float(abs(Decimal(reference) / value - 1)) < 1e-12
