#include "kernels/dense_solve.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "dense.h"
#include "kernels/anderson_step.h"
#include "step.h"
#include "watch.h"

namespace fpi {
namespace {

// Weights are read once for every tile: enough slots to pay for that, few enough that they and
// their windows stay in the core's own cache. Where the weights come from farther off, more slots
// pay.
int64_t slots_for(int64_t weight_bytes) {
  constexpr int64_t kFar = int64_t{8} << 20;
  return weight_bytes > kFar ? kMaxSlots : 24;
}

struct DenseOnCpu {
  static constexpr int kMost = kMaxHistory;

  static void check(const Tensor&, const Tensor&, const std::optional<Tensor>&, bool tf32,
                    int64_t) {
    FPI_CHECK(!tf32, "_dense_solve: tf32 must be false on the CPU");
  }

  template <typename T>
  static void run(const Tensor& x0, const DenseCall<T>& call) {
    const DenseLayer<T>& first = call.dense.hidden;
    const DenseLayer<T>& last = call.dense.output;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t weights = last.in * last.out + (call.dense.has_hidden ? first.in * first.out : 0);
    const int64_t wanted = call.slots > 0
                               ? call.slots
                               : slots_for(weights * static_cast<int64_t>(sizeof(accumulate_t<T>)));
    check_fresh("_dense_solve", call.record, call.samples, call.history);
    cpu::Watch watch;
    DenseSolve<T> solve = {
        .call = call,
        .slots = static_cast<int>(std::clamp<int64_t>((call.samples + threads - 1) / threads, 1,
                                                      std::min<int64_t>(wanted, kMaxSlots))),
        .packed_hidden = nullptr,
        .packed_output = nullptr,
        .stopped = cpu::Watch::stopped,
        .watch = &watch};
    std::optional<PackedWeights<T>> hidden;
    if (call.dense.has_hidden) {
      hidden.emplace(x0, first);
      solve.packed_hidden = hidden->data();
    }
    const PackedWeights<T> output(x0, last);
    solve.packed_output = output.data();

    const int64_t workers = std::min(threads, (call.samples + solve.slots - 1) / solve.slots);
    const int64_t bytes = FPI_CPU_DISPATCH(dense_solve_bytes<T>)(solve);
    const Tensor memory = memory_like(x0, workers * bytes);
    auto* data = static_cast<unsigned char*>(memory.mutable_data_ptr());
    const auto kernel = FPI_CPU_DISPATCH(dense_solve<T>);
    int64_t next = 0;
    std::atomic<int64_t> failed{0};
    std::atomic<int32_t> iterations{0};
    watch.on_workers(workers, [&](int64_t worker) {
      const Ended ended = kernel(solve, &next, data + worker * bytes);
      failed.fetch_add(ended.failed, std::memory_order_relaxed);
      int32_t most = iterations.load();
      while (most < ended.iterations && !iterations.compare_exchange_weak(most, ended.iterations)) {
      }
    });
    watch.check("_dense_solve");
    call.tally[kActiveRows] = 0;
    call.tally[kFailed] += static_cast<int32_t>(failed.load());
    call.tally[kIteration] += iterations.load();
  }
};

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) {
  m.impl("_dense_solve", TORCH_BOX(&fpi::dense_solve<fpi::DenseOnCpu>));
}
