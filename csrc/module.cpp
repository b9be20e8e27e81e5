// fpi_cuda._C: loading it registers the operators. Bound here is only what is no tensor operator;
// no tensor crosses pybind11. CMakeLists.txt defines the FPI_BUILD_* strings.
#include <pybind11/pybind11.h>

#include "cpu/capability.h"

namespace {

// "a,b" -> ["a", "b"]
pybind11::object split(const char* text) {
  return *text ? pybind11::object(pybind11::str(text).attr("split")(",")) : pybind11::list();
}

pybind11::dict build_info() {
  using pybind11::literals::operator""_a;
  pybind11::list available;
  for (const auto capability : fpi::cpu::available()) {
    available.append(fpi::cpu::name(capability));
  }
  return pybind11::dict("torch_built"_a = FPI_BUILD_TORCH, "compiler"_a = FPI_BUILD_COMPILER,
                        "build_type"_a = FPI_BUILD_TYPE, "cxx_flags"_a = FPI_BUILD_CXX_FLAGS,
                        "cpu_capability"_a = fpi::cpu::name(fpi::cpu::capability()),
                        "cpu_capabilities_available"_a = available,
                        "cpu_capabilities_built"_a = split(FPI_BUILD_CPU_CAPABILITIES),
                        "cuda_built"_a = FPI_BUILD_CUDA,
                        "cuda_not_built_because"_a = FPI_BUILD_CUDA_REASON,
                        "cuda_archs"_a = split(FPI_BUILD_CUDA_ARCHS), "nvcc"_a = FPI_BUILD_NVCC);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  fpi::cpu::capability();  // a wrong FPI_CPU_CAPABILITY is an ImportError, not a later surprise
  m.def("build_info", &build_info,
        "How the native code was built, and which instruction set runs.");
}
