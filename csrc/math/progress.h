// The per-sample record of a solve and the stop rule. fpi_cuda/backends/progress.py lays the
// tensors out; the columns here are the same.
#pragma once

#include <math.h>

#include <cstdint>

#include "macros.h"

namespace fpi {

enum Status : int32_t {
  kActive = -1,
  kConverged = 0,
  kMaxIterations = 1,
  kStalled = 2,
  kDiverged = 3,
  kNonfinite = 4,
};

// Columns of counters, int32 [B, kCounters].
enum Counter { kStatus, kIterations, kReferenceIteration, kWindow, kHead, kCounters };

// Columns of scalars, [B, kScalars]: the last residual norm; the norm at the last fall by 10 %;
// a ring of residual norms (Picard) or secant ratios (Anderson).
enum Scalar { kResidual, kReference, kRing, kRingLength = 5, kScalars = kRing + kRingLength };

constexpr double kGrowth = 1e4;         // DIVERGED: this many times the reference,
constexpr int32_t kGrowthIterations = 5;  // which is this old
constexpr double kFall = 0.9;           // a residual this much below the reference is progress

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
  const Acc* floor;      // [B]
  const int64_t* index;  // [R]: the sample that each row holds
  Limits<Acc> limits;
  int32_t k;  // this iteration, from 1
};

template <typename Acc>
FPI_HOST_DEVICE bool is_finite(Acc a) {
  return a - a == Acc(0);
}

FPI_HOST_DEVICE float square_root(float a) { return sqrtf(a); }
FPI_HOST_DEVICE double square_root(double a) { return sqrt(a); }

// The sample's status after iteration k, and its counters and reference brought up to date.
// CONVERGED: ‖r‖ ≤ atol √N + rtol max(‖g(x)‖, floor), with offset = atol √N.
template <typename Acc>
FPI_HOST_DEVICE int32_t stop(Acc residual, Acc value, int64_t sample, const Record<Acc>& record) {
  int32_t* counters = record.counters + sample * kCounters;
  Acc* scalars = record.scalars + sample * kScalars;
  const Limits<Acc>& limits = record.limits;
  const int32_t k = record.k;

  Acc reference = scalars[kReference];
  int32_t since = counters[kReferenceIteration];
  if (residual <= Acc(kFall) * reference) {
    reference = residual;
    since = k;
  }
  const Acc floor = record.floor[sample];
  const Acc threshold = limits.offset + limits.rtol * (value > floor ? value : floor);

  int32_t status = kActive;
  if (!is_finite(residual) || !is_finite(value)) {
    status = kNonfinite;
  } else if (residual <= threshold) {
    status = kConverged;
  } else if (k - since >= kGrowthIterations && residual > Acc(kGrowth) * reference) {
    status = kDiverged;
  } else if (k - since >= limits.patience && residual <= limits.rounding * value) {
    status = kStalled;
  } else if (k >= limits.max_iterations) {
    status = kMaxIterations;
  }
  counters[kStatus] = status;
  counters[kIterations] = k;
  counters[kReferenceIteration] = since;
  scalars[kResidual] = residual;
  scalars[kReference] = reference;
  return status;
}

}  // namespace fpi
