"""Checks an installed CUDA build on a machine without a device; `make cuda-link-check` runs it."""

import torch

import fpi_cuda
import fpi_cuda.backends

info = fpi_cuda.build_info()
print(f"package: {fpi_cuda.__file__}")
for key, value in info.items():
    print(f"{key}: {value}")
assert info["cuda_built"], "CUDA was not built"
assert info["cuda_loaded"], info["cuda_missing"]

operators = [
    name
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    if name.startswith("fpi_cuda::")
]
kernels = {name: torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in operators}
print(f"CUDA kernels: {kernels}")
assert all(kernels.values()), "operators without a CUDA kernel"
assert "cuda" in fpi_cuda.backends.available()["native"]
assert fpi_cuda._build.cuda.WhileGraph
print(f"device available: {torch.cuda.is_available()}")
