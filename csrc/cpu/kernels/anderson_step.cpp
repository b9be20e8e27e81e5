#include "anderson_step.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../../math/least_squares.h"
#include "rows.h"

namespace fpi::FPI_CPU_NAMESPACE {
namespace {

// For C successive differences d_j = r_j − r_{j+1} (newest first; residuals holds C+1 rows):
// gram_row[j] = d_0 · d_j and rhs[j] = r_0 · d_j, with newest = r_0 and previous = r_1.
template <int C, typename T>
FPI_HOST_DEVICE void dots(const T* newest, const T* previous, const T* const* residuals, int64_t n,
                          accumulate_t<T>* gram_row, accumulate_t<T>* rhs) {
  using Acc = accumulate_t<T>;
  Vector<Acc> gram[C], right[C];
  for (int j = 0; j < C; ++j) {
    gram[j] = right[j] = Vector<Acc>{};
  }
  for_vectors<T>(n, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
    const Vector<Acc> r = load(newest + i);
    const Vector<Acc> d_new = r - load(previous + i);
    Vector<Acc> younger = load(residuals[0] + i);
    for (int j = 0; j < C; ++j) {
      const Vector<Acc> older = load(residuals[j + 1] + i);
      const Vector<Acc> d = younger - older;
      gram[j] += d_new * d;
      right[j] += r * d;
      younger = older;
    }
  });
  for (int j = 0; j < C; ++j) {
    gram_row[j] = sum<Acc>(gram[j]);
    rhs[j] = sum<Acc>(right[j]);
  }
}

// Four differences a pass keep the sums in registers.
template <typename T>
FPI_HOST_DEVICE void all_dots(const T* const* residuals, int count, int64_t n,
                              accumulate_t<T>* gram_row, accumulate_t<T>* rhs) {
  const T* newest = residuals[0];
  const T* previous = residuals[1];
  int j = 0;
  for (; j + 4 <= count; j += 4) {
    dots<4>(newest, previous, residuals + j, n, gram_row + j, rhs + j);
  }
  switch (count - j) {
    case 3:
      return dots<3>(newest, previous, residuals + j, n, gram_row + j, rhs + j);
    case 2:
      return dots<2>(newest, previous, residuals + j, n, gram_row + j, rhs + j);
    case 1:
      return dots<1>(newest, previous, residuals + j, n, gram_row + j, rhs + j);
    default:
      return;
  }
}

// x ← g_0 − Σ γ_j (g_j − g_{j+1}) − (1 − β)(r_0 − Σ γ_j d_j)
template <bool kDamped, typename T>
FPI_HOST_DEVICE void mix(T* x, const T* const* values, const T* const* residuals, int count,
                         const accumulate_t<T>* gamma, accumulate_t<T> beta, int64_t n) {
  using Acc = accumulate_t<T>;
  const Acc keep = Acc(1) - beta;
  for_vectors<T>(n, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    Vector<Acc> younger = load(values[0] + i);
    Vector<Acc> mixed = younger;
    for (int j = 0; j < count; ++j) {
      const Vector<Acc> older = load(values[j + 1] + i);
      mixed -= gamma[j] * (younger - older);
      younger = older;
    }
    if constexpr (kDamped) {
      Vector<Acc> young_r = load(residuals[0] + i);
      Vector<Acc> least = young_r;
      for (int j = 0; j < count; ++j) {
        const Vector<Acc> old_r = load(residuals[j + 1] + i);
        least -= gamma[j] * (young_r - old_r);
        young_r = old_r;
      }
      mixed -= keep * least;
    }
    store(x + i, mixed);
  });
}

}  // namespace

