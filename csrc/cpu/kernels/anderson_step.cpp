#include "anderson_step.h"

#include <type_traits>

#include "../../math/anderson.h"
#include "dtypes.h"
#include "rows.h"

namespace fpi::FPI_CPU_NAMESPACE {
namespace {

// The rows of a ring from its newest on, by age.
template <typename T>
struct Aged {
  const T* rows[kMaxHistory];

  Aged(const T* ring, int head, int count, int m, int64_t n) {
    for (int age = 0; age < count; ++age) {
      rows[age] = ring + slot_of(age, head, m) * n;
    }
  }
};

// For C successive differences d_j = r_j − r_{j+1} (newest first; residuals holds C+1 rows):
// gram_row[j] = d_0 · d_j and rhs[j] = r_0 · d_j, with newest = r_0 and previous = r_1.
template <int C, typename T>
FPI_HOST_DEVICE void dots(const T* newest, const T* previous, const T* const* residuals, int64_t n,
                          accumulate_t<T>* gram_row, accumulate_t<T>* rhs) {
  using Acc = accumulate_t<T>;
  constexpr int kHalf = C == 3 ? 4 : C;
  Vector<Acc> products[2 * kHalf] = {};
  for_vectors<T>(n, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
    const Vector<Acc> r = load(newest + i);
    const Vector<Acc> d_new = r - load(previous + i);
    Vector<Acc> younger = load(residuals[0] + i);
    for (int j = 0; j < C; ++j) {
      const Vector<Acc> older = load(residuals[j + 1] + i);
      const Vector<Acc> d = younger - older;
      products[j] += d_new * d;
      products[kHalf + j] += r * d;
      younger = older;
    }
  });
  Acc sum[2 * kHalf];
  sums<2 * kHalf>(products, sum);
  for (int j = 0; j < C; ++j) {
    gram_row[j] = sum[j];
    rhs[j] = sum[kHalf + j];
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

// The mixture of csrc/math/anderson.h, to x.
template <bool kDamped, typename T, typename Size>
FPI_HOST_DEVICE void mix(T* x, const T* const* values, const T* const* residuals, Size count,
                         const accumulate_t<T>* gamma, accumulate_t<T> beta, int64_t n) {
  using Acc = accumulate_t<T>;
  for_vectors<T>(n, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    const auto combined = [&](const T* const* rows) __attribute__((always_inline)) {
      Vector<Acc> younger = load(rows[0] + i), sum = younger;
      for (int j = 0; j < count; ++j) {
        mix_in(sum, younger, gamma[j], load(rows[j + 1] + i));
      }
      return sum;
    };
    Vector<Acc> mixed = combined(values);
    if constexpr (kDamped) {
      mixed = damped_mixture(mixed, combined(residuals), beta);
    }
    store(x + i, mixed);
  });
}

// Asks for memory that is wanted soon. Rows of a few cache lines are over before the processor has
// found out that it reads on.
FPI_HOST_DEVICE void prefetch(const void* begin, int64_t bytes) {
  const char* p = static_cast<const char*>(begin);
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(p + i);
  }
}

// One iterate's value and residual to the window's slot `head`, and the squares of its norms.
template <bool kHasOlder, typename T>
FPI_HOST_DEVICE void push(const T* x, const T* gx, T* values, T* residuals, int64_t n, int old,
                          int head, accumulate_t<T>* square) {
  using Acc = accumulate_t<T>;
  Vector<Acc> squares[kAndersonNorms] = {};
  for_vectors<T>(n, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    const Vector<Acc> g = load(gx + i);
    const Vector<Acc> r = g - load(x + i);
    if constexpr (kHasOlder) {
      const Vector<Acc> dg = g - load(values + old * n + i);
      const Vector<Acc> dx = dg - (r - load(residuals + old * n + i));
      squares[kValueSecant] += dg * dg;
      squares[kStateSecant] += dx * dx;
    }
    store(values + head * n + i, g);
    store(residuals + head * n + i, r);
    squares[kResidualSquares] += r * r;
    squares[kValueSquares] += g * g;
  });
  sums<kAndersonNorms>(squares, square);
}

}  // namespace

