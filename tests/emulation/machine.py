"""The emulation as a backend: `reference`'s step operators, done by the bodies of CUDA kernels."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fpi_cuda.record import Progress

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "emulation"
FORWARD, REVERSE, RANDOM = range(3)


class EmulationError(AssertionError):
    """What the emulation, AddressSanitizer or UBSan said."""


@cache
def executable(name: str) -> Path:
    """`sanitized` or `races`, brought up to date."""
    import cmake
    import ninja

    path = os.pathsep.join([cmake.CMAKE_BIN_DIR, ninja.BIN_DIR, os.environ["PATH"]])
    include = Path(torch.__file__).parent / "include"
    for arguments in (
        ["-S", HERE, "-B", BUILD, "-G", "Ninja", f"-DTORCH_INCLUDE={include}"],
        ["--build", BUILD],
    ):
        done = subprocess.run(
            ["cmake", *arguments],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / name


def limits_of(p: Progress) -> dict[str, float]:
    """The limits of a solve by their names, and how many columns its samples' bounds have."""
    names = ("rtol", "offset", "rounding", "patience", "max_iterations")
    columns = 1 if p.own is None else 1 + p.own.shape[1]
    return dict(zip(names, p.limits.values, strict=True)) | {"bound_columns": columns}


class Machine:
    """A process that runs bodies, with the operators of a backend; starts again after a failure.

    Args:
        build: `sanitized` or `races`.
        order: in which threads and blocks run.
        seed: of the random order.
        alive: blocks whose threads are interleaved.
    """

    NAME = "emulation"

    def __init__(self, build: str, order: int = FORWARD, seed: int = 0, alive: int = 4) -> None:
        self.build, self.order, self.seed, self.alive = build, order, seed, alive
        self.deleted: list[int] = []
        self.reached: dict[int, str] = {}  # calls of barriers and fences, with their kinds
        self.process: subprocess.Popen | None = None

    def call(self, operator: str, arrays: dict[str, Tensor | None], **numbers: float) -> None:
        """Runs the operator; arrays are written in place. A view's offset is the kernel's too."""
        given = {name: t for name, t in arrays.items() if t is not None}
        assert all(t.is_contiguous() for t in given.values())
        words = [operator, self.order, self.seed, self.alive, len(self.deleted), *self.deleted]
        words += [len(numbers), *(w for item in numbers.items() for w in item), len(given)]
        for name, t in given.items():
            size = t.element_size()
            words += [name, t.numel() * size, t.storage_offset() * size % 16]
        line = " ".join(map(str, words))
        try:
            self._exchange(line, list(given.values()))
        except (BrokenPipeError, EOFError):
            raise EmulationError(self.close()) from None

    def _exchange(self, line: str, tensors: list[Tensor]) -> None:
        if self.process is None:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                [executable(self.build)], stdin=pipe, stdout=pipe, stderr=self.errors
            )
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(line.encode() + b"\n")
        for t in tensors:
            stdin.write(ctypes.string_at(t.data_ptr(), t.numel() * t.element_size()))
        stdin.flush()
        answer = stdout.readline().decode().rstrip("\n").split("\t")
        if answer[0] != "done":
            raise EOFError
        self.reached.update((int(w.split()[-1]), w.rsplit(" ", 1)[0]) for w in answer[1:])
        for t in tensors:
            data = stdout.read(t.numel() * t.element_size())
            ctypes.memmove(t.data_ptr(), data, len(data))

    def picard_step(
        self, p: Progress, x: Tensor, gx: Tensor, beta: float, trail: Tensor | None = None
    ) -> None:
        self._step("picard_step", p, x, gx, {"trail": trail}, beta=beta)

    def anderson_step(
        self,
        p: Progress,
        x: Tensor,
        gx: Tensor,
        beta: float,
        ridge: float,
        restart: float,
        values: Tensor,
        residuals: Tensor,
        gram: Tensor,
        every: int = 1,
        starts_plain: bool = False,
    ) -> None:
        window = {"values": values, "residuals": residuals, "gram": gram}
        numbers = {"beta": beta, "ridge": ridge, "restart": restart, "every": every}
        numbers["starts_plain"] = int(starts_plain)
        self._step("anderson_step", p, x, gx, window, **numbers, m=values.shape[1])

    def bicgstab_step(
        self, p: Progress, x: Tensor, gx: Tensor, base: Tensor, vectors: Tensor, numbers: Tensor
    ) -> None:
        memory = {"base": base, "vectors": vectors, "numbers": numbers}
        self._step("bicgstab_step", p, x, gx, memory, beta=1.0)

    def _step(
        self,
        name: str,
        p: Progress,
        x: Tensor,
        gx: Tensor,
        more: dict[str, Tensor | None],
        **numbers: float,
    ) -> None:
        record = {"counters": p.counters, "scalars": p.scalars, "tally": p.tally}
        given = {"index": p.index, "bounds": p.bounds}
        arrays = {"x": x, "gx": gx, "out": p.out, **record, **given}
        rows, n = x.shape
        numbers |= {"rows": rows, "n": n} | limits_of(p)
        self.call(f"{name}.{str(x.dtype).removeprefix('torch.')}", arrays | more, **numbers)

    def close(self) -> str:
        """Ends the process and returns what it said of errors."""
        if self.process is None:
            return ""
        process, self.process = self.process, None
        with self.errors, process.stdout, contextlib.suppress(BrokenPipeError):
            process.stdin.close()
            process.wait()
            self.errors.seek(0)
            return self.errors.read().decode()


