#include "anderson_step.h"

#include <cstdlib>
#include <type_traits>

#include "../../math/anderson.h"
#include "dtypes.h"
#include "window.h"

namespace fpi::FPI_CPU_NAMESPACE {
namespace {

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
// kMixes: whether a row of the Gram matrix follows, which has that of Δr.
template <bool kHasOlder, bool kMixes, typename T>
FPI_HOST_DEVICE void push(const T* x, const T* gx, T* values, T* residuals, int64_t n, int old,
                          int head, accumulate_t<T>* square) {
  using Acc = accumulate_t<T>;
  Vector<Acc> squares[kSquares] = {}, of_residuals[1] = {};
  for_vectors<T>(n, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
    const Vector<Acc> g = load(gx + i);
    const Vector<Acc> r = g - load(x + i);
    if constexpr (kHasOlder) {
      const Vector<Acc> dg = g - load(values + old * n + i);
      const Vector<Acc> dr = r - load(residuals + old * n + i), dx = dg - dr;
      squares[kValueSecant] += dg * dg;
      squares[kStateSecant] += dx * dx;
      if constexpr (!kMixes) {
        of_residuals[0] += dr * dr;
      }
    }
    store(values + head * n + i, g);
    store(residuals + head * n + i, r);
    squares[kResidualSquares] += r * r;
    squares[kValueSquares] += g * g;
  });
  sums<kSquares>(squares, square);
  square[kResidualSecant] = 0;  // not known yet: decide takes no gain from it
  if constexpr (kHasOlder && !kMixes) {
    sums<1>(of_residuals, square + kResidualSecant);
  }
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
Tally anderson_step(T* x, const T* gx, T* out, int64_t n, double all_beta,
                    const Mixing<accumulate_t<T>>& mixing, const Window<T>& window,
                    const Record<accumulate_t<T>>& record, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  const Acc ridge = mixing.ridge;
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
      const int plain = counters[kPlain];
      Acc squares[kAndersonNorms];
      if (seen == 0) {
        push<false, true>(x_row, g_row, values, residuals, n, old, head, squares);
      } else if (plain + 1 >= mixing.every) {
        push<true, true>(x_row, g_row, values, residuals, n, old, head, squares);
      } else {
        push<true, false>(x_row, g_row, values, residuals, n, old, head, squares);
      }
      const Acc residual = residual_norm(squares[kResidualSquares], x_row, g_row, n);
      const Acc value = value_norm(squares[kValueSquares], g_row, n);
      const auto seldom = [&]() __attribute__((always_inline)) {
        return RowWindow<T>{x_row, g_row, values, residuals, n, m, head};
      };
      const bool trusted = are_trusted(squares, seen);
      Acc scale = __builtin_expect(trusted, 1) ? Acc(1) : rescale(seldom(), most, squares);
      const auto [status, count, mixes] =
          decide<T>(residual, value, squares, scale, mixing, m, sample, record);
      const Acc beta = beta_of(counters, static_cast<Acc>(all_beta));
      if (__builtin_expect(count < 0, 0)) {
        go_back(x_row, seldom(), old, status, retreat_beta(count, beta), out + sample * n);
        (status == kActive ? tally.active : tally.failed) += 1;
        continue;
      }
      if (seen > 0 && m > 1 && (status != kActive || count == 0)) {
        keep_last_gain(seldom(), record.scalars + sample * kScalars);
      }
      if (status != kActive) {
        freeze_row(x_row, g_row, out + sample * n, status, n);
        tally.failed += status != kConverged;
        continue;
      }
      ++tally.active;
      if (!mixes) {
        extend_window(counters, head, count);
        damped_row(x_row, g_row, beta, n);
        continue;
      }
      const int lane = members++;
      team[lane] = {row, sample, place, head, count};

      // As many rows of the Gram matrix are new as iterates since the last mixture; it is kept by
      // slot, so nothing else moves.
      Acc gram_row[kMaxHistory], rhs[kMaxHistory];
      Acc* gram = window.gram + place * m * m;
      if (count > 0) {
        const Aged<T> aged(residuals, head, count + 1, m, n);
        for (int age = plain < count ? plain : count - 1; age > 0; --age) {
          all_dots<false>(aged.rows + age, count - age, n, Acc(1), gram_row, rhs);
          const int slot = slot_of(age, head, m);
          for (int j = age; j < count; ++j) {
            const int other = slot_of(j, head, m);
            gram[slot * m + other] = gram[other * m + slot] = gram_row[j - age];
          }
        }
        all_dots<false>(aged.rows, count, n, Acc(1), gram_row, rhs);
      }
      Acc sum = 0;
      int slots[kMaxHistory];
      for (int i = 0; i < count; ++i) {
        slots[i] = slot_of(i, head, m);
      }
      const auto assemble = [&](auto size, auto count) __attribute__((always_inline)) {
        for (int i = 0; i < count; ++i) {
          gram[head * m + slots[i]] = gram[slots[i] * m + head] = gram_row[i];
          const Acc* older = gram + slots[i] * m;
          for (int j = 0; j <= i; ++j) {
            system[i * size + j][lane] = older[slots[j]];
          }
          sum += older[slots[i]];
          gamma[i][lane] = rhs[i];
        }
        for (int i = count; i < size; ++i) {  // rows of the identity
          for (int j = 0; j < i; ++j) {
            system[i * size + j][lane] = Acc(0);
          }
          system[i * size + i][lane] = Acc(1);
          gamma[i][lane] = Acc(0);
        }
      };
      if (size == 4 && count == 4) {
        assemble(std::integral_constant<int, 4>{}, std::integral_constant<int, 4>{});
      } else {
        assemble(size, size == 0 ? 0 : count);
      }
      Acc* gain = record.scalars + sample * kScalars + kGain;
      if (__builtin_expect(size > 0 && count > 0 && !(trusted && is_trusted(sum)), 0)) {
        if (trusted) {  // but for an older difference
          scale = rescale(seldom(), count, squares);
          *gain = larger_gain(*gain, squares[kValueSecant], squares[kResidualSecant],
                              scale * noise_of<T>(value));
        }
        sum = system_anew(seldom(), count, scale, size, lane, system, gamma);
      } else if (count > 0) {
        *gain = larger_gain(*gain, squares[kValueSecant], gram_row[0], noise_of<T>(value));
      }
      trace[lane] = sum;
      noise[lane] = noise_squares_of<T>(scale * value);
    }

