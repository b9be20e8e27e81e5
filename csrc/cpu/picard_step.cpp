#include "kernels/picard_step.h"

#include <torch/csrc/stable/library.h>

#include "step.h"

namespace fpi {
namespace {

struct PicardOnCpu {
  template <typename T>
  static void run(const Tensor&, const StepCall<T>& call, const Trail<T>& trail) {
    const auto kernel = FPI_CPU_DISPATCH(picard_step<T>);
    const WindowLimits kept = {.m = trail.states == nullptr ? 0 : kTrailLength};
    for_rows("_picard_step", call, call.n, kept, [&](int64_t begin, int64_t end) {
      return kernel(call.x, call.gx, call.out, call.n, call.beta, trail, call.record, begin, end);
    });
  }
};

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) {
  m.impl("_picard_step", TORCH_BOX(&fpi::picard_step<fpi::PicardOnCpu>));
}
