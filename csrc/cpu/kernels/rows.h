// What the step kernels do with a row, whatever the solver.
#pragma once

#include "../../math/update.h"
#include "vector.h"

namespace fpi::FPI_CPU_NAMESPACE {

// x ← x + β (g(x) − x). Undamped, a copy: memcpy need not read x from memory to write it.
template <typename T>
FPI_HOST_DEVICE void damped_row(T* x, const T* gx, accumulate_t<T> beta, int64_t n) {
  if (beta == accumulate_t<T>(1)) {
    memcpy(x, gx, n * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    x[i] = damped_update(x[i], gx[i], beta);
  }
}

// The finished sample's result, to out and to its row of x, which stays there from now on: g(x), or
// the last finite iterate where g(x) is not finite.
template <typename T>
FPI_HOST_DEVICE void freeze_row(T* x, const T* gx, T* out, int32_t status, int64_t n) {
  memcpy(out, status == kNonfinite ? x : gx, n * sizeof(T));
  if (status != kNonfinite) {
    memcpy(x, gx, n * sizeof(T));
  }
}

// ‖g(x) − x‖ of a row, from its squares.
template <typename T>
FPI_HOST_DEVICE accumulate_t<T> residual_norm(accumulate_t<T> squares, const T* x, const T* gx,
                                              int64_t n) {
  return norm_from<T>(squares, n, [&](int64_t i, auto load) __attribute__((always_inline)) {
    return load(gx + i) - load(x + i);
  });
}

// ‖g(x)‖ likewise.
template <typename T>
FPI_HOST_DEVICE accumulate_t<T> value_norm(accumulate_t<T> squares, const T* gx, int64_t n) {
  return norm_from<T>(squares, n, [&](int64_t i, auto load) __attribute__((always_inline)) {
    return load(gx + i);
  });
}

}  // namespace fpi::FPI_CPU_NAMESPACE
