"""The harness where a device is concerned: which one it takes, and that the suites measure."""

import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import fpi_cuda
from benchmarks import __main__ as command
from benchmarks import devices, methods, problems, records, suites
from benchmarks.methods import plain
from benchmarks.suites import cell as cells
from benchmarks.suites import convolutions, dense, kernels, overhead, whole
from fpi_cuda.backends import native

# --- which device ---------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine with CUDA devices of that capability; count 0: none."""

    def make(count=1, capability=(9, 0), loaded=True, version="13.0", built="90"):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        info = {"cuda_loaded": loaded, "cuda_missing": None if loaded else "it was not built"}
        monkeypatch.setattr(fpi_cuda, "build_info", lambda: info)
        monkeypatch.setattr(native._build, "build_info", lambda: {"cuda_archs": [built]})
        monkeypatch.setattr(native, "devices", lambda: ("cpu", "cuda"))
        native._too_old.cache_clear()

    yield make
    native._too_old.cache_clear()


@pytest.mark.parametrize(
    "there,device,says",
    [
        ({}, "cuda", "Some GPU"),
        ({"count": 0}, "cpu", "torch sees no CUDA device"),
        ({"count": 0, "version": None}, "cpu", "has no CUDA; install a torch that has"),
        ({"capability": (7, 5)}, "cpu", "too old: compute capability 7.5, and this build needs 8"),
        ({"loaded": False}, "cpu", "CUDA part of fpi_cuda is not there: it was not built"),
        ({"capability": (8, 0)}, "cpu", "kernels are for compute capability 90, and the device"),
    ],
)
def test_the_default_is_a_cuda_device_where_one_is_usable(there, device, says, machine):
    machine(**there)
    found, line = devices.resolve("auto")
    assert found == device
    assert line.startswith(f"device: {device}") and says in line and "\n" not in line


@pytest.mark.parametrize(
    "wanted,there,says",
    [
        ("cuda", {"count": 0}, "torch sees no CUDA device; see what nvidia-smi says"),
        ("cuda:1", {}, "there is 1, numbered from 0"),
        ("cuda", {"capability": (7, 5)}, "of compute capability 8.0 or more: Some GPU is too old"),
        ("mps", {}, "must be auto, cpu, cuda or cuda:N (got 'mps')"),
        ("gpu", {}, "must be auto, cpu, cuda or cuda:N (got 'gpu')"),
    ],
)
def test_a_device_that_cannot_be_had_is_an_error(wanted, there, says, machine, capsys):
    machine(**there)
    with pytest.raises(SystemExit) as stopped:
        command.main(["solve", "--device", wanted])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_a_device_without_the_native_library_may_be_named(machine):
    machine(loaded=False)
    assert devices.resolve("cuda")[0] == "cuda"


# --- a run ----------------------------------------------------------------------------------


