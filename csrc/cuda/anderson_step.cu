#include "kernels/anderson_step.cuh"

#include <torch/csrc/stable/library.h>

#include "step.h"

namespace fpi::cuda {
namespace {

struct AndersonOnCuda {
  static constexpr int kMost = kMaxHistoryCuda;

  template <typename T>
  static void run(const Tensor& x, const StepCall<T>& call, const Window<T>& window,
                  const Mixing<accumulate_t<T>>& mixing) {
    const Launch<T> launch(x, call, anderson_sums(window.m), window.m,
                           {window.values, window.residuals});
    with_groups(window.m, [&](auto groups) {
      launch.run(AndersonStep<T, groups.value>{launch.batch(), window, mixing},
                 AndersonMove<T>{launch.batch(), window});
    });
  }
};

}  // namespace
}  // namespace fpi::cuda

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("_anderson_step", TORCH_BOX(&fpi::anderson_step<fpi::cuda::AndersonOnCuda>));
}
