#include <torch/csrc/stable/library.h>

#include "dense_layout.h"
#include "dense_machine.h"

namespace fpi::cuda {
namespace {

struct DenseOnCuda {
  static constexpr int kMost = kMaxHistoryCuda;

  static void check(const Tensor& x0, const Tensor& weight,
                    const std::optional<Tensor>& hidden_weight, bool, int64_t slots) {
    constexpr const char* op = "_dense_solve";
    check_contiguous(op, "weight", weight);
    if (hidden_weight) {
      check_contiguous(op, "hidden_weight", *hidden_weight);
    }
    FPI_CHECK(0 <= slots && slots <= kMostSlots, op, ": slots must be 0 to ", kMostSlots, " (got ",
              slots, ")");
    FPI_CHECK(x0.size(0) <= INT32_MAX - (int64_t{1} << 24), op,
              ": x0 must have fewer samples (got ", x0.size(0), ")");
  }

  template <typename T>
  static void run(const Tensor& x0, const DenseCall<T>& call) {
    const torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
    const DenseMachine machine(x0);
    FPI_CHECK(dense_solve(call, machine), "_dense_solve: x0 must have rows of at most ",
              kBlockRowBytes, " bytes, which with the hidden layer's fit shared memory of ",
              machine.shared_limit(), " bytes (got N = ", call.dense.n,
              ", H = ", call.dense.hidden.out, ")");
  }
};

bool dense_fits_cuda(Tensor x0, int64_t hidden, int64_t history) {
  FPI_CHECK(x0.dim() == 2, "_dense_fits: x0 must have shape [B, N] (got ", detail::shape(x0), ")");
  bool fits = false;
  dispatch_floating("_dense_fits", "x0", x0, [&](auto tag) {
    using T = typename decltype(tag)::type;
    fits = dense_fits(dense_shape<T>(x0.size(1), hidden, static_cast<int>(history), kBounds),
                      DenseMachine(x0).shared_limit());
  });
  return fits;
}

}  // namespace
}  // namespace fpi::cuda

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("_dense_solve", TORCH_BOX(&fpi::dense_solve<fpi::cuda::DenseOnCuda>));
  m.impl("_dense_fits", TORCH_BOX(&fpi::cuda::dense_fits_cuda));
}
