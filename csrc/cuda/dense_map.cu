#include <torch/csrc/stable/library.h>

#include "dense_layout.h"
#include "dense_machine.h"

namespace fpi::cuda {
namespace {

void dense_map_cuda(Tensor x, Tensor weight, std::optional<Tensor> u, Tensor out, bool tf32) {
  constexpr const char* op = "_dense_map";
  check_dense_map(x, weight, u, out);
  check_contiguous(op, "weight", weight);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  dispatch_floating(op, "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const DenseMachine machine(x);
    FPI_CHECK(dense_map(static_cast<const T*>(x.const_data_ptr()),
                        static_cast<T*>(out.mutable_data_ptr()), x.size(0),
                        layer_of<T>(weight, u, kIdentity), tf32, machine),
              op, ": x must have rows that fit shared memory of ", machine.shared_limit(),
              " bytes (got K = ", x.size(1), ")");
  });
}

}  // namespace
}  // namespace fpi::cuda

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("_dense_map", TORCH_BOX(&fpi::cuda::dense_map_cuda));
}
