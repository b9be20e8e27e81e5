#include "picard_step.h"

#include "dtypes.h"
#include "rows.h"

namespace fpi::FPI_CPU_NAMESPACE {

template <typename T>
Tally picard_step(T* x, const T* gx, T* out, int64_t n, double beta,
                  const Record<accumulate_t<T>>& record, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  Tally tally;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = sample_of(row, record);
    if (record.counters[sample * kCounters + kStatus] != kActive) {
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
    const Acc residual =
        norm_from(square[0], n, [&](int64_t i) { return residual_at(x_row, g_row, i); });
    const Acc value =
        norm_from(square[1], n, [&](int64_t i) { return static_cast<Acc>(g_row[i]); });

    const int32_t k = iteration_of(sample, record);
    record.scalars[sample * kScalars + kRing + (k - 1) % kRingLength] = residual;
    const int32_t status = stop(residual, value, sample, record);
    if (status == kActive) {
      damped_row(x_row, g_row, static_cast<Acc>(beta), n);
      ++tally.active;
    } else {
      freeze_row(x_row, g_row, out + sample * n, status, n);
      tally.failed += status != kConverged;
    }
  }
  return tally;
}

#define FPI_INSTANTIATE(T)                                                                      \
  template Tally picard_step(T*, const T*, T*, int64_t, double, const Record<accumulate_t<T>>&, \
                             int64_t, int64_t);
FPI_FOR_DTYPES(FPI_INSTANTIATE)
#undef FPI_INSTANTIATE

}  // namespace fpi::FPI_CPU_NAMESPACE
