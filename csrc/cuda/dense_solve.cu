#include <torch/csrc/stable/library.h>

#include "../dense.h"
#include "../dispatch.h"
#include "dense_layout.h"
#include "dense_machine.h"

namespace fpi::cuda {
namespace {

void dense_solve_cuda(Tensor x0, Tensor out, Tensor counters, Tensor scalars, Tensor tally,
                      std::optional<Tensor> floor, double rtol, double offset, double rounding,
                      int64_t patience, int64_t max_iterations, double beta, double ridge,
                      double restart, int64_t history, Tensor weight, std::optional<Tensor> u,
                      int64_t activation, double residual, std::optional<Tensor> scale,
                      std::optional<Tensor> hidden_weight, std::optional<Tensor> hidden_u,
                      int64_t hidden_activation, std::optional<Tensor> hidden_scale, bool tf32,
                      int64_t slots) {
  constexpr const char* op = "_dense_solve";
  check_dense_solve({x0, out, counters, scalars, tally, floor, weight, u, scale, hidden_weight,
                     hidden_u, hidden_scale, activation, hidden_activation, history},
                    kMaxHistoryCuda);
  const int64_t samples = x0.size(0), n = x0.size(1);
  check_contiguous(op, "weight", weight);
  if (hidden_weight) {
    check_contiguous(op, "hidden_weight", *hidden_weight);
  }
  FPI_CHECK(0 <= slots && slots <= kMostSlots, op, ": slots must be 0 to ", kMostSlots, " (got ",
            slots, ")");
  FPI_CHECK(samples <= INT32_MAX - (int64_t{1} << 24), op, ": x0 must have fewer samples (got ",
            samples, ")");
  const torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
  dispatch_floating(op, "x0", x0, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    const DenseCall<T> call = {
        samples,
        static_cast<const T*>(x0.const_data_ptr()),
        static_cast<T*>(out.mutable_data_ptr()),
        {static_cast<int32_t*>(counters.mutable_data_ptr()),
         static_cast<Acc*>(scalars.mutable_data_ptr()),
         floor ? static_cast<const Acc*>(floor->const_data_ptr()) : nullptr,
         nullptr,
         {static_cast<Acc>(rtol), static_cast<Acc>(offset), static_cast<Acc>(rounding),
          static_cast<int32_t>(patience), static_cast<int32_t>(max_iterations)}},
        static_cast<int32_t*>(tally.mutable_data_ptr()),
        static_cast<Acc>(beta),
        static_cast<Acc>(ridge),
        static_cast<Acc>(restart),
        static_cast<int>(history),
        dense_step_of<T>(x0, weight, u, activation, residual, scale, hidden_weight, hidden_u,
                         hidden_activation, hidden_scale),
        tf32,
        static_cast<int>(slots)};
    const DenseMachine machine(x0);
    FPI_CHECK(dense_solve(call, machine), op, ": x0 must have rows of at most ", kBlockRowBytes,
              " bytes, which with the hidden layer's fit shared memory of ", machine.shared_limit(),
              " bytes (got N = ", n, ", H = ", hidden_weight ? hidden_weight->size(0) : 0, ")");
  });
}

bool dense_fits_cuda(Tensor x0, int64_t hidden, int64_t history) {
  FPI_CHECK(x0.dim() == 2, "_dense_fits: x0 must have shape [B, N] (got ", detail::shape(x0), ")");
  bool fits = false;
  dispatch_floating("_dense_fits", "x0", x0, [&](auto tag) {
    using T = typename decltype(tag)::type;
    fits = dense_fits(dense_shape<T>(x0.size(1), hidden, static_cast<int>(history)),
                      DenseMachine(x0).shared_limit());
  });
  return fits;
}

}  // namespace
}  // namespace fpi::cuda

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("_dense_solve", TORCH_BOX(&fpi::cuda::dense_solve_cuda));
  m.impl("_dense_fits", TORCH_BOX(&fpi::cuda::dense_fits_cuda));
}
