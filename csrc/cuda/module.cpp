// fpi_cuda._cuda: loading it registers the CUDA kernels of the operators. Bound here is only what
// is no tensor operator; handles and addresses cross as integers.
#include <pybind11/pybind11.h>

#include "while_graph.h"

namespace {

template <typename T>
T pointer(std::uintptr_t address) {
  return reinterpret_cast<T>(address);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  namespace py = pybind11;
  using fpi::cuda::WhileGraph;
  py::class_<WhileGraph>(m, "WhileGraph", "prepare, WHILE (tally says so) { body }, finish.")
      .def(py::init([](std::uintptr_t prepare, std::uintptr_t body, std::uintptr_t finish,
                       std::uintptr_t tally, int max_iterations) {
             return new WhileGraph(pointer<cudaGraph_t>(prepare), pointer<cudaGraph_t>(body),
                                   pointer<cudaGraph_t>(finish), pointer<const int32_t*>(tally),
                                   max_iterations);
           }),
           py::arg("prepare"), py::arg("body"), py::arg("finish"), py::arg("tally"),
           py::arg("max_iterations"), "From cudaGraph_t handles and the address of the tally.")
      .def(
          "launch",
          [](const WhileGraph& graph, std::uintptr_t stream) {
            graph.launch(pointer<cudaStream_t>(stream));
          },
          py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "Runs the whole loop on this cudaStream_t; returns at once.");
  m.def("driver_version", &fpi::cuda::driver_version,
        "The installed CUDA driver's, 1000 major + 10 minor; 0 where there is none.");
}
