#include "kernels/damped_update.cuh"

#include <torch/csrc/stable/library.h>

#include "../dispatch.h"
#include "step.h"

namespace fpi::cuda {
namespace {

void damped_update_cuda(Tensor& x, const Tensor& gx, double beta) {
  check_damped_update(x, gx);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  dispatch_floating("_damped_update", "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t count = x.numel();
    if (count == 0) {
      return;  // a grid of no blocks is a launch error
    }
    T* x_data = static_cast<T*>(x.mutable_data_ptr());
    const T* gx_data = static_cast<const T*>(gx.const_data_ptr());
    const bool aligned = is_aligned(x_data) && is_aligned(gx_data);
    Start{current_stream(x)}(
        DampedUpdate<T>{x_data, gx_data, static_cast<accumulate_t<T>>(beta), count, aligned},
        DampedUpdate<T>::blocks(count), 0);
  });
}

}  // namespace
}  // namespace fpi::cuda

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("_damped_update", TORCH_BOX(&fpi::cuda::damped_update_cuda));
}
