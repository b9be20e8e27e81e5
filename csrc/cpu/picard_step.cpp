#include "kernels/picard_step.h"

#include <torch/csrc/stable/library.h>

#include "../dispatch.h"
#include "step.h"

namespace fpi {
namespace {

void picard_step_cpu(Tensor x, Tensor gx, Tensor out, Tensor counters, Tensor scalars, Tensor tally,
                     std::optional<Tensor> index, std::optional<Tensor> floor, double rtol,
                     double offset, double rounding, int64_t patience, int64_t max_iterations,
                     double beta) {
  check_step("_picard_step", x, gx, out, counters, scalars, tally, index, floor);
  dispatch_floating("_picard_step", "x", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto record = record_of<accumulate_t<T>>(counters, scalars, index, floor, rtol, offset,
                                                   rounding, patience, max_iterations);
    T* x_data = static_cast<T*>(x.mutable_data_ptr());
    const T* gx_data = static_cast<const T*>(gx.const_data_ptr());
    T* out_data = static_cast<T*>(out.mutable_data_ptr());
    const int64_t n = x.size(1);
    const auto kernel = FPI_CPU_DISPATCH(picard_step<T>);
    for_rows(x, n, tally, [&](int64_t begin, int64_t end) {
      return kernel(x_data, gx_data, out_data, n, beta, record, begin, end);
    });
  });
}

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) {
  m.impl("_picard_step", TORCH_BOX(&fpi::picard_step_cpu));
}
