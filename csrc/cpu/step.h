// How the step operators run over rows and threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <optional>

#include "../checks.h"
#include "../math/progress.h"

namespace fpi {

// Below this many values a thread costs more than it saves.
constexpr int64_t kStepGrain = 8192;

template <typename Acc>
Record<Acc> record_of(const Tensor& counters, const Tensor& scalars,
                      const std::optional<Tensor>& index, const std::optional<Tensor>& floor,
                      double rtol, double offset, double rounding, int64_t patience,
                      int64_t max_iterations) {
  return {static_cast<int32_t*>(counters.mutable_data_ptr()),
          static_cast<Acc*>(scalars.mutable_data_ptr()),
          floor ? static_cast<const Acc*>(floor->const_data_ptr()) : nullptr,
          index ? static_cast<const int64_t*>(index->const_data_ptr()) : nullptr,
          {static_cast<Acc>(rtol), static_cast<Acc>(offset), static_cast<Acc>(rounding),
           static_cast<int32_t>(patience), static_cast<int32_t>(max_iterations)}};
}

// Runs rows(begin, end), which returns their Tally, over all rows of x. tally is brought up
// to date. `work` is the values a row touches.
template <typename Rows>
void for_rows(const Tensor& x, int64_t work, const Tensor& tally, const Rows& rows) {
  std::atomic<int64_t> active{0}, failed{0};
  const int64_t grain = kStepGrain / (work > 0 ? work : 1) + 1;
  torch::stable::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    const Tally part = rows(begin, end);
    active.fetch_add(part.active, std::memory_order_relaxed);
    failed.fetch_add(part.failed, std::memory_order_relaxed);
  });
  int32_t* counts = static_cast<int32_t*>(tally.mutable_data_ptr());
  counts[kActiveRows] = static_cast<int32_t>(active.load());
  counts[kFailed] += static_cast<int32_t>(failed.load());
  ++counts[kIteration];
}

}  // namespace fpi
