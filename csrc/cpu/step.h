// How the step operators run over rows and threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "../operators.h"

namespace fpi {

// Below this many values a thread costs more than it saves.
constexpr int64_t kStepGrain = 8192;

// Runs rows(begin, end), which returns their Tally, over all rows of a step, and brings its tally
// up to date. `work` is the values a row touches.
template <typename T, typename Rows>
void for_rows(const StepCall<T>& call, int64_t work, const Rows& rows) {
  std::atomic<int64_t> active{0}, failed{0};
  const int64_t grain = kStepGrain / (work > 0 ? work : 1) + 1;
  torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) {
    const Tally part = rows(begin, end);
    active.fetch_add(part.active, std::memory_order_relaxed);
    failed.fetch_add(part.failed, std::memory_order_relaxed);
  });
  call.tally[kActiveRows] = static_cast<int32_t>(active.load());
  call.tally[kFailed] += static_cast<int32_t>(failed.load());
  ++call.tally[kIteration];
}

}  // namespace fpi
