// BiCGSTAB for u = M u + v, one product M y a step: what it decides of a sample, and its formulas
// entry by entry. fpi_cuda/backends/krylov.py says what they are, and lays the tensors out.
#pragma once

#include "gain.h"

namespace fpi {

// What a row of x is, in counters[kWindow].
enum KrylovPhase : int32_t { kIterate, kFirst, kSecond };

// Columns of numbers, [B, kKrylovNumbers]: the unit, as what residuals are multiplied by; τ, as
// what a direction is; ρ and α of the last p; the norms of p and (1 − M) p.
enum KrylovNumber { kUnit, kStep, kRho, kAlpha, kPNorm, kQNorm, kKrylovNumbers };

// Of base: the last iterate that was judged, x′, and g(x′). Of vectors, in the unit: what the
// solution is beyond x′; its residual; p; (1 − M) p.
enum KrylovState { kBase, kBaseValue, kKrylovStates };
enum KrylovVector { kBeyond, kRest, kP, kQ, kKrylovVectors };

constexpr double kSlant = 0.7;  // the least cosine between s and (1 − M) s that ω is taken by
constexpr int kLost = 32;       // so many roundings of its terms: a square of a norm is unknown

template <typename T>
struct Krylov {
  using Acc = accumulate_t<T>;

  T* base;       // [B, kKrylovStates, n]
  Acc* vectors;  // [B, kKrylovVectors, n]
  Acc* numbers;  // [B, kKrylovNumbers]