def test_the_run_says_its_device_and_that_a_rehearsal_says_nothing(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(devices, "resolve", lambda wanted: ("cpu", f"device: cpu ({wanted})"))
    cell = suites.Cell("a cell", lambda: seen.append(torch.backends.cudnn.allow_tf32) or [])
    monkeypatch.setitem(suites.SUITES, "scale", lambda options: [cell] if options.tiny else [])
    file = tmp_path / "out.json"
    monkeypatch.setattr(devices, "DEFAULT", "auto")
    assert command.main(["scale", "--tiny", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "device: cpu (auto)" in printed and "says nothing of speed" in printed
    assert "says nothing of speed" in json.loads(file.read_text())["facts"]["tiny"]
    assert seen == [False], "a rival's convolutions are not rounded to tf32"


def test_another_packages_warning_does_not_end_a_measurement(monkeypatch, tmp_path):
    def warn():
        warnings.warn("of some package's version", FutureWarning, stacklevel=2)
        return [{"suite": "scale", "method": "Picard", "what": "loss", "difference": 0.0}]

    monkeypatch.setitem(suites.SUITES, "scale", lambda options: [suites.Cell("warns", warn)])
    file = tmp_path / "out.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert command.main(["scale", "--device", "cpu", "--json", str(file)]) == 0
    assert len(records.load(file)[1]) == 1


@pytest.mark.parametrize("suite", ["whole", "kernels", "memory", "scaling", "solve", "import"])
def test_tiny_leaves_few_and_small_cells(suite):
    options = suites.Options(device="cuda", tiny=True)
    names = [cell.name for cell in suites.SUITES[suite](options)]
    full = [cell.name for cell in suites.SUITES[suite](suites.Options(device="cuda"))]
    assert 0 < len(names) < len(full) or len(full) <= 2
    assert not any("4096" in name or "16384" in name for name in names)


def test_convolutions_are_a_suite_of_their_own():
    options = suites.Options(device="cuda")
    assert all(c.name.startswith("convolutions/") for c in suites.SUITES["convolutions"](options))
    assert not any("convolutions" in c.name for c in suites.SUITES["kernels"](options))
    assert not list(suites.SUITES["convolutions"](suites.Options()))


# --- the loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 1024])
@torch.no_grad()
def test_every_row_goes_through_all_iterations_of_the_loop_suite(size):
    tensors = overhead.damped(16, size, "cpu")
    options = suites.Options(families=("ours",) if size > 64 else None)
    for count in (overhead.FEW, overhead.MANY):
        for name, run in overhead.fixed_count(options, count, ("eager",)).items():
            overhead.check_count(run, tensors, count, name)


def test_a_loop_that_ends_early_is_an_error(monkeypatch):
    def halve(x, u, *_):
        return torch.add(u, x, alpha=0.5)

    monkeypatch.setattr(overhead, "damp", halve)
    tensors = overhead.damped(8, 64, "cpu")
    runs = overhead.fixed_count(suites.Options(), overhead.MANY, ("eager",))
    for name in ("ours Picard, eager", "ours Anderson, eager"):
        with pytest.raises(RuntimeError, match="iterations, not 120"):
            overhead.check_count(runs[name], tensors, overhead.MANY, name)


@pytest.mark.parametrize("name", list(methods.SOLVERS))
def test_the_bare_loop_is_timed_on_active_rows_in_every_launch(name):
    bare = overhead.Bare(methods.SOLVERS[name], *overhead.damped(8, 256, "cpu"))
    for _ in range(15):  # together far beyond where rows freeze
        bare.restart()
        for _ in range(overhead.MANY):
            bare()
        bare.check(overhead.MANY)
    bare()
    with pytest.raises(RuntimeError, match="must be active"):
        bare.check(overhead.MANY)


# --- kernels --------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [False, True])
def test_the_copy_goes_through_as_much_memory_as_the_step(cuda, monkeypatch):
    touched, copied = {}, []

    def storages(method, *tensors):
        found = touched.setdefault(method, {})
        found.update({t.untyped_storage().data_ptr(): t.nbytes for t in tensors})

    def anderson(progress, x, gx, beta, ridge, restart, values, residuals, gram):
        storages("Anderson step", x, gx, values, residuals)
        progress.tally[0] = len(x)

    def picard(progress, x, gx, beta):
        storages("Picard step", x, gx)
        progress.tally[0] = len(x)

    real = kernels.interleave

    def interleave(calls, **more):
        source, target = (calls["copy"].__closure__[i].cell_contents for i in (1, 2))
        copied.append(source.nbytes + target.nbytes)
        return real(calls, **more | {"device": "cpu", "budget": 0.0, "rounds": (1, 1)})

    stub = SimpleNamespace(anderson_step=anderson, picard_step=picard)
    monkeypatch.setattr(kernels, "native", stub)
    monkeypatch.setattr(kernels, "interleave", interleave)
    monkeypatch.setattr(suites.Options, "is_cuda", cuda)
    rows = kernels.kernels_at(suites.Options(), 16, 64, "float32")
    m = methods.HISTORY
    state = 16 * 64 * 4
    for row, size, vectors in zip(rows, copied, (3 * m + 2, m + 2), strict=True):
        assert sum(touched[row["method"]].values()) == vectors * state
        assert size == row["working_set"] == vectors * state


# --- whole solves ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["easy", "hard"])
def test_the_loop_that_is_captured_by_hand_solves_in_blocks(kind, monkeypatch):
    launches = []

    def captured(block, device):
        return lambda: launches.append(block()) or None

    monkeypatch.setattr(plain, "captured", captured)
    plain.forget()
    problem = problems.make(kind, 16, 64, instances=2)
    runner = methods.Solver(problem, plain.plain(plain.picard_captured))
    reference = methods.Solver(problem, plain.plain(plain.picard))
    for i in range(2):
        torch.testing.assert_close(runner.forward(i), reference.forward(i), rtol=1e-3, atol=1e-3)
    assert len(plain.blocks) == 1, "the second input of a problem is copied into the first's"
    evaluations, _ = runner.count()
    assert evaluations == plain.AT_ONCE * -(-reference.count()[0] // plain.AT_ONCE)
    launches.clear()
    runner.forward(0)
    assert len(launches) == evaluations // plain.AT_ONCE
    plain.forget()
    assert not plain.blocks


def test_the_whole_suite_gives_both_sides_the_same_switches(monkeypatch):
    seen = []

    def contest(suite, problem, entries, options, **more):
        now = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        seen.append((more["dtype"], *now, problem.dtype, problem.rule.rtol))
        assert {methods.GRAPHED, methods.CAPTURED, *methods.WHOLE} <= {m.name for m in entries}
        return []

    monkeypatch.setattr(whole, "contest", contest)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for cell in whole.cells(suites.Options(device="cpu", sizes=((4, 64),))):
        cell.run()
    whole.rows(suites.Options(), "hard", (4, 64), "tf32")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert seen == [
        ("float32", "highest", False, torch.float32, 1e-4),
        ("bfloat16", "highest", False, torch.bfloat16, 3e-2),
        ("tf32", "high", True, torch.float32, 5e-3),
    ]
    names = [c.name for c in whole.cells(suites.Options(device="cuda"))]
    assert len(names) == 9 and "whole/hard-4096x256-tf32" in names


def test_the_library_takes_tf32_by_the_switch_that_the_suites_set():
    matmul = torch.backends.cuda.matmul
    with cells.precision("tf32"):
        assert matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "tf32"
        assert matmul.allow_tf32, "both kinds of switch agree: torch's compiler reads the older"
    with cells.precision("float32"):
        assert "tf32" not in (matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
        assert not matmul.allow_tf32


@pytest.mark.parametrize("a_wave", [1, 2, 4])
def test_resident_slots_are_the_fewest_at_the_best_rate(a_wave, monkeypatch):
    """Of a device whose multiprocessors hold that many blocks of 64 at a time."""
    properties = SimpleNamespace(multi_processor_count=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    def interleave(calls, **_):
        waves = {name: -(-int(name) // (640 * a_wave)) for name in calls}
        return {name: SimpleNamespace(median=float(count)) for name, count in waves.items()}

    monkeypatch.setattr(dense, "interleave", interleave)
    options = suites.Options(device="cuda")
    assert dense.resident_slots(options, lambda batch: batch) == 640 * a_wave


# --- convolutions ---------------------------------------------------------------------------


def case(batch=3, finished=0):
    step = fpi_cuda.ConvStep(4, 1, hidden=(8,))
    z, x = (
        torch.randn(batch, c, 6, 6).contiguous(memory_format=torch.channels_last) for c in (1, 4)
    )
    return convolutions.Case(step, x, z, finished, count=3)


@pytest.fixture
def uncaptured(monkeypatch):
    monkeypatch.setattr(convolutions, "captured", lambda call, device: call)


@torch.no_grad()
def test_both_rivals_iterate_the_same_map_as_the_library(uncaptured):
    given = case(finished=1)
    calls = convolutions.cudnn(given, "eager")
    x, z = given.x[1:], given.z[1:]
    for _ in range(given.count):
        x = given.step(x, z)
    assert set(calls) == {
        n + m for n in convolutions.RIVALS for m in ("", convolutions.FROM_PYTHON)
    }
    for call in calls.values():
        torch.testing.assert_close(call(), x, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_auto_does_is_seen_in_a_solve():
    """On the CPU: native steps, torch's convolutions and so no norms."""
    pytest.importorskip("triton")  # whose step is watched too
    assert convolutions.step_of_auto(case()) == (native, False)
    assert native.picard_step.__module__ == native.__name__, "the spy is gone"


@torch.no_grad()
def test_an_iteration_of_ours_is_autos_and_is_checked_on_the_whole_batch(uncaptured, monkeypatch):
    pytest.importorskip("triton")
    given = case(batch=10, finished=5)
    form = given.step.form(given.x, given.z)
    chain = Chain(form)
    monkeypatch.setitem(
        sys.modules,
        "fpi_cuda.backends.triton.conv",
        SimpleNamespace(active_samples=lambda status, into=None: (status, None)),
    )
    monkeypatch.setattr(
        fpi_cuda.backends.triton,
        "conv",
        sys.modules["fpi_cuda.backends.triton.conv"],
        raising=False,
    )
    progress = convolutions.Progress(
        given.x.flatten(1), convolutions.Limits(0.0, 0.0, 0.0, 10**6, 10**6)
    )
    calls = convolutions.ours(given, chain, progress)
    assert set(calls) == {"ours", "ours, kernels alone", "ours, launched from Python"}
    for call in calls.values():
        call()
    assert progress.tally.tolist()[:2] == [5, 0]
    assert convolutions.error_of(chain, form, given.x) < 1e-6
    assert convolutions.wrong(chain, given.x, 0.0, 1e-5, 3) is None
    chain.off[9] = 0.1  # the last of the batch alone
    error = convolutions.error_of(chain, form, given.x)
    assert error > 1e-3
    assert "off by" in convolutions.wrong(chain, given.x, error, 1e-5, 3)
    assert "off by" in convolutions.wrong(chain, given.x, float("nan"), 1e-5, 3)
    chain.flips = True
    assert "other bits in 3 of 3 runs" in convolutions.wrong(chain, given.x, 0.0, 1e-5, 3)


class Chain:
    """As backends.triton.conv's, by torch; may be wrong in a sample, or in other bits each time."""

    tiles = 1

    def __init__(self, form):
        self.form, self.off, self.flips = form, {}, False

    def __call__(self, x, out, index, count, norms=None):
        out.copy_(self.form(x))
        for sample, value in self.off.items():
            out[sample] += value
        if self.flips:
            self.off[0] = self.off.get(0, 0.0) + 1e-3
