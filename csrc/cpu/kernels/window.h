// Sums over a sample's window that Anderson's step takes: in every iteration, and anew where those
// can't be trusted.
#pragma once

#include <type_traits>

#include "../../math/anderson.h"
#include "anderson_step.h"
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

// Sums of a step that are folded together: all but that of Δr, which an active sample's newest row
// of the Gram matrix has.
constexpr int kSquares = 4;
static_assert(kResidualSecant == kSquares && kAndersonNorms == kSquares + 1);

// A row and its sample's window, as the seldom ways of a step take them.
template <typename T>
struct RowWindow {
  const T *x, *gx;
  const T *values, *residuals;  // [m, n]
  int64_t n;
  int m, head;
};

// The squares of the secant to the iterate before, from values multiplied by scale, to square.
template <typename T>
void secants(const RowWindow<T>& row, accumulate_t<T> scale, accumulate_t<T>* square) {
  using Acc = accumulate_t<T>;
  const Aged<T> values(row.values, row.head, 2, row.m, row.n);
  const Aged<T> residuals(row.residuals, row.head, 2, row.m, row.n);
  Vector<Acc> squares[kSquares] = {};
  for_vectors<T>(row.n, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
    const Vector<Acc> g = load(row.gx + i), r = g - load(row.x + i);
    const Vector<Acc> older = load(residuals.rows[1] + i);
    const Vector<Acc> dg = scale * (g - load(values.rows[1] + i)), dx = dg - scale * (r - older);
    const Vector<Acc> dr = scale * (load(residuals.rows[0] + i) - older);
    squares[0] += dg * dg;
    squares[1] += dx * dx;
    squares[2] += dr * dr;
  });
  Acc sum[kSquares];
  sums<kSquares>(squares, sum);
  square[kValueSecant] = sum[0];
  square[kStateSecant] = sum[1];
  square[kResidualSecant] = sum[2];
}

// Where sums can't be trusted: the power of two by which residual and differences, count of them,
// come near 1, and the squares of secants so scaled. 1 where there is nothing to scale.
template <typename T>
__attribute__((noinline)) accumulate_t<T> rescale(const RowWindow<T>& row, int count,
                                                  accumulate_t<T>* square) {
  using Acc = accumulate_t<T>;
  if (count == 0) {
    return 1;
  }
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
  secants(row, scale, square);
  return scale;
}

// The gain of the last pair of iterates, where no row of the Gram matrix follows: the sample has
// ended, or its window starts anew.
template <typename T>
__attribute__((noinline)) void keep_last_gain(const RowWindow<T>& row, accumulate_t<T>* scalars) {
  using Acc = accumulate_t<T>;
  if (!is_finite(scalars[kResidual]) || scalars[kResidual] == Acc(0)) {
    return;
  }
  const Acc scale = scale_for(scalars[kResidual]);
  Acc square[kAndersonNorms];
  secants(row, scale, square);
  scalars[kGain] = larger_gain(scalars[kGain], square[kValueSecant], square[kResidualSecant],
                               scale * noise_of<T>(scalars[kValue]));
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

}  // namespace
}  // namespace fpi::FPI_CPU_NAMESPACE
