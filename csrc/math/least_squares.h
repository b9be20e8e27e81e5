// The small regularised system behind Anderson's weights.
#pragma once

#include "macros.h"
#include "progress.h"

namespace fpi {

// Solves (K + ridge tr(K) I) gamma = b by Cholesky, in place: a holds K on entry and is overwritten,
// b becomes gamma. a is row-major with row stride `stride`; only its lower triangle is read.
// Returns whether the matrix was numerically positive definite and gamma is finite.
template <typename Acc>
FPI_HOST_DEVICE bool ridge_solve(int n, int stride, Acc* a, Acc* b, Acc ridge) {
  Acc trace = 0;
  for (int i = 0; i < n; ++i) {
    trace += a[i * stride + i];
  }
  const Acc shift = ridge * trace;
  for (int i = 0; i < n; ++i) {
    // L_ij = (K_ij − Σ_{l<j} L_il L_jl) / L_jj; the diagonal stores 1 / L_ii.
    for (int j = 0; j < i; ++j) {
      Acc sum = a[i * stride + j];
      for (int l = 0; l < j; ++l) {
        sum -= a[i * stride + l] * a[j * stride + l];
      }
      a[i * stride + j] = sum * a[j * stride + j];
    }
    Acc pivot = a[i * stride + i] + shift;
    for (int l = 0; l < i; ++l) {
      pivot -= a[i * stride + l] * a[i * stride + l];
    }
    if (!(pivot > Acc(0)) || !is_finite(pivot)) {
      return false;
    }
    a[i * stride + i] = Acc(1) / square_root(pivot);
  }
  for (int i = 0; i < n; ++i) {  // L y = b
    for (int l = 0; l < i; ++l) {
      b[i] -= a[i * stride + l] * b[l];
    }
    b[i] *= a[i * stride + i];
  }
  bool finite = true;
  for (int i = n - 1; i >= 0; --i) {  // Lᵀ gamma = y
    for (int l = i + 1; l < n; ++l) {
      b[i] -= a[l * stride + i] * b[l];
    }
    b[i] *= a[i * stride + i];
    finite = finite && is_finite(b[i]);
  }
  return finite;
}

}  // namespace fpi
