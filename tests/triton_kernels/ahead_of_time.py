"""Triton kernels compiled for a device that is not there, and what the compiler says of them.

The interpreter replaces the kernels of a process, so compiling happens in processes of its own:

    # kernels_of_mine.py, or the test file itself
    def jobs():
        yield "scale float32", partial(compile_kernel, scale, {"x": "*fp32", "n": "i32"}, ...)

    # in the test
    facts = in_own_processes(Path(__file__))

A job returns the `Facts` of one or more kernels. Run as a program, `ahead_of_time.py FILE PART OF`
does every OF-th of FILE's jobs and prints what they return, one JSON list a line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Of a block, in bytes: what each architecture lets a kernel ask for.
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}

# Of a multiprocessor: registers, and bytes of shared memory, of which each block costs 1 KiB more
# than it asks for.
REGISTERS = 65536
SHARED = {80: 164 * 1024, 90: 228 * 1024}
RESERVED = 1024

USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a kernel takes: bytes of a block's shared memory; of a thread, registers and stack.

    ptxas spills to the stack, and these kernels have nothing else there: it must be 0.
    """

    job: str
    kernel: str
    arch: int
    warps: int
    shared: int
    registers: int
    stack: int
    planned: int = 1  # blocks of a multiprocessor that the host counts on

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor has room for; a warp's registers come in pieces of 256."""
        thread = -(-self.registers // 8) * 8
        return min(
            REGISTERS // (thread * 32 * self.warps), SHARED[self.arch] // (self.shared + RESERVED)
        )


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    arch: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: tuple[str, ...] | None = None,
) -> list[Facts]:
    """Compile a `triton.jit` function; no device or driver is asked for anything.

    Args:
        fn: the kernel, decorated in a process without TRITON_INTERPRET.
        signature: the type of each argument by name: "*fp32", "*bf16", "*i64", "i32", "fp64".
            Those in `constexprs` may be left out.
        constexprs: compile-time arguments by name; also pointers given as None.
        arch: 80 or 90, for sm_80 and sm_90a.
        num_warps: as the launch would give it.
        num_stages: likewise.
        aligned: arguments that a launch would find divisible by 16; None: all pointers, as tensors
            of their own are, but not those that the kernel says not to specialise.

    Returns:
        One `Facts`, in a list, as a job returns them.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    constexprs = dict(constexprs or {})
    given = {p.name: signature.get(p.name, "constexpr") for p in fn.params}
    given.update(dict.fromkeys(constexprs, "constexpr"))
    if aligned is None:
        aligned = tuple(
            p.name
            for p in fn.params
            if given[p.name].startswith("*")
            and not (p.do_not_specialize or p.do_not_specialize_on_alignment)
        )
    source = triton.compiler.ASTSource(
        fn=fn,
        signature=given,
        constexprs=constexprs,
        attrs={(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    with _stand_in_driver(arch):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
    return [facts_of(compiled)]


@contextlib.contextmanager
def compiled_launches(arch: int) -> Iterator[list[Facts]]:
    """Kernel launches in this context compile what they would launch, and launch nothing.

    So the real host code says what is compiled: the signatures, specialisations and options are
    those of a launch with these (CPU) tensors. The list has one entry a launch; launches of one
    compilation share theirs, so `len(set(map(id, launches)))` counts compilations.
    """
    from triton.runtime.jit import JITFunction

    launches: list[Facts] = []
    known: dict[int, Facts] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(compiled) not in known:
            known[id(compiled)] = facts_of(compiled)
        launches.append(known[id(compiled)])
        return compiled

    with _stand_in_driver(arch):
        JITFunction.run = compile_only
        try:
            yield launches
        finally:
            JITFunction.run = run


def facts_of(compiled: Any) -> Facts:
    """Read from the compiled kernel itself, by the cuobjdump that comes with triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = map(int, USAGE.search(told).groups())
    return Facts(
        job="",
        kernel=compiled.name,
        arch=compiled.metadata.target.arch,
        warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        registers=registers,
        stack=stack + local,
    )


@contextlib.contextmanager
def _stand_in_driver(arch: int) -> Iterator[None]:
    """What triton asks of a driver before a launch, answered for a device of this architecture."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class StandIn:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return arch  # of which each kernel keeps what it compiled apart

        def get_current_stream(self, device: int) -> int:
            return 0

    before = driver._active
    driver.set_active(StandIn())
    try:
        yield
    finally:
        driver._active = before


def in_own_processes(file: Path, workers: int = 2) -> list[Facts]:
    """Do the jobs of a Python file, `jobs() -> Iterator[(name, callable)]`, in fresh processes.

    Raises:
        AssertionError: a process failed; says what it printed.
    """
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TRITON_CACHE_DIR": cache}
        env.pop("TRITON_INTERPRET", None)
        running = [
            subprocess.Popen(
                [sys.executable, __file__, str(file), str(part), str(workers)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for part in range(workers)
        ]
        told = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, told, strict=True):
        assert process.returncode == 0, errors[-4000:]
    lines = (line for out, _ in told for line in out.splitlines() if line.startswith("["))
    return [Facts(**facts) for line in lines for facts in json.loads(line)]


def main(file: str, part: str, of: str) -> None:
    """Every of-th job of the file, from this part on."""
    sys.modules["ahead_of_time"] = sys.modules[__name__]
    spec = importlib.util.spec_from_file_location("file_of_jobs", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, job in list(module.jobs())[int(part) :: int(of)]:
        print(json.dumps([dataclasses.asdict(f) | {"job": name} for f in job()]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
