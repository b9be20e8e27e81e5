#include "kernels/dense_solve.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "../dispatch.h"
#include "dense.h"
#include "kernels/anderson_step.h"
#include "step.h"

namespace fpi {
namespace {

// Weights are read once for every tile: enough slots to pay for that, few enough that they and
// their windows stay in the core's own cache. Where the weights come from farther off, more slots
// pay.
int64_t slots_for(int64_t weight_bytes) {
  constexpr int64_t kFar = int64_t{8} << 20;
  return weight_bytes > kFar ? kMaxSlots : 24;
}

void dense_solve_cpu(Tensor x0, Tensor out, Tensor counters, Tensor scalars, Tensor tally,
                     std::optional<Tensor> floor, double rtol, double offset, double rounding,
                     int64_t patience, int64_t max_iterations, double beta, double ridge,
                     double restart, int64_t history, Tensor weight, std::optional<Tensor> u,
                     int64_t activation, double residual, std::optional<Tensor> scale,
                     std::optional<Tensor> hidden_weight, std::optional<Tensor> hidden_u,
                     int64_t hidden_activation, std::optional<Tensor> hidden_scale, bool tf32,
                     int64_t slots) {
  check_dense_solve({x0, out, counters, scalars, tally, floor, weight, u, scale, hidden_weight,
                     hidden_u, hidden_scale, activation, hidden_activation, history},
                    kMaxHistory);
  FPI_CHECK(!tf32, "_dense_solve: tf32 must be false on the CPU");
  dispatch_floating("_dense_solve", "x0", x0, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t samples = x0.size(0);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t weights = weight.numel() + (hidden_weight ? hidden_weight->numel() : 0);
    const int64_t wanted =
        slots > 0 ? slots : slots_for(weights * static_cast<int64_t>(sizeof(accumulate_t<T>)));
    DenseSolve<T> solve = {
        dense_step_of<T>(x0, weight, u, activation, residual, scale, hidden_weight, hidden_u,
                         hidden_activation, hidden_scale),
        nullptr,
        nullptr,
        static_cast<const T*>(x0.const_data_ptr()),
        static_cast<T*>(out.mutable_data_ptr()),
        samples,
        record_of<accumulate_t<T>>(counters, scalars, std::nullopt, floor, rtol, offset, rounding,
                                   patience, max_iterations),
        beta,
        ridge,
        restart,
        static_cast<int>(history),
        static_cast<int>(std::clamp<int64_t>((samples + threads - 1) / threads, 1,
                                             std::min<int64_t>(wanted, kMaxSlots)))};
    std::optional<PackedWeights<T>> hidden;
    if (hidden_weight) {
      hidden.emplace(x0, solve.step.hidden);
      solve.packed_hidden = hidden->data();
    }
    const PackedWeights<T> output(x0, solve.step.output);
    solve.packed_output = output.data();

    const int64_t workers = std::min(threads, (samples + solve.slots - 1) / solve.slots);
    const int64_t bytes = FPI_CPU_DISPATCH(dense_solve_bytes<T>)(solve);
    const Tensor memory = memory_like(x0, workers * bytes);
    auto* data = static_cast<unsigned char*>(memory.mutable_data_ptr());
    const auto kernel = FPI_CPU_DISPATCH(dense_solve<T>);
    int64_t next = 0;
    std::atomic<int64_t> failed{0};
    std::atomic<int32_t> iterations{0};
    on_workers(workers, [&](int64_t worker) {
      const Ended ended = kernel(solve, &next, data + worker * bytes);
      failed.fetch_add(ended.failed, std::memory_order_relaxed);
      int32_t most = iterations.load();
      while (most < ended.iterations && !iterations.compare_exchange_weak(most, ended.iterations)) {
      }
    });
    int32_t* counts = static_cast<int32_t*>(tally.mutable_data_ptr());
    counts[kActiveRows] = 0;
    counts[kFailed] += static_cast<int32_t>(failed.load());
    counts[kIteration] += iterations.load();
  });
}

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) {
  m.impl("_dense_solve", TORCH_BOX(&fpi::dense_solve_cpu));
}
