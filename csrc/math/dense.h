// A step of dense layers, as the kernels of both devices see it.
//
//   one layer    g(x) = φ(α t + t Wᵀ + u)
//   two layers   g(x) = φ(α t + h Wᵀ + u),   h = φ₁(t W₁ᵀ + u₁)
//
// with t = s ∘ x, or t = x where there is no s, and d ∘ (…) + u in place of φ(… + u) in a layer
// that has a d. The tangent of such a step is another one, and so is its adjoint, of the transposed
// weights: see fpi_cuda/forms/dense.py.
#pragma once

#include <cstdint>

#include "accumulate.h"
#include "activation.h"
#include "anderson.h"

namespace fpi {

// What is added to each sample: a row of its own, one row for all (stride 0), or nothing (null).
template <typename T>
struct PerSample {
  const T* values;
  int64_t stride;

  FPI_HOST_DEVICE const T* of(int64_t sample) const {
    return values == nullptr ? nullptr : values + sample * stride;
  }
};

// One linear map with what follows it. weight(o, i) = weight[o * out_stride + i * in_stride].
template <typename T>
struct DenseLayer {
  const T* weight;
  int64_t in, out;
  int64_t in_stride, out_stride;
  PerSample<T> u;
  PerSample<T> scale;  // d; then there is no activation
  Activation activation;
};

template <typename T>
struct DenseStep {
  int64_t n;           // values of a state
  PerSample<T> scale;  // s
  double residual;     // α
  bool has_hidden;
  DenseLayer<T> hidden;  // W₁, u₁, φ₁ or d
  DenseLayer<T> output;  // W, u, φ or d
};

// A solve of such a step.
template <typename T>
struct DenseCall {
  int64_t samples;
  const T* x0;  // [samples, n]
  T* out;       // [samples, n]
  Record<accumulate_t<T>> record;
  int32_t* tally;
  double beta;
  Mixing<accumulate_t<T>> mixing;
  int history;  // 1: Picard
  DenseStep<T> dense;
  bool tf32;
  int slots;  // 0: as fits the machine
};

}  // namespace fpi
