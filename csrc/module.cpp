// fpi_cuda._C: loading it registers the operators. Bound here is only what is no tensor operator;
// no tensor crosses pybind11. CMakeLists.txt defines the FPI_BUILD_* strings.
#include <pybind11/pybind11.h>

#include <atomic>
#include <utility>

#include "cpu/capability.h"
#include "cpu/kernels/anderson_step.h"
#include "cpu/watch.h"
#include "cuda/plan.h"
#include "math/activation.h"
#include "math/anderson.h"
#include "math/picard.h"

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

// What Python has too, under its names; `sizes` tells whether a list here is whole.
pybind11::dict constants() {
  using namespace fpi;
  using pybind11::dict;
  using pybind11::literals::operator""_a;
  return dict(
      "record"_a = dict(
          "ACTIVE"_a = +kActive, "STATUS"_a = +kStatus, "ITERATIONS"_a = +kIterations,
          "REFERENCE_ITERATION"_a = +kReferenceIteration, "WINDOW"_a = +kWindow, "HEAD"_a = +kHead,
          "RETREATS"_a = +kRetreats, "PLAIN"_a = +kPlain, "HALVINGS"_a = +kHalvings,
          "COUNTERS"_a = +kCounters, "SCALARS"_a = +kScalars, "BOUNDS"_a = +kBounds,
          "ACTIVE_ROWS"_a = +kActiveRows, "FAILED"_a = +kFailed, "ITERATION"_a = +kIteration,
          "RESIDUAL"_a = +kResidual, "REFERENCE"_a = +kReference, "VALUE"_a = +kValue,
          "GAIN"_a = +kGain, "FLOOR"_a = +kFloor, "OWN_RTOL"_a = +kOwnRtol,
          "OWN_OFFSET"_a = +kOwnOffset, "OWN_PATIENCE"_a = +kOwnPatience,
          "OWN_MAX_ITERATIONS"_a = +kOwnMaxIterations, "OWN_ROUNDING"_a = +kOwnRounding,
          "LEAST_GAIN"_a = kLeastGain, "TRAIL"_a = kTrailLength, "NEAR_END"_a = kNearEnd,
          "MAX_RETREATS"_a = kMaxRetreats, "GOES_ON"_a = kGoesOn, "WORSE"_a = kWorse,
          "SLOW_ITERATIONS"_a = kSlowIterations, "MAX_HALVINGS"_a = kMaxHalvings,
          "RING_START"_a = +kRing, "RING"_a = +kRingLength, "GROWTH"_a = kGrowth,
          "GROWTH_ITERATIONS"_a = kGrowthIterations, "NOISE"_a = kNoise, "FALL"_a = kFall),
      "status"_a =
          dict("CONVERGED"_a = +kConverged, "MAX_ITERATIONS"_a = +kMaxIterations,
               "STALLED"_a = +kStalled, "DIVERGED"_a = +kDiverged, "NONFINITE"_a = +kNonfinite),
      "activations"_a = dict("identity"_a = +kIdentity, "tanh"_a = +kTanh, "relu"_a = +kRelu,
                             "sigmoid"_a = +kSigmoid, "softplus"_a = +kSoftplus, "gelu"_a = +kGelu),
      "max_history"_a = dict("cpu"_a = kMaxHistory, "cuda"_a = cuda::kMaxHistoryCuda),
      "sizes"_a =
          dict("counters"_a = +kCounters, "scalars"_a = +kScalars, "bounds"_a = +kBounds,
               "tally"_a = +kTallies, "status"_a = +kStatuses, "activations"_a = +kActivations));
}

// --- Signals: Python runs their handlers in its main thread alone, between two lines of Python.

std::atomic<unsigned long> main_thread{0};

void find_main_thread() {
  const auto thread = pybind11::module_::import("threading").attr("main_thread")();
  main_thread.store(thread.attr("ident").cast<unsigned long>());
}

// What a handler raised that broke off a call: held with the GIL, between the call and
// take_raised().
PyObject* raised = nullptr;

// Runs the handlers of the signals that came. Whether one of them raised. Threads that never run
// any don't wait for the GIL, by which Python could end them when it itself ends.
bool handle_signals() {
  if (PyThread_get_thread_ident() != main_thread.load(std::memory_order_relaxed)) {
    return false;
  }
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool stop = PyErr_CheckSignals() != 0;
  if (stop) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace != nullptr) {
      PyException_SetTraceback(value, trace);
    }
    Py_XDECREF(type);
    Py_XDECREF(trace);
    Py_XDECREF(std::exchange(raised, value));
  }
  PyGILState_Release(state);
  return stop;
}

pybind11::object take_raised() {
  PyObject* value = std::exchange(raised, nullptr);
  return value == nullptr ? pybind11::none() : pybind11::reinterpret_steal<pybind11::object>(value);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  fpi::cpu::capability();  // a wrong FPI_CPU_CAPABILITY is an ImportError, not a later surprise
  find_main_thread();
  pybind11::module_::import("os").attr("register_at_fork")(
      pybind11::arg("after_in_child") = pybind11::cpp_function(&find_main_thread));
  fpi::cpu::ask_to_stop.store(&handle_signals);
  m.attr("INTERRUPTED") = fpi::cpu::kInterrupted;
  m.def("take_raised", &take_raised,
        "What a signal's handler raised, if it broke off the last call; then forgets it.");
  m.def("build_info", &build_info,
        "How the native code was built, and which instruction set runs.");
  m.def("constants", &constants, "The numbers that csrc and Python both write down.");
}