    const auto solved = size == 4 ? ridge_solve(std::integral_constant<int, 4>{}, system, gamma,
                                                trace, ridge, noise)
                                  : ridge_solve(size, system, gamma, trace, ridge, noise);
    for (int lane = 0; lane < members; ++lane) {
      const auto [at, sample, place, head, differences] = team[lane];
      T* x_row = x + at * n;
      int32_t* counters = record.counters + sample * kCounters;
      const Acc beta = beta_of(counters, static_cast<Acc>(all_beta));
      const int count = update_window(counters, head, differences, solved[lane] != 0);
      if (count == 0) {
        damped_row(x_row, gx + at * n, beta, n);
        continue;
      }
      Acc weights[kMaxSize];
      for (int j = 0; j < count; ++j) {
        weights[j] = gamma[j][lane];
      }
      const Aged<T> values(window.values + place * m * n, head, count + 1, m, n);
      const Aged<T> residuals(window.residuals + place * m * n, head, count + 1, m, n);
      if (beta != Acc(1)) {
        mix<true>(x_row, values.rows, residuals.rows, count, weights, beta, n);
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

#define FPI_INSTANTIATE(T)                                                                        \
  template Tally anderson_step(T*, const T*, T*, int64_t, double, const Mixing<accumulate_t<T>>&, \
                               const Window<T>&, const Record<accumulate_t<T>>&, int64_t,         \
                               int64_t);
FPI_FOR_DTYPES(FPI_INSTANTIATE)
#undef FPI_INSTANTIATE

}  // namespace fpi::FPI_CPU_NAMESPACE
