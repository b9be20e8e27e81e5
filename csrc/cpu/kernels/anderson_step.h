#pragma once

#include <cstdint>

#include "../../math/anderson.h"
#include "../../math/window.h"
#include "../capability.h"

namespace fpi {

constexpr int kMaxHistory = 64;

}  // namespace fpi

// One Anderson step of rows [begin, end) of x and gx, [R, n]; returns what came of them.
//
// Bytes a row, window full: reads x, gx and the other m−1 residuals, writes gx and r (m+3 vectors
// of n); reads m values, writes x (m+1): 2m+4 at β = 1, and m−1 more residuals that are still in
// cache at β ≠ 1. Without a mixture: reads x, gx, a value and a residual, writes gx, r and x: 7.
// The next mixture then takes the products of all residuals that are new, in one pass.
FPI_CPU_KERNEL(template <typename T> Tally anderson_step(
    T* x, const T* gx, T* out, int64_t n, double beta, const Mixing<accumulate_t<T>>& mixing,
    const Window<T>& window, const Record<accumulate_t<T>>& record, int64_t begin, int64_t end));
