// What differences of iterates say of g: the gain κ = ‖Δg‖/‖Δr‖, by which ‖g(x) − x̂‖ is estimated
// from ‖r‖ (g(x) − x̂ is to r as Δg is to Δr, for a linear g with one eigenvalue to the letter), and
// the secant ratio ‖Δg‖/‖Δx‖, the rate of g.
#pragma once

#include "accumulate.h"
#include "progress.h"

namespace fpi {

// Residual differences below this say nothing of g: the rounding level of g(x).
template <typename T>
FPI_HOST_DEVICE accumulate_t<T> noise_of(accumulate_t<T> value) {
  return kNoise * unit_roundoff<T>() * value;
}

constexpr double kLeastGain = 0x1p-100;  // of a square: 0 says that nothing is known

// The square of the larger gain: the one known, gain, or that of a pair of iterates, from sums of
// squares of scaled differences; noise is scaled likewise. Nobody needs the root before the solve
// has ended, and a branch would often be foretold wrongly.
template <typename Acc>
FPI_HOST_DEVICE Acc larger_gain(Acc gain, Acc value_squares, Acc residual_squares, Acc noise) {
  const Acc ratio = value_squares / residual_squares;
  const Acc found = ratio > Acc(kLeastGain) ? ratio : Acc(kLeastGain);
  return (residual_squares > noise * noise) & (found > gain) ? found : gain;
}

}  // namespace fpi
