// What an Anderson step decides of a sample, and the mixture.
#pragma once

#include "accumulate.h"
#include "least_squares.h"
#include "window.h"

namespace fpi {

// Squares of an iterate's norms: of r = g(x) − x, of g(x), and of the secant to the iterate before,
// Δg and Δx, which are there if the window is not empty.
enum AndersonNorm { kResidualSquares, kValueSquares, kValueSecant, kStateSecant, kAndersonNorms };

struct AndersonDecision {
  int32_t status;   // after this step
  int differences;  // of residuals, from which the weights follow
};

// Ends a sample's iteration by the stop rule: its record but for the window. Where the residual has
// grown too much, or there is no iterate before, the window has no differences.
template <typename Acc>
FPI_HOST_DEVICE AndersonDecision decide(Acc residual, Acc value, const Acc* squares, Acc restart,
                                        int m, int64_t sample, const Record<Acc>& record) {
  Acc* scalars = record.scalars + sample * kScalars;
  const int32_t k = iteration_of(sample, record);
  const int32_t window = record.counters[sample * kCounters + kWindow];
  if (window > 0) {
    scalars[kRing + (k - 2) % kRingLength] =
        square_root(squares[kValueSecant]) / square_root(squares[kStateSecant]);
  }
  const bool grown = k > 1 && residual > restart * scalars[kReference];
  const int32_t status = stop(residual, value, sample, record);
  return {status, grown ? 0 : window < m ? window : m - 1};
}

// Differences of residuals say nothing of g where the trace of their Gram matrix is below this: the
// rounding level of g(x).
template <typename T>
FPI_HOST_DEVICE accumulate_t<T> noise_of(accumulate_t<T> value) {
  const accumulate_t<T> rounding = kNoise * unit_roundoff<T>() * value;
  return rounding * rounding;
}

// Adds the newest iterate, in slot head, to the window. Returns the differences in the mixture: 0
// where the weights could not be solved for, and is a Picard step, by which the window starts anew.
FPI_HOST_DEVICE int update_window(int32_t* counters, int head, int differences, bool is_solved) {
  const int mixed = is_solved ? differences : 0;
  counters[kHead] = head;
  counters[kWindow] = mixed + 1;
  return mixed;
}

// The mixture x ← g_0 − Σ γ_j (g_j − g_{j+1}) − (1 − β)(r_0 − Σ γ_j (r_j − r_{j+1})), newest first,
// in parts. V is a number, or a vector of them.

// The next term of v_0 − Σ γ_j (v_j − v_{j+1}): sum and younger begin as v_0.
template <typename V, typename Acc>
FPI_HOST_DEVICE void mix_in(V& sum, V& younger, Acc gamma, V older) {
  sum -= gamma * (younger - older);
  younger = older;
}

// x, from such sums of the values and of the residuals; at β = 1 it is that of the values.
template <typename V, typename Acc>
FPI_HOST_DEVICE V damped_mixture(V values, V residuals, Acc beta) {
  return values - (Acc(1) - beta) * residuals;
}

}  // namespace fpi