template <typename T>
Tally anderson_step(T* x, const T* gx, T* out, int64_t n, double beta, double ridge, double restart,
                    const Window<T>& window, const Record<accumulate_t<T>>& record, int64_t begin,
                    int64_t end) {
  using Acc = accumulate_t<T>;
  // The systems of a team of samples are solved together, one a lane.
  constexpr int kTeam = kLanes<Acc>;
  constexpr int kMaxSize = kMaxHistory - 1;
  constexpr int64_t kShortRow = 1024;  // bytes
  const int m = window.m, size = m - 1;
  Vector<Acc> gamma[kMaxSize], system[kMaxSize * kMaxSize];
  struct {
    int64_t row, sample, place;  // in x, in the record, of its window
    int head, count;             // its window's newest slot, and differences
  } team[kTeam];
  for (int i = 0; i < size * size; ++i) {
    system[i] = Vector<Acc>{};
  }
  for (int i = 0; i < size; ++i) {
    gamma[i] = Vector<Acc>{};
  }

  Tally tally;
  int64_t row = begin;
  while (row < end) {
    Vector<Acc> trace = {}, noise = {};
    int members = 0;
    for (; row < end && members < kTeam; ++row) {
      const int64_t sample = sample_of(row, record);
      int32_t* counters = record.counters + sample * kCounters;
      if (counters[kStatus] != kActive) {
        continue;
      }
      T* x_row = x + row * n;
      const T* g_row = gx + row * n;
      const int64_t place = window.place(row, sample);
      T* values = window.values + place * m * n;
      T* residuals = window.residuals + place * m * n;
      if (n * static_cast<int64_t>(sizeof(T)) <= kShortRow) {
        prefetch(values, m * n * sizeof(T));  // for the mixture
        if (row + 1 < end) {
          const int64_t next = window.place(row + 1, sample_of(row + 1, record));
          prefetch(window.residuals + next * m * n, m * n * sizeof(T));
        }
      }
      const int old = counters[kHead], head = old + 1 == m ? 0 : old + 1;
      Acc squares[kAndersonNorms];
      if (counters[kWindow] > 0) {
        push<true>(x_row, g_row, values, residuals, n, old, head, squares);
      } else {
        push<false>(x_row, g_row, values, residuals, n, old, head, squares);
      }
      const Acc residual = norm_from(squares[kResidualSquares], n,
                                     [&](int64_t i) { return residual_at(x_row, g_row, i); });
      const Acc value = norm_from(squares[kValueSquares], n,
                                  [&](int64_t i) { return static_cast<Acc>(g_row[i]); });
      const auto [status, count] =
          decide(residual, value, squares, static_cast<Acc>(restart), m, sample, record);
      if (status != kActive) {
        freeze_row(x_row, g_row, out + sample * n, status, n);
        tally.failed += status != kConverged;
        continue;
      }
      ++tally.active;
      const int lane = members++;
      team[lane] = {row, sample, place, head, count};

      // One row of the Gram matrix is new; it is kept by slot, so nothing else moves.
      Acc gram_row[kMaxHistory], rhs[kMaxHistory];
      if (count > 0) {
        all_dots(Aged<T>(residuals, head, count + 1, m, n).rows, count, n, gram_row, rhs);
      }
      Acc* gram = window.gram + place * m * m;
      Acc sum = 0;
      for (int i = 0; i < size; ++i) {
        const bool there = i < count;
        const int slot = slot_of(i, head, m);
        if (there) {
          gram[head * m + slot] = gram[slot * m + head] = gram_row[i];
          sum += gram[slot * m + slot];
        }
        for (int j = 0; j < i; ++j) {
          system[i * size + j][lane] = there ? gram[slot * m + slot_of(j, head, m)] : Acc(0);
        }
        system[i * size + i][lane] = there ? gram[slot * m + slot] : Acc(1);
        gamma[i][lane] = there ? rhs[i] : Acc(0);
      }
      trace[lane] = sum;
      noise[lane] = noise_of<T>(value);
    }

    const auto solved =
        size == 4 ? ridge_solve(std::integral_constant<int, 4>{}, system, gamma, trace,
                                static_cast<Acc>(ridge), noise)
                  : ridge_solve(size, system, gamma, trace, static_cast<Acc>(ridge), noise);
    for (int lane = 0; lane < members; ++lane) {
      const auto [at, sample, place, head, differences] = team[lane];
      T* x_row = x + at * n;
      const int count =
          update_window(record.counters + sample * kCounters, head, differences, solved[lane] != 0);
      if (count == 0) {
        damped_row(x_row, gx + at * n, static_cast<Acc>(beta), n);
        continue;
      }
      Acc weights[kMaxSize];
      for (int j = 0; j < count; ++j) {
        weights[j] = gamma[j][lane];
      }
      const Aged<T> values(window.values + place * m * n, head, count + 1, m, n);
      const Aged<T> residuals(window.residuals + place * m * n, head, count + 1, m, n);
      if (beta != 1.0) {
        mix<true>(x_row, values.rows, residuals.rows, count, weights, static_cast<Acc>(beta), n);
      } else if (count == 4) {
        mix<false>(x_row, values.rows, residuals.rows, std::integral_constant<int, 4>{}, weights,
                   Acc(1), n);
      } else {
        mix<false>(x_row, values.rows, residuals.rows, count, weights, Acc(1), n);
      }
    }
  }
  return tally;
}

#define FPI_INSTANTIATE(T)                                                                \
  template Tally anderson_step(T*, const T*, T*, int64_t, double, double, double,         \
                               const Window<T>&, const Record<accumulate_t<T>>&, int64_t, \
                               int64_t);
FPI_FOR_DTYPES(FPI_INSTANTIATE)
#undef FPI_INSTANTIATE

}  // namespace fpi::FPI_CPU_NAMESPACE
