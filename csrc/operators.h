// The operators as far as they are the same on both devices: their signatures, their checks, and
// what kernels take of their tensors. A Kernel is what a device adds; its run(...) may throw.
#pragma once

#include <optional>

#include "checks.h"
#include "dispatch.h"
#include "math/anderson.h"
#include "math/dense.h"
#include "math/window.h"

namespace fpi {

template <typename Acc>
Record<Acc> record_of(const Tensor& counters, const Tensor& scalars,
                      const std::optional<Tensor>& index, const std::optional<Tensor>& bounds,
                      double rtol, double offset, double rounding, int64_t patience,
                      int64_t max_iterations) {
  return {.counters = static_cast<int32_t*>(counters.mutable_data_ptr()),
          .scalars = static_cast<Acc*>(scalars.mutable_data_ptr()),
          .bounds = bounds ? static_cast<const Acc*>(bounds->const_data_ptr()) : nullptr,
          .bound_columns = bounds && bounds->dim() == 2 ? kBounds : 1,
          .index = index ? static_cast<const int64_t*>(index->const_data_ptr()) : nullptr,
          .limits = {.rtol = static_cast<Acc>(rtol),
                     .offset = static_cast<Acc>(offset),
                     .rounding = static_cast<Acc>(rounding),
                     .patience = static_cast<int32_t>(patience),
                     .max_iterations = static_cast<int32_t>(max_iterations)}};
}

// What a step operator works on.
template <typename T>
struct StepCall {
  T* x;                      // [rows, n]
  const T* gx;               // [rows, n]
  T* out;                    // [B, n]
  int64_t rows, n, samples;  // B
  double beta;
  Record<accumulate_t<T>> record;
  int32_t* tally;
};

template <typename T>
StepCall<T> step_call(const Tensor& x, const Tensor& gx, const Tensor& out, const Tensor& tally,
                      double beta, const Record<accumulate_t<T>>& record) {
  return {.x = static_cast<T*>(x.mutable_data_ptr()),
          .gx = static_cast<const T*>(gx.const_data_ptr()),
          .out = static_cast<T*>(out.mutable_data_ptr()),
          .rows = x.size(0),
          .n = x.size(1),
          .samples = out.size(0),
          .beta = beta,
          .record = record,
          .tally = static_cast<int32_t*>(tally.mutable_data_ptr())};
}

// Kernel::run(x, call, trail)
template <typename Kernel>
void picard_step(Tensor x, Tensor gx, Tensor out, Tensor counters, Tensor scalars, Tensor tally,
                 std::optional<Tensor> index, std::optional<Tensor> bounds, double rtol,
                 double offset, double rounding, int64_t patience, int64_t max_iterations,
                 double beta, std::optional<Tensor> trail) {
  constexpr const char* op = "_picard_step";
  check_step(op, x, gx, out, counters, scalars, tally, index, bounds);
  check_trail(op, x, out, trail);
  check_limits(op, patience, max_iterations);
  dispatch_floating(op, "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto record = record_of<accumulate_t<T>>(counters, scalars, index, bounds, rtol, offset,
                                                   rounding, patience, max_iterations);
    T* states = trail ? static_cast<T*>(trail->mutable_data_ptr()) : nullptr;
    Kernel::run(x, step_call<T>(x, gx, out, tally, beta, record), Trail<T>{states});
  });
}

template <typename T>
Mixing<accumulate_t<T>> mixing_of(double ridge, double restart, int64_t every) {
  using Acc = accumulate_t<T>;
  return {static_cast<Acc>(ridge), static_cast<Acc>(restart), static_cast<int>(every)};
}

