// How the step operators run over rows and threads, and what of their tensors' values is checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <limits>
#include <vector>

#include "../operators.h"

namespace fpi {

// Below this many values a thread costs more than it saves.
constexpr int64_t kStepGrain = 8192;

// Raises unless each row has a sample of its own: threads write to samples.
inline void check_index(const char* op, const int64_t* index, int64_t rows, int64_t samples) {
  bool ascends = true;
  for (int64_t row = 1; row < rows; ++row) {
    ascends &= index[row - 1] < index[row];
  }
  if (rows == 0 || (ascends && index[0] >= 0 && index[rows - 1] < samples)) {
    return;
  }
  std::vector<bool> taken(samples);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t sample = index[row];
    FPI_CHECK(0 <= sample && sample < samples, op, ": index must hold numbers from 0 to ",
              samples - 1, " (got ", sample, " in row ", row, ")");
    FPI_CHECK(!taken[sample], op, ": index must name a sample once (got ", sample, " again in row ",
              row, ")");
    taken[sample] = true;
  }
}

// What the window of a sample may be: of m slots up to `longest` taken; m = 0: nobody looks at it.
struct WindowLimits {
  int m = 0, longest = m;
};

// Whether kernels can follow the record of the sample in a row: they index by its iterations,
// window and head, and count in int32.
template <typename Acc>
bool is_sound(int64_t row, WindowLimits window, const Record<Acc>& record) {
  constexpr Acc kBeyond = 2147483648.0;
  const int64_t sample = sample_of(row, record);
  const int32_t* counters = record.counters + sample * kCounters;
  const auto at = [&](int counter) { return static_cast<uint32_t>(counters[counter]); };
  bool good = at(kIterations) <= static_cast<uint32_t>(std::numeric_limits<int32_t>::max());
  if (window.m > 0) {
    good &= (at(kHead) < static_cast<uint32_t>(window.m)) &
            (at(kWindow) <= static_cast<uint32_t>(window.longest));
  }
  if (record.bound_columns == kBounds) {
    const Acc* bounds = record.bounds + sample * kBounds;
    good &= bounds[kOwnPatience] >= 0 && bounds[kOwnPatience] < kBeyond;
    good &= bounds[kOwnMaxIterations] >= 1 && bounds[kOwnMaxIterations] < kBeyond;
  }
  return good;
}

// The first row of [begin, end) for which that is not so; end: none.
template <typename Acc>
int64_t first_broken(int64_t begin, int64_t end, WindowLimits window, const Record<Acc>& given) {
  const Record<Acc> record = given;  // stays in registers
  bool good = true;                  // without a branch a row, which would cost a step its percent
  for (int64_t row = begin; row < end; ++row) {
    good &= is_sound(row, window, record);
  }
  while (!good && begin < end && is_sound(begin, window, record)) {
    ++begin;
  }
  return good ? end : begin;
}

// Raises for such a row.
template <typename Acc>
[[noreturn]] void raise_broken(const char* op, int64_t row, WindowLimits window,
                               const Record<Acc>& record) {
  const int64_t sample = sample_of(row, record);
  const int32_t* counters = record.counters + sample * kCounters;
  std::string wanted = "iterations from 0", got = detail::message(counters[kIterations]);
  if (window.m > 0) {
    wanted +=
        detail::message(", a window of 0 to ", window.longest, ", a head of 0 to ", window.m - 1);
    got += detail::message(", ", counters[kWindow], ", ", counters[kHead]);
  }
  if (record.bound_columns == kBounds) {
    const Acc* bounds = record.bounds + sample * kBounds;
    wanted += ", and limits of its own in int32: a patience from 0, max_iterations from 1";
    got += detail::message(", ", bounds[kOwnPatience], ", ", bounds[kOwnMaxIterations]);
  }
  throw std::runtime_error(detail::message(op, ": the record of a sample must have ", wanted,
                                           " (got ", got, " for sample ", sample, ")"));
}

// Raises unless a solve can begin with this record of so many samples: windows are empty.
template <typename Acc>
void check_fresh(const char* op, const Record<Acc>& record, int64_t samples, int history) {
  const WindowLimits window = {.m = history, .longest = 0};
  const int64_t row = first_broken(0, samples, window, record);
  if (row < samples) {
    raise_broken(op, row, window, record);
  }
}

// Runs rows(begin, end), which returns their Tally, over all rows of a step, and brings its tally
// up to date. `work` is the values a row touches.
template <typename T, typename Rows>
void for_rows(const char* op, const StepCall<T>& call, int64_t work, WindowLimits window,
              const Rows& rows) {
  if (call.record.index != nullptr) {
    check_index(op, call.record.index, call.rows, call.samples);
  }
  std::atomic<int64_t> active{0}, failed{0}, broken{-1};
  const int64_t grain = kStepGrain / (work > 0 ? work : 1) + 1;
  torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) {
    const int64_t row = first_broken(begin, end, window, call.record);
    if (row < end) {
      broken.store(row, std::memory_order_relaxed);
      return;
    }
    const Tally part = rows(begin, end);
    active.fetch_add(part.active, std::memory_order_relaxed);
    failed.fetch_add(part.failed, std::memory_order_relaxed);
  });
  if (broken.load() >= 0) {
    raise_broken(op, broken.load(), window, call.record);
  }
  call.tally[kActiveRows] = static_cast<int32_t>(active.load());
  call.tally[kFailed] += static_cast<int32_t>(failed.load());
  ++call.tally[kIteration];
}

}  // namespace fpi
