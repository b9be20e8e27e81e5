#include "anderson_step.h"

#include <cstdlib>
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
// gram_row[j] = d_0 · d_j and rhs[j] = r_0 · d_j, with newest = r_0 and previous = r_1, of
// residuals that are multiplied by scale first if kScaled.
template <bool kScaled, int C, typename T>
FPI_HOST_DEVICE void dots(const T* newest, const T* previous, const T* const* residuals, int64_t n,
                          accumulate_t<T> scale, accumulate_t<T>* gram_row, accumulate_t<T>* rhs) {
  using Acc = accumulate_t<T>;
  constexpr int kHalf = C == 3 ? 4 : C;
  Vector<Acc> products[2 * kHalf] = {};
  for_vectors<T>(n, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
    const auto scaled = [&](const T* p) __attribute__((always_inline)) {
      if constexpr (kScaled) {
        return scale * load(p);
      } else {
        return load(p);
      }
    };
    const Vector<Acc> r = scaled(newest + i);
    const Vector<Acc> d_new = r - scaled(previous + i);
    Vector<Acc> younger = scaled(residuals[0] + i);
    for (int j = 0; j < C; ++j) {
      const Vector<Acc> older = scaled(residuals[j + 1] + i);
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
template <bool kScaled, typename T>
FPI_HOST_DEVICE void all_dots(const T* const* residuals, int count, int64_t n,
                              accumulate_t<T> scale, accumulate_t<T>* gram_row,
                              accumulate_t<T>* rhs) {
  const auto some = [&](auto size, int j) __attribute__((always_inline)) {
    dots<kScaled, size.value>(residuals[0], residuals[1], residuals + j, n, scale, gram_row + j,
                              rhs + j);
  };
  int j = 0;
  for (; j + 4 <= count; j += 4) {
    some(std::integral_constant<int, 4>{}, j);
  }
  switch (count - j) {
    case 3:
      return some(std::integral_constant<int, 3>{}, j);
    case 2:
      return some(std::integral_constant<int, 2>{}, j);
    case 1:
      return some(std::integral_constant<int, 1>{}, j);
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

// The squares of an iterate's norms. r is g(x) − x, with older those of the iterate before.
template <bool kHasOlder, typename V>
FPI_HOST_DEVICE void add_squares(V* squares, V g, V r, V older_g, V older_r) {
  if constexpr (kHasOlder) {
    const V dg = g - older_g, dr = r - older_r, dx = dg - dr;
    squares[kValueSecant] += dg * dg;
    squares[kStateSecant] += dx * dx;
    squares[kResidualSecant] += dr * dr;
  }
  squares[kResidualSquares] += r * r;
  squares[kValueSquares] += g * g;
}

constexpr int kSquares = 8;  // vectors that are folded together: a power of two
static_assert(kAndersonNorms <= kSquares);

// One iterate's value and residual to the window's slot `head`, and the squares of its norms.
template <bool kHasOlder, typename T>
FPI_HOST_DEVICE void push(const T* x, const T* gx, T* values, T* residuals, int64_t n, int old,
                          int head, accumulate_t<T>* square) {
  using Acc = accumulate_t<T>;
  Vector<Acc> squares[kSquares] = {};
  for_vectors<T>(n, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    const Vector<Acc> g = load(gx + i);
    const Vector<Acc> r = g - load(x + i);
    Vector<Acc> older_g = {}, older_r = {};
    if constexpr (kHasOlder) {
      older_g = load(values + old * n + i);
      older_r = load(residuals + old * n + i);
    }
    add_squares<kHasOlder>(squares, g, r, older_g, older_r);
    store(values + head * n + i, g);
    store(residuals + head * n + i, r);
  });
  sums<4>(squares, square);
  if constexpr (kHasOlder) {
    sums<1>(squares + 4, square + 4);
  }
}

// A row and its sample's window, as the seldom ways of a step take them.
template <typename T>
struct RowWindow {
  const T *x, *gx;
  const T *values, *residuals;  // [m, n]
  int64_t n;
  int m, head;
};

// Where sums can't be trusted: the power of two by which residual and differences, count of them,
// come near 1, and the squares of secants so scaled. 1 where there is nothing to scale.
template <typename T>
__attribute__((noinline)) accumulate_t<T> rescale(const RowWindow<T>& row, int count,
                                                  accumulate_t<T>* square) {
  using Acc = accumulate_t<T>;
  if (count == 0) {
    return 1;
  }
  const Aged<T> values(row.values, row.head, count + 1, row.m, row.n);
  const Aged<T> residuals(row.residuals, row.head, count + 1, row.m, row.n);
  Acc largest = 0;
  for (int j = 0; j <= count; ++j) {
    const T* younger = residuals.rows[j];
    for (int64_t i = 0; i < row.n; ++i) {
      const Acc entry = static_cast<Acc>(younger[i]) -
                        (j == 0 ? Acc(0) : static_cast<Acc>(residuals.rows[j - 1][i]));
      largest = Larger{}(largest, entry < 0 ? -entry : entry);
    }
  }
  if (!is_finite(largest) || largest == Acc(0)) {
    return 1;
  }
  const Acc scale = scale_for(largest);
  Vector<Acc> squares[kSquares] = {};
  for_vectors<T>(row.n, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
    const Vector<Acc> g = load(row.gx + i), r = g - load(row.x + i);
    add_squares<true>(squares, scale * g, scale * r, scale * load(values.rows[1] + i),
                      scale * load(residuals.rows[1] + i));
  });
  Acc scaled[kSquares];
  sums<kSquares>(squares, scaled);
  for (const int secant : {kValueSecant, kStateSecant, kResidualSecant}) {
    square[secant] = scaled[secant];
  }
  return scale;
}

// The whole matrix and the right-hand side anew, scaled, to a lane of systems, [size, size], and of
// rights, [size]. Returns the trace.
template <typename T>
__attribute__((noinline)) accumulate_t<T> system_anew(const RowWindow<T>& row, int count,
                                                      accumulate_t<T> scale, int size, int lane,
                                                      Vector<accumulate_t<T>>* systems,
                                                      Vector<accumulate_t<T>>* rights) {
  using Acc = accumulate_t<T>;
  const Aged<T> residuals(row.residuals, row.head, count + 1, row.m, row.n);
  Acc gram_row[kMaxHistory], rhs[kMaxHistory];
  for (int i = count - 1; i >= 0; --i) {  // rhs is of the last one
    all_dots<true>(residuals.rows + i, count - i, row.n, scale, gram_row, rhs);
    for (int j = i; j < count; ++j) {
      systems[j * size + i][lane] = gram_row[j - i];
    }
  }
  Acc trace = 0;
  for (int i = 0; i < count; ++i) {
    trace += systems[i * size + i][lane];
    rights[i][lane] = rhs[i];
  }
  return trace;
}

// x goes back to where g was finite last, the iterate in slot old, and on from there with that
// beta; or the sample ends with its g(x), to out.
template <typename T>
__attribute__((noinline)) void go_back(T* x, const RowWindow<T>& row, int old, int32_t status,
                                       accumulate_t<T> beta, T* out) {
  const T *value = row.values + old * row.n, *residual = row.residuals + old * row.n;
  if (status != kActive) {
    freeze_row(x, value, out, status, row.n);
    return;
  }
  using Acc = accumulate_t<T>;
  for (int64_t i = 0; i < row.n; ++i) {
    x[i] = static_cast<T>(
        plain_iterate(static_cast<Acc>(value[i]), static_cast<Acc>(residual[i]), beta));
  }
}

// The systems of a team of samples, one a lane, [size, size]: on the stack where they are small.
// Where there is no memory size is 0, by which samples take plain steps. Kernels throw nothing, so
// that no function for the unwinding of a stack is left to the linker: whoever has them calls
// release.
template <typename V>
struct Systems {
  int size;
  V few[144];
  V* all = few;

  FPI_HOST_DEVICE explicit Systems(int wanted) : size(wanted) {
    const size_t bytes = static_cast<size_t>(size) * size * sizeof(V);
    if (bytes > sizeof few) {
      all = static_cast<V*>(aligned_alloc(alignof(V), bytes));
      size = all == nullptr ? 0 : size;
    }
    for (int i = 0; i < size * size; ++i) {
      all[i] = V{};
    }
  }

  FPI_HOST_DEVICE void release() {
    if (all != few) {
      free(all);
    }
  }
};

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
  Systems<Vector<Acc>> systems(window.m - 1);
  const int m = window.m, size = systems.size;
  Vector<Acc>* const __restrict__ system = systems.all;
  Vector<Acc> gamma[kMaxSize];
  struct {
    int64_t row, sample, place;  // in x, in the record, of its window
    int head, count;             // its window's newest slot, and differences
  } team[kTeam];
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
      const int seen = counters[kWindow], most = seen < m ? seen : m - 1;  // differences
      Acc squares[kSquares];
      if (seen > 0) {
        push<true>(x_row, g_row, values, residuals, n, old, head, squares);
      } else {
        push<false>(x_row, g_row, values, residuals, n, old, head, squares);
      }
      const Acc residual = residual_norm(squares[kResidualSquares], x_row, g_row, n);
      const Acc value = value_norm(squares[kValueSquares], g_row, n);
      const RowWindow<T> seldom{x_row, g_row, values, residuals, n, m, head};
      const bool trusted = are_trusted(squares, seen);
      Acc scale = __builtin_expect(trusted, 1) ? Acc(1) : rescale(seldom, most, squares);
      const auto [status, count] =
          decide<T>(residual, value, squares, scale, static_cast<Acc>(restart), m, sample, record);
      if (__builtin_expect(count < 0, 0)) {
        go_back(x_row, seldom, old, status, retreat_beta(count, static_cast<Acc>(beta)),
                out + sample * n);
        (status == kActive ? tally.active : tally.failed) += 1;
        continue;
      }
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
        all_dots<false>(Aged<T>(residuals, head, count + 1, m, n).rows, count, n, Acc(1), gram_row,
                        rhs);
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
      if (__builtin_expect(size > 0 && count > 0 && !(trusted && is_trusted(sum)), 0)) {
        scale = trusted ? rescale(seldom, count, squares) : scale;
        sum = system_anew(seldom, count, scale, size, lane, system, gamma);
      }
      trace[lane] = sum;
      noise[lane] = noise_squares_of<T>(scale * value);
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
  systems.release();
  return tally;
}

#define FPI_INSTANTIATE(T)                                                                \
  template Tally anderson_step(T*, const T*, T*, int64_t, double, double, double,         \
                               const Window<T>&, const Record<accumulate_t<T>>&, int64_t, \
                               int64_t);
FPI_FOR_DTYPES(FPI_INSTANTIATE)
#undef FPI_INSTANTIATE

}  // namespace fpi::FPI_CPU_NAMESPACE
