#include "kernels/anderson_step.h"

#include <torch/csrc/stable/library.h>

#include "../dispatch.h"
#include "step.h"

namespace fpi {
namespace {

void anderson_step_cpu(Tensor x, Tensor gx, Tensor out, Tensor counters, Tensor scalars,
                       Tensor tally, std::optional<Tensor> index, std::optional<Tensor> floor,
                       double rtol, double offset, double rounding, int64_t patience,
                       int64_t max_iterations, double beta, double ridge, double restart,
                       Tensor values, Tensor residuals, Tensor gram) {
  constexpr const char* op = "_anderson_step";
  check_step(op, x, gx, out, counters, scalars, tally, index, floor);
  check_window(op, x, out, scalars, values, residuals, gram, kMaxHistory);
  dispatch_floating(op, "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    const auto record = record_of<Acc>(counters, scalars, index, floor, rtol, offset, rounding,
                                       patience, max_iterations);
    const int m = static_cast<int>(values.size(1));
    const Window<T> window{static_cast<T*>(values.mutable_data_ptr()),
                           static_cast<T*>(residuals.mutable_data_ptr()),
                           static_cast<Acc*>(gram.mutable_data_ptr()), m};
    T* x_data = static_cast<T*>(x.mutable_data_ptr());
    const T* gx_data = static_cast<const T*>(gx.const_data_ptr());
    T* out_data = static_cast<T*>(out.mutable_data_ptr());
    const int64_t n = x.size(1);
    const auto kernel = FPI_CPU_DISPATCH(anderson_step<T>);
    for_rows(x, n * m, tally, [&](int64_t begin, int64_t end) {
      return kernel(x_data, gx_data, out_data, n, beta, ridge, restart, window, record, begin, end);
    });
  });
}

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) {
  m.impl("_anderson_step", TORCH_BOX(&fpi::anderson_step_cpu));
}
