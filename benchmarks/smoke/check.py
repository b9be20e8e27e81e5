"""What the parts share: how checks are run and told, and how results are compared."""

from __future__ import annotations

import contextlib
import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Error(NamedTuple):
    """How far a result is from float64's, and how far it may be."""

    what: str
    found: float
    allowed: float

    @property
    def share(self) -> float:
        """Of what is allowed; not finite where the result is not."""
        if self.allowed > 0:
            return self.found / self.allowed
        return math.inf if self.found else 0.0


# Checks return errors, or a line to be told as it is.
Told = Iterable[Error] | Error | str
Check = tuple[str, Callable[[], Told]]


@dataclass(frozen=True)
class Place:
    """Where a part runs."""

    device: str
    tiny: bool  # the least sizes that still take every way

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full


Part = Callable[[Place], Iterator[Check]]


class Skipped(Exception):
    """This part has nothing to check here."""


def require(holds: object, message: str) -> None:
    """An assertion that `python -O` keeps."""
    if not holds:
        raise AssertionError(message)


def run(name: str, part: Part, place: Place) -> int:
    """Run a part's checks, a line each.

    Returns:
        How many failed.
    """
    failed = 0
    try:
        for check, call in part(place):
            right = one(f"{name}/{check}", call, place)
            failed += not right
            if place.cuda and not right and (reason := lost()):
                say("FAIL", name, f"ends here: the CUDA context is lost: {reason}")
                return failed
    except Skipped as reason:
        say("skip", name, str(reason))
    except Exception as error:
        say("FAIL", f"{name}/setup", described(error))
        failed += 1
    return failed


def one(name: str, call: Callable[[], Told], place: Place) -> bool:
    try:
        if place.cuda:
            poison(place.device)
        with products_in("ieee"):  # cuDNN's convolutions would else be tf32's
            told = call()
            if not isinstance(told, (str, Error)):
                told = list(told)  # checks may be generators
        if place.cuda:
            torch.cuda.synchronize()  # so that a kernel's error is told of the check that ran it
    except Exception as error:
        say("FAIL", name, described(error))
        return False
    if isinstance(told, str):
        say("ok", name, told)
        return True
    errors = [told] if isinstance(told, Error) else told
    if not errors:
        say("FAIL", name, "nothing was compared")
        return False
    worst = max(errors, key=lambda e: e.share if e.share == e.share else math.inf)
    right = worst.found <= worst.allowed
    place_of = f"  ({worst.what})" if worst.what else ""
    say(
        "ok" if right else "FAIL", name, f"error {worst.found:.1e} of {worst.allowed:.0e}{place_of}"
    )
    return right


def say(verdict: str, name: str, text: str) -> None:
    print(f"{verdict:5} {name}  {text}", flush=True)


def described(error: BaseException) -> str:
    """Type, first line and place of an exception; the place in this repository if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if ROOT in Path(f.filename).resolve().parents]
    where = ""
    if frames:
        frame = (ours or frames)[-1]
        where = f"  at {Path(frame.filename).name}:{frame.lineno}"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}{where}"


def lost() -> str | None:
    """Why no later CUDA call can work, or None: an error that stays comes with every wait."""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return described(error)
    return None


def poison(device: str) -> None:
    """Leave NaN in the memory that torch's allocator gives next, so that reading it shows."""
    kept = [
        torch.full((size,), math.nan, device=device)
        for size, count in ((128, 64), (2**13, 16), (2**18, 4), (2**22, 2))
        for _ in range(count)
    ]
    del kept


# --- comparing ----------------------------------------------------------------------------------


def norm_error(
    found: Tensor, exact: Tensor, rows: bool = False, beside: Tensor | None = None
) -> float:
    """‖found − exact‖/‖exact‖, of the whole or of the worst row; NaN and wrong shapes are ∞.

    NaN agrees with NaN, where a check leaves some on purpose. `beside`, shaped likewise, counts in
    the divisor too: the terms of a sum that may cancel.
    """
    a, e = found.detach().double().cpu(), exact.detach().double().cpu()
    if a.shape != e.shape or not torch.equal(a.isfinite(), e.isfinite()):
        return math.inf
    if not a.numel():
        return 0.0
    shape = (len(a), -1) if rows else (1, -1)
    a, e = (t.nan_to_num(0.0, 0.0, 0.0).reshape(shape) for t in (a, e))
    size = e.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    if beside is not None:
        size = size.maximum(beside.detach().double().cpu().reshape(shape).norm(dim=1))
    return float(((a - e).norm(dim=1) / size).amax())


def compare(
    what: str,
    found: Tensor,
    exact: Tensor,
    allowed: float,
    rows: bool = False,
    beside: Tensor | None = None,
) -> Error:
    return Error(what, norm_error(found, exact, rows, beside), allowed)


def same(what: str, found: Tensor, expected: Tensor) -> Error:
    """Bit for bit, NaN included: the number of values that differ, of none."""
    a, e = found.detach().cpu(), expected.detach().cpu()
    if a.shape != e.shape:
        return Error(what, math.inf, 0.0)
    return Error(what, float(((a != e) & ~(a.isnan() & e.isnan())).sum()), 0.0)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def contraction(seed: int, rows: int, columns: int, rate: float) -> Tensor:
    """A float64 matrix of this spectral norm."""
    a = normal(seed, rows, columns)
    return a * (rate / torch.linalg.matrix_norm(a, 2))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def quietly(call: Callable[[], Any]) -> Any:
    """Without the library's warnings, which are expected here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Torch set to take float32's products and convolutions in "ieee" or "tf32"."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = precision
        yield
    finally:
        for switch, own in zip(switches, before, strict=True):
            switch.fp32_precision = own
