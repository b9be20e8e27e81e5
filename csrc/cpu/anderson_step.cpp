#include "kernels/anderson_step.h"

#include <torch/csrc/stable/library.h>

#include "step.h"

namespace fpi {
namespace {

struct AndersonOnCpu {
  static constexpr int kMost = kMaxHistory;

  template <typename T>
  static void run(const Tensor&, const StepCall<T>& call, const Window<T>& window,
                  const Mixing<accumulate_t<T>>& mixing) {
    const auto kernel = FPI_CPU_DISPATCH(anderson_step<T>);
    for_rows("_anderson_step", call, call.n * window.m, {window.m},
             [&](int64_t begin, int64_t end) {
               return kernel(call.x, call.gx, call.out, call.n, call.beta, mixing, window,
                             call.record, begin, end);
             });
  }
};

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) {
  m.impl("_anderson_step", TORCH_BOX(&fpi::anderson_step<fpi::AndersonOnCpu>));
}
