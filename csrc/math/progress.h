// The per-sample record of a solve and the stop rule. fpi_cuda/record.py lays the
// tensors out; the columns here are the same.
#pragma once

#include <cstdint>

#include "norm.h"

namespace fpi {

// One more than Python's Status, so that a zeroed record is one of active samples.
enum Status : int32_t {
  kActive,
  kConverged,
  kMaxIterations,
  kStalled,
  kDiverged,
  kNonfinite,
  kStatuses,
};

// Columns of counters, int32 [B, kCounters]: of the window or trail how many iterates it holds, and
// the slot of the newest; how often a mixture was taken back; plain steps since the last mixture;
// how often beta was halved.
enum Counter {
  kStatus,
  kIterations,
  kReferenceIteration,
  kWindow,
  kHead,
  kRetreats,
  kPlain,
  kHalvings,
  kCounters,
};

// Columns of bounds, [B] or [B, kBounds]: the least norm that rtol multiplies; where there are
// more, a sample's own limits instead of the solve's.
enum Bound {
  kFloor,
  kOwnRtol,
  kOwnOffset,
  kOwnPatience,
  kOwnMaxIterations,
  kOwnRounding,
  kBounds,
};

// Columns of scalars, [B, kScalars]: the last residual norm; the norm at the last fall by 0.5 %;
// the last ‖g(x)‖; the square of the largest gain ‖Δg‖/‖Δr‖ seen, 0: none; a ring of squares of
// secant ratios ‖Δg‖/‖Δx‖, 0: none.
enum Scalar {
  kResidual,
  kReference,
  kValue,
  kGain,
  kRing,
  kRingLength = 5,
  kScalars = kRing + kRingLength,
};

// Entries of tally, int32 [kTallies]: rows still active; samples that ended otherwise than
// converged, so far; iterations made.
enum TallyEntry { kActiveRows, kFailed, kIteration, kTallies };

constexpr double kGrowth = 1e4;           // DIVERGED: this many times the reference,
constexpr int32_t kGrowthIterations = 5;  // which is this old
// A residual this much below the reference is progress. Slow contractions must not look stalled: in
// ten iterations one of rate 0.9995 falls this far.
constexpr double kFall = 0.995;

constexpr int kNoise = 2;  // residual differences below this many roundings of g(x) say nothing

template <typename Acc>
struct Limits {
  Acc rtol, offset, rounding;
  int32_t patience, max_iterations;
};

// What a step operator needs of Progress, as pointers.
template <typename Acc>
struct Record {
  int32_t* counters;     // [B, kCounters]
  Acc* scalars;          // [B, kScalars]
  const Acc* bounds;     // [B, bound_columns], or null: no floor, and the same limits for all
  int bound_columns;     // 1, or kBounds
  const int64_t* index;  // [R]: the sample that each row holds, or null: row r holds sample r
  Limits<Acc> limits;
};

// What a step left of the rows it worked on.
struct Tally {
  int64_t active = 0;  // still iterating
  int64_t failed = 0;  // finished in this step, not converged
};

template <typename Acc>
FPI_HOST_DEVICE int64_t sample_of(int64_t row, const Record<Acc>& record) {
  return record.index == nullptr ? row : record.index[row];
}

// The number of an active sample's iteration that a step is about to end, from 1.
template <typename Acc>
FPI_HOST_DEVICE int32_t iteration_of(int64_t sample, const Record<Acc>& record) {
  return record.counters[sample * kCounters + kIterations] + 1;
}

// The limits that hold for a sample, and the least norm that rtol multiplies.
template <typename Acc>
struct SampleLimits {
  Limits<Acc> limits;
  Acc floor;

  FPI_HOST_DEVICE Acc threshold(Acc value) const {
    return limits.offset + limits.rtol * (value > floor ? value : floor);
  }
};

template <typename Acc>
FPI_HOST_DEVICE SampleLimits<Acc> limits_of(int64_t sample, const Record<Acc>& record) {
  SampleLimits<Acc> own = {record.limits, 0};
  if (record.bounds != nullptr) {
    const Acc* bounds = record.bounds + sample * record.bound_columns;
    own.floor = bounds[kFloor];
    if (record.bound_columns == kBounds) {
      own.limits.rtol = bounds[kOwnRtol];
      own.limits.offset = bounds[kOwnOffset];
      own.limits.rounding = bounds[kOwnRounding];
      own.limits.patience = static_cast<int32_t>(bounds[kOwnPatience]);
      own.limits.max_iterations = static_cast<int32_t>(bounds[kOwnMaxIterations]);
    }
  }
  return own;
}

// The sample's status after this iteration, and its counters and reference brought up to date.
// CONVERGED: ‖r‖ ≤ atol √N + rtol max(‖g(x)‖, floor), with offset = atol √N.
template <typename Acc>
FPI_HOST_DEVICE int32_t stop(Acc residual, Acc value, int64_t sample, const Record<Acc>& record) {
  int32_t* counters = record.counters + sample * kCounters;
  Acc* scalars = record.scalars + sample * kScalars;
  const SampleLimits<Acc> own = limits_of(sample, record);
  const int32_t k = counters[kIterations] + 1;

  Acc reference = scalars[kReference];
  int32_t since = counters[kReferenceIteration];
  if (k == 1 || residual <= Acc(kFall) * reference) {
    reference = residual;
    since = k;
  }

  int32_t status = kActive;
  if (!is_finite(residual) || !is_finite(value)) {
    status = kNonfinite;
  } else if (residual <= own.threshold(value)) {
    status = kConverged;
  } else if (k - since >= kGrowthIterations && residual > Acc(kGrowth) * reference) {
    status = kDiverged;
  } else if (k - since >= own.limits.patience && residual <= own.limits.rounding * value) {
    status = kStalled;
  } else if (k >= own.limits.max_iterations) {
    status = kMaxIterations;
  }
  counters[kStatus] = status;
  counters[kIterations] = k;
  counters[kReferenceIteration] = since;
  scalars[kResidual] = residual;
  scalars[kReference] = reference;
  scalars[kValue] = value;
  return status;
}

}  // namespace fpi
