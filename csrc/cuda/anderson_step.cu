#include "kernels/anderson_step.cuh"

#include <torch/csrc/stable/library.h>

#include "../dispatch.h"
#include "step.h"

namespace fpi::cuda {
namespace {

void anderson_step_cuda(Tensor x, Tensor gx, Tensor out, Tensor counters, Tensor scalars,
                        Tensor tally, std::optional<Tensor> index, std::optional<Tensor> floor,
                        double rtol, double offset, double rounding, int64_t patience,
                        int64_t max_iterations, double beta, double ridge, double restart,
                        Tensor values, Tensor residuals, Tensor gram) {
  constexpr const char* op = "_anderson_step";
  check_step(op, x, gx, out, counters, scalars, tally, index, floor);
  check_window(op, x, out, scalars, values, residuals, gram, kMaxHistoryCuda);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  dispatch_floating(op, "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    const int m = static_cast<int>(values.size(1));
    T* const value_data = static_cast<T*>(values.mutable_data_ptr());
    T* const residual_data = static_cast<T*>(residuals.mutable_data_ptr());
    const Launch<T> launch({x, gx, out, counters, scalars, tally, index, floor, rtol, offset,
                            rounding, patience, max_iterations, beta},
                           anderson_sums(m), m, {value_data, residual_data});
    const Window<T> window{value_data, residual_data, static_cast<Acc*>(gram.mutable_data_ptr()),
                           m};
    with_groups(m, [&](auto groups) {
      launch.run(AndersonStep<T, groups.value>{launch.step(), window, static_cast<Acc>(ridge),
                                               static_cast<Acc>(restart)},
                 AndersonMove<T>{launch.step(), window});
    });
  });
}

}  // namespace
}  // namespace fpi::cuda

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("_anderson_step", TORCH_BOX(&fpi::cuda::anderson_step_cuda));
}
