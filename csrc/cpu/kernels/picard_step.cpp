#include "picard_step.h"

#include "../../math/picard.h"
#include "dtypes.h"
#include "rows.h"

namespace fpi::FPI_CPU_NAMESPACE {

namespace {

// What the last iterates of a sample that ended say of g; see csrc/math/picard.h.
template <bool kDamped, typename T>
__attribute__((noinline)) void measure_row(const T* x, const T* gx, int64_t n, accumulate_t<T> beta,
                                           const Trail<T>& trail, int64_t row, int64_t sample,
                                           const Record<accumulate_t<T>>& record) {
  using Acc = accumulate_t<T>;
  constexpr int kSums = kDamped ? 8 : kGainSums;  // a power of two
  static_assert(kTrailSums <= 8 && kGainSums == 4);
  const int32_t* counters = record.counters + sample * kCounters;
  const Acc* scalars = record.scalars + sample * kScalars;
  const int newest = counters[kHead], older = counters[kWindow] > 1 ? 1 - newest : newest;
  const T* x1 = trail.state(row, sample, newest, n);
  const T* x2 = trail.state(row, sample, older, n);
  const Acc scale = scale_for(scalars[kResidual]);
  Vector<Acc> squares[kSums] = {};
  for_vectors<T>(n, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
    add_differences<kDamped>(squares, load(x + i), load(gx + i), load(x1 + i), load(x2 + i), beta,
                             scale);
  });
  Acc sum[kTrailSums > kSums ? kTrailSums : kSums] = {};
  sums<kSums>(squares, sum);
  measure(sum, beta, scale * noise_of<T>(scalars[kValue]), sample, record);
}

}  // namespace

template <typename T>
Tally picard_step(T* x, const T* gx, T* out, int64_t n, double beta, const Trail<T>& trail,
                  const Record<accumulate_t<T>>& record, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  Tally tally;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = sample_of(row, record);
    const int32_t* counters = record.counters + sample * kCounters;
    if (counters[kStatus] != kActive) {
      continue;
    }
    T* x_row = x + row * n;
    const T* g_row = gx + row * n;

    Vector<Acc> squares[2] = {};  // of ‖g(x) − x‖ and ‖g(x)‖
    for_vectors<T>(n, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
      const Vector<Acc> g = load(g_row + i);
      const Vector<Acc> r = g - load(x_row + i);
      squares[0] += r * r;
      squares[1] += g * g;
    });
    Acc square[2];
    sums<2>(squares, square);
    const Acc residual = residual_norm(square[0], x_row, g_row, n);
    const Acc value = value_norm(square[1], g_row, n);

    const auto [status, keeps] = decide(residual, value, static_cast<Acc>(beta), sample, record);
    if (status == kActive) {
      if (keeps && trail.states != nullptr) {
        memcpy(trail.state(row, sample, counters[kHead], n), x_row, n * sizeof(T));
      }
      damped_row(x_row, g_row, static_cast<Acc>(beta), n);
      ++tally.active;
      continue;
    }
    if (trail.states != nullptr && has_trail(status, sample, record)) {
      const auto run = beta == 1.0 ? measure_row<false, T> : measure_row<true, T>;
      run(x_row, g_row, n, static_cast<Acc>(beta), trail, row, sample, record);
    }
    freeze_row(x_row, g_row, out + sample * n, status, n);
    tally.failed += status != kConverged;
  }
  return tally;
}

#define FPI_INSTANTIATE(T)                                                       \
  template Tally picard_step(T*, const T*, T*, int64_t, double, const Trail<T>&, \
                             const Record<accumulate_t<T>>&, int64_t, int64_t);
FPI_FOR_DTYPES(FPI_INSTANTIATE)
#undef FPI_INSTANTIATE

}  // namespace fpi::FPI_CPU_NAMESPACE
