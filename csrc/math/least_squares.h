// The small regularised system behind Anderson's weights.
#pragma once

#include "macros.h"
#include "norm.h"

namespace fpi {

// Solves (K + ridge trace I) gamma = b in place, by Cholesky without square roots (L D Lᵀ): a holds
// K on entry and is overwritten, b becomes gamma. a is row-major with n columns; only its lower
// triangle is read. Returns whether the trace is above `noise`, the matrix numerically positive
// definite and gamma finite.
//
// V is a number, or a vector of them: one system a lane, and a mask returned. Size is int, or a
// constant for n, which unrolls the loops. A smaller system may be padded with rows of the
// identity and zeros in b, its trace without them: gamma is the same to the bit.
template <typename V, typename Size, typename Acc>
FPI_HOST_DEVICE auto ridge_solve(Size n, V* a, V* b, V trace, Acc ridge, V noise) {
  const V one = V{} + Acc(1);
  const V shift = ridge * trace;
  auto good = trace > noise;
  for (int i = 0; i < n; ++i) {
    // a_ij ← L_ij D_j, then with L_ij = a_ij / D_j:  D_i = K_ii + shift − Σ L_ij² D_j,
    // y_i = b_i − Σ L_ij y_j. The diagonal keeps 1 / D_i.
    V pivot = a[i * n + i] + shift;
    for (int j = 0; j < i; ++j) {
      V scaled = a[i * n + j];
      for (int l = 0; l < j; ++l) {
        scaled -= a[i * n + l] * (a[j * n + l] * a[l * n + l]);
      }
      const V factor = scaled * a[j * n + j];  // L_ij: free of the state's scale
      a[i * n + j] = scaled;
      pivot -= scaled * factor;
      b[i] -= factor * b[j];
    }
    good = good & (pivot > V{}) & is_finite(pivot);
    a[i * n + i] = one / pivot;
  }
  for (int i = n - 1; i >= 0; --i) {  // gamma_i = y_i / D_i − Σ_{j>i} L_ji gamma_j
    b[i] *= a[i * n + i];
    for (int j = i + 1; j < n; ++j) {
      b[i] -= a[j * n + i] * a[i * n + i] * b[j];
    }
    good = good & is_finite(b[i]);
  }
  return good;
}

}  // namespace fpi