// Kernel::run(x, call, window, mixing), for a history up to Kernel::kMost
template <typename Kernel>
void anderson_step(Tensor x, Tensor gx, Tensor out, Tensor counters, Tensor scalars, Tensor tally,
                   std::optional<Tensor> index, std::optional<Tensor> bounds, double rtol,
                   double offset, double rounding, int64_t patience, int64_t max_iterations,
                   double beta, double ridge, double restart, Tensor values, Tensor residuals,
                   Tensor gram, int64_t every) {
  constexpr const char* op = "_anderson_step";
  check_step(op, x, gx, out, counters, scalars, tally, index, bounds);
  check_limits(op, patience, max_iterations);
  check_window(op, x, out, scalars, values, residuals, gram, Kernel::kMost);
  check_every(op, every);
  dispatch_floating(op, "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto record = record_of<accumulate_t<T>>(counters, scalars, index, bounds, rtol, offset,
                                                   rounding, patience, max_iterations);
    const Window<T> window{.values = static_cast<T*>(values.mutable_data_ptr()),
                           .residuals = static_cast<T*>(residuals.mutable_data_ptr()),
                           .gram = static_cast<accumulate_t<T>*>(gram.mutable_data_ptr()),
                           .m = static_cast<int>(values.size(1))};
    Kernel::run(x, step_call<T>(x, gx, out, tally, beta, record), window,
                mixing_of<T>(ridge, restart, every));
  });
}

// [samples, size], [size] for all samples, or nothing.
template <typename T>
PerSample<T> per_sample(const std::optional<Tensor>& u) {
  if (!u) {
    return {nullptr, 0};
  }
  return {static_cast<const T*>(u->const_data_ptr()), u->dim() == 1 ? 0 : u->size(1)};
}

template <typename T>
DenseLayer<T> layer_of(const Tensor& weight, const std::optional<Tensor>& u, int64_t activation) {
  return {.weight = static_cast<const T*>(weight.const_data_ptr()),
          .in = weight.size(1),
          .out = weight.size(0),
          .in_stride = weight.stride(1),
          .out_stride = weight.stride(0),
          .u = per_sample<T>(u),
          .scale = {},
          .activation = static_cast<Activation>(activation)};
}

// Kernel::run(x0, call), for a history up to Kernel::kMost, after Kernel::check(x0, weight,
// hidden_weight, tf32, slots)
template <typename Kernel>
void dense_solve(Tensor x0, Tensor out, Tensor counters, Tensor scalars, Tensor tally,
                 std::optional<Tensor> bounds, double rtol, double offset, double rounding,
                 int64_t patience, int64_t max_iterations, double beta, double ridge,
                 double restart, int64_t history, Tensor weight, std::optional<Tensor> u,
                 int64_t activation, double residual, std::optional<Tensor> scale,
                 std::optional<Tensor> hidden_weight, std::optional<Tensor> hidden_u,
                 int64_t hidden_activation, std::optional<Tensor> hidden_scale,
                 std::optional<Tensor> output_scale, bool tf32, int64_t slots, int64_t every) {
  constexpr const char* op = "_dense_solve";
  check_not_differentiated(op, {x0, weight});
  check_step(op, x0, x0, out, counters, scalars, tally, std::nullopt, bounds);
  check_limits(op, patience, max_iterations);
  check_dense(op, x0, weight, u, activation, scale, hidden_weight, hidden_u, hidden_activation,
              hidden_scale, output_scale);
  check_history(op, history, Kernel::kMost);
  check_every(op, every);
  Kernel::check(x0, weight, hidden_weight, tf32, slots);
  dispatch_floating(op, "x0", x0, [&](auto tag) {
    using T = typename decltype(tag)::type;
    DenseLayer<T> hidden = {};
    if (hidden_weight) {
      hidden = layer_of<T>(*hidden_weight, hidden_u, hidden_activation);
      hidden.scale = per_sample<T>(hidden_scale);
    }
    DenseLayer<T> output = layer_of<T>(weight, u, activation);
    output.scale = per_sample<T>(output_scale);
    const DenseStep<T> dense = {.n = x0.size(1),
                                .scale = per_sample<T>(scale),
                                .residual = residual,
                                .has_hidden = hidden_weight.has_value(),
                                .hidden = hidden,
                                .output = output};
    const DenseCall<T> call = {
        .samples = x0.size(0),
        .x0 = static_cast<const T*>(x0.const_data_ptr()),
        .out = static_cast<T*>(out.mutable_data_ptr()),
        .record = record_of<accumulate_t<T>>(counters, scalars, std::nullopt, bounds, rtol, offset,
                                             rounding, patience, max_iterations),
        .tally = static_cast<int32_t*>(tally.mutable_data_ptr()),
        .beta = beta,
        .mixing = mixing_of<T>(ridge, restart, every),
        .history = static_cast<int>(history),
        .dense = dense,
        .tf32 = tf32,
        .slots = static_cast<int>(slots)};
    Kernel::run(x0, call);
  });
}

}  // namespace fpi
