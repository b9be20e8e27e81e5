#include "kernels/picard_step.cuh"

#include <torch/csrc/stable/library.h>

#include "../dispatch.h"
#include "step.h"

namespace fpi::cuda {
namespace {

void picard_step_cuda(Tensor x, Tensor gx, Tensor out, Tensor counters, Tensor scalars,
                      Tensor tally, std::optional<Tensor> index, std::optional<Tensor> floor,
                      double rtol, double offset, double rounding, int64_t patience,
                      int64_t max_iterations, double beta) {
  constexpr const char* op = "_picard_step";
  check_step(op, x, gx, out, counters, scalars, tally, index, floor);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  dispatch_floating(op, "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Launch<T> launch({x, gx, out, counters, scalars, tally, index, floor, rtol, offset,
                            rounding, patience, max_iterations, beta},
                           kPicardSums, 1, {});
    launch.run(PicardStep<T>{launch.step()}, PicardMove<T>{launch.step()});
  });
}

}  // namespace
}  // namespace fpi::cuda

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("_picard_step", TORCH_BOX(&fpi::cuda::picard_step_cuda));
}
