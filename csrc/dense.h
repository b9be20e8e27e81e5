// The dense operators' tensors as the kernels of both devices take them.
#pragma once

#include <optional>

#include "checks.h"
#include "math/dense.h"

namespace fpi {

// [samples, size], [size] for all samples, or nothing.
template <typename T>
PerSample<T> per_sample(const std::optional<Tensor>& u) {
  if (!u) {
    return {nullptr, 0};
  }
  return {static_cast<const T*>(u->const_data_ptr()), u->dim() == 1 ? 0 : u->size(1)};
}

template <typename T>
DenseLayer<T> layer_of(const Tensor& weight, const std::optional<Tensor>& u, int64_t activation,
                       const std::optional<Tensor>& scale = std::nullopt) {
  return {.weight = static_cast<const T*>(weight.const_data_ptr()),
          .in = weight.size(1),
          .out = weight.size(0),
          .in_stride = weight.stride(1),
          .out_stride = weight.stride(0),
          .u = per_sample<T>(u),
          .scale = per_sample<T>(scale),
          .activation = static_cast<Activation>(activation)};
}

template <typename T>
DenseStep<T> dense_step_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& u,
                           int64_t activation, double residual, const std::optional<Tensor>& scale,
                           const std::optional<Tensor>& hidden_weight,
                           const std::optional<Tensor>& hidden_u, int64_t hidden_activation,
                           const std::optional<Tensor>& hidden_scale) {
  DenseStep<T> step = {x.size(1), per_sample<T>(scale),
                       residual,  hidden_weight.has_value(),
                       {},        layer_of<T>(weight, u, activation)};
  if (hidden_weight) {
    step.hidden = layer_of<T>(*hidden_weight, hidden_u, hidden_activation, hidden_scale);
  }
  return step;
}

}  // namespace fpi
