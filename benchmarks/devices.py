"""Which device a run is on, and why."""

from __future__ import annotations

import torch

DEFAULT = "auto"  # of --device
CAPABILITY = (8, 0)  # the least that CMakeLists.txt compiles kernels for


def refusal(device: str = "cuda") -> str | None:
    """Why nothing can run on that CUDA device here, or None."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return f"torch {torch.__version__} has no CUDA; install a torch that has"
        return "torch sees no CUDA device; see what nvidia-smi says"
    index, count = torch.device(device).index or 0, torch.cuda.device_count()
    if index >= count:
        return f"there {'is' if count == 1 else 'are'} {count}, numbered from 0"
    capability = torch.cuda.get_device_capability(index)
    if capability < CAPABILITY:
        has, least = (".".join(map(str, pair)) for pair in (capability, CAPABILITY))
        name = torch.cuda.get_device_name(index)
        return f"{name} is too old: compute capability {has}, and this build needs {least}"
    return None


def resolve(wanted: str) -> tuple[str, str]:
    """The device's name, and a line that says which it is and why.

    Args:
        wanted: cpu, cuda or cuda:N; auto: CUDA where torch and this build can use it, else the CPU.

    Raises:
        ValueError: it can't be had here; says what must hold.
    """
    if wanted == "cpu":
        return wanted, "device: cpu, as asked for"
    if wanted == "auto":
        import fpi_cuda  # not above: `refusal` is asked before there is a library, too
        from fpi_cuda.backends import native

        reason = refusal()
        built = fpi_cuda.build_info()
        if reason is None and not built["cuda_loaded"]:
            reason = f"the CUDA part of fpi_cuda is not there: {built['cuda_missing']}"
        if reason is None:
            reason = native.missing(torch.device("cuda", 0))
        if reason is not None:
            return "cpu", f"device: cpu, because {reason}"
        return "cuda", f"device: cuda, {torch.cuda.get_device_name(0)}; --device cpu for the CPU"
    try:
        known = torch.device(wanted).type == "cuda"
    except RuntimeError:
        known = False
    if not known:
        raise ValueError(f"must be auto, cpu, cuda or cuda:N (got {wanted!r})")
    reason = refusal(wanted)
    if reason is not None:
        raise ValueError(
            f"{wanted} must be a CUDA device that torch can use, of compute capability "
            f"{'.'.join(map(str, CAPABILITY))} or more: {reason}. Leave --device out to use the CPU"
        )
    return wanted, f"device: {wanted}, {torch.cuda.get_device_name(wanted)}, as asked for"
