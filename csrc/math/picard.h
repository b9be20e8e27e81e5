// What a Picard step decides of a sample, and what its last iterates say of g.
//
// The gain is measured once, when a sample ends, from its last three iterates; the two before the
// last are kept in the trail, and only where the end is near: a copy of x in every iteration would
// cost a third of the step.
#pragma once

#include "gain.h"
#include "window.h"

namespace fpi {

constexpr int kNearEnd = 4;  // times the threshold

struct PicardDecision {
  int32_t status;  // after this step
  bool keeps;      // x goes to the trail, to slot counters[kHead]
};

// Ends a sample's iteration by the stop rule, and says whether its x is to be kept: where it may
// end within two more iterations. So it may at once and before its last ones, where the residual
// does not fall, and where it comes near the threshold if it goes on to fall as it does; at any
// time where the threshold is negative, and the end decided elsewhere.
template <typename Acc>
FPI_HOST_DEVICE PicardDecision decide(Acc residual, Acc value, Acc beta, int64_t sample,
                                      const Record<Acc>& record) {
  int32_t* counters = record.counters + sample * kCounters;
  Acc* scalars = record.scalars + sample * kScalars;
  const int32_t k = iteration_of(sample, record);
  const Acc fall = residual / scalars[kResidual];
  if (k > 1 && beta == Acc(1)) {  // Δg = r and Δx is the residual before
    scalars[kRing + (k - 2) % kRingLength] = fall * fall;
  }
  const int32_t status = stop(residual, value, sample, record);
  if (status != kActive) {
    return {status, false};
  }
  bool keeps = k <= kTrailLength || counters[kReferenceIteration] != k;
  if (!keeps) {
    const SampleLimits<Acc> own = limits_of(sample, record);
    const Acc threshold = own.threshold(value);
    keeps = k + kTrailLength >= own.limits.max_iterations || threshold < Acc(0) ||
            residual * fall * fall <= kNearEnd * threshold;
  }
  if (keeps) {
    counters[kHead] = counters[kHead] == 0 ? 1 : 0;
  }
  const int32_t length = counters[kWindow];
  counters[kWindow] = !keeps ? 0 : length < kTrailLength ? length + 1 : length;
  return {status, keeps};
}

// Whether a sample that ended can say anything of g: not where a NaN ended it, or its first
// residual.
template <typename Acc>
FPI_HOST_DEVICE bool has_trail(int32_t status, int64_t sample, const Record<Acc>& record) {
  return status != kActive && status != kNonfinite &&
         record.counters[sample * kCounters + kWindow] > 0 &&
         record.scalars[sample * kScalars + kResidual] > Acc(0);
}

// Sums over a row of squares of differences between the last iterate, the one before and that
// before it: Δg and Δr of the newest two, and of the first and the last; then, for the rate of a
// damped solve, Δx of the newest two, and Δg and Δx of the older two.
enum TrailSum {
  kNewValue,
  kNewResidual,
  kFarValue,
  kFarResidual,
  kGainSums,
  kNewState = kGainSums,
  kOldValue,
  kOldState,
  kTrailSums,
};

// Adds the terms of one entry: x and g(x), and the iterates before, newest first; everything
// scaled. Where there is one alone, x2 is x1, and the sums of far and old differences are not used.
// kDamped: false promises that beta is 1; no rate is asked for then.
template <bool kDamped, typename V, typename Acc>
FPI_HOST_DEVICE void add_differences(V* sums, V x, V gx, V x1, V x2, Acc beta, Acc scale) {
  const V dx = scale * (x - x1), dx1 = scale * (x1 - x2), r = scale * (gx - x);
  V r1 = dx, r2 = dx1;
  if constexpr (kDamped) {
    r1 = dx / beta;
    r2 = dx1 / beta;
  }
  // Δg = Δx + Δr
  const V dr = r - r1, dr1 = r1 - r2;
  const V dg = dx + dr, dg1 = dx1 + dr1;
  sums[kNewValue] += dg * dg;
  sums[kNewResidual] += dr * dr;
  sums[kFarValue] += (dg + dg1) * (dg + dg1);
  sums[kFarResidual] += (dr + dr1) * (dr + dr1);
  if constexpr (kDamped) {
    sums[kNewState] += dx * dx;
    sums[kOldValue] += dg1 * dg1;
    sums[kOldState] += dx1 * dx1;
  }
}

// The record of a sample that ended, from those sums; noise is scaled too. A damped x was rounded,
// and residuals and values that are told from it, by Δx/β, are so much the less exact.
template <typename Acc>
FPI_HOST_DEVICE void measure(const Acc* sums, Acc beta, Acc noise, int64_t sample,
                             const Record<Acc>& record) {
  Acc* scalars = record.scalars + sample * kScalars;
  const bool is_long = record.counters[sample * kCounters + kWindow] > 1;
  if (beta < Acc(1)) {
    noise /= beta;
  }
  Acc gain = larger_gain(Acc(0), sums[kNewValue], sums[kNewResidual], noise);
  if (is_long) {
    gain = larger_gain(gain, sums[kFarValue], sums[kFarResidual], noise);
  }
  scalars[kGain] = gain;
  if (beta != Acc(1)) {  // whose residuals do not tell g's rate
    scalars[kRing] = larger_gain(Acc(0), sums[kNewValue], sums[kNewState], noise);
    if (is_long) {
      scalars[kRing + 1] = larger_gain(Acc(0), sums[kOldValue], sums[kOldState], noise);
    }
  }
}

}  // namespace fpi
