// What an Anderson step decides of a sample, and the mixture.
#pragma once

#include "gain.h"
#include "least_squares.h"
#include "window.h"

namespace fpi {

// Squares of an iterate's norms: of r = g(x) − x, of g(x), and of the secant to the iterate before,
// Δg, Δx and Δr, which are there if the window is not empty.
enum AndersonNorm {
  kResidualSquares,
  kValueSquares,
  kValueSecant,
  kStateSecant,
  kResidualSecant,
  kAndersonNorms,
};

// Whether the sums of a step are free of under- and overflow; the trace of its Gram matrix must be
// trusted too. If not, the sums of differences, the matrix and its right-hand side are taken anew
// from the window, scaled by a power of two for the largest entry of residual and differences: the
// weights are free of it. (A square that underflows beside a trace that does not is less than the
// ridge's rounding.)
template <typename Acc>
FPI_HOST_DEVICE bool are_trusted(const Acc* squares, int window) {
  return is_trusted(squares[kResidualSquares]) &&
         (window == 0 || (is_trusted(squares[kValueSecant]) & is_trusted(squares[kStateSecant])));
}

// How iterates are mixed, beside beta: the ridge relative to the trace, the growth of the residual
// that restarts the window, every how many iterations there is a mixture, and whether there is none
// before plain steps have shown themselves to be slow.
template <typename Acc>
struct Mixing {
  Acc ridge, restart;
  int every = 1;
  bool starts_plain = false;
};

constexpr int kMaxRetreats = 3;

// Between two mixtures a plain step follows where the residual is below this many times the last.
constexpr double kGoesOn = 0.999;

// Where g has eigenvalues far below −1, even mixtures grow: beta is halved, at most twice, where
// the residual has not fallen for so long, is so many times the reference, and g has expanded in
// all of the last iterations: these are the least squares of their secant ratios.
constexpr int32_t kSlowIterations = 10, kMaxHalvings = 2;
constexpr double kWorse = 3, kExpands = 2.25;

// counters[kPlain] of a sample that starts with plain steps.
constexpr int32_t kStarting = -(int32_t{1} << 30);

// `differences` below 0 of a decision: the iterate is taken back, see retreat_beta.
struct AndersonDecision {
  int32_t status;   // after this step
  int differences;  // of residuals, from which the weights follow
  bool mixes;       // false: a plain step, and the iterate joins the window
};

template <typename Acc>
FPI_HOST_DEVICE Acc halved(Acc beta, int halvings) {
  for (; halvings > 0; --halvings) {
    beta /= 2;
  }
  return beta;
}

// A sample's own beta.
template <typename Acc>
FPI_HOST_DEVICE Acc beta_of(const int32_t* counters, Acc beta) {
  return halved(beta, counters[kHalvings]);
}

// Whether an iteration mixes by count: so much is known before its residual is. Another one does
// where the residual does not go on falling.
template <typename Acc>
FPI_HOST_DEVICE bool is_due(int32_t plain, const Mixing<Acc>& mixing) {
  return (plain < 0 && plain != kStarting) || plain >= mixing.every - 1;
}
template <typename Acc>
FPI_HOST_DEVICE bool goes_on(Acc residual, Acc last) {
  return residual < Acc(kGoesOn) * last;
}

// Where g or the residual is not finite at a mixture, or the mixture itself is not, the sample goes
// back to the last iterate where they were, in slot counters[kHead]: x ← x' + β r' there, and the
// window starts anew. If g fails again, or failed at such a step, the step is halved: −1 −
// differences times. A sample that ends at that, because it made all its iterations, ends with
// g(x').
template <typename Acc>
FPI_HOST_DEVICE Acc retreat_beta(int differences, Acc beta) {
  return halved(beta, -1 - differences);
}

// Whether g has expanded by that much in each of the last iterations.
template <typename Acc>
FPI_HOST_DEVICE bool has_expanded(const Acc* scalars) {
  bool all = true;
  for (int i = 0; i < kRingLength; ++i) {
    all &= scalars[kRing + i] > Acc(kExpands);
  }
  return all;
}

// Whether three more plain steps would not do, if the residual goes on to fall by that factor.
template <typename Acc>
FPI_HOST_DEVICE bool is_slow(Acc residual, Acc fall, Acc threshold) {
  return !(residual * fall * fall * fall <= threshold);
}

// Ends a sample's iteration by the stop rule: its record but for the window. Where the residual has
// grown too much, where there is no iterate before, or where mixtures were taken back too often,
// the window has no differences. scale: that of the squares of secants.
template <typename T, typename Acc = accumulate_t<T>>
FPI_HOST_DEVICE AndersonDecision decide(Acc residual, Acc value, const Acc* squares, Acc scale,
                                        const Mixing<Acc>& mixing, int m, int64_t sample,
                                        const Record<Acc>& record) {
  int32_t* counters = record.counters + sample * kCounters;
  Acc* scalars = record.scalars + sample * kScalars;
  const int32_t k = iteration_of(sample, record);
  const int32_t window = counters[kWindow], retreats = counters[kRetreats];
  const int32_t plain = counters[kPlain];
  if (!is_finite(residual) || !is_finite(value)) {
    const bool is_mixture = window > 1 && plain <= 0;
    if ((window > 1 || (window == 1 && retreats > 0)) && retreats < kMaxRetreats) {
      const bool ends = k >= limits_of(sample, record).limits.max_iterations;
      counters[kStatus] = ends ? kMaxIterations : kActive;
      counters[kIterations] = k;
      counters[kWindow] = 1;
      counters[kRetreats] = retreats + 1;
      counters[kPlain] = 0;
      return {counters[kStatus], -1 - (is_mixture ? 0 : retreats > 0 ? retreats : 1), true};
    }
  } else if (window > 0) {
    scalars[kRing + (k - 2) % kRingLength] = squares[kValueSecant] / squares[kStateSecant];
    scalars[kGain] = larger_gain(scalars[kGain], squares[kValueSecant], squares[kResidualSecant],
                                 scale * noise_of<T>(value));
  }
  const Acc last = scalars[kResidual], most = mixing.restart * scalars[kReference];
  const bool grown = k > 1 && residual > most && !(last > most);
  const int32_t status = stop(residual, value, sample, record);
  if (status != kActive) {
    return {status, 0, true};
  }
  if (mixing.starts_plain && (window == 0 || plain == kStarting)) {
    // Undamped steps tell by their residuals how many more they would need.
    const bool starts =
        k > 1 && is_slow(residual, residual / last, limits_of(sample, record).threshold(value));
    if (starts) {
      scalars[kReference] = residual;
    }
    counters[kPlain] = starts ? 1 : kStarting;
    return {status, 0, false};
  }
  if (k - counters[kReferenceIteration] >= kSlowIterations &&
      residual > Acc(kWorse) * scalars[kReference] && counters[kHalvings] < kMaxHalvings &&
      has_expanded(scalars)) {
    counters[kHalvings] += 1;
    counters[kReferenceIteration] = k;
  }
  const bool restarts = grown || retreats == kMaxRetreats;
  const bool is_stuck = k > 1 && !goes_on(residual, last);
  const bool mixes = restarts || is_stuck || is_due(plain, mixing);
  if (!mixes) {
    counters[kPlain] = plain + 1;
  } else if (plain > 0 && is_stuck && !restarts && residual >= last) {
    counters[kPlain] = 1 - 2 * m;  // g's plain steps grow: there are none for a while
  } else {
    counters[kPlain] = plain < 0 ? plain + 1 : 0;
  }
  return {status, restarts ? 0 : window < m ? window : m - 1, mixes};
}

// The trace of the differences' Gram matrix below which they say nothing of g; value: ‖g(x)‖,
// scaled.
template <typename T>
FPI_HOST_DEVICE accumulate_t<T> noise_squares_of(accumulate_t<T> value) {
  return noise_of<T>(value) * noise_of<T>(value);
}

// Adds the newest iterate, in slot head, to a window with so many differences then.
FPI_HOST_DEVICE void extend_window(int32_t* counters, int head, int differences) {
  counters[kHead] = head;
  counters[kWindow] = differences + 1;
}

// Likewise at a mixture. Returns the differences in it: 0 where the weights could not be solved
// for, and is a Picard step, by which the window starts anew.
FPI_HOST_DEVICE int update_window(int32_t* counters, int head, int differences, bool is_solved) {
  const int mixed = is_solved ? differences : 0;
  extend_window(counters, head, mixed);
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

// x' + β r' from g' and r', where a sample goes back; at β = 1 g' itself, though r' may have
// overflowed a half type.
template <typename Acc>
FPI_HOST_DEVICE Acc plain_iterate(Acc value, Acc residual, Acc beta) {
  return beta == Acc(1) ? value : damped_mixture(value, residual, beta);
}

}  // namespace fpi
