#include "kernels/bicgstab_step.h"

#include <torch/csrc/stable/library.h>

#include "../krylov.h"
#include "step.h"

namespace fpi {
namespace {

struct BicgstabOnCpu {
  template <typename T>
  static void run(const Tensor&, const StepCall<T>& call, const Krylov<T>& krylov) {
    const auto kernel = FPI_CPU_DISPATCH(bicgstab_step<T>);
    const WindowLimits phases = {.m = 1, .longest = kSecond};
    for_rows("_bicgstab_step", call, 4 * call.n, phases, [&](int64_t begin, int64_t end) {
      return kernel(call.x, call.gx, call.out, call.n, krylov, call.record, begin, end);
    });
  }
};

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) {
  m.impl("_bicgstab_step", TORCH_BOX(&fpi::bicgstab_step<fpi::BicgstabOnCpu>));
}