def places(build: str, codes: list[int]) -> dict[str, list[int]]:
    """The calls by the chain of source lines that led to them, callees first."""
    command = ["addr2line", "-i", "-a", "-e", executable(build)]
    done = subprocess.run(
        [*command, *(hex(c - 1) for c in codes)], capture_output=True, text=True, check=True
    )
    chains: dict[str, list[int]] = {}
    for code, part in zip(codes, re.split(r"^0x.*\n", done.stdout, flags=re.M)[1:], strict=True):
        lines = (line.split()[0].rsplit(":", 1) for line in part.splitlines())
        chain = " < ".join(_text(path, int(n)) for path, n in lines if "emulation.h" not in path)
        chains.setdefault(chain, []).append(code)
    return chains


def assert_each_is_needed(
    machine: Machine,
    scenarios: Iterable[Callable[[Machine], None]],
    redundant: Collection[str],
    at_least: int,
    concerns: Callable[[str], bool] = lambda chain: True,
) -> None:
    """Takes out each barrier, fence and wait in turn; those in `redundant` alone may be missing.

    Args:
        machine: of build `races`.
        scenarios: what must fail without it.
        redundant: parts of the chains of calls that lead to what nobody misses.
        at_least: so many must be missed.
        concerns: which chains are looked at.
    """
    comes_to: dict[int, list] = {}
    for scenario in scenarios:
        machine.reached.clear()
        scenario(machine)
        for code in machine.reached:
            comes_to.setdefault(code, []).append(scenario)
    caught, survived = {}, []
    for chain, codes in places(machine.build, list(comes_to)).items():
        if not concerns(chain):
            continue
        machine.deleted = codes
        try:
            for scenario in dict.fromkeys(s for code in codes for s in comes_to[code]):
                scenario(machine)
            survived.append(chain)
        except (EmulationError, AssertionError) as error:
            caught[chain] = str(error).splitlines()[0]
    for chain, error in caught.items():
        print(f"{chain}\n    {error}")
    print("survived:", *survived, sep="\n")
    assert len(caught) > at_least
    for part in redundant:
        assert any(part in chain for chain in survived), f"is needed: {part}"
    for chain in survived:
        assert any(part in chain for part in redundant), f"nobody misses: {chain}"
    for chain in caught:
        assert not any(part in chain for part in redundant), f"is needed: {chain}"


def _text(path: str, number: int) -> str:
    """The line itself, with how many of its like came before: an edit elsewhere changes nothing."""
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    text = lines[number - 1]
    which = f" #{lines[:number].count(text)}" if lines.count(text) > 1 else ""
    return f"{Path(path).name}: {text}{which}"
