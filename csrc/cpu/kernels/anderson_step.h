#pragma once

#include <cstdint>

#include "../../math/accumulate.h"
#include "../../math/progress.h"
#include "../capability.h"

namespace fpi {

constexpr int kMaxHistory = 64;

// The window of every sample: rings of m iterates, newest at counters[kHead].
template <typename T>
struct Window {
  T* values;              // g(x), [B, m, n]
  T* residuals;           // g(x) − x, [B, m, n]
  accumulate_t<T>* gram;  // d_i · d_j by slot, [B, m, m]; d_i = r_i − r_{i−1}
  int m;
};

}  // namespace fpi

// One Anderson step of rows [begin, end) of x and gx, [R, n]; returns what came of them.
//
// Bytes a row, window full: reads x, gx and the other m−1 residuals, writes gx and r (m+3 vectors
// of n); reads m values, writes x (m+1): 2m+4 at β = 1, and m−1 more residuals that are still in
// cache at β ≠ 1.
FPI_CPU_KERNEL(template <typename T> Tally anderson_step(
    T* x, const T* gx, T* out, int64_t n, double beta, double ridge, double restart,
    const Window<T>& window, const Record<accumulate_t<T>>& record, int64_t begin, int64_t end));
