#include "bicgstab_step.h"

#include "dtypes.h"
#include "rows.h"

namespace fpi::FPI_CPU_NAMESPACE {

namespace {

// A row's vectors.
template <typename T>
struct Parts {
  using Acc = accumulate_t<T>;
  T *x, *old, *old_g;
  const T* gx;
  Acc *d, *r, *p, *q;
};

template <typename T>
KrylovStep<accumulate_t<T>> judge(const Parts<T>& row, int64_t n, int64_t sample,
                                  const Record<accumulate_t<T>>& record, accumulate_t<T>* numbers) {
  using Acc = accumulate_t<T>;
  Vector<Acc> squares[2] = {};  // of ‖g(x) − x‖ and ‖g(x)‖
  for_vectors<T>(n, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
    const Vector<Acc> g = load(row.gx + i);
    const Vector<Acc> r = g - load(row.x + i);
    squares[0] += r * r;
    squares[1] += g * g;
  });
  Acc square[2];
  sums<2>(squares, square);
  return after_iterate(residual_norm(square[0], row.x, row.gx, n), value_norm(square[1], row.gx, n),
                       sample, record, numbers);
}

template <typename T>
KrylovStep<accumulate_t<T>> take(const Parts<T>& row, int64_t n, int64_t sample,
                                 const Record<accumulate_t<T>>& record, accumulate_t<T>* numbers) {
  using Acc = accumulate_t<T>;
  const Acc inverse = 1 / numbers[kStep], unit = numbers[kUnit];
  Vector<Acc> products[kKrylovSums] = {};
  for_vectors<T>(n, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
    add_products(products, load(row.x + i), load(row.gx + i), load(row.old + i),
                 load(row.old_g + i), load(row.d + i), load(row.r + i), inverse, unit);
  });
  Acc sum[kKrylovSums];
  sums<kKrylovSums>(products, sum);
  return after_direction<T>(sum, sample, record, numbers);
}

// x and the vectors, as the step says.
template <typename T>
void move_row(const Parts<T>& row, int64_t n, const KrylovStep<accumulate_t<T>>& step) {
  using Acc = accumulate_t<T>;
  switch (step.move) {
    case kToBaseValue:
    case kToBase:
    case kToValue:
      memcpy(row.x,
             step.move == kToValue  ? row.gx
             : step.move == kToBase ? row.old
                                    : row.old_g,
             n * sizeof(T));
      return;
    case kBegin:
      memcpy(row.old, row.x, n * sizeof(T));
      memcpy(row.old_g, row.gx, n * sizeof(T));
      for_vectors<T>(n, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        const Vector<Acc> x = load(row.x + i), r = step.unit * (load(row.gx + i) - x);
        store(row.d + i, Vector<Acc>{});
        store(row.r + i, r);
        store(row.p + i, r);
        store(row.x + i, x + step.tau * r);
      });
      return;
    case kToSolution:
      if (step.length == Acc(0)) {  // what g gave may be anything
        for_vectors<T>(n, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
          store(row.x + i, load(row.old + i) + load(row.d + i) / step.unit);
        });
        return;
      }
      break;
    default:
      break;
  }
  for_vectors<T>(n, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    KrylovEntry<Vector<Acc>, Acc> entry = {load(row.d + i), load(row.r + i), {}, {}};
    if (step.move == kTakeS) {
      entry.p = load(row.p + i);
      entry.q = load(row.q + i);
    }
    const Vector<Acc> x = entry.after(step, load(row.x + i), load(row.gx + i), load(row.old + i),
                                      load(row.old_g + i));
    store(row.x + i, x);
    if (step.move == kToSolution) {
      return;
    }
    store(row.d + i, entry.d);
    store(row.r + i, entry.r);
    if (step.move == kTakeP) {
      store(row.q + i, entry.q);
    } else {
      store(row.p + i, entry.p);
    }
  });
}

}  // namespace

template <typename T>
Tally bicgstab_step(T* x, const T* gx, T* out, int64_t n, const Krylov<T>& krylov,
                    const Record<accumulate_t<T>>& record, int64_t begin, int64_t end) {
  Tally tally;
  for (int64_t number = begin; number < end; ++number) {
    const int64_t sample = sample_of(number, record);
    const int32_t* counters = record.counters + sample * kCounters;
    if (counters[kStatus] != kActive) {
      continue;
    }
    const Parts<T> row = {.x = x + number * n,
                          .old = krylov.state(sample, kBase, n),
                          .old_g = krylov.state(sample, kBaseValue, n),
                          .gx = gx + number * n,
                          .d = krylov.vector(sample, kBeyond, n),
                          .r = krylov.vector(sample, kRest, n),
                          .p = krylov.vector(sample, kP, n),
                          .q = krylov.vector(sample, kQ, n)};
    const auto advance = counters[kWindow] == kIterate ? judge<T> : take<T>;
    const auto step = advance(row, n, sample, record, krylov.of(sample));
    if (step.status == kActive) {
      move_row(row, n, step);
      ++tally.active;
      continue;
    }
    freeze_row(row.x, row.gx, out + sample * n, step.status, n);
    tally.failed += step.status != kConverged;
  }
  return tally;
}

#define FPI_INSTANTIATE(T)                                                  \
  template Tally bicgstab_step(T*, const T*, T*, int64_t, const Krylov<T>&, \
                               const Record<accumulate_t<T>>&, int64_t, int64_t);
FPI_FOR_DTYPES(FPI_INSTANTIATE)
#undef FPI_INSTANTIATE

}  // namespace fpi::FPI_CPU_NAMESPACE