  FPI_HOST_DEVICE T* state(int64_t sample, int which, int64_t n) const {
    return base + (sample * kKrylovStates + which) * n;
  }
  FPI_HOST_DEVICE Acc* vector(int64_t sample, int which, int64_t n) const {
    return vectors + (sample * kKrylovVectors + which) * n;
  }
  FPI_HOST_DEVICE Acc* of(int64_t sample) const { return numbers + sample * kKrylovNumbers; }
};

// What becomes of a row.
enum KrylovMove : int32_t {
  kEnd,          // its result, by the status
  kBegin,        // x is x′ from now on, and its residual p
  kTakeP,        // the step along p; then s
  kTakeS,        // the step along s; then p
  kToSolution,   // the step, if any; then the solution is judged
  kToBaseValue,  // g(x′) is judged
  kToBase,       // x′ is
  kToValue,      // g(x) is
};

template <typename Acc>
struct KrylovStep {
  int32_t status, move;
  Acc length, factor;  // α or ω; β
  Acc inverse;         // 1 / τ of this direction
  Acc tau, unit;       // of the next one
};

// Sums over a row, of y, M y, z = (1 − M) y, r, r̂ = g(x′) − x′ and the solution, in the unit.
enum KrylovSum { kYY, kMM, kZZ, kHZ, kHR, kRZ, kRR, kThere, kKrylovSums };

// Adds the terms of one entry; old and old_g: of x′ and g(x′).
template <typename V, typename Acc>
FPI_HOST_DEVICE void add_products(V* sums, V x, V gx, V old, V old_g, V d, V r, Acc inverse,
                                  Acc unit) {
  const V y = inverse * (x - old), my = inverse * (gx - old_g), z = y - my;
  const V hat = unit * (old_g - old), there = unit * old + d;
  sums[kYY] += y * y;
  sums[kMM] += my * my;
  sums[kZZ] += z * z;
  sums[kHZ] += hat * z;
  sums[kHR] += hat * r;
  sums[kRZ] += r * z;
  sums[kRR] += r * r;
  sums[kThere] += there * there;
}

// Where the last product is next, of an iterate.
template <typename Acc>
FPI_HOST_DEVICE bool is_last(int64_t sample, const Record<Acc>& record) {
  return record.counters[sample * kCounters + kIterations] + 1 >=
         limits_of(sample, record).limits.max_iterations;
}

// The power of two by which a norm comes near 1; 1 where none does.
template <typename Acc>
FPI_HOST_DEVICE Acc power_for(Acc norm) {
  return norm > Acc(0) && is_finite(norm) ? scale_for(norm) : Acc(1);
}

// After g of an iterate: ends the sample's solve by the stop rule, or begins at x.
template <typename Acc>
FPI_HOST_DEVICE KrylovStep<Acc> after_iterate(Acc residual, Acc value, int64_t sample,
                                              const Record<Acc>& record, Acc* numbers) {
  KrylovStep<Acc> step = {};
  step.status = stop(residual, value, sample, record);
  if (step.status != kActive) {
    step.move = kEnd;
    return step;
  }
  const bool last = is_last(sample, record);
  step.move = last ? kToValue : kBegin;
  step.unit = power_for(residual);
  step.tau = step.unit * residual;  // ‖p‖
  numbers[kPNorm] = step.tau;
  step.tau = power_for(step.tau) / power_for(value + residual);
  numbers[kUnit] = step.unit;
  numbers[kStep] = step.tau;
  record.counters[sample * kCounters + kWindow] = last ? kIterate : kFirst;
  return step;
}

// After the product of a direction, from its sums. T: the state's type.
template <typename T, typename Acc>
FPI_HOST_DEVICE KrylovStep<Acc> after_direction(const Acc* sums, int64_t sample,
                                                const Record<Acc>& record, Acc* numbers) {
  int32_t* counters = record.counters + sample * kCounters;
  Acc* scalars = record.scalars + sample * kScalars;
  const bool first = counters[kWindow] == kFirst;
  constexpr Acc kEps = 2 * unit_roundoff<Acc>();
  const Acc rr = sums[kRR], rz = sums[kRZ], zz = sums[kZZ], hz = sums[kHZ], hr = sums[kHR];
  const Acc z_norm = square_root(zz), r_norm = square_root(rr);
  KrylovStep<Acc> step = {.status = kActive,
                          .move = kEnd,
                          .length = 0,
                          .factor = 0,
                          .inverse = 1 / numbers[kStep],
                          .tau = 0,
                          .unit = numbers[kUnit]};
  const Acc start = step.unit * scalars[kResidual];  // ‖r̂‖
  const auto absolute = [](Acc a) { return a < 0 ? -a : a; };
  bool sound = true;
  if (first) {
    step.length = hr / hz;
    sound = absolute(hz) > kEps * start * z_norm;
  } else {
    const Acc least = Acc(kSlant) * r_norm * z_norm;
    const Acc along = absolute(rz) > least ? absolute(rz) : least;
    step.length = (rz < 0 ? -along : along) / zz;
  }
  const Acc noise = step.inverse * noise_of<T>(scalars[kValue]);
  sound = sound && z_norm > noise && is_finite(step.length);
  Acc square = rr, terms = rr;
  if (sound) {
    const Acc added = step.length * step.length * zz;
    square = rr - 2 * step.length * rz + added;
    terms = rr + added;
  } else {
    step.length = 0;
  }
  const bool lost = square <= kLost * kEps * terms;
  const Acc norm = lost ? Acc(0) : square_root(square);
  const Acc rho = hr - step.length * hz;
  if (!first) {
    step.factor = rho / numbers[kRho] * (numbers[kAlpha] / step.length);
    sound = sound && absolute(rho) > kEps * start * norm && is_finite(step.factor);
  }
  sound = sound && norm <= Acc(kGrowth) * start;

  const Acc there = square_root(sums[kThere]) / step.unit;
  const bool better = norm <= Acc(kFall) * start;
  const bool met = better && norm <= step.unit * limits_of(sample, record).threshold(there);
  const int32_t k = counters[kIterations] + 1;
  counters[kIterations] = k;
  const bool last = is_last(sample, record);
  if (!sound || met || lost || last) {
    step.move = better ? kToSolution : last ? kToBase : kToBaseValue;
    counters[kWindow] = kIterate;
  } else {
    step.move = first ? kTakeP : kTakeS;
    counters[kWindow] = first ? kSecond : kFirst;
    if (first) {
      numbers[kPNorm] = square_root(sums[kYY]);
      numbers[kQNorm] = z_norm;
      numbers[kRho] = hr;
      numbers[kAlpha] = step.length;
    } else {  // a bound of the new ‖p‖
      numbers[kPNorm] = norm + absolute(step.factor) *
                                   (numbers[kPNorm] + absolute(step.length) * numbers[kQNorm]);
    }
    step.tau =
        power_for(first ? norm : numbers[kPNorm]) / power_for(scalars[kValue] + scalars[kResidual]);
    numbers[kStep] = step.tau;
  }
  if (sums[kYY] > 0 && is_finite(sums[kMM] + zz)) {
    scalars[kRing + (k - 2) % kRingLength] = sums[kMM] / sums[kYY];
    scalars[kGain] = larger_gain(scalars[kGain], sums[kMM], zz, noise);
  }
  return step;
}

// One entry of a row that iterates: after() of what is loaded, then what is to be stored.
template <typename V, typename Acc>
struct KrylovEntry {
  V d, r, p, q;

  // Takes the step along a direction; returns what x is next, beside a move that copies.
  FPI_HOST_DEVICE V after(const KrylovStep<Acc>& step, V x, V gx, V old, V old_g) {
    const V y = step.inverse * (x - old), z = y - step.inverse * (gx - old_g);
    d += step.length * y;
    if (step.move == kToSolution) {
      return old + d / step.unit;
    }
    r -= step.length * z;
    if (step.move == kTakeP) {
      q = z;
      return old + step.tau * r;
    }
    p = r + step.factor * (p - step.length * q);
    return old + step.tau * p;
  }
};

}  // namespace fpi
