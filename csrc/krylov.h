// The operator of BiCGSTAB as far as it is the same on both devices.
#pragma once

#include "math/bicgstab.h"
#include "operators.h"

namespace fpi {

// Kernel::run(x, call, krylov)
template <typename Kernel>
void bicgstab_step(Tensor x, Tensor gx, Tensor out, Tensor counters, Tensor scalars, Tensor tally,
                   std::optional<Tensor> index, std::optional<Tensor> bounds, double rtol,
                   double offset, double rounding, int64_t patience, int64_t max_iterations,
                   double beta, Tensor base, Tensor vectors, Tensor numbers) {
  constexpr const char* op = "_bicgstab_step";
  check_step(op, x, gx, out, counters, scalars, tally, index, bounds);
  check_limits(op, patience, max_iterations);
  check_sizes(op, "base", base, {out.size(0), kKrylovStates, x.size(1)});
  check_sizes(op, "vectors", vectors, {out.size(0), kKrylovVectors, x.size(1)});
  check_sizes(op, "numbers", numbers, {out.size(0), kKrylovNumbers});
  check_same_dtype(op, "base", base, "x", x);
  check_same_dtype(op, "vectors", vectors, "scalars", scalars);
  check_same_dtype(op, "numbers", numbers, "scalars", scalars);
  if (x.is_cuda()) {  // as in check_step
    check_same_device(op, "base", base, "x", x);
    check_same_device(op, "vectors", vectors, "x", x);
    check_same_device(op, "numbers", numbers, "x", x);
  }
  dispatch_floating(op, "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    const auto record = record_of<Acc>(counters, scalars, index, bounds, rtol, offset, rounding,
                                       patience, max_iterations);
    const Krylov<T> krylov{.base = static_cast<T*>(base.mutable_data_ptr()),
                           .vectors = static_cast<Acc*>(vectors.mutable_data_ptr()),
                           .numbers = static_cast<Acc*>(numbers.mutable_data_ptr())};
    Kernel::run(x, step_call<T>(x, gx, out, tally, beta, record), krylov);
  });
}

}  // namespace fpi
