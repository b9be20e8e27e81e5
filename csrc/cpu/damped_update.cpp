#include "kernels/damped_update.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../dispatch.h"

namespace fpi {
namespace {

// Below this many values a thread costs more than it saves.
constexpr int64_t kGrain = 32768;

void damped_update_cpu(Tensor& x, const Tensor& gx, double beta) {
  check_damped_update(x, gx);
  dispatch_floating("_damped_update", "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* x_data = static_cast<T*>(x.mutable_data_ptr());
    const T* gx_data = static_cast<const T*>(gx.const_data_ptr());
    const auto kernel = FPI_CPU_DISPATCH(damped_update<T>);
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernel(x_data + begin, gx_data + begin, beta, end - begin);
    });
  });
}

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) {
  m.impl("_damped_update", TORCH_BOX(&fpi::damped_update_cpu));
}
