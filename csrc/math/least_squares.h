// The small regularised system behind Anderson's weights.
#pragma once

#include "macros.h"
#include "progress.h"

namespace fpi {

// Solves (K + ridge tr(K) I) gamma = b in place, by Cholesky without square roots (L D Lᵀ): a holds
// K on entry and is overwritten, b becomes gamma. a is row-major with n columns; only its lower
// triangle is read. Returns whether the matrix was numerically positive definite, its trace above
// `noise`, and gamma finite.
template <typename Acc>
FPI_HOST_DEVICE bool ridge_solve(int n, Acc* a, Acc* b, Acc ridge, Acc noise) {
  Acc trace = 0;
  for (int i = 0; i < n; ++i) {
    trace += a[i * n + i];
  }
  if (!(trace > noise)) {
    return false;
  }
  const Acc shift = ridge * trace;
  for (int i = 0; i < n; ++i) {
    // a_ij ← L_ij D_j, then with L_ij = a_ij / D_j:  D_i = K_ii + shift − Σ L_ij² D_j,
    // y_i = b_i − Σ L_ij y_j. The diagonal keeps 1 / D_i.
    Acc pivot = a[i * n + i] + shift;
    for (int j = 0; j < i; ++j) {
      Acc scaled = a[i * n + j];
      for (int l = 0; l < j; ++l) {
        scaled -= a[i * n + l] * (a[j * n + l] * a[l * n + l]);
      }
      const Acc factor = scaled * a[j * n + j];  // L_ij: free of the state's scale
      a[i * n + j] = scaled;
      pivot -= scaled * factor;
      b[i] -= factor * b[j];
    }
    if (!(pivot > Acc(0)) || !is_finite(pivot)) {
      return false;
    }
    a[i * n + i] = Acc(1) / pivot;
  }
  bool finite = true;
  for (int i = n - 1; i >= 0; --i) {  // gamma_i = y_i / D_i − Σ_{j>i} L_ji gamma_j
    b[i] *= a[i * n + i];
    for (int j = i + 1; j < n; ++j) {
      b[i] -= a[j * n + i] * a[i * n + i] * b[j];
    }
    finite = finite && is_finite(b[i]);
  }
  return finite;
}

}  // namespace fpi