template <typename T>
Tally anderson_step(T* x, const T* gx, T* out, int64_t n, double beta, double ridge, double restart,
                    const Window<T>& window, const Record<accumulate_t<T>>& record, int64_t begin,
                    int64_t end) {
  using Acc = accumulate_t<T>;
  const int m = window.m;
  Tally tally;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = sample_of(row, record);
    int32_t* counters = record.counters + sample * kCounters;
    if (counters[kStatus] != kActive) {
      continue;
    }
    T* x_row = x + row * n;
    const T* g_row = gx + row * n;
    T* values = window.values + sample * m * n;
    T* residuals = window.residuals + sample * m * n;
    Acc* gram = window.gram + sample * m * m;
    Acc* scalars = record.scalars + sample * kScalars;

    // Push: the new slot gets g(x) and r; norms of r, g and of the secant to the iterate before.
    const int old = counters[kHead];
    const int head = (old + 1) % m;
    T* new_value = values + head * n;
    T* new_residual = residuals + head * n;
    Vector<Acc> rr = {}, gg = {}, dgdg = {}, dxdx = {};
    if (counters[kWindow] > 0) {
      const T* old_value = values + old * n;
      const T* old_residual = residuals + old * n;
      for_vectors<T>(n, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        const Vector<Acc> g = load(g_row + i);
        const Vector<Acc> r = g - load(x_row + i);
        const Vector<Acc> dg = g - load(old_value + i);
        const Vector<Acc> dx = dg - (r - load(old_residual + i));
        store(new_value + i, g);
        store(new_residual + i, r);
        rr += r * r;
        gg += g * g;
        dgdg += dg * dg;
        dxdx += dx * dx;
      });
      scalars[kRing + (record.k - 2) % kRingLength] =
          square_root(sum<Acc>(dgdg)) / square_root(sum<Acc>(dxdx));
    } else {
      for_vectors<T>(n, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        const Vector<Acc> g = load(g_row + i);
        const Vector<Acc> r = g - load(x_row + i);
        store(new_value + i, g);
        store(new_residual + i, r);
        rr += r * r;
        gg += g * g;
      });
    }
    const Acc residual =
        norm_from(sum<Acc>(rr), n, [&](int64_t i) { return residual_at(x_row, g_row, i); });
    const Acc value =
        norm_from(sum<Acc>(gg), n, [&](int64_t i) { return static_cast<Acc>(g_row[i]); });

    const bool grown = record.k > 1 && residual > static_cast<Acc>(restart) * scalars[kReference];
    const int32_t status = stop(residual, value, sample, record);
    if (status != kActive) {
      freeze_row(x_row, g_row, out + sample * n, status, n);
      tally.failed += status != kConverged;
      continue;
    }
    ++tally.active;

    int pairs = grown ? 0 : counters[kWindow];
    pairs = pairs < m ? pairs + 1 : m;
    const int count = pairs - 1;  // differences in the window
    const T* value_of[kMaxHistory];
    const T* residual_of[kMaxHistory];
    int slot_of[kMaxHistory];
    for (int age = 0; age < pairs; ++age) {
      const int slot = head - age < 0 ? head - age + m : head - age;
      slot_of[age] = slot;
      value_of[age] = values + slot * n;
      residual_of[age] = residuals + slot * n;
    }

    // One row of the Gram matrix is new; it is kept by slot, so nothing else moves.
    Acc gamma[kMaxHistory];
    Acc system[kMaxHistory * kMaxHistory];
    if (count > 0) {
      Acc gram_row[kMaxHistory];
      all_dots(residual_of, count, n, gram_row, gamma);
      for (int j = 0; j < count; ++j) {
        gram[head * m + slot_of[j]] = gram_row[j];
        gram[slot_of[j] * m + head] = gram_row[j];
      }
      for (int i = 0; i < count; ++i) {
        for (int j = 0; j <= i; ++j) {
          system[i * count + j] = gram[slot_of[i] * m + slot_of[j]];
        }
      }
    }
    counters[kHead] = head;
    counters[kWindow] = pairs;
    // Differences of residuals at the rounding level of g(x) say nothing of g.
    const Acc noise = kNoise * unit_roundoff<T>() * value;
    if (count > 0 && !ridge_solve(count, system, gamma, static_cast<Acc>(ridge), noise * noise)) {
      counters[kWindow] = 1;  // a Picard step, and the window starts anew from this iterate
      damped_row(x_row, g_row, static_cast<Acc>(beta), n);
    } else if (count == 0) {
      damped_row(x_row, g_row, static_cast<Acc>(beta), n);
    } else if (beta == 1.0) {
      mix<false>(x_row, value_of, residual_of, count, gamma, Acc(1), n);
    } else {
      mix<true>(x_row, value_of, residual_of, count, gamma, static_cast<Acc>(beta), n);
    }
  }
  return tally;
}

#define FPI_INSTANTIATE(T)                                                                \
  template Tally anderson_step(T*, const T*, T*, int64_t, double, double, double,         \
                               const Window<T>&, const Record<accumulate_t<T>>&, int64_t, \
                               int64_t);
FPI_INSTANTIATE(torch::headeronly::Half)
FPI_INSTANTIATE(torch::headeronly::BFloat16)
FPI_INSTANTIATE(float)
FPI_INSTANTIATE(double)
#undef FPI_INSTANTIATE

}  // namespace fpi::FPI_CPU_NAMESPACE
